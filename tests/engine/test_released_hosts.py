"""The update with the keys of each host: gradient, loss and ratio against what its released code computed of the same numbers.

Nothing of the update is replaced but the model, whose velocity is a parameter.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hosts import CLOSE, Released, distance
from torch import Tensor, nn
from toy import ToyModel

from adagrpo.algorithm.losses import guarded, step_weights
from adagrpo.algorithm.sde import affine_mean, group_log_prob
from adagrpo.algorithm.tables import rollout_table
from adagrpo.engine.executor import RolloutExecutor
from adagrpo.engine.optimizer import OptimizerSettings, PolicyOptimizer
from adagrpo.engine.rollout import Transitions
from adagrpo.engine.sampling import Samples
from adagrpo.engine.update import Objective, update_policy
from adagrpo.models.base import Conditioning

TEXT = Conditioning({"text": torch.zeros(1, 16)})


class Told(ToyModel):
    """Its velocity, and the initial model's, are those of all transitions at once."""

    def __init__(self, velocity: Tensor, reference: Tensor | None) -> None:
        super().__init__(velocity.dtype)
        self.latent_shape = tuple(velocity.shape[1:])
        self.transformer = nn.ParameterList([nn.Parameter(velocity)])
        self.initial, self.asked = reference, self.transformer[0]

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self.asked

    @contextlib.contextmanager
    def reference(self):
        self.asked = self.initial
        try:
            yield
        finally:
            self.asked = self.transformer[0]


