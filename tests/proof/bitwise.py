"""Two folders of the same command, compared bit for bit by the files in them; knows formats, not ``adagrpo``."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

TIMES = re.compile(r"perf/(\w+_|reward/.*/)?seconds")  # the only metrics whose values may differ; the keys may not
# Each holds a clock's, a machine's or an identity's words, or digests of files that do; of these only the names are compared.
UNREPEATABLE = ("manifest.json", "memory.json", "report.html", "checkpoint.json", "records.json", "owner.json", "config.toml")
WORDS = ("events.jsonl",)  # compared with what the command prints
NOISE = re.compile(r"%\||it/s|s/it|\d+it \[|the process peaked at")  # progress bars, and what the allocator held
Leaves = dict[str, Any]


@dataclasses.dataclass
class Verdict:
    """What was compared, and the first difference ('' is none)."""

    lines: int = 0
    tensors: int = 0
    keys: int = 0
    difference: str = ""


def leaves(value: Any, name: str = "") -> Leaves:
    """A nested value as path → leaf; an empty container is a leaf."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in leaves(inner, f"{name}/{key}").items()}
    if isinstance(value, list | tuple) and value:
        return {k: v for i, inner in enumerate(value) for k, v in leaves(inner, f"{name}/{i}").items()}
    return {name.removeprefix("/"): value}


def same(one: Any, other: Any) -> bool:
    """Whether two leaves are equal in type and in every bit; a NaN equals itself, 0.0 is not -0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(_bytes(one), _bytes(other))
    return repr(one) == repr(other) if isinstance(one, float) else one == other


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def first_difference(base: Leaves, head: Leaves) -> str:
    """The first leaf that is not the same, with both values; ''."""
    for key in [*base, *(k for k in head if k not in base)]:
        if key not in head or key not in base:
            return f"{key} only in {'base' if key in base else 'head'}"
        if not same(base[key], head[key]):
            return f"{key}: {_shown(base[key], head[key])}"
    return ""


def _shown(one: Any, other: Any) -> str:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return f"{one!r} != {other!r}"
    if one.dtype != other.dtype or one.shape != other.shape:
        return f"{one.dtype} {tuple(one.shape)} != {other.dtype} {tuple(other.shape)}"
    count = int((one != other).sum())
    return f"{count} of {one.numel()} numbers differ, by up to {float((one.double() - other.double()).abs().max()):.3g}"


def metric_lines(path: Path) -> list[Leaves]:
    """Lines of ``metrics.jsonl``, the values of times left out."""
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [leaves({k: "a time" if TIMES.fullmatch(k) else v for k, v in record.items()}) for record in records]


def shown(folder: Path, metric: str) -> bool:
    """Whether a metric is above 0 in some line of the runs below a folder."""
    return any((line.get(metric) or 0) > 0 for path in folder.rglob("metrics.jsonl") for line in metric_lines(path))


def tensor_file(path: Path) -> Leaves:
    """What a safetensors file holds: every tensor, and its metadata."""
    with safe_open(path, "pt") as file:
        return {**{key: file.get_tensor(key) for key in sorted(file.keys())}, "metadata": file.metadata()}


def state_file(path: Path) -> Leaves:
    """What a file of ``torch.save`` holds."""
    return leaves(torch.load(path, map_location="cpu", weights_only=True))


def files(folder: Path) -> Iterator[str]:
    """Names of the files below a folder, in order; those that an owner's lock leaves or not are no result."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    yield from (str(p.relative_to(folder)) for p in paths if not p.name.startswith("."))


def compare(base: Path, head: Path, places: Mapping[str, str]) -> Verdict:
    """Metrics, every tensor and every other value of the checkpoints, exports, results and images.

    Args:
        places: paths that JSON files may name, and what to call them on both sides.
    """
    verdict = Verdict()
    names = list(files(base))
    found = [first_difference(dict.fromkeys(names), dict.fromkeys(files(head)))]
    for name in names:
        if (head / name).is_file() and Path(name).name not in UNREPEATABLE + WORDS:
            found.append(_compare_file(base / name, head / name, verdict, name, places))
    verdict.difference = next((difference for difference in found if difference), "")
    return verdict


def _compare_file(base: Path, head: Path, verdict: Verdict, name: str, places: Mapping[str, str]) -> str:
    if base.name == "metrics.jsonl":
        one, other = metric_lines(base), metric_lines(head)
        verdict.lines += len(one)
        if len(one) != len(other):
            return f"{name}: {len(one)} lines != {len(other)}"
        pairs = [(f"{name}:{i}", *pair) for i, pair in enumerate(zip(one, other, strict=True), 1)]
    elif base.suffix in (".safetensors", ".pt"):
        read = state_file if base.suffix == ".pt" else tensor_file
        pairs = [(name, read(base), read(head))]
        verdict.keys += len(pairs[0][1])
        verdict.tensors += sum(isinstance(value, torch.Tensor) for value in pairs[0][1].values())
    elif base.suffix == ".json":
        pairs = [(name, *(leaves(json.loads(renamed(p.read_text("utf-8"), places))) for p in (base, head)))]
    else:
        return "" if base.read_bytes() == head.read_bytes() else f"{name}: other bytes"
    return next((f"{place}: {found}" for place, one, other in pairs if (found := first_difference(one, other))), "")


def renamed(text: str, places: Mapping[str, str]) -> str:
    """The text with every place called by its name."""
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    return text


def plain(text: str, places: Mapping[str, str]) -> list[str]:
    """What a command printed, without progress bars, times, memory, versions, identities, and with ``places`` renamed."""
    text = re.sub(r"TREE/\S+?:\d+", "TREE", renamed(text, places))  # of a warning, which names file and line
    text = re.sub(r"\b\d+(\.\d+)?(e-?\d+)? ?(ms|s|min|seconds|minutes|h)\b", "TIME", text)
    text = re.sub(r"\b\d+\.\d+\.\d+\S*|\b[0-9a-f]{8,40}\b|\b\d{4}-\d\d-\d\dT\S+", "ID", text)
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines()]
    return [line for line in lines if line and not NOISE.search(line)]


def words(folder: Path, log: Path, places: Mapping[str, str]) -> list[str]:
    """What a command printed and noted as events, and the keys of its ``config.toml``."""
    noted = [p.read_text("utf-8") for p in sorted(folder.rglob("events.jsonl"))]
    configs = [leaves(tomllib.loads(p.read_text("utf-8"))) for p in sorted(folder.rglob("config.toml"))]
    keys = [f"config.toml {key} = {value!r}" for config in configs for key, value in sorted(config.items())]
    return plain("\n".join([log.read_text("utf-8", "replace"), *noted, *keys]), places)
