"""Adapters that begin as an existing LoRA file, in the names of diffusers, PEFT or kohya.

Names are the transformer's own, as they are or with kohya's underscores; all others are converted by the pipeline class of the
family in diffusers, one adapter at a time, so that nothing is lost on the way: a weight that has no place here is an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .export import LORA_FILE, METADATA
from .loading import first_line, not_finite, quiet
from .registry import Family

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT = "base_model.model."
_KOHYA = ("", "lora_unet_", "lora_transformer_", "transformer_")
_MERGE = "merge it into the model's weights and name those as model.path"
_WITHOUT = "save the LoRA again without them"
_WEIGHT = re.compile(r"(?P<stem>.+?)[._](?:lora[._])?(?P<half>A|B|down|up)(?:\.default)?\.weight")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_REFUSED = (
    (r"(base_model\.model\.)?text_(encoder|model)|lora_te", f"weights of a text encoder, which is not trained; {_WITHOUT}"),
    (r"vae\.|lora_vae|first_stage_model", f"weights of the VAE, which is not trained; {_WITHOUT}"),
    (r".*(dora_scale|magnitude_vector)", f"a DoRA; {_MERGE}"),
    (r".*(hada_|lokr_)", f"a LoHa or LoKr; {_MERGE}"),
    (r".*\.diff(_b)?$", f"a difference of weights, no LoRA; {_MERGE}"),
    (r".*lora_?\w*(\.default)?\.bias$", f"biases; {_MERGE}"),
)
_INITS_OF_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # they also change the weights under the adapter


@dataclasses.dataclass(frozen=True)
class Start:
    """What adapters began as.

    Attributes:
        file, sha256: where it was found, and the digest of its bytes.
        adapted, zero: how many modules its weights went into, and how many began at zero.
    """

    file: Path
    sha256: str
    adapted: int
    zero: int

    @property
    def notice(self) -> str:
        """What to tell of modules that it has no weights for; empty where there are none."""
        every = self.adapted + self.zero
        return f"{self.file}: has weights for {self.adapted} of {every} adapters; the others begin at zero" if self.zero else ""


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """One adapter of a file.

    Attributes:
        stem: its name there.
        a, b: [rank, in] and [out, rank]; other shapes are possible, and refused later.
        keys: names of both.
        rank, scale: of their product, and what it is multiplied by.
    """

    stem: str
    a: Tensor
    b: Tensor
    keys: tuple[str, str]
    rank: int
    scale: float


def start_from(family: Family, transformer: nn.Module, place: str) -> Start:
    """Copy a LoRA file into the adapters of a transformer, so that it computes what the file means.

    Alpha and rank of the file become part of B, multiplied in fp64 and rounded once to the adapters' dtype. Where the
    file's rank is lower, the other columns of B are zero and the other rows of A stay as they were initialised. On the
    meta device everything is checked and nothing copied.

    Args:
        place: the file, or a folder that holds it.

    Raises:
        InputError: no such file, a damaged one, another kind of adapter, or a weight that fits none of the transformer's.
    """
    where = f"model.lora_from = {place}"
    file = find_file(Path(place), where)
    tensors, settings = _read(file, where)
    adapted: dict[str, Any] = {name: m for name, m in transformer.named_modules() if getattr(m, "lora_A", None)}
    first = next(iter(adapted.values()))
    dtype, own = first.lora_B["default"].weight.dtype, first.scaling["default"]
    places = {name.removesuffix(".base_layer"): m for name, m in transformer.named_modules()}
    flat = {name.replace(".", "_"): name for name in places}
    found: dict[str, tuple[str, Tensor, Tensor]] = {}
    unmatched: list[str] = []
    for adapter in _adapters(tensors, settings, where):
        b = (adapter.b.double() * (adapter.scale / own)).to(dtype)
        named = _plain(adapter.stem)
        named = named if named in places else next((flat[s] for s in _unprefixed(named) if s in flat), named)
        parts = {named: (adapter.a, b)} if named in places else _converted(family, dataclasses.replace(adapter, b=b))
        unmatched += [adapter.keys[0]] * (not parts)
        for name, (a, b) in parts.items():
            if name in found:
                raise InputError(f"{where}: {found[name][0]} and {adapter.stem} both adapt {name}; keep one of them")
            found[name] = (adapter.stem, a, b)
    _refuse_strangers(family, found, adapted, places, unmatched, where)
    _refuse_shapes(found, adapted, where)
    with torch.no_grad():
        for name, (_, a, b) in found.items():
            adapted[name].lora_A["default"].weight[: len(a)].copy_(a)
            adapted[name].lora_B["default"].weight[:, : len(a)].copy_(b)
    with file.open("rb") as opened:
        return Start(file, hashlib.file_digest(opened, "sha256").hexdigest(), len(found), len(adapted) - len(found))


def find_file(place: Path, where: str) -> Path:
    """The LoRA file that is meant by itself or its folder.

    Raises:
        InputError: none, or several.
    """
    if place.is_file():
        if place.suffix != ".safetensors":
            raise InputError(f"{where}: no .safetensors file; save the LoRA as one")
        return place
    if not place.is_dir():
        raise InputError(f"{where}: no such file or folder")
    for name in (LORA_FILE, PEFT_FILE):
        if (place / name).is_file():
            return place / name
    files = sorted(place.glob("*.safetensors"))
    if len(files) != 1:
        held = f"{len(files)} .safetensors files, none of them {LORA_FILE}" if files else "no .safetensors file"
        raise InputError(f"{where}: holds {held}; name the LoRA's own")
    return files[0]


def _read(file: Path, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file, known to be finite LoRA weights of the transformer, and the settings that belong to them."""
    from safetensors import safe_open

    try:
        with safe_open(file, "pt") as opened:
            names, metadata = list(opened.keys()), opened.metadata() or {}
            _refuse_kinds(names, where)
            tensors = {name: opened.get_tensor(name) for name in names}
        described: dict[str, Any] = json.loads(metadata.get(METADATA, "{}"))
        settings = {key.removeprefix("transformer."): v for key, v in described.items() if key.startswith("transformer.")}
        if not settings and any(name.startswith(_PEFT) for name in names):
            settings = json.loads((file.parent / PEFT_CONFIG).read_text("utf-8"))
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(
            f"{where}: PEFT's names without {PEFT_CONFIG} beside them, which holds their alpha; copy it there"
        ) from error
    except Exception as error:  # safetensors' error derives from nothing narrower
        raise InputError(f"{where}: {file.name} cannot be read ({first_line(error)}); save it again") from error
    if odd := [name for name, t in tensors.items() if t.dtype not in _DTYPES and t.numel() > 1]:  # an alpha may be an integer
        raise InputError(f"{where}: {odd[0]} is {tensors[odd[0]].dtype}; save it in bf16, fp16 or fp32")
    if bad := not_finite(tensors):
        raise InputError(f"{where}: {bad[0]} holds values that are not finite; save it again")
    _refuse_settings(settings, where)
    return tensors, settings


