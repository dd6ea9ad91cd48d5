"""Reads a run folder for the report: whatever is there, of runs finished, cut short, or still going."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..text.redaction import redacted_text
from ..text.strict_json import from_json
from ..text.user_text import parse_toml

IMAGE_BYTES = 8 * 1024 * 1024
_LARGEST = 1e100
_GRID_NAME = re.compile(r"step-(\d+)\.png")
_PNG_HEAD = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class Event:
    """One line of ``events.jsonl``."""

    iteration: int
    kind: str
    message: str


@dataclasses.dataclass(frozen=True)
class Grid:
    """A sample grid: the file's iteration, size in pixels and in bytes."""

    path: Path
    iteration: int
    width: int
    height: int
    size: int

    def uri(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode("ascii")


@dataclasses.dataclass
class Run:
    """A run folder in memory.

    Attributes:
        label: short and unique among the runs of a report.
        iteration: [N], rising; ``columns``: metric → values [N], NaN where absent or not finite. A metric that is an object,
            such as ``selection/categories``, becomes one column per entry, ``selection/categories/<entry>``.
        notes: what could not be read.
    """

    folder: Path
    label: str
    recipe: dict[str, Any]
    recipe_text: str
    manifest: dict[str, Any]
    result: dict[str, Any]
    iteration: np.ndarray
    columns: dict[str, np.ndarray]
    events: list[Event]
    grids: list[Grid]
    notes: list[str]

    @property
    def name(self) -> str:
        """The recipe's name, or else the folder's."""
        name = self.recipe.get("name")
        return name if isinstance(name, str) and name else self.label

    @property
    def done(self) -> int:
        """Iterations in the metrics."""
        return int(self.iteration[-1]) if self.iteration.size else 0

    @property
    def total(self) -> int | None:
        """Iterations the recipe asks for."""
        total = self.setting("train", "iterations")
        return total if isinstance(total, int) and not isinstance(total, bool) and total > 0 else None

    @property
    def state(self) -> str:
        """finished, stopped (the last event says so) or unfinished."""
        if self.result or (self.total is not None and self.done >= self.total):
            return "finished"
        if self.events and self.events[-1].kind in ("stop", "signal") and self.events[-1].iteration >= self.done:
            return "stopped"
        return "unfinished"

    def setting(self, *keys: str) -> Any:
        """A value of the recipe; None where it is absent."""
        value: Any = self.recipe
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def column(self, key: str) -> np.ndarray:
        """Values [N] of a metric; NaN throughout where it is absent."""
        found = self.columns.get(key)
        return np.full(self.iteration.size, np.nan) if found is None else found

    def known(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Iterations and values of a metric where it is known."""
        values = self.column(key)
        there = np.isfinite(values)
        return self.iteration[there], values[there]

    def recent(self, key: str, count: int = 20) -> float:
        """Mean of a metric's last ``count`` known values; NaN where there are none."""
        values = self.known(key)[1][-count:]
        return float(values.mean()) if values.size else math.nan

    def outcome(self, key: str) -> float:
        """A number of ``result.json``; NaN where it is absent."""
        value = _number(self.result.get(key))
        return math.nan if value is None else value


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, each with a label of its own.

    Raises:
        InputError: no folder given, or one that is no run folder.
    """
    if not folders:
        raise InputError("report: name at least one run folder")
    return [_read_run(Path(folder), label) for folder, label in zip(folders, _labels(folders), strict=True)]


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; a number where the same folder is given twice."""
    parts = [Path(folder).absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-length:]).replace("//", "/") for p in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return [label if labels.count(label) == 1 else f"{label} ({i + 1})" for i, label in enumerate(labels)]


def _read_run(folder: Path, label: str) -> Run:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the folder that `adagrpo train` wrote")
    if not any((folder / name).is_file() for name in ("config.toml", "metrics.jsonl")):
        raise InputError(
            f"{folder}: not a run folder (neither config.toml nor metrics.jsonl); name one that `adagrpo train` wrote"
        )
    notes: list[str] = []
    recipe, text = _read_recipe(folder / "config.toml", notes)
    iteration, columns = _read_metrics(folder / "metrics.jsonl", notes)
    return Run(
        folder=folder,
        label=label,
        recipe=recipe,
        recipe_text=text,
        manifest=_read_object(folder / "manifest.json", notes),
        result=_read_object(folder / "result.json", notes),
        iteration=iteration,
        columns=columns,
        events=_read_events(folder / "events.jsonl", notes),
        grids=_find_grids(folder / "samples", notes),
        notes=notes,
    )


def _read_recipe(file: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    try:
        text = file.read_text("utf-8-sig", errors="replace") if file.is_file() else None
    except OSError:
        text = None
    if text is None:
        notes.append("config.toml is missing, so the recipe is unknown.")
        return {}, ""
    text = redacted_text(text)  # of runs by former versions
    try:
        return parse_toml(text), text
    except ValueError as error:
        notes.append(f"config.toml is not valid TOML: {error}.")
        return {}, text


def _read_object(file: Path, notes: list[str]) -> dict[str, Any]:
    if not file.is_file():  # absent, or a pipe that would never answer
        return {}
    try:
        value = from_json(file.read_bytes())
    except OSError:
        return {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{file.name} is damaged and left out.")
        return {}
    return value


def _number(value: Any) -> float | None:
    """A float of a size that charts can hold, NaN for null and what is not finite, None for what is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not abs(value) < _LARGEST:
        return math.nan
    return float(value) if abs(value) > 1 / _LARGEST else 0.0


def _read_metrics(file: Path, notes: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rows: dict[int, int] = {}
    cells: dict[str, tuple[array, array]] = {}
    count, damaged = 0, 0
    for record, bad in _stream(file):
        damaged += bad
        if record is None:
            continue
        for key, value in _flat(record):
            if key not in cells:
                cells[key] = array("q"), array("d")
            cells[key][0].append(count)
            cells[key][1].append(value)
        rows[record["iteration"]] = count
        count += 1
    if damaged:
        notes.append(f"{damaged} unreadable {'line' if damaged == 1 else 'lines'} of metrics.jsonl left out.")
    if count > len(rows):
        notes.append(f"metrics.jsonl has {count - len(rows)} repeated iterations: the last of each counts.")
    if rows and (missing := max(rows) - min(rows) + 1 - len(rows)):
        notes.append(f"metrics.jsonl lacks {missing} iterations between the first and the last.")
    iteration = np.array(sorted(rows), dtype=np.int64)
    position = np.full(count, -1)
    position[[rows[i] for i in iteration.tolist()]] = np.arange(iteration.size)
    columns = {}
    for key, (place, values) in cells.items():
        at = position[np.asarray(place)]
        column = np.full(iteration.size, np.nan)
        column[at[at >= 0]] = np.asarray(values)[at >= 0]
        columns[key] = column
    return iteration, columns


def _stream(file: Path) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """Line by line: (an object with an iteration, 0), or (None, 1 if unreadable); a last line in the making is no error."""
    if not file.is_file():
        return
    try:
        with file.open("rb") as lines:
            for line in lines:
                try:
                    record = from_json(line)
                    sound = type(record["iteration"]) is int and 0 <= record["iteration"] < 2**53
                except (ValueError, KeyError, TypeError):
                    sound = False
                yield (record, 0) if sound else (None, int(line.endswith(b"\n") and bool(line.strip())))
    except OSError:
        return


def _flat(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{k}", n) for k, v in value.items() if (n := _number(v)) is not None)
        elif key != "iteration" and (n := _number(value)) is not None:
            yield key, n


def _read_events(file: Path, notes: list[str]) -> list[Event]:
    lines = list(_stream(file))
    if damaged := sum(bad for _, bad in lines):
        notes.append(f"{damaged} unreadable {'line' if damaged == 1 else 'lines'} of events.jsonl left out.")
    records = (record for record, _ in lines if record is not None)
    return [Event(r["iteration"], str(r.get("kind", "")), str(r.get("message", ""))) for r in records]


def _find_grids(folder: Path, notes: list[str]) -> list[Grid]:
    """Sound PNG files, by iteration."""
    grids = []
    for path in folder.glob("step-*.png") if folder.is_dir() else ():
        match = _GRID_NAME.fullmatch(path.name)
        if match is None or not path.is_file():
            continue
        try:
            size, sides = path.stat().st_size, _sides(path)
        except (OSError, struct.error):
            size, sides = 0, None
        if sides is None:
            notes.append(f"samples/{path.name} is damaged and left out.")
        else:
            grids.append(Grid(path, int(match[1]), *sides, size))
    return sorted(grids, key=lambda grid: grid.iteration)


def _sides(path: Path) -> tuple[int, int] | None:
    """Width and height of a PNG file whose every chunk has the checksum it was written with; None of another."""
    with path.open("rb") as file:
        if file.read(len(_PNG_HEAD)) != _PNG_HEAD:
            return None
        sides: tuple[int, int] | None = None
        while True:
            length, kind = struct.unpack(">I4s", file.read(8))
            if length > path.stat().st_size:
                return None
            data = file.read(length)
            if struct.unpack(">I", file.read(4))[0] != zlib.crc32(kind + data):
                return None
            if sides is None:
                sides = struct.unpack(">II", data[:8])
            if kind == b"IEND":
                return sides if not file.read(1) else None


def embedded(runs: Sequence[Run], budget: int = IMAGE_BYTES) -> list[list[Grid]]:
    """The grids to put into the page: the first and last of each run, and evenly between them as many as the budget holds."""
    chosen = [grids if len(grids) < 3 else [grids[0], grids[-1]] for grids in (run.grids for run in runs)]
    for count in range(3, max((len(run.grids) for run in runs), default=0) + 1):
        more = [[run.grids[i] for i in _spread(len(run.grids), count)] for run in runs]
        if sum(grid.size for grids in more for grid in grids) * 4 / 3 > budget:
            break
        chosen = more
    return chosen


def _spread(available: int, wanted: int) -> list[int]:
    """``wanted`` indices (or all) from first to last, evenly spaced."""
    if available <= wanted:
        return list(range(available))
    return [round(i * (available - 1) / (wanted - 1)) for i in range(wanted)]
