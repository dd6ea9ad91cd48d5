"""Charts as inline SVG that stretches: curves scale with the page, text and line widths do not.

A plot is an ``<svg>`` without a view box, so text keeps its size and is placed in percent. The curves live in a nested
``<svg class="curves">`` of 1000 x 1000 units that is stretched over the plot area; their strokes do not scale. A value y at
iteration x lies at ``1000 * (x - x0) / (x1 - x0)`` and ``1000 * (1 - (s(y) - s(y0)) / (s(y1) - s(y0)))`` with s the identity
or log10.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

POINTS = 600
BINS = 48
UNITS = 1000
COLOURS = 8
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve: ``x`` and ``y`` [N] with NaN for gaps, ``spread`` [N] the half width of a band around it.

    ``noisy`` draws a smoothed line over the faint values, ``points`` marks each value. ``key`` and ``run`` end up as
    attributes of the path.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    kind: Literal["noisy", "plain", "points"] = "noisy"
    spread: np.ndarray | None = None
    colour: int = 0
    key: str = ""
    run: int = 0
    faint: bool = True


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers [K, bins] over bins between ``edges`` [bins + 1], drawn on top of each other in the order of ``labels``."""

    labels: Sequence[str]
    edges: np.ndarray
    layers: np.ndarray
    key: str = ""


@dataclasses.dataclass(frozen=True)
class Chart:
    """What to draw, and the words around it. ``marks`` are vertical lines: (iteration, kind, text)."""

    title: str
    note: str
    lines: Sequence[Line] = ()
    stack: Stack | None = None
    scale: Literal["linear", "log", "auto"] = "linear"
    zero: bool = False
    wide: bool = False
    marks: Sequence[tuple[float, str, str]] = ()
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Axes:
    """Domain of a plot; ``log`` for a logarithmic y axis."""

    x0: float
    x1: float
    y0: float
    y1: float
    log: bool = False

    def x(self, values: np.ndarray) -> np.ndarray:
        """Horizontal positions in units."""
        return UNITS * (np.asarray(values, dtype=float) - self.x0) / (self.x1 - self.x0)

    def y(self, values: np.ndarray) -> np.ndarray:
        """Vertical positions in units, from the top. On a logarithmic axis, values of 0 and below lie on the lower edge."""
        v = np.asarray(values, dtype=float)
        if not self.log:
            return UNITS * (1 - (v - self.y0) / (self.y1 - self.y0))
        low, high = math.log10(self.y0), math.log10(self.y1)
        return UNITS * (1 - (np.log10(np.where(v > self.y0, v, np.where(np.isnan(v), v, self.y0))) - low) / (high - low))


def escape(text: object) -> str:
    """Text that is safe in HTML, SVG and their attributes: markup escaped, control characters and lone surrogates dropped."""
    clean = str(text).encode("utf-8", "replace").decode("utf-8")
    return html.escape(_UNPRINTABLE.sub("", clean), quote=True)


