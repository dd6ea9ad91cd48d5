"""Linear layers of the rollout copy: packed, quantised, with LoRA adapters as an unmerged branch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from adagrpo_kernels import Quantized, quantize_rowwise, quantize_rowwise_reference, quantize_tensorwise
from torch import Tensor, nn

FP8_MULTIPLE = 16  # torch._scaled_mm takes no other sizes
Quantise = Callable[[Tensor], Quantized]


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers by name; one that carries LoRA adapters is one layer under the name it had without them."""
    found: list[str] = []
    for name, child in module.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(child, nn.Linear) or isinstance(getattr(child, "base_layer", None), nn.Linear):
            found.append(name)
            yield name, child


def base_of(layer: nn.Module) -> nn.Linear:
    """The linear layer under its adapters."""
    base = getattr(layer, "base_layer", layer)
    assert isinstance(base, nn.Linear)
    return base


def fits_fp8(layer: nn.Module) -> bool:
    """Whether both sizes of the weight are what ``torch._scaled_mm`` takes."""
    base = base_of(layer)
    return base.in_features % FP8_MULTIPLE == 0 and base.out_features % FP8_MULTIPLE == 0


def choose_quantise(scaling: str, traceable: bool, impl: str | None = None) -> Quantise:
    """Quantisation of activations: ``rowwise`` (one scale per token) or ``tensorwise`` (one per tensor).

    Args:
        traceable: plain PyTorch, for torch.compile to fuse; else the kernel where it can run.
    """
    if scaling == "tensorwise":
        return quantize_tensorwise
    return quantize_rowwise_reference if traceable else lambda x: quantize_rowwise(x, impl=impl)


