"""The families of models that are built in, a row each: all that the house asks of one without looking into it.

Importing this module imports neither a model nor a library, so that recipes and forwards, which lie below the models, may ask
it too; a row's classes are imported when they are wanted.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Component:
    """A module with a folder of its own.

    Attributes:
        name: of the folder, and in errors.
        library: ``diffusers`` or ``transformers``.
        kind: name of its class there.
        spare: regular expression of tensors that its files may hold beyond what the class has.
        optional: whether a pipeline may be saved without it.
        unread: regular expression of tensors that the class has and never reads: its files may lack them.
    """

    name: str
    library: str
    kind: str
    spare: str = ""
    optional: bool = False
    unread: str = ""

    @property
    def cls(self) -> Any:
        """The class; imports its library."""
        return getattr(importlib.import_module(self.library), self.kind)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: the value of ``model.family``.
        title: what messages call its models.
        adapter: import path of its ``models.policy.Policy``.
        pipeline: name of diffusers' class.
        components: modules of the pipeline that make pictures; ``transformer`` is the policy.
        tokenizers: of the pipeline, and the text encoder that each speaks to.
        text_keys: names of the tensors that a prompt becomes, in the adapter's order.
        repeated_blocks: classes of the transformer's blocks that ``engine.forward = compile`` compiles; empty refuses it.
        fp8: whether FP8 may take the layers that ``forward.forwards.is_quantised`` names.
        attention: whether diffusers can change the transformer's attention, for ``engine.attention``.
        guidance: default of ``model.guidance``.
        guided: whether guidance is classifier-free, each image then being two rows of the transformer; else it is an
            embedding of the transformer, or nothing.
        fused: import path of its ``Forward`` for ``engine.forward = fused``; empty refuses it.
        lora_targets: modules that get an adapter, by the end of their name; those of FLUX are the default of the recipes' key.
        architectures: values of ``model.path`` whose shapes, hence memory, are known without files, and where they are written:
            settings by component and of the scheduler. Those that begin with ``random:`` are loaded with random weights.
    """

    name: str
    title: str
    adapter: str
    pipeline: str
    components: tuple[Component, ...]
    tokenizers: Mapping[str, str]
    text_keys: tuple[str, ...]
    repeated_blocks: tuple[str, ...] = ()
    fp8: bool = False
    attention: bool = False
    guidance: float = 3.5
    guided: bool = False
    fused: str = ""
    lora_targets: tuple[str, ...] = ()
    architectures: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def forwards(self) -> tuple[str, ...]:
        """Values of ``engine.forward`` that it has, ``auto`` apart."""
        return ("eager", *["compile"] * bool(self.repeated_blocks), *["fused"] * bool(self.fused))

    def rows_per_image(self, guidance: float) -> int:
        """Rows of the transformer that an image takes at this guidance: as in diffusers, none is any up to 1."""
        return 2 if self.guided and guidance > 1 else 1

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of components and tokenizers."""
        return (*(component.name for component in self.components), *self.tokenizers)

    @property
    def pipeline_class(self) -> Any:
        """diffusers' class; imports it."""
        return getattr(importlib.import_module("diffusers"), self.pipeline)

    def architecture(self, path: str) -> Mapping[str, Mapping[str, Any]]:
        """Settings by component of one of ``architectures``."""
        found: Mapping[str, Mapping[str, Any]] = attribute(self.architectures[path])
        return found


def attribute(path: str) -> Any:
    """What a row's ``module:name`` stands for; imports the module."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module, __package__), name)


def family_of(model: object) -> Family | None:
    """The row of a model's family; None of an adapter named by import path."""
    found = getattr(model, "family", None)
    return found if isinstance(found, Family) else None


_JOINT_ATTENTION = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip

FLUX = Family(
    name="flux",
    title="FLUX",
    adapter=".flux:FluxModel",
    pipeline="FluxPipeline",
    components=(
        Component("transformer", "diffusers", "FluxTransformer2DModel"),
        Component("vae", "diffusers", "AutoencoderKL"),
        Component("text_encoder", "transformers", "CLIPTextModel"),
        Component("text_encoder_2", "transformers", "T5EncoderModel", spare=r"^lm_head\."),  # of a whole T5
    ),
    tokenizers={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
    text_keys=("prompt_embeds", "pooled"),
    repeated_blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    fp8=True,
    attention=True,
    fused=".fused_flux:FusedFluxForward",
    lora_targets=_JOINT_ATTENTION,
    architectures={
        "black-forest-labs/FLUX.1-dev": ".flux:FLUX1_DEV",
        "black-forest-labs/FLUX.1-Krea-dev": ".flux:FLUX1_DEV",
        "black-forest-labs/FLUX.1-schnell": ".flux:FLUX1_SCHNELL",
        "random:flux1-dev": ".flux:FLUX1_DEV",
    },
)  # fmt: skip

SD3 = Family(
    name="sd3",
    title="SD3",
    adapter=".sd3:Sd3Model",
    pipeline="StableDiffusion3Pipeline",
    components=(
        Component("transformer", "diffusers", "SD3Transformer2DModel"),
        Component("vae", "diffusers", "AutoencoderKL"),
        Component("text_encoder", "transformers", "CLIPTextModelWithProjection"),
        Component("text_encoder_2", "transformers", "CLIPTextModelWithProjection"),
        Component("text_encoder_3", "transformers", "T5EncoderModel", spare=r"^lm_head\.", optional=True),
    ),
    tokenizers={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2", "tokenizer_3": "text_encoder_3"},
    text_keys=("prompt_embeds", "pooled"),
    repeated_blocks=("JointTransformerBlock",),
    fp8=True,
    guidance=4.5,
    guided=True,
    lora_targets=_JOINT_ATTENTION,
    architectures={
        "stabilityai/stable-diffusion-3.5-medium": ".sd3:SD35_MEDIUM", "random:sd35-medium": ".sd3:SD35_MEDIUM",
    },
)  # fmt: skip

FAMILIES: dict[str, Family] = {family.name: family for family in (FLUX, SD3)}
