"""Stacked bars of seconds by phase, as a self-contained SVG."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ..run.charts import escape, number
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
