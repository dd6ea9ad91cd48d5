"""``adagrpo doctor --self-test``: kernels against references, the on-policy ratio of every forward, three timed iterations."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from adagrpo_kernels import selftest as kernels

from .build import build_model
from .config import Config, EngineConfig, ModelConfig, RolloutConfig, SelectionConfig, TrainConfig
from .engine.backends import forward_problem, precision_problem
from .errors import InputError
from .fit import read_metrics
from .rewards import build_reward
from .tiny.prompts import training_prompts
from .train import Trainer

RATIO = 1e-6
TIMED = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the self-test; ``passed`` is None where nothing was tested."""

    name: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        verdict = {True: "ok", False: "FAILED", None: "skipped"}[self.passed]
        return f"  {self.name:34} {verdict:8} {self.detail}"


def self_test(device: torch.device) -> Iterator[Row]:
    """Every check in turn; one that fails, or raises, does not stop the others. At most two minutes on a GPU."""
    for name, check in kernels.CHECKS.items():
        if device.type == "cuda":
            yield _guarded(f"kernel {name}", functools.partial(_kernel, check, device))
        else:
            yield Row(f"kernel {name}", None, "no CUDA device; `make test` runs it in Triton's interpreter")
    for forward in ("eager", "compile", "fused"):
        for precision in ("auto", "fp8"):
            name = f"iteration {forward}, {precision}"
            problem = forward_problem(forward, device) or (precision_problem("fp8", device) if precision == "fp8" else None)
            if forward == "compile" and device.type == "cpu":
                problem = problem or "minutes of compilation on a CPU"
            if problem:
                yield Row(name, None, problem)
            else:
                engine = dataclasses.replace(EngineConfig(), forward=forward, precision=precision)
                yield _guarded(name, functools.partial(_iterations, device, engine))


def _guarded(name: str, check: Callable[[], tuple[bool, str]]) -> Row:
    """The check's row; an exception is its failure."""
    try:
        return Row(name, *check())
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Row(name, False, f"{type(error).__name__}: {first}" if not isinstance(error, InputError) else first)


def _kernel(check: Callable[[torch.device], kernels.Finding], device: torch.device) -> tuple[bool, str]:
    found = check(device)
    return found.passed, f"error {found.error:.1e}, bound {found.bound:.1e}"


def _iterations(device: torch.device, engine: EngineConfig) -> tuple[bool, str]:
    """Worst ratio deviation and median seconds of three iterations after one of warm-up."""
    trainer = _trainer(device, engine)
    seconds, deviations = [], []
    for i in range(1 + TIMED):
        started = time.perf_counter()
        numbers, _ = read_metrics(trainer.iteration())
        if i:
            seconds.append(time.perf_counter() - started)
        deviations.append(numbers["policy/ratio_deviation"])
    worst = max(deviations)
    return worst <= RATIO, f"ratio - 1: {worst:.1e}, {statistics.median(seconds):.3f} s per iteration"


def _trainer(device: torch.device, engine: EngineConfig) -> Trainer:
    """tiny-flux on ``device``, a short schedule on a CPU."""
    short = {"steps": 6, "sde_steps": (0, 2), "group_size": 3} if device.type == "cpu" else {"steps": 8, "group_size": 8}
    config = Config(
        model=ModelConfig(device=str(device)),
        rollout=RolloutConfig(**short),
        selection=SelectionConfig(candidates=3),
        train=TrainConfig(slots=2),
        engine=engine,
    )
    return Trainer(config, build_model(config.model), [build_reward("brightness", {})], training_prompts("even"))
