"""A profile's pictures as standalone SVG files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from ..engine.timing import PHASES
from ..estimate.memory import size_text
from ..estimate.roofline import Device
from ..report.charts import escape, number
from .memory import Sample
from .points import Point

WIDTH = 760
COLOURS = ("#0c47c5", "#d97a10", "#652258", "#0889af", "#5a540b", "#e02f73", "#121a1e", "#9362ff", "#0b6e4f", "#8a939d")
PLACES = {phase: i for i, phase in enumerate((*PHASES, "sync", "other"))}
_STYLE = (
    "text{font:12px sans-serif;fill:#191e24}.soft{fill:#57616c}.title{font-size:15px;font-weight:600}"
    ".axis{stroke:#57616c}.grid{stroke:#e7eaee}.roof{stroke:#57616c;fill:none;stroke-dasharray:5 4}"
)


def phase_bars(phases: Mapping[str, float], title: str) -> str:
    """A bar per phase, with seconds and share."""
    total, longest = sum(phases.values()), max(phases.values(), default=0.0) or 1.0
    left, top, high, wide = 90, 50, 26, WIDTH - 90 - 140
    parts = [_text(16, 26, title, "title")]
    for i, (phase, seconds) in enumerate(phases.items()):
        y, length = top + i * high, max(1.0, wide * seconds / longest)
        words = f"{number(seconds)} s, {seconds / total:.1%}" if total else f"{number(seconds)} s"
        parts.append(_text(left - 8, y + 13, phase, anchor="end"))
        parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{high - 8}" fill="{_colour(phase)}"/>')
        parts.append(_text(left + length + 8, y + 13, words))
    return _svg(top + len(phases) * high + 16, parts)


def roofline(points: Sequence[Point], device: Device | None, title: str) -> str:
    """TFLOP/s against FLOPs per byte, both logarithmic; the roof of ``device`` where its rates are known."""
    left, top, wide, high = 70, 76, WIDTH - 70 - 200, 330
    parts = [_text(16, 26, title, "title")]
    if device is None:
        parts.append(_text(16, 46, "no roof: the rates of this device are not stated; achieved points only", "soft"))
    if not points:
        parts.append(_text(left, top + 40, "nothing to show: no phase or kernel could be counted"))
        return _svg(top + 80, parts)
    xs, ys = [p.intensity for p in points], [p.tflops for p in points]
    if device is not None:
        ridge = device.bf16.value / device.bandwidth.value
        xs, ys = [*xs, ridge / 3, ridge * 3], [*ys, device.bf16.value, device.fp8.value]
    x0, x1 = _decades(xs)
    y0, y1 = _decades(ys)
    place_x = lambda x: left + wide * (math.log10(x) - x0) / (x1 - x0)  # noqa: E731
    place_y = lambda y: top + high * (1 - (math.log10(y) - y0) / (y1 - y0))  # noqa: E731
    for e in range(x0, x1 + 1):
        x = place_x(10.0**e)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + high}"/>')
        parts.append(_text(x, top + high + 16, f"1e{e}", "soft", "middle"))
    for e in range(y0, y1 + 1):
        y = place_y(10.0**e)
        parts.append(f'<line class="grid" x1="{left}" x2="{left + wide}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4, f"1e{e}", "soft", "end"))
    parts.append(f'<path class="axis" fill="none" d="M{left},{top}V{top + high}H{left + wide}"/>')
    parts.append(_text(left + wide / 2, top + high + 36, "FLOPs per byte", anchor="middle"))
    parts.append(_text(left, top - 8, "TFLOP/s", anchor="middle"))
    for ceiling, name in ((device.bf16, "bf16"), (device.fp8, "fp8")) if device is not None else ():
        assert device is not None
        bandwidth = device.bandwidth.value
        start = max(10.0**x0, 10.0**y0 / bandwidth)
        corner = ceiling.value / bandwidth
        path = f"M{place_x(start):.1f},{place_y(start * bandwidth):.1f}L{place_x(corner):.1f},{place_y(ceiling.value):.1f}"
        parts.append(f'<path class="roof" d="{path}H{left + wide}"/>')
        words = f"{name} {ceiling.value:g} [{ceiling.label}]"
        parts.append(_text(left + wide - 4, place_y(ceiling.value) - 5, words, "soft", "end"))
    for i, point in enumerate(points):
        x, y = place_x(point.intensity), place_y(point.tflops)
        words = f"{point.name}: {number(point.tflops)} TFLOP/s at {number(point.intensity)} FLOPs per byte"
        colour = _colour(point.name, i)
        box = f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}">'
        dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}">'
        shape = f"{box}{_title(words)}</rect>" if point.kind == "kernel" else f"{dot}{_title(words)}</circle>"
        key = top + 12 + 18 * i
        parts.append(shape)
        parts.append(f'<circle cx="{left + wide + 12}" cy="{key - 4}" r="4" fill="{colour}"/>')
        parts.append(_text(left + wide + 22, key, f"{point.name}: {number(point.tflops)}"))
    return _svg(max(top + high + 50, top + 20 + 18 * len(points)), parts)


def memory_curve(samples: Sequence[Sample], title: str, note: str) -> str:
    """What is held as each phase begins, in steps, and the peak of each, paler, where it is known."""
    left, top, wide, high = 80, 60, WIDTH - 80 - 150, 260
    end = samples[-1].seconds or 1.0
    largest = max(max(sample.held, sample.peak or 0) for sample in samples) or 1
    place_x = lambda seconds: left + wide * seconds / end  # noqa: E731
    place_y = lambda size: top + high * (1 - size / largest)  # noqa: E731
    parts = [_text(16, 26, title, "title"), _text(16, 46, note, "soft")]
    colours = {phase: _colour(phase) for phase in dict.fromkeys(s.phase for s in samples)}
    for one, following in itertools.pairwise(samples):
        x, width = place_x(one.seconds), max(0.5, place_x(following.seconds) - place_x(one.seconds))
        for size, opacity in ((one.peak, 0.25), (one.held, 0.85)):
            if size is not None:
                box = f'x="{x:.1f}" y="{place_y(size):.1f}" width="{width:.1f}" height="{top + high - place_y(size):.1f}"'
                words = _title(f"{one.phase} at {number(one.seconds)} s: {size_text(size)}")
                parts.append(f'<rect {box} fill="{colours[one.phase]}" fill-opacity="{opacity}">{words}</rect>')
    for share in (0.0, 0.5, 1.0):
        parts.append(_text(left - 6, place_y(share * largest) + 4, size_text(share * largest), "soft", "end"))
        parts.append(_text(place_x(share * end), top + high + 16, f"{number(share * end)} s", "soft", "middle"))
    parts.append(f'<path class="axis" fill="none" d="M{left},{top}V{top + high}H{left + wide}"/>')
    for i, (phase, colour) in enumerate((p, c) for p, c in colours.items() if p in PLACES):
        y = top + 8 + 18 * i
        parts.append(f'<rect x="{left + wide + 16}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(left + wide + 32, y, phase))
    return _svg(top + high + 36, parts)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around the values, with room on both sides."""
    return math.floor(math.log10(min(values)) - 0.1), math.ceil(math.log10(max(values)) + 0.1)


def _colour(name: str, i: int = 0) -> str:
    """The same for a phase in every picture."""
    return COLOURS[PLACES.get(name, len(COLOURS) - 1 - i) % len(COLOURS)]


def _text(x: float, y: float, words: object, style: str = "", anchor: str = "start") -> str:
    named = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(words)}</text>'


def _title(words: object) -> str:
    return f"<title>{escape(words)}</title>"


def _svg(height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    style, paper = f"<style>{_STYLE}</style>", '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', style, paper, *parts, "</svg>\n"])
