"""What a folder of weights holds, against what its architecture wants; knows no model family.

diffusers and transformers draw at random whatever a checkpoint lacks, and say so in a log at most. Here the names, shapes and
dtypes in the files' headers are compared with the architecture of ``config.json``, built on the meta device, before a weight is
read; values are looked at once they are loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .registry import Component

_STEMS = {"diffusers": ("diffusion_pytorch_model",) * 2, "transformers": ("model", "pytorch_model")}  # safetensors, pickled
_SHARD = r"(-\d{5}-of-\d{5})?"
_QUANTISED = re.compile(r"F8|F4|^U?I?8$|^U8|^I8|float8|float4|u?int8|qint")
_AGAIN = "download or save it again"


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """Files that hold a component's weights: all of them ``.safetensors``, or all ``.bin``; ``index`` maps tensor to file name
    where there are shards."""

    files: tuple[Path, ...]
    variant: str | None
    index: dict[str, str] | None

    @property
    def safetensors(self) -> bool:
        return self.files[0].suffix == ".safetensors"


@dataclasses.dataclass(frozen=True)
class Header:
    """Shape and dtype of a tensor in a file, as the file says."""

    shape: tuple[int, ...]
    dtype: str


def check_component(component: Component, folder: Path, where: str, variant: str | None = None) -> WeightFiles:
    """The files that hold a component's weights, after comparing their headers with its architecture; no weight is read.

    Args:
        where: what names the folder, first words of an error.
        variant: of the weights, preferred where it is there; "" is none. None where the user has no choice of one.

    Raises:
        InputError: naming the file or tensor that is missing, damaged, unexpected, mis-shaped or quantised.
    """
    where = f"{where}: {component.name}"
    config = _read_config(component, folder, where)
    weights = find_weights(folder, component.library, where, variant)
    headers = read_headers(weights, where)
    quantised = [f"{name} ({h.dtype})" for name, h in headers.items() if _QUANTISED.search(h.dtype)]
    if "quantization_config" in config or quantised:
        named = quantised[0] if quantised else "quantization_config in config.json"
        raise InputError(f"{where}: its weights are quantised: {named}; name a model in bf16, fp16 or fp32")
    try:
        with quiet(bars=False):
            compare = _against_diffusers if component.library == "diffusers" else _against_transformers
            missing, unexpected, misshaped = compare(component, folder, headers)
    except Exception as error:  # any class may refuse any configuration in its own way
        raise InputError(f"{where}: {folder / 'config.json'} describes no {component.kind}: {first_line(error)}") from error
    refuse_differences(component, where, missing, unexpected, misshaped)
    return weights


def load_component(component: Component, folder: Path, weights: WeightFiles, dtype: torch.dtype, where: str) -> Any:
    """The component in ``dtype`` on the CPU, from files that ``check_component`` found sound.

    Raises:
        InputError: it cannot be loaded, or the library itself reports a difference.
    """
    where = f"{where}: {component.name}"
    name = "torch_dtype" if component.library == "diffusers" else "dtype"
    options = {name: dtype, "variant": weights.variant, "use_safetensors": weights.safetensors}
    try:
        with quiet():
            module, info = component.cls.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # safetensors, the Hub and the libraries raise types of their own
        raise InputError(f"{where}: cannot be loaded from {folder}: {first_line(error)}") from error
    misshaped = {key: (tuple(found), tuple(wanted)) for key, found, wanted in info["mismatched_keys"]}
    refuse_differences(component, where, info["missing_keys"], info["unexpected_keys"], misshaped)
    return module


def check_finite(parts: Mapping[str, nn.Module], where: str) -> None:
    """Refuse parameters and buffers that hold NaN or infinity: one pass over them on their device, one copy to the host.

    Raises:
        InputError: naming component and tensor.
    """
    for part, module in parts.items():
        if bad := not_finite(dict([*module.named_parameters(), *module.named_buffers()])):
            raise InputError(f"{where}: {part}: {_some(bad)} holds values that are not finite; {_AGAIN}")


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors, all on one device, that hold NaN or infinity."""
    looked = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel() and not t.is_meta}
    if not looked:
        return []
    # NaN is the least and the largest of its tensor; this pass is 25 times as fast on a CPU as isfinite, without a copy.
    extremes = torch.stack([torch.stack(torch.aminmax(t)).double() for t in looked.values()])
    finite = extremes.isfinite().all(1).tolist()
    return [name for name, sound in zip(looked, finite, strict=True) if not sound]


