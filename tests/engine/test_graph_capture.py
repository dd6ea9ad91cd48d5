"""Captures that fail, on a stand-in for torch.cuda that keeps torch's rules: what one leaves behind, and who hears of it."""

import contextlib

import pytest
import torch
from toy import ToyModel, toy_config, toy_trainer

from adagrpo.engine.graphs import StepGraphs
from adagrpo.recipe.keys import EngineConfig

OFF = "CUDA graphs are off: the step {} cannot be captured: {}"
BROKEN = "operation failed due to a previous error during capture"


class Cuda:
    """Streams, captures and the allocator, as far as captures touch them.

    ``invalidated``: the running capture can only end with an error, and such an end leaves the allocator capturing.
    """

    def __init__(self) -> None:
        self.stream, self.pools, self.held = "main", 0, {}
        self.capturing: object = None  # the pool the allocator serves
        self.invalidated, self.end_error = False, None
        self.calls: list[str] = []

    def graph(self) -> "Graph":
        return Graph(self)

    def new_pool(self) -> tuple[int, int]:
        self.pools += 1
        return (0, self.pools)

    @contextlib.contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def synchronize(self, device=None) -> None:
        assert self.capturing is None, "cudaErrorStreamCaptureUnsupported"
        self.calls.append("synchronize")

    def empty_cache(self) -> None:
        assert self.capturing is None, "the allocator frees nothing while it captures"
        self.calls.append("empty_cache")

    def end_allocation(self, index: int, pool) -> None:
        if self.capturing != pool:
            raise RuntimeError("not currently recording to mempool_id")
        self.capturing = None

    def release(self, index: int, pool) -> None:
        assert self.held[pool] > 0
        self.held[pool] -= 1


