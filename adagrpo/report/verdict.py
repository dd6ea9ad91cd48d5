"""The verdict of a report: what a run gained, and whether it is healthy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from .charts import COLOURS, escape, number, smooth
from .data import Run
from .panels import held_out_prompts

RECENT = 20


@dataclasses.dataclass(frozen=True)
class Finding:
    """The answer of one rule: ``good`` or ``warn``, in a few words, and the sentence behind it."""

    level: Literal["good", "warn"]
    title: str
    text: str


def findings(run: Run) -> list[Finding]:
    """What the rules say of a run, warnings first; rules whose metric is missing say nothing."""
    rules: tuple[Callable[[Run], Finding | None], ...] = (_held_out, _ratio, _signal, _rewards, _finite, _events)
    found = [finding for rule in rules if (finding := rule(run)) is not None]
    found += [Finding("warn", "Unreadable file", note) for note in run.notes]
    return sorted(found, key=lambda finding: finding.level != "warn")


def _held_out(run: Run) -> Finding | None:
    """Reward hacking: the held-out reward has lost over half of its gain while the trained reward went on rising."""
    x, held = run.known("reward/held_out")
    if held.size < 3:
        return None
    train_x, train = run.known("reward/train")
    best = int(held.argmax())
    fallen, gained = float(held[best] - held[-1]), float(held[best] - held[0])
    spread, prompts = run.known("reward/held_out_std")[1], held_out_prompts(run)
    noise = float(spread[-1]) / math.sqrt(prompts) if spread.size and prompts else 0.01 * abs(float(held[best]))
    level = np.interp([x[best], x[-1]], train_x, smooth(train)) if train.size else np.zeros(2)
    rises = "It had risen" if gained > 0 else "It never rose"
    if fallen > max(gained / 2, noise) and level[1] > level[0]:
        text = (
            f"{rises} to {number(held[best])} at iteration {x[best]}; now {number(held[-1])}, while the trained reward rises."
        )
        return Finding("warn", "Held-out reward falls", f"{text} That is what reward hacking and overfitting look like.")
    return Finding(
        "good", "Held-out follows training", f"Best {number(held[best])} (iteration {x[best]}), last {number(held[-1])}."
    )


def ratio_limit(run: Run) -> float:
    """Largest sound |ratio − 1| on policy: a tenth of the clip range, not below 1e-6; 1e-5 without clipping."""
    clip = run.setting("loss", "clip_range")
    return max(1e-6, clip / 10) if isinstance(clip, int | float) and clip > 0 else 1e-5


def _ratio(run: Run) -> Finding | None:
    x, deviation = run.known("policy/ratio_deviation")
    if deviation.size == 0:
        return None
    limit, worst = ratio_limit(run), float(deviation.max())
    text = f"Largest |ratio − 1| before the first step: {number(worst, 2)}; limit {number(limit, 1)}."
    if worst <= limit:
        return Finding("good", "On-policy ratio is 1", text)
    first = int(x[deviation > limit][0])
    cause = "Rollout and update disagree about the log-probability."
    return Finding("warn", "On-policy ratio is off", f"{text} First above it at iteration {first}. {cause}")


def _signal(run: Run) -> Finding | None:
    share = run.recent("advantage/equal_groups", RECENT)
    if math.isnan(share):
        return None
    text = f"{number(100 * share, 2)} % of the groups of the last {RECENT} iterations have equal rewards throughout."
    if share > 0.5:
        return Finding(
            "warn", "Most groups teach nothing", f"{text} The limit is 50 %: prompts too easy or hard, or samples alike."
        )
    return Finding("good", "Groups carry signal", text)


def _rewards(run: Run) -> Finding | None:
    x, failed = run.known("advantage/failed")
    if failed.size == 0:
        return None
    if not failed.any():
        return Finding("good", "All rewards finite", "No sample failed to be scored.")
    text = f"{number(100 * float(failed.mean()), 2)} % of all samples have no finite reward; the first at iteration"
    return Finding("warn", "Failed rewards", f"{text} {x[failed != 0][0]}.")


def _finite(run: Run) -> Finding | None:
    """Metrics logged in every iteration that are null somewhere."""
    keys = [key for key in ("reward/train", "policy/loss", "policy/grad_norm") if key in run.columns]
    bad = {key: run.iteration[~np.isfinite(run.columns[key])] for key in keys}
    said = [f"{key} in {at.size} iterations, first {at[0]}" for key, at in bad.items() if at.size]
    if said:
        return Finding("warn", "Numbers that are not finite", "; ".join(said) + ".")
    return Finding("good", "Loss and gradient finite", "In every iteration.") if keys else None


def _events(run: Run) -> Finding | None:
    counts: dict[str, int] = {}
    for event in run.events:
        if event.kind in ("warning", "stop", "rollback", "memory", "failure"):
            counts[event.kind] = counts.get(event.kind, 0) + 1
    if not counts:
        return None
    said = ", ".join(f"{count} × {kind}" for kind, count in counts.items())
    last = next(e for e in reversed(run.events) if e.kind in counts)
    return Finding("warn", f"Events: {said}", f"Last at iteration {last.iteration}: {last.message}")


def headline(run: Run) -> tuple[str, float, float, str]:
    """What is compared, its first and last value, and a sentence: the final comparison, or what comes nearest to it so far."""
    if run.result:
        before, after = run.outcome("before"), run.outcome("after")
        return "Held-out reward, before and after", before, after, _gain_sentence(run)
    x, held = run.known("reward/held_out")
    if held.size == 1:
        text = f"One evaluation, at iteration {x[0]}. The paired comparison with an interval comes at the end."
        return "Held-out reward so far", math.nan, float(held[0]), text
    if held.size:
        text = f"Evaluations at iterations {x[0]} and {x[-1]}. The paired comparison with an interval comes at the end."
        return "Held-out reward so far", float(held[0]), float(held[-1]), text
    _, train = run.known("reward/train")
    if train.size:
        some = min(10, train.size)
        text = f"Means of the first and last {some} iterations on training prompts; no held-out evaluation yet."
        return "Training reward so far", float(train[:some].mean()), float(train[-some:].mean()), text
    return "Held-out reward", math.nan, math.nan, "No iteration is recorded yet."


def _gain_sentence(run: Run) -> str:
    gain, interval = gain_text(run)
    low, high = run.outcome("low"), run.outcome("high")
    prompts, noises = run.outcome("prompts"), run.outcome("noises")
    over = f", over {prompts:.0f} prompts" if math.isfinite(prompts) else ""
    over += f" × {noises:.0f} {'noise' if noises == 1 else 'noises'}" if math.isfinite(noises) else ""
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{gain}{over}; no interval."
    verdict = "a gain" if low > 0 else "a loss" if high < 0 else "not distinguishable from no change"
    return f"{gain} (95 % interval {interval}): {verdict}{over}."


def gain_text(run: Run) -> tuple[str, str]:
    """The gain and its interval with signs and equal numbers of decimals; dashes where unknown."""
    values = [run.outcome(key) for key in ("gain", "low", "high")]
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    decimals = min(9, max(0, 2 - math.floor(math.log10(largest)))) if largest else 2
    gain, low, high = (f"{v:+.{decimals}f}".replace("-", "−") if math.isfinite(v) else "–" for v in values)
    return gain, f"{low} … {high}" if low != "–" != high else "–"


def tone(run: Run) -> str:
    """up, down or flat: the sign of the gain where its interval excludes 0."""
    return "up" if run.outcome("low") > 0 else "down" if run.outcome("high") < 0 else "flat"


def progress(run: Run) -> str:
    """State and iterations in words."""
    of = f" of {run.total}" if run.total else ""
    return f"{run.state}, {run.done}{of} iterations"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 100:
        return f"{number(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def intervals(runs: Sequence[Run]) -> list[str]:
    """For each run a drawing of its gain and interval on one common scale with 0 marked; '' without an interval."""
    triples = [(run.outcome("low"), run.outcome("gain"), run.outcome("high")) for run in runs]
    known = [value for triple in triples for value in triple if all(map(math.isfinite, triple))]
    if not known:
        return ["" for _ in runs]
    low, high = min(0.0, *known), max(0.0, *known)
    pad = 0.06 * (high - low) or 1.0
    drawn = enumerate(zip(runs, triples, strict=True))
    return [_interval(run, t, i, low - pad, high + pad) if all(map(math.isfinite, t)) else "" for i, (run, t) in drawn]


def _interval(run: Run, triple: tuple[float, float, float], index: int, low: float, high: float) -> str:
    gain, interval = gain_text(run)
    zero, a, b, c = (f"{100 * (value - low) / (high - low):.2f}%" for value in (0.0, *triple))
    title = f"gain {gain}, 95 % interval {interval}"
    return (
        f'<svg class="interval c{index % COLOURS}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
        f'<line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="100%"/>'
        f'<line class="range" x1="{a}" x2="{c}" y1="50%" y2="50%"/><circle cx="{b}" cy="50%" r="4.5"/>'
        f'<text x="{zero}" y="100%" dy="14">0</text><text x="{b}" y="100%" dy="14">{gain}</text></svg>'
    )


def stats(run: Run) -> list[tuple[str, str]]:
    """A few more numbers of a run: name and value."""
    found = []
    train = run.known("reward/train")[1]
    if train.size:
        some = min(10, train.size)
        text = (
            f"{number(float(train[:some].mean()))} → {number(float(train[-some:].mean()))} (first and last {some} iterations)"
        )
        found.append(("Training reward", text))
    x, held = run.known("reward/held_out")
    if held.size:
        found.append(("Best held-out", f"{number(float(held.max()))} at iteration {x[held.argmax()]}"))
    seconds = run.known("perf/seconds")[1]
    if seconds.size:
        found.append(("Iteration", f"{duration(float(np.median(seconds)))} (median)"))
        left = (run.total or 0) - run.done
        if run.state == "unfinished" and left > 0:
            found.append(("Left", f"about {duration(left * float(np.median(seconds[-50:])))}"))
    peak = run.known("mem/peak_bytes")[1]
    return found + ([("Peak memory", f"{number(float(peak.max()) / 2**30)} GiB")] if peak.size else [])
