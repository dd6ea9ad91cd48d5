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

from ..algorithm.tables import RolloutTable, rollout_table
from ..forward.backends import build_forward
from ..forward.forwards import Forward, PolicyForward
from ..models.base import Conditioning, FlowModel
from ..models.making import random_policy
from ..models.policy import Settings
from ..models.registry import FAMILIES
from ..recipe.keys import Config
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
FAMILY = FAMILIES["flux"]
DEV = FAMILY.architecture("random:flux1-dev")
FULL: dict[str, Any] = dict(DEV["transformer"])
SMALL: dict[str, Any] = {**FULL, "num_layers": 2, "num_single_layers": 4}
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
    build: Callable[[FlowModel, RolloutTable, str, str | None], Forward | None] = build_forward,
) -> None:
    """Every variant at every number of rows: launched from the host, and at one row from a graph as well.

    Args:
        build: makes the forward of (model, table, forward, precision).
    """
    blocks = f"{architecture['num_layers']}+{architecture['num_single_layers']} blocks"
    if findings.deadline.passed:
        findings.not_measured.append(f"forward, {blocks}")
        return
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    settings = Settings(torch.bfloat16, findings.device, HEIGHT, WIDTH, TEXT, GUIDANCE)
    model = random_policy(FAMILY, {**DEV, "transformer": architecture}, settings)
    model.transformer.requires_grad_(False)
    table = rollout_table(sigma_schedule(16, 3.0), "flow", 0.7).to(findings.device, torch.float32)
    inputs = {n: Inputs.random(model, n) for n in rows}
    eager = PolicyForward(model, table)
    with FlopCounterMode(display=False) as counter:
        inputs[min(rows)].velocity(eager)
    stand = Stand(findings, blocks, eager, counter.get_total_flops() / min(rows), seconds, graph_seconds)
    for variant, (name, precision) in VARIANTS.items():
        made: list[Forward] = [eager] if name == "eager" else []

        def builds(name: str = name, precision: str | None = precision, made: list[Forward] = made) -> str:
            if not made and (forward := build(model, table, name, precision)) is not None:
                made.append(forward)
            return "" if made else "it is the policy's own"

        findings.check(f"{blocks}, {variant}, builds", builds)
        for number in rows if made else ():
            stand.time(variant, made[0], inputs[number])
        made.clear()
        _release(findings.device)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What forwards are called with: conditioning of the prompts, latents [R, L, C], table row and prompt of each row."""

    conditioning: Conditioning
    x: Tensor
    index: Tensor
    slot: Tensor

    @classmethod
    def random(cls, model: FlowModel, rows: int) -> Inputs:
        """``rows`` rows of at most ten prompts, all steps of the schedule among them."""
        prompts = min(rows, 10)
        conditioning = model.encode([f"prompt {i}" for i in range(prompts)])
        x = torch.randn(rows, *model.latent_shape, device=model.device).to(model.dtype)
        each = torch.arange(rows, device=model.device)
        return cls(conditioning, x, each % 16, each % prompts)

    @torch.no_grad()
    def call(self, forward: Forward) -> Callable[[], Tensor]:
        """The call that is timed; what rollouts prepare once is prepared here."""
        prepared = forward.prepare(self.conditioning)
        return torch.no_grad()(lambda: forward.velocity(self.x, self.index, prepared, self.slot))

    def velocity(self, forward: Forward) -> Tensor:
        """[R, L, C]."""
        return self.call(forward)()


@dataclasses.dataclass(frozen=True)
class Stand:
    """Where the forwards of one transformer are timed beside eager.

    Attributes:
        blocks: names the transformer.
        flops: of one row.
        times: eager's median seconds by rows, as they become known.
    """

    findings: Findings
    blocks: str
    eager: Forward
    flops: float
    seconds: Timer
    graph_seconds: Timer
    times: dict[int, float] = dataclasses.field(default_factory=dict)

    def time(self, variant: str, forward: Forward, inputs: Inputs) -> None:
        """The rows of one variant and number of rows, checked against eager first."""
        number, findings = inputs.x.shape[0], self.findings
        check = f"{self.blocks}, {variant}, {number} rows"
        if forward is not self.eager:
            bound = VELOCITY_BOUNDS[VARIANTS[variant][1]]
            findings.check(check, lambda: too_far(inputs.velocity(forward), inputs.velocity(self.eager), bound))
        name, flag = {"case": variant, "shape": f"{number} rows, {self.blocks}"}, findings.flags([check])
        findings.row("forward", name, lambda: self._row(forward, inputs), flag)
        if number == 1:
            findings.row("forward, from a graph", name, lambda: _milliseconds(self.graph_seconds(inputs.call(forward))), flag)

    def _row(self, forward: Forward, inputs: Inputs) -> Row:
        number, found = inputs.x.shape[0], self.seconds(inputs.call(forward))
        row = _milliseconds(found) | {"TFLOP/s": round(number * self.flops / found[0] / 1e12, 2)}
        if forward is self.eager:
            self.times[number] = found[0]
        elif number in self.times:
            row["x_eager"] = round(self.times[number] / found[0], 3)
        return row


def _milliseconds(seconds: list[float]) -> Row:
    return {"ms": [round(1e3 * t, 4) for t in seconds]}


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
