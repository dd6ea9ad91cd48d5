"""The launches that every kernel is proved on without a GPU: each operator on CPU tensors of FLUX.1's shapes, by dtype.

A case calls the public operator, so that what is compiled is what a run launches: strides, alignment, arguments equal to 1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .capability_step import STRATEGIES, capability_step
from .fused_advantage import CALIBRATIONS, PAPER_SCALE, Scale, fused_advantage, multi_reward_advantage
from .gelu_join import gelu_join
from .group_log_prob import group_log_prob
from .layer_norm_modulate import layer_norm_modulate
from .philox import Draw, philox_normal
from .quantize import quantize_rowwise
from .sde_step import Guidance, History, sde_step
from .step_table import StepTable, sigma_schedule, step_table

LONG, SHORT, ODD = (1024, 64), (4, 64), (7, 9)  # latents: FLUX.1 at 512x512, one program's, one that nothing divides
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}
STORAGES = ("bf16", "fp32", "fp16")
WIDTHS = (3072, 12288, 15360)  # FLUX.1: hidden, MLP, last product of a single block


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel and shape class.

    Attributes:
        kernel, shape: names in the budget.
        run: calls the operator; its last launch is the kernel's.
    """

    kernel: str
    shape: str
    run: Callable[[], object]


def cases() -> Iterator[Case]:
    """Every kernel and shape class of the budget."""
    yield from _sde_step_cases()
    yield from _philox_cases()
    yield from _group_log_prob_cases()
    yield from _advantage_cases()
    yield from _capability_cases()
    yield from _row_cases()


def table() -> StepTable:
    """Rows 0-15 deterministic, 16-31 flow."""
    sigmas = sigma_schedule(16, 3.0)
    return StepTable.concat([step_table("ode", sigmas), step_table("flow", sigmas, 0.7)]).to(dtype=torch.float32)


def draw(rows: int, per_row: bool = False) -> Draw:
    """Noise of ``rows`` rows at one step, or at a step of its own for each."""
    return Draw(1, torch.arange(rows), 2, 3, torch.arange(rows) if per_row else 4)


def step(storage: str, latent: tuple[int, ...], rows: int = 12, noise: str = "drawn", v: str = "", **keywords: Any) -> object:
    """``sde_step`` of ``rows`` latents; ``noise`` is none, given or drawn; ``v`` the velocity's dtype, if another."""
    x = torch.zeros(rows, *latent, dtype=DTYPES[storage])
    velocity = torch.zeros(rows, *latent, dtype=DTYPES[v or storage])
    index = torch.full((rows,), 18)
    given = {"none": None, "given": torch.zeros(rows, *latent), "drawn": draw(rows), "drawn per row": draw(rows, True)}[noise]
    return sde_step(x, velocity, table(), index, given, impl="triton", **{"with_mean": False, **keywords})


