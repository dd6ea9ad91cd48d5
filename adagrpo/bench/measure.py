"""One iteration under measurement: time by phase, counted work, host syncs, energy, memory."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from adagrpo_kernels import launch_counts, reset_counts
from torch import Tensor

from ..build import build_trainer
from ..errors import InputError, RunError
from ..forward.forwards import PolicyForward
from ..models.base import FlowModel
from ..profiling.power import gpu_uuid
from ..recipe.derived import Derived
from ..recipe.keys import Config, EngineConfig, RewardConfig
from ..run.metrics import read_metrics
from ..train import Trainer
from .statistics import Series

PHASES = ("probe", "select", "prefix", "rollout", "decode", "reward", "advantage", "update", "sync", "other")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What one iteration took.

    Attributes:
        seconds: by phase of ``PHASES``; they add up to ``total``.
        evaluations, calls: image-forwards of the transformer and batched calls, by phase.
        images: decoded and scored, probes included.
        launches: of our kernels.
        joules: of the whole GPU; None where it cannot be read.
        metrics: of the iteration, as numbers.
    """

    total: float
    seconds: dict[str, float]
    evaluations: dict[str, int]
    calls: dict[str, int]
    images: int
    launches: int
    joules: float | None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


def bench_trainer(config: Config, model: FlowModel | None = None) -> Trainer:
    """A trainer whose phases add up: nothing overlaps. Prompt embeddings are forgotten before each measured iteration."""
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, overlap=False))
    trainer = build_trainer(config, model=model)[0]
    if Derived(config).initial_model_read:
        trainer.model.keep_reference()
    pass_new_prompts(trainer, config)
    return trainer


def pass_new_prompts(trainer: Trainer, config: Config) -> None:
    """Measure iterations as most of a run are: a probe that looks at new prompts does so no longer."""
    if Derived(config).looks_at_unseen:
        trainer.stream.position = len(trainer.stream.prompts)


class EnergyMeter:
    """Energy counter of a GPU, through NVML where ``nvidia-ml-py`` is installed."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        if device.type != "cuda":
            return
        with contextlib.suppress(Exception):  # no package, no driver, no permission: the figure is then null
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid(device))
            self.read()

    def read(self) -> float | None:
        """Joules since the driver was loaded; None where unknown."""
        if self._handle is None:
            return None
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        except self._nvml.NVMLError:
            self._handle = None
            return None


def measure(trainer: Trainer, meter: EnergyMeter | None = None) -> Iteration:
    """Run one iteration, metrics read as a run reads them, and say what it took."""
    forget_prompts(trainer.model)
    trainer.phase.read()
    reset_counts()
    decoded = trainer.score.decoded
    _wait(trainer.model.device)
    joules, started = meter.read() if meter else None, time.perf_counter()
    metrics, _ = read_metrics(trainer.iteration())
    _wait(trainer.model.device)
    total = time.perf_counter() - started
    after = meter.read() if meter else None
    phases = trainer.phase.read()
    seconds = {phase: phases.get(phase, 0.0) for phase in PHASES[:-1]}
    seconds["other"] = total - sum(phases.values())
    counts = trainer.executor.counts
    return Iteration(
        total=total,
        seconds=seconds,
        evaluations={phase: count.evaluations for phase, count in counts.items()},
        calls={phase: count.calls for phase, count in counts.items()},
        images=trainer.score.decoded - decoded,
        launches=sum(launch_counts().values()),
        joules=None if joules is None or after is None else after - joules,
        metrics=metrics,
    )


def rows_seen(trainer: Trainer) -> int | None:
    """Rows that entered a transformer in one iteration, counted by hooks on it and on the rollouts' copy.

    None where hooks do not see every call: own forwards, CUDA graphs, the reference of the KL term.
    """
    executor = trainer.executor
    if (
        executor.graphs is not None
        or not isinstance(executor.rollout, PolicyForward)
        or "reference" in trainer.objective.replays
    ):
        return None
    rows = 0

    def entering(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal rows
        rows += next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)).shape[0]

    transformers = {id(m.transformer): m.transformer for m in (trainer.model, executor.rollout.model)}
    hooks = [t.register_forward_pre_hook(entering, with_kwargs=True) for t in transformers.values()]
    try:
        trainer.iteration()
    finally:
        for hook in hooks:
            hook.remove()
        trainer.phase.read()
    return rows


def forget_prompts(model: FlowModel) -> None:
    """Empty the model's cache of prompt embeddings: with a long prompt list, every prompt is new."""
    forget = getattr(getattr(model, "encoder", None), "forget", None)
    if forget is not None:
        forget()


