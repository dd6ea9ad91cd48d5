"""What no family differs in: a diffusers transformer as policy, its reference, its adapters, what it saves, loads, exports."""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import InputError
from .base import Conditioning, PromptEncoder
from .export import existing, load_lora, refuse_other_weights, save_lora, scheduler_options, stock_call
from .loading import first_line, quiet
from .pipeline import Source
from .registry import Family
from .schedule import make_scheduler, scheduler_levels
from .starting import Start
from .text import PipelineEncoder, Shapes


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a policy is set up.

    Attributes:
        dtype, device: of its weights.
        height, width: of pictures, in pixels.
        max_text_tokens: of a prompt.
        guidance: scale.
        negative_prompt: what classifier-free guidance leads away from.
        prompt_cache: prompts whose embeddings are kept.
    """

    dtype: torch.dtype
    device: torch.device
    height: int
    width: int
    max_text_tokens: int = 256
    guidance: float = 3.5
    negative_prompt: str = ""
    prompt_cache: int = 512


class Policy(abc.ABC):
    """A diffusers transformer as policy; implements ``FlowModel`` but for what a family has to say.

    Args:
        transformer: frozen parameters stay frozen.
        vae: ``AutoencoderKL``.
        encoder: prompts to tensors of the family's ``text_keys``.
        height, width: image size in pixels.
        guidance: scale.
        negative_prompt: what classifier-free guidance leads away from; only families that are ``guided`` read it.
        pipeline, source: the diffusers pipeline it came from and where that lies, needed for ``export``.

    Attributes:
        family: its row of the registry.
        scheduler: what ``scheduler_config.json`` of its pipeline says; None of random weights without one.
        timestep_rounding: of the transformer's timestep: ``pipeline``, the stock pipeline's (1000 sigma in the model's dtype),
            ``bf16`` (sigma in bf16), or ``truncated`` (the whole number below 1000 sigma).
        start: the file that the adapters began as; None where they began at zero.
        reference_adapters: copies of adapters by name that ``reference`` swaps in; empty where it takes the adapters away.
    """

    family: ClassVar[Family]

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        encoder: PromptEncoder,
        height: int,
        width: int,
        guidance: float,
        negative_prompt: str = "",
        pipeline: Any = None,
        source: Source | None = None,
    ) -> None:
        self.transformer, self.vae, self.encoder = transformer, vae, encoder
        self.pipeline, self.source = pipeline, source
        self.guidance, self.negative_prompt = guidance, negative_prompt
        self.timestep_rounding = "pipeline"
        self.scheduler: Mapping[str, Any] | None = None
        transformer._repeated_blocks = list(self.family.repeated_blocks)  # some of diffusers' classes name none
        self._active = transformer
        self._reference: nn.Module | None = None
        self.start: Start | None = None
        self.reference_adapters: dict[str, Tensor] = {}
        self._size = [0, 0]  # one list for this model and those `around` makes: they change size together
        self.resize(height, width)

    @property
    @abc.abstractmethod
    def multiple(self) -> int:
        """What height and width must be multiples of, in pixels."""

    @property
    @abc.abstractmethod
    def latent_shape(self) -> tuple[int, int]:
        """(L, C) of one packed latent."""

    @abc.abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See ``FlowModel``; of ``self._active``."""

    @abc.abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """See ``FlowModel``."""

    @abc.abstractmethod
    def call_arguments(self) -> Mapping[str, Any]:
        """What the stock pipeline's call takes beyond steps, size and length of the text."""

    def given_levels(self, steps: int) -> Sequence[float] | None:
        """Noise levels [steps] that the stock pipeline's call hands to its scheduler; None where it leaves them to it."""
        return None

    @staticmethod
    @abc.abstractmethod
    def embed(pipeline: Any, prompt: str, max_tokens: int) -> Sequence[Tensor]:
        """A prompt's tensors in the order of ``text_keys``, by a pipeline's encoders; the first dimension is 1."""

    @staticmethod
    @abc.abstractmethod
    def text_shapes(config: Any, max_tokens: int) -> Sequence[tuple[int, ...]]:
        """Shapes of what ``embed`` makes of one prompt, the first dimension apart, for a transformer of this ``config``."""

    @classmethod
    def named_shapes(cls, config: Any, max_tokens: int) -> Shapes:
        """``text_shapes`` by key."""
        return dict(zip(cls.family.text_keys, cls.text_shapes(config, max_tokens), strict=True))

    def resize(self, height: int, width: int) -> None:
        """Sample pictures of this size from now on.

        Raises:
            InputError: sizes that do not divide into patches.
        """
        if height % self.multiple or width % self.multiple:
            raise InputError(
                f"model.height x model.width = {height} x {width}: both must be multiples of {self.multiple} for this model"
            )
        self._size[:] = height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of latent patches."""
        return self._size[0] // self.multiple, self._size[1] // self.multiple

    @property
    def rows_per_image(self) -> int:
        """Rows that one row of ``velocity`` is to the transformer."""
        return self.family.rows_per_image(self.guidance)

    def schedule(self, steps: int, height: int, width: int) -> Tensor:
        """Noise levels [steps + 1], float64 on the CPU, of the stock pipeline's call.

        Raises:
            InputError: it has no scheduler that says them.
        """
        tokens = (height // self.multiple) * (width // self.multiple)
        return scheduler_levels(make_scheduler(self.scheduler), steps, self.given_levels(steps), tokens)

    def around(self, transformer: Any) -> Self:
        """This model around another transformer of the same architecture; the rest, size included, is shared."""
        sibling = copy.copy(self)
        sibling.transformer = sibling._active = transformer
        return sibling

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def components(self) -> dict[str, nn.Module]:
        """What makes pictures of prompts and noise, by the pipeline's names."""
        encoders = {} if self.pipeline is None else self.pipeline.components
        texts = {name: part for name, part in encoders.items() if name.startswith("text_encoder") and part is not None}
        return {"transformer": self.transformer, "vae": self.vae, **texts}

    @property
    def is_lora(self) -> bool:
        """Whether adapters are trained, not the transformer itself."""
        return bool(getattr(self.transformer, "peft_config", None))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Tensors of the family's ``text_keys``, in the model's dtype, whose first dimension is the prompt."""
        return self.encoder(prompts)

    def timestep(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """The transformer's ``timestep`` of noise levels [R], rounded as ``timestep_rounding`` says."""
        if self.timestep_rounding == "bf16":
            return sigma.to(torch.bfloat16).to(dtype)
        scaled = sigma * 1000
        return (scaled.floor() if self.timestep_rounding == "truncated" else scaled).to(dtype) / 1000

    def pictures(self, z: Tensor) -> Tensor:
        """Images [R, 3, H, W] in [0, 1], in the VAE's dtype and row by row in memory, from latents [R, C, h, w] as the
        transformer has them."""
        z = z.to(self.vae.dtype)
        z = z / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return (self.vae.decode(z, return_dict=False)[0] / 2 + 0.5).clamp(0, 1).contiguous()

    def keep_reference(self) -> None:
        """Remember the present weights as the reference of the KL term; adapters that began at zero need no copy."""
        if self.start is not None:
            self.reference_adapters = {name: p.detach().clone() for name, p in self.trainable()}
        elif not self.is_lora:
            self._reference = copy.deepcopy(self.transformer).requires_grad_(False).eval()

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, ``velocity`` is that of the initial weights."""
        swapped, bare = self.reference_adapters, self.is_lora and not self.reference_adapters
        if swapped:
            self._active = lambda **given: torch.func.functional_call(self.transformer, swapped, kwargs=given)
        elif bare:
            self.transformer.disable_adapters()
        elif self._reference is None:
            raise RuntimeError("call keep_reference() before training")
        else:
            self._active = self._reference
        try:
            yield
        finally:
            self._active = self.transformer
            if bare:
                self.transformer.enable_adapters()

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that require gradients, by name."""
        return ((name, p) for name, p in self.transformer.named_parameters() if p.requires_grad)

    def save_portable(self, folder: Path) -> None:
        """``transformer/`` as diffusers writes it, or ``pytorch_lora_weights.safetensors`` (see ``save_lora``)."""
        if self.is_lora:
            save_lora(self.family, self.transformer, folder)
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

    def export(self, folder: Path, shift: float | str, steps: int) -> str:
        """Write a complete pipeline folder whose scheduler takes the noise levels of the training, or the LoRA file; returns
        Python that samples with it.

        Raises:
            InputError: a model without files of its own.
        """
        if self.pipeline is None or self.source is None:
            raise InputError("a model of random weights has no pipeline to export, and its adapters none to act on")
        arguments = {"num_inference_steps": steps, **self.call_arguments()}
        arguments |= {"height": self._size[0], "width": self._size[1]}
        if self.given_levels(steps) is None and not isinstance(shift, str):  # the scheduler's own are not those of the training
            arguments["sigmas"] = [1 - k / steps for k in range(steps)]
        note = ""
        if self.timestep_rounding != "pipeline":
            note = f"# trained with model.timestep = {self.timestep_rounding}: diffusers rounds timesteps in another way"
        if isinstance(self.encoder, PipelineEncoder):
            arguments["max_sequence_length"] = self.encoder.max_tokens
        absent = [name for name, part in self.pipeline.components.items() if part is None and name in self.family.parts]
        if self.is_lora:
            self.save_portable(folder)
            return stock_call(self.family, self.source, folder, self.dtype, self.device, shift, arguments, note, absent)
        self.pipeline.scheduler = make_scheduler(self.scheduler if isinstance(shift, str) else scheduler_options(shift))
        with quiet():  # of the parts that it does without
            self.pipeline.save_pretrained(folder)
        return stock_call(self.family, Source(str(folder)), None, self.dtype, self.device, shift, arguments, note, absent)


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
