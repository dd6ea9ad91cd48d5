"""The algorithm: filter, advantages, objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .kwargs import KwargValue

Probe = Literal[
    "full", "short", "racing", "pool", "memory", "short+pool", "racing+pool", "memory+pool", "bots", "greso", "procurl", "dps"
]
RIVALS = {"bots": "rivals:Bots", "greso": "rivals:Greso", "procurl": "rivals:Procurl", "dps": "rivals:Dps"}
"""Judges that were published by others: by how earlier groups of a prompt succeeded."""
JUDGES = {"full": "full:Full", "short": "short:Short", "racing": "racing:Racing", "memory": "memory:Memory"} | RIVALS
"""Class of each judge, in ``curriculum/``."""
POOLED = {"pool": "full"} | {f"{judge}+pool": judge for judge in ("short", "racing", "memory")}
"""Probes whose candidates compete over all slots, and how these are judged."""


@dataclass(frozen=True)
class SelectionConfig:
    """The online curriculum filter."""

    candidates: int = 10
    """Candidate prompts B per slot; 1 turns the filter off."""
    strategy: str = "closest"
    """closest, random, easiest, hardest, medium, or package.module:attribute of a callable
    (scores [M, P, B], capability, **kwargs) -> index [P]."""
    kwargs: dict[str, KwargValue] = field(default_factory=dict)
    """Arguments of a strategy named by import path."""
    alpha: float = 0.8
    """Memory of the capability EMA."""
    capability: Literal["shared", "per_slot"] = "shared"
    """Whose EMA: one for all slots, or each slot its own, over the scores of its own candidates, which its picks and advantages
    go by (the released code: one process per slot, each with its own EMA; probe full)."""
    probe: Probe = "full"
    """How candidates are judged. full: each is sampled to the end and scored (the paper). short: each by an ODE of
    `probe_steps`, against an EMA of such scores. racing: previews of the image at `race_steps` halve the field, and who is left
    goes on. memory: by a posterior of what earlier rewards said of each prompt, without sampling. pool, and +pool behind
    another: candidates of all slots compete for all slots (full: needs fewer candidates). bots, greso, procurl, dps: without
    sampling, by how earlier groups of each prompt succeeded (rivals: docs/probes.md). With all but full the pick and one
    uniformly drawn candidate are finished; the latter, in full length, feeds the capability EMA that advantages are measured
    against. Of a rival the pick is sampled only to fork from, and the other only where that EMA is read."""
    probe_steps: int = 4
    """Steps of a short probe."""
    race_steps: tuple[int, ...] = (10, 12, 14)
    """Steps sampled before each preview of a race, of `rollout.steps`; each preview halves the field, the last leaves one."""
    finalists: int = 1
    """Candidates per slot that memory samples to the end; more than one are scored, and the posterior decides anew (memory)."""
    allow_unseen: bool = False
    """Pick blindly among prompts of which nothing is known, at the beginning and in runs that hardly repeat any, instead of a
    look at every candidate until each prompt was one (memory)."""
    half_life: float = 100.0
    """Draws after which evidence on a prompt counts half (memory, bots, procurl, dps). BOTS was published with 6.58 (a tenth is
    lost each), DPS with 1 or 1.94."""
    noise_share: float = 0.56
    """Share of an image's reward variance that is the noise draw, not the prompt (memory)."""
    group_evidence: float = 2.0
    """How many independent images a slot's groups are worth as evidence; they share an anchor (memory)."""
    success_range: tuple[float, float] = (0.0, 1.0)
    """First reward, scaled and shifted, of an image that failed and of one that succeeded; success is linear between them.
    Twice the same number: whoever reaches it succeeded, all others failed (bots, greso, procurl, dps)."""
    target_success: float = 0.5
    """Success that prompts should have (bots)."""
    sharpness: float = 20.0
    """How much middling success p is preferred: a prompt's chance is in proportion to exp(sharpness*p*(1 - p)) (procurl)."""

    @property
    def judge(self) -> str:
        """How candidates are judged, a key of ``JUDGES``."""
        return POOLED.get(self.probe, self.probe)

    @property
    def pooled(self) -> bool:
        """Whether candidates of all slots compete for all slots."""
        return self.probe in POOLED