class Graph:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.pool, self.replays = cuda, None, 0

    def capture_begin(self, pool=None, **keywords) -> None:
        assert self.cuda.stream != "main" and self.cuda.capturing is None
        self.cuda.capturing = pool
        self.cuda.held[pool] = self.cuda.held.get(pool, 0) + 1

    def capture_end(self) -> None:
        broken, self.cuda.invalidated = self.cuda.invalidated, False
        if broken:
            raise RuntimeError(BROKEN)
        if self.cuda.end_error is not None:
            error, self.cuda.end_error = self.cuda.end_error, None
            raise error
        self.pool, self.cuda.capturing = self.cuda.capturing, None

    def replay(self) -> None:
        assert self.pool is not None
        self.replays += 1

    def reset(self) -> None:
        if self.pool is not None:
            self.cuda.held[self.pool] -= 1
            self.pool = None

    __del__ = reset


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    fake = Cuda()
    for name, stand_in in {
        "CUDAGraph": fake.graph,
        "graph_pool_handle": fake.new_pool,
        "Stream": lambda *_, **__: object(),
        "stream": fake.on,
        "synchronize": fake.synchronize,
        "empty_cache": fake.empty_cache,
        "memory_allocated": lambda device=None: 0,
        "current_device": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name, stand_in in {
        "_cuda_endAllocateToPool": fake.end_allocation,
        "_cuda_releasePool": fake.release,
        "_host_emptyCache": lambda: None,
    }.items():
        monkeypatch.setattr(torch._C, name, stand_in, raising=False)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    return fake


def assert_clean(cuda: Cuda) -> None:
    assert cuda.stream == "main" and cuda.capturing is None


class Step:
    """Counts its runs; fails with ``error`` while it is captured."""

    def __init__(self, cuda: Cuda, error: Exception | None = None, invalidates: bool = False) -> None:
        self.cuda, self.error, self.invalidates, self.runs = cuda, error, invalidates, 0

    def __call__(self) -> int:
        self.runs += 1
        if self.cuda.capturing is not None and self.error is not None:
            self.cuda.invalidated = self.invalidates
            raise self.error
        return self.runs


def graphs(told: list[str]) -> StepGraphs:
    return StepGraphs(torch.device("cuda"), told.append)


def test_a_step_is_captured_once_on_a_stream_of_its_own_and_replayed(cuda: Cuda) -> None:
    told: list[str] = []
    captures, x, steps = graphs(told), torch.zeros(2), [Step(cuda), Step(cuda)]
    for _ in range(4):
        for name, step in zip("ab", steps, strict=True):
            captures(name, step, [x])
    assert [step.runs for step in steps] == [2, 2] and not told
    assert [graph.replays for graph, _ in captures._graphs.values()] == [3, 3]
    assert cuda.pools == 1 and cuda.held == {(0, 1): 2}
    assert_clean(cuda)


@pytest.mark.parametrize("invalidates", [False, True], ids=["ends", "cannot end"])
@pytest.mark.parametrize("error", [RuntimeError("a read of the device"), KeyError("a"), NotImplementedError("no kernel")])
def test_a_step_that_cannot_be_captured_is_told_by_its_own_error(cuda: Cuda, error: Exception, invalidates: bool) -> None:
    told: list[str] = []
    captures, x, step = graphs(told), torch.zeros(2), Step(cuda, error, invalidates)
    sound = Step(cuda)
    for _ in range(2):
        captures("sound", sound, [x])
    assert [captures("step", step, [x]) for _ in range(4)] == [1, 3, 4, 5]
    assert told == [OFF.format("step", str(error))] and not captures.enabled and not captures.captured
    assert_clean(cuda)
    assert cuda.held == {(0, 1): 0}, "graphs that are gone, and one that never was, hold no memory"


def test_a_capture_that_fails_at_its_end_is_told_and_left(cuda: Cuda) -> None:
    told: list[str] = []
    captures, x, step = graphs(told), torch.zeros(2), Step(cuda)
    cuda.end_error = RuntimeError("CUDA error: operation would make the legacy stream depend on a capturing blocking stream")
    assert [captures("step", step, [x]) for _ in range(3)] == [1, 3, 4]
    assert len(told) == 1 and "legacy stream" in told[0]
    assert_clean(cuda)
    assert cuda.held == {(0, 1): 0}


@pytest.mark.parametrize("invalidates", [False, True], ids=["ends", "cannot end"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling")]
)
def test_out_of_memory_in_a_capture_is_out_of_memory(cuda: Cuda, error: Exception, invalidates: bool) -> None:
    told: list[str] = []
    captures, x, step = graphs(told), torch.zeros(2), Step(cuda, error, invalidates)
    captures("step", step, [x])
    with pytest.raises(type(error)) as raised:
        captures("step", step, [x])
    assert raised.value is error and captures.enabled and not told
    assert_clean(cuda)
    captures.forget()  # as the executor does when it halves the batch
    step.error = None
    for _ in range(3):
        captures("step", step, [x])
    assert captures.captured == ["step"] and cuda.held == {(0, 1): 0, (0, 2): 1}


def test_out_of_memory_while_a_graph_is_made_of_a_capture_is_out_of_memory(cuda: Cuda) -> None:
    captures, x, step = graphs([]), torch.zeros(2), Step(cuda)
    captures("step", step, [x])
    cuda.end_error = RuntimeError("CUDA error: out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        captures("step", step, [x])
    assert captures.enabled
    assert_clean(cuda)


def test_graphs_are_dropped_only_when_the_device_is_done(cuda: Cuda) -> None:
    captures, x, step = graphs([]), torch.zeros(2), Step(cuda)
    for _ in range(2):
        captures("step", step, [x])
    cuda.calls.clear()
    captures.forget()
    assert cuda.calls == ["synchronize"] and cuda.held == {(0, 1): 0}


class Hungry(ToyModel):
    """Out of memory beyond ``room`` rows while a step is captured; the capture cannot end then."""

    def __init__(self, cuda: Cuda, room: int) -> None:
        super().__init__()
        self.cuda, self.room = cuda, room

    def velocity(self, x, sigma, conditioning):
        if self.cuda.capturing is not None and x.shape[0] > self.room:
            self.cuda.invalidated = True
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().velocity(x, sigma, conditioning)


def test_an_iteration_whose_capture_runs_out_of_memory_goes_on_with_half_the_rows(cuda: Cuda) -> None:
    trainer = toy_trainer(toy_config(engine=EngineConfig(cuda_graphs=True)), Hungry(cuda, 8))
    told: list[str] = []
    trainer.notices.say = told.append
    trainer.executor.lanes.graphs = graphs(told)
    for _ in range(3):
        trainer.iteration()  # the stand-in replays nothing: what matters here is where errors go
    assert trainer.executor.limit.max_rows == 8 and trainer.executor.graphs.enabled
    assert told == ["out of memory while sampling: continuing with engine.max_rows = 8"]
    rows = {key[2] for key in trainer.executor.graphs.captured if key[0] != "prefix"}
    assert rows and max(rows) <= 8
    assert_clean(cuda)


def test_a_retry_waits_for_every_stream_before_it_drops_and_frees(cuda: Cuda) -> None:
    """The second stream may still decode a chunk of the failed attempt."""
    trainer = toy_trainer(toy_config())
    trainer.model.device, trainer.notices.say = torch.device("cuda"), lambda line: None
    forget = trainer.executor.lanes.forget
    trainer.executor.lanes.forget = lambda: cuda.calls.append("forget") or forget()
    tried: list[int] = []

    for attempt in trainer.attempts():
        with attempt:
            tried.append(1)
            trainer.executor.limit.chunks(16)
            if len(tried) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
    assert len(tried) == 2
    assert cuda.calls == ["synchronize", "forget", "empty_cache"]