class Replay:
    """What a host stored, N latents with G successors each.

    Args:
        steps: int64 [N].
        successors: [N, G, L, C]. old_logp: [N, G].
    """

    def __init__(self, host: Released, scheme: str, eta: float, steps: Tensor, successors: Tensor, old_logp: Tensor) -> None:
        dtype, shape = successors.dtype, successors.shape[2:]
        flat = lambda name: host.given(name, dtype).reshape(-1, *shape) if f"in.{name}" in host.tensors else None  # noqa: E731
        self.host, self.model = host, Told(flat("velocity"), flat("reference_velocity"))
        table = rollout_table(host.given("sigmas"), scheme, eta)
        self.executor = RolloutExecutor(self.model, table, 0, dtype)
        index, slot = steps + table.num_steps, torch.zeros_like(steps)
        sample = torch.arange(old_logp.numel()).reshape(old_logp.shape)
        latent, old_mean = flat("latents"), flat("old_mean")
        mean = torch.zeros_like(latent) if old_mean is None else old_mean
        self.transitions = Transitions(latent, successors, mean, old_logp, index, slot, sample)

    def update(self, advantage: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient by the velocities [N, L, C], and the metrics."""
        t, weights = self.transitions, self.model.transformer
        samples = Samples(t.latent, 1, t, [[torch.arange(len(t.latent))]])
        optimizer = PolicyOptimizer(weights.parameters(), OptimizerSettings(lr=0.0, max_grad_norm=1e9))
        kept: list[Tensor] = []
        step = optimizer.step
        optimizer.step = lambda: kept.append(weights[0].grad.clone()) or step()  # type: ignore[method-assign]
        objective = Objective(clip_range=self.host.setting("clip_range"), **options)
        valid = torch.ones(t.sample.numel(), dtype=torch.bool)
        metrics = update_policy(self.executor, optimizer, samples, advantage.flatten(), valid, TEXT, objective)
        return kept[0], metrics

    def ratio(self, kind: str = "plain") -> Tensor:
        """[N, G]"""
        t, v = self.transitions, self.model.transformer[0].detach()
        now, before = group_log_prob(t.latent, v, t.successors, self.executor.table, t.index), t.logp
        if kind != "plain":
            mean = affine_mean(t.latent, v, self.executor.table, t.index)
            now, before = guarded(now, before, mean, t.mean, self.executor.table, t.index, kind == "guard_batch")
        return (now - before).exp()


DIFFUSION, STEP = {"kl_weight": 0.04, "kl_variance": "diffusion"}, {"kl_weight": 0.04, "kl_variance": "step"}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    ("name", "scheme", "eta", "options"),
    [
        ("flow_grpo", "flow", 0.7, DIFFUSION),
        ("flow_grpo_fast", "flow", 0.7, DIFFUSION),
        ("flow_grpo_fast_cps", "cps", 0.8, STEP),
        ("flow_cps", "cps", 0.8, {"kl_weight": 0.04, "kl_variance": "none"}),
        ("grpo_guard_rows", "flow", 0.7, {"ratio": "guard"}),
        ("grpo_guard", "flow", 0.7, {"ratio": "guard_batch"}),
        ("dance_grpo", "dance", 0.3, {}),
        ("mixgrpo", "flow", 0.7, {"kl_weight": 0.01, "kl_space": "logp"}),
    ],
)
def test_trajectories(name: str, scheme: str, eta: float, options: dict, dtype: torch.dtype) -> None:
    """Rows of stored steps with one successor each. Theirs is a loss of each step, of each row and step, or of all."""
    host = Released(name)
    old = host.given("old_logp", dtype)
    steps = host.given("step_index") if "in.step_index" in host.tensors else torch.arange(old.shape[1])
    successors = host.given("next", dtype).flatten(0, 1).unsqueeze(1)
    replay = Replay(host, scheme, eta, steps.repeat(len(old)), successors, old.reshape(-1, 1))
    advantage = host.found("advantage").flatten().repeat_interleave(old.shape[1]).to(dtype)
    gradient, metrics = replay.update(advantage, **options)
    losses = host.found("loss")
    assert distance(gradient * losses.numel(), host.found("dloss_dvelocity").flatten(0, 1)) < CLOSE[dtype]
    assert abs(float(metrics["loss"]) - float(losses.mean())) < CLOSE[dtype] * 10
    ratio = replay.ratio(options.get("ratio", "plain")).double()
    assert float((ratio.flatten() - host.found("ratio").flatten()).abs().max()) < CLOSE[dtype]
    clip, ratio = host.setting("clip_range"), host.found("ratio").reshape(advantage.shape)
    for name, outside in (("high", (ratio > 1 + clip) & (advantage > 0)), ("low", (ratio < 1 - clip) & (advantage < 0))):
        assert float(metrics[f"clip_share_{name}"]) == pytest.approx(float(outside.double().mean()), abs=1e-12)
    assert float(metrics["clip_share"]) == pytest.approx(float(metrics["clip_share_high"] + metrics["clip_share_low"]))
    if "kl_weight" in options:
        assert float(metrics["kl"]) == pytest.approx(float(host.found("kl_loss").mean()), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("ratio", ["guard", "guard_batch"])
def test_lengths_of_steps_spare_the_divergence(ratio: str) -> None:
    """GRPO-Guard's code adds the divergence, Flow-GRPO's, to a surrogate that it has divided by them."""
    host = Released("flow_grpo")
    old = host.given("old_logp", torch.float64)
    steps, successors = torch.arange(old.shape[1]).repeat(len(old)), host.given("next").flatten(0, 1).unsqueeze(1)
    replay = Replay(host, "flow", 0.7, steps, successors, old.reshape(-1, 1))
    advantage = host.found("advantage").flatten().repeat_interleave(old.shape[1])
    of = lambda **kl: replay.update(advantage, ratio=ratio, old_logp="detached", **kl)[1]["loss"]  # noqa: E731
    expected = 0.04 * float(host.found("kl_loss").mean())
    assert float(of(**DIFFUSION) - of()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", CLOSE)
def test_groups_that_share_a_mean(dtype: torch.dtype) -> None:
    """G2RPO: one velocity for all members of a fork."""
    host = Released("g2rpo")
    by_fork = lambda name: host.given(name, dtype).transpose(0, 1)  # noqa: E731
    replay = Replay(host, "flow", 0.7, host.given("step_index"), by_fork("next"), by_fork("old_logp"))
    gradient, metrics = replay.update(host.found("advantage").T.to(dtype))
    assert distance(gradient, host.found("dloss_dvelocity")) < CLOSE[dtype]
    assert abs(float(metrics["loss"]) - float(host.found("loss"))) < CLOSE[dtype] * 10


@pytest.mark.parametrize("dtype", CLOSE)
def test_weights_by_noise_spare_the_divergence(dtype: torch.dtype) -> None:
    """TempFlow-GRPO: 1.73 w is w/mean(w) on the grid it was made for; on this one the advantages carry the difference."""
    host = Released("tempflow")
    successors = host.given("next", dtype).flatten(0, 1)
    old = host.given("old_logp", dtype).transpose(1, 2).flatten(0, 1)
    replay = Replay(host, "flow", 0.7, host.given("step_index").repeat(3), successors, old)
    table, index = replay.executor.table, replay.transitions.index
    unit = 1.73 * float(table.w[index].double().mean())
    assert torch.allclose(step_weights(table, index, "noise").double()[:5] * unit, host.found("weight"), rtol=1e-6)
    advantage = host.found("advantage").transpose(1, 2).to(dtype) * unit
    gradient, metrics = replay.update(advantage, step_weighting="noise", **STEP)
    assert distance(gradient * 5, host.found("dloss_dvelocity").flatten(0, 1)) < CLOSE[dtype]
    assert abs(float(metrics["loss"]) - float(host.found("loss").mean())) < CLOSE[dtype] * 10


@pytest.mark.parametrize("dtype", CLOSE)
def test_equal_gradients_over_the_batch(dtype: torch.dtype) -> None:
    """Flash-GRPO: the samples of a prompt train one step; their weights, of four decimals, average 1 over the batch."""
    host = Released("flash_grpo")
    eta = float(host.given("sigmas")[1])
    successors = host.given("next", dtype).reshape(12, 1, 4, 8)
    replay = Replay(host, "flash", eta, host.given("step_index"), successors, host.given("old_logp", dtype).unsqueeze(1))
    found = step_weights(replay.executor.table, replay.transitions.index, "equal_gradient").double()
    theirs = host.found("value") * host.found("w")
    assert torch.allclose(found, theirs, rtol=2e-5)
    advantage = host.found("advantage").flatten() * theirs / found
    gradient, metrics = replay.update(advantage.to(dtype), step_weighting="equal_gradient")
    assert distance(gradient, host.found("dloss_dvelocity").reshape(12, 4, 8)) < CLOSE[dtype]
    assert abs(float(metrics["loss"]) - float(host.found("loss"))) < CLOSE[dtype] * 10