def _refuse_kinds(names: list[str], where: str) -> None:
    """Raise for what is no plain LoRA of a transformer, by the names of the weights."""
    if not names:
        raise InputError(f"{where}: holds no weights")
    for name in names:
        for pattern, what in _REFUSED:
            if re.match(pattern, name):
                raise InputError(f"{where}: {name}: holds {what}")


def _refuse_settings(settings: Mapping[str, Any], where: str) -> None:
    """Raise for what is no plain LoRA by its settings."""
    kind, begun = settings.get("peft_type") or "LORA", str(settings.get("init_lora_weights", ""))
    if str(kind).rpartition(".")[2] != "LORA" or settings.get("use_dora"):
        raise InputError(f"{where}: its settings are of a {'DoRA' if settings.get('use_dora') else kind}; {_MERGE}")
    if begun.startswith(_INITS_OF_BASE):
        raise InputError(f"{where}: init_lora_weights = {begun} changed the weights under the adapters too; {_MERGE}")


def _adapters(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], where: str) -> list[_Adapter]:
    """The file's weights, two by two, each with its scale."""
    halves: dict[str, dict[bool, str]] = {}
    alphas = {
        name.removesuffix(".alpha"): float(t) for name, t in tensors.items() if name.endswith(".alpha") and t.numel() == 1
    }
    for name in tensors:
        if name.removesuffix(".alpha") in alphas:
            continue
        if (match := _WEIGHT.fullmatch(name)) is None:
            raise InputError(f"{where}: {name} is no weight of a LoRA in the names of diffusers, PEFT or kohya; remove it")
        pair, down = halves.setdefault(match["stem"], {}), match["half"] in ("A", "down")
        if down in pair:
            raise InputError(f"{where}: {pair[down]} and {name} are the same weight; keep one of them")
        pair[down] = name
    if alphas and settings:
        raise InputError(f"{where}: holds both settings ({METADATA}) and alphas ({min(alphas)}.alpha); keep one of them")
    if strays := sorted(alphas.keys() - halves.keys()):
        raise InputError(f"{where}: {strays[0]}.alpha belongs to no weight; remove it")
    found = []
    for stem, pair in halves.items():
        if len(pair) < 2:
            raise InputError(f"{where}: {next(iter(pair.values()))} lacks its other half; save the LoRA again")
        keys = pair[True], pair[False]
        rank = max(1, len(tensors[keys[0]]) if tensors[keys[0]].dim() else 0)
        scale = alphas[stem] / rank if stem in alphas else _scale(settings, _plain(stem), rank)
        found.append(_Adapter(stem, tensors[keys[0]], tensors[keys[1]], keys, rank, scale))
    return found


