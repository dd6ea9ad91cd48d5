"""torch.compile under many shapes: every one is compiled, none falls back or raises, and a failure is told."""

import json

import pytest
import torch
from small_flux import small_flux, table_of, velocity
from torch import Tensor, nn
from toy import PROMPTS, ToyModel, toy_config, toy_trainer

from adagrpo.forward import backends
from adagrpo.forward.device import out_of_memory
from adagrpo.forward.forwards import CopyForward, Forward, PolicyForward
from adagrpo.models.fused_flux import FusedFluxForward

OFFICIAL = (4, 10, 12, 24, 36, 48)
SIZES = ((16, 16), (16, 32), (16, 48), (32, 32), (16, 80), (32, 48), (16, 112))


class Compiler:
    """A backend that counts its graphs and runs them as they are; ``fails`` is raised instead."""

    def __init__(self, monkeypatch) -> None:
        self.graphs, self.ran = 0, 0
        self.fails: Exception | None = None
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda fn, **keywords: compile_(fn, **(keywords | {"backend": self})))

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        if self.fails is not None:
            raise self.fails
        self.graphs += 1

        def run(*args):
            self.ran += 1
            return graph(*args)

        return run


@pytest.fixture
def compiler(monkeypatch):
    """Hitting a recompile limit is an error, where it would be a warning and eager code."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield Compiler(monkeypatch)
    torch._dynamo.reset()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("blocks", [(1, 1), (0, 1)], ids=["official", "many"])
def test_norm_and_rope_are_compiled_at_every_shape(compiler: Compiler, blocks: tuple[int, int]) -> None:
    """The official schedule's row counts, and 42 shapes: torch's own limit is 8 for a function."""
    doubles, singles = blocks
    model = small_flux(num_layers=doubles, num_single_layers=singles)
    fused = FusedFluxForward(model, table_of(model), torch.float32, compiled=True)
    plain = FusedFluxForward(model, table_of(model), torch.float32)
    many = [(size, rows) for size in SIZES for rows in (2, 3, 4, 5, 6, 7)]
    shapes = [((32, 48), rows) for rows in OFFICIAL] if doubles else many
    # The accumulated limit counts over all copies in the process: as if earlier ones had used it up.
    with torch._dynamo.config.patch(accumulated_recompile_limit=5):
        for size, rows in shapes:
            model.resize(*size)
            assert distance(velocity(fused, model, rows), velocity(plain, model, rows)) < 1e-5
    kinds = doubles + singles
    assert compiler.graphs == compiler.ran == kinds * len(shapes)
    velocity(fused, model, shapes[-1][1])
    assert compiler.graphs == kinds * len(shapes) and compiler.ran == kinds * (len(shapes) + 1)
    assert torch._dynamo.config.recompile_limit == 8, "the limits of everybody else's functions"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


class Blocks(nn.Module):
    """Two blocks that diffusers would compile as one kind."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def compile_repeated_blocks(self, **keywords) -> None:
        for block in self.blocks:
            block.compile(**keywords)

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        x = x + text.mean(1)[:, None, None]
        for block in self.blocks:
            x = block(x)
        return x


class BlockModel(ToyModel):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = self._active = Blocks()


def toy_velocity(forward: Forward, model: BlockModel, rows: int, length: int) -> Tensor:
    order = torch.zeros(rows, dtype=torch.int64)
    prepared = forward.prepare(model.encode(["a"]))
    return forward.velocity(torch.ones(rows, length, 8), order, prepared, order)


def test_blocks_are_compiled_at_every_shape(compiler: Compiler) -> None:
    model = BlockModel()
    compiled, plain = CopyForward(model, table_of(model), torch.float32, compiled=True), PolicyForward(model, table_of(model))
    shapes = [(rows, length) for rows in (*OFFICIAL, 1, 2) for length in range(3, 8)]
    with torch.no_grad(), torch._dynamo.config.patch(accumulated_recompile_limit=30):
        for shape in shapes:
            assert distance(toy_velocity(compiled, model, *shape), toy_velocity(plain, model, *shape)) < 1e-6
    assert len(shapes) == 40 and compiler.graphs == 40 and compiler.ran == 80  # one graph a shape for both blocks
    with torch.no_grad():
        for p in model.transformer.parameters():
            p.add_(torch.ones_like(p))
        compiled.refresh()
        assert distance(toy_velocity(compiled, model, *shapes[0]), toy_velocity(plain, model, *shapes[0])) < 1e-6
    assert compiler.graphs == 40, "weights are read, not baked in"


