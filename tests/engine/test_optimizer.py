"""The policy optimizer: master weights, schedule, clipping, weight average, exact state."""

import copy
import math

import pytest
import torch
from torch import nn

from adagrpo.engine.optimizer import OptimizerSettings, PolicyOptimizer, lr_share


def test_schedule_by_hand() -> None:
    assert lr_share(0, 10, "constant", 0, 0.0) == 1
    assert [lr_share(s, 12, "linear", 2, 0.0) for s in (0, 1)] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert lr_share(2, 12, "linear", 2, 0.2) == 1
    assert lr_share(7, 12, "linear", 2, 0.2) == pytest.approx(0.6)
    assert lr_share(7, 12, "cosine", 2, 0.2) == pytest.approx(0.2 + 0.8 * (0.5 + 0.5 * math.cos(math.pi / 2)))
    assert lr_share(99, 12, "cosine", 2, 0.2) == pytest.approx(0.2)


def step_with(optimizer: PolicyOptimizer, parameter: nn.Parameter, gradient: float) -> float:
    parameter.grad = torch.full_like(parameter, gradient)
    return float(optimizer.step())


def test_small_updates_of_bf16_weights_are_not_lost() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = PolicyOptimizer([p], OptimizerSettings(lr=1e-4))
    for _ in range(50):
        step_with(optimizer, p, 1.0)
    # AdamW with a constant gradient moves lr per step; one bf16 step below 1 is 2**-8.
    assert optimizer.masters[0][0].item() == pytest.approx(1 - 50e-4, rel=1e-4)
    assert float(p[0]) == 1 - 2**-8 and optimizer.masters[0].dtype is torch.float32


def test_gradient_is_clipped_and_its_norm_reported() -> None:
    free, clipped = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    one, other = (
        PolicyOptimizer([free], OptimizerSettings(lr=0.1, eps=1.0, max_grad_norm=1e9)),
        PolicyOptimizer([clipped], OptimizerSettings(lr=0.1, eps=1.0)),
    )
    assert step_with(one, free, 3.0) == pytest.approx(6.0)
    assert step_with(other, clipped, 3.0) == pytest.approx(6.0)
    # First AdamW step: -lr * g / (|g| + eps), with g = 3 and g = 3 / 6.
    assert float(free[0]) == pytest.approx(-0.1 * 3 / 4, rel=1e-4)
    assert float(clipped[0]) == pytest.approx(-0.1 * 0.5 / 1.5, rel=1e-4)


def test_averaged_weights_are_swapped_in_and_out() -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = PolicyOptimizer([p], OptimizerSettings(lr=1.0, ema_decay=0.75))
    step_with(optimizer, p, 1.0)
    now = float(p)
    with optimizer.averaged_weights():
        assert float(p) == pytest.approx(0.25 * now)
    assert float(p) == now


def test_the_average_follows_every_few_steps_and_faster_at_first() -> None:
    """As Flow-GRPO's, which is told n, the steps done: moved where n + 1 is a multiple of 4, by 1 - min(0.5, (1+n)/(10+n));
    after 3 steps that is 9/13, after 7 it is 9/17, then the half that its decay allows."""
    p = nn.Parameter(torch.zeros(1))
    settings = OptimizerSettings(lr=1.0, ema_decay=0.5, ema_every=4, ema_warmup=True)
    optimizer, expected = PolicyOptimizer([p], settings), 0.0
    moves = {3: 9 / 13, 7: 9 / 17, 11: 0.5, 15: 0.5}
    for step in range(1, 17):
        step_with(optimizer, p, 1.0)
        expected += moves.get(step, 0.0) * (float(p) - expected)
        assert float(optimizer.averages[0]) == pytest.approx(expected, rel=1e-5)


def test_state_continues_bit_for_bit() -> None:
    def fresh() -> tuple[nn.Parameter, PolicyOptimizer]:
        p = nn.Parameter(torch.linspace(-1, 1, 8).to(torch.bfloat16))
        return p, PolicyOptimizer([p], OptimizerSettings(lr=1e-2, ema_decay=0.9, schedule="cosine", total_steps=10))

    p, optimizer = fresh()
    for i in range(4):
        step_with(optimizer, p, 0.1 * i)
    q, other = fresh()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in range(4):
        step_with(optimizer, p, math.sin(i))
        step_with(other, q, math.sin(i))
    assert torch.equal(p, q) and optimizer.lr == other.lr
    assert torch.equal(optimizer.averages[0], other.averages[0])
