"""Pictures of the records as self-contained SVG: seconds by phase, and what probes cost against how well they pick."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from ..report.charts import escape, number
from .measure import PHASES

COLOURS = dict(
    zip(
        PHASES,
        ("#4c78a8", "#b279a2", "#9ecae9", "#1f4e79", "#f58518", "#e45756", "#ff9da6", "#54a24b", "#bab0ac", "#d9d9d9"),
        strict=True,
    )
)
WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 860, 190, 90, 20, 8, 52


@dataclasses.dataclass(frozen=True)
class Bars:
    """Bars on one scale: for each label the seconds by phase, and those of the whole iteration, written beside its bar."""

    title: str
    bars: Mapping[str, Mapping[str, float]]
    totals: Mapping[str, float]


def draw(groups: Sequence[Bars]) -> str:
    """The groups below each other; the longest bar of each fills the width."""
    parts, y = [_legend()], TOP
    for group in groups:
        parts.append(f'<text x="12" y="{y + 12}" font-weight="bold">{escape(group.title)}</text>')
        y += 22
        longest = max(sum(bar.values()) for bar in group.bars.values())
        for label, bar in group.bars.items():
            parts.append(_bar(label, bar, group.totals[label], y, (WIDTH - LEFT - RIGHT) / longest))
            y += BAR + GAP
        y += 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#222"><title>Seconds of an iteration by phase</title>'
        f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _legend() -> str:
    parts, x = [], 12
    for phase, colour in COLOURS.items():
        parts.append(f'<rect x="{x}" y="16" width="11" height="11" fill="{colour}"/><text x="{x + 15}" y="26">{phase}</text>')
        x += 26 + 7 * len(phase) + 10
    return "".join(parts)


def _bar(label: str, bar: Mapping[str, float], total: float, y: int, scale: float) -> str:
    parts = [f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>']
    x = float(LEFT)
    for phase in PHASES:
        seconds = max(bar.get(phase, 0.0), 0.0)
        if seconds * scale >= 0.05:
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{seconds * scale:.1f}" height="{BAR}" fill="{COLOURS[phase]}">'
                f"<title>{phase} {number(seconds)} s</title></rect>"
            )
            x += seconds * scale
    return "".join([*parts, f'<text x="{x + 6:.1f}" y="{y + 14}">{number(total)} s</text>'])


@dataclasses.dataclass(frozen=True)
class Point:
    """A probe: what it costs, as a share, and the true regret of its picks, with the standard error."""

    label: str
    cost: float
    regret: float
    error: float


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in one of cost and regret without losing in the other, by rising cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.regret)):
        if not front or point.regret < front[-1].regret:
            front.append(point)
    return front


def ticks(low: float, high: float) -> list[float]:
    """Round numbers within [low, high], at most eight."""
    rough = (high - low) / 7
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


PLOT_HEIGHT, PLOT_BOTTOM, PLOT_LEFT = 420, 56, 70


def scatter(title: str, points: Sequence[Point]) -> str:
    """True regret against overhead; the Pareto front is joined and filled, whiskers are two standard errors long each way."""
    front = pareto_front(points)
    x_top = 1.12 * max(p.cost for p in points)
    low = 0.95 * min(p.regret - 2 * p.error for p in points)
    high = 1.05 * max(p.regret + 2 * p.error for p in points)
    width, height = WIDTH - PLOT_LEFT - 40, PLOT_HEIGHT - TOP - PLOT_BOTTOM
    at_x = lambda cost: PLOT_LEFT + width * cost / x_top  # noqa: E731
    at_y = lambda distance: TOP + height * (high - distance) / (high - low)  # noqa: E731
    parts = [f'<text x="12" y="24" font-weight="bold">{escape(title)}</text>']
    parts.append(f'<path d="M{PLOT_LEFT} {TOP}V{TOP + height}H{PLOT_LEFT + width}" fill="none" stroke="#888"/>')
    for cost in ticks(0.0, x_top):
        parts.append(f'<text x="{at_x(cost):.1f}" y="{TOP + height + 18}" text-anchor="middle">{cost:+.0%}</text>')
    for regret in ticks(low, high):
        parts.append(f'<text x="{PLOT_LEFT - 8}" y="{at_y(regret) + 4:.1f}" text-anchor="end">{regret:.2f}</text>')
    parts.append(
        f'<text x="{PLOT_LEFT + width / 2:.0f}" y="{PLOT_HEIGHT - 14}" text-anchor="middle">overhead at measured cost: '
        f"evaluations, decoding, scoring</text>"
        f'<text transform="translate(18 {TOP + height / 2:.0f}) rotate(-90)" text-anchor="middle">true regret, in std of the '
        f"level</text>"
    )
    path = "L".join(f"{at_x(p.cost):.1f} {at_y(p.regret):.1f}" for p in front)
    parts.append(f'<path d="M{path}" fill="none" stroke="{COLOURS["rollout"]}" stroke-dasharray="5 4"/>')
    for p in points:
        x, y, whisker = at_x(p.cost), at_y(p.regret), 2 * p.error
        fill = COLOURS["rollout"] if p in front else "#fff"
        crowded = any(0 < at_x(q.cost) - x < 60 and abs(at_y(q.regret) - y) < 40 for q in points)
        label = (x - 9, "end") if crowded else (x + 9, "start")
        parts.append(
            f'<path d="M{x:.1f} {at_y(p.regret - whisker):.1f}V{at_y(p.regret + whisker):.1f}" stroke="#999"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{COLOURS["rollout"]}"><title>{escape(p.label)}: '
            f"{p.cost:+.1%}, {p.regret:.3f} ± {p.error:.3f}</title></circle>"
            f'<text x="{label[0]:.1f}" y="{y + 4:.1f}" text-anchor="{label[1]}">{escape(p.label)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{PLOT_HEIGHT}" viewBox="0 0 {WIDTH} {PLOT_HEIGHT}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12" fill="#222"><title>{escape(title)}</title>'
        f'<rect width="{WIDTH}" height="{PLOT_HEIGHT}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
