"""The training loop: probe → select → rollout → reward → advantage → update.

``Trainer.iteration`` is one iteration of AdaGRPO (section 3) over all prompt slots. Every other algorithm this trainer
speaks is the same iteration under another recipe. Shape letters: P slots, B candidates per slot, M rewards, G group size,
R rollout rows; one latent is [L, C].
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .algorithm.advantages import advantage_statistics, groups_with_signal, reward_advantage, reward_statistics
from .algorithm.sde import Draw as NoiseDraw
from .algorithm.sde import Stream, philox_uniform
from .algorithm.selection import STRATEGIES, CapabilityState, capability_step, closest_distance
from .curriculum.cheap import Candidates, CheapProbe, nearest_picks, rows_of
from .curriculum.evidence import CheapFilter
from .engine.batch_limit import BatchLimit
from .engine.executor import Backends, RolloutExecutor
from .engine.graphs import StepGraphs
from .engine.optimizer import OptimizerSettings, PolicyOptimizer
from .engine.overlap import Overlap
from .engine.plans import host_integers, probe_plan, window_steps
from .engine.rollout import Rollout
from .engine.sampling import Samples, merge_slots, sample_forks, sample_trajectories
from .engine.scoring import Scorer
from .engine.timing import PhaseTimer
from .engine.update import update_policy
from .errors import RunError
from .forward.backends import build_forward
from .forward.device import out_of_memory
from .models.base import Conditioning, FlowModel
from .prompts import PromptStream
from .recipe.derived import Derived
from .recipe.keys import Config, bucket_size
from .rewards import PromptRows, Reward

T = TypeVar("T")
Select = Callable[[Tensor, CapabilityState], Tensor]
Fuse = Callable[[Tensor, CapabilityState, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Draw:
    """Groups drawn for some slots, and what they were drawn from.

    Attributes:
        prompts: the candidates' texts and the row picked for each slot.
        conditioning: of the picked prompts, [P].
        scores: [M, P, B], what candidates were judged by; None where nothing reads them.
        picks: int64 [P], rows among the candidates P*B; -1 where there is none with a score.
        samples: final latents and stored transitions.
        rewards: [M, groups, G]; NaN where a sample failed.
    """

    prompts: PromptRows
    conditioning: Conditioning
    scores: Tensor | None
    picks: Tensor
    samples: Samples
    rewards: Tensor


@dataclasses.dataclass(frozen=True)
class _Begun:
    """All of a trainer's state that an iteration moves before its update, as it was when the iteration began."""

    draws: int
    position: int
    capability: CapabilityState
    filter: CheapFilter | None
    batch_limit: tuple[int, bool]
    updating: bool = False