def find_weights(folder: Path, library: str, where: str, variant: str | None) -> WeightFiles:
    """The files that the libraries would load: safetensors before pickled ones, the variant before none.

    Raises:
        InputError: none, two sets of them, or an index that does not name what is there.
    """
    for choice in dict.fromkeys((variant or None, None)):
        for stem, suffix in zip(_STEMS[library], (".safetensors", ".bin"), strict=True):
            mark = f".{choice}" if choice else ""
            single, index = folder / f"{stem}{mark}{suffix}", folder / f"{stem}{suffix}.index{mark}.json"
            if single.is_file() and index.is_file():
                raise InputError(f"{where}: holds {single.name} and {index.name}, two sets of weights; remove one of them")
            if single.is_file():
                return WeightFiles((single,), choice, None)
            if index.is_file():
                return _sharded(folder, index, rf"{re.escape(stem)}{re.escape(mark)}{_SHARD}{re.escape(suffix)}", where, choice)
    raise InputError(f"{where}: {_nothing_found(folder, library, variant)}")


def read_headers(weights: WeightFiles, where: str) -> dict[str, Header]:
    """Header of every tensor; values stay on disk.

    Raises:
        InputError: a damaged file, a tensor twice, or files that differ from their index.
    """
    headers: dict[str, Header] = {}
    for file in weights.files:
        found = _file_headers(file, where)
        twice = headers.keys() & found.keys()
        if twice:
            raise InputError(f"{where}: {min(twice)} is in {file.name} and in another file too; {_AGAIN}")
        if weights.index is not None:
            promised = {name for name, place in weights.index.items() if place == file.name}
            for names, words in ((promised - found.keys(), "lacks"), (found.keys() - promised, "holds, unknown to its index,")):
                if names:
                    raise InputError(f"{where}: {file.name} {words} {_some(names)}; {_AGAIN}")
        headers |= found
    return headers


def refuse_differences(
    component: Component,
    where: str,
    missing: Collection[str],
    unexpected: Collection[str],
    misshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    described: str = "its config.json",
) -> None:
    """Raise for what files and architecture do not share.

    Args:
        misshaped: (found, wanted) shapes by name.
        described: what the architecture is known from.

    Raises:
        InputError: naming component and tensor.
    """
    extra = [name for name in unexpected if not (component.spare and re.search(component.spare, name))]
    missing = [name for name in missing if not (component.unread and re.search(component.unread, name))]
    if misshaped:
        name = min(misshaped)
        found, wanted = misshaped[name]
        raise InputError(f"{where}: {_some(misshaped)} has shape {list(found)}, {described} means {list(wanted)}; {_AGAIN}")
    if missing:
        lacks = f"lacks {_some(missing)}, which would be random numbers"
        also = f", and holds {_some(extra)}" if extra else ""
        raise InputError(f"{where}: {lacks}{also}: not the weights of {described}; {_AGAIN}")
    if extra:
        raise InputError(f"{where}: holds {_some(extra)}, which a {component.kind} of {described} does not have; {_AGAIN}")


@contextlib.contextmanager
def quiet(bars: bool = True) -> Iterator[None]:
    """No notes and no deprecation notice (of an argument name that older diffusers need); ``bars`` only on a terminal."""
    import transformers.utils.logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    import diffusers.utils.logging as diffusers_logging

    said = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    libraries = () if bars and sys.stderr.isatty() else (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        diffusers_logging.set_verbosity(said)
        for library in shown:
            library.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_json_object(path: Path, where: str) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        InputError: missing or damaged.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{where}: lacks {path}; {_AGAIN}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: {path} cannot be read; {_AGAIN}") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}: {path} is no JSON object; {_AGAIN}")
    return content


def _read_config(component: Component, folder: Path, where: str) -> dict[str, Any]:
    """``config.json``, known to be of the component's class."""
    if not folder.is_dir():
        raise InputError(f"{where}: there is no folder {folder}; {_AGAIN}")
    config = read_json_object(folder / "config.json", where)
    if component.library == "diffusers":
        named, wanted = config.get("_class_name", component.kind), {component.kind}
    else:
        own = component.cls.config_class.model_type
        named, wanted = (
            config.get("model_type", own),
            {own, own.removesuffix("_text_model")},
        )  # a whole CLIP's holds a text part
    if named not in wanted:
        raise InputError(f"{where}: its config.json is of a {named}; this model needs a {component.kind}")
    return config


def _sharded(folder: Path, index: Path, pattern: str, where: str, variant: str | None) -> WeightFiles:
    """The shards of an index, all there and no others."""
    places = read_json_object(index, where).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise InputError(f"{where}: {index} names no shards; {_AGAIN}")
    named = set(places.values())
    absent = sorted(name for name in named if Path(name).name != name or not (folder / name).is_file())
    if absent:
        raise InputError(f"{where}: {index.name} names {_some(absent)}, which is not there; {_AGAIN}")
    stray = sorted(p.name for p in folder.iterdir() if re.fullmatch(pattern, p.name) and p.name not in named)
    if stray:
        raise InputError(f"{where}: {_some(stray)} is not in {index.name}: a shard of other weights; remove it, or {_AGAIN}")
    return WeightFiles(tuple(folder / name for name in sorted(named)), variant, places)


