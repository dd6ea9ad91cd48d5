"""What follows from a recipe: every number that several parts need, worked out once.

Only what reads recipes asks this module; parts below ``build`` are handed plain numbers. Letters: P slots, B candidates per
slot, G group size, T steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..algorithm.advantages import Scale
from ..algorithm.sde import sigma_schedule
from ..algorithm.selection import STRATEGIES
from ..algorithm.tables import Granularity, RolloutTable, rollout_table
from ..models.registry import FAMILIES
from .keys import RIVALS, Config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
Levels = Callable[[int], Tensor]
"""Steps T to noise levels, float64 [T + 1], falling to 0."""
PRECISIONS: dict[str, torch.dtype | str | None] = {"auto": None, "bf16": torch.bfloat16, "fp8": "fp8"}


@dataclasses.dataclass(frozen=True)
class Derived:
    """The numbers behind ``config``, whose keys they follow from; nothing is checked here."""

    config: Config

    @property
    def slots(self) -> int:
        """P, prompts trained per iteration."""
        return self.config.train.slots * self.config.train.accumulation

    @property
    def candidates(self) -> int:
        """P*B, candidate prompts of an iteration."""
        return self.slots * self.config.selection.candidates

    @property
    def forks(self) -> tuple[int, ...]:
        """Steps that groups fork from; empty for plans without forks."""
        return self.config.rollout.sde_steps if self.config.rollout.plan == "fork" else ()

    @property
    def tails_after(self) -> tuple[int, ...]:
        """Stochastic steps that tails begin after: every fork, or the last of a trajectory, wherever its window lies."""
        r, (first, end) = self.config.rollout, self.window_range
        if r.plan == "window":
            return tuple(range(first + r.window_size - 1, end))
        return r.sde_steps if r.plan == "fork" else r.sde_steps[-1:]

    @property
    def stochastic_steps(self) -> int:
        """How many steps of an iteration are stochastic."""
        r = self.config.rollout
        return r.window_size if r.plan == "window" else len(r.sde_steps)

    @property
    def window_range(self) -> tuple[int, int]:
        """Steps that a window stays within: the first, and the one behind the last."""
        first, end = self.config.rollout.window_range or (0, self.config.rollout.steps - 1)
        return first, end

    @property
    def trained_steps(self) -> int:
        """How many of them are trained."""
        r = self.config.rollout
        return 1 if r.step_per_prompt else max(1, round(self.stochastic_steps * r.trained_share))

    @property
    def groups(self) -> int:
        """Reward groups of an iteration: one per slot, and with forks one per trained step."""
        return self.slots * (self.trained_steps * self.config.rollout.seeds if self.forks else 1)

    @property
    def samples_per_slot(self) -> int:
        """Samples that one slot needs where every stochastic step is trained."""
        r = self.config.rollout
        return r.group_size * (len(r.sde_steps) * r.seeds * self.tails_per_sample if r.plan == "fork" else 1)

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """Of the tails of every fork; empty where each has one tail, as ``tail_steps`` or ``tail_share`` says."""
        r = self.config.rollout
        if r.granularities == (1,):
            return ()
        return tuple(Granularity(step, r.granular_end == "released") for step in r.granularities)

    @property
    def tails_per_sample(self) -> int:
        """Images that each sample of a fork becomes."""
        return max(1, len(self.granularities))

    @property
    def transitions(self) -> int:
        """Stored transitions of an iteration: of a group that forks one, of a trajectory one per trained step."""
        return self.groups if self.forks else self.groups * self.config.rollout.group_size * self.trained_steps

    @property
    def scores_needed(self) -> bool:
        """Whether anything reads what candidates score."""
        s = self.config.selection
        return self.level_read or (s.candidates > 1 and s.strategy != "random" and s.judge not in RIVALS)

    @property
    def level_read(self) -> bool:
        """Whether advantages read the capability EMA."""
        return self.config.advantage.weight > 0 or self.config.advantage.std == "floored"

    @property
    def scale(self) -> Scale:
        """What the local advantage is divided by."""
        a = self.config.advantage
        return Scale(a.std, a.ddof, a.eps, a.std_floor, a.clip_of == "sum")

    @property
    def initial_model_read(self) -> bool:
        """Whether the update compares the policy with its initial weights."""
        return self.config.loss.kl_weight > 0 and self.config.loss.kl_space != "logp"

    @property
    def built_in_strategy(self) -> str:
        """By which scores are folded and picked; ``closest`` where picks are those of a strategy named by import path."""
        strategy = self.config.selection.strategy
        return strategy if strategy in STRATEGIES else "closest"

    @property
    def observed(self) -> int:
        """Rewards of single prompts that a run's probe is told of to remember; a rival only those of groups."""
        s = self.config.selection
        return self.config.train.iterations * self.slots * (1 if s.judge in RIVALS else s.finalists + 1)

    @property
    def looks_at_unseen(self) -> bool:
        """Whether candidates are judged otherwise while they are new (``selection.allow_unseen``)."""
        return self.config.selection.judge == "memory" and not self.config.selection.allow_unseen

    def unseen_iterations(self, prompts: int) -> int:
        """Iterations of the run in which a candidate is one of ``prompts`` prompts for the first time."""
        return min(self.config.train.iterations, -(-prompts // self.candidates))

    @property
    def rows_per_image(self) -> int:
        """Rows of the transformer that an image is in rollouts and updates; 1 where the model is of no built-in family."""
        family = FAMILIES.get(self.config.model.family)
        return family.rows_per_image(self.config.model.guidance) if family else 1

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.train.iterations * self.config.train.steps_per_iteration

    @property
    def checkpoints_kept(self) -> int:
        """Checkpoints that lie in the run folder at its end, at most; one more while one is being written."""
        o = self.config.output
        return o.keep_last + o.keep_best + (self.config.train.iterations // o.keep_every if o.keep_every else 0)

    @property
    def storage(self) -> torch.dtype:
        """Of stored latents."""
        return DTYPES[self.config.rollout.storage]

    @property
    def wide(self) -> torch.dtype:
        """Of the step table's coefficients, and of what is worked out from stored latents."""
        return torch.float64 if self.storage is torch.float64 else torch.float32

    @property
    def precision(self) -> torch.dtype | str | None:
        """Of the rollouts: a dtype, ``fp8``, or None for the model's own."""
        return PRECISIONS[self.config.engine.precision]

    @property
    def kernels(self) -> str | None:
        """``impl`` of the algorithm's operators; None leaves the choice to them."""
        return None if self.config.engine.kernels == "auto" else self.config.engine.kernels

    @property
    def table(self) -> RolloutTable:
        """``table_at`` the levels of ``rollout.shift``; where they are the model's own, a table of as many rows with other
        values: what a recipe costs does not depend on them."""
        shift = self.config.rollout.shift
        return self.table_at(lambda steps: sigma_schedule(steps, 1.0 if shift == "model" else shift))

    def table_at(self, levels: Levels) -> RolloutTable:
        """Every step that rollouts can take at these noise levels, float64 on the CPU; made anew each time."""
        s, r = self.config.selection, self.config.rollout
        short = levels(s.probe_steps) if s.judge == "short" else None
        tails = (self.tails_after, r.tail_steps, r.tail_solver)
        past = r.plan != "fork"
        return rollout_table(levels(r.steps), r.scheme, r.eta, *tails, short, past, self.granularities, r.tail_share)
