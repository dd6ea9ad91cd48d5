"""What rewards in bf16 say beside themselves in fp32, of the same images: ``adagrpo fidelity`` of a recipe with such rewards.

Advantages are made of differences inside groups, which are far smaller than those between prompts: rounding that leaves the
order over all images alone may still turn it inside a group. A reward passes when both rank correlations are at least 0.98 and
no image loses its score.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..algorithm.sde import Stream
from ..assembly import build_executor, build_sampler, place_rewards
from ..engine.plans import probe_plan
from ..engine.ranks import Ranks
from ..engine.scoring import Scorer, labels
from ..models.base import FlowModel
from ..prompts.stream import PromptStream
from ..recipe.derived import Derived
from ..recipe.keys import Config
from ..rewards import PromptRows, Reward
from .fidelity import SPEARMAN, spearman
from .held_out import decode


@dataclasses.dataclass(frozen=True)
class RewardFidelity:
    """A reward in bf16 against itself in fp32.

    Attributes:
        reward: its name.
        images, groups: how many were scored.
        spread: mean standard deviation of the fp32 scores inside a group.
        difference, worst_difference: of the scores of an image, median and largest; NaN without any score.
        spearman: rank correlation over all images.
        group_spearman: mean of the rank correlations inside groups; NaN where all scores of each group are equal.
        lost: images with a score in fp32 only.
    """

    reward: str
    images: int
    groups: int
    spread: float
    difference: float
    worst_difference: float
    spearman: float
    group_spearman: float
    lost: int

    @property
    def passed(self) -> bool:
        """Both correlations are at least 0.98, and nothing is lost."""
        inside = math.isnan(self.group_spearman) or self.group_spearman >= SPEARMAN
        return self.spearman >= SPEARMAN and inside and not self.lost

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"passed": self.passed}

    def __str__(self) -> str:
        inside = "all equal" if math.isnan(self.group_spearman) else f"Spearman {self.group_spearman:.4f} (at least {SPEARMAN})"
        rows = [
            ("reward in bf16", f"{self.reward}, against fp32: {self.images} images of {self.groups} groups"),
            ("scores", f"differ by {self.difference:.3g} (median), {self.worst_difference:.3g} (worst); {self.lost} lost"),
            ("inside groups", f"standard deviation {self.spread:.3g}; {inside}"),
            ("reward ranks", f"Spearman {self.spearman:.4f} (at least {SPEARMAN})"),
            ("verdict", "passed" if self.passed else "NOT passed"),
        ]
        return "\n".join(f"{name:16} {value}" for name, value in rows)


def rounded_rewards(config: Config) -> list[int]:
    """Numbers of the recipe's rewards in bf16."""
    return [i for i, reward in enumerate(config.rewards) if reward.kwargs.get("dtype", reward.dtype) == "bf16"]


def compare_rewards(
    config: Config,
    model: FlowModel,
    pairs: Sequence[tuple[Reward, Reward]],
    prompts: Sequence[str],
    slots: int,
    progress: Callable[[int], object] = lambda slot: None,
) -> list[RewardFidelity]:
    """Score the groups of ``slots`` prompts, drawn by the recipe's own plan.

    Args:
        pairs: of each of ``rounded_rewards`` itself in fp32 and in bf16.
    """
    numbers = rounded_rewards(config)
    entries = tuple(config.rewards[i] for i in numbers)
    train = dataclasses.replace(config.train, slots=1, accumulation=1, steps_per_iteration=1)
    config = dataclasses.replace(config, train=train, rewards=(*entries, *entries))
    executor = build_executor(config, model)
    scorer = Scorer(executor, place_rewards(config, [*(wide for wide, _ in pairs), *(narrow for _, narrow in pairs)]))
    sampler, forks, stream = build_sampler(config, Ranks()), Derived(config).forks, PromptStream(prompts, config.train.seed)
    first = torch.zeros(1, dtype=torch.int64, device=model.device)
    scores: list[Tensor] = []
    for slot in range(slots):
        texts = stream.take(1)
        conditioning, anchors = model.encode(texts), None
        if forks:
            x = executor.initial_noise(first, slot, Stream.PROBE_INIT)
            plan = probe_plan(range(1), config.rollout.steps, keep=forks)
            anchors = executor.run(plan, x, conditioning, slot, "probe")
        samples = sampler(executor, anchors, first, conditioning, 0, slot)
        rows = sampler.shape.group_index(samples.final.shape[0], model.device)
        asked = PromptRows(texts, torch.zeros_like(rows), rows)
        scores.append(scorer.score_images(decode(executor, samples.final), asked).cpu())
        progress(slot + 1)
    found, size = torch.cat(scores, 1), config.rollout.group_size
    names = labels([entry.name for entry in entries])
    return [of_scores(name, found[m], found[m + len(names)], size) for m, name in enumerate(names)]


def of_scores(name: str, wide: Tensor, narrow: Tensor, group_size: int) -> RewardFidelity:
    """From scores [N] of the same images in fp32 and in bf16; those of a group follow each other."""
    both = wide.isfinite() & narrow.isfinite()
    distance = (wide - narrow)[both].abs()
    groups = list(zip(wide.split(group_size), narrow.split(group_size), strict=True))
    inside = [rho for a, b in groups if not math.isnan(rho := spearman(a, b))]
    spreads = [float(a[a.isfinite()].std()) for a, _ in groups if a.isfinite().sum() > 1]
    return RewardFidelity(
        reward=name,
        images=wide.numel(),
        groups=len(groups),
        spread=sum(spreads) / len(spreads) if spreads else math.nan,
        difference=float(distance.median()) if distance.numel() else math.nan,
        worst_difference=float(distance.max()) if distance.numel() else math.nan,
        spearman=spearman(wide, narrow),
        group_spearman=sum(inside) / len(inside) if inside else math.nan,
        lost=int((wide.isfinite() & ~narrow.isfinite()).sum()),
    )
