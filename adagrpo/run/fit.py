"""A whole run around the training loop: evaluate, guard, log, draw, save, resume, compare."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from adagrpo_kernels import implementations, telling
from torch import Tensor
from tqdm import tqdm

from ..disk.files import WriteError, replacing, told, writing
from ..errors import InputError, RunError
from ..estimate.memory import MemoryPlan, PeakMeter, checkpoint_bytes
from ..evaluate.held_out import PairedGain
from ..parts.isolation import PartHung, leaving_when, own
from ..prompts import prompt_category
from ..recipe.derived import Derived
from ..recipe.keys import Config
from ..recipe.load import to_toml
from ..recipe.rules import memory_notice
from ..report.page import write_report
from ..rewards import PromptRows
from ..text.redaction import redacted, scrubbed
from ..train import Trainer
from .checkpoint import Retention, abandon_later, load_state, require_space, save_checkpoint
from .folder import RunFolder
from .grid import save_grid
from .guards import Guards, Trip
from .held_out import HeldOut
from .loggers import Dashboard, open_loggers
from .origin import Origin
from .signals import StopRequest
from .trace import export_trace

MEMORY = "memory.json"
EXIT_GUARD = 3


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code (0 finished, 3 stopped by a guard, 128 + signal), and the comparison if it finished."""

    exit_code: int
    gain: PairedGain | None = None