@dataclass(frozen=True)
class AdvantageConfig:
    """Cross-level advantage fusion."""

    function: str = "fused"
    """fused, or package.module:attribute of a callable (rewards [M, groups, G], capability, reward weights [M], **kwargs)
    -> advantages [groups, G]."""
    kwargs: dict[str, KwargValue] = field(default_factory=dict)
    """Arguments of a function named by import path."""
    weight: float = 1.0
    """Weight of the advantage against the capability EMA; 0 leaves plain group-relative advantages."""
    calibration: Literal["mass", "zscore", "zscore_centred", "none"] = "mass"
    clip: float = 5.0
    clip_of: Literal["parts", "sum"] = "parts"
    """What is clamped to ±clip. parts: the local and the global advantage under each reward. sum: their weighted sum over the
    rewards (DanceGRPO, MixGRPO, G2RPO)."""
    groups: Literal["seed", "prompt"] = "seed"
    """What is a group where `rollout.seeds` is above 1: the samples of one anchor at a step, or those of all anchors of the
    prompt at it (TempFlow-GRPO)."""
    std: Literal["group", "global", "floored", "none"] = "group"
    """What the distance from the group's mean is divided by. group: the group's standard deviation. global: that of all rewards
    of the iteration (Flow-GRPO). floored: the group's plus `std_floor` times that of the capability EMA, so that groups that
    differ by next to nothing do not count in full; it needs the probe's scores, without a filter too. none: nothing."""
    ddof: int = 1
    """Of those standard deviations: 1 (AdaGRPO, DanceGRPO, MixGRPO, G2RPO) or 0 (Flow-GRPO)."""
    eps: float = 1e-8
    """What is added to them: Flow-GRPO 1e-4."""
    std_floor: float = 0.5
    """See std = floored."""
    equal_groups: Literal["keep", "skip", "refill"] = "keep"
    """Groups whose rewards are all equal carry no signal. keep: they count in the loss average; skip: they do not; refill:
    slots without any spread are drawn once more from new prompts."""


@dataclass(frozen=True)
class LossConfig:
    """The policy-gradient objective."""

    clip_range: float = 0.0
    """Half width of the ratio's trust region; 0 is no clipping (the released code)."""
    old_logp: Literal["rollout", "recompute", "detached"] = "rollout"
    """Where the ratio's denominator comes from: stored while sampling, recomputed before the first update in its own
    geometry, or the current value without gradient (the released code: the ratio is then 1 by construction)."""
    ratio: Literal["plain", "guard", "guard_batch"] = "plain"
    """guard: the log-ratio has the same spread at every step and no bias, and the loss of a step, the KL divergence apart, is
    divided by its length (GRPO-Guard); not for scheme cps, whose log-probability is no Gaussian's. guard_batch: the bias taken
    off is the mean over a micro-batch's samples at the same step, as in its released code, and depends on how large these
    are."""
    kl_weight: float = 0.0
    """Weight of the KL divergence."""
    kl_space: Literal["mean", "velocity", "logp"] = "mean"
    """Where it is measured. mean: between the steps' means of the policy and the initial model. velocity: between their
    velocities. logp: half the squared change of log-probability since the samples were drawn, without the initial model
    (MixGRPO)."""
    kl_variance: Literal["step", "diffusion", "none"] = "step"
    """Of means: step divides by 2w² (the Gaussian KL; TempFlow-GRPO), diffusion by 2g² (Flow-GRPO's code), none by nothing
    (Flow-CPS's code)."""
    step_weights: Literal["uniform", "equal_gradient", "noise"] = "uniform"
    """Of the trained steps, 1 on average. equal_gradient: every step pulls equally on the velocity (Flash-GRPO). noise: by the
    step's noise w, the KL divergence apart (TempFlow-GRPO)."""
    average: Literal["update", "iteration"] = "update"
    """What the loss of an optimizer step is the mean over: its own trained steps, or all of the iteration's, so that each of
    four steps has a quarter of the loss (the released code); the gradient clip and Adam's eps see the difference."""
