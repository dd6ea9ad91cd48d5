"""``adagrpo bench kernels``: time the kernels against eager and compiled references on a CUDA device.

Columns: case, shape, dtype, microseconds (quantiles 0.5, 0.2, 0.8), bytes by the model in `kernels/README.md`, GB/s, share of
the copy bandwidth measured in the same run, times eager and torch.compile, error against float64. Under 10 us a time is from a
CUDA graph and its share reads "launch-bound".
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Iterator, Sequence
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
from ..strict_json import to_json
from .records import new_record
from .statistics import Series

SHORT = 10e-6
TOKENS = ((12, 1536), (1, 4608))  # images and their tokens, text and picture: FLUX.1 at 512x512 and 1024x1024
Row = dict[str, Any]


def seconds(run: Callable[[], object]) -> tuple[list[float], bool]:
    """Quantiles 0.5, 0.2, 0.8 of a call, and whether they come from a CUDA graph."""
    import triton

    times = triton.testing.do_bench(run, warmup=25, rep=200, quantiles=[0.5, 0.2, 0.8])
    if times[0] * 1e-3 >= SHORT:
        return [t * 1e-3 for t in times], False
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graphed = triton.testing.do_bench_cudagraph(run, rep=100, quantiles=[0.5, 0.2, 0.8])
    return [t * 1e-3 for t in graphed], True


def copy_bandwidth() -> float:
    """Bytes per second of a 1 GiB device copy, read and written."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source))[0][0]


def table() -> StepTable:
    sigmas = sigma_schedule(16, 3.0)
    return StepTable.concat([step_table("ode", sigmas), step_table("flow", sigmas, 0.7)]).to("cuda", torch.float32)


def measure(name: str, shape: str, dtype: str, moved: int, copy: float, run: Callable[[], object],
            eager: Callable[[], object] | None = None, compiled: Callable[[], object] | None = None) -> Row:  # fmt: skip
    times, graph = seconds(run)
    rate = moved / times[0]
    row: Row = {"case": name, "shape": shape, "dtype": dtype, "us": [round(t * 1e6, 3) for t in times], "bytes": moved}
    row |= {"GB/s": round(rate / 1e9, 1), "of_copy": "launch-bound" if graph else round(rate / copy, 3)}
    for key, other in (("x_eager", eager), ("x_compile", compiled)):
        if other is not None:
            row[key] = round(seconds(other)[0][0] / times[0], 3)
    return row


def sde_step_rows(copy: float) -> Iterator[Row]:
    steps = table()
    for rows in (12, 48, 1024):
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            shape, size = (rows, 1024, 64), dtype.itemsize
            x, v = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
            noise, index = torch.randn(shape, device="cuda"), torch.full((rows,), 18, device="cuda")
            numel, text = x.numel(), "x".join(map(str, shape))
            draw = Draw(1, torch.arange(rows, device="cuda"), 2, 3, 4).on_device()
            keywords: dict[str, Any] = {"with_mean": False, "impl": "triton"}
            compiled = torch.compile(lambda x, v, i, n: sde_step_reference(x, v, steps, i, n)[::2])
            truth = sde_step_reference(x.double(), v.double(), steps, index, noise.double()).next
            found = sde_step(x, v, steps, index, noise, **keywords).next.double()
            row = measure(
                "given noise", text, name, numel * (3 * size + 4) + 4 * rows, copy,
                lambda: sde_step(x, v, steps, index, noise, **keywords),  # noqa: B023
                lambda: sde_step_reference(x, v, steps, index, noise),  # noqa: B023
                lambda: compiled(x, v, index, noise),  # noqa: B023
            )  # fmt: skip
            yield row | {"max_error": float((found - truth).abs().max())}
            row = measure(
                "drawn noise", text, name, numel * 3 * size + 4 * rows, copy,
                lambda: sde_step(x, v, steps, index, draw, **keywords),  # noqa: B023
            )  # fmt: skip
            both = seconds(lambda: sde_step(x, v, steps, index, torch.randn(shape, device="cuda"), **keywords))  # noqa: B023
            yield row | {"x_randn_and_step": round(both[0][0] * 1e6 / row["us"][0], 3)}


