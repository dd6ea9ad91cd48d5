"""FLUX's transformer as a no-grad forward of our own over a rollout copy: the policy's weights and keys, fewer passes.

What it saves against the library's forward: the modulation of all T steps is one matrix product per layer and rollout, text
is embedded once per prompt, rotary tables are made once per shape, Q, K, V (and the MLP of a single block) are one product,
single blocks concatenate nothing, and in FP8 the kernel that writes a product's input quantises it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from adagrpo_kernels import gelu_join, layer_norm_modulate
from torch import Tensor, nn

from ..algorithm.tables import RolloutTable
from ..forward.compiling import Compilation, Say
from ..forward.forwards import Attend, is_quantised
from ..forward.projection import Projection, base_of, choose_quantise, fits_fp8, linear_layers
from ..forward.rollout_copy import RolloutCopy
from .base import Conditioning
from .flux import FluxModel

Rotary = tuple[Tensor, Tensor]
NORM_EPS = 1e-6
CALLED = ("time_text_embed", "context_embedder", "x_embedder", "proj_out")  # as the library does
FP16_BOUND = 65504


@dataclasses.dataclass(frozen=True)
class _Stream:
    """One of a double block's two streams: projections, norms of Q and K, columns of its modulation."""

    qkv: Projection
    out: Projection
    up: Projection
    down: Projection
    norms: tuple[nn.RMSNorm, ...]
    modulation: slice


@dataclasses.dataclass(frozen=True)
class _Single:
    """A single block: Q, K, V and MLP in one projection; attention and MLP projected together."""

    qkv_mlp: Projection
    out: Projection
    norms: tuple[nn.RMSNorm, ...]
    modulation: slice