def _scale(settings: Mapping[str, Any], name: str, rank: int) -> float:
    """What a module's adapter is multiplied by, as PEFT's settings say it; 1 without any."""
    from peft.utils.other import get_pattern_key

    patterns = settings.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), name), settings.get("lora_alpha", rank))
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _converted(family: Family, adapter: _Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """The modules of the transformer that diffusers' converter makes of one adapter, with their A and B; none if it cannot."""
    given = dict(zip(adapter.keys, (adapter.a, adapter.b), strict=True))
    if ".lora_down" in adapter.keys[0]:  # part of B by now
        given[f"{adapter.stem}.alpha"] = torch.tensor(float(adapter.rank))
    convert: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = family.pipeline_class.lora_state_dict
    try:
        with quiet(bars=False):
            made = convert(given)
    except Exception:  # a converter raises whatever its own steps do on names it does not know
        return {}
    parts: dict[str, dict[bool, Tensor]] = {}
    for name, tensor in made.items():
        if match := _WEIGHT.fullmatch(name):
            parts.setdefault(_plain(match["stem"]), {})[match["half"] in ("A", "down")] = tensor
    return {} if adapter.stem in parts else {name: (t[True], t[False]) for name, t in parts.items() if len(t) == 2}


def _refuse_strangers(
    family: Family,
    found: Mapping[str, tuple[str, Tensor, Tensor]],
    adapted: Mapping[str, nn.Module],
    places: Mapping[str, nn.Module],
    unmatched: list[str],
    where: str,
) -> None:
    """Raise for weights of modules that the transformer does not have, or that have no adapter."""
    unmatched = unmatched + [stem for name, (stem, _, _) in found.items() if name not in places]
    if unmatched:
        more = f" and {len(unmatched) - 1} more" if len(unmatched) > 1 else ""
        raise InputError(
            f"{where}: {unmatched[0]}{more}: no layer of this transformer has that name, and diffusers converts it to none of "
            f"{family.title}'s; name a LoRA of this architecture, saved in the names of diffusers or PEFT"
        )
    others = [name for name in found if name not in adapted]
    if others:
        stem = found[others[0]][0]
        targets = ", ".join(repr(t) for t in dict.fromkeys(re.sub(r"^\w+\.\d+\.", "", name) for name in others))
        raise InputError(f"{where}: {stem} adapts {others[0]}, which model.lora_targets leaves out; add {targets} to it")


def _refuse_shapes(found: Mapping[str, tuple[str, Tensor, Tensor]], adapted: Mapping[str, Any], where: str) -> None:
    """Raise for weights of other sizes than their module's, and of a higher rank than the adapters'."""
    ranks = {}
    for name, (stem, a, b) in found.items():
        wide, high = (adapted[name].lora_A["default"].weight.shape[1], adapted[name].lora_B["default"].weight.shape[0])
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != wide or b.shape[0] != high or len(a) != b.shape[1]:
            shapes = f"{list(a.shape)} and {list(b.shape)}, not [rank, {wide}] and [{high}, rank]"
            raise InputError(f"{where}: {stem}: its weights for {name} are {shapes}; name a LoRA of this architecture")
        ranks[len(a)] = stem
    rank, own = max(ranks), len(next(iter(adapted.values())).lora_A["default"].weight)
    if rank > own:
        raise InputError(f"{where}: {ranks[rank]} has rank {rank}, above model.lora_rank = {own}; set model.lora_rank = {rank}")


def _plain(stem: str) -> str:
    """The module's name without what PEFT and pipelines put before it."""
    return stem.removeprefix(_PEFT).removeprefix("transformer.")


def _unprefixed(stem: str) -> list[str]:
    """What may be a module's name with underscores, as kohya writes it."""
    return [stem.removeprefix(prefix) for prefix in _KOHYA if stem.startswith(prefix)]
