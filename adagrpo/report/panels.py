"""Which charts a report shows, and what each of them says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .charts import COLOURS, Chart, Line, Stack, bins, escape, figure, number
from .data import Run

PHASES = ("sync", "probe", "select", "prefix", "rollout", "decode", "reward", "advantage", "update", "other")
CATEGORIES = "selection/categories/"
_GIB = 1 / 2**30
_KL = "measured only with loss.kl_weight above 0"
_EMA = "EMA of the policy's level"
_HELD_OUT = "Fixed prompts and noise; band ± 1 standard error over prompts."


@dataclasses.dataclass(frozen=True)
class Metric:
    """One curve of a panel.

    Attributes:
        spread: the metric that is the half width of its band.
        factor: multiplies the values.
        title, note: replace the panel's where the metric has a chart of its own; None as note for no such chart.
    """

    key: str
    label: str
    kind: Literal["noisy", "plain", "points"] = "noisy"
    spread: str = ""
    factor: float = 1.0
    title: str = ""
    note: str | None = ""


@dataclasses.dataclass(frozen=True)
class Panel:
    """A chart: for one run all its metrics together, for several runs one chart per metric with a curve per run.

    ``if_zero`` explains a metric that is 0 throughout.
    """

    title: str
    note: str
    metrics: tuple[Metric, ...]
    scale: Literal["linear", "log", "auto"] = "linear"
    zero: bool = False
    wide: bool = False
    unit: str = ""
    if_zero: str = ""


REWARD = (
    Panel(
        "Reward",
        "Train: samples of the groups. Held-out: fixed prompts and noise, band ± 1 standard error over prompts.",
        (
            Metric("reward/train", "train", title="Training reward", note="Samples of the groups."),
            Metric("reward/held_out", "held-out", "points", "reward/held_out_std", title="Held-out reward", note=_HELD_OUT),
        ),
        wide=True,
    ),
    Panel(
        "Spread of the reward",
        "Standard deviation. Groups that lose it teach nothing.",
        (
            Metric("reward/group_std", "inside a group"),
            Metric("reward/held_out_std", "over held-out prompts", "points", note="Standard deviation of the prompts' means."),
        ),
        zero=True,
    ),
)
CURRICULUM = (
    Panel(
        f"{_EMA}, and the groups",
        "Band: EMA ± its standard deviation. All candidates: mean over the probes. Group reward: samples trained on.",
        (
            Metric(
                "selection/ema_mean", "EMA", "plain", "selection/ema_std", title=_EMA, note="Band: ± its standard deviation."
            ),
            Metric("reward/train", "group reward", note=None),
            Metric("selection/probe_mean", "all candidates", title="All candidates", note="Mean reward of the probes."),
        ),
    ),
    Panel(
        "Distance of the chosen prompt",
        "|reward of the probe − EMA|. Large: no candidate near the policy's level.",
        (Metric("selection/distance", "distance"),),
        zero=True,
    ),
)
ADVANTAGE = (
    Panel(
        "Where group and policy level disagree",
        "Shares of samples. False positive: better than its group, below the EMA. False negative: the reverse. "
        "Turned: the fusion changed the sign.",
        (
            Metric("advantage/false_positive", "false positive"),
            Metric("advantage/false_negative", "false negative"),
            Metric("advantage/turned", "turned"),
        ),
        zero=True,
    ),
    Panel(
        "Groups and samples without signal",
        "Shares. All-equal: every reward of the group the same, so its advantage is 0. Failed: reward not finite.",
        (Metric("advantage/equal_groups", "all-equal groups"), Metric("advantage/failed", "failed rewards")),
        zero=True,
    ),
    Panel("Size of the advantage", "Mean magnitude after fusion.", (Metric("advantage/mean_abs", "mean |A|"),), zero=True),
)
POLICY = (
    Panel(
        "Deviation of the ratio",
        "Largest |ratio − 1| before the first step. It should be rounding only.",
        (Metric("policy/ratio_deviation", "deviation"),),
        scale="log",
    ),
    Panel(
        "Clip share",
        "Share of samples whose gradient the clip takes away: the ratio has left its range in the direction of the advantage. "
        "High: above 1. Low: below.",
        (
            Metric("policy/clip_share", "clipped", title="Clip share"),
            Metric("policy/clip_share_high", "clipped high", note=None),
            Metric("policy/clip_share_low", "clipped low", note=None),
        ),
        zero=True,
    ),
    Panel(
        "KL divergence",
        "From the initial model, in mean space.",
        (Metric("policy/kl", "KL"),),
        scale="auto",
        zero=True,
        if_zero=_KL,
    ),
    Panel("Gradient norm", "Before clipping.", (Metric("policy/grad_norm", "norm"),), scale="auto", zero=True),
    Panel("Learning rate", "", (Metric("policy/lr", "lr", "plain"),), zero=True),
    Panel("Mean ratio", "1 while the policy has not moved.", (Metric("policy/ratio_mean", "ratio"),)),
    Panel("Loss", "A policy-gradient loss; its level means little.", (Metric("policy/loss", "loss"),)),
)
TIME = (
    Panel("Time per iteration", "All phases together.", (Metric("perf/seconds", "iteration"),), zero=True, unit=" s"),
    Panel(
        "Waiting for other ranks",
        "In an iteration. Ranks of equal speed wait equally long.",
        tuple(Metric(f"ranks/waited_seconds_{which}", which) for which in ("max", "median", "min")),
        zero=True,
        unit=" s",
    ),
    Panel(
        "Slowest rank", "The rank that waited least for the others.", (Metric("ranks/slowest", "rank", "points"),), zero=True
    ),
)
MEMORY = (
    Panel("Memory", "Peak on the device.", (Metric("mem/peak_bytes", "peak", "plain", factor=_GIB),), zero=True, unit=" GiB"),
)


class Charts:
    """Draws panels for the given runs, with identifiers unique in the page."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs, self.several, self.count = runs, len(runs) > 1, 0

    def draw(self, chart: Chart) -> str:
        """One figure, or '' without data."""
        self.count += 1
        return figure(chart, f"p{self.count}")

    def panels(self, panels: Sequence[Panel]) -> str:
        """Figures of the panels that have data, then one sentence on those that never change."""
        drawn, constant = [], []
        for panel in panels:
            groups = [panel.metrics] if not self.several else [(metric,) for metric in panel.metrics if metric.note is not None]
            for metrics in groups:
                lines = [line for metric in metrics for line in self.lines(metric)]
                if lines and _flat(lines):
                    constant.append(_constant(panel, metrics, lines[0].y[np.isfinite(lines[0].y)]))
                elif lines:
                    drawn.append(self.draw(self._chart(panel, metrics, lines)))
        said = f'<p class="constant">Constant throughout: {"; ".join(constant)}.</p>' if constant else ""
        return f'<div class="charts">{"".join(drawn)}</div>{said}' if drawn else said

    def other_rewards(self) -> str:
        """Held-out curves of the rewards after the first, ``reward/held_out_<name>``."""
        prefix = "reward/held_out_"
        keys = {key for run in self.runs for key in run.columns if key.startswith(prefix) and key != f"{prefix}std"}
        names = [key.removeprefix(prefix) for key in sorted(keys)]
        note = "Another reward of the recipe, on the held-out prompts."
        panels = [Panel(f"Held-out: {name}", note, (Metric(prefix + name, name, "points"),)) for name in names]
        return self.panels(panels)

    def held_out_categories(self) -> str:
        """Held-out curves of the categories of prompts, ``held_out/categories/<name>``."""
        prefix, title = "held_out/categories/", "Held-out reward by category"
        keys = sorted({key for run in self.runs for key in run.columns if key.startswith(prefix)})
        names = [key.removeprefix(prefix) for key in keys]
        metrics = [Metric(prefix + name, name, "points", title=f"{title}: {name}") for name in names]
        note = "Mean of the first reward over a category's held-out prompts."
        return self.panels([Panel(title, note, tuple(metrics))]) if metrics else ""

    def each_reward(self) -> list[Panel]:
        """What each reward took, and the share of images that it could not score: ``perf/reward/<name>/seconds`` and
        ``reward/<name>/failed``, with its reasons where it tells them."""
        failed = "Images without a finite score, probes and groups."
        found = [
            self._by_reward("Seconds by reward", "Of a reward on the host: in its threads.", "perf/reward/", "/seconds", " s"),
            self._by_reward("Failed by reward", f"Shares. {failed}", "reward/", "/failed", ""),
        ]
        reasons = sorted({key for run in self.runs for key in run.columns if key.startswith("reward/") and "/failed_" in key})
        metrics = tuple(Metric(key, key.removeprefix("reward/").replace("/failed_", ": "), "points") for key in reasons)
        found.append(Panel("Reasons of failures", f"Images. {failed}", metrics, zero=True))
        return [panel for panel in found if panel.metrics]

    def _by_reward(self, title: str, note: str, before: str, behind: str, unit: str) -> Panel:
        keys = {key for run in self.runs for key in run.columns if key.startswith(before) and key.endswith(behind)}
        names = sorted(key.removeprefix(before).removesuffix(behind) for key in keys)
        metrics = tuple(Metric(f"{before}{name}{behind}", name, title=f"{title}: {name}", note=note) for name in names)
        return Panel(title, note, metrics, zero=True, unit=unit)

    def lines(self, metric: Metric) -> list[Line]:
        """The metric's curve in each run that knows it."""
        found = []
        for index, run in enumerate(self.runs):
            y = run.column(metric.key) * metric.factor
            known = np.isfinite(y)
            if not known.any():
                continue
            spread = _half_width(run, metric)
            x = run.iteration
            if metric.kind == "points":
                x, y, spread = x[known], y[known], None if spread is None else spread[known]
            label = run.label if self.several else metric.label
            colour = index if self.several else -1
            faint = len(self.runs) < 4
            found.append(Line(label, x, y, metric.kind, spread, colour, metric.key, index, faint))
        return found

    def _chart(self, panel: Panel, metrics: Sequence[Metric], lines: Sequence[Line]) -> Chart:
        order = [metric.key for metric in panel.metrics]
        coloured = [line if line.colour >= 0 else dataclasses.replace(line, colour=order.index(line.key)) for line in lines]
        split = len(metrics) < len(panel.metrics)
        title = (metrics[0].title or f"{panel.title}: {metrics[0].label}") if split else panel.title
        note = (split and metrics[0].note) or panel.note
        marks = [] if self.several else _marks(self.runs[0])
        wide = panel.wide and not self.several
        return Chart(title, note, coloured, None, panel.scale, panel.zero, wide, marks, panel.unit)

    def categories(self) -> str:
        """Shares of the chosen prompts by category over time; one chart per run."""
        return "".join(self.draw(chart) for run in self.runs if (chart := self._categories(run)) is not None)

    def _categories(self, run: Run) -> Chart | None:
        keys = [key for key in run.columns if key.startswith(CATEGORIES)]
        if not keys:
            return None
        counts = np.stack([np.nan_to_num(run.columns[key]) for key in keys])
        largest = sorted(range(len(keys)), key=lambda i: -counts[i].sum())
        shown = sorted(largest if len(keys) <= COLOURS else largest[: COLOURS - 1])
        labels = [keys[i].removeprefix(CATEGORIES) for i in shown]
        layers = counts[shown]
        if len(shown) < len(keys):
            labels, layers = [*labels, "others"], np.vstack([layers, counts.sum(0) - layers.sum(0)])
        edges, binned = bins(run.iteration, layers, mean=False, limit=24)
        shares = binned / np.maximum(binned.sum(0), 1e-12)
        title = f"Chosen prompts by category{self._of(run)}"
        return Chart(
            title, "Share of each category among the prompts trained on.", (), Stack(labels, edges, shares, CATEGORIES)
        )

    def phases(self) -> str:
        """Seconds per phase over time; one chart per run."""
        return "".join(self.draw(chart) for run in self.runs if (chart := self._phases(run)) is not None)

    def _phases(self, run: Run) -> Chart | None:
        seconds = phase_seconds(run)
        total = sum(float(values.sum()) for values in seconds.values())
        if total == 0:
            return None
        large = [phase for phase, values in seconds.items() if values.sum() >= 0.01 * total and phase != "other"]
        rest = [phase for phase in seconds if phase not in large]
        named = [phase for phase in rest if phase != "other" and seconds[phase].any()]
        layers, labels = [seconds[phase] for phase in large], list(large)
        if any(seconds[phase].any() for phase in rest):
            layers.append(np.sum([seconds[phase] for phase in rest], 0))
            labels.append("other" + (f" ({', '.join(named)})" if named else ""))
        edges, binned = bins(run.iteration, np.stack(layers), mean=True)
        return Chart(
            f"Seconds per phase{self._of(run)}", "Mean over neighbouring iterations.", (), Stack(labels, edges, binned, "perf")
        )

    def _of(self, run: Run) -> str:
        return f": {run.label}" if self.several else ""


