"""A whole run around the training loop: train, evaluate, judge, save, compare."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from adagrpo_kernels import implementations, telling
from tqdm import tqdm

from ..disk.files import told
from ..errors import RunError
from ..estimate.memory import MemoryPlan, PeakMeter, checkpoint_bytes
from ..evaluate.held_out import PairedGain
from ..parts.isolation import PartHung, leaving_when
from ..prompts.sources import prompt_category
from ..recipe.derived import Derived
from ..recipe.keys import Config
from ..recipe.rules import repeats_notice
from ..text.redaction import redacted
from ..train import Trainer
from .checkpoint import require_space
from .exhibits import Exhibits
from .folder import RunFolder
from .guards import Trip
from .held_out import HeldOut
from .loggers import Dashboard, open_loggers
from .metrics import is_finite, of_all_ranks, performance, read_metrics, reward_words
from .signals import StopRequest
from .state import RunState
from .telling import Telling

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
        config: the recipe.
        trainer: of it, at its initial weights.
        run: the folder.
        held_out: prompts of the held-out evaluation.
        say: receives lines for the user.
        memory_plan: compared with what the run took.
    """

    def __init__(
        self,
        config: Config,
        trainer: Trainer,
        run: RunFolder,
        held_out: Sequence[str],
        say: Callable[[str], None] = tqdm.write,
        memory_plan: MemoryPlan | None = None,
    ) -> None:
        self.config, self.trainer, self.run = config, trainer, run
        self.telling = Telling(trainer, run, say)
        self.memory_plan, self.meter = memory_plan, PeakMeter(trainer.model.device)
        self.held_out = HeldOut(config, trainer, run, held_out, self.telling.warn)
        self.state = RunState(config, trainer, run, self.held_out, self.telling)
        self.exhibits = Exhibits(config.output, trainer, run, self.held_out, self.telling)
        self.category = prompt_category(self.config.data.prompts, trainer.stream.prompts)
        self._kernels_recorded: dict[str, str] = {}
        self._unsound: list[str] = []
        if Derived(self.config).initial_model_read:
            trainer.model.keep_reference()

    def resume(self, checkpoint: Path, verified: bool = False) -> None:
        """Continue from ``checkpoint``: see ``RunState.resume``."""
        self.state.resume(checkpoint, verified)
        self.telling.event("resume", f"resumed from {checkpoint} after iteration {self.trainer.iterations_done}")

    def note_opening(self, notice: str = "") -> None:
        """Tell and record how the folder was found: ``notice``, and the keys that a resumed run changes."""
        if notice:
            self.telling.warn(notice)
        if changed := self.run.record_changes(self.config, self.trainer.iterations_done):
            self.telling.event("resume", changed)

    def __call__(self) -> Outcome:
        """Train to the last iteration, a guard's stop or a signal.

        Raises:
            RunError: the run cannot go on; the last complete checkpoint is intact.
        """
        self.trainer.ranks.told(self._take_place, "the start of the run")
        self._plan_memory()
        if notice := repeats_notice(self.config, len(self.trainer.stream.prompts)):
            self.telling.warn(notice)
        with telling(self.telling.warn):
            self.held_out.try_rewards()
            with contextlib.ExitStack() as closing:
                loggers = self._open_loggers(closing)
                before = self.held_out.before()
                try:
                    outcome = self._train(loggers)
                except BaseException:
                    told(self._compare_memory, self.telling.say)
                    raise
                self._compare_memory()
            if not outcome.exit_code:
                outcome = Outcome(0, self.held_out.compare(before))
        self.exhibits.report()
        return outcome

    def _take_place(self) -> None:
        """Room for the checkpoints, and the record of the base model."""
        optimizer, reference = self.trainer.optimizer, bool(getattr(self.trainer.model, "reference_adapters", None))
        size = checkpoint_bytes(optimizer.parameters, bool(optimizer.averages), reference)
        require_space(self.run.checkpoints, size, Derived(self.config).checkpoints_kept)
        self.telling.notices()
        if self.trainer.iterations_done == 0 and (other := self.state.origin.begin(self.run.path)):
            self.telling.warn(f"another base model than at the last start here ({other}): everything is measured anew")

    def _plan_memory(self) -> None:
        """The plan, in a line and in the run folder."""
        if self.memory_plan is not None:
            self.telling.say(self.memory_plan.summary())
            self.run.write_json(MEMORY, {"plan": self.memory_plan.as_dict()})

    def _compare_memory(self) -> None:
        """What the run took beside the plan."""
        if self.memory_plan is not None:
            measured, line = self.meter.report(self.memory_plan)
            self.run.write_json(MEMORY, {"plan": self.memory_plan.as_dict(), "measured": measured, "comparison": line})
            self.telling.say(line)

    def _open_loggers(self, closing: contextlib.ExitStack) -> list[Dashboard]:
        """The dashboards, closed by ``closing``; the first rank's."""
        if not self.trainer.ranks.writes:
            return []
        recipe = dataclasses.asdict(redacted(self.config))
        loggers = open_loggers(self.config.output.loggers, self.run.name(), self.run.path, recipe, self.telling.warn)
        return [closing.enter_context(logger) for logger in loggers]

    def _train(self, loggers: Sequence[Dashboard]) -> Outcome:
        """The iterations."""
        total = self.config.train.iterations
        quiet = None if self.trainer.ranks.writes else True
        bar = tqdm(total=total, initial=self.trainer.iterations_done, disable=quiet, unit="it", dynamic_ncols=True)
        with StopRequest(self.telling.say).listening() as stop, leaving_when(lambda: stop.signal is not None), bar:
            self.trainer.phase.listener = self._listener(bar)
            try:
                return self._iterate(loggers, stop, bar)
            except PartHung as error:
                return self._leave(error, stop)

    def _listener(self, bar: tqdm[Any]) -> Callable[[str], object]:
        """Who is told of phases: the progress bar, and the heartbeat of a rank among several."""
        beat = self.trainer.ranks.beat.at if self.trainer.ranks.size > 1 else None

        def begun(phase: str) -> None:
            if beat is not None:
                beat(phase)
            if not bar.disable:
                bar.set_description_str(f"{phase:9}")

        return begun

    def _iterate(self, loggers: Sequence[Dashboard], stop: StopRequest, bar: tqdm[Any]) -> Outcome:
        if self.trainer.iterations_done == 0:
            self.exhibits.grid(0)
        total = self.config.train.iterations
        while (self.state.unfinished is not None or self.trainer.iterations_done < total) and not self._asked_to_stop(stop):
            record, trips = self._one_iteration()
            for logger in loggers:
                logger.log({k: v for k, v in record.items() if isinstance(v, float | int)}, record["iteration"])
            bar.set_postfix_str(f"reward {record['reward/train']:.3f}")
            bar.update(self.trainer.iterations_done - bar.n)
            if any(trip.action == "stop" for trip in trips):
                return Outcome(EXIT_GUARD)
        if stop.signal:
            self.telling.event("signal", f"stopped by {stop.signal.name}; last checkpoint: {self.state.save_last() or 'none'}")
        return Outcome(stop.exit_code)

    def _asked_to_stop(self, stop: StopRequest) -> bool:
        """Whether a signal reached any rank."""
        if number := self.trainer.ranks.most(stop.signal or 0, "the start of an iteration"):
            stop.signal = stop.signal or signal.Signals(number)
        return bool(number)

    def _leave(self, error: PartHung, stop: StopRequest) -> Outcome:
        """A part hangs: save the state after the last finished iteration; the part's thread stays behind. Of several ranks the
        others are elsewhere, so nothing is saved.

        Raises:
            RunError: nobody asked to stop.
        """
        alone = self.trainer.ranks.size == 1
        saved = self.state.save_last() if alone and self.trainer.rewind() else self.run.latest_checkpoint()
        kept = f"last checkpoint: {saved or 'none'}"
        if not stop.signal or not alone:
            raise RunError(f"{error}; then continue with --resume auto ({kept})") from error
        self.telling.event("signal", f"stopped by {stop.signal.name}: {error}; {kept}")
        return Outcome(stop.exit_code)

    def _one_iteration(self) -> tuple[dict[str, Any], list[Trip]]:
        """Train, then conclude; an iteration that a part's hanging left before its end is only concluded."""
        state = self.state
        if state.unfinished is None:
            state.unfinished = self._advance()
        state.sound, state.saved, state.held_out_now = is_finite(state.unfinished), False, None
        return self._conclude(state.unfinished)

    def _advance(self) -> dict[str, Any]:
        """One iteration of the trainer, and its record."""
        started = time.perf_counter()
        self.trainer.ranks.beat.at("start", self.trainer.iterations_done + 1)
        self.meter.observe()
        if self.trainer.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.trainer.model.device)
        metrics = self.exhibits.iteration()
        self.trainer.ranks.meet("the end of an iteration")  # before the host waits for the device
        self._record_kernels()
        done = self.trainer.iterations_done
        numbers, picked = read_metrics(metrics)
        mine = numbers | performance(self.trainer, time.perf_counter() - started)
        record: dict[str, Any] = {"iteration": done}
        unsound = f"rank {self.trainer.ranks.rank} on {socket.gethostname()}" if self.trainer.optimizer.read_unsound() else ""
        found = self.trainer.ranks.all_of((mine, unsound), "the end of an iteration")
        record |= of_all_ranks([numbers for numbers, _ in found])
        self._unsound = [rank for _, rank in found if rank]
        if self.category is not None:
            record["selection/categories"] = dict(Counter(map(self.category, picked)))
        return record

    def _conclude(self, record: dict[str, Any]) -> tuple[dict[str, Any], list[Trip]]:
        """Evaluate, judge, then (only if it is sound) save."""
        done, output, state = record["iteration"], self.config.output, self.state
        last = done == self.config.train.iterations
        evaluated = _due(done, self.config.evaluation.every) or (last and self.config.evaluation.every > 0)
        if evaluated:
            record = record | self.held_out.curve()
            self.telling.say(
                f"iteration {done}: reward train {record['reward/train']:.3f}, held-out {record['reward/held_out']:.3f}, "
                f"{record['perf/seconds']:.2f} s{reward_words(record)}"
            )
        if self.trainer.ranks.writes:
            self.run.log(record)
        state.unfinished, state.held_out_now = None, record.get("reward/held_out")
        trips = self._judge(record)
        state.sound = state.sound and not any(trip.action == "rollback" for trip in trips)
        if any(trip.action != "warn" for trip in trips) or not is_finite(record):
            return record, trips
        improved = output.keep_best and record.get("reward/held_out", -math.inf) > state.best
        state.best = max(state.best, record.get("reward/held_out", -math.inf))
        if _due(done, output.grid_every) or (last and output.grid_every):
            self.exhibits.grid(done)
        if _due(done, output.checkpoint_every) or last or improved:
            state.save(record.get("reward/held_out"))
        if evaluated:
            self.exhibits.report()
        return record, trips

    def _record_kernels(self) -> None:
        """What ran for each operator of the algorithm, in the manifest: after the first iteration, and when that changes."""
        ran = implementations()
        if ran == self._kernels_recorded:
            return
        self._kernels_recorded = ran
        self.run.extend_manifest({"kernels": ran})

    def _judge(self, record: dict[str, Any]) -> list[Trip]:
        """Let the guards act; a rollback that is not possible becomes a stop."""
        trips = self.state.guards.observe(record)
        decided: list[Trip] = []
        for trip in trips:
            if trip.name == "non_finite" and self._unsound:
                trip = dataclasses.replace(
                    trip, message=f"{trip.message}; the gradients of {', '.join(self._unsound)} were not"
                )
            if trip.action == "rollback" and not any(t.action == "rollback" for t in decided):
                trip = self._roll_back(trip, record["iteration"])
            kind = {"warn": "warning"}.get(trip.action, trip.action)
            self.telling.event(kind, trip.message, record["iteration"])
            decided.append(trip)
        return decided

    def _roll_back(self, trip: Trip, iteration: int) -> Trip:
        """What becomes of a rollback that ``trip`` wants after ``iteration``."""
        if problem := self.state.roll_back(iteration):
            return dataclasses.replace(trip, action="stop", message=f"{trip.message}; stopping: {problem}")
        message = f"{trip.message}; back to iteration {self.trainer.iterations_done}, with new prompts and noise"
        return dataclasses.replace(trip, message=message)


def _due(iteration: int, every: int) -> bool:
    return every > 0 and iteration % every == 0