class Trainer:
    """All state of a run, one method per phase, and ``iteration``, which reads like the paper.

    Args:
        config: a checked recipe.
        model: the policy.
        rewards: one per entry of ``config.rewards``.
        prompts: the training prompts.
        select, fuse: replacements of ``capability_step``'s pick and of ``reward_advantage``; None for the recipe's own.
        say: receives notices for the user.

    Attributes:
        notices: what the rollouts had to tell so far, that of their making included.
    """

    def __init__(
        self,
        config: Config,
        model: FlowModel,
        rewards: Sequence[Reward],
        prompts: Sequence[str],
        select: Select | None = None,
        fuse: Fuse | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.config, self.model, self.rewards, self.say = config, model, list(rewards), say
        self._select, self._fuse = select, fuse
        self.slots = Derived(config).slots
        self.phase = PhaseTimer(model.device)
        self.notices: list[str] | None = []
        self.executor = build_executor(config, model, self.phase, rollouts=True, say=self._tell)
        overlapping = config.engine.overlap and model.device.type == "cuda"
        self.score_stream = torch.cuda.Stream(model.device) if overlapping else None
        self.impl = self.executor.impl
        self.score = Scorer(self.executor, self.rewards, [r.name for r in config.rewards], [r.timeout for r in config.rewards])
        self.optimizer = build_optimizer(config, model)
        self.stream = PromptStream(prompts, config.train.seed)
        self.capability = CapabilityState.for_rewards(len(rewards), model.device)
        self.reward_weights = torch.tensor([reward.weight for reward in config.rewards], device=model.device)
        self.status = torch.zeros((), dtype=torch.int64, device=model.device)
        self.filter = _filter(config, self.slots, len(prompts), model.device)
        self.cheap = None if self.filter is None else self._cheap_probe()
        self.iterations_done = 0
        self.draws = 0
        self._begun: _Begun | None = None

    def _tell(self, message: str) -> None:
        if self.notices is not None:
            self.notices.append(message)
        self.say(message)

    def told_early(self) -> list[str]:
        """What the rollouts had to tell before anybody wrote it down; handed out once."""
        notices, self.notices = self.notices or [], None
        return notices

    def iteration(self) -> dict[str, Any]:
        """One iteration; its metrics stay on the device. ``selection/picked`` holds the picked prompts."""
        self.executor.reset_counts()
        self._begun = _Begun(self.draws, self.stream.position, self.capability, self.filter, self.executor.batch_limit)
        with self.phase("sync"), _named_memory("refreshing the rollout copy"):
            self.executor.refresh()
        with self._bucket():
            draw = self.draw(self.slots)
            if self.config.advantage.equal_groups == "refill":
                draw = self.refill(draw)
            advantage, statistics = self.fuse(draw.rewards)
            self._begun = dataclasses.replace(self._begun, updating=True)
            policy = self.update(draw, advantage)
        self.iterations_done += 1
        self._begun = None
        return statistics | policy | self.selection_metrics(draw)

    def rewind(self) -> bool:
        """Give up an iteration that raised: the state is again that after the last finished one.

        Returns:
            Whether it could; no longer once the update has begun.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return True
        self.draws, self.stream.position, self.executor.batch_limit = begun.draws, begun.position, begun.batch_limit
        self.capability, self.filter = begun.capability, begun.filter
        return not begun.updating

    @contextlib.contextmanager
    def _bucket(self) -> Iterator[None]:
        """Within it the model has the iteration's picture size, drawn from ``model.buckets``."""
        m = self.config.model
        if not m.buckets:
            yield
            return
        generator = torch.Generator().manual_seed(self.config.train.seed * 1_000_003 + self.iterations_done)
        drawn = int(torch.randint(len(m.buckets), (), generator=generator))
        self.model.resize(*bucket_size(m.buckets[drawn]))
        try:
            yield
        finally:
            self.model.resize(m.height, m.width)

    def draw(self, slots: int) -> Draw:
        """Draw groups for ``slots`` prompts."""
        numbers = self.stream.take_numbers(slots * self.config.selection.candidates)
        before = (self.capability, self.filter)
        draw = self.with_memory(lambda: self._draw(numbers, slots, before))
        self.draws += 1
        return draw

    def with_memory(self, sampling: Callable[[], T]) -> T:
        """What ``sampling`` returns; if memory runs out, once more in batches of half the size.

        Raises:
            RunError: out of memory again.
        """
        while True:
            try:
                return sampling()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self._settle()
                self.executor.halve_rows(error)
            torch.cuda.empty_cache()  # only now is the failed attempt's last tensor gone, with the error that held its frames
            self.say(f"out of memory while sampling: continuing with engine.max_rows = {self.executor.max_rows}")

    def _settle(self) -> None:
        """Wait for every stream: the second one may still read what the failed attempt held, and the allocator keeps such
        blocks back until it is done."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def _draw(self, numbers: Sequence[int], slots: int, before: tuple[CapabilityState, CheapFilter | None]) -> Draw:
        self.capability, self.filter = before
        prompts = [self.stream.prompts[i] for i in numbers]
        candidates = self.model.encode(prompts)
        if self.filter is None:
            anchors, scores = self.probe(candidates, prompts, slots)
            picks = self.select(scores, slots)
        else:
            assert self.cheap is not None
            places = host_integers(numbers, self.model.device).reshape(slots, -1)
            found = self.cheap(Candidates(candidates, prompts, places, self.draws), self.capability, self.filter)
            anchors, scores, picks = found.anchors, found.judged, found.picks
            self.capability, self.filter, self.status = found.capability, found.state, found.status
        chosen, conditioning = self.gather(candidates, picks)
        anchor_row = chosen if self.filter is None else torch.arange(slots, device=chosen.device)
        picked = PromptRows(prompts, chosen)
        samples, rewards = self.rollout(anchors, anchor_row, picked, picks, conditioning)
        if self.filter is not None:
            self.filter = self.filter.with_groups(places.flatten()[chosen], rewards, self.draws)
        return Draw(picked, conditioning, scores, picks, samples, rewards)

    def _cheap_probe(self) -> CheapProbe:
        """What judges candidates without sampling all of them to the end."""
        s, r = self.config.selection, self.config.rollout
        return CheapProbe(
            self.executor,
            self.score,
            self._overlapped,
            self.reward_weights,
            judge=s.judge,
            pooled=s.pooled,
            strategy=s.strategy,
            alpha=s.alpha,
            race_steps=s.race_steps,
            finalists=s.finalists,
            forks=r.sde_steps if r.plan == "fork" else (),
        )

    def probe(self, candidates: Conditioning, prompts: Sequence[str], slots: int) -> tuple[Rollout | None, Tensor | None]:
        """Sample all P·B candidates by the deterministic ODE, which forks start from, and score them: [M, P, B].

        Either is None where nothing would read it.
        """
        r = self.config.rollout
        if r.plan != "fork" and not Derived(self.config).scores_needed:
            return None, None
        plan = probe_plan(range(len(prompts)), r.steps, keep=r.sde_steps if r.plan == "fork" else ())
        everyone = torch.arange(len(prompts), device=self.model.device)
        with self.phase("probe"):
            x = self.executor.initial_noise(everyone, self.draws, Stream.PROBE_INIT)
        scores = self._overlapped(PromptRows(prompts, everyone)) if Derived(self.config).scores_needed else None
        anchors = self.executor.run(plan, x, candidates, self.draws, "probe", finished=scores)
        return anchors, None if scores is None else scores.result().unflatten(1, (slots, -1))

    def select(self, scores: Tensor | None, slots: int) -> Tensor:
        """Fold the scores into the capability EMA, then pick: rows [P] among the candidates; -1 where none has a score."""
        s = self.config.selection
        with self.phase("select"):
            slot = torch.arange(slots, device=self.model.device)
            draw = NoiseDraw(self.executor.seed, slot, self.draws, Stream.SELECT)
            if scores is not None:
                strategy = s.strategy if s.strategy in STRATEGIES else "closest"
                found = capability_step(self.capability, scores, s.alpha, strategy, self._several_weights, draw, self.impl)
                self.capability, self.status = found.state, found.status
            if s.candidates == 1:
                return slot
            if scores is None:
                return rows_of((philox_uniform(*draw) * s.candidates).long(), s.candidates)
            if s.pooled:
                return nearest_picks(closest_distance(scores, self.capability, self.reward_weights), pooled=True)
            return rows_of(found.picks if self._select is None else self._select(scores, self.capability), s.candidates)

    def gather(self, candidates: Conditioning, picks: Tensor) -> tuple[Tensor, Conditioning]:
        """Rows of the picked candidates [P] and their conditioning, without leaving the device."""
        chosen = picks.clamp_min(0)
        return chosen, candidates.rows(chosen)

    @property
    def _several_weights(self) -> Tensor | None:
        """What ``capability_step`` wants of the reward weights."""
        return self.reward_weights if len(self.rewards) > 1 else None

    def rollout(
        self, anchors: Rollout | None, anchor_row: Tensor, picked: PromptRows, picks: Tensor, conditioning: Conditioning
    ) -> tuple[Samples, Tensor]:
        """Draw the groups by the recipe's plan, and score them: rewards [M, groups, G], NaN for slots without a probe.

        ``anchor_row`` [P] is the row of each slot's ODE trajectory in ``anchors``.
        """
        r, train = self.config.rollout, self.config.train
        stochastic = self._stochastic_steps()
        trained = self._trained_steps(stochastic)
        slots = picks.shape[0]
        per_slot = r.group_size * (len(trained) if r.plan == "fork" else 1)
        slot = torch.arange(slots, device=picks.device).repeat_interleave(per_slot)
        scores = self._overlapped(PromptRows(picked.texts, picked.text_index.index_select(0, slot)))
        shared: dict[str, Any] = {
            "executor": self.executor,
            "conditioning": conditioning,
            "iteration": self.draws,
            "group_size": r.group_size,
            "optimizer_steps": train.steps_per_iteration,
            "slots_per_batch": train.slots,
            "finished": scores,
        }
        if r.plan == "fork":
            assert anchors is not None
            fresh = r.fork_velocity == "fresh"
            samples = sample_forks(anchors, anchor_row, steps=trained, fresh_velocity=fresh, **shared)
        else:
            samples = sample_trajectories(slots, stochastic, trained, shared_noise=r.shared_noise, **shared)
        rewards = torch.where(picks[slot] >= 0, scores.result(), torch.nan)
        return samples, rewards.unflatten(1, (samples.groups, -1))

    def _overlapped(self, prompts: PromptRows) -> Overlap:
        """Scores the rows of a rollout chunk by chunk, beside the next chunk's rollout."""
        return Overlap(lambda latents, rows: self.score(latents, prompts.rows(rows)), self.score_stream)

    def refill(self, draw: Draw) -> Draw:
        """Draw the slots whose groups all lack spread once more, from new prompts; reads one flag per slot."""
        signal = groups_with_signal(draw.rewards).reshape(self.slots, -1).any(1)
        empty = torch.nonzero(~signal).flatten()
        if empty.numel() == 0:
            return draw
        other = self.draw(empty.numel())
        texts = [*draw.prompts.texts, *other.prompts.texts]
        shifted = other.prompts.text_index + len(draw.prompts.texts)
        rewards = draw.rewards.unflatten(1, (self.slots, -1))
        fresh = other.rewards.unflatten(1, (empty.numel(), -1))
        within = torch.where(other.picks >= 0, other.picks % self.config.selection.candidates, -1)
        moved = torch.where(within >= 0, empty * self.config.selection.candidates + within, -1)
        scores = draw.scores
        if scores is not None and other.scores is not None:
            scores = scores.index_copy(1, empty, other.scores)
        return Draw(
            prompts=PromptRows(texts, draw.prompts.text_index.index_copy(0, empty, shifted)),
            conditioning=draw.conditioning.replaced(empty, other.conditioning),
            scores=scores,
            picks=draw.picks.index_copy(0, empty, moved),
            samples=merge_slots(draw.samples, other.samples, empty, self.slots),
            rewards=rewards.index_copy(1, empty, fresh).flatten(1, 2),
        )

    def fuse(self, rewards: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Advantages [groups, G] and what to log about rewards and fusion."""
        a = self.config.advantage
        with self.phase("advantage"):
            state, weights = self.capability, self.reward_weights
            if self._fuse is not None:
                advantage = self._fuse(rewards, state, weights)
                found = [advantage_statistics(r, advantage, state[m]) | reward_statistics(r) for m, r in enumerate(rewards)]
            else:
                advantage, found = reward_advantage(rewards, state, weights, a.clip, a.weight, a.calibration, self.impl)
            statistics: dict[str, Tensor] = {}
            for m, reward in enumerate(self.config.rewards):
                mean, spread = found[m].pop("reward_mean"), found[m].pop("group_std")
                if m == 0:
                    statistics |= {"reward/train": mean, "reward/group_std": spread}
                else:
                    statistics[f"reward/train_{m}_{reward.name}"] = mean
                prefix = f"advantage/{m}_{reward.name}_" if m else "advantage/"
                statistics |= {prefix + name: value for name, value in found[m].items()}
            if len(self.rewards) > 1:  # what the guards watch: a sample fails with any of its rewards
                statistics["advantage/failed"] = (~rewards.isfinite().all(0)).double().mean()
                statistics["advantage/equal_groups"] = (~groups_with_signal(rewards)).double().mean()
            if self.config.train.shuffle_advantages:
                generator = torch.Generator().manual_seed(self.config.train.seed * 1_000_003 + self.draws)
                order = torch.rand(advantage.shape, generator=generator).argsort(-1).to(advantage.device)
                advantage = advantage.gather(-1, order)
        return advantage, statistics

    def update(self, draw: Draw, advantage: Tensor) -> dict[str, Any]:
        """Policy-gradient step(s).

        Raises:
            RunError: out of memory.
        """
        loss, lr = self.config.loss, self.optimizer.lr
        valid = draw.rewards.isfinite().all(0)
        if self.config.advantage.equal_groups != "keep":
            valid = valid & groups_with_signal(draw.rewards).unsqueeze(-1)
        with self.phase("update"), _named_memory("in the update"):
            policy = update_policy(
                self.executor,
                self.optimizer,
                draw.samples,
                advantage.flatten(),
                valid.flatten(),
                draw.conditioning,
                old_logp="recompute" if draw.samples.merged and loss.old_logp == "rollout" else loss.old_logp,
                clip_range=loss.clip_range or None,
                kl_weight=loss.kl_weight,
                kl_variance=loss.kl_variance,
                step_weighting=loss.step_weights,
                average=loss.average,
                skip_empty=self.config.advantage.equal_groups != "keep",
            )
        return {f"policy/{name}": value for name, value in policy.items()} | {"policy/lr": lr}

    def selection_metrics(self, draw: Draw) -> dict[str, Any]:
        """The EMA, how far from it the picked prompts are, and which they are."""
        metrics: dict[str, Any] = {"selection/picked": draw.prompts}
        if self.filter is not None:
            metrics |= {
                "selection/ema_mean": self.capability.mean[0],
                "selection/ema_std": self.capability.std[0],
                "selection/probe_mean": self.filter.recent[-1, 0].nanmean(),
                "selection/status": self.status,
            }
        elif draw.scores is not None:
            picked = torch.where(draw.picks >= 0, draw.scores[0].flatten()[draw.picks.clamp_min(0)], torch.nan)
            metrics |= {
                "selection/ema_mean": self.capability.mean[0],
                "selection/ema_std": self.capability.std[0],
                "selection/probe_mean": draw.scores[0].nanmean(),
                "selection/status": self.status,
                "selection/distance": (picked - self.capability.mean[0]).abs().nanmean(),
            }
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Everything that makes the next iteration what it would have been; noise needs no state but the count of draws."""
        return {
            "iterations_done": self.iterations_done,
            "draws": self.draws,
            "batch_limit": self.executor.batch_limit,
            "stream_position": self.stream.position,
            "capability": self.capability.state_dict(),
            "filter": None if self.filter is None else self.filter.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; ``engine.max_rows`` is the recipe's, or less where memory ran out."""
        self.iterations_done, self.draws = state["iterations_done"], state["draws"]
        limit, halved = state["batch_limit"]
        wanted = self.config.engine.max_rows
        keep = halved and (not wanted or limit < wanted)
        self.executor.batch_limit = (limit, True) if keep else (wanted, False)
        self.stream.position = state["stream_position"]
        self.capability = CapabilityState.from_state_dict(state["capability"]).to(self.model.device)
        if self.filter is not None:
            self.filter = self.filter.loaded(state["filter"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _stochastic_steps(self) -> tuple[int, ...]:
        r = self.config.rollout
        if r.plan != "window":
            return r.sde_steps
        return window_steps(self.iterations_done, r.steps, r.window_size, r.window_stride, r.window_every)

    def _trained_steps(self, stochastic: Sequence[int]) -> tuple[int, ...]:
        count = Derived(self.config).trained_steps
        generator = torch.Generator().manual_seed(self.config.train.seed * 1_000_003 + self.iterations_done)
        order = torch.randperm(len(stochastic), generator=generator)[:count].sort().values
        return tuple(stochastic[i] for i in order.tolist())


@contextlib.contextmanager
def _named_memory(where: str) -> Iterator[None]:
    """Turn memory that runs out inside, where smaller batches are no help, into what to do about it."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise RunError(
            f"out of memory {where}: lower train.slots (raise train.accumulation instead), set engine.max_rows "
            "or model.gradient_checkpointing = true, and go on with --resume auto; in a new run model.tuning = lora helps"
        ) from error


def _filter(config: Config, slots: int, prompts: int, device: torch.device) -> CheapFilter | None:
    """State of a probe that does not sample every candidate to the end; None for the full probe."""
    s, rewards = config.selection, len(config.rewards)
    if s.judge == "full":
        return None
    stages = {"short": 1, "racing": len(s.race_steps), "memory": 0}[s.judge]
    remembered = prompts if s.judge == "memory" else 0
    known = {"half_life": s.half_life, "noise_share": s.noise_share, "group_evidence": s.group_evidence}
    return CheapFilter.empty(rewards, slots, s.candidates, device, stages, remembered, **known)


def build_executor(
    config: Config,
    model: FlowModel,
    phase: PhaseTimer | None = None,
    rollouts: bool = False,
    say: Callable[[str], None] = print,
) -> RolloutExecutor:
    """The executor of a recipe; ``rollouts`` also builds what the recipe's ``engine`` keys ask for to compute them.

    Raises:
        InputError: this machine cannot run what they ask for.
    """
    e, d = config.engine, Derived(config)
    table, impl = d.table, d.kernels
    forward, graphs = None, None
    if rollouts:
        on_device = table.to(model.device, torch.float64 if model.dtype is torch.float64 else torch.float32)
        forward = build_forward(model, on_device, e.forward, d.precision, e.fp8_scaling, e.attention, impl, say)
        graphs = StepGraphs(model.device, say) if e.cuda_graphs else None
    limit, backends = BatchLimit(e.max_rows, e.decode_rows), Backends(impl, forward, graphs)
    return RolloutExecutor(model, table, config.train.seed, d.storage, limit, phase, backends)


def build_optimizer(config: Config, model: FlowModel) -> PolicyOptimizer:
    """The optimizer of a recipe over the model's trainable parameters."""
    o = config.optimizer
    settings = OptimizerSettings(
        lr=o.lr,
        betas=o.betas,
        eps=o.eps,
        weight_decay=o.weight_decay,
        max_grad_norm=o.max_grad_norm,
        total_steps=Derived(config).optimizer_steps,
        schedule=o.schedule,
        warmup=o.warmup_steps,
        final_share=o.final_share,
        ema_decay=o.ema_decay,
    )
    return PolicyOptimizer((p for _, p in model.trainable()), settings)
