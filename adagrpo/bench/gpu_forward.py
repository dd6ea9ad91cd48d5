"""The forwards and iterations of ``adagrpo bench gpu``: random weights of FLUX.1-dev's shapes."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from adagrpo_kernels import sigma_schedule
from torch import Tensor

from ..config import Config
from ..engine.backends import build_forward
from ..engine.forwards import Forward, PolicyForward
from ..engine.tables import rollout_table
from ..models.base import FlowModel
from ..models.flux import FluxModel
from ..models.random_flux import TRANSFORMER, random_flux
from .ceilings import too_far
from .findings import Findings, Row
from .measure import PHASES, EnergyMeter, Iteration, bench_trainer, measure, peak_bytes
from .timers import Timer

ROWS = (12, 48, 10, 1)
VARIANTS: dict[str, tuple[str, str | None]] = {
    "eager": ("eager", None),
    "fused": ("fused", None),
    "fused+fp8": ("fused", "fp8"),
    "compile": ("compile", None),
    "compile+fp8": ("compile", "fp8"),
}
SMALL: dict[str, Any] = {**TRANSFORMER, "num_layers": 2, "num_single_layers": 4}
FULL: dict[str, Any] = TRANSFORMER
HEIGHT, WIDTH, TEXT, GUIDANCE = 512, 512, 256, 3.5
VELOCITY_BOUNDS = {None: 0.05, "fp8": 0.15}  # relative distance from eager's, as the self-test's
RATIO_BOUND = 1e-6
RECIPES: dict[str, dict[str, Any]] = {"as the recipe": {}, "fused, fp8": {"forward": "fused", "precision": "fp8"}}
ITERATIONS = 2


def time_forwards(
    findings: Findings,
    architecture: Mapping[str, Any],
    seconds: Timer,
    graph_seconds: Timer,
    rows: Sequence[int] = ROWS,
    build: Callable[[FluxModel, Any, str, str | None], Forward | None] | None = None,
) -> None:
    """Every variant at every number of rows: launched from the host, and at one row from a graph as well.

    Args:
        build: makes the forward of (model, table, forward, precision); None is the recipe's own way.
    """
    device, blocks = findings.device, f"{architecture['num_layers']}+{architecture['num_single_layers']} blocks"
    if findings.deadline.passed:
        findings.not_measured.append(f"forward, {blocks}")
        return
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    model = random_flux(dict(architecture), torch.bfloat16, device, HEIGHT, WIDTH, TEXT, GUIDANCE)
    model.transformer.requires_grad_(False)
    table = rollout_table(sigma_schedule(16, 3.0), "flow", 0.7).to(device, torch.float32)
    eager = PolicyForward(model, table)
    inputs = {n: _inputs(model, n) for n in rows}
    with FlopCounterMode(display=False) as counter:
        _velocity(eager, inputs[min(rows)])
    flops = counter.get_total_flops() / min(rows)
    times: dict[int, float] = {}
    for variant, (name, precision) in VARIANTS.items():
        forward: Forward | None = None

        def made(name: str = name, precision: str | None = precision) -> str:
            nonlocal forward
            make = build or build_forward
            forward = eager if name == "eager" else make(model, table, name, precision)
            return "" if forward is not None else "it is the policy's own"

        findings.check(f"{blocks}, {variant}, builds", made)
        if forward is None:
            continue
        for number in rows:
            _time_rows(findings, blocks, variant, forward, eager, inputs[number], flops, times, seconds, graph_seconds)
        del forward
        _release(device)


def _time_rows(
    findings: Findings,
    blocks: str,
    variant: str,
    forward: Forward,
    eager: Forward,
    inputs: tuple[Any, Tensor, Tensor, Tensor],
    flops: float,
    times: dict[int, float],
    seconds: Timer,
    graph_seconds: Timer,
) -> None:
    """One row: checked against eager, then timed."""
    number = inputs[1].shape[0]
    check = f"{blocks}, {variant}, {number} rows"
    if forward is not eager:
        bound = VELOCITY_BOUNDS[VARIANTS[variant][1]]
        findings.check(check, lambda: too_far(_velocity(forward, inputs), _velocity(eager, inputs), bound))

    def measured() -> Row:
        prepared = _prepared(forward, inputs)
        found = seconds(lambda: _run(forward, inputs, prepared))
        row: Row = {"ms": [round(1e3 * t, 4) for t in found], "TFLOP/s": round(number * flops / found[0] / 1e12, 2)}
        if forward is eager:
            times[number] = found[0]
        elif number in times:
            row["x_eager"] = round(times[number] / found[0], 3)
        return row

    def graphed() -> Row:
        prepared = _prepared(forward, inputs)
        return {"ms": [round(1e3 * t, 4) for t in graph_seconds(lambda: _run(forward, inputs, prepared))]}

    name, flag = {"case": variant, "shape": f"{number} rows, {blocks}"}, findings.flags([check])
    findings.row("forward", name, measured, flag)
    if number == 1:
        findings.row("forward, from a graph", name, graphed, flag)


def _inputs(model: FluxModel, rows: int) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Conditioning of the rows' prompts, latents, table rows, and the prompt of each row."""
    prompts = min(rows, 10)
    conditioning = model.encode([f"prompt {i}" for i in range(prompts)])
    x = torch.randn(rows, *model.latent_shape, device=model.device).to(model.dtype)
    each = torch.arange(rows, device=model.device)
    return conditioning, x, each % 16, each % prompts


