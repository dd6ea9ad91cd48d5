"""What only a CUDA device can show: repeated runs, CUDA graphs, no synchronisation. The rest is `-m gpu` of tests/kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adagrpo_kernels import (
    Draw,
    capability_step,
    gelu_join,
    group_log_prob,
    implementations,
    layer_norm_modulate,
    multi_reward_advantage,
    philox_normal,
    quantize_rowwise,
    quantize_rowwise_reference,
    reset_counts,
    sde_step,
)
from triton_cases import TABLE, randn

from adagrpo.engine.graphs import StepGraphs

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
        self.product = on(randn(2, 160, 21504, seed=6, dtype=torch.bfloat16))
        self.vectors = on(randn(2, 6 * 3072, seed=7, dtype=torch.bfloat16)).chunk(6, 1)

    def draw(self) -> Draw:
        return Draw(self.seed, self.rows, self.iteration, 3, self.step)

    def run_rows(self) -> list[torch.Tensor]:
        """The operators of a transformer block on views of a wider product; values of FP8 as bytes."""
        tokens, attention = self.product[..., :3072], self.product[..., 6144:9216]
        results = [
            layer_norm_modulate(tokens[:, 32:], self.vectors[0], self.vectors[4]),
            *layer_norm_modulate(tokens[:, 32:], self.vectors[0], self.vectors[4], quantized=True),
            gelu_join(self.product[..., 9216:], attention),
            *gelu_join(self.product[..., 9216:], attention, quantized=True),
            *gelu_join(self.product[:, 32:, 9216:], quantized=True),
            *quantize_rowwise(attention[:, 32:]),
        ]
        return [t.view(torch.uint8) if t.dtype is torch.float8_e4m3fn else t for t in results]

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
        return [*step, logp.detach(), grad, *picked, *advantage, noise, *self.run_rows()]


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [3072, 12288, 15360])
def test_quantised_rows_equal_the_reference_on_the_device_and_on_the_cpu(size: int, dtype: torch.dtype) -> None:
    """Hardware cast and true division: eager CUDA, kernel and CPU agree to the last bit."""
    x = (randn(64, size, seed=1) * torch.exp(10 * randn(64, 1, seed=2))).to(dtype)
    expected = quantize_rowwise_reference(x)
    for impl in ("triton", "reference"):
        found = quantize_rowwise(x.cuda(), impl)
        assert torch.equal(found.scale.cpu(), expected.scale)
        assert torch.equal(found.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))


def test_scaled_mm_takes_the_operands() -> None:
    """Rowwise scales of both operands, as a transformer block uses them."""
    x, w = randn(512, 3072, seed=1, dtype=torch.bfloat16).cuda(), randn(1024, 3072, seed=2, dtype=torch.bfloat16).cuda()
    a, b = quantize_rowwise(x, "triton"), quantize_rowwise(w, "triton")
    found = torch._scaled_mm(a.values, b.values.t(), scale_a=a.scale, scale_b=b.scale.t(), out_dtype=torch.bfloat16)
    exact = x.double() @ w.double().t()
    assert float((found.double() - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("as if")], ids=["read", "memory"])
def test_a_broken_capture_leaves_a_device_that_captures(error: Exception | None) -> None:
    """A read of the device invalidates the capture; afterwards the stream is the default one and the allocator frees."""
    told: list[str] = []
    graphs, x, broken = StepGraphs(torch.device("cuda"), told.append), torch.zeros(4, device="cuda"), [True]

    def step() -> float:
        y = x.add_(1).sum()
        if broken[0] and torch.cuda.is_current_stream_capturing():
            if error is not None:
                raise error
            return y.item()
        return 0.0

    graphs("step", step, [x])
    if error is None:
        assert graphs("step", step, [x]) == 0.0 and "cannot be captured" in told[0]
    else:
        with pytest.raises(torch.OutOfMemoryError, match="as if"):
            graphs("step", step, [x])
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    held = torch.cuda.memory_reserved()
    big = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del big
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held
    broken[0], fresh, before = False, StepGraphs(torch.device("cuda"), told.append), x.clone()
    for _ in range(5):
        fresh("step", step, [x])
    assert torch.equal(x, before + 5) and fresh.captured