def interleaved(first: Callable[[], T], second: Callable[[], T], rounds: int, warm_up: int = 1) -> tuple[list[T], list[T]]:
    """Results of A and B in the order A B B A A B B A …, one of each per round, after ``warm_up`` unrecorded rounds."""
    found: tuple[list[T], list[T]] = ([], [])
    runs = (first, second)
    for _ in range(warm_up):
        for run in runs:
            run()
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            found[which].append(runs[which]())
    return found


def phase_series(iterations: Sequence[Iteration], prefix: str = "") -> dict[str, Series]:
    """Seconds in all and by phase, evaluations by phase and in all, round by round; phases that never ran are left out."""
    series = {f"{prefix}seconds": Series("s", tuple(i.total for i in iterations))}
    for phase in PHASES:
        values = tuple(i.seconds[phase] for i in iterations)
        if any(values):
            series[f"{prefix}seconds/{phase}"] = Series("s", values)
    for phase in dict.fromkeys(phase for i in iterations for phase in i.evaluations):
        counted = tuple(float(i.evaluations.get(phase, 0)) for i in iterations)
        series[f"{prefix}evaluations/{phase}"] = Series("evaluations", counted, exact=True)
    totals = tuple(float(sum(i.evaluations.values())) for i in iterations)
    series[f"{prefix}evaluations"] = Series("evaluations", totals, exact=True)
    calls = tuple(float(sum(i.calls.values())) for i in iterations)
    return series | {f"{prefix}calls": Series("calls", calls, exact=True)}


def peak_bytes(device: torch.device) -> int:
    """Peak of the allocator on CUDA; elsewhere peak resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def host_syncs(trainer: Trainer) -> list[str] | None:
    """Where one iteration blocked the host, ``file:line`` once per wait, the final read of the metrics left out.

    None where nobody tells: only CUDA reports them.
    """
    if trainer.model.device.type != "cuda":
        return None
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.iteration()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    trainer.phase.read()
    found = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    return [f"{Path(w.filename).name}:{w.lineno}" for w in found]


class HostRead(NamedTuple):
    """Whether reads of the device could be looked for, and where one is, or why they could not; '' where there is none."""

    checked: bool
    where: str


def host_read(config: Config) -> HostRead:
    """Run an iteration of this recipe on the meta device, where every read raises and nothing is computed.

    Its rewards are replaced by one that reads nothing: those may block the host, beside the next chunk's rollout.
    """
    model = dataclasses.replace(config.model, device="meta")
    copies = ("forward", "precision", "fp8_scaling", "attention", "cuda_graphs")  # none of them on meta
    engine = dataclasses.replace(config.engine, **{key: getattr(EngineConfig(), key) for key in copies})
    try:
        trainer = bench_trainer(dataclasses.replace(config, model=model, engine=engine, rewards=(RewardConfig("brightness"),)))
    except (RuntimeError, InputError) as error:
        return HostRead(False, f"not checked: the model cannot be built on the meta device: {_first_line(error)}")
    if trainer.model.device.type != "meta":
        return HostRead(False, "not checked: the model's adapter ignores the device it is given")
    phase = "other"

    def entered(name: str) -> None:
        nonlocal phase
        phase = name

    trainer.phase.listener = entered
    try:
        trainer.iteration()
    except (RuntimeError, RunError) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
        ours = [f for f in frames if "site-packages" not in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "unknown place"
        return HostRead(True, f"phase {phase}, {where}: {_first_line(error)}")
    return HostRead(True, "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def overlapping(trainer: Trainer) -> Iterator[None]:
    """Within it the trainer decodes and scores on a second stream, as in a run (CUDA only)."""
    device = trainer.model.device
    trainer.score.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        trainer.score.stream = None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