def number(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` significant digits, for reading; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    text = f"{value:.{max(0, digits - 1 - size)}f}" if -4 < size < 6 else _scientific(value, digits)
    return text.replace("-", "−")


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def thin(y: np.ndarray, limit: int = POINTS) -> np.ndarray:
    """Indices of at most ``limit`` values that keep the look of y: smallest and largest of each stretch, first and last."""
    n = y.size
    if n <= limit:
        return np.arange(n)
    width = -(-n // ((limit - 2) // 2))
    padded = np.concatenate([y, np.full(-n % width, np.nan)]).reshape(-1, width)
    start = np.arange(padded.shape[0]) * width
    lowest = np.where(np.isnan(padded), np.inf, padded).argmin(1) + start
    highest = np.where(np.isnan(padded), -np.inf, padded).argmax(1) + start
    return np.unique(np.concatenate([lowest, highest, [0, n - 1]]))


def smooth(y: np.ndarray) -> np.ndarray:
    """Moving average with a triangular window that reaches a tenth of the series to each side; gaps stay gaps."""
    half = y.size // 20
    if half == 0:
        return y
    known = np.isfinite(y)
    values, weights = np.where(known, y, 0.0), known.astype(float)
    for _ in range(2):
        values, weights = _box(values, half), _box(weights, half)
    return np.where(known, values / np.maximum(weights, 1e-12), np.nan)


def _box(y: np.ndarray, half: int) -> np.ndarray:
    total = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(y.size)
    return total[np.minimum(at + half + 1, y.size)] - total[np.maximum(at - half, 0)]


def bins(x: np.ndarray, layers: np.ndarray, mean: bool, limit: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """Sums or means of layers [K, N] over at most ``limit`` stretches of x, as equal as whole numbers allow.

    Returns:
        edges [B + 1], half-way between iterations, and values [K, B].
    """
    first, last = int(x[0]), int(x[-1]) + 1
    count = min(limit, last - first)
    edges = np.round(np.linspace(first, last, count + 1)) - 0.5
    at = np.searchsorted(edges, x) - 1
    known = np.nan_to_num(layers)
    values = np.stack([np.bincount(at, layer, count) for layer in known]) if len(known) else np.zeros((0, count))
    rows = np.bincount(at, minlength=count)
    return edges, values / np.maximum(rows, 1) if mean else values


def figure(chart: Chart, ident: str) -> str:
    """The chart with caption, legend and plot; '' where there is nothing to draw."""
    lines = [line for line in chart.lines if np.isfinite(line.y).any()]
    if not lines and chart.stack is None:
        return ""
    chart = dataclasses.replace(chart, lines=lines)
    note = f"<span>{escape(chart.note)}</span>" if chart.note else ""
    return (
        f'<figure class="chart{" wide" if chart.wide else ""}"><figcaption><b>{escape(chart.title)}</b>{note}</figcaption>'
        f'{_legend(chart)}<div class="frame">{_plot(chart, ident)}</div></figure>'
    )


def _legend(chart: Chart) -> str:
    rows = []
    for line in chart.lines:
        settled = smooth(line.y) if line.kind == "noisy" else line.y
        last = settled[np.isfinite(settled)][-1]
        value = f"<b>{number(float(last))}{escape(chart.unit)}</b>"
        rows.append(f'<li class="c{line.colour % COLOURS}"><i class="{line.kind}"></i>{escape(line.label)} {value}</li>')
    if chart.stack is not None:
        labels = list(enumerate(chart.stack.labels))
        rows = [f'<li class="c{i % COLOURS}"><i class="area"></i>{escape(label)}</li>' for i, label in labels] + rows
    return f'<ul class="legend">{"".join(rows)}</ul>'


def _plot(chart: Chart, ident: str) -> str:
    axes = _axes(chart)
    curves = [_areas(chart.stack, axes)] if chart.stack is not None else []
    curves += [_band(line, axes) for line in chart.lines if line.spread is not None]
    faint = [line for line in chart.lines if line.kind == "noisy" and line.faint]
    curves += [_path(line, line.y, axes, "raw") for line in faint]
    for line in chart.lines:
        curves.append(_path(line, smooth(line.y) if line.kind == "noisy" else line.y, axes, "line"))
        if line.kind == "points":
            curves.append(_path(line, line.y, axes, "dots"))
    scale = "log" if axes.log else "linear"
    return (
        f'<svg class="plot" role="img" aria-labelledby="{ident}t {ident}d"><title id="{ident}t">{escape(chart.title)}</title>'
        f'<desc id="{ident}d">{escape(_describe(chart))}</desc>{_grid(axes)}{_marks(chart, axes)}'
        f'<svg class="curves" viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none" width="100%" height="100%" '
        f'data-x0="{axes.x0:.12g}" data-x1="{axes.x1:.12g}" data-y0="{axes.y0:.12g}" data-y1="{axes.y1:.12g}" '
        f'data-scale="{scale}" data-unit="{escape(chart.unit)}">{"".join(curves)}</svg></svg>'
    )


def _describe(chart: Chart) -> str:
    """The curves in words, for those who cannot see them."""
    said = []
    for line in chart.lines:
        known = np.isfinite(line.y)
        x, y = line.x[known], line.y[known]
        said.append(
            f"{line.label}: {number(y[0], 4)} at iteration {x[0]:.0f}, {number(y[-1], 4)} at iteration {x[-1]:.0f}, "
            f"lowest {number(y.min(), 4)}, highest {number(y.max(), 4)}."
        )
    if chart.stack is not None:
        first, last = chart.stack.layers[:, 0], chart.stack.layers[:, -1]
        parts = zip(chart.stack.labels, first, last, strict=True)
        said.append("; ".join(f"{label}: first {number(a)}, last {number(b)}" for label, a, b in parts) + ".")
    return " ".join(said)


def _axes(chart: Chart) -> Axes:
    stack, xs, ys = chart.stack, [line.x for line in chart.lines], []
    for line in chart.lines:
        ys.append(line.y)
        if line.spread is not None:
            ys += [line.y - np.nan_to_num(line.spread), line.y + np.nan_to_num(line.spread)]
    if stack is not None:
        xs.append(stack.edges)
        ys.append(np.append(stack.layers.sum(0), 0.0))
    x, y = np.concatenate(xs), np.concatenate(ys)
    y = y[np.isfinite(y)]
    x0, x1 = float(x.min()), float(x.max())
    if x0 == x1:
        x0, x1 = x0 - 1, x1 + 1
    if _wants_log(chart, y):
        positive = y[y > 0]
        bottom, top = math.floor(math.log10(positive.min())), math.ceil(math.log10(positive.max()))
        bottom = bottom - 1 if (y <= 0).any() or bottom == top else bottom
        return Axes(x0, x1, 10.0**bottom, 10.0**top, log=True)
    low, high = float(y.min()), float(y.max())
    if chart.zero or stack is not None:
        low, high = min(low, 0.0), max(high, 0.0)
    least = 1e-3 * max(abs(low), abs(high)) or 1.0
    if high - low < least:
        low, high = (low, low + least) if low == 0 else (low - least, high + least)
    pad = 0.05 * (high - low)
    full = stack is not None and not chart.lines
    return Axes(x0, x1, low if low == 0 else low - pad, high if full or high == 0 else high + pad)


def _wants_log(chart: Chart, y: np.ndarray) -> bool:
    if chart.scale == "linear" or not (y > 0).any():
        return False
    return chart.scale == "log" or bool((y > 0).all() and y.max() > 30 * np.median(y))


def _grid(axes: Axes) -> str:
    parts = []
    for value, label in _y_ticks(axes):
        at = f"{axes.y(np.array(value)) / 10:.2f}%"
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="ytick" x="-7" y="{at}" dy="4">{label}</text>')
    for tick in _ticks(axes.x0, axes.x1, 5, whole=True)[0]:
        at = f"{axes.x(np.array(tick)) / 10:.2f}%"
        parts.append(f'<text class="xtick" x="{at}" y="100%" dy="16">{_whole(tick)}</text>')
    parts.append('<line class="base" x1="0" x2="100%" y1="100%" y2="100%"/>')
    parts.append('<text class="xtitle" x="100%" y="100%" dy="30">iteration</text>')
    return "".join(parts)


def _y_ticks(axes: Axes) -> list[tuple[float, str]]:
    if axes.log:
        low, high = round(math.log10(axes.y0)), round(math.log10(axes.y1))
        stride = max(1, -(-(high - low) // 5))
        return [(10.0**e, f"1e{e}".replace("-", "−")) for e in range(low, high + 1, stride)]
    ticks, step = _ticks(axes.y0, axes.y1, 4)
    return list(zip(ticks, tick_labels(ticks, step), strict=True))


def _ticks(low: float, high: float, wanted: int, whole: bool = False) -> tuple[list[float], float]:
    """Round values between low and high, at least two where there is room, and their distance."""
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.75)
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step + 0.0 for i in range(first, last + 1)], step


def tick_labels(ticks: Sequence[float], step: float) -> list[str]:
    """Labels of at most about six characters with as many decimals as the step needs."""
    largest = max((abs(t) for t in ticks), default=0.0)
    divisor, suffix = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 else (1.0, "")
    fine = step / divisor
    decimals = next((d for d in range(7) if abs(round(fine * 10**d) - fine * 10**d) < 1e-6), 7)
    short = decimals < 5 and largest < 1e7
    labels = [f"{t / divisor:.{decimals}f}{suffix}" if short else _scientific(t, 3) for t in ticks]
    return ["0" if t == 0 else label.replace("-", "−") for t, label in zip(ticks, labels, strict=True)]


def _whole(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:.0f}"


def _marks(chart: Chart, axes: Axes) -> str:
    """Vertical lines; of several within one percent of the width, the first."""
    drawn: dict[int, str] = {}
    for x, kind, text in chart.marks:
        at = float(axes.x(np.array(x))) / 10
        if 0 <= at <= 100:
            line = f'<line class="mark {escape(kind)}" x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="100%"><title>{escape(text)}'
            drawn.setdefault(round(at), f"{line}</title></line>")
    return "".join(drawn.values())


def _path(line: Line, y: np.ndarray, axes: Axes, role: str) -> str:
    keep = thin(y)
    d = _trace(axes.x(line.x[keep]), axes.y(y[keep]), dots=role == "dots")
    names = f'data-label="{escape(line.label)}" data-key="{escape(line.key)}" data-run="{line.run}"'
    again = " again" if line.colour >= COLOURS else ""
    return f'<path class="{role} c{line.colour % COLOURS}{again}" {names} d="{d}"/>'


def _trace(x: np.ndarray, y: np.ndarray, dots: bool) -> str:
    """Path data; NaN interrupts the line, and a point alone becomes a dot."""
    parts, pen = [], False
    known = np.isfinite(y)
    for i, (px, py) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        if not known[i]:
            pen = False
            continue
        parts.append(f"{'L' if pen else 'M'}{px:.1f},{py:.1f}")
        if dots or (not pen and not (i + 1 < y.size and known[i + 1])):
            parts.append("h0")
        pen = not dots
    return "".join(parts)


def _band(line: Line, axes: Axes) -> str:
    assert line.spread is not None
    keep = thin(line.y)
    known = keep[np.isfinite(line.y[keep]) & np.isfinite(line.spread[keep])]
    if known.size == 0:
        return ""
    x, y, half = line.x[known], line.y[known], line.spread[known]
    d = _polygon(axes.x(x), axes.y(y + half), axes.y(y - half))
    return f'<path class="band c{line.colour % COLOURS}" d="{d}"/>'


def _areas(stack: Stack, axes: Axes) -> str:
    top = np.vstack([np.zeros((1, stack.layers.shape[1])), np.cumsum(stack.layers, 0)])
    x = axes.x(np.repeat(stack.edges, 2)[1:-1])
    key, paths = escape(stack.key), []
    for i, label in enumerate(stack.labels):
        d = _polygon(x, axes.y(np.repeat(top[i + 1], 2)), axes.y(np.repeat(top[i], 2)))
        paths.append(f'<path class="area c{i % COLOURS}" data-label="{escape(label)}" data-key="{key}" d="{d}"/>')
    return "".join(paths)


def _polygon(x: np.ndarray, upper: np.ndarray, lower: np.ndarray) -> str:
    """Closed path along ``upper`` and back along ``lower``."""
    xs, ys = np.concatenate([x, x[::-1]]).tolist(), np.concatenate([upper, lower[::-1]]).tolist()
    return "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in zip(xs, ys, strict=True)) + "Z"
