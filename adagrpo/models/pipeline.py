"""The folder of a diffusers pipeline of any family: found, checked and loaded component by component."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..disk.turns import hub_folder, once
from ..errors import InputError
from .loading import check_component, check_finite, first_line, load_component, quiet, read_json_object
from .registry import Component, Family

_LEGACY_CLIP_EOS = 2  # in configurations of OpenAI's CLIP; the end of the text is then its highest token


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a pipeline comes from.

    Attributes:
        path: folder or Hub id.
        variant: of the weights' files, such as fp16; empty for none.
        revision: branch, tag or commit of a Hub id; empty for the newest.
    """

    path: str
    variant: str = ""
    revision: str = ""

    def __str__(self) -> str:
        return f"model.path = {self.path}"

    @property
    def is_local(self) -> bool:
        return Path(self.path).is_dir()


def check_source(family: Family, source: Source) -> None:
    """Refuse what cannot be a pipeline of the family by its form and ``model_index.json``, without importing anything.

    Raises:
        InputError: no such folder, a single file, not a pipeline, another family's, or an incomplete one; Hub ids are only
            checked for their form.
    """
    path, folder = source.path, Path(source.path)
    if folder.is_file():
        remedy = f"{family.pipeline}.from_single_file(FILE).save_pretrained(FOLDER) of diffusers makes one of it"
        raise InputError(f"{source}: a single file; name a diffusers pipeline folder ({remedy})")
    if not source.is_local:
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise InputError(f"{source}: no such folder, and not a Hub id of the form owner/name")
        return
    if source.revision:
        raise InputError(f"model.revision = {source.revision}: {path} is a local folder, and only Hub ids have revisions")
    if not (folder / "model_index.json").is_file():
        part = " (one of its components?)" if (folder / "config.json").is_file() else ""
        raise InputError(f"{source}: this folder holds no model_index.json{part}; name a diffusers pipeline folder")
    index = read_json_object(folder / "model_index.json", str(source))
    name = index.get("_class_name")
    needs = f"model.family = {family.name} needs a"
    if name != family.pipeline:
        raise InputError(f"{source}: a {name}; {needs} {family.pipeline}")
    present = present_components(family, index)
    kinds = {c.name: c.kind for c in present} | dict.fromkeys((*_tokenizers(family, present), "scheduler"), "")
    for part, kind in kinds.items():
        entry = index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
            raise InputError(f"{source}: was saved without its {part}; name a complete pipeline folder")
        if kind and entry[1] != kind:
            raise InputError(f"{source}: its {part} is a {entry[1]}; {needs} {kind}")


def present_components(family: Family, index: Mapping[str, Any]) -> tuple[Component, ...]:
    """The family's components without the optional ones that a ``model_index.json`` holds as null."""
    return tuple(c for c in family.components if not (c.optional and index.get(c.name) in (None, [None, None])))


def check_pipeline(family: Family, source: Source) -> bool:
    """Check all of a pipeline folder that can be checked without reading its weights.

    Returns:
        Whether there is a folder: a Hub id's files can be checked once they are here.

    Raises:
        InputError: see ``check_source``, ``check_component`` and ``load_tokenizers``.
    """
    check_source(family, source)
    if source.is_local:
        _check_folder(family, Path(source.path), source)
    return source.is_local


