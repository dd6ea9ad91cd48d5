"""The training loop: probe → select → rollout → reward → advantage → update.

``Trainer.iteration`` is one iteration of AdaGRPO (section 3) over all prompt slots. Every other algorithm this trainer
speaks is the same iteration of other parts, which ``build`` makes from a recipe. Shape letters: P slots, B candidates per slot,
M rewards, G group size, R rollout rows; one latent is [L, C].
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .algorithm.host_choices import host_generator
from .algorithm.selection import CapabilityState
from .curriculum.base import Candidates, Choice, Knowledge, selection_metrics
from .curriculum.judge import Curriculum
from .engine.course import Course
from .engine.executor import RolloutExecutor
from .engine.fusion import Fusion
from .engine.groups import Groups
from .engine.notices import Notices
from .engine.optimizer import PolicyOptimizer
from .engine.overlap import Overlap
from .engine.plans import host_integers
from .engine.retry import Attempt, attempts, named_memory
from .engine.sampling import Sampler, Samples
from .engine.scoring import Scorer
from .engine.share import Share
from .engine.update import Objective, update_policy
from .models.base import Conditioning
from .prompts.stream import PromptStream
from .rewards import PromptRows


@dataclasses.dataclass(frozen=True)
class _Begun:
    """All of a trainer's state that an iteration moves before its update, as it was when the iteration began."""

    draws: int
    position: int
    knowledge: Knowledge
    batch_limit: tuple[int, bool]
    updating: bool = False


