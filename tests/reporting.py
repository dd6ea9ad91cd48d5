"""Run folders like real ones, and readers of the pages made from them, for the tests of the report."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

RECIPE = """name = "{name}"

[model]
path = "tiny-flux"
dtype = "fp32"

[selection]
candidates = 8
strategy = "{strategy}"
alpha = 0.8

[loss]
clip_range = {clip}

[train]
iterations = {total}
seed = {seed}

[optimizer]
lr = {lr}

[evaluation]
every = 10
prompts = 50

[[rewards]]
name = "tiny"
weight = 1.0
"""
EVENTS = [
    (31, "memory", "out of memory while sampling: continuing with engine.max_rows = 64"),
    (47, "warning", "guards.equal_groups: the samples of a group no longer differ in reward (0.91, limit 0.9)"),
    (60, "resume", "resumed from checkpoints/step-000060 after iteration 60"),
]
SCENES = [(a, b, s) for a, b in (("red", "blue"), ("gold", "teal"), ("green", "violet")) for s in ("circle", "square")]


def write_run(
    folder: Path, iterations: int = 100, total: int = 100, seed: int = 0, grids: int = 0, level: float = 0.25, **recipe: Any
) -> Path:
    """A run folder like a real one: curves that rise with noise, categories, a few events, sample grids."""
    folder.mkdir(parents=True)
    settings = {"name": "tiny", "strategy": "closest", "clip": 0, "lr": 1e-4} | recipe
    (folder / "config.toml").write_text(RECIPE.format(total=total, seed=seed, **settings), "utf-8")
    versions = {"adagrpo": "0.1.0", "torch": "2.11.0", "triton": None}
    manifest = {"versions": versions, "python": "3.11.2", "device": "cpu", "commit": "4938311dad159aa17f28f489", "threads": 2}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rng = np.random.default_rng(seed)
    with (folder / "metrics.jsonl").open("w") as file:
        for i in range(1, iterations + 1):
            file.write(json.dumps(record(i, total, level, rng)) + "\n")
    if iterations >= total:
        gain = {"before": 0.412, "after": 0.412 + level, "gain": level, "low": level - 0.034, "high": level + 0.036}
        (folder / "result.json").write_text(json.dumps({**gain, "prompts": 150, "noises": 3}))
    lines = [json.dumps({"iteration": i, "kind": kind, "message": text}) for i, kind, text in EVENTS if i <= iterations]
    (folder / "events.jsonl").write_text("".join(line + "\n" for line in lines))
    for step in np.linspace(0, iterations, grids).round().astype(int) if grids else ():
        draw_grid(folder / "samples" / f"step-{step:06d}.png", step / total, rng)
    return folder


def record(i: int, total: int, level: float, rng: np.random.Generator) -> dict[str, Any]:
    """One line of ``metrics.jsonl``."""
    at = i / total
    skill = 0.40 + level * (1 - math.exp(-2.6 * at)) / 0.926
    reward, noise = skill - 0.03 + 0.035 * rng.normal(), rng.random(8)
    categories = ("single", "count", "pair", "relation", "combination")
    wanted = np.exp(-((np.arange(5) - 0.6 - 3 * at) ** 2) / 2.5)
    chosen = rng.multinomial(8, wanted / wanted.sum())
    seconds = {
        "probe": 0.62, "select": 0.002, "prefix": 0.03, "rollout": 1.55, "decode": 0.21, "reward": 0.12,
        "advantage": 0.004, "update": 0.34, "other": 0.03,
    }  # fmt: skip
    spent = {f"perf/{phase}_seconds": s * (1 + 0.08 * abs(rng.normal())) for phase, s in seconds.items()}
    found: dict[str, Any] = {
        "iteration": i,
        "reward/train": reward,
        "reward/group_std": 0.24 - 0.05 * at + 0.02 * rng.normal(),
        "advantage/mean_abs": 0.81 + 0.03 * rng.normal(),
        "advantage/false_positive": 0.17 - 0.05 * at + 0.05 * noise[0],
        "advantage/false_negative": 0.14 - 0.03 * at + 0.05 * noise[1],
        "advantage/turned": 0.03 + 0.02 * noise[2],
        "advantage/equal_groups": 0.06 * noise[3],
        "advantage/failed": 0.0,
        "policy/loss": -1e-3 * noise[4],
        "policy/ratio_deviation": 1.2e-7 * (0.6 + noise[5]),
        "policy/ratio_mean": 1 + 4e-8 * rng.normal(),
        "policy/clip_share": 0.0,
        "policy/clip_share_high": 0.0,
        "policy/clip_share_low": 0.0,
        "policy/kl": 2.5e-5 * i**1.2 * (1 + 0.1 * rng.normal()),
        "policy/grad_norm": 0.32 * math.exp(0.3 * rng.normal()),
        "policy/lr": 1e-4 * (1 - 0.9 * at),
        "selection/ema_mean": skill + 0.006 * rng.normal(),
        "selection/ema_std": 0.31 - 0.04 * at,
        "selection/probe_mean": skill + 0.03 * rng.normal(),
        "selection/distance": 0.04 * noise[6],
        "selection/categories": {name: int(n) for name, n in zip(categories, chosen, strict=True) if n},
        **spent,
        "perf/seconds": sum(spent.values()),
        "perf/probe_evaluations": 512,
        "perf/rollout_evaluations": 1408,
        "perf/update_evaluations": 32,
    }
    if i % 10 == 0:
        found |= {"reward/held_out": skill + 0.01 * rng.normal(), "reward/held_out_std": 0.33 - 0.05 * at}
    return found


def draw_grid(path: Path, skill: float, rng: np.random.Generator) -> None:
    """Six captioned pictures, the more of them right the greater the skill."""
    path.parent.mkdir(exist_ok=True)
    sheet = Image.new("RGB", (6 * 172 + 8, 224), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (first, second, shape) in enumerate(SCENES):
        left = 8 + 172 * i
        pen.rectangle((left, 8, left + 163, 171), fill=(20, 20, 22))
        right = (i * 0.37) % 1 < 0.2 + skill
        for j, colour in enumerate((first, second) if right else (second, second, first)):
            x, y = left + 30 + 62 * j % 110 + rng.integers(-8, 8), 60 + 46 * (j // 2) + rng.integers(-12, 12)
            draw = pen.ellipse if (shape == "circle") == right else pen.rectangle
            draw((int(x), int(y), int(x) + 38, int(y) + 38), fill=colour)
        pen.text((left, 178), f"reward {0.9 if right else 0.3:.2f}", fill=(40, 40, 40))
        pen.text((left, 194), f"a {first} {shape} left of", fill=(90, 90, 90))
        pen.text((left, 208), f"a {second} {shape}", fill=(90, 90, 90))
    sheet.save(path)


class Tree(HTMLParser):
    """Checks that tags are balanced, and collects them and the visible text."""

    VOID = frozenset({"meta", "img", "input", "br", "link"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text.append(data)

    @property
    def visible(self) -> str:
        return " ".join(" ".join(self.text).split())


def plots(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r'<svg class="plot".*?</svg></svg>', page, re.DOTALL)]


def path_of(page: str, key: str, role: str, run: int = 0) -> tuple[ET.Element, ET.Element]:
    """The plot that draws a metric, and its path."""
    for plot in plots(page):
        for path in plot.iter("path"):
            if path.get("data-key") == key and path.get("data-run") == str(run) and role in path.get("class", "").split():
                return plot, path
    raise AssertionError(f"no {role} of {key}")


def coordinates(path: ET.Element) -> np.ndarray:
    return np.array([(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path.get("d", ""))])


def scale(plot: ET.Element, kind: str) -> tuple[float, float]:
    """Offset and slope from values to units, as a reader sees them: from the labels of the ticks."""
    at = {"ytick": "y", "xtick": "x"}[kind]
    ticks = [(text.text or "", text.get(at, "")) for text in plot.iter("text") if text.get("class") == kind]
    values = [float(label.replace("−", "-").removesuffix("k")) * (1000 if label.endswith("k") else 1) for label, _ in ticks]
    places = [10 * float(place.removesuffix("%")) for _, place in ticks]
    slope, offset = np.polyfit(values, places, 1)
    assert np.allclose(offset + slope * np.array(values), places, atol=0.2), "ticks lie on one straight scale"
    return offset, slope


def value_on(plot: ET.Element, x: float, y: float) -> tuple[float, float]:
    (x_offset, x_slope), (y_offset, y_slope) = scale(plot, "xtick"), scale(plot, "ytick")
    return (x - x_offset) / x_slope, (y - y_offset) / y_slope


def linear(colour: str) -> np.ndarray:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    c = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a: np.ndarray, b: np.ndarray) -> float:
    dark, light = sorted(float(c @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (light + 0.05) / (dark + 0.05)


def oklab(rgb: np.ndarray) -> np.ndarray:
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ rgb.clip(0, 1))
