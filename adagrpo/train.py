"""The training loop: probe → select → rollout → reward → advantage → update → log and save.

``Trainer.iteration`` is one iteration of AdaGRPO (section 3) over all prompt slots. Every other algorithm this trainer
speaks is the same iteration under another recipe. Shape letters: P slots, B candidates per slot, M rewards, G group size,
R rollout rows; one latent is [L, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .algorithm.advantages import advantage_statistics, multi_reward_advantage
from .algorithm.sde import StepTable, Stream, philox_uniform, sigma_schedule, step_table
from .algorithm.selection import CapabilityState, select_prompt, update_capability
from .config import Config
from .engine.executor import Rollout, RolloutExecutor
from .engine.optimizer import PolicyOptimizer
from .engine.plans import probe_plan, window_steps
from .engine.sampling import Samples, sample_forks, sample_trajectories
from .engine.update import update_policy
from .models.base import Conditioning, FlowModel
from .prompts import PromptStream
from .rewards import PromptRows, Reward
from .run.timing import PhaseTimer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


class Trainer:
    """All state of a run, one method per phase, and ``iteration``, which reads like the paper.

    Args:
        config: a checked recipe.
        model: the policy.
        rewards: one per entry of ``config.rewards``.
        prompts: the training prompts.
    """

    def __init__(self, config: Config, model: FlowModel, rewards: Sequence[Reward], prompts: Sequence[str]) -> None:
        self.config, self.model, self.rewards = config, model, list(rewards)
        r, train = config.rollout, config.train
        self.slots = train.slots * train.accumulation
        sigmas = sigma_schedule(r.steps, r.shift)
        table = StepTable.concat([step_table("ode", sigmas), step_table(r.scheme, sigmas, r.eta)])
        self.executor = RolloutExecutor(model, table, train.seed, DTYPES[r.storage], config.engine.max_rows)
        self.optimizer = _optimizer(config, model)
        self.stream = PromptStream(prompts, train.seed)
        self.capability = CapabilityState.for_rewards(len(rewards), model.device)
        self.reward_weights = torch.tensor([reward.weight for reward in config.rewards], device=model.device)
        self.phase = PhaseTimer(model.device)
        self.iterations_done = 0

    def iteration(self) -> dict[str, Tensor]:
        """One iteration; its metrics stay on the device."""
        self.executor.reset_counts()
        prompts = self.stream.take(self.slots * self.config.selection.candidates)
        candidates = self.model.encode(prompts)
        anchors = self.probe(candidates)
        scores = self.probe_scores(anchors, prompts)
        picks = self.select(scores)
        chosen, conditioning = self.gather(candidates, picks)
        samples = self.rollout(anchors, chosen, conditioning)
        rewards = self.rewards_of(samples, prompts, chosen, picks)
        advantage, statistics = self.fuse(rewards)
        policy = self.update(samples, advantage, rewards, conditioning)
        self.iterations_done += 1
        return statistics | policy | self.selection_metrics(scores, picks)

    def probe(self, candidates: Conditioning) -> Rollout | None:
        """Sample all P·B candidates by the deterministic ODE; forks start from these trajectories."""
        r = self.config.rollout
        if r.plan != "fork" and not self._scores_needed:
            return None
        rows = self.slots * self.config.selection.candidates
        plan = probe_plan(range(rows), r.steps, keep=r.sde_steps if r.plan == "fork" else ())
        with self.phase("probe"):
            x = self.executor.initial_noise(plan.noise_row, self.iterations_done, Stream.PROBE_INIT)
            return self.executor.run(plan, x, candidates, self.iterations_done, "probe")

    def probe_scores(self, anchors: Rollout | None, prompts: Sequence[str]) -> Tensor | None:
        """Scores [M, P, B] of the probes; None where nothing would read them."""
        if anchors is None or not self._scores_needed:
            return None
        everyone = torch.arange(len(prompts), device=self.model.device)
        return self.score(anchors.final, PromptRows(prompts, everyone)).unflatten(1, (self.slots, -1))

    def select(self, scores: Tensor | None) -> Tensor:
        """Fold the scores into the capability EMA, then pick one candidate per slot: [P]; -1 where none has a score."""
        s = self.config.selection
        with self.phase("select"):
            if scores is not None:
                self.capability = update_capability(self.capability, scores, s.alpha)
            if s.candidates == 1:
                return torch.zeros(self.slots, dtype=torch.int64, device=self.model.device)
            slots = torch.arange(self.slots, device=self.model.device)
            uniform = philox_uniform(self.executor.seed, slots, self.iterations_done, Stream.SELECT)
            if scores is None:
                return (uniform * s.candidates).long()
            if len(self.rewards) == 1:
                return select_prompt(scores[0], self.capability[0], s.strategy, uniform=uniform)
            return select_prompt(scores, self.capability, s.strategy, self.reward_weights, uniform)

    def gather(self, candidates: Conditioning, picks: Tensor) -> tuple[Tensor, Conditioning]:
        """Rows of the picked candidates [P] and their conditioning, without leaving the device."""
        first = torch.arange(self.slots, device=picks.device) * self.config.selection.candidates
        chosen = first + picks.clamp_min(0)
        return chosen, candidates.rows(chosen)

    def rollout(self, anchors: Rollout | None, chosen: Tensor, conditioning: Conditioning) -> Samples:
        """Draw the groups by the recipe's plan."""
        r, train, it = self.config.rollout, self.config.train, self.iterations_done
        shared = {"optimizer_steps": train.steps_per_iteration, "slots_per_batch": train.slots}
        stochastic = self._stochastic_steps()
        with self.phase("rollout"):
            if r.plan == "fork":
                assert anchors is not None
                fresh = r.fork_velocity == "fresh"
                steps = self._trained_steps(stochastic)
                return sample_forks(self.executor, anchors, chosen, conditioning, it, steps, r.group_size, fresh, **shared)
            trained = self._trained_steps(stochastic)
            return sample_trajectories(
                self.executor, conditioning, self.slots, it, stochastic, trained, r.group_size, r.shared_noise, **shared
            )

    def score(self, latents: Tensor, prompts: PromptRows) -> Tensor:
        """Decode and score: [M, R]. Images leave memory chunk by chunk and never leave the device."""
        parts = []
        for part in self.executor.chunks(latents.shape[0]):
            with self.phase("decode"):
                images = self.model.decode(latents[part])
            with self.phase("reward"):
                scores = [reward(images, prompts[part]) for reward in self.rewards]
                parts.append(torch.stack([s.to(torch.float64) for s in scores]))
        return torch.cat(parts, 1)

    def rewards_of(self, samples: Samples, prompts: Sequence[str], chosen: Tensor, picks: Tensor) -> Tensor:
        """Rewards [M, groups, G] of the rollout; NaN for slots whose probes all failed."""
        rows = samples.final.shape[0]
        slot = torch.arange(self.slots, device=picks.device).repeat_interleave(rows // self.slots)
        rewards = self.score(samples.final, PromptRows(prompts, chosen[slot]))
        return torch.where(picks[slot] >= 0, rewards, torch.nan).unflatten(1, (samples.groups, -1))

    def fuse(self, rewards: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Advantages [groups, G] and what to log about rewards and fusion."""
        a = self.config.advantage
        with self.phase("advantage"):
            advantage = multi_reward_advantage(rewards, self.capability, self.reward_weights, a.clip, a.weight, a.calibration)
            statistics = {"reward/train": rewards[0].nanmean(), "reward/group_std": rewards[0].std(-1).nanmean()}
            for m, reward in enumerate(self.config.rewards):
                prefix = f"advantage/{reward.name}_" if m else "advantage/"
                found = advantage_statistics(rewards[m], advantage, self.capability[m])
                statistics |= {prefix + name: value for name, value in found.items()}
            if self.config.train.shuffle_advantages:
                generator = torch.Generator().manual_seed(self.config.train.seed * 1_000_003 + self.iterations_done)
                order = torch.rand(advantage.shape, generator=generator).argsort(-1).to(advantage.device)
                advantage = advantage.gather(-1, order)
        return advantage, statistics

    def update(self, samples: Samples, advantage: Tensor, rewards: Tensor, conditioning: Conditioning) -> dict[str, Tensor]:
        """Policy-gradient step(s)."""
        loss = self.config.loss
        with self.phase("update"):
            policy = update_policy(
                self.executor,
                self.optimizer,
                samples,
                advantage.flatten(),
                rewards.isfinite().all(0).flatten(),
                conditioning,
                old_logp=loss.old_logp,
                clip_range=loss.clip_range or None,
                kl_weight=loss.kl_weight,
                kl_variance=loss.kl_variance,
                step_weighting=loss.step_weights,
            )
        return {f"policy/{name}": value for name, value in policy.items()}

    def selection_metrics(self, scores: Tensor | None, picks: Tensor) -> dict[str, Tensor]:
        """The EMA, and how far from it the picked prompts are."""
        if scores is None:
            return {}
        picked = scores[0].gather(1, picks.clamp_min(0).unsqueeze(1))
        return {
            "selection/ema_mean": self.capability.mean[0],
            "selection/ema_std": self.capability.std[0],
            "selection/probe_mean": scores[0].nanmean(),
            "selection/distance": (picked - self.capability.mean[0]).abs().nanmean(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that makes the next iteration what it would have been; noise needs no state."""
        return {
            "iterations_done": self.iterations_done,
            "stream_position": self.stream.position,
            "capability": self.capability.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.iterations_done = state["iterations_done"]
        self.stream.position = state["stream_position"]
        self.capability = CapabilityState.from_state_dict(state["capability"]).to(self.model.device)
        self.optimizer.load_state_dict(state["optimizer"])

    @property
    def _scores_needed(self) -> bool:
        s = self.config.selection
        return (s.candidates > 1 and s.strategy != "random") or self.config.advantage.weight > 0

    def _stochastic_steps(self) -> tuple[int, ...]:
        r = self.config.rollout
        if r.plan != "window":
            return r.sde_steps
        return window_steps(self.iterations_done, r.steps, r.window_size, r.window_stride, r.window_every)

    def _trained_steps(self, stochastic: Sequence[int]) -> tuple[int, ...]:
        count = max(1, round(len(stochastic) * self.config.rollout.trained_share))
        generator = torch.Generator().manual_seed(self.config.train.seed * 1_000_003 + self.iterations_done)
        order = torch.randperm(len(stochastic), generator=generator)[:count].sort().values
        return tuple(stochastic[i] for i in order.tolist())


def _optimizer(config: Config, model: FlowModel) -> PolicyOptimizer:
    o = config.optimizer
    return PolicyOptimizer(
        (p for _, p in model.trainable()),
        lr=o.lr,
        betas=o.betas,
        eps=o.eps,
        weight_decay=o.weight_decay,
        max_grad_norm=o.max_grad_norm,
        total_steps=config.train.iterations * config.train.steps_per_iteration,
        schedule=o.schedule,
        warmup=o.warmup_steps,
        final_share=o.final_share,
        ema_decay=o.ema_decay,
    )