class Projection(nn.Module):
    """Linear layers that share their input, as one static weight that ``refresh`` rewrites in place.

    A frozen single layer in the copy's precision is shared with the policy, not copied. LoRA adapters are never merged: at
    |dW|/|W| = 1e-4 a bf16 or FP8 base would swallow most of the update.

    Args:
        sources: linear layers of the policy, with or without adapters; their outputs are concatenated.
        dtype: of activations and of weights that are not quantised.
        quantise: of the activations; None keeps ``dtype``.
        scaling: of the weight, ``rowwise`` or ``tensorwise``.

    Raises:
        ValueError: an adapter that is not a plain LoRA, or layers of which only some have a bias.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None

    def __init__(
        self, sources: Sequence[nn.Module], dtype: torch.dtype, quantise: Quantise | None = None, scaling: str = "rowwise"
    ) -> None:
        super().__init__()
        self.dtype, self.quantise, self.scaling = dtype, quantise, scaling
        self._sources = tuple(sources)
        self._bases = [(base_of(source),) for source in sources]  # tuples: they are not this module's children
        bases = [base for (base,) in self._bases]
        device, columns = bases[0].weight.device, bases[0].in_features
        rows = sum(base.out_features for base in bases)
        self.product_dtype = torch.float32 if dtype is not torch.bfloat16 and device.type != "cuda" else torch.bfloat16
        self._shared = len(bases) == 1 and quantise is None and not bases[0].weight.requires_grad
        self._shared &= bases[0].weight.dtype is dtype
        weight, scale = bases[0].weight.detach(), None
        if quantise is not None:
            weight = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
            scale = torch.empty((rows, 1) if scaling == "rowwise" else (), dtype=torch.float32, device=device)
        elif not self._shared:
            weight = torch.empty(rows, columns, dtype=dtype, device=device)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        bias = None
        if len({base.bias is None for base in bases}) > 1:
            raise ValueError("only some of the layers that share an input have a bias")
        if bases[0].bias is not None:
            bias = torch.empty(rows, dtype=dtype if quantise is None else self.product_dtype, device=device)
        self.register_buffer("bias", bias, persistent=False)
        self._adapters = _adapters(sources)
        ranks = [a.shape[0] for a, _, _, _ in self._adapters]
        self.lora_scaling = [scale for _, _, scale, _ in self._adapters]
        self.lora_columns = [columns for _, _, _, columns in self._adapters]
        self.lora_ranks = ranks
        lora_a = torch.empty(sum(ranks), columns, dtype=dtype, device=device) if ranks else None
        self.register_buffer("lora_a", lora_a, persistent=False)
        for i, (_, b, _, _) in enumerate(self._adapters):
            self.register_buffer(f"lora_b{i}", torch.empty(b.shape, dtype=dtype, device=device), persistent=False)
        self._live_base = any(p.requires_grad for base in bases for p in base.parameters())
        self.refresh(everything=True)

    def rebuilt(self) -> Projection:
        """What would stand for the policy's layers if it were made now."""
        return Projection(self._sources, self.dtype, self.quantise, self.scaling)

    @torch.no_grad()
    def refresh(self, everything: bool = False) -> None:
        """Rewrite from the policy what training changes; addresses stay."""
        bases = [base for (base,) in self._bases]
        if everything or self._live_base:
            self._refresh_weight([base.weight for base in bases])
            if self.bias is not None:
                torch.cat([base.bias.to(self.bias.dtype) for base in bases], out=self.bias)
        first = 0
        for i, (a, b, _, _) in enumerate(self._adapters):
            assert self.lora_a is not None
            self.lora_a[first : first + a.shape[0]].copy_(a)
            getattr(self, f"lora_b{i}").copy_(b)
            first += a.shape[0]

    def _refresh_weight(self, weights: Sequence[Tensor]) -> None:
        if self._shared:
            return
        if self.scale is None:
            first = 0
            for weight in weights:
                self.weight[first : first + weight.shape[0]].copy_(weight)
                first += weight.shape[0]
        elif self.scaling == "tensorwise":
            values, scale = quantize_tensorwise(torch.cat([w.to(self.dtype) for w in weights]))
            self.weight.copy_(values)
            self.scale.copy_(scale.reshape(()))
        else:
            first = 0
            for weight in weights:  # rows are quantised apart, so parts are what the whole would be
                rows = slice(first, first + weight.shape[0])
                quantize_rowwise(weight.to(self.dtype), out=Quantized(self.weight[rows], self.scale[rows]))
                first += weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] for inputs [..., K] in the copy's precision."""
        if self.quantise is not None:
            return self.from_quantized(self.quantise(x), x)
        y = F.linear(x, self.weight, self.bias)
        return y if self.lora_a is None else self._adapt(y, x)

    @property
    def takes_quantized(self) -> bool:
        """Whether the op before may hand over a quantised input and nothing else."""
        return self.quantise is not None and self.lora_a is None

    def from_quantized(self, q: Quantized, x: Tensor | None = None) -> Tensor:
        """[..., N] for inputs already quantised; ``x``, the same unquantised, is read by adapters only."""
        assert self.scale is not None
        tensorwise = self.scaling == "tensorwise"
        y = torch._scaled_mm(
            q.values.reshape(-1, q.values.shape[-1]),
            self.weight.t(),
            scale_a=q.scale.reshape(()) if tensorwise else q.scale.reshape(-1, 1),
            scale_b=self.scale if tensorwise else self.scale.t(),
            bias=self.bias,
            out_dtype=self.product_dtype,
            use_fast_accum=True,
        )
        y = y.reshape(*q.values.shape[:-1], -1).to(self.dtype)
        if self.lora_a is None:
            return y
        assert x is not None
        return self._adapt(y, x)

    def _adapt(self, y: Tensor, x: Tensor) -> Tensor:
        """``y`` [..., N] plus ``scaling * B(A(x))`` of every adapter, added in place."""
        assert self.lora_a is not None
        flat, hidden = y.view(-1, y.shape[-1]), F.linear(x, self.lora_a).flatten(0, -2)
        first = 0
        for i, ((left, right), rank, scaling) in enumerate(
            zip(self.lora_columns, self.lora_ranks, self.lora_scaling, strict=True)
        ):
            part = hidden[:, first : first + rank]
            flat[:, left:right].addmm_(part, getattr(self, f"lora_b{i}").t(), alpha=scaling)
            first += rank
        return y

    @property
    def own_bytes(self) -> int:
        """Memory held beside the policy's."""
        tensors = [t for name, t in self.named_buffers() if not (name == "weight" and self._shared)]
        return sum(t.numel() * t.element_size() for t in tensors)


def _adapters(sources: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor, float, tuple[int, int]]]:
    """(A [r, K], B [n, r], scaling, output columns) of every active adapter.

    Raises:
        ValueError: an adapter that computes anything but ``scaling * B(A(x))``.
    """
    found: list[tuple[Tensor, Tensor, float, tuple[int, int]]] = []
    first = 0
    for source in sources:
        columns = (first, first + base_of(source).out_features)
        first = columns[1]
        if not hasattr(source, "base_layer"):
            continue
        layer: Any = source
        if not hasattr(layer, "lora_A") or layer.lora_variant or layer.merged or layer.disable_adapters:
            raise ValueError(f"{type(layer).__name__}: only plain, unmerged, enabled LoRA adapters have a rollout copy")
        for name in layer.active_adapters:
            if name not in layer.lora_A:
                continue
            a, b = layer.lora_A[name], layer.lora_B[name]
            if type(a) is not nn.Linear or type(b) is not nn.Linear or a.bias is not None or b.bias is not None:
                raise ValueError("LoRA adapters with a bias, or of another form than two matrices, have no rollout copy")
            if getattr(layer.lora_dropout[name], "p", 0) > 0:
                raise ValueError("LoRA adapters with dropout have no rollout copy")
            found.append((a.weight, b.weight, float(layer.scaling[name]), columns))
    return found
