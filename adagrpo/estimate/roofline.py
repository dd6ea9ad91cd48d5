"""What an iteration must cost at least: FLOPs and bytes counted on the meta device, divided by the rates of a device.

A prediction, never a measurement. Every figure that was not counted here carries its label: ``pub`` published, ``calc``
arithmetic, ``est`` a guess to be replaced by a measurement.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from .counting import OpCounter
from .rehearsal import Rehearsal


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number with the label of its origin and where it comes from."""

    value: float
    label: Literal["pub", "calc", "est"]
    source: str


@dataclasses.dataclass(frozen=True)
class Device:
    """Rates of a device: dense TFLOP/s that large matrix products reach, and TB/s of its memory.

    Attributes:
        eager: whole eager bf16 forward; its small operators and launches included.
        bf16, fp8: ceilings of matrix products.
    """

    name: str
    eager: Figure
    bf16: Figure
    fp8: Figure
    bandwidth: Figure


_EAGER = Figure(350, "est", "diffusers' FLUX without compilation")
_BF16 = Figure(790, "est", "80 % of the published dense peak of 989")
_FP8 = Figure(1500, "est", "76 % of the published dense peak of 1979")
H100 = Device("NVIDIA H100 SXM", _EAGER, _BF16, _FP8, Figure(3.35, "pub", "HBM3"))
H200 = Device("NVIDIA H200 SXM", _EAGER, _BF16, _FP8, Figure(4.8, "pub", "HBM3e"))


@dataclasses.dataclass(frozen=True)
class Work:
    """What one batched call does: some bytes once, the weights above all, and the rest for each of its rows.

    Products are the operators with FLOPs: matrix products, attention, convolutions. The small operators are all others.

    Attributes:
        flops: of a row; a multiply-add is two.
        fp8_flops: those of them in linear layers that FP8 accelerates.
        fixed_bytes, row_bytes: operands and results of the products.
        small_fixed_bytes, small_row_bytes: of the small operators.
    """

    flops: float
    fp8_flops: float
    fixed_bytes: float
    row_bytes: float
    small_fixed_bytes: float
    small_row_bytes: float

    def products(self, rows: int, tflops: float, fp8_tflops: float, terabytes: float) -> float:
        """Seconds of a call's products: the longer of computing and moving."""
        computing = self.fp8_flops / fp8_tflops + (self.flops - self.fp8_flops) / tflops
        return max(rows * computing, (self.fixed_bytes + rows * self.row_bytes) / terabytes) / 1e12

    def small(self, rows: int, terabytes: float) -> float:
        """Seconds of a call's small operators, at the bandwidth of the memory."""
        return (self.small_fixed_bytes + rows * self.small_row_bytes) / terabytes / 1e12


