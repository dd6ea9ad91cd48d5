"""What only a CUDA device can show: repeated runs, CUDA graphs, no synchronisation. The rest is `-m gpu` of tests/kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adagrpo_kernels import (
    Draw,
    capability_step,
    group_log_prob,
    implementations,
    multi_reward_advantage,
    philox_normal,
    reset_counts,
    sde_step,
)
from triton_cases import TABLE, randn

pytestmark = pytest.mark.gpu
REPEATS = 1000


@pytest.fixture(autouse=True)
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: not measured")


class Buffers:
    """Fixed inputs of every operator at FLUX.1's size, and the device words a graph changes between replays."""

    def __init__(self) -> None:
        on = lambda t: t.to("cuda")  # noqa: E731
        self.table = TABLE.to("cuda")
        self.seed, self.iteration, self.step = (torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(3))
        self.rows, self.index = on(torch.arange(12) * 5), on(torch.arange(12) + 16)
        self.x, self.v = (on(randn(12, 1024, 64, seed=s, dtype=torch.bfloat16)) for s in (1, 2))
        self.successors = on(randn(4, 12, 1024, 64, seed=3, dtype=torch.bfloat16))
        self.rewards = on(randn(2, 4, 4, 12, seed=4).double())
        self.scores = on(randn(2, 4, 10, seed=5).double())
        self.state = [on(t) for t in (torch.zeros(2).double(), torch.ones(2).double(), torch.tensor([3, 3]))]
        self.weights = on(torch.tensor([1.0, 0.5]))

    def draw(self) -> Draw:
        return Draw(self.seed, self.rows, self.iteration, 3, self.step)

    def run(self) -> list[torch.Tensor]:
        """Every operator once; flat list of results."""
        step = sde_step(self.x, self.v, self.table, self.index, self.draw(), with_clean=True)
        v = self.v[:4].detach().requires_grad_()
        logp = group_log_prob(self.x[:4], v, self.successors, self.table, self.index[:4])
        (grad,) = torch.autograd.grad(logp.sum(), v)
        slots = self.draw()._replace(rows=self.rows[:4])
        picked = capability_step(self.scores, *self.state, 0.8, "random", self.weights, slots)
        advantage = multi_reward_advantage(self.rewards, picked.mean, picked.var, picked.folded, self.weights)
        noise = philox_normal(self.seed, self.rows, 65536, self.iteration, 0, self.step, torch.bfloat16)
        return [*step, logp.detach(), grad, *picked, *advantage, noise]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    bits = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}
    view = lambda t: t.contiguous().view(bits.get(t.dtype, t.dtype))  # noqa: E731
    return all(torch.equal(view(x), view(y)) for x, y in zip(a, b, strict=True))


def test_auto_runs_the_kernels() -> None:
    reset_counts()
    Buffers().run()
    assert set(implementations().values()) == {"triton"}


def test_repetitions_are_bitwise_equal() -> None:
    buffers = Buffers()
    first = buffers.run()
    assert all(same(first, buffers.run()) for _ in range(REPEATS))


def captured(run: Callable[[], list[torch.Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def test_graph_replays_equal_eager_while_the_counter_changes() -> None:
    """Seed, iteration and step are device memory: one graph serves every step of every iteration."""
    buffers = Buffers()
    graph, results = captured(buffers.run)
    for number in range(REPEATS):
        buffers.seed.fill_(number * 7919)
        buffers.iteration.fill_(number)
        buffers.step.fill_(number % 16)
        buffers.index.copy_((torch.arange(12, device="cuda") + number) % len(TABLE))
        graph.replay()
        if number % 50 == 0 or number < 5:
            assert same(results, buffers.run()), number
    assert same(results, buffers.run())


def test_nothing_synchronises() -> None:
    buffers = Buffers()
    buffers.run()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        buffers.run()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_step_equals_the_reference_on_the_device_and_on_the_cpu() -> None:
    """No contraction anywhere: eager CUDA, kernel and CPU agree to the last bit of `next`."""
    buffers = Buffers()
    buffers.seed.fill_(2**40 + 3)
    arguments = (buffers.x, buffers.v, buffers.table, buffers.index, buffers.draw())
    found = sde_step(*arguments, impl="triton")
    eager = sde_step(*arguments, impl="reference")
    cpu = sde_step(
        buffers.x.cpu(), buffers.v.cpu(), TABLE, buffers.index.cpu(), Draw(2**40 + 3, buffers.rows.cpu(), 0, 3, 0),
        impl="reference",
    )  # fmt: skip
    assert torch.equal(found.next, eager.next) and torch.equal(found.next.cpu(), cpu.next)