class FusedFluxForward:
    """``Forward`` of a ``FluxTransformer2DModel``, plain or with LoRA adapters.

    Args:
        model: the policy.
        table: noise levels of the rollout.
        dtype: of the copy.
        fp8: quantise products, one scale per token and channel. Quantisation is part of the op before, except for inputs that
            LoRA adapters read too: those are written in ``dtype``, then quantised.
        attend: (q, k, v [R, L, H, D]) -> [R, L, H, D]; None is torch's own attention.
        compiled: torch.compile of the element-wise part between products (QK-norm and rotary embedding).
        impl: of the kernels.
        compiler: torch.compile's backend.
        say: told when it cannot be compiled, which then runs uncompiled; None makes that an error.

    Raises:
        ValueError: a transformer with a tensor that this forward would not read, or with another norm of Q or K.
    """

    def __init__(
        self,
        model: FluxModel,
        table: RolloutTable,
        dtype: torch.dtype,
        fp8: bool = False,
        attend: Attend | None = None,
        compiled: bool = False,
        impl: str | None = None,
        compiler: str = "inductor",
        say: Say | None = None,
    ) -> None:
        self.model, self.table, self.dtype, self.impl = model, table, dtype, impl
        self.attend = attend or torch_attention
        config = model.transformer.config
        self.head_dim, self.width = config.attention_head_dim, config.num_attention_heads * config.attention_head_dim
        build = _ProjectionBuilder(model.transformer, dtype, fp8, impl)
        doubles = [f"transformer_blocks.{i}" for i in range(config.num_layers)]
        singles = [f"single_transformer_blocks.{i}" for i in range(config.num_single_layers)]
        qkv, text_qkv = "attn.to_q+attn.to_k+attn.to_v", "attn.add_q_proj+attn.add_k_proj+attn.add_v_proj"
        image = [build(b, qkv=qkv, out="attn.to_out.0", up="ff.net.0.proj", down="ff.net.2") for b in doubles]
        text = [
            build(b, qkv=text_qkv, out="attn.to_add_out", up="ff_context.net.0.proj", down="ff_context.net.2") for b in doubles
        ]
        single = [build(b, qkv_mlp=f"{qkv}+proj_mlp", out="proj_out") for b in singles]
        self.copy = RolloutCopy(model.transformer, dtype, build.by_name)
        t = self.copy.transformer
        for name in build.by_name:
            t.set_submodule(name, nn.Identity())
        self._modulators: list[tuple[nn.Module, slice]] = []
        self._read = [*build.by_name, *CALLED]
        self._doubles = [
            (
                _Stream(**image[i], norms=self._norms(b, "norm_q", "norm_k"), modulation=self._columns(f"{b}.norm1")),
                _Stream(
                    **text[i],
                    norms=self._norms(b, "norm_added_q", "norm_added_k"),
                    modulation=self._columns(f"{b}.norm1_context"),
                ),
            )
            for i, b in enumerate(doubles)
        ]
        self._singles = [
            _Single(**single[i], norms=self._norms(b, "norm_q", "norm_k"), modulation=self._columns(f"{b}.norm"))
            for i, b in enumerate(singles)
        ]
        self._last = self._columns("norm_out")
        self._require_all(model.transformer)
        self.lossy = fp8 or dtype is not model.dtype
        self.own_bytes = self.copy.own_bytes
        self._rotary: dict[tuple[int, tuple[int, int]], Rotary] = {}
        self._norm_rope: Any = norm_rope
        self._compilation: Compilation | None = None
        if compiled:
            self._norm_rope = torch.compile(norm_rope, fullgraph=True, dynamic=False, backend=compiler)
            self._compilation = Compilation("engine.forward = fused: norm and rotary embedding of Q and K", self._plain, say)

    def refresh(self) -> None:
        """Follow the policy's weights, in place."""
        self.copy.refresh()

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """Embedded text [S, tokens, D] and the modulations [S, T, all layers' columns] of every prompt and noise level."""
        t, sigmas = self.copy.transformer, self.table.sigmas
        embeds, pooled = (conditioning.tensors[name].to(self.dtype) for name in self.model.family.text_keys)
        prompts, steps = pooled.shape[0], sigmas.shape[0]
        time = self.model.timestep(sigmas, self.dtype) * 1000
        embedder_input = [time.repeat(prompts)]
        if t.config.guidance_embeds:
            guidance = torch.full_like(embedder_input[0], self.model.guidance) * 1000
            embedder_input.append(guidance)
        embedding = t.time_text_embed(*embedder_input, pooled.repeat_interleave(steps, 0))
        active = F.silu(embedding)
        modulation = active.new_empty(prompts * steps, self._last.stop)
        for linear, columns in self._modulators:
            modulation[:, columns] = linear(active)
        return Conditioning({"text": t.context_embedder(embeds), "modulation": modulation.unflatten(0, (prompts, steps))})

    def velocity(self, x: Tensor, index: Tensor, prepared: Conditioning, slot: Tensor) -> Tensor:
        """See ``Forward``.

        Raises:
            RunError: a part cannot be compiled, and nobody is to be told.
        """
        run = functools.partial(self._velocity, x, index, prepared, slot)
        return run() if self._compilation is None else self._compilation(run)

    def _plain(self) -> None:
        self._norm_rope = norm_rope

    def _velocity(self, x: Tensor, index: Tensor, prepared: Conditioning, slot: Tensor) -> Tensor:
        t = self.copy.transformer
        table = prepared.tensors["modulation"]
        at = slot * table.shape[1] + self.table.position.index_select(0, index)
        modulation = table.flatten(0, 1).index_select(0, at)
        text = prepared.tensors["text"].index_select(0, slot)
        image = t.x_embedder(x.to(self.dtype))
        rotary = self._rotary_table(text.shape[1])
        for image_stream, text_stream in self._doubles:
            image, text = self._double(image_stream, text_stream, image, text, modulation, rotary)
        joint = torch.cat([text, image], 1)
        for block in self._singles:
            joint = self._single(block, joint, modulation, rotary)
        scale, shift = modulation[:, self._last].chunk(2, 1)
        return t.proj_out(layer_norm_modulate(joint[:, text.shape[1] :], shift, scale, NORM_EPS, impl=self.impl))

    def _double(
        self, image_stream: _Stream, text_stream: _Stream, image: Tensor, text: Tensor, modulation: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor]:
        """One double block: [R, image tokens, D] and [R, text tokens, D]."""
        streams, states = (text_stream, image_stream), [text, image]
        parts = [modulation[:, stream.modulation].chunk(6, 1) for stream in streams]
        packed = [
            self._modulated(stream.qkv, state, shift, scale)
            for stream, state, (shift, scale, *_) in zip(streams, states, parts, strict=True)
        ]
        attended = self._attention(packed, [stream.norms for stream in streams], rotary)
        length = text.shape[1]
        for i, (stream, part) in enumerate(zip(streams, (slice(0, length), slice(length, None)), strict=True)):
            _, _, gate, shift, scale, gate_mlp = parts[i]
            state = _gated(states[i], gate, stream.out(attended[:, part]))
            up = self._modulated(stream.up, state, shift, scale)
            states[i] = _gated(state, gate_mlp, self._activated(stream.down, up))
        return states[1], _bounded(states[0])

    def _single(self, block: _Single, joint: Tensor, modulation: Tensor, rotary: Rotary) -> Tensor:
        """One single block: [R, tokens, D]."""
        shift, scale, gate = modulation[:, block.modulation].chunk(3, 1)
        packed = self._modulated(block.qkv_mlp, joint, shift, scale)
        attended = self._attention([packed], [block.norms], rotary)
        return _bounded(_gated(joint, gate, self._activated(block.out, packed[..., 3 * self.width :], attended)))

    def _modulated(self, projection: Projection, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """The projection of the normalised, modulated ``x``."""
        if projection.takes_quantized:
            quantized = layer_norm_modulate(x, shift, scale, NORM_EPS, quantized=True, impl=self.impl)
            return projection.from_quantized(quantized)
        return projection(layer_norm_modulate(x, shift, scale, NORM_EPS, impl=self.impl))

    def _activated(self, projection: Projection, mlp: Tensor, first: Tensor | None = None) -> Tensor:
        """The projection of ``first`` beside GELU(``mlp``)."""
        if projection.takes_quantized:
            return projection.from_quantized(gelu_join(mlp, first, quantized=True, impl=self.impl))
        return projection(gelu_join(mlp, first, impl=self.impl))

    def _attention(self, packed: Sequence[Tensor], norms: Sequence[tuple[nn.RMSNorm, ...]], rotary: Rotary) -> Tensor:
        """Attention [R, tokens, D] over all streams; their Q, K, V are the first columns of ``packed``."""
        heads = [p[..., : 3 * self.width].unflatten(-1, (3, -1, self.head_dim)) for p in packed]
        weights = [(q_norm.weight, k_norm.weight) for q_norm, k_norm in norms]
        q, k = self._norm_rope([h[:, :, :2] for h in heads], weights, *rotary)
        v = heads[0][:, :, 2] if len(heads) == 1 else torch.cat([h[:, :, 2] for h in heads], 1)
        return self.attend(q, k, v).flatten(2)

    def _rotary_table(self, text_tokens: int) -> Rotary:
        """(cos, sin) [tokens, head] of text and image, made once per shape."""
        key = (text_tokens, self.model.grid)
        if key not in self._rotary:
            self._rotary[key] = self.copy.transformer.pos_embed(self.model.token_ids(text_tokens))
        return self._rotary[key]

    def _columns(self, norm: str) -> slice:
        """Columns of a norm's modulation in the table of ``prepare``."""
        linear = self.copy.transformer.get_submodule(f"{norm}.linear")
        first = self._modulators[-1][1].stop if self._modulators else 0
        columns = slice(first, first + base_of(linear).out_features)
        self._modulators.append((linear, columns))
        self._read.append(f"{norm}.linear")
        return columns

    def _norms(self, block: str, *names: str) -> tuple[nn.RMSNorm, ...]:
        """The norms of Q and K, whose weights are read and not called."""
        places = [f"{block}.attn.{name}" for name in names]
        norms = tuple(self.copy.transformer.get_submodule(place) for place in places)
        for place, norm in zip(places, norms, strict=True):
            if type(norm) is not nn.RMSNorm or norm.eps != NORM_EPS or norm.weight is None:
                raise ValueError(f"{place} is not an RMS norm with a weight and an epsilon of {NORM_EPS:g}")
        self._read += places
        return norms

    def _require_all(self, transformer: nn.Module) -> None:
        """Refuse a transformer of which this forward would leave out a tensor."""
        read = tuple(f"{name}." for name in self._read)
        unread = [name for name, _ in transformer.named_parameters() if not name.startswith(read)]
        if unread:
            raise ValueError(f"it knows nothing of the transformer's tensor {unread[0]}")


class _ProjectionBuilder:
    """Makes the projections of a block from the names of its layers; ``a+b`` packs two."""

    def __init__(self, transformer: nn.Module, dtype: torch.dtype, fp8: bool, impl: str | None) -> None:
        self.layers, self.dtype = dict(linear_layers(transformer)), dtype
        self.quantise = choose_quantise("rowwise", traceable=False, impl=impl) if fp8 else None
        self.by_name: dict[str, Projection] = {}

    def __call__(self, block: str, **groups: str) -> dict[str, Any]:
        """A projection for each group of layer names below ``block``."""
        return {key: self._project([f"{block}.{name}" for name in group.split("+")]) for key, group in groups.items()}

    def _project(self, names: Sequence[str]) -> Projection:
        for name in names:
            if name not in self.layers:
                raise ValueError(
                    f"the transformer has no linear layer {name}, or one with an adapter of another kind than LoRA"
                )
        layers = [self.layers[name] for name in names]
        quantise = self.quantise if all(map(is_quantised, names)) and all(map(fits_fp8, layers)) else None
        projection = Projection(layers, self.dtype, quantise)
        self.by_name |= dict.fromkeys(names, projection)
        return projection


def norm_rope(
    heads: Sequence[Tensor], weights: Sequence[tuple[Tensor, Tensor]], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """RMS-normalised Q and K of all streams with rotary embedding; float32 inside (float64 for float64), one rounding.

    Args:
        heads: per stream [R, L, 2, H, D], Q and K.
        weights: of Q's and K's norm [D], per stream.
        cos, sin: [all L, D], pairs interleaved.

    Returns:
        Q and K, [R, all L, H, D].
    """
    dtype = heads[0].dtype
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    results = []
    for which in range(2):
        parts = [
            F.rms_norm(h[:, :, which].to(wide), h.shape[-1:], weight[which].to(wide), NORM_EPS)
            for h, weight in zip(heads, weights, strict=True)
        ]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-imaginary, real], -1).flatten(-2)
        results.append((x * cos[:, None] + turned * sin[:, None]).to(dtype))
    return results[0], results[1]


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over [R, L, H, D] by torch's own kernels."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _gated(residual: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """``residual + gate * x`` with gate [R, D]."""
    return torch.addcmul(residual, gate.unsqueeze(1), x)


def _bounded(x: Tensor) -> Tensor:
    """``x`` without infinities where it is float16, as the library has it."""
    return x.clip(-FP16_BOUND, FP16_BOUND) if x.dtype is torch.float16 else x