@pytest.mark.proof
def test_fluxs_blocks_are_three_graphs_for_each_number_of_rows(compiler: Compiler) -> None:
    model = small_flux(num_layers=2, num_single_layers=2)
    forward, plain = (CopyForward(model, table_of(model), torch.float32, compiled=flag) for flag in (True, False))
    for rows in OFFICIAL:
        assert distance(velocity(forward, model, rows), velocity(plain, model, rows)) < 1e-6
    assert 12 <= compiler.graphs <= 18 and compiler.ran == 24


@pytest.mark.parametrize("name", ["fused", "compile"])
def test_what_cannot_be_compiled_is_told_once_and_runs_plain(compiler: Compiler, name: str) -> None:
    compiler.fails = RuntimeError("ptxas: no such file\nmore")
    model, told = small_flux(), []
    kind = FusedFluxForward if name == "fused" else CopyForward
    forward, plain = (kind(model, table_of(model), torch.float32, compiled=flag, say=told.append) for flag in (True, False))
    for _ in range(2):
        assert torch.equal(velocity(forward, model), velocity(plain, model))
    assert len(told) == 1 and told[0].startswith(f"engine.forward = {name}: ") and "ptxas: no such file" in told[0]
    assert "uncompiled from now on" in told[0] and "\n" not in told[0]


def test_a_compilation_that_was_asked_for_and_fails_ends_the_run(compiler: Compiler) -> None:
    from adagrpo.errors import RunError

    compiler.fails = RuntimeError("no room on the disk")
    model = small_flux()
    forward = CopyForward(model, table_of(model), torch.float32, compiled=True)
    with pytest.raises(
        RunError, match=r"engine.forward = compile: .*no room on the disk.*use another engine.forward, such as eager"
    ):
        velocity(forward, model)


def test_out_of_memory_and_errors_of_the_computation_are_not_taken_for_the_compilers(compiler: Compiler) -> None:
    model, told = small_flux(), []
    forward = FusedFluxForward(model, table_of(model), torch.float32, compiled=True, say=told.append)
    velocity(forward, model)
    attend = forward.attend

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    forward.attend = out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        velocity(forward, model)
    forward.attend = attend
    before = compiler.ran
    velocity(forward, model)
    assert not told and compiler.ran == before + 2


def test_memory_that_runs_out_is_known_by_every_name() -> None:
    compiling = RuntimeError("backend='inductor' raised")
    compiling.inner_exception = torch.OutOfMemoryError("CUDA out of memory")
    assert out_of_memory(compiling) and out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not out_of_memory(RuntimeError("shape mismatch")) and not out_of_memory(ValueError("CUDA out of memory"))


def test_a_forward_that_is_not_compiled_says_why(monkeypatch) -> None:
    """``auto`` and ``fused`` degrade where torch.compile cannot run; the run is told."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    model, told = small_flux(), []
    cuda = torch.device("cuda")
    assert "TORCH_COMPILE_DISABLE" in (backends.forward_problem("compile", cuda) or "")
    monkeypatch.setattr(type(model), "device", property(lambda self: cuda))
    monkeypatch.setattr(backends, "make_copy", lambda *args: args)
    assert backends.build_forward(model, None, "auto", say=told.append) is None
    assert backends.build_forward(model, None, "fused", say=told.append)[5] is False
    assert [line.split(":")[0] for line in told] == ["engine.forward = auto is eager here", "engine.forward = fused"]
    assert all("TORCH_COMPILE_DISABLE" in line for line in told)


def test_notices_of_a_run_are_events(tmp_path) -> None:
    from adagrpo.run.fit import Fit
    from adagrpo.run.folder import RunFolder

    trainer = toy_trainer(toy_config())
    run = RunFolder(tmp_path)
    trainer.notices("engine.forward = auto is eager here")  # told before there was a run
    fit = Fit(trainer.config, trainer, run, PROMPTS, say=lambda line: None)
    for message in ("engine.forward = fused: uncompiled", "out of memory while sampling: continuing"):
        trainer.notices.say(message)
    fit.telling.notices()
    fit.telling.notices()
    lines = (run.path / "events.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["warning", "memory", "warning"]


@pytest.mark.proof
@pytest.mark.parametrize("name", ["fused", "compile"])
def test_inductor_itself_compiles_more_shapes_than_torchs_limit(name: str) -> None:
    """Nine row counts of one block, where the limit is eight; the graphs are counted where inductor receives them."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, told = small_flux(num_layers=0), []
    kind = FusedFluxForward if name == "fused" else CopyForward
    forward, plain = (kind(model, table_of(model), torch.float32, compiled=flag, say=told.append) for flag in (True, False))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for rows in range(2, 11):
            assert distance(velocity(forward, model, rows), velocity(plain, model, rows)) < 1e-5
    assert not told and counters["stats"]["unique_graphs"] == 9
    torch._dynamo.reset()