@dataclasses.dataclass(frozen=True)
class PhaseCost:
    """One phase of an iteration.

    Attributes:
        seconds: by tier.
    """

    phase: str
    calls: int
    rows: int
    petaflop: float
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted seconds of an iteration by phase and tier.

    Attributes:
        fp8_share: of a forward's FLOPs.
        rows_per_image: rows of the transformer that an image is.
    """

    device: Device
    phases: tuple[PhaseCost, ...]
    fp8_share: float
    rows_per_image: int = 1

    def total(self, tier: str) -> float:
        """Seconds of the whole iteration."""
        return sum(phase.seconds[tier] for phase in self.phases)

    def table(self) -> str:
        """A readable page with its assumptions."""
        tiers = list(self.phases[0].seconds) if self.phases else []
        lines = [f"one iteration on {self.device.name}: predicted, not measured"]
        lines.append(f"{'phase':11}{'calls':>7}{'images':>8}{'PFLOP':>11}" + "".join(f"{tier:>15}" for tier in tiers))
        for p in self.phases:
            seconds = "".join(f"{p.seconds[tier]:13.3g} s" for tier in tiers)
            lines.append(f"{p.phase:11}{p.calls:7}{p.rows:8}{p.petaflop:11.4g}" + seconds)
        petaflop = sum(p.petaflop for p in self.phases)
        lines.append(f"{'sum':26}{petaflop:11.4g}" + "".join(f"{self.total(tier):13.3g} s" for tier in tiers))
        rates = {
            "eager bf16, TFLOP/s": self.device.eager, "bf16 ceiling, TFLOP/s": self.device.bf16,
            "fp8 ceiling, TFLOP/s": self.device.fp8, "memory, TB/s": self.device.bandwidth,
        }  # fmt: skip
        lines += ["assumptions:", *(f"  {name}: {f.value:g} [{f.label}: {f.source}]" for name, f in rates.items())]
        if self.rows_per_image > 1:
            lines.append(f"  an image is {self.rows_per_image} rows of the transformer: classifier-free guidance")
        lines += [
            "  eager bf16: products at its rate, which stands for everything [est]",
            "  op by op: products at the bf16 ceiling, then each small operator of the eager model at the memory's rate [calc]",
            "  bf16 ceiling, fp8 ceiling: products alone, as if all small operators were fused into them [calc]",
            f"  FP8 reaches {self.fp8_share:.1%} of a forward's FLOPs [calc]: linear layers of the blocks on tokens; adapters,",
            "  embedders, modulation, output and attention stay bf16, and so do prefix and update",
            "  products take the longer of FLOPs / rate and bytes / bandwidth, call by call; counted on meta tensors [calc]",
            "not in it: rewards, prompt encoding, quantisation, launches, waiting for the host",
        ]
        return "\n".join(lines)


TIERS = ("eager bf16", "op by op", "bf16 ceiling", "fp8 ceiling")


def predict(
    rehearsal: Rehearsal,
    calls: Mapping[str, Sequence[int]],
    device: Device,
    optimizer_steps: int = 1,
    fp8_phases: Collection[str] = ("probe", "rollout"),
    averages: bool = False,
) -> Prediction:
    """Predict an iteration of ``calls``: rows of each batched call by phase.

    Args:
        fp8_phases: those whose velocities no log-probability is built on.
        averages: a weight EMA is kept.
    """
    forward = rehearsal.once("forward", lambda: work(rehearsal.forward, rehearsal.transformer))
    update, decode = rehearsal.update, rehearsal.decode
    known = {"update": rehearsal.once("update", lambda: work(update)), "decode": rehearsal.once("decode", lambda: work(decode))}
    costs = []
    for phase, rows in calls.items():
        if rows:
            done = known.get(phase, forward)
            seconds = dict(zip(TIERS, _tiers(done, rows, device, phase in fp8_phases), strict=True))
            costs.append(PhaseCost(phase, len(rows), sum(rows), done.flops * sum(rows) / 1e15, seconds))
    moved = rehearsal.once("step", lambda: _step_traffic(rehearsal, averages), int(averages))
    stepping = moved / device.bandwidth.value / 1e12 * optimizer_steps
    costs.append(PhaseCost("optimizer", optimizer_steps, 0, 0.0, dict.fromkeys(TIERS, stepping)))
    share = forward.fp8_flops / forward.flops if forward.flops else 0.0
    return Prediction(device, tuple(costs), share, rehearsal.rows_per_image)


def _step_traffic(rehearsal: Rehearsal, averages: bool) -> int:
    """Bytes that an optimizer step moves."""
    optimizer = rehearsal.optimizer(averages)
    with OpCounter() as counter:
        rehearsal.step(optimizer)
    return counter.traffic.total()


def work(run: Callable[[int], None], transformer: nn.Module | None = None) -> Work:
    """Count ``run(rows)`` at one and two rows; FP8 is looked for in the blocks of ``transformer``."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    with _token_linears(transformer) as fp8, FlopCounterMode(display=False) as flops:
        one = _traffic(run, 1)
    names = {str(operator) for operator in flops.get_flop_counts().get("Global", {})}
    two = _traffic(run, 2)
    rows = {name: two[name] - one[name] for name in two}
    fixed = {name: max(0, one[name] - rows[name]) for name in one}
    total = lambda found, products: sum(size for name, size in found.items() if (name in names) == products)  # noqa: E731
    return Work(
        flops=flops.get_total_flops(),
        fp8_flops=sum(fp8),
        fixed_bytes=total(fixed, True),
        row_bytes=total(rows, True),
        small_fixed_bytes=total(fixed, False),
        small_row_bytes=total(rows, False),
    )


def _traffic(run: Callable[[int], None], rows: int) -> Counter[str]:
    with OpCounter() as counter:
        run(rows)
    return counter.traffic


@contextmanager
def _token_linears(transformer: nn.Module | None) -> Iterator[list[int]]:
    """FLOPs of the linear layers of repeated blocks that are applied to tokens, not once per image, as they run."""
    flops: list[int] = []

    def count(layer: Any, inputs: tuple, output: Any) -> None:
        tokens = inputs[0].numel() // layer.in_features
        if tokens > inputs[0].shape[0]:
            flops.append(2 * tokens * layer.in_features * layer.out_features)

    lists = [name for name, m in transformer.named_modules() if isinstance(m, nn.ModuleList)] if transformer is not None else []
    modules = transformer.named_modules() if transformer is not None else ()
    hooks = [
        layer.register_forward_hook(count)
        for name, layer in modules
        if isinstance(layer, nn.Linear) and "lora_" not in name and any(name.startswith(f"{blocks}.") for blocks in lists)
    ]
    try:
        yield flops
    finally:
        for hook in hooks:
            hook.remove()


def _tiers(done: Work, rows: Sequence[int], device: Device, fp8: bool) -> tuple[float, ...]:
    """Seconds of the calls ``rows`` in the order of ``TIERS``."""
    bf16, terabytes = device.bf16.value, device.bandwidth.value
    rates = [(device.eager.value,) * 2, (bf16, bf16), (bf16, device.fp8.value if fp8 else bf16)]
    eager, ceiling, quantised = (sum(done.products(n, wide, narrow, terabytes) for n in rows) for wide, narrow in rates)
    return eager, ceiling + sum(done.small(n, terabytes) for n in rows), ceiling, quantised
