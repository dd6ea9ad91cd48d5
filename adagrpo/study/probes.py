"""``adagrpo bench probes``: how well each probe picks with the policy held still, against the paper's rule and the truth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from ..algorithm.sde import Stream
from ..bench.measure import Iteration, bench_trainer, measure
from ..bench.options import Options
from ..bench.records import new_record
from ..bench.statistics import Series
from ..curriculum.base import Choice, Knowledge
from ..engine.groups import Groups
from ..engine.share import Share
from ..errors import InputError
from ..evaluate.held_out import evaluate
from ..forecast import planned_calls
from ..models.base import FlowModel
from ..prompts.digest import prompts_digest
from ..recipe.keys import RIVALS, Config
from ..train import Trainer
from .hosts import with_probe, without_adagrpo


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One draw of a probe.

    Attributes:
        numbers: int64 [P, B], the candidates' prompts.
        picks: int64 [P], rows among them.
        scores: [P, B], what they were judged by; None where nothing judged them.
        mean, std: of the capability EMA.
    """

    numbers: Tensor
    picks: Tensor
    scores: Tensor | None
    mean: float
    std: float


@dataclasses.dataclass(frozen=True)
class Truth:
    """Mean reward of every training prompt [N], and the level and spread of single images that an EMA of them converges to."""

    means: Tensor
    level: float
    std: float

    @classmethod
    def of(cls, scores: Tensor) -> Truth:
        """From scores [N, noises]."""
        return cls(scores.mean(1), float(scores.mean()), float(scores.std(correction=0)))

    def distance(self, numbers: Tensor) -> Tensor:
        """How far the prompts' mean rewards are from the level, in the spread."""
        return (self.means[numbers] - self.level).abs() / self.std


def probes_command(config: Config, names: Sequence[str], draws: int, noises: int, options: Options) -> int:
    """Measure every probe, print, record.

    Raises:
        InputError: an unknown probe, ``dapo``, or a recipe with several rewards, whose picks have no single truth.
    """
    if "dapo" in names:
        raise InputError("--probes: dapo judges groups after they were paid for, not candidates: bench seeds trains it")
    if len(config.rewards) > 1:
        raise InputError("bench probes: the truth of a prompt is its mean reward: name a recipe with one reward")
    recipes = {name: with_probe(config, name) for name in dict.fromkeys(["full", *names])}
    plain = bench_trainer(without_adagrpo(config))
    model = plain.model
    measure(plain)
    base = [measure(plain) for _ in range(options.rounds)]
    whole = bench_trainer(config, model)
    scores = evaluate(whole.executor, whole.score, whole.stream.prompts, noises, Stream.FINAL_EVALUATION)[0].cpu()
    truth, warm = Truth.of(scores), draws // 3
    print(f"truth of {len(scores)} prompts over {noises} noises: level {truth.level:.3f}, spread {truth.std:.3f}", flush=True)
    paper: list[Drawn] = []
    rows: list[dict[str, Any]] = []
    for name, recipe in recipes.items():
        found = drawn(recipe, model, draws)[warm:]
        paper = paper or found
        rows.append({"probe": name, **cost(recipe, base), **quality(found, paper, truth)})
        print(f"  {probe_line(rows[-1])}", flush=True)
    facts = {
        "prompts_sha256": prompts_digest(whole.stream.prompts),
        "draws": draws,
        "left_out": warm,
        "noises": noises,
        "level": truth.level,
        "spread": truth.std,
        "standard_error_of_a_true_mean": float(scores.std(1).mean()) / math.sqrt(noises),
        "rows": rows,
    }
    series = {f"{row['probe']}/true_regret": Series("std", tuple(row.pop("true_regrets"))) for row in rows}
    record = new_record(f"probes-{config.name}", model.device, options.argv, series, facts, config, options.note)
    print(f"record: {record.write(options.out)}")
    return 0


def drawn(config: Config, model: FlowModel, draws: int) -> list[Drawn]:
    """What a probe picks in ``draws`` draws while the policy stays as it is."""
    one, found = bench_trainer(config, model), []
    share = one.course.share
    for _ in range(draws):
        numbers = one.stream.take_numbers(share.total * one.course.candidates)
        for attempt in one.attempts():
            with attempt:
                picked, knowledge = _picked(one, numbers, share, groups=config.selection.judge in ("memory", *RIVALS))
        one.knowledge = knowledge
        one.draws += 1
        judged = None if picked.scores is None else picked.scores[0].cpu()
        level = one.capability
        found.append(
            Drawn(
                torch.tensor(numbers).reshape(share.total, -1),
                picked.picks.cpu(),
                judged,
                float(level.mean[..., 0].mean()),
                float(level.std[..., 0].mean()),
            )
        )
        one.phase.read()
    return found


