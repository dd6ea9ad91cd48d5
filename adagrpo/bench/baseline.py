"""The published loop, plain: what a straightforward implementation of AdaGRPO does, to be timed beside ours.

Model calls are eager, groups come one after another, latents go to the host between phases, images are decoded one at a time
to 8-bit pictures and scored one by one, and each fork is replayed alone. Mathematics, seeds and noise are ours, so that picks
and rewards can be compared.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from adagrpo_kernels import (
    Draw,
    Stream,
    capability_step_reference,
    group_log_prob_reference,
    multi_reward_advantage_reference,
    philox_normal_reference,
    sde_step_reference,
)
from PIL import Image
from torch import Tensor

from ..algorithm.losses import clipped_surrogate
from ..assembly import build_optimizer, build_table, place_rewards
from ..engine.timing import PhaseTimer
from ..errors import InputError
from ..models.base import Conditioning, FlowModel
from ..parts.plugins import is_import_path
from ..prompts.stream import PromptStream
from ..recipe.derived import Derived
from ..recipe.keys import Config
from ..rewards import PromptRows, Reward
from ..run.grid import to_pil


@dataclasses.dataclass(frozen=True)
class Fork:
    """A group off one anchor, on the host: ``latent`` [1, L, C], ``successors`` [1, G, L, C], ``logp`` [1, G]."""

    slot: int
    step: int
    latent: Tensor
    successors: Tensor
    logp: Tensor


class PublishedLoop:
    """AdaGRPO as published, plainly, over a recipe with plan fork; it decodes image by image, which the released code does not.

    Args:
        config: a checked recipe.
        model: the policy.
        rewards: one per entry of ``config.rewards``.
        prompts: the training prompts.

    Attributes:
        phase: seconds by phase.
        evaluations: image-forwards by phase, of the last iteration.

    Raises:
        InputError: the recipe asks for what the published loop has not.
    """

    def __init__(self, config: Config, model: FlowModel, rewards: Sequence[Reward], prompts: Sequence[str]) -> None:
        for key, value, needed in (
            ("rollout.plan", config.rollout.plan, "fork"),
            ("rollout.tail_steps", config.rollout.tail_steps, 0),
            ("rollout.tail_share", config.rollout.tail_share, 0.0),
            ("rollout.granularities", config.rollout.granularities, (1,)),
            ("rollout.seeds", config.rollout.seeds, 1),
            ("rollout.trained_share", config.rollout.trained_share, 1.0),
            ("train.update_by", config.train.update_by, "steps"),
            ("selection.capability", config.selection.capability if Derived(config).slots > 1 else "shared", "shared"),
            ("loss.ratio", config.loss.ratio, "plain"),
            ("loss.kl_weight", config.loss.kl_weight, 0.0),
            ("loss.step_weights", config.loss.step_weights, "uniform"),
            ("loss.average", config.loss.average, "update"),
            ("advantage.equal_groups", config.advantage.equal_groups, "keep"),
        ):
            if value != needed:
                raise InputError(f"{key} = {value}: the plain loop of `adagrpo bench baseline` knows {needed} only")
        if config.loss.old_logp == "recompute" or config.model.buckets:
            raise InputError("loss.old_logp = recompute and model.buckets: the plain loop has neither; remove them")
        for key, name in (("selection.strategy", config.selection.strategy), ("advantage.function", config.advantage.function)):
            if is_import_path(name) or name == "random":
                raise InputError(f"{key} = {name}: the plain loop knows the built-in, deterministic ones only")
        self.config, self.model, self.rewards = config, model, place_rewards(config, rewards)
        self.stream = PromptStream(prompts, config.train.seed)
        derived = Derived(config)
        self.slots, self.storage = derived.slots, derived.storage
        self.table = build_table(config, model, (config.model.height, config.model.width)).steps.to(model.device, derived.wide)
        self.optimizer = build_optimizer(config, model)
        self.phase = PhaseTimer(model.device)
        self.evaluations: Counter[str] = Counter()
        zeros = torch.zeros(len(self.rewards), dtype=torch.float64)
        self.capability = (zeros, zeros, zeros.long())
        self.weights = torch.tensor([reward.weight for reward in config.rewards])
        self.draws = 0

    def iteration(self) -> tuple[Tensor, Tensor]:
        """One iteration; returns picks int64 [P] and rewards [M, groups, G], on the host."""
        r, b = self.config.rollout, self.config.selection.candidates
        self.evaluations.clear()
        prompts = self.stream.take(self.slots * b)
        conditioning = self.model.encode(prompts)
        anchors, scores = [], []
        for slot in range(self.slots):
            rows = torch.arange(slot * b, (slot + 1) * b)
            anchors.append(self.probe(rows, conditioning))
            scores.append(self.score(anchors[-1][r.steps][0], prompts[slot * b : (slot + 1) * b]))
        picks = self.select(torch.stack(scores, 1))
        forks, rewards = [], []
        for slot, pick in enumerate(picks.tolist()):
            chosen = slot * b + max(pick, 0)
            one = conditioning.rows(torch.tensor([chosen], device=self.model.device))
            for number, step in enumerate(r.sde_steps):
                latent, velocity = (kept[max(pick, 0)].unsqueeze(0) for kept in anchors[slot][step])
                fork, images = self.group(slot, number, step, latent, velocity, one)
                forks.append((fork, one))
                found = self.score(images, [prompts[chosen]] * r.group_size)
                rewards.append(found if pick >= 0 else found * torch.nan)
        grouped = torch.stack(rewards, 1)
        self.update(forks, self.advantage(grouped), grouped.isfinite().all(0))
        self.draws += 1
        return picks, grouped

    @torch.no_grad()
    def probe(self, rows: Tensor, conditioning: Conditioning) -> dict[int, tuple[Tensor, Tensor]]:
        """Latents and velocities [B, L, C] at the fork steps, and under T the clean latents, on the host."""
        r, device = self.config.rollout, self.model.device
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        with self.phase("probe"):
            length, channels = self.model.latent_shape
            noise = philox_normal_reference(
                self.config.train.seed, rows.to(device), length * channels, self.draws, Stream.PROBE_INIT, dtype=self.storage
            )
            x, mine = noise.reshape(-1, length, channels), conditioning.rows(rows.to(device))
            for step in range(r.steps):
                v = self.velocity(x, step, mine, "probe")
                if step in r.sde_steps:
                    kept[step] = (x.cpu(), v.cpu())
                x = self.ode_step(x, v, step)
            kept[r.steps] = (x.cpu(), x.cpu())
        return kept

    def select(self, scores: Tensor) -> Tensor:
        """Fold scores [M, P, B] into the EMA, then pick: int64 [P]."""
        s = self.config.selection
        with self.phase("select"):
            weights = self.weights if len(self.rewards) > 1 else None
            found = capability_step_reference(scores, *self.capability, s.alpha, s.strategy, weights)
            self.capability = found[:3]
            return torch.zeros_like(found.picks) if s.candidates == 1 else found.picks

    @torch.no_grad()
    def group(
        self, slot: int, number: int, step: int, latent: Tensor, velocity: Tensor, one: Conditioning
    ) -> tuple[Fork, Tensor]:
        """Fork G samples off [1, L, C] at ``step``, the ``number``-th of its slot, and follow the ODE: images' latents."""
        r, device = self.config.rollout, self.model.device
        x, v = latent.to(device), velocity.to(device)
        index = torch.tensor([step + r.steps], device=device)
        if r.fork_velocity == "fresh":
            with self.phase("prefix"):
                v = self.velocity(x, step, one, "prefix")
        with self.phase("rollout"):
            first = (slot * len(r.sde_steps) + number) * r.group_size
            rows = torch.arange(first, first + r.group_size, device=device)
            draw = Draw(self.config.train.seed, rows, self.draws, Stream.FORK, step)
            everyone = torch.zeros_like(rows)
            forked = sde_step_reference(x, v, self.table, index.expand(len(rows)), draw, source=everyone).next
            logp = group_log_prob_reference(x, v, forked.unsqueeze(0), self.table, index)
            y, conditioning = forked, one.rows(everyone)
            for k in range(step + 1, r.steps):
                y = self.ode_step(y, self.velocity(y, k, conditioning, "rollout"), k)
            return Fork(slot, step, x.cpu(), forked.unsqueeze(0).cpu(), logp.cpu()), y.cpu()

    def score(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards [M, R] float64 of latents [R, L, C], one picture at a time, on the host."""
        columns = []
        for latent, prompt in zip(latents, prompts, strict=True):
            with self.phase("decode"):
                picture = to_pil(self.model.decode(latent.unsqueeze(0).to(self.model.device))[0])
            with self.phase("reward"):
                image = from_pil(picture).to(self.model.device)
                asked = PromptRows([prompt], torch.zeros(1, dtype=torch.int64, device=image.device))
                columns.append([float(reward(image, asked)[0]) for reward in self.rewards])
        return torch.tensor(columns, dtype=torch.float64).T

    def advantage(self, rewards: Tensor) -> Tensor:
        """[groups, G] from rewards [M, groups, G]."""
        a, (mean, var, count) = self.config.advantage, self.capability
        with self.phase("advantage"):
            std = var.clamp_min(1e-8).sqrt()
            return multi_reward_advantage_reference(
                rewards, mean, std, count, self.weights, a.clip, a.weight, a.calibration, scale=Derived(self.config).scale
            ).advantage

    def update(self, forks: Sequence[tuple[Fork, Conditioning]], advantage: Tensor, valid: Tensor) -> None:
        """Replay the forks one by one; they are dealt to the optimizer steps in order of their step."""
        device, loss = self.model.device, self.config.loss
        per_slot = len(self.config.rollout.sde_steps)
        ids = torch.arange(len(forks)).reshape(-1, per_slot)
        with self.phase("update"):
            for share in ids.tensor_split(self.config.train.steps_per_iteration, dim=1):
                for group in share.flatten().tolist():
                    fork, conditioning = forks[group]
                    x, successors = fork.latent.to(device), fork.successors.to(device)
                    index = torch.tensor([fork.step + self.config.rollout.steps], device=device)
                    v = self.velocity(x, fork.step, conditioning, "update")
                    logp = group_log_prob_reference(x, v, successors, self.table, index)
                    old = logp.detach() if loss.old_logp == "detached" else fork.logp.to(device)
                    mine = advantage[group : group + 1].to(device, logp.dtype)
                    mask = valid[group : group + 1].to(device)
                    clipped_surrogate(logp, old, mine, loss.clip_range or None, mask).loss.sum().div(share.numel()).backward()
                    self.optimizer.collect()
                self.optimizer.step()

    def velocity(self, x: Tensor, step: int, conditioning: Conditioning, phase: str) -> Tensor:
        """The policy's velocity [R, L, C] at grid step ``step``, counted."""
        self.evaluations[phase] += x.shape[0]
        return self.model.velocity(x, self.table.sigma[step].expand(x.shape[0]), conditioning)

    def ode_step(self, x: Tensor, v: Tensor, step: int) -> Tensor:
        """The next latents [R, L, C] of the deterministic sampler."""
        return sde_step_reference(x, v, self.table, torch.full((x.shape[0],), step, device=x.device)).next


def from_pil(picture: Image.Image) -> Tensor:
    """[1, 3, H, W] in [0, 1] of an 8-bit picture."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).unsqueeze(0).float() / 255