def philox_rows(copy: float) -> Iterator[Row]:
    for rows in (12, 1024):
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            draw: Any = Draw(1, torch.arange(rows, device="cuda"), 2, 3, 4).on_device()
            seed, noise_rows, *rest = draw
            run = lambda: philox_normal(seed, noise_rows, 65536, rest[0], rest[1], rest[2], dtype, "triton")  # noqa: B023, E731
            eager = lambda: torch.randn(rows, 65536, device="cuda").to(dtype)  # noqa: B023, E731
            yield measure(
                "normal noise; eager is randn", f"{rows}x65536", name, rows * 65536 * dtype.itemsize, copy, run, eager
            )


def group_log_prob_rows(copy: float) -> Iterator[Row]:
    steps = table()
    for latents, group in ((4, 12), (48, 12), (256, 12), (512, 1)):
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            x, v = (torch.randn(latents, 1024, 64, device="cuda").to(dtype) for _ in range(2))
            successors = torch.randn(latents, group, 1024, 64, device="cuda").to(dtype)
            index = torch.full((latents,), 18, device="cuda")
            moved = (2 + group) * x.numel() * dtype.itemsize + 4 * latents * group
            text = f"{latents}x{group}x1024x64"
            compiled = torch.compile(lambda x, v, s, i: group_log_prob_reference(x, v, s, steps, i))
            truth = group_log_prob_reference(x.double(), v.double(), successors.double(), steps, index)
            error = float((group_log_prob(x, v, successors, steps, index, "triton").double() - truth).abs().max())
            row = measure(
                "forward", text, name, moved, copy, lambda: group_log_prob(x, v, successors, steps, index, "triton"),  # noqa: B023
                lambda: group_log_prob_reference(x, v, successors, steps, index),  # noqa: B023
                lambda: compiled(x, v, successors, index),  # noqa: B023
            )  # fmt: skip
            yield row | {"max_error": error}
            leaf, upstream = v.clone().requires_grad_(), torch.randn(latents, group, device="cuda")

            def both(function: Callable[..., torch.Tensor]) -> Callable[[], object]:
                return lambda: torch.autograd.grad(function(), leaf, upstream)  # noqa: B023

            yield measure(
                "forward and backward", text, name, 2 * moved + x.numel() * 4, copy,
                both(lambda: group_log_prob(x, leaf, successors, steps, index, "triton")),  # noqa: B023
                both(lambda: group_log_prob_reference(x, leaf, successors, steps, index)),  # noqa: B023
                both(lambda: compiled(x, leaf, successors, index)),  # noqa: B023
            )  # fmt: skip


def fused_advantage_rows(copy: float) -> Iterator[Row]:
    for rewards, slots in ((1, 1), (3, 8), (3, 48)):
        values = torch.randn(rewards, slots, 4, 12, dtype=torch.float64, device="cuda")
        state = [torch.full((rewards,), n, dtype=torch.float64, device="cuda") for n in (0.5, 0.3)]
        count, weights = torch.full((rewards,), 3, device="cuda"), torch.ones(rewards, device="cuda")
        run, eager = (lambda impl=impl: multi_reward_advantage(values, state[0], state[1], count, weights, impl=impl)  # noqa: B023
                      for impl in ("triton", "reference"))  # fmt: skip
        moved = values.numel() * 8 * 3 + values[0].numel() * 8
        yield measure("mass, with statistics", f"{rewards}x{slots}x4x12", "fp64", moved, copy, run, eager)


def capability_step_rows(copy: float) -> Iterator[Row]:
    for strategy in ("closest", "medium"):
        for slots in (1, 8, 48):
            scores = torch.randn(1, slots, 10, dtype=torch.float64, device="cuda")
            state = [torch.ones(1, dtype=torch.float64, device="cuda") for _ in range(2)]
            count = torch.ones(1, dtype=torch.int64, device="cuda")
            run, eager = (lambda impl=impl: capability_step(scores, state[0], state[1], count, 0.8, strategy, impl=impl)  # noqa: B023
                          for impl in ("triton", "reference"))  # fmt: skip
            yield measure(strategy, f"1x{slots}x10", "fp64", scores.numel() * 24, copy, run, eager)