def guided(rows: int, latent: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Every optional input and output of ``sde_step``."""
    history = History(torch.zeros(rows, *latent), torch.zeros(32))
    guidance = Guidance(torch.zeros(rows, *latent, dtype=dtype), torch.ones(rows))
    return {"guidance": guidance, "history": history, "with_clean": True}


def _sde_step_cases() -> Iterator[Case]:
    def case(shape: str, *arguments: Any, **keywords: Any) -> Case:
        return Case("sde_step", shape, lambda: step(*arguments, **keywords))

    for storage in ("bf16", "fp32"):
        yield case(f"{storage}, long rows, deterministic", storage, LONG, noise="none")
        yield case(f"{storage}, long rows, given noise", storage, LONG, noise="given")
        yield case(f"{storage}, long rows, drawn noise", storage, LONG)
    forks = {"source": torch.zeros(12, dtype=torch.int64), "with_mean": True}
    yield case("bf16, long rows, drawn noise, forks, mean", "bf16", LONG, **forks)
    yield case("bf16, long rows, guidance, history, preview", "bf16", LONG, **guided(12, LONG, torch.bfloat16))
    yield case("fp16, long rows, drawn noise", "fp16", LONG)
    yield case("fp32 latents, bf16 velocity, long rows, drawn noise", "fp32", LONG, v="bf16")
    yield case("fp32, short rows, drawn noise, mean", "fp32", SHORT, with_mean=True)
    yield case("bf16, one odd row, noise per row, mean", "bf16", ODD, rows=1, noise="drawn per row", with_mean=True)


def _philox_cases() -> Iterator[Case]:
    def case(shape: str, storage: str, numel: int, rows: int = 12) -> Case:
        return Case("philox", shape, lambda: philox_normal(1, torch.arange(rows), numel, 2, 3, 4, DTYPES[storage], "triton"))

    for storage in STORAGES:
        yield case(f"{storage}, long rows", storage, 65536)
    yield case("fp32, short rows", "fp32", 256)
    yield case("fp32, one odd row", "fp32", 63, rows=1)


def log_prob(storage: str, latent: tuple[int, ...], latents: int = 4, group: int = 12, backward: bool = False) -> None:
    """``group_log_prob``, and its gradient."""
    dtype = DTYPES[storage]
    x, v = torch.zeros(latents, *latent, dtype=dtype), torch.zeros(latents, *latent, dtype=dtype, requires_grad=backward)
    successors = torch.zeros(latents, group, *latent, dtype=dtype)
    logp = group_log_prob(x, v, successors, table(), torch.full((latents,), 18), "triton")
    if backward:
        logp.backward(torch.ones_like(logp))


def _group_log_prob_cases() -> Iterator[Case]:
    def case(shape: str, *arguments: Any, **keywords: Any) -> Case:
        return Case("group_log_prob", shape, lambda: log_prob(*arguments, **keywords))

    for storage in STORAGES:
        yield case(f"{storage}, long rows", storage, LONG)
        yield case(f"{storage}, short rows", storage, SHORT)
        yield case(f"{storage}, long rows, backward", storage, LONG, backward=True)
    yield case("fp32, one odd row", "fp32", ODD, latents=1, group=1)
    yield case("fp32, one odd row, backward", "fp32", ODD, latents=1, group=1, backward=True)


def advantage(
    storage: str, calibration: str, size: int, weight: float, groups: int = 16, number: int = 2, scale: Scale = PAPER_SCALE
) -> None:
    """``multi_reward_advantage`` of ``number`` rewards and ``groups`` groups."""
    rewards = torch.zeros(number, groups, size, dtype=DTYPES[storage])
    mean, std = torch.zeros(number, dtype=torch.float64), torch.ones(number, dtype=torch.float64)
    count, weights = torch.ones(number, dtype=torch.int64), torch.ones(number)
    mask = torch.ones(groups, size, dtype=torch.bool)
    multi_reward_advantage(rewards, mean, std, count, weights, 5.0, weight, calibration, mask, "triton", scale)


def _advantage_cases() -> Iterator[Case]:
    def case(storage: str, calibration: str, size: int, weight: float) -> Case:
        shape = f"{storage}, {calibration}, groups of {size}, weight {weight}"
        return Case("fused_advantage", shape, lambda: advantage(storage, calibration, size, weight))

    for calibration in CALIBRATIONS:
        yield case("fp64", calibration, 16, 0.3 if calibration == "none" else 1.0)
    yield case("fp64", "mass", 16, 0.0)
    yield case("fp64", "mass", 64, 1.0)
    yield case("fp32", "mass", 32, 1.0)
    for scale in (Scale("global", 0, 1e-4), Scale("floored"), Scale("none", clip_sum=True)):
        run = functools.partial(advantage, "fp64", "mass", 16, 1.0, scale=scale)
        yield Case("fused_advantage", f"fp64, divided by {scale.std}", run)
    yield Case("fused_advantage", "fp32, one group of one", lambda: advantage("fp32", "mass", 1, 1.0, groups=1, number=1))
    alone = torch.zeros(1, 12)
    yield Case("fused_advantage", "fp32, alone", lambda: fused_advantage(alone, 0.0, 1.0, impl="triton"))


def capability(strategy: str, number: int, slots: int = 4, candidates: int = 10, state: str = "fp64", scores: str = "") -> None:
    """``capability_step`` of ``number`` rewards."""
    dtype = DTYPES[state]
    mean, var, count = torch.zeros(number, dtype=dtype), torch.ones(number, dtype=dtype), torch.ones(number, dtype=torch.int64)
    weights = torch.ones(number) if number > 1 else None
    given = torch.zeros(number, slots, candidates, dtype=DTYPES[scores or state])
    capability_step(given, mean, var, count, 0.8, strategy, weights, draw(slots), "triton")


def _capability_cases() -> Iterator[Case]:
    def case(shape: str, *arguments: Any, **keywords: Any) -> Case:
        return Case("capability_step", shape, lambda: capability(*arguments, **keywords))

    for strategy in STRATEGIES:
        yield case(f"{strategy}, one reward", strategy, 1)
        yield case(f"{strategy}, several rewards", strategy, 2)
    yield case("fp32, closest, several rewards", "closest", 2, state="fp32")
    yield case("fp32 scores, closest, one reward", "closest", 1, scores="fp32")
    yield case("random, one candidate", "random", 1, slots=1, candidates=1)


def _row_cases() -> Iterator[Case]:
    """Token rows of FLUX.1, views of the wider products that the transformer makes."""
    for storage in STORAGES:
        product = torch.zeros(2, 32, 21504, dtype=DTYPES[storage])
        vectors = torch.zeros(2, 6 * 3072, dtype=DTYPES[storage]).chunk(6, 1)
        for columns in WIDTHS if storage != "fp16" else WIDTHS[:1]:
            x = product[..., :columns]
            yield Case("quantize_rowwise", f"{storage} to fp8, long rows, {columns}", _call(quantize_rowwise, x))
        for fp8 in (True, False):
            to = f"{storage} to {'fp8' if fp8 else storage}, long rows"
            tokens, modulation = product[:, :, :3072], (vectors[0], vectors[4])
            yield Case("layer_norm_modulate", f"{to}, 3072", _call(layer_norm_modulate, tokens, *modulation, quantized=fp8))
            mlp, first = product[..., 9216:], product[..., 6144:9216]
            yield Case("gelu_join", f"{to}, 12288", _call(gelu_join, mlp, quantized=fp8))
            if storage != "fp16":
                yield Case("gelu_join", f"{to}, 15360", _call(gelu_join, mlp, first, quantized=fp8))
    row = torch.zeros(1, 1, 63)
    yield Case("quantize_rowwise", "fp32 to fp8, one odd row", _call(quantize_rowwise, row))
    yield Case(
        "layer_norm_modulate", "fp32 to fp8, one odd row", _call(layer_norm_modulate, row, row[0], row[0], quantized=True)
    )
    yield Case("gelu_join", "fp32 to fp32, one odd row", _call(gelu_join, row, row))


def _call(operator: Callable[..., Any], *tensors: Tensor, **keywords: Any) -> Callable[[], object]:
    return lambda: operator(*tensors, **keywords, impl="triton")