class Trainer:
    """All state of a run, one method per phase, and ``iteration``, which reads like the paper.

    Args:
        course: numbers.
        executor: samples by the policy, its ``model``.
        score: the rewards.
        curriculum: probes and selects.
        sampler: draws groups.
        fusion: rewards to advantages.
        objective, optimizer: of the update.
        stream: of training prompts.
        notices: what there is to tell the user.

    Attributes:
        knowledge: the capability EMA, and what the curriculum remembers beside it.
        iterations_done, draws: finished iterations, and draws of groups made so far.
    """

    def __init__(
        self,
        course: Course,
        executor: RolloutExecutor,
        score: Scorer,
        curriculum: Curriculum,
        sampler: Sampler,
        fusion: Fusion,
        objective: Objective,
        optimizer: PolicyOptimizer,
        stream: PromptStream,
        notices: Notices,
    ) -> None:
        self.course, self.executor, self.score, self.curriculum, self.sampler = course, executor, score, curriculum, sampler
        self.fusion, self.objective, self.optimizer, self.stream, self.notices = fusion, objective, optimizer, stream, notices
        self.model, self.phase, self.ranks = executor.model, executor.phase, course.ranks
        self.knowledge = curriculum.beginning(course.slots, len(stream.prompts))
        self.iterations_done = self.draws = 0
        self._begun: _Begun | None = None

    @property
    def capability(self) -> CapabilityState:
        """The EMA of the policy's own rewards, [M]."""
        return self.knowledge.level

    def iteration(self) -> dict[str, Any]:
        """One iteration; its metrics stay on the device. ``selection/picked`` holds the picked prompts."""
        self.executor.reset_counts()
        self.score.forget()
        self._begun = _Begun(self.draws, self.stream.position, self.knowledge, self.executor.limit.state)
        self.refresh()
        with self.bucket():
            groups = self.draw()  # probe → select → rollout → reward
            if self.course.refill:
                groups = self.refill(groups)
            advantage, statistics = self.advantage(groups.rewards)
            self._begun = dataclasses.replace(self._begun, updating=True)
            policy = self.update(groups, advantage)
        self.iterations_done += 1
        self._begun = None
        metrics = statistics | policy | {"selection/picked": groups.prompts} | self.score.failures(self.ranks)
        return metrics | selection_metrics(groups.scores, groups.picks, self.knowledge)

    def draw(self, share: Share | None = None) -> Groups:
        """Groups for the slots that are dealt by ``share``; None is those of an iteration."""
        share = share or self.course.share
        numbers = self.stream.take_numbers(share.total * self.course.candidates)
        for attempt in self.attempts():
            with attempt:
                groups, knowledge = self.groups_of(numbers, share)
        self.knowledge = knowledge
        self.draws += 1
        return groups

    def groups_of(self, numbers: Sequence[int], share: Share) -> tuple[Groups, Knowledge]:
        """Groups for slots of the prompts ``numbers``, B per slot, and what is known then; moves no state."""
        candidates = self.candidates(numbers, share)
        choice = self.probe_and_select(candidates)
        conditioning = candidates.text(share.own(choice.rows))
        samples, scores = self.rollout(choice, candidates, conditioning)
        rewards = share.gather(self.reward(share.own(choice.picks), samples, scores), 1)
        knowledge = choice.knowledge.with_groups(candidates, choice, rewards)
        picked = PromptRows(candidates.prompts, choice.rows)
        return Groups(share, picked, conditioning, choice.scores, choice.picks, samples, rewards), knowledge

    def candidates(self, numbers: Sequence[int], share: Share) -> Candidates:
        """The prompts ``numbers``, B per slot; this rank's encoded."""
        prompts = [self.stream.prompts[i] for i in numbers]
        conditioning = self.model.encode(share.part(prompts))
        remembered = self.knowledge.evidence is not None
        on_device = host_integers(numbers, self.model.device).reshape(share.total, -1) if remembered else None
        unseen = self.stream.position - len(numbers) < len(self.stream.prompts)
        return Candidates(prompts, conditioning, share, self.draws, on_device, self.course.pooled, unseen)

    def probe_and_select(self, candidates: Candidates) -> Choice:
        """Judge the candidates, fold what was scored into the capability EMA, pick one per slot."""
        return self.curriculum(candidates, self.knowledge)

    def rollout(self, choice: Choice, candidates: Candidates, conditioning: Conditioning) -> tuple[Samples, Overlap]:
        """Groups of the picked prompts, and the scores of their images, which are worked out beside the rollout."""
        share, picked = candidates.share, candidates.shown(candidates.share.own(choice.rows))
        per_slot = self.sampler.rows_per_slot(self.iterations_done)
        slot = torch.arange(share.each, device=choice.picks.device).repeat_interleave(per_slot)
        group = self.sampler.shape.group_index(slot.shape[0], slot.device)
        scores = self.score.overlapped(PromptRows(picked.texts, picked.text_index.index_select(0, slot), group))
        given = (choice.anchors, choice.anchor_row, conditioning, self.iterations_done, self.draws, scores, share)
        return self.sampler(self.executor, *given), scores

    def reward(self, picks: Tensor, samples: Samples, scores: Overlap) -> Tensor:
        """Rewards [M, groups, G], or [M*tails, groups, G]; NaN where a sample failed, and for slots without a pick."""
        found = scores.result()
        slot_picks = picks.repeat_interleave(found.shape[1] // len(picks))
        return samples.by_group(torch.where(slot_picks >= 0, found, torch.nan))

    def refill(self, groups: Groups) -> Groups:
        """Draw the slots whose groups all lack spread once more, from new prompts; reads one flag per slot."""
        empty = groups.without_signal()
        if empty.numel() == 0:
            return groups
        again = self.draw(self.course.share.redrawn(empty.tolist()))
        return groups.with_slots(empty, again, self.course.candidates)

    def advantage(self, rewards: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Advantages [groups, G] of this rank's against group and capability, and what to log about all rewards and fusion."""
        with self.phase("advantage"):
            found, statistics = self.fusion(rewards, self.capability, self.draws)
            return self.course.share.own(found), statistics

    def update(self, groups: Groups, advantage: Tensor) -> dict[str, Any]:
        """Policy-gradient step(s).

        Raises:
            RunError: out of memory.
        """
        lr, valid = self.optimizer.lr, groups.share.own(groups.trained(self.course.skip_equal)).flatten()
        with self.phase("update"), named_memory("in the update"):
            given = (groups.samples, advantage.flatten(), valid, groups.conditioning)
            policy = update_policy(self.executor, self.optimizer, *given, self.objective)
        return {f"policy/{name}": value for name, value in policy.items()} | {"policy/lr": lr}

    def refresh(self) -> None:
        """Let the rollouts' weights follow the policy's."""
        with self.phase("sync"), named_memory("refreshing the rollout copy"):
            self.executor.refresh()

    @contextlib.contextmanager
    def bucket(self) -> Iterator[None]:
        """Within it the model has the iteration's picture size."""
        buckets = self.course.buckets
        if not buckets:
            yield
            return
        generator = host_generator(self.course.seed, self.iterations_done)
        self.executor.resize(*buckets[int(torch.randint(len(buckets), (), generator=generator))])
        try:
            yield
        finally:
            self.executor.resize(*self.course.size)

    def attempts(self) -> Iterator[Attempt]:
        """Tries of sampling, see ``engine.retry``."""
        return attempts(self.executor, self.notices, self.ranks)

    def rewind(self) -> bool:
        """Give up an iteration that raised: the state is again that after the last finished one.

        Returns:
            Whether it could; no longer once the update has begun.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return True
        self.draws, self.stream.position, self.knowledge = begun.draws, begun.position, begun.knowledge
        self.executor.limit.state = begun.batch_limit
        return not begun.updating

    def state_dict(self) -> dict[str, Any]:
        """Everything that makes the next iteration what it would have been; noise needs no state but the count of draws."""
        evidence = self.knowledge.evidence
        return {
            "iterations_done": self.iterations_done,
            "draws": self.draws,
            "batch_limit": self.executor.limit.state,
            "stream_position": self.stream.position,
            "capability": self.capability.state_dict(),
            "filter": None if evidence is None else evidence.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; ``engine.max_rows`` is the recipe's, or less where memory ran out."""
        self.iterations_done, self.draws = state["iterations_done"], state["draws"]
        limit, halved = state["batch_limit"]
        wanted = self.course.max_rows
        keep = halved and (not wanted or limit < wanted)
        self.executor.limit.state = (limit, True) if keep else (wanted, False)
        self.stream.position = state["stream_position"]
        level = CapabilityState.from_state_dict(state["capability"]).to(self.model.device)
        evidence = self.knowledge.evidence and self.knowledge.evidence.loaded(state["filter"])
        self.knowledge = dataclasses.replace(self.knowledge, level=level, evidence=evidence)
        self.optimizer.load_state_dict(state["optimizer"])
