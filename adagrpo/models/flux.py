"""FLUX.1: any diffusers ``FluxPipeline`` folder or Hub id, guidance-distilled or not."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .base import Conditioning, PromptEncoder
from .export import existing, load_lora, refuse_other_weights, save_lora, scheduler_options, stock_call
from .loading import first_line
from .pipeline import Source, load_pipeline


class PipelineEncoder:
    """CLIP and T5 of a FluxPipeline behind a bounded least-recently-used cache.

    Prompts are encoded one by one: an embedding then never depends on which prompts happened to share its batch, which a
    resumed run with an empty cache could not repeat.
    """

    def __init__(self, pipeline: Any, max_tokens: int, capacity: int) -> None:
        self.pipeline, self.max_tokens, self.capacity = pipeline, max_tokens, capacity
        self._cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        pairs = [self._one(prompt) for prompt in prompts]
        embeds, pooled = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        return Conditioning({"prompt_embeds": embeds, "pooled": pooled})

    def forget(self) -> None:
        """Empty the cache."""
        self._cache.clear()

    def _one(self, prompt: str) -> tuple[Tensor, Tensor]:
        if prompt in self._cache:
            self._cache.move_to_end(prompt)
            return self._cache[prompt]
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompt, prompt_2=None, max_sequence_length=self.max_tokens, device=self.pipeline.transformer.device
        )
        self._cache[prompt] = (embeds, pooled)
        if len(self._cache) > self.capacity:
            self._cache.popitem(last=False)
        return embeds, pooled


class FluxModel:
    """A FLUX transformer as policy; implements ``FlowModel``.

    Args:
        transformer: ``FluxTransformer2DModel``; frozen parameters stay frozen.
        vae: ``AutoencoderKL``.
        encoder: prompts to ``prompt_embeds`` [N, tokens, D] and ``pooled`` [N, D'].
        height, width: image size in pixels.
        guidance: fed to guidance-distilled transformers.
        pipeline, source: the diffusers pipeline it came from and where that lies, needed for ``export``.

    Attributes:
        timestep_rounding: of the transformer's timestep: ``pipeline``, the stock pipeline's (1000 sigma in the model's dtype),
            or ``bf16`` (sigma in bf16).
    """

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        encoder: PromptEncoder,
        height: int,
        width: int,
        guidance: float,
        pipeline: Any = None,
        source: Source | None = None,
    ) -> None:
        self.transformer, self.vae, self.encoder = transformer, vae, encoder
        self.pipeline, self.source = pipeline, source
        self.guidance = guidance
        self.timestep_rounding = "pipeline"
        self.scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self._active = transformer
        self._reference: nn.Module | None = None
        self._ids: dict[tuple[tuple[int, int], torch.device], Tensor] = {}
        self._size = [0, 0]  # one list for this model and those `around` makes: they change size together
        self.resize(height, width)

    def resize(self, height: int, width: int) -> None:
        """Sample pictures of this size from now on.

        Raises:
            InputError: sizes that do not divide into patches.
        """
        if height % (2 * self.scale) or width % (2 * self.scale):
            raise InputError(
                f"model.height x model.width = {height} x {width}: both must be multiples of {2 * self.scale} for this model"
            )
        self._size[:] = height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of latent patches."""
        return self._size[0] // (2 * self.scale), self._size[1] // (2 * self.scale)

    def around(self, transformer: Any) -> FluxModel:
        """This model around another transformer of the same architecture; the rest, size included, is shared."""
        sibling = copy.copy(self)
        sibling.transformer = sibling._active = transformer
        return sibling

    def token_ids(self, text_tokens: int) -> Tensor:
        """Positions [text + image tokens, 3] that the rotary embedding takes; those of text are 0."""
        return torch.cat([torch.zeros(text_tokens, 3, device=self.device, dtype=self.dtype), self._image_ids()])

    def _image_ids(self) -> Tensor:
        """Positions [L, 3] of the image's patches, made once per size and device."""
        key = (self.grid, self.device)
        if key not in self._ids:
            rows = torch.arange(self.grid[0]).repeat_interleave(self.grid[1])
            columns = torch.arange(self.grid[1]).repeat(self.grid[0])
            ids = torch.stack([torch.zeros_like(rows), rows, columns], 1)
            self._ids[key] = ids.to(self.device, self.dtype)
        return self._ids[key]

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def latent_shape(self) -> tuple[int, int]:
        return self.grid[0] * self.grid[1], self.transformer.config.in_channels

    @property
    def components(self) -> dict[str, nn.Module]:
        """What makes pictures of prompts and noise, by the pipeline's names."""
        encoders = {} if self.pipeline is None else self.pipeline.components
        texts = {name: part for name, part in encoders.items() if name.startswith("text_encoder")}
        return {"transformer": self.transformer, "vae": self.vae, **texts}

    @property
    def is_lora(self) -> bool:
        """Whether adapters are trained, not the transformer itself."""
        return bool(getattr(self.transformer, "peft_config", None))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """``prompt_embeds`` [N, tokens, D] and ``pooled`` [N, D'] in the model's dtype."""
        return self.encoder(prompts)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity [R, L, C], computed as the stock pipeline does; the timestep's rounding is ``timestep_rounding``'s."""
        dtype = self.dtype
        embeds, pooled = (conditioning.tensors[name].to(dtype) for name in ("prompt_embeds", "pooled"))
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((x.shape[0],), self.guidance, device=x.device, dtype=torch.float32)
        return self._active(
            hidden_states=x.to(dtype),
            timestep=self.timestep(sigma, dtype),
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x.device, dtype=dtype),
            img_ids=self._image_ids(),
            return_dict=False,
        )[0]

    def timestep(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """The transformer's ``timestep`` of noise levels [R], rounded as ``timestep_rounding`` says."""
        if self.timestep_rounding == "bf16":
            return sigma.to(torch.bfloat16).to(dtype)
        return (sigma * 1000).to(dtype) / 1000

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Images [R, 3, H, W] in [0, 1], in the VAE's dtype."""
        (rows, columns), channels = self.grid, x.shape[2] // 4
        z = x.reshape(-1, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        z = z.reshape(-1, channels, 2 * rows, 2 * columns).to(self.vae.dtype)
        z = z / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return (self.vae.decode(z, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def keep_reference(self) -> None:
        """Remember the present weights as the reference of the KL term; adapters need no copy."""
        if not self.is_lora:
            self._reference = copy.deepcopy(self.transformer).requires_grad_(False).eval()

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, ``velocity`` is that of the initial weights."""
        if self.is_lora:
            self.transformer.disable_adapters()
        elif self._reference is None:
            raise RuntimeError("call keep_reference() before training")
        else:
            self._active = self._reference
        try:
            yield
        finally:
            self._active = self.transformer
            if self.is_lora:
                self.transformer.enable_adapters()

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that require gradients, by name."""
        return ((name, p) for name, p in self.transformer.named_parameters() if p.requires_grad)

    def save_portable(self, folder: Path) -> None:
        """``transformer/`` as diffusers writes it, or ``pytorch_lora_weights.safetensors`` (see ``save_lora``)."""
        if self.is_lora:
            save_lora(self.transformer, folder)
        else:
            self.transformer.save_pretrained(folder / "transformer")

    def load_portable(self, folder: Path) -> None:
        """Inverse of ``save_portable``, in place.

        Raises:
            InputError: missing or damaged files, weights of another model, or values that are not finite.
        """
        from safetensors.torch import load_file

        if self.is_lora:
            load_lora(self.transformer, folder)
            return
        shards = sorted(existing(folder / "transformer").glob("*.safetensors"))
        try:
            weights = {name: t for shard in shards for name, t in load_file(shard).items()}
        except Exception as error:  # safetensors' error derives from nothing narrower
            raise InputError(f"{folder}: its weights cannot be read ({first_line(error)})") from error
        refuse_other_weights(weights, self.transformer.state_dict(), folder)
        self.transformer.load_state_dict(weights)

    def export(self, folder: Path, shift: float, steps: int) -> str:
        """Write a complete pipeline folder whose scheduler takes the noise levels of the training, or the LoRA file; returns
        Python that samples with it.

        Raises:
            InputError: a model without files of its own.
        """
        if self.pipeline is None or self.source is None:
            raise InputError("a model of random weights has no pipeline to export, and its adapters none to act on")
        arguments: dict[str, Any] = {"num_inference_steps": steps}
        if self.transformer.config.guidance_embeds:
            arguments["guidance_scale"] = self.guidance
        arguments |= {"height": self._size[0], "width": self._size[1]}
        note = ""
        if self.timestep_rounding != "pipeline":
            note = f"# trained with model.timestep = {self.timestep_rounding}: diffusers rounds timesteps in another way"
        if isinstance(self.encoder, PipelineEncoder):
            arguments["max_sequence_length"] = self.encoder.max_tokens
        if self.is_lora:
            self.save_portable(folder)
            return stock_call(self.source, folder, self.dtype, self.device, shift, arguments, note)
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**scheduler_options(shift))
        self.pipeline.save_pretrained(folder)
        return stock_call(Source(str(folder)), None, self.dtype, self.device, shift, arguments, note)


def add_lora(transformer: Any, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Freeze the transformer and add trainable low-rank adapters to the modules whose names end in ``targets``.

    Raises:
        InputError: a target matches no module, or a module that matches got no adapter.
    """
    from peft import LoraConfig

    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    named = {t: [name for name in names if name == t or name.endswith("." + t)] for t in targets}
    missing = [t for t, found in named.items() if not found]
    if missing:
        raise InputError(f"model.lora_targets: the transformer has no linear layer named {', '.join(missing)}")
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets)))
    bound = {name for name, module in transformer.named_modules() if getattr(module, "lora_A", None)}
    unbound = [name for found in named.values() for name in found if name not in bound]
    if unbound:
        raise InputError(f"model.lora_targets: no adapter was bound to {', '.join(unbound)}; name other layers")


def load_flux(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    height: int,
    width: int,
    max_text_tokens: int = 256,
    guidance: float = 3.5,
    prompt_cache: int = 512,
    variant: str = "",
    revision: str = "",
) -> FluxModel:
    """Load a FluxPipeline; every parameter of its transformer is trainable.

    Args:
        path: folder, Hub id (downloaded unless ``HF_HUB_OFFLINE`` is set), or ``random:flux1-dev`` for the architecture of
            FLUX.1-dev with random weights (benchmarks; any device, ``meta`` included).
        variant, revision: see ``Source``.

    Raises:
        InputError: no such folder or id, not a FLUX pipeline, or one that is not whole and sound.
    """
    if path == "random:flux1-dev":
        from .architecture import random_flux1_dev

        return random_flux1_dev(dtype, device, height, width, max_text_tokens, guidance)
    source = Source(path, variant, revision)
    pipeline = load_pipeline(source, dtype, device)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False).eval()
    pipeline.transformer.requires_grad_(True).eval()
    encoder = PipelineEncoder(pipeline, max_text_tokens, prompt_cache)
    return FluxModel(pipeline.transformer, pipeline.vae, encoder, height, width, guidance, pipeline, source)