def _nothing_found(folder: Path, library: str, variant: str | None) -> str:
    """What to say of a folder without weights: the variants it has, or that it has none."""
    stems = "|".join(re.escape(stem) for stem in dict.fromkeys(_STEMS[library]))
    form = re.compile(rf"(?:{stems})(?:\.(?:safetensors|bin)\.index)?\.([^.]+?){_SHARD}\.(?:safetensors|bin|json)")
    variants = sorted({m[1] for p in folder.iterdir() if (m := form.fullmatch(p.name)) and m[1] not in ("safetensors", "bin")})
    if variants:
        remedy = "save it without one" if variant is None else f"set model.variant = {variants[0]}"
        return f"holds its weights only as variant {', '.join(variants)}; {remedy}"
    loose = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf", ".ckpt", ".msgpack", ".h5")
    )
    known = f"{_STEMS[library][0]}.safetensors"
    return f"{folder} holds no {known}{f' (but {_some(loose)})' if loose else ''}; {_AGAIN}"


@contextlib.contextmanager
def reading(file: Path, where: str) -> Iterator[None]:
    """One readable error for whatever goes wrong while a file of weights is read.

    Raises:
        InputError: a file that is absent, a git-lfs pointer, a web page, truncated, damaged, or a pickle that names code.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(24)
    except OSError as error:
        raise InputError(f"{where}: {file} cannot be read ({error.strerror}); {_AGAIN}") from error
    if start == b"version https://git-lfs.":
        raise InputError(f"{where}: {file} is a git-lfs pointer, not the weights; run git lfs pull in its repository")
    if start.lstrip().startswith(b"<"):
        raise InputError(f"{where}: {file} is a web page, not the weights; download the file itself")
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # safetensors' error derives from nothing narrower
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"pickled objects of {code[1]}: reading them may run code"
            raise InputError(f"{where}: {file} holds {what}; save its state dict alone") from error
        raise InputError(f"{where}: {file} is truncated or damaged ({first_line(error)}); {_AGAIN}") from error


def read_pickled(file: Path, device: str) -> Any:
    """What ``torch.save`` wrote, tensors and containers only; mapped into memory where the file's format allows it."""
    return torch.load(file, map_location=device, mmap=zipfile.is_zipfile(file), weights_only=True)


def _file_headers(file: Path, where: str) -> dict[str, Header]:
    """Headers of one file."""
    with reading(file, where):
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, "pt") as opened:
                parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
                return {name: Header(tuple(part.get_shape()), str(part.get_dtype())) for name, part in parts.items()}
        return {name: Header(tuple(t.shape), str(t.dtype)) for name, t in read_pickled(file, "meta").items()}


Differences = tuple[Collection[str], Collection[str], dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]


def _against_diffusers(component: Component, folder: Path, headers: Mapping[str, Header]) -> Differences:
    """Missing, unexpected and mis-shaped tensors by diffusers' rules: names are those of the state dict, old VAEs' apart."""
    with torch.device("meta"):
        module = component.cls.from_config(component.cls.load_config(folder))
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    shapes = {name: header.shape for name, header in headers.items()}
    if hasattr(module, "_fix_state_dict_keys_on_load"):
        shapes = dict(module._fix_state_dict_keys_on_load(shapes) or shapes)
    ignored = getattr(component.cls, "_keys_to_ignore_on_load_unexpected", None) or ()
    unexpected = [n for n in shapes.keys() - wanted.keys() if not any(re.search(p, n) for p in ignored)]
    misshaped = {n: (shapes[n], wanted[n]) for n in shapes.keys() & wanted.keys() if shapes[n] != wanted[n]}
    return wanted.keys() - shapes.keys(), unexpected, misshaped


def _against_transformers(component: Component, folder: Path, headers: Mapping[str, Header]) -> Differences:
    """The same by transformers' rules of renamed, tied and ignored names: it loads tensors that have shapes only."""
    config = component.cls.config_class.from_pretrained(folder)
    shapes = {name: torch.empty(header.shape, device="meta") for name, header in headers.items()}
    _, info = component.cls.from_pretrained(
        None, config=config, state_dict=shapes, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
    )
    misshaped = {name: (tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"]}
    return info["missing_keys"], info["unexpected_keys"], misshaped


def _some(names: Collection[str]) -> str:
    """The first name, and how many more."""
    more = len(names) - 1
    return f"{min(names)}{f' (and {more} more)' if more else ''}"