def _constant(panel: Panel, metrics: Sequence[Metric], y: np.ndarray) -> str:
    """A metric and its one value in words."""
    title = panel.title if len(panel.metrics) == 1 else ", ".join(metric.label for metric in metrics)
    title = title if title[:2].isupper() else title[:1].lower() + title[1:]
    note = f" ({panel.if_zero})" if panel.if_zero and not y.any() else ""
    return f"{escape(title)} {number(float(y[-1]))}{panel.unit}{note}"


def _flat(lines: Sequence[Line]) -> bool:
    """Whether all curves are one and the same value, to a thousandth; a curve of one point does not count as flat."""
    y = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
    return y.size > len(lines) and float(np.ptp(y)) <= 1e-3 * float(abs(y).max())


def phase_seconds(run: Run) -> dict[str, np.ndarray]:
    """Seconds [N] of each phase the run knows, in the order of an iteration; 0 where a value is missing."""
    keys = [key for key in run.columns if key.startswith("perf/") and key.endswith("_seconds")]
    found = {key.removeprefix("perf/").removesuffix("_seconds") for key in keys}
    order = [phase for phase in PHASES[:-1] if phase in found] + sorted(found - set(PHASES)) + ["other"] * ("other" in found)
    return {phase: np.nan_to_num(run.column(f"perf/{phase}_seconds")) for phase in order}


def _half_width(run: Run, metric: Metric) -> np.ndarray | None:
    """Half width of the band; the spread over held-out prompts becomes the standard error of their mean."""
    if metric.spread not in run.columns:
        return None
    spread = run.columns[metric.spread] * metric.factor
    if metric.spread == "reward/held_out_std":
        spread = spread / math.sqrt(held_out_prompts(run) or 1)
    return spread


def held_out_prompts(run: Run) -> int | None:
    """Prompts of the held-out evaluation, from the recipe."""
    prompts = run.setting("evaluation", "prompts")
    return prompts if isinstance(prompts, int) and prompts > 0 else None


def _marks(run: Run) -> list[tuple[float, str, str]]:
    kinds = ("warning", "stop", "rollback", "memory", "resume", "signal", "failure")
    return [(e.iteration, e.kind, f"{e.kind} at iteration {e.iteration}: {e.message}") for e in run.events if e.kind in kinds]