def _picked(one: Trainer, numbers: Sequence[int], share: Share, groups: bool) -> tuple[Groups | Choice, Knowledge]:
    """Picks of the prompts ``numbers``, and what is known then; with ``groups`` after these, which memory and rivals read."""
    if groups:
        return one.groups_of(numbers, share)
    choice = one.probe_and_select(one.candidates(numbers, share))
    return choice, choice.knowledge


def cost(config: Config, plain: Sequence[Iteration]) -> dict[str, float]:
    """What a probe adds to its recipe without selection and fusion: evaluations, images decoded and scored, and both at the
    cost per piece that ``plain``, measured iterations without them, had."""
    (evaluations, images), (before, images_before) = planned_work(config), planned_work(without_adagrpo(config))
    median = lambda values: Series("s", tuple(values)).median  # noqa: E731
    sampled = ("probe", "prefix", "rollout")
    forward = median(sum(i.seconds[p] for p in sampled) / sum(i.evaluations.get(p, 0) for p in sampled) for i in plain)
    image = median((i.seconds["decode"] + i.seconds["reward"]) / i.images for i in plain)
    seconds = (evaluations - before) * forward + (images - images_before) * image
    return {
        "evaluations": evaluations,
        "images": images,
        "overhead_evaluations": (evaluations - before) / before,
        "overhead_cost": seconds / median(i.total for i in plain),
    }


def planned_work(config: Config) -> tuple[int, int]:
    """Evaluations and decoded images of an iteration."""
    calls = planned_calls(config)
    return sum(sum(rows) for phase, rows in calls.items() if phase != "decode"), sum(calls["decode"])


def quality(found: Sequence[Drawn], paper: Sequence[Drawn], truth: Truth) -> dict[str, Any]:
    """How good the picks are.

    Returns:
        ``true_regret``, distance of the picked prompts' mean rewards from the level, its standard error over draws and its
        values draw by draw; its ``difference`` to the paper's, paired by draw, with ``difference_error``; ``above_best``, how
        much it exceeds that of the best of the paper's candidates of each slot; ``paper_regret``, how much farther from the
        paper's EMA the picks' full-length scores are than those of its own picks, in its std; ``same_pick``, the share of the
        paper's picks that are picked here too; ``spearman`` of the judging scores with the full-length ones.
    None where the candidates are not the paper's.
    """
    pairs = list(zip(found, paper, strict=True))
    distances, reference = (torch.stack([_true_regret(d, truth) for d in each]) for each in (found, paper))
    best = torch.stack([truth.distance(p.numbers).amin(1).mean() for p in paper])
    error = lambda values: float(values.std() / len(values) ** 0.5) if len(values) > 1 else None  # noqa: E731
    own = all(d.numbers.shape == p.numbers.shape for d, p in pairs)
    result = {
        "true_regret": float(distances.mean()),
        "standard_error": error(distances),
        "difference": float((distances - reference).mean()),
        "difference_error": error(distances - reference),
        "above_best": float((distances - best).mean()),
        "paper_regret": sum(_away(d, p, own) - _away(p, p, True) for d, p in pairs) / len(pairs),
        "same_pick": None,
        "spearman": None,
        "true_regrets": distances.tolist(),
    }
    if own:
        result["same_pick"] = sum(float(torch.isin(p.picks, d.picks).double().mean()) for d, p in pairs) / len(pairs)
        judged = [(d.scores, p.scores) for d, p in pairs if d.scores is not None and p.scores is not None]
        if judged:
            result["spearman"] = sum(_spearman(a, b) for a, b in judged) / len(judged)
    return result


def _true_regret(draw: Drawn, truth: Truth) -> Tensor:
    """Mean over the slots that have a pick."""
    return truth.distance(draw.numbers.flatten()[draw.picks[draw.picks >= 0]]).mean()


def _away(draw: Drawn, paper: Drawn, own: bool) -> float:
    """Mean distance of the picks' full-length scores from the paper's EMA; ``own``: its probe had the same candidates."""
    scores = paper.scores if own else draw.scores
    assert scores is not None
    picks = draw.picks[draw.picks >= 0]
    return float((scores.flatten()[picks] - paper.mean).abs().nanmean()) / paper.std


def _spearman(judged: Tensor, full: Tensor) -> float:
    if any(bool((scores == scores[0, 0]).all()) for scores in (judged, full)):  # as a memory without evidence: no ranks
        return 0.0
    return float(spearmanr(judged.flatten().numpy(), full.flatten().numpy(), nan_policy="omit").statistic)


def probe_line(row: Mapping[str, Any]) -> str:
    """One probe to read."""
    shown = lambda key, form: "–" if row[key] is None else format(row[key], form)  # noqa: E731
    return (
        f"{row['probe']:12} evaluations {row['overhead_evaluations']:+.1%}, cost {row['overhead_cost']:+.1%}, true regret "
        f"{row['true_regret']:.3f} ± {shown('standard_error', '.3f')}, above the best {row['above_best']:.3f}, to the paper "
        f"{row['paper_regret']:+.3f}, same pick {shown('same_pick', '.0%')}, Spearman {shown('spearman', '.2f')}"
    )