def load_pipeline(family: Family, source: Source, dtype: torch.dtype, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """A pipeline of the family whose every tensor comes from its files and is finite, and what its scheduler's file says.

    Raises:
        InputError: anything less, naming component and tensor.
    """
    check_source(family, source)
    folder = Path(source.path) if source.is_local else _download(family, source)
    weights, tokenizers = _check_folder(family, folder, source)
    parts = {
        c.name: load_component(c, folder / c.name, weights[c.name], dtype, str(source))
        for c in family.components
        if c.name in weights
    }
    with quiet():
        from diffusers import FlowMatchEulerDiscreteScheduler

        # A folder's own scheduler may have options that no scheduler takes; only what asks for its levels makes it.
        given = dict.fromkeys(family.parts) | tokenizers | parts
        pipeline = family.pipeline_class(scheduler=FlowMatchEulerDiscreteScheduler(), **given)
        pipeline.to(device)
    check_finite(parts, str(source))
    return pipeline, scheduler_config(folder, str(source))


def scheduler_config(folder: Path, where: str) -> dict[str, Any]:
    """What a pipeline folder says of its scheduler.

    Raises:
        InputError: nothing that can be read.
    """
    return read_json_object(folder / "scheduler" / "scheduler_config.json", f"{where}: scheduler")


def load_tokenizers(family: Family, folder: Path, where: str) -> dict[str, Any]:
    """The tokenizers of the encoders that are there, known to speak their language.

    Raises:
        InputError: a file that is missing or damaged, tokens beyond the encoder's vocabulary, or other special tokens.
    """
    import transformers

    index = read_json_object(folder / "model_index.json", where)
    present = present_components(family, index)
    kinds = {c.name: c.kind for c in present}
    found = {}
    for name, encoder in _tokenizers(family, present).items():
        kind = getattr(transformers, index[name][1], None)
        if kind is None:
            raise InputError(f"{where}: {name}: transformers has no {index[name][1]}")
        files = {file for file in kind.vocab_files_names.values() if file != "tokenizer.json"}
        at = folder / name
        if not (at / "tokenizer.json").is_file() and not all((at / file).is_file() for file in files):
            wanted = " and ".join(sorted(files))  # without them transformers makes a tokenizer of few words
            raise InputError(f"{where}: {name}: {at} holds neither tokenizer.json nor {wanted}; download it again")
        try:
            with quiet():
                found[name] = kind.from_pretrained(at)
        except Exception as error:  # the tokenizers library raises what derives from nothing narrower
            raise InputError(f"{where}: {name}: cannot be loaded from {at}: {first_line(error)}") from error
        config = read_json_object(folder / encoder / "config.json", where)
        _check_tokenizer(found[name], config, f"{where}: {name}", encoder, is_clip=kinds[encoder].startswith("CLIP"))
    return found


def _tokenizers(family: Family, present: Sequence[Component]) -> dict[str, str]:
    """The family's tokenizers whose encoders are there, and these."""
    names = {c.name for c in present}
    return {name: encoder for name, encoder in family.tokenizers.items() if encoder in names}


def _check_folder(family: Family, folder: Path, source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """Files of every component that is there, and the tokenizers."""
    where = str(source)
    present = present_components(family, read_json_object(folder / "model_index.json", where))
    weights = {c.name: check_component(c, folder / c.name, where, source.variant) for c in present}
    if source.variant and not any(files.variant for files in weights.values()):
        raise InputError(f"model.variant = {source.variant}: no component of {source.path} has weights of that variant")
    scheduler_config(folder, where)
    return weights, load_tokenizers(family, folder, where)


def _check_tokenizer(tokenizer: Any, config: dict[str, Any], where: str, encoder: str, is_clip: bool) -> None:
    """Refuse tokens that the encoder has no row for, and another end of the text than it looks for."""
    config = config.get("text_config_dict") or config.get("text_config") or config
    known, tokens = config.get("vocab_size"), len(tokenizer)
    if known is not None and tokens > known:
        raise InputError(f"{where}: has {tokens} tokens, {encoder} only {known}; name folders of one kind")
    end = config.get("eos_token_id")
    if end == _LEGACY_CLIP_EOS and is_clip:
        end = tokens - 1
    if end is not None and tokenizer.eos_token_id != end:
        raise InputError(
            f"{where}: ends a text with token {tokenizer.eos_token_id}, {encoder} with {end}; name folders of one kind"
        )


def _download(family: Family, source: Source) -> Path:
    """The Hub's snapshot of a pipeline, in its cache."""
    try:
        with quiet():
            options = {"variant": source.variant or None, "revision": source.revision or None}
            work = f"pipeline {source.path} {options}"
            folder = Path(once(hub_folder(), work, lambda: str(family.pipeline_class.download(source.path, **options))))
    except Exception as error:  # the Hub raises types of its own
        revision = f" of revision {source.revision}" if source.revision else ""
        variant = f" in variant {source.variant}" if source.variant else ""
        raise InputError(f"{source}: no {family.title} pipeline{revision}{variant} can be had: {first_line(error)}") from error
    check_source(family, dataclasses.replace(source, path=str(folder), revision=""))
    return folder
