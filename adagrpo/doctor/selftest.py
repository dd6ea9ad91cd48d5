"""``adagrpo doctor --self-test``: kernels against their references, and every forward through iterations of the tiny recipe."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from adagrpo_kernels import selftest as kernels
from adagrpo_kernels._dispatch import device_problem

from ..algorithm.sde import Stream
from ..build import build_trainer
from ..errors import InputError, RunError
from ..forward.backends import forward_problem, precision_problem
from ..recipe.keys import Config
from ..recipe.load import load_recipe
from ..train import Trainer

FORWARDS, PRECISIONS = ("eager", "fused", "compile"), ("auto", "fp8")
TIMED = 3
RATIO_BOUND = 1e-6
VELOCITY_BOUNDS = {"fp32": 1e-4, "bf16": 0.05, "fp8": 0.15}  # on the CPU 6e-7, 0.014 and 0.043 were measured
SECONDS = 90.0  # after which no further forward is begun, so that the whole stays within two minutes
PASSED, FAILED, SKIPPED = "pass", "FAIL", "skipped"


@dataclasses.dataclass(frozen=True)
class Row:
    """One check: its name, ``PASSED``, ``FAILED`` or ``SKIPPED``, and figures or the reason."""

    name: str
    outcome: str
    detail: str

    def __str__(self) -> str:
        return f"  {self.name:26} {self.outcome + ':' if self.outcome == SKIPPED else self.outcome:8} {self.detail}"


def self_test(device: torch.device, everything: bool = False) -> Iterator[Row]:
    """One row per check, as each ends; a check that raises is a failed row, and the others still run.

    Args:
        everything: compile on a CPU too, and no limit of time.
    """
    begun = time.perf_counter()
    for name, check in kernels.CHECKS.items():
        yield guarded(name, functools.partial(_kernel, check, device))
    for forward in FORWARDS:
        for precision in PRECISIONS:
            name = f"{forward}, precision {precision}"
            late = time.perf_counter() - begun > SECONDS and not everything
            reason = "no time left; --all has no limit" if late else _skip_reason(forward, precision, device, everything)
            run = functools.partial(_forward, device, forward, precision)
            yield Row(name, SKIPPED, reason) if reason else guarded(name, run)


def guarded(name: str, check: Callable[[], tuple[str, str]]) -> Row:
    """The row of a check that may raise: then it failed."""
    try:
        return Row(name, *check())
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return Row(name, FAILED, first if isinstance(error, InputError | RunError) else f"{type(error).__name__}: {first}")


def _kernel(check: Callable[[torch.device], kernels.Finding], device: torch.device) -> tuple[str, str]:
    problem = "no CUDA device" if device.type != "cuda" else device_problem({device.type})
    if problem:
        return SKIPPED, problem
    found = check(device)
    return PASSED if found.passed else FAILED, f"error {found.error:.1e}, bound {found.bound:.1e}"


def _skip_reason(forward: str, precision: str, device: torch.device, everything: bool) -> str | None:
    if forward == "compile" and device.type == "cpu" and not everything:
        return "a minute on a CPU; --all runs it"
    return forward_problem(forward, device) or precision_problem(precision, device)


def short_recipe(device: torch.device, forward: str, precision: str) -> Config:
    """The tiny recipe, short: 3 probes, 2 forks of 3; brightness scores. The model is bf16 on CUDA, as real ones are."""
    r = dataclasses.replace
    tiny = load_recipe("tiny")
    return r(
        tiny,
        model=r(tiny.model, device=str(device), dtype="bf16" if device.type == "cuda" else "fp32"),
        rollout=r(tiny.rollout, steps=6, group_size=3, sde_steps=(0, 1)),
        selection=r(tiny.selection, candidates=3),
        train=r(tiny.train, slots=1),
        engine=r(tiny.engine, forward=forward, precision=precision),
        rewards=(r(tiny.rewards[0], name="brightness"),),
    )


def _forward(device: torch.device, forward: str, precision: str) -> tuple[str, str]:
    """Ratio of the first iteration, distance of the rollout's velocity from the policy's, seconds of the next iterations."""
    config = short_recipe(device, forward, precision)
    trainer, _ = build_trainer(config)
    metrics = trainer.iteration()
    deviation, failed = float(metrics["policy/ratio_deviation"]), float(metrics["advantage/failed"])
    seconds = statistics.median(_seconds(trainer) for _ in range(TIMED))
    off = velocity_error(trainer)
    bound = VELOCITY_BOUNDS["fp8" if precision == "fp8" else config.model.dtype]
    problems = [
        f"ratio deviates by {deviation:.1e}, at most {RATIO_BOUND:.0e}" if not deviation <= RATIO_BOUND else "",
        f"velocity is off by {off:.1e}, at most {bound:.0e}" if not off <= bound else "",
        f"{failed:.0%} of the samples are not finite" if failed else "",
    ]
    if any(problems):
        return FAILED, "; ".join(filter(None, problems))
    told = "".join(f"; {notice}" for notice in trainer.notices.told_early())
    return PASSED, f"ratio deviates by {deviation:.1e}, velocity by {off:.1e}; {seconds:.3f} s{told}"


def _seconds(trainer: Trainer) -> float:
    """Wall time of one iteration, to the end of its work on the device."""
    _synchronize(trainer.model.device)
    start = time.perf_counter()
    trainer.iteration()
    _synchronize(trainer.model.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def velocity_error(trainer: Trainer) -> float:
    """Relative distance of the rollout's velocity from the policy's. The ratio cannot show it: it is the policy's alone."""
    executor, model = trainer.executor, trainer.model
    executor.refresh()
    slot = torch.arange(3, device=model.device)
    conditioning = model.encode(trainer.stream.prompts[:3])
    x = executor.initial_noise(slot, 0, Stream.PROBE_INIT)
    forwards = (executor.policy, executor.rollout)
    truth, found = (f.velocity(x, slot, f.prepare(conditioning), slot).double() for f in forwards)
    return float((found - truth).norm() / truth.norm())
