"""How faithful rollouts under a recipe's ``engine`` and tail keys are to the policy's own: ``adagrpo fidelity``.

Both sides start from the same weights, prompts, noise and capability EMA. A lever passes when its scores rank images as the
policy's do (Spearman at least 0.98) and the filter picks the same prompt (at least 95 %).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..algorithm.sde import Stream
from ..algorithm.selection import CapabilityState, capability_step
from ..assembly import build_executor, place_rewards
from ..engine.executor import RolloutExecutor
from ..engine.plans import probe_plan
from ..engine.rollout import Rollout
from ..engine.sampling import ForkSampler, GroupShape, StepSchedule
from ..engine.scoring import Scorer
from ..errors import InputError
from ..models.base import Conditioning, FlowModel
from ..prompts.stream import PromptStream
from ..recipe.derived import Derived
from ..recipe.keys import Config, EngineConfig, RolloutConfig
from ..rewards import PromptRows, Reward

LEVERS = {
    "engine": ("forward", "precision", "fp8_scaling", "attention"),
    "rollout": ("tail_steps", "tail_share", "tail_solver"),
}
SPEARMAN, SAME_PICK = 0.98, 0.95


@dataclasses.dataclass(frozen=True)
class Side:
    """What one side sampled for a slot: latents and images [n, ...], first reward's scores [n]."""

    latents: Tensor
    images: Tensor
    scores: Tensor


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Rollouts under a recipe's levers against the policy's own.

    Attributes:
        recipe, levers, device: what was compared, where.
        slots, images: how much of it.
        latent_distance: median over images of ``|x - x_policy| / |x_policy|``.
        image_distance, worst_image_distance: root mean square difference of pixels in [0, 1], median and largest.
        spearman: rank correlation of the scores over all images; of probes, or of forked samples where only those differ.
        same_pick: share of slots where the filter picks the same prompt; NaN where probes are the same by construction.
        group_spearman: mean rank correlation inside the forked groups; NaN without forks.
        passed: Spearman at least 0.98 and the same pick in at least 95 % of the slots.
    """

    recipe: str
    levers: dict[str, Any]
    device: str
    slots: int
    images: int
    latent_distance: float
    image_distance: float
    worst_image_distance: float
    spearman: float
    same_pick: float
    group_spearman: float

    @property
    def passed(self) -> bool:
        picks = math.isnan(self.same_pick) or self.same_pick >= SAME_PICK
        return self.spearman >= SPEARMAN and picks

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"passed": self.passed}

    def __str__(self) -> str:
        levers = ", ".join(f"{key} = {value}" for key, value in self.levers.items())
        group = "no forks" if math.isnan(self.group_spearman) else f"Spearman {self.group_spearman:.4f}"
        pick = "probes untouched" if math.isnan(self.same_pick) else f"{self.same_pick:.0%} (at least {SAME_PICK:.0%})"
        rows = [
            ("levers", levers),
            ("compared", f"{self.slots} slots, {self.images} images, recipe {self.recipe}, {self.device}"),
            ("latent distance", f"{self.latent_distance:.4f} (median, relative)"),
            ("image distance", f"{self.image_distance:.4f} median, {self.worst_image_distance:.4f} worst (rms, pixels in 0…1)"),
            ("reward ranks", f"Spearman {self.spearman:.4f} (at least {SPEARMAN})"),
            ("inside groups", group),
            ("same pick", pick),
            ("verdict", "passed" if self.passed else "NOT passed"),
        ]
        return "\n".join(f"{name:16} {value}" for name, value in rows)


def changed_levers(config: Config) -> dict[str, Any]:
    """Keys of the recipe that change what is compared, with their values: tails are those of forks."""
    default = {"engine": EngineConfig(), "rollout": RolloutConfig()}
    return {
        f"{section}.{key}": getattr(getattr(config, section), key)
        for section, keys in LEVERS.items()
        for key in keys
        if getattr(getattr(config, section), key) != getattr(default[section], key)
        and (section != "rollout" or config.rollout.plan == "fork")
    }


def compare(
    config: Config,
    model: FlowModel,
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    slots: int,
    progress: Callable[[int], object] = lambda slot: None,
) -> Fidelity:
    """Sample ``slots`` slots of the recipe by the policy and by what the recipe asks for.

    Raises:
        InputError: the recipe asks for nothing but the policy.
    """
    levers = changed_levers(config)
    if not levers:
        keys = [f"{section}.{key}" for section, names in LEVERS.items() for key in names]
        raise InputError(f"nothing to compare: set one of {', '.join(keys)}")
    e = dataclasses.replace(config.engine, forward="eager", precision="auto", attention="auto")
    plain = dataclasses.replace(config, engine=e, rollout=dataclasses.replace(config.rollout, tail_steps=0, tail_share=0.0))
    sides = [build_executor(c, model, rollouts=True) for c in (plain, config)]
    scorers = [Scorer(executor, place_rewards(config, rewards)) for executor in sides]
    stream, r, s = PromptStream(prompts, config.train.seed), config.rollout, config.selection
    capability = CapabilityState.for_rewards(len(rewards), model.device)
    plan = probe_plan(range(s.candidates), r.steps, keep=r.sde_steps)
    weights = torch.tensor([reward.weight for reward in config.rewards], device=model.device) if len(rewards) > 1 else None
    built_in = Derived(config).built_in_strategy
    strategy = "closest" if built_in == "random" else built_in  # a draw would be no judgement
    probes: list[tuple[Side, Side]] = []
    tails: list[tuple[Side, Side]] = []
    same = 0
    for slot in range(slots):
        texts = stream.take(s.candidates)
        everyone = PromptRows(texts, torch.arange(s.candidates, device=model.device))
        conditioning = model.encode(texts)
        x = sides[0].initial_noise(everyone.text_index, slot, Stream.PROBE_INIT)
        found: list[tuple[Side, Rollout, Tensor]] = []
        for executor, scorer in zip(sides, scorers, strict=True):
            rollout = executor.run(plan, x, conditioning, slot, "probe")
            images = model.decode(rollout.final)
            scores = scorer.score_images(images, everyone)
            found.append((Side(rollout.final, images, scores[0]), rollout, scores))
        steps = [capability_step(capability, scores.unsqueeze(1), s.alpha, strategy, weights) for _, _, scores in found]
        same += int(torch.equal(steps[0].picks, steps[1].picks))
        capability = steps[0].state
        probes.append((found[0][0], found[1][0]))
        if r.plan == "fork":
            picked = steps[0].picks.clamp_min(0)
            tails.append(_forks(config, sides, scorers, found[0][1], picked, conditioning.rows(picked), texts, slot))
        progress(slot + 1)
    probes_differ = any(not torch.equal(a.latents, b.latents) for a, b in probes)
    compared = probes if probes_differ else tails
    return _summary(config, levers, model, slots, compared, tails, same / slots if probes_differ else math.nan)


def _forks(
    config: Config,
    sides: Sequence[RolloutExecutor],
    scorers: Sequence[Scorer],
    anchors: Rollout,
    picked: Tensor,
    conditioning: Conditioning,
    texts: Sequence[str],
    slot: int,
) -> tuple[Side, Side]:
    """The groups of one slot, forked off the same anchor with the same noise, by both sides."""
    r, found = config.rollout, []
    schedule = StepSchedule(r.steps, r.sde_steps, None, len(r.sde_steps), config.train.seed)
    sampler = ForkSampler(schedule, GroupShape(r.group_size))
    for executor, scorer in zip(sides, scorers, strict=True):
        samples = sampler(executor, anchors, picked, conditioning, iteration=0, draw=slot)
        images = executor.model.decode(samples.final)
        rows = PromptRows(texts, picked.repeat_interleave(images.shape[0]))
        found.append(Side(samples.final, images, scorer.score_images(images, rows)[0]))
    return found[0], found[1]


def _summary(
    config: Config,
    levers: dict[str, Any],
    model: FlowModel,
    slots: int,
    compared: Sequence[tuple[Side, Side]],
    tails: Sequence[tuple[Side, Side]],
    same_pick: float,
) -> Fidelity:
    latents = torch.cat([_distance(b.latents, a.latents) for a, b in compared])
    pixels = torch.cat([(b.images - a.images).double().square().flatten(1).mean(1).sqrt() for a, b in compared]).cpu()
    scores = [torch.cat([pair[i].scores for pair in compared]) for i in range(2)]
    groups = [
        spearman(one, other)
        for a, b in tails
        for one, other in zip(a.scores.split(config.rollout.group_size), b.scores.split(config.rollout.group_size), strict=True)
    ]
    groups = [rho for rho in groups if not math.isnan(rho)]
    return Fidelity(
        recipe=config.name,
        levers=levers,
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        slots=slots,
        images=scores[0].numel(),
        latent_distance=float(latents.median()),
        image_distance=float(pixels.median()),
        worst_image_distance=float(pixels.max()),
        spearman=spearman(*scores),
        same_pick=same_pick,
        group_spearman=sum(groups) / len(groups) if groups else math.nan,
    )


def _distance(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.double().flatten(1), y.double().flatten(1)
    return ((x - y).norm(dim=1) / y.norm(dim=1)).cpu()


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two score vectors; pairs that are not finite are left out, constant vectors give NaN."""
    from scipy.stats import spearmanr

    sound = a.isfinite() & b.isfinite()
    a, b = a[sound].cpu(), b[sound].cpu()
    if a.numel() < 2 or a.min() == a.max() or b.min() == b.max():
        return math.nan
    return float(spearmanr(a.numpy(), b.numpy()).statistic)
