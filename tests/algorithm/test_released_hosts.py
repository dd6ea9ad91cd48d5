"""Our functions with the keys of each host against the numbers that its released code computed."""

from __future__ import annotations

import pytest
import torch
from adagrpo_kernels import History
from hosts import CLOSE, Released, distance
from torch import Tensor

from adagrpo.algorithm.advantages import Scale, reward_advantage
from adagrpo.algorithm.sde import sde_step, sigma_schedule, step_table
from adagrpo.algorithm.selection import CapabilityState
from adagrpo.algorithm.tables import Granularity, levels_at, rollout_table

GROUP, ALL, SUM = Scale("group", 0, 1e-4), Scale("global", 0, 1e-4), Scale(clip_sum=True)


def rewards_of(host: Released, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rewards [M, groups, G] and the weights of the M rewards."""
    names = [name.removeprefix("in.") for name in host.tensors if name.startswith("in.rewards")]
    if names == ["rewards_1", "rewards_2"]:  # [granularities, members, steps]: they are summed as rewards are
        stacked = torch.cat([host.given(name, dtype) for name in names]).movedim(1, 2)
        return stacked, torch.ones(len(stacked))
    if "rewards.hps" in names:
        weights: dict[str, float] = host.setting("reward_weights")
        return torch.stack([host.given(f"rewards.{name}", dtype) for name in weights]), torch.tensor([*weights.values()])
    rewards = host.given("rewards", dtype)
    if rewards.ndim == 3:  # [seeds, branches, steps]: a group per seed and step
        rewards = rewards.movedim(1, 2).flatten(0, 1)
    return rewards.unsqueeze(0), torch.ones(1)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    ("name", "key", "scale"),
    [
        ("flow_grpo", "advantage", GROUP), ("flow_grpo", "advantage_global_std", ALL), ("flow_cps", "advantage", GROUP),
        ("dance_grpo", "advantage", SUM), ("mixgrpo", "advantage", SUM), ("tempflow", "advantage", GROUP),
        ("flash_grpo", "advantage", GROUP), ("g2rpo", "advantage", SUM),
    ],
)  # fmt: skip
def test_advantages(name: str, key: str, scale: Scale, dtype: torch.dtype, impl: str) -> None:
    host = Released(name)
    rewards, weights = rewards_of(host, dtype)
    level = CapabilityState.for_rewards(len(rewards))
    found = reward_advantage(rewards, level, weights, 5.0, 0.0, "mass", impl, scale).advantage
    truth = host.found(key)
    truth = truth.movedim(1, 2).flatten(0, 1) if truth.ndim == 3 else truth.T if name == "g2rpo" else truth
    assert found.dtype is dtype
    assert distance(found, truth) < CLOSE[dtype]


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(("key", "scale"), [("", GROUP), ("_global_std", ALL)])
def test_a_group_of_equal_rewards_counts_in_the_spread_of_all(key: str, scale: Scale, impl: str) -> None:
    """Flow-GRPO's fixture with one group of equal rewards; they leave a rounding there, we an exact 0."""
    host = Released("flow_grpo")
    rewards = host.given("rewards_one_group_equal").unsqueeze(0)
    found = reward_advantage(rewards, CapabilityState.for_rewards(1), torch.ones(1), 5.0, 0.0, "mass", impl, scale).advantage
    assert int((found == 0).all(1).sum()) == 1
    assert distance(found, host.found(f"advantage_one_group_equal{key}")) < 1e-6


@pytest.mark.parametrize("name", ["post.midpoint.r06", "post.midpoint.r10", "post.order1.r06"])
def test_a_tail_goes_on_from_the_last_stochastic_step(name: str) -> None:
    """MixGRPO-Flash: their velocities and noise; after the window the levels that their share of what is left makes, by
    DPM-Solver++ 2M, second order from its first step on."""
    host = Released("mixgrpo_dpm_tail")
    latents, sigmas, given = host.found(f"{name}.latents"), host.found(f"{name}.sigmas"), host.setting(name)
    sde_steps, solver = given["sde_steps"], "dpmpp2m" if given["dpm_solver_order"] == 2 else "euler"
    last, options = sde_steps[-1], {"tail_past": True, "tail_share": given["dpm_post_compress_ratio"]}
    levels = sigma_schedule(10, 3.0)
    levels[: last + 1] = sigmas[: last + 1]  # theirs before the tail are rounded to float32
    table = rollout_table(levels, "flow", 0.7, (last,), 0, solver, **options)
    head = [k + 10 if k in sde_steps else k for k in range(last + 1)]
    rows = torch.tensor([*head, *table.tails[last][0]])
    assert table.steps.rows(rows).sigma.tolist() == pytest.approx(sigmas[:-1].tolist(), abs=1e-12)
    assert torch.equal(table.sigmas[table.position], table.steps.sigma)
    x = host.given("latent")
    clean = torch.zeros_like(x)
    for i, row in enumerate(rows):
        noise = host.given("noise")[i] if i in sde_steps else None
        index, history = row.repeat(len(x)), History(clean, table.history)
        step = sde_step(x, host.given("velocities")[i], table.steps, index, noise, history=history, with_clean=True)
        x, clean = step.next, step.clean
        assert distance(x, latents[:, i + 1]) < 1e-12
    assert i + 2 == len(sigmas) and sigmas[-1] == 0


def test_levels_between_those_of_a_grid() -> None:
    """Of shift 3 they are the shifted times; where the shift goes from 2 to 8 between two levels, it is 4 halfway."""
    shifted = lambda shift, time: shift * time / (1 + (shift - 1) * time)  # noqa: E731
    places = [0, 0.5, 1, 2.25, 3.9, 4]
    found = levels_at(sigma_schedule(4, 3.0), places).tolist()
    assert found == pytest.approx([shifted(3, 1 - p / 4) for p in places], rel=1e-12)
    uneven = torch.tensor([1.0, shifted(2, 2 / 3), shifted(8, 1 / 3), 0.0], dtype=torch.float64)
    assert float(levels_at(uneven, [1.5])) == pytest.approx(shifted(4, 0.5), rel=1e-12)


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("fork", range(4))
def test_tails_of_several_granularities(fork: int, step: int) -> None:
    """G2RPO: their noise levels, but where a tail misses the grid's end; there their image is the clean prediction of the step
    before, which is a step from there to the end. By default the tail goes on from where it missed it."""
    host, key = Released("g2rpo"), f"tail.step{fork}.g{step}"
    sigmas, theirs = host.given("sigmas"), host.found(f"{key}.sigmas")[fork + 1 :]
    points = Granularity(step, released=True).points(fork, 10)
    assert points[0] == fork + 1 and points[-1] == 10
    assert sigmas[points[:-1]].tolist() == pytest.approx(theirs[:-1].tolist(), abs=1e-6)
    table = step_table("ode", sigmas[points])
    index, x = torch.zeros(4, dtype=torch.int64), host.given("next")[:, fork]
    for i in range(len(points) - 1):
        x = sde_step(x, host.given("tail_velocity")[i], table.rows(torch.tensor([i])), index).next
    assert distance(x, host.found(f"{key}.final")) < 1e-6
    default = Granularity(step).points(fork, 10)
    assert default == ([*points[:-1], points[-2] + step, 10] if theirs[-1] > 0 else points)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_floor_under_the_spread(impl: str) -> None:
    """0.25 x 0.4 of the level's spread beside each group's own: a group that hardly differs counts next to nothing."""
    rewards = torch.tensor([[[0.0, 0.2, 0.4], [1.0, 1.002, 1.004]]], dtype=torch.float64)
    level = CapabilityState(*(torch.tensor([value], dtype=torch.float64) for value in (0.5, 0.16)), torch.ones(1).long())
    scale = Scale("floored", 1, 1e-8, floor=0.25)
    found = reward_advantage(rewards, level, torch.ones(1), 5.0, 0.0, "mass", impl, scale).advantage
    for row, step in zip(found.tolist(), (0.2, 0.002), strict=True):
        assert row == pytest.approx([-step / (step + 0.1 + 1e-8), 0, step / (step + 0.1 + 1e-8)], rel=1e-12)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_undivided_and_clamped_as_a_sum(impl: str) -> None:
    """Two rewards of weights 1 and 2 pull the first sample by -3 and by 2 x 4; each part passes the clip of 2.5."""
    rewards = torch.tensor([[[-2.0, 4.0]], [[8.0, 0.0]]], dtype=torch.float64)
    level, weights = CapabilityState.for_rewards(2), torch.tensor([1.0, 2.0])
    clamped = lambda clip_sum: reward_advantage(  # noqa: E731
        rewards, level, weights, 2.5, 0.0, "mass", impl, Scale("none", clip_sum=clip_sum)
    ).advantage.tolist()
    assert clamped(False) == [[-2.5 + 2 * 2.5, 2.5 - 2 * 2.5]]
    assert clamped(True) == [[2.5, -2.5]]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_spread_of_all_is_over_valid_samples(impl: str) -> None:
    """Rewards 0 2 | 5 9 with a failed sample in each group: deviations 1 and 2, variance (16 + 4 + 1 + 25)/3 around 4."""
    rewards = torch.tensor([[[0.0, 2.0, torch.nan], [torch.inf, 5.0, 9.0]]], dtype=torch.float64)
    scale, level = Scale("global", 1, 0.0), CapabilityState.for_rewards(1)
    found = reward_advantage(rewards, level, torch.ones(1), 5.0, 0.0, "mass", impl, scale).advantage
    std = (46 / 3) ** 0.5
    assert found.flatten().tolist() == pytest.approx([-1 / std, 1 / std, 0, 0, -2 / std, 2 / std], rel=1e-12)
