"""Policies of any family: loaded from their files, with random weights, or on the meta device as they would be loaded."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .loading import read_json_object
from .pipeline import Source, load_pipeline, present_components, scheduler_config
from .policy import Policy, Settings
from .registry import Component, Family, attribute
from .text import PipelineEncoder, RandomEncoder, ShapeEncoder


def load_policy(family: Family, source: Source, settings: Settings) -> Policy:
    """A policy with the weights of a pipeline folder or Hub id (downloaded unless ``HF_HUB_OFFLINE`` is set); every parameter
    of its transformer is trainable. One of the family's architectures named ``random:…`` gets random weights.

    Raises:
        InputError: no such folder or id, not a pipeline of the family, or one that is not whole and sound.
    """
    s = settings
    if source.path in family.architectures and source.path.startswith("random:"):
        return random_policy(family, family.architecture(source.path), s)
    pipeline, scheduler = load_pipeline(family, source, s.dtype, s.device)
    pipeline.set_progress_bar_config(disable=True)
    for component in family.components:
        if (part := getattr(pipeline, component.name)) is not None:
            part.requires_grad_(component.name == "transformer").eval()
    adapter = _adapter(family)
    encoder = PipelineEncoder(pipeline, adapter.embed, family.text_keys, s.max_text_tokens, s.prompt_cache)
    made = adapter(pipeline.transformer, pipeline.vae, encoder, *_sampling(s), pipeline, source)
    made.scheduler = scheduler
    return made


def random_policy(family: Family, architecture: Mapping[str, Mapping[str, Any]], settings: Settings) -> Policy:
    """A policy with random weights; on ``meta`` it takes no memory and every host sync raises.

    Args:
        architecture: arguments of the classes of transformer and VAE; prompts become random numbers of the right shape.
    """
    s = settings
    with torch.device(s.device):
        transformer, vae = (
            c.cls(**architecture[c.name]).to(s.dtype).eval() for c in family.components if c.name in ("transformer", "vae")
        )
    adapter = _adapter(family)
    encoder = RandomEncoder(adapter.named_shapes(transformer.config, s.max_text_tokens), s.dtype, s.device)
    made = adapter(transformer, vae.requires_grad_(False), encoder, *_sampling(s))
    made.scheduler = architecture.get("scheduler")
    return made


def meta_policy(family: Family, path: str, settings: Settings) -> Policy:
    """The policy that ``load_policy`` would make, text encoders included, on the meta device and without reading or
    downloading weights.

    Args:
        path: a pipeline folder, or one of the family's architectures.

    Raises:
        InputError: another Hub id, or a folder whose configurations cannot be read.
    """
    s, folder = settings, Path(path)
    known = family.architecture(path) if path in family.architectures else None
    if known is None and not folder.is_dir():
        raise InputError(f"model.path = {path}: its architecture is not known here; download it and name its folder")
    try:
        present = family.components
        if known is None:
            present = present_components(family, read_json_object(folder / "model_index.json", f"model.path = {path}"))
        with torch.device("meta"):
            parts = {c.name: _described(c, folder / c.name if known is None else known[c.name]) for c in present}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"model.path = {path}: its configurations cannot be read: {error}") from error
    for name, part in parts.items():
        nn.Module.to(part, s.dtype)  # diffusers' own would warn of float32 modules that it does not have
        part.requires_grad_(name == "transformer").eval()
    transformer, vae = parts.pop("transformer"), parts.pop("vae")
    adapter = _adapter(family)
    encoder = ShapeEncoder(adapter.named_shapes(transformer.config, s.max_text_tokens), s.dtype, s.prompt_cache)
    pipeline = types.SimpleNamespace(components=parts)
    made = adapter(transformer, vae, encoder, *_sampling(s), pipeline)
    made.scheduler = scheduler_config(folder, f"model.path = {path}") if known is None else known.get("scheduler")
    return made


def _sampling(settings: Settings) -> tuple[int, int, float, str]:
    """What an adapter is told of how it samples."""
    return settings.height, settings.width, settings.guidance, settings.negative_prompt


def _adapter(family: Family) -> type[Policy]:
    found: type[Policy] = attribute(family.adapter)
    return found


def _described(component: Component, source: Path | Mapping[str, Any]) -> Any:
    """The module that a configuration's folder or settings describe."""
    kind: Any = component.cls
    if component.library == "diffusers":
        return kind.from_config(kind.load_config(source) if isinstance(source, Path) else source)
    config = kind.config_class
    return kind(config.from_pretrained(source) if isinstance(source, Path) else config(**source))