class Fit:
    """Runs a trainer to the end of its recipe inside a run folder.

    Args:
        trainer: at its initial weights.
        run: the folder.
        held_out: prompts of the held-out evaluation.
        say: receives lines for the user.
        plan: of the memory; compared with what the run took.
    """

    def __init__(
        self,
        trainer: Trainer,
        run: RunFolder,
        held_out: Sequence[str],
        say: Callable[[str], None] = tqdm.write,
        plan: MemoryPlan | None = None,
    ) -> None:
        self.trainer, self.run, self.say = trainer, run, unfailing(say)
        self.plan, self.meter = plan, PeakMeter(trainer.model.device)
        self.config: Config = trainer.config
        self.held_out = HeldOut(trainer, run, held_out, lambda message: self._event("warning", message))
        self.guards = Guards(self.config.guards)
        self.category = prompt_category(self.config.data.prompts)
        self.rollbacks = 0
        self._kernels_recorded: dict[str, str] = {}
        self._saved_now = False
        self.best = -math.inf
        self._sound, self._held_out_now = False, None  # of the last finished iteration
        self._unfinished: dict[str, Any] | None = None
        base = self.config.model.path, to_toml(self.config), self.config.loss.kl_weight > 0
        self.origin = Origin(trainer.model, *base, lambda message: self._event("warning", message))
        trainer.say = lambda message: self._event("memory" if message.startswith("out of memory") else "warning", message)
        if self.config.loss.kl_weight:
            trainer.model.keep_reference()

    def resume(self, checkpoint: Path, verified: bool = False) -> None:
        """Continue from ``checkpoint``: later lines of ``metrics.jsonl`` are dropped, later checkpoints renamed.

        Args:
            verified: its files were checked a moment ago.

        Raises:
            InputError: the checkpoint is damaged, or of another model, run or recipe.
            WriteError: the records of the run cannot be brought back to where they were.
        """
        if not verified:
            self.run.require_own(checkpoint)
        self.origin.check(checkpoint)
        try:
            self._restore(checkpoint)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{checkpoint}: a checkpoint of another model or recipe ({error})") from error
        self._restore_records(checkpoint)
        self._event("resume", f"resumed from {checkpoint} after iteration {self.trainer.iterations_done}")

    def note_opening(self, notice: str = "") -> None:
        """Tell and record how the folder was found: ``notice``, and the keys that a resumed run changes."""
        if notice:
            self._event("warning", notice)
        if changed := self.run.record_changes(self.config, self.trainer.iterations_done):
            self._event("resume", changed)

    def __call__(self) -> Outcome:
        """Train to the last iteration, a guard's stop or a signal.

        Raises:
            RunError: the run cannot go on; the last complete checkpoint is intact.
        """
        size = checkpoint_bytes(self.trainer.optimizer.parameters, bool(self.trainer.optimizer.averages))
        require_space(self.run.checkpoints, size, Derived(self.config).checkpoints_kept)
        self._tell_notices()
        if self.trainer.iterations_done == 0 and (other := self.origin.begin(self.run.path)):
            self._event("warning", f"another base model than at the last start here ({other}): everything is measured anew")
        self._plan_memory()
        if notice := memory_notice(self.config, len(self.trainer.stream.prompts)):
            self._event("warning", notice)
        with telling(lambda message: self._event("warning", message)):
            self.trainer.with_memory(self.held_out.try_rewards)
            with contextlib.ExitStack() as closing:
                loggers = self._open_loggers(closing)
                before = self.held_out.before()
                try:
                    outcome = self._train(loggers)
                except BaseException:
                    told(self._compare_memory, self.say)
                    raise
                self._compare_memory()
            if not outcome.exit_code:
                outcome = Outcome(0, self.held_out.compare(before))
        self._report()
        return outcome

    def _plan_memory(self) -> None:
        """The plan, in a line and in the run folder."""
        if self.plan is not None:
            self.say(self.plan.summary())
            self.run.write_json(MEMORY, {"plan": self.plan.as_dict()})

    def _compare_memory(self) -> None:
        """What the run took beside the plan."""
        if self.plan is not None:
            measured, line = self.meter.report(self.plan)
            self.run.write_json(MEMORY, {"plan": self.plan.as_dict(), "measured": measured, "comparison": line})
            self.say(line)

    def _open_loggers(self, closing: contextlib.ExitStack) -> list[Dashboard]:
        """The dashboards, closed by ``closing``."""
        say = lambda message: self._event("warning", message)  # noqa: E731
        recipe = dataclasses.asdict(redacted(self.config))
        loggers = open_loggers(self.config.output.loggers, self.run.name(), self.run.path, recipe, say)
        return [closing.enter_context(logger) for logger in loggers]

    def _train(self, loggers: Sequence[Dashboard]) -> Outcome:
        """The iterations."""
        total = self.config.train.iterations
        bar = tqdm(total=total, initial=self.trainer.iterations_done, disable=None, unit="it", dynamic_ncols=True)
        with StopRequest(self.say).listening() as stop, leaving_when(lambda: stop.signal is not None), bar:
            if not bar.disable:
                self.trainer.phase.listener = lambda phase: bar.set_description_str(f"{phase:9}")
            try:
                return self._iterate(loggers, stop, bar)
            except PartHung as error:
                return self._leave(error, stop)

    def _iterate(self, loggers: Sequence[Dashboard], stop: StopRequest, bar: tqdm[Any]) -> Outcome:
        if self.trainer.iterations_done == 0:
            self._show(0)
        total = self.config.train.iterations
        while (self._unfinished is not None or self.trainer.iterations_done < total) and not stop.signal:
            record, trips = self._one_iteration()
            for logger in loggers:
                logger.log({k: v for k, v in record.items() if isinstance(v, float | int)}, record["iteration"])
            bar.set_postfix_str(f"reward {record['reward/train']:.3f}")
            bar.update(self.trainer.iterations_done - bar.n)
            if any(trip.action == "stop" for trip in trips):
                return Outcome(EXIT_GUARD)
        if stop.signal:
            saved = self.save(self._held_out_now) if self._sound and not self._saved_now else self.run.latest_checkpoint()
            self._event("signal", f"stopped by {stop.signal.name}; last checkpoint: {saved or 'none'}")
        return Outcome(stop.exit_code)

    def _leave(self, error: PartHung, stop: StopRequest) -> Outcome:
        """A part hangs: save the state after the last finished iteration; the part's thread stays behind.

        Raises:
            RunError: nobody asked to stop.
        """
        saved = self.run.latest_checkpoint()
        if self.trainer.rewind() and self._sound and not self._saved_now:
            saved = self.save(self._held_out_now)
        kept = f"last checkpoint: {saved or 'none'}"
        if not stop.signal:
            raise RunError(f"{error}; then continue with --resume auto ({kept})") from error
        self._event("signal", f"stopped by {stop.signal.name}: {error}; {kept}")
        return Outcome(stop.exit_code)

    def _one_iteration(self) -> tuple[dict[str, Any], list[Trip]]:
        """Train, then conclude; an iteration that a part's hanging left before its end is only concluded."""
        if self._unfinished is None:
            self._unfinished = self._advance()
        self._sound, self._saved_now, self._held_out_now = _finite(self._unfinished), False, None
        return self._conclude(self._unfinished)

    def _advance(self) -> dict[str, Any]:
        """One iteration of the trainer, and its record."""
        started = time.perf_counter()
        self.meter.observe()
        if self.trainer.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.trainer.model.device)
        metrics = self._traced_iteration()
        self._record_kernels()
        done = self.trainer.iterations_done
        numbers, picked = read_metrics(metrics)
        record: dict[str, Any] = {"iteration": done, **numbers}
        record |= self._performance(time.perf_counter() - started)
        if self.category is not None:
            record["selection/categories"] = dict(Counter(map(self.category, picked)))
        return record

    def _conclude(self, record: dict[str, Any]) -> tuple[dict[str, Any], list[Trip]]:
        """Evaluate, judge, then (only if it is sound) save."""
        done, output = record["iteration"], self.config.output
        last = done == self.config.train.iterations
        evaluated = _due(done, self.config.evaluation.every) or (last and self.config.evaluation.every > 0)
        if evaluated:
            record = record | self.held_out.curve()
            self.say(
                f"iteration {done}: reward train {record['reward/train']:.3f}, held-out {record['reward/held_out']:.3f}, "
                f"{record['perf/seconds']:.2f} s"
            )
        self.run.log(record)
        self._unfinished, self._held_out_now = None, record.get("reward/held_out")
        trips = self._judge(record)
        self._sound = self._sound and not any(trip.action == "rollback" for trip in trips)
        if any(trip.action != "warn" for trip in trips) or not _finite(record):
            return record, trips
        improved = output.keep_best and record.get("reward/held_out", -math.inf) > self.best
        self.best = max(self.best, record.get("reward/held_out", -math.inf))
        if _due(done, output.grid_every) or (last and output.grid_every):
            self._show(done)
        if _due(done, output.checkpoint_every) or last or improved:
            self.save(record.get("reward/held_out"))
        if evaluated:
            self._report()
        return record, trips

    def _traced_iteration(self) -> dict[str, Any]:
        """One iteration of the trainer, under the profiler if the recipe wants its trace."""
        number = self.trainer.iterations_done + 1
        if number != self.config.output.trace_at:
            return self.trainer.iteration()
        with torch.profiler.profile() as profiler:
            metrics = self.trainer.iteration()
        path = self.run.path / "traces" / f"iteration-{number:06d}.json.gz"
        self._write_aside(path, lambda draft: export_trace(profiler, draft))
        return metrics

    def _record_kernels(self) -> None:
        """What ran for each operator of the algorithm, in the manifest: after the first iteration, and when that changes."""
        ran = implementations()
        if ran == self._kernels_recorded:
            return
        self._kernels_recorded = ran
        self.run.extend_manifest({"kernels": ran})

    def save(self, held_out: float | None = None) -> Path:
        """Write a checkpoint; its portable part holds the weight EMA where one is kept.

        Raises:
            RunError: it cannot be written; earlier checkpoints are intact.
        """

        def portable(folder: Path) -> None:
            with self.trainer.optimizer.averaged_weights():
                self.trainer.model.save_portable(folder)
            self.origin.write(folder)

        self.run.require_ownership()
        o = self.config.output
        state = {
            "trainer": self.trainer.state_dict(),
            "guards": self.guards.state_dict(),
            "rollbacks": self.rollbacks,
            "best": self.best,
            "held_out": self.held_out.measure,
            "baseline": self.held_out.baseline,
            "unfinished": self._unfinished,
        }
        # An iteration that is not judged yet takes the place of none that is.
        retention = Retention(o.keep_last, o.keep_every, o.keep_best) if self._unfinished is None else None
        done = self.trainer.iterations_done
        try:
            records, run = self.run.records(), self.run.identity()
            path = save_checkpoint(self.run.checkpoints, done, state, portable, retention, held_out, records, run)
        except WriteError as error:
            kept = self.run.latest_checkpoint()
            raise RunError(
                f"checkpoint of iteration {done} could not be written to {self.run.checkpoints}: {error.reason}; "
                f"{error.remedy} or lower output.keep_last, then continue with --resume auto "
                f"(last complete checkpoint: {kept or 'none'})"
            ) from error
        self._saved_now = True
        return path

    def _judge(self, record: dict[str, Any]) -> list[Trip]:
        """Let the guards act; a rollback that is not possible becomes a stop."""
        trips = self.guards.observe(record)
        decided: list[Trip] = []
        for trip in trips:
            if trip.action == "rollback" and not any(t.action == "rollback" for t in decided):
                trip = self._roll_back(trip, record["iteration"])
            kind = {"warn": "warning"}.get(trip.action, trip.action)
            self._event(kind, trip.message, record["iteration"])
            decided.append(trip)
        return decided

    def _roll_back(self, trip: Trip, iteration: int) -> Trip:
        """Restore the last checkpoint before ``iteration``, but go on with prompts and noise not used yet."""
        try:
            # Not that of a judged iteration itself, which is saved where a part hung before it was judged.
            checkpoint, reason = self.run.sound_checkpoint(before=iteration), "no checkpoint yet"
        except InputError as error:
            checkpoint, reason = None, str(error)
        if self.rollbacks >= self.config.guards.max_rollbacks:
            checkpoint, reason = None, f"{self.rollbacks} rollbacks already"
        if checkpoint is None:
            return dataclasses.replace(trip, action="stop", message=f"{trip.message}; stopping: {reason}")
        draws, position, rollbacks = self.trainer.draws, self.trainer.stream.position, self.rollbacks + 1
        limit = self.trainer.executor.limit.state
        self._restore(checkpoint)
        self._restore_records(checkpoint)
        self.trainer.draws, self.trainer.stream.position, self.rollbacks = draws, position, rollbacks
        self.trainer.executor.limit.state = limit  # memory is what it is, whatever the weights
        message = f"{trip.message}; back to iteration {self.trainer.iterations_done}, with new prompts and noise"
        return dataclasses.replace(trip, message=message)

    def _restore(self, checkpoint: Path) -> None:
        """Trainer, guards and counters from a verified checkpoint."""
        state = load_state(checkpoint)
        self.trainer.load_state_dict(state["trainer"])
        self.guards.load_state_dict(state["guards"])
        self.rollbacks, self.best = state["rollbacks"], state["best"]
        self._unfinished = state.get("unfinished")
        if state.get("held_out", self.held_out.measure) != self.held_out.measure:  # a best of other prompts is none of these
            self.best = -math.inf
            self.guards.forget_best()
        self.held_out.baseline = own(state.get("baseline", self.held_out.baseline))

    def _restore_records(self, checkpoint: Path) -> None:
        """The run folder as it was when ``checkpoint`` was written; what was damaged or lies later is told."""
        done = self.trainer.iterations_done
        with writing(self.run.checkpoints):  # first: metrics are cut next, and a later checkpoint must not find its own gone
            self.run.notices += abandon_later(self.run.checkpoints, checkpoint, done, self.run.skipped)
        self.run.restore(done, checkpoint)
        self.run.notices += self.origin.mend(self.run.path, checkpoint)
        if done < self.config.train.iterations:
            self.run.retire("result.json")
        self._tell_notices()

    def _tell_notices(self) -> None:
        """What the run folder found on opening, to the user and the events; what was told of the trainer's making, to those."""
        for notice in self.trainer.told_early():
            self.run.event(self.trainer.iterations_done, "warning", notice)
        notices, self.run.notices = self.run.notices, []
        for notice in notices:
            self._event("warning", notice)

    def _performance(self, seconds: float) -> dict[str, float]:
        phases = self.trainer.phase.read()
        record = {"perf/seconds": seconds}
        record |= {f"perf/{phase}_seconds": spent for phase, spent in phases.items()}
        record["perf/other_seconds"] = max(0.0, seconds - sum(phases.values()))
        for phase, count in self.trainer.executor.counts.items():
            record |= {f"perf/{phase}_evaluations": count.evaluations, f"perf/{phase}_calls": count.calls}
        if self.trainer.model.device.type == "cuda":
            if self.trainer.executor.graphs is not None:
                record["mem/graph_bytes"] = self.trainer.executor.graphs.pool_bytes
            record["mem/peak_bytes"] = torch.cuda.max_memory_allocated(self.trainer.model.device)
        return record

    def _show(self, iteration: int) -> None:
        """A sample grid of fixed held-out prompts and noise; a failure to write it is told, and ends nothing."""
        if not self.config.output.grid_every:
            return
        images, prompts, rewards = self.held_out.draw_grid(self.config.output.grid_prompts)
        path = self.run.samples / f"step-{iteration:06d}.png"
        if self._write_aside(path, lambda draft: save_grid(Path(draft), images, prompts, rewards)):
            self.run.vouch(path)

    def _write_aside(self, path: Path, write: Callable[[str], object]) -> bool:
        """Write what a run can do without; whether it was written. A failure is told and ends nothing, but for a full disk."""
        try:
            with replacing(path) as draft:
                path.parent.mkdir(exist_ok=True)
                write(str(draft))
        except WriteError as error:
            if error.disk:
                raise
            self._event("warning", f"{path.name} could not be written: {error.reason}")
            return False
        return True

    def _report(self) -> None:
        """Rewrite the live report; a failure there is told, and ends nothing."""
        try:
            write_report([self.run.path], self.run.path / "report.html")
        except WriteError:
            raise
        except Exception as error:
            self._event("warning", f"report.html could not be written: {type(error).__name__}: {error}")

    def _event(self, kind: str, message: str, iteration: int | None = None) -> None:
        self.run.event(self.trainer.iterations_done if iteration is None else iteration, kind, message)
        self.say(scrubbed(message))


def read_metrics(metrics: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Metrics that are tensors or numbers, as numbers, and the picked prompts: the one copy to the host of an iteration."""
    picked: PromptRows = metrics["selection/picked"]
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    values = [value.detach().double().reshape(1) for value in tensors.values()]
    read = torch.cat([*values, picked.text_index.double()]).tolist()
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    texts = [picked.texts[int(i)] for i in read[len(tensors) :]]
    return dict(zip(tensors, read, strict=False)) | numbers, texts


def unfailing(say: Callable[[str], None]) -> Callable[[str], None]:
    """``say``, but a terminal or log that takes no more lines ends nothing: the run's own record is its folder."""

    def safe(line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            say(line)

    return safe


def _finite(record: dict[str, Any]) -> bool:
    return math.isfinite(record["policy/loss"]) and math.isfinite(record["policy/grad_norm"])


def _due(iteration: int, every: int) -> bool:
    return every > 0 and iteration % every == 0
