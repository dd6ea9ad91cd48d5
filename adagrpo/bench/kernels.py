"""``adagrpo bench kernels``: time the kernels against eager and compiled references on a CUDA device.

Columns: case, shape, dtype, microseconds (quantiles 0.5, 0.2, 0.8), bytes by the model in `kernels/README.md`, GB/s, share of
the copy bandwidth measured in the same run, times eager and torch.compile, error against float64. All of them are timed inside
CUDA graphs with a cold L2. Under 10 us a share reads "launch-bound".
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from adagrpo_kernels import (
    Draw,
    StepTable,
    capability_step,
    gelu_join,
    gelu_join_reference,
    group_log_prob,
    group_log_prob_reference,
    layer_norm_modulate,
    layer_norm_modulate_reference,
    multi_reward_advantage,
    philox_normal,
    quantize_rowwise,
    quantize_rowwise_reference,
    sde_step,
    sde_step_reference,
    sigma_schedule,
    step_table,
)

from ..errors import InputError
from ..text.strict_json import to_json
from .records import new_record
from .statistics import Series
from .timers import GraphTimer, Timer

SHORT = 10e-6
Row = dict[str, Any]
Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes that are timed: FLUX.1's, at 512x512 and 1024x1024.

    Attributes:
        latent: tokens and channels of one image.
        steps, noise: rows of a step, and of noise.
        groups: latents and successors of each.
        advantages: rewards and slots.
        slots: of a selection.
        tokens: images and their tokens, text and picture.
        text: how many of those tokens are text.
        width, mlp: of the transformer.
        copied: float32 elements of the copy that bandwidth is measured by.
    """

    latent: tuple[int, int] = (1024, 64)
    steps: tuple[int, ...] = (12, 48, 1024)
    noise: tuple[int, ...] = (12, 1024)
    groups: tuple[tuple[int, int], ...] = ((4, 12), (48, 12), (256, 12), (512, 1))
    advantages: tuple[tuple[int, int], ...] = ((1, 1), (3, 8), (3, 48))
    slots: tuple[int, ...] = (1, 8, 48)
    tokens: tuple[tuple[int, int], ...] = ((12, 1536), (1, 4608))
    text: int = 512
    width: int = 3072
    mlp: int = 12288
    copied: int = 2**28


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where and how kernels are timed.

    Attributes:
        seconds: the timer of every column.
        compile: torch.compile for one shape: earlier cases would make it dynamic, or eager beyond the recompile limit.
    """

    device: torch.device
    seconds: Timer
    compile: Callable[[Callable[..., Any]], Callable[..., Any]]
    sizes: Sizes = Sizes()

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def copy_bandwidth(self) -> float:
        """Bytes per second of a device copy, read and written."""
        source = torch.empty(self.sizes.copied, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() * 4 / self.seconds(lambda: target.copy_(source))[0]

    def table(self) -> StepTable:
        """Rows 0-15 deterministic, 16-31 flow."""
        sigmas = sigma_schedule(16, 3.0)
        tables = [step_table("ode", sigmas), step_table("flow", sigmas, 0.7)]
        return StepTable.concat(tables).to(self.device, torch.float32)


def on_cuda(device: torch.device) -> Bench:
    """Timed by graph, compared with torch.compile."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    return Bench(device, GraphTimer(device), compiled)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table before it is measured.

    Attributes:
        moved: bytes by the model in `kernels/README.md`.
        others: further calls by the name of their column, such as ``eager`` for ``x_eager``.
        error: largest error against float64.
    """

    case: str
    shape: str
    dtype: str
    moved: int
    run: Call
    others: Mapping[str, Call] = dataclasses.field(default_factory=dict)
    error: Callable[[], float] | None = None


def measure(case: Case, bench: Bench, copy: float) -> Row:
    """The row of ``case``; ``copy`` is the bandwidth of a copy in bytes per second."""
    times = bench.seconds(case.run)
    rate, short = case.moved / times[0], times[0] < SHORT
    row: Row = {"case": case.case, "shape": case.shape, "dtype": case.dtype}
    row |= {"us": [round(t * 1e6, 3) for t in times], "bytes": case.moved, "GB/s": round(rate / 1e9, 1)}
    row["of_copy"] = "launch-bound" if short else round(rate / copy, 3)
    for name, other in case.others.items():
        row[f"x_{name}"] = round(bench.seconds(other)[0] / times[0], 3)
    if case.error is not None:
        row["max_error"] = case.error()
    return row


def storages() -> Iterator[tuple[torch.dtype, str]]:
    yield torch.bfloat16, "bf16"
    yield torch.float32, "fp32"


def sde_step_cases(bench: Bench) -> Iterator[Case]:
    steps, device = bench.table(), bench.device
    for rows in bench.sizes.steps:
        for dtype, name in storages():
            shape = (rows, *bench.sizes.latent)
            x, v = (bench.randn(*shape, dtype=dtype) for _ in range(2))
            noise, index = bench.randn(*shape), torch.full((rows,), 18, device=device)
            numel, text = x.numel(), "x".join(map(str, shape))
            draw = Draw(1, torch.arange(rows, device=device), 2, 3, 4).on_device()
            run = functools.partial(sde_step, x, v, steps, index, with_mean=False, impl="triton")
            eager = functools.partial(sde_step_reference, x, v, steps, index, noise)
            compiled = bench.compile(lambda x, v, i, n: sde_step_reference(x, v, steps, i, n)[::2])

            error = functools.partial(_step_error, run, x, v, steps, index, noise)
            yield Case(
                "given noise", text, name, numel * (3 * x.itemsize + 4) + 4 * rows, functools.partial(run, noise),
                {"eager": eager, "compile": functools.partial(compiled, x, v, index, noise)}, error,
            )  # fmt: skip
            randn = functools.partial(torch.randn, shape, device=device)
            yield Case(
                "drawn noise", text, name, numel * 3 * x.itemsize + 4 * rows, functools.partial(run, draw),
                {"randn_and_step": functools.partial(_chained, run, randn)},
            )  # fmt: skip


def _chained(run: Callable[..., object], given: Callable[[], object]) -> object:
    return run(given())


def _step_error(run: Callable[..., Any], x: torch.Tensor, v: torch.Tensor, steps: StepTable, index: torch.Tensor,
                noise: torch.Tensor) -> float:  # fmt: skip
    truth = sde_step_reference(x.double(), v.double(), steps, index, noise.double()).next
    return float((run(noise).next.double() - truth).abs().max())


def philox_cases(bench: Bench) -> Iterator[Case]:
    numel = bench.sizes.latent[0] * bench.sizes.latent[1]
    for rows in bench.sizes.noise:
        for dtype, name in storages():
            draw = Draw(1, torch.arange(rows, device=bench.device), 2, 3, 4).on_device()
            counters = (draw.iteration, draw.stream, draw.step)
            run = functools.partial(philox_normal, draw.seed, draw.rows, numel, *counters, dtype=dtype, impl="triton")
            eager = functools.partial(bench.randn, rows, numel, dtype=dtype)
            moved = rows * numel * dtype.itemsize
            yield Case("normal noise; eager is randn", f"{rows}x{numel}", name, moved, run, {"eager": eager})


def group_log_prob_cases(bench: Bench) -> Iterator[Case]:
    steps, latent = bench.table(), bench.sizes.latent
    for latents, group in bench.sizes.groups:
        for dtype, name in storages():
            x, v = (bench.randn(latents, *latent, dtype=dtype) for _ in range(2))
            successors = bench.randn(latents, group, *latent, dtype=dtype)
            index = torch.full((latents,), 18, device=bench.device)
            moved = (2 + group) * x.numel() * dtype.itemsize + 4 * latents * group
            text = "x".join(map(str, successors.shape))
            compiled = bench.compile(functools.partial(group_log_prob_reference, table=steps))
            given = {"x": x, "index": index, "successors": successors}
            calls: dict[str, Callable[..., torch.Tensor]] = {
                "run": functools.partial(group_log_prob, table=steps, impl="triton", **given),
                "eager": functools.partial(group_log_prob_reference, table=steps, **given),
                "compile": functools.partial(compiled, **given),
            }
            plain: dict[str, Call] = {key: functools.partial(call, v=v) for key, call in calls.items()}
            error = functools.partial(_log_prob_error, calls["run"], x, v, successors, steps, index)
            yield Case("forward", text, name, moved, plain.pop("run"), plain, error)
            leaf, upstream = v.clone().requires_grad_(), bench.randn(latents, group)
            both: dict[str, Call] = {key: functools.partial(_gradient, call, leaf, upstream) for key, call in calls.items()}
            yield Case("forward and backward", text, name, 2 * moved + x.numel() * 4, both.pop("run"), both)


def _gradient(call: Callable[..., torch.Tensor], leaf: torch.Tensor, upstream: torch.Tensor) -> object:
    return torch.autograd.grad(call(v=leaf), leaf, upstream)


def _log_prob_error(run: Callable[..., torch.Tensor], x: torch.Tensor, v: torch.Tensor, successors: torch.Tensor,
                    steps: StepTable, index: torch.Tensor) -> float:  # fmt: skip
    truth = group_log_prob_reference(x.double(), v.double(), successors.double(), steps, index)
    return float((run(v=v).double() - truth).abs().max())


def fused_advantage_cases(bench: Bench) -> Iterator[Case]:
    for rewards, slots in bench.sizes.advantages:
        values = torch.randn(rewards, slots, 4, 12, dtype=torch.float64, device=bench.device)
        mean, std = (torch.full((rewards,), n, dtype=torch.float64, device=bench.device) for n in (0.5, 0.3))
        count, weights = torch.full((rewards,), 3, device=bench.device), torch.ones(rewards, device=bench.device)
        run = functools.partial(multi_reward_advantage, values, mean, std, count, weights)
        moved = values.numel() * 8 * 3 + values[0].numel() * 8
        yield _with_reference("mass, with statistics", f"{rewards}x{slots}x4x12", moved, run)


def capability_step_cases(bench: Bench) -> Iterator[Case]:
    for strategy in ("closest", "medium"):
        for slots in bench.sizes.slots:
            scores = torch.randn(1, slots, 10, dtype=torch.float64, device=bench.device)
            mean, var = (torch.ones(1, dtype=torch.float64, device=bench.device) for _ in range(2))
            count = torch.ones(1, dtype=torch.int64, device=bench.device)
            run = functools.partial(capability_step, scores, mean, var, count, 0.8, strategy)
            yield _with_reference(strategy, f"1x{slots}x10", scores.numel() * 24, run)


def _with_reference(case: str, shape: str, moved: int, operator: Callable[..., object]) -> Case:
    """A float64 operator beside its own reference."""
    run, eager = (functools.partial(operator, impl=impl) for impl in ("triton", "reference"))
    return Case(case, shape, "fp64", moved, run, {"eager": eager})


def quantize_rowwise_cases(bench: Bench) -> Iterator[Case]:
    width, mlp, text = bench.sizes.width, bench.sizes.mlp, bench.sizes.text
    for dtype, name in storages():
        for size in (width, mlp, width + mlp):
            for images, length in bench.sizes.tokens:
                x = bench.randn(images, length, size, dtype=dtype)[:, text:]
                moved = x.numel() * (dtype.itemsize + 1) + images * (length - text) * 4
                others = {
                    "eager": functools.partial(quantize_rowwise_reference, x),
                    "compile": functools.partial(bench.compile(quantize_rowwise_reference), x),
                }
                run = functools.partial(quantize_rowwise, x, "triton")
                yield Case("slice of tokens", f"{images}x{length - text}x{size}", name, moved, run, others)


def layer_norm_modulate_cases(bench: Bench) -> Iterator[Case]:
    """Eager is the reference for FP8, and the model's own operations in the dtype of ``x`` otherwise."""
    width = bench.sizes.width

    def model(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    for dtype, name in storages():
        for images, length in bench.sizes.tokens:
            x = bench.randn(images, length, width, dtype=dtype)
            shift, scale, *_ = bench.randn(images, 6 * width, dtype=dtype).chunk(6, 1)
            for quantized in (False, True):
                moved = x.numel() * (dtype.itemsize + (1 if quantized else dtype.itemsize)) + quantized * images * length * 4
                moved += 2 * shift.numel() * dtype.itemsize
                eager = functools.partial(layer_norm_modulate_reference, quantized=True) if quantized else model
                run = functools.partial(layer_norm_modulate, x, shift, scale, quantized=quantized, impl="triton")
                others = {
                    "eager": functools.partial(eager, x, shift, scale),
                    "compile": functools.partial(bench.compile(eager), x, shift, scale),
                }
                to = "fp8" if quantized else name
                yield Case(f"to {to}", f"{images}x{length}x{width}", name, moved, run, others)


def gelu_join_cases(bench: Bench) -> Iterator[Case]:
    """Eager is the reference for FP8, and the model's own operations in the dtype of ``mlp`` otherwise."""
    width, size = bench.sizes.width, bench.sizes.mlp

    def model(mlp: torch.Tensor, first: torch.Tensor | None) -> torch.Tensor:
        y = torch.nn.functional.gelu(mlp, approximate="tanh")
        return y if first is None else torch.cat([first, y], -1)

    for dtype, name in storages():
        for images, length in bench.sizes.tokens:
            for before in (0, width):
                mlp = bench.randn(images, length, size + 3 * before, dtype=dtype)[..., -size:]
                first = bench.randn(images, length, before, dtype=dtype) if before else None
                for quantized in (False, True):
                    numel = images * length * (before + size)
                    moved = numel * (dtype.itemsize + (1 if quantized else dtype.itemsize)) + quantized * images * length * 4
                    eager = functools.partial(gelu_join_reference, quantized=True) if quantized else model
                    run = functools.partial(gelu_join, mlp, first, quantized=quantized, impl="triton")
                    others = {
                        "eager": functools.partial(eager, mlp, first),
                        "compile": functools.partial(bench.compile(eager), mlp, first),
                    }
                    to = "fp8" if quantized else name
                    yield Case(f"to {to}", f"{images}x{length}x({before}+{size})", name, moved, run, others)


def kernels_command(ops: Sequence[str], out: Path, note: str, argv: tuple[str, ...]) -> int:
    """Time ``ops``, all of them if none is named; one record each, rewritten after every row.

    Raises:
        InputError: unknown operator, or no CUDA device.
    """
    for op in ops:
        if op not in CASES:
            raise InputError(f"--op {op}: one of {', '.join(CASES)}")
    if not torch.cuda.is_available():
        raise InputError("bench kernels: no CUDA device here, the kernels were not timed")
    device = torch.device("cuda", torch.cuda.current_device())
    bench = on_cuda(device)
    copy = bench.copy_bandwidth()
    for op in ops or CASES:
        rows: list[Row] = []
        series: dict[str, Series] = {}
        for case in CASES[op](bench):
            row = measure(case, bench, copy)
            rows.append(row)
            series[f"{case.case}, {case.shape}, {case.dtype}"] = Series("us", tuple(row["us"]))
            facts = {"copy_GB/s": round(copy / 1e9, 1), "driver": driver(), "rows": rows}
            path = new_record(f"kernels-{op}", device, argv, series, facts, note=note).write(out)
            print(to_json(row), flush=True)
        print(f"record: {path}")
    return 0


@functools.cache
def driver() -> str:
    """Version of the GPU's driver; '' where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


CASES: dict[str, Callable[[Bench], Iterator[Case]]] = {  # what there is time to win first
    "layer_norm_modulate": layer_norm_modulate_cases,
    "gelu_join": gelu_join_cases,
    "quantize_rowwise": quantize_rowwise_cases,
    "sde_step": sde_step_cases,
    "group_log_prob": group_log_prob_cases,
    "philox": philox_cases,
    "fused_advantage": fused_advantage_cases,
    "capability_step": capability_step_cases,
}