@torch.no_grad()
def _prepared(forward: Forward, inputs: tuple[Any, Tensor, Tensor, Tensor]) -> Any:
    return forward.prepare(inputs[0])


@torch.no_grad()
def _run(forward: Forward, inputs: tuple[Any, Tensor, Tensor, Tensor], prepared: Any) -> Tensor:
    _, x, index, slot = inputs
    return forward.velocity(x, index, prepared, slot)


def _velocity(forward: Forward, inputs: tuple[Any, Tensor, Tensor, Tensor]) -> Tensor:
    return _run(forward, inputs, _prepared(forward, inputs))


def _release(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def time_iterations(findings: Findings, config: Config, model: Callable[[], FlowModel] | None = None) -> None:
    """Two iterations by phase after a warm-up, of the recipe and with our fastest forward.

    Args:
        model: makes the policy; None is the recipe's.
    """
    findings.config = config
    for case, engine in RECIPES.items():
        kept: list[Iteration] = []

        def measured(engine: dict[str, Any] = engine, kept: list[Iteration] = kept) -> Row:
            changed = dataclasses.replace(config, engine=dataclasses.replace(config.engine, **engine))
            trainer = bench_trainer(changed, model() if model else None)
            measure(trainer)
            if findings.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(findings.device)
            meter = EnergyMeter(findings.device)
            while len(kept) < ITERATIONS and not (kept and findings.deadline.passed):
                kept.append(measure(trainer, meter))
            return iteration_row(kept, peak_bytes(findings.device))

        row = findings.row("iteration", {"case": case, "shape": config.name}, measured)
        if kept:
            findings.check(f"iteration, {case}", functools.partial(iteration_problem, kept))
            if flag := findings.flags([f"iteration, {case}"]):
                row["flag"] = flag
                findings.write()
        _release(findings.device)


def iteration_row(found: Sequence[Iteration], peak: int) -> Row:
    """Seconds in all and by phase (medians), counted work, memory."""
    row: Row = {"seconds": [i.total for i in found]}
    row["phases"] = {p: round(statistics.median(i.seconds[p] for i in found), 4) for p in PHASES}
    row["evaluations"] = sum(found[0].evaluations.values())
    row["launches"], row["peak_GiB"] = found[0].launches, round(peak / 2**30, 2)
    joules = [i.joules for i in found if i.joules is not None]
    return row | ({"joules": round(statistics.median(joules), 1)} if joules else {})


def iteration_problem(found: Sequence[Iteration]) -> str:
    """What is wrong with the iterations: '' if the ratio is 1, no sample failed and the loss is finite."""
    worst = max(i.metrics["policy/ratio_deviation"] for i in found)
    failed = max(i.metrics["advantage/failed"] for i in found)
    finite = all(abs(i.metrics["policy/loss"]) < float("inf") for i in found)
    problems = [
        "" if worst <= RATIO_BOUND else f"the on-policy ratio deviates by {worst:.1e}, at most {RATIO_BOUND:.0e}",
        f"{failed:.0%} of the samples are not finite" if failed else "",
        "" if finite else "the loss is not finite",
    ]
    return "; ".join(filter(None, problems))