def compiled_for(function: Callable[..., object]) -> Callable[..., object]:
    """Compiled for one shape: earlier cases would make it dynamic, or eager beyond the limit of recompilations."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def quantize_rowwise_rows(copy: float) -> Iterator[Row]:
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for size in (3072, 12288, 15360):
            for images, length in TOKENS:
                x = torch.randn(images, length, size, device="cuda").to(dtype)[:, 512:]
                compiled = compiled_for(quantize_rowwise_reference)
                yield measure(
                    "slice of tokens", f"{images}x{length - 512}x{size}", name,
                    x.numel() * (dtype.itemsize + 1) + images * (length - 512) * 4, copy,
                    lambda: quantize_rowwise(x, "triton"), lambda: quantize_rowwise_reference(x), lambda: compiled(x),  # noqa: B023
                )  # fmt: skip


def layer_norm_modulate_rows(copy: float) -> Iterator[Row]:
    """Eager is the reference for FP8, and the model's own operations in the dtype of ``x`` otherwise."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for images, length in TOKENS:
            x = torch.randn(images, length, 3072, device="cuda").to(dtype)
            shift, scale, *_ = torch.randn(images, 6 * 3072, device="cuda").to(dtype).chunk(6, 1)

            def model(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.layer_norm(x, (3072,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

            for quantized in (False, True):
                rows = images * length
                moved = x.numel() * (dtype.itemsize + (1 if quantized else dtype.itemsize)) + quantized * rows * 4
                moved += 2 * shift.numel() * dtype.itemsize
                eager = functools.partial(layer_norm_modulate_reference, quantized=True) if quantized else model
                compiled = compiled_for(eager)
                yield measure(
                    f"to {'fp8' if quantized else name}", f"{images}x{length}x3072", name, moved, copy,
                    lambda: layer_norm_modulate(x, shift, scale, quantized=quantized, impl="triton"),  # noqa: B023
                    lambda: eager(x, shift, scale), lambda: compiled(x, shift, scale),  # noqa: B023
                )  # fmt: skip


def gelu_join_rows(copy: float) -> Iterator[Row]:
    """Eager is the reference for FP8, and the model's own operations in the dtype of ``mlp`` otherwise."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for images, length in TOKENS:
            for before in (0, 3072):
                mlp = torch.randn(images, length, 21504 if before else 12288, device="cuda").to(dtype)[..., -12288:]
                first = torch.randn(images, length, before, device="cuda").to(dtype) if before else None

                def model(mlp: torch.Tensor, first: torch.Tensor | None) -> torch.Tensor:
                    y = torch.nn.functional.gelu(mlp, approximate="tanh")
                    return y if first is None else torch.cat([first, y], -1)

                for quantized in (False, True):
                    numel = images * length * (before + 12288)
                    moved = numel * (dtype.itemsize + (1 if quantized else dtype.itemsize)) + quantized * images * length * 4
                    eager = functools.partial(gelu_join_reference, quantized=True) if quantized else model
                    compiled = compiled_for(eager)
                    yield measure(
                        f"to {'fp8' if quantized else name}", f"{images}x{length}x({before}+12288)", name, moved, copy,
                        lambda: gelu_join(mlp, first, quantized=quantized, impl="triton"),  # noqa: B023
                        lambda: eager(mlp, first), lambda: compiled(mlp, first),  # noqa: B023
                    )  # fmt: skip


def kernels_command(ops: Sequence[str], out: Path, note: str, argv: tuple[str, ...]) -> int:
    """Time ``ops``, all of them if none is named; one record each, rewritten after every row.

    Raises:
        InputError: unknown operator, or no CUDA device.
    """
    for op in ops:
        if op not in ROWS:
            raise InputError(f"--op {op}: one of {', '.join(ROWS)}")
    if not torch.cuda.is_available():
        raise InputError("bench kernels: no CUDA device here, the kernels were not timed")
    device = torch.device("cuda", torch.cuda.current_device())
    copy = copy_bandwidth()
    for op in ops or ROWS:
        rows: list[Row] = []
        series: dict[str, Series] = {}
        for row in ROWS[op](copy):
            rows.append(row)
            series[f"{row['case']}, {row['shape']}, {row['dtype']}"] = Series("us", tuple(row["us"]))
            facts = {"copy_GB/s": round(copy / 1e9, 1), "driver": driver(), "rows": rows}
            path = new_record(f"kernels-{op}", device, argv, series, facts, note=note).write(out)
            print(to_json(row), flush=True)
        print(f"record: {path}")
    return 0


def driver() -> str:
    """Version of the GPU's driver; '' where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


ROWS: dict[str, Callable[[float], Iterator[Row]]] = {
    "sde_step": sde_step_rows,
    "philox": philox_rows,
    "group_log_prob": group_log_prob_rows,
    "fused_advantage": fused_advantage_rows,
    "capability_step": capability_step_rows,
    "quantize_rowwise": quantize_rowwise_rows,
    "layer_norm_modulate": layer_norm_modulate_rows,
    "gelu_join": gelu_join_rows,
}
