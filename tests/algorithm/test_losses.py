"""Losses against PPO by hand, the closed-form cotangent of the policy update and Gaussian KL divergences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adagrpo.algorithm.losses import (
    clipped_surrogate,
    guarded,
    log_prob_divergence,
    mean_space_kl,
    step_weights,
    velocity_distance,
)
from adagrpo.algorithm.sde import StepTable, affine_mean, group_log_prob, sde_step, sigma_schedule, step_table


@pytest.fixture(scope="module")
def table() -> StepTable:
    """Rows 0-15 flow, 16-21 cps, 22-25 dance, 26-29 ode."""
    return StepTable.concat(
        [
            step_table("flow", sigma_schedule(16, 3.0), 0.7),
            step_table("cps", sigma_schedule(6, 3.0), 0.8),
            step_table("dance", sigma_schedule(4, 3.0), 0.3),
            step_table("ode", sigma_schedule(4, 3.0)),
        ]
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip_range", "objective", "clipped"),
    [
        (1.5, 2.0, 0.2, 2.4, True),
        (1.5, -2.0, 0.2, -3.0, False),
        (0.5, 2.0, 0.2, 1.0, False),
        (0.5, -2.0, 0.2, -1.6, True),
        (1.1, 2.0, 0.2, 2.2, False),
        (0.9, -2.0, 0.2, -1.8, False),
        (1.5, 0.0, 0.2, 0.0, False),
        (1.5, 2.0, None, 3.0, False),
        (0.5, -2.0, None, -1.0, False),
        (1.0002, 1.0, 1e-4, 1.0001, True),
        (0.9998, -1.0, 1e-4, -0.9999, True),
    ],
)
def test_surrogate_by_hand(
    ratio: float,
    advantage: float,
    clip_range: float | None,
    objective: float,
    clipped: bool,
) -> None:
    """One sample: value, flag, and a gradient of -ratio*A unless clipped."""
    logp = torch.tensor([[math.log(ratio) - 3.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-3.0]], dtype=torch.float64, requires_grad=True)
    result = clipped_surrogate(logp, old, torch.tensor([[advantage]], dtype=torch.float64), clip_range)
    result.loss.sum().backward()
    assert float(result.loss.detach()) == pytest.approx(-objective, abs=1e-12)
    assert float(result.ratio.detach()) == pytest.approx(ratio, rel=1e-12)
    assert bool(result.clipped) is clipped
    assert logp.grad is not None
    assert old.grad is None
    assert float(logp.grad) == pytest.approx(0.0 if clipped else -ratio * advantage, abs=1e-12)


def test_surrogate_averages_over_valid_samples() -> None:
    ratio = torch.tensor([[1.5, 0.5, 1.0], [1.5, 0.5, 2.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    advantage = torch.tensor([[1.0, 1.0, -3.0], [2.0, 9.0, -1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])
    logp = ratio.log().requires_grad_()
    result = clipped_surrogate(logp, torch.zeros_like(ratio), advantage, 0.2, mask)
    assert result.loss.tolist() == pytest.approx([-(1.2 + 0.5 - 3.0) / 3, -(2.4 - 2.0) / 2, 0.0], abs=1e-12)
    assert result.clipped.tolist() == [[True, False, False], [True, False, False], [False, False, False]]
    result.loss.sum().backward()
    assert logp.grad is not None
    expected = [[0, -0.5 / 3, 1.0], [0, 0, 1.0], [0, 0, 0]]
    assert [pytest.approx(row, abs=1e-12) for row in expected] == logp.grad.tolist()


def test_surrogate_mask_hides_broken_values() -> None:
    """A failed sample may carry anything in its log-probability and advantage."""
    logp = torch.tensor([[0.0, math.nan, 200.0, 0.0]])
    advantage = torch.tensor([[1.0, 1.0, 1.0, math.nan]])
    result = clipped_surrogate(logp, torch.zeros(1, 4), advantage, 0.2, torch.tensor([[True, False, False, False]]))
    assert result.loss.tolist() == [-1.0]
    assert result.clipped.tolist() == [[False] * 4]


def test_failed_latent_does_not_reach_the_gradient(table: StepTable) -> None:
    """m_i = 0 removes a failed sample from the cotangent even when its stored latent is not finite."""
    v = torch.zeros(1, 2, 2, requires_grad=True)
    successors = torch.ones(1, 3, 2, 2)
    successors[0, 1] = math.nan
    logp = group_log_prob(torch.zeros(1, 2, 2), v, successors, table, torch.tensor([2]))
    mask = torch.tensor([[True, False, True]])
    clipped_surrogate(logp, logp, torch.ones(1, 3), None, mask).loss.sum().backward()
    assert v.grad is not None
    assert bool(v.grad.isfinite().all())


def longhand_cotangent(
    x: Tensor, v: Tensor, successors: Tensor, rows: list[tuple[float, float, float]], old: Tensor,
    advantage: Tensor, mask: Tensor, const: list[float], clip: float | None,
) -> tuple[list[list[float]], int]:  # fmt: skip
    """dL/dv = -(2*b*scale/(D*valid*groups)) * sum_i m_i*ratio_i*A_i*(next_i - mean), and how many were clipped."""
    gradients, clipped = [], 0
    for n, (a, b, scale) in enumerate(rows):
        xs, vs = x[n].flatten().tolist(), v[n].flatten().tolist()
        mean = [a * xi + b * vi for xi, vi in zip(xs, vs, strict=True)]
        total = [0.0] * len(mean)
        valid = sum(mask[n].tolist())
        for i in range(successors.shape[1]):
            apart = [y - m for y, m in zip(successors[n, i].flatten().tolist(), mean, strict=True)]
            logp = const[n] - scale * sum(t * t for t in apart) / len(apart)
            ratio, gain = math.exp(logp - float(old[n, i])), float(advantage[n, i])
            beyond = clip is not None and (ratio > 1 + clip if gain > 0 else ratio < 1 - clip)
            clipped += beyond and bool(mask[n, i])
            if bool(mask[n, i]) and not beyond:
                total = [t + ratio * gain * d for t, d in zip(total, apart, strict=True)]
        factor = -2 * b * scale / (len(mean) * valid * len(rows))
        gradients.append([factor * t for t in total])
    return gradients, clipped


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_cotangent(table: StepTable, dtype: torch.dtype, relative: float, clip: float | None) -> None:
    """Flow at s = 1 and later, CPS, dance and a deterministic row, with failed samples and both kinds of clipping."""
    index = torch.tensor([0, 2, 6, 17, 23, 27])
    generator = torch.Generator().manual_seed(8)
    x, v = torch.randn(2, 6, 3, 4, dtype=torch.float64, generator=generator).to(dtype)
    noise = torch.randn(6, 5, 3, 4, dtype=torch.float64, generator=generator).to(dtype)
    repeat = torch.arange(6).repeat_interleave(5)
    successors = sde_step(x[repeat], v[repeat], table, index[repeat], noise.flatten(0, 1)).next.unflatten(0, (6, 5))
    shift = torch.tensor([0.0, 0.4, -0.4, 0.3, -0.3], dtype=dtype)
    old = group_log_prob(x, v, successors, table, index) + shift
    advantage = torch.randn(6, 5, dtype=torch.float64, generator=generator).to(dtype)
    mask = torch.rand(6, 5, generator=generator) < 0.8
    mask[:, 0] = True
    assert not bool(mask.all())
    rows = [(float(table.a[k]), float(table.b[k]), float(table.logp_scale[k])) for k in index.tolist()]
    const = [float(table.logp_const[k]) for k in index.tolist()]
    expected, clipped = longhand_cotangent(x, v, successors, rows, old, advantage, mask, const, clip)

    velocity = v.clone().requires_grad_()
    result = clipped_surrogate(group_log_prob(x, velocity, successors, table, index), old, advantage, clip, mask)
    result.loss.mean().backward()
    assert velocity.grad is not None
    assert int(result.clipped.sum()) == clipped
    assert (clipped > 3) if clip else (clipped == 0)
    for actual, truth in zip(velocity.grad.flatten(1).tolist(), expected, strict=True):
        assert actual == pytest.approx(truth, abs=relative * max(map(abs, truth)))
    assert velocity.grad[5].abs().max() == 0


@pytest.mark.parametrize("variance", ["step", "diffusion"])
def test_kl(table: StepTable, variance: str) -> None:
    """KL of two Gaussians of the step's width; Flow-GRPO's variant divides by 2*g**2 with w = g*sqrt(|dt|)."""
    index = torch.tensor([2, 23, 17, 27, 0])
    generator = torch.Generator().manual_seed(4)
    mean, reference = torch.randn(2, 5, 3, 2, dtype=torch.float64, generator=generator)
    mean.requires_grad_()
    reference.requires_grad_()
    kl = mean_space_kl(mean, reference, table, index, variance)
    kl.sum().backward()
    assert kl.shape == (5,)
    assert mean.grad is not None
    assert reference.grad is None
    for n, k in enumerate(index.tolist()):
        w, dt = float(table.w[k]), float(table.sigma_next[k] - table.sigma[k])
        apart = (mean[n] - reference[n]).flatten().tolist()
        if w == 0:
            assert float(kl[n].detach()) == 0
            assert mean.grad[n].abs().max() == 0
            continue
        spread = w if variance == "step" else w / math.sqrt(abs(dt))
        assert float(kl[n].detach()) == pytest.approx(sum(t * t for t in apart) / 6 / (2 * spread**2), rel=1e-12)
        gradient = [t / (6 * spread**2) for t in apart]
        assert mean.grad[n].flatten().tolist() == pytest.approx(gradient, rel=1e-11)


def test_step_kl_is_the_kl_of_two_normals(table: StepTable) -> None:
    """Independent check by torch.distributions, in float32 as the trainer calls it."""
    index = torch.tensor([4, 24])
    mean, reference = torch.randn(2, 2, 8, 4, generator=torch.Generator().manual_seed(2))
    kl = mean_space_kl(mean, reference, table, index)
    width = table.w[index].float().reshape(2, 1, 1)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, width), torch.distributions.Normal(reference, width)
    )
    assert kl.dtype is torch.float32
    assert kl.tolist() == pytest.approx(exact.flatten(1).mean(1).tolist(), rel=1e-5)


def test_diffusion_variance_of_the_flow_scheme(table: StepTable) -> None:
    """Step 4 stands at s = 0.9: g**2 = 0.49*0.9/0.1 = 4.41, so unit distance costs 1/8.82."""
    mean = torch.ones(1, 2, 2, dtype=torch.float64)
    kl = mean_space_kl(mean, torch.zeros_like(mean), table, torch.tensor([4]), "diffusion")
    assert float(kl) == pytest.approx(1 / 8.82, rel=1e-12)


def test_step_weights(table: StepTable) -> None:
    """Equal gradient: inverse to |b|/(2w) for a Gaussian step and to |b|*w for CPS, 0 where nothing is trained."""
    index = torch.tensor([0, 6, 6, 17, 23, 27])
    assert step_weights(table, index).tolist() == [1.0] * 6
    weight = step_weights(table, index, "equal_gradient")
    inverse = []
    for k in index.tolist():
        b, w = abs(float(table.b[k])), float(table.w[k])
        inverse.append(0.0 if w == 0 else 1 / (b * w) if 16 <= k < 22 else 2 * w / b)
    expected = [value * 6 / sum(inverse) for value in inverse]
    assert weight.tolist() == pytest.approx(expected, rel=1e-12)
    assert float(weight.mean()) == pytest.approx(1.0, rel=1e-12)
    assert step_weights(table, torch.tensor([27, 26]), "equal_gradient").tolist() == [0.0, 0.0]


def test_equal_gradient_weights_of_the_official_steps(table: StepTable) -> None:
    """Step 0 pulls five times less than step 6 and so weighs five times more."""
    weight = step_weights(table, torch.tensor([0, 2, 4, 6]), "equal_gradient")
    assert float(weight[0] / weight[3]) == pytest.approx(0.158 / 0.031, rel=0.02)
    assert float(weight.mean()) == pytest.approx(1.0, rel=1e-12)


def test_guarded_ratio_by_hand(table: StepTable) -> None:
    """w (logp - old) + mean((mu - mu_old)^2)/(2w), for both members of a group; its gradient at mu_old is (next - mu)/(D w)."""
    index = torch.tensor([4])
    w = float(table.w[4])
    logp, old = torch.tensor([[-1.0, -2.0]], dtype=torch.float64), torch.tensor([[-1.5, -1.0]], dtype=torch.float64)
    mean, old_mean = torch.zeros(1, 1, 2, dtype=torch.float64), torch.tensor([[[0.3, -0.1]]], dtype=torch.float64)
    now, before = guarded(logp, old, mean, old_mean, table, index)
    bias = (0.09 + 0.01) / 2 / (2 * w)
    assert (now - before).flatten().tolist() == pytest.approx([0.5 * w + bias, -w + bias], rel=1e-12)
    x, v = torch.randn(2, 1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v.requires_grad_()
    mu = affine_mean(x, v, table, index)
    successor = mu.detach() + 0.2
    replayed = group_log_prob(x, v, successor.unsqueeze(1), table, index)
    now, before = guarded(replayed, replayed.detach(), mu, mu.detach(), table, index)
    (gradient,) = torch.autograd.grad((now - before).sum(), mu, retain_graph=True, allow_unused=True)
    assert not gradient.any()  # of the bias alone; the log-probability has its own way to v
    (gradient,) = torch.autograd.grad((now - before).sum(), v)
    assert gradient.flatten().tolist() == pytest.approx([float(table.b[4]) * 0.2 / (6 * w)] * 6, rel=1e-10)


def test_other_divergences_by_hand() -> None:
    """Of log-probabilities over valid samples, and of velocities; gradients flow into the first argument alone."""
    logp, old = torch.tensor([[1.0, 2.0, 9.0]], requires_grad=True), torch.tensor([[0.5, 3.0, 0.0]], requires_grad=True)
    found = log_prob_divergence(logp, old, torch.tensor([[True, True, False]]))
    found.sum().backward()
    assert found.tolist() == [(0.25 + 1.0) / 4]
    assert logp.grad is not None and logp.grad.tolist() == [[0.25, -0.5, 0.0]] and old.grad is None
    v, reference = torch.tensor([[[1.0, 3.0]]], requires_grad=True), torch.tensor([[[0.0, 1.0]]], requires_grad=True)
    apart = velocity_distance(v, reference, torch.float64)
    apart.sum().backward()
    assert apart.tolist() == [2.5] and apart.dtype is torch.float64
    assert v.grad is not None and v.grad.flatten().tolist() == [1.0, 2.0] and reference.grad is None


def test_unknown_options(table: StepTable) -> None:
    index = torch.tensor([0])
    with pytest.raises(ValueError, match="variance"):
        mean_space_kl(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), table, index, "exact")
    with pytest.raises(ValueError, match="weight"):
        step_weights(table, index, "linear")
