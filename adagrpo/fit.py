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

from .algorithm.sde import Stream
from .config import Config
from .engine.memory import MemoryPlan, PeakMeter, checkpoint_bytes
from .errors import InputError, RunError
from .evaluation import PairedGain, decode, evaluate, paired_gain, sample_latents
from .planning import memory_notice
from .prompts import prompt_category
from .recipe import to_toml
from .rewards import PromptRows
from .run.checkpoint import Retention, abandon_later, load_state, require_space, save_checkpoint
from .run.folder import RunFolder
from .run.grid import save_grid
from .run.guards import Guards, Trip
from .run.loggers import Logger, open_loggers
from .run.origin import Origin
from .run.report import write_report
from .run.signals import StopRequest
from .train import Trainer

BASELINE, MEMORY = "baseline.json", "memory.json"
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
        self.trainer, self.run, self.say = trainer, run, say
        self.plan, self.meter = plan, PeakMeter(trainer.model.device)
        self.config: Config = trainer.config
        e = self.config.evaluation
        self.held_out, self.final_prompts = list(held_out)[: e.prompts], list(held_out)[: e.final_prompts]
        self.guards = Guards(self.config.guards)
        self.category = prompt_category(self.config.data.prompts)
        self.rollbacks = 0
        self._kernels_recorded: dict[str, str] = {}
        self._saved_now = False
        self.best = -math.inf
        base = self.config.model.path, to_toml(self.config), self.config.loss.kl_weight > 0
        self.origin = Origin(trainer.model, *base, lambda message: self._event("warning", message))
        trainer.say = lambda message: self._event("memory" if message.startswith("out of memory") else "warning", message)
        if self.config.loss.kl_weight:
            trainer.model.keep_reference()

    def resume(self, checkpoint: Path) -> None:
        """Continue from ``checkpoint``: later lines of ``metrics.jsonl`` are dropped, later checkpoints renamed.

        Raises:
            InputError: the checkpoint is damaged, or of another model, run or recipe.
        """
        self.origin.check(checkpoint)
        try:
            self._restore(checkpoint)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{checkpoint}: a checkpoint of another model or recipe ({error})") from error
        self.run.truncate_metrics(self.trainer.iterations_done)
        for path in abandon_later(self.run.checkpoints, self.trainer.iterations_done):
            self._event("warning", f"{path.name} is later than the checkpoint resumed from: renamed to abandoned-{path.name}")
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
        o, total = self.config.output, self.config.train.iterations
        kept = o.keep_last + o.keep_best + (total // o.keep_every if o.keep_every else 0)
        size = checkpoint_bytes(self.trainer.optimizer.parameters, bool(self.trainer.optimizer.averages))
        require_space(self.run.checkpoints, size, kept)
        if self.trainer.iterations_done == 0 and (other := self.origin.begin(self.run.path)):
            (self.run.path / BASELINE).unlink(missing_ok=True)
            self._event("warning", f"another base model than at the last start here ({other}): everything is measured anew")
        self._plan_memory()
        if notice := memory_notice(self.config, len(self.trainer.stream.prompts)):
            self._event("warning", notice)
        with telling(lambda message: self._event("warning", message)):
            self.trainer.with_memory(self._try_rewards)
            with contextlib.ExitStack() as closing:
                loggers = self._open_loggers(closing)
                before = self._before()
                try:
                    outcome = self._train(loggers)
                finally:
                    self._compare_memory()
            if not outcome.exit_code:
                outcome = Outcome(0, self._compare(before))
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

    def _open_loggers(self, closing: contextlib.ExitStack) -> list[Logger]:
        """The dashboards, closed by ``closing``."""
        loggers = open_loggers(self.config.output.loggers, self.run.name(), self.run.path, dataclasses.asdict(self.config))
        for logger in loggers:
            closing.callback(logger.close)
        return loggers

    def _train(self, loggers: Sequence[Logger]) -> Outcome:
        """The iterations."""
        total = self.config.train.iterations
        bar = tqdm(total=total, initial=self.trainer.iterations_done, disable=None, unit="it", dynamic_ncols=True)
        with StopRequest(self.say).listening() as stop, bar:
            if not bar.disable:
                self.trainer.phase.listener = lambda phase: bar.set_description_str(f"{phase:9}")
            if self.trainer.iterations_done == 0:
                self._show(0)
            while self.trainer.iterations_done < total:
                record, trips = self._one_iteration()
                for logger in loggers:
                    logger.log({k: v for k, v in record.items() if isinstance(v, float | int)}, record["iteration"])
                bar.set_postfix_str(f"reward {record['reward/train']:.3f}")
                bar.update(self.trainer.iterations_done - bar.n)
                if any(trip.action == "stop" for trip in trips):
                    return Outcome(EXIT_GUARD)
                if stop.signal:
                    sound = _finite(record) and not any(trip.action == "rollback" for trip in trips)
                    saved = self.save() if sound and not self._saved_now else self.run.latest_checkpoint()
                    self._event("signal", f"stopped by {stop.signal.name}; last checkpoint: {saved or 'none'}")
                    return Outcome(stop.exit_code)
        return Outcome(0)

    def _one_iteration(self) -> tuple[dict[str, Any], list[Trip]]:
        """Train, evaluate, judge, then (only if it is sound) save."""
        started = time.perf_counter()
        self.meter.observe()
        if self.trainer.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.trainer.model.device)
        metrics = self._traced_iteration()
        self._record_kernels()
        done, output = self.trainer.iterations_done, self.config.output
        numbers, picked = read_metrics(metrics)
        record: dict[str, Any] = {"iteration": done, **numbers}
        record |= self._performance(time.perf_counter() - started)
        if self.category is not None:
            record["selection/categories"] = dict(Counter(map(self.category, picked)))
        last = done == self.config.train.iterations
        evaluated = _due(done, self.config.evaluation.every) or (last and self.config.evaluation.every > 0)
        if evaluated:
            record |= self._evaluate(record)
        self.run.log(record)
        self._saved_now = False
        trips = self._judge(record)
        if any(trip.action != "warn" for trip in trips) or not _finite(record):
            return record, trips
        if _due(done, output.grid_every) or (last and output.grid_every):
            self._show(done)
        improved = output.keep_best and record.get("reward/held_out", -math.inf) > self.best
        self.best = max(self.best, record.get("reward/held_out", -math.inf))
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
        folder = self.run.path / "traces"
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"iteration-{number:06d}.json.gz"))
        return metrics

    def _record_kernels(self) -> None:
        """What ran for each operator of the algorithm, in the manifest: after the first iteration, and when that changes."""
        ran = implementations()
        if ran == self._kernels_recorded:
            return
        self._kernels_recorded = ran
        manifest = self.run.read_json("manifest.json")
        if manifest is not None:
            self.run.write_json("manifest.json", manifest | {"kernels": ran})

    def save(self, held_out: float | None = None) -> Path:
        """Write a checkpoint; its portable part holds the weight EMA where one is kept.

        Raises:
            RunError: it cannot be written; earlier checkpoints are intact.
        """

        def portable(folder: Path) -> None:
            with self.trainer.optimizer.averaged_weights():
                self.trainer.model.save_portable(folder)
            self.origin.write(folder)

        o = self.config.output
        state = {
            "run": self.run.identity(),
            "trainer": self.trainer.state_dict(),
            "guards": self.guards.state_dict(),
            "rollbacks": self.rollbacks,
            "best": self.best,
            "held_out": self._measure,
        }
        retention = Retention(o.keep_last, o.keep_every, o.keep_best)
        done = self.trainer.iterations_done
        try:
            path = save_checkpoint(self.run.checkpoints, done, state, portable, retention, held_out)
        except (OSError, RuntimeError) as error:
            kept = self.run.latest_checkpoint()
            raise RunError(
                f"checkpoint of iteration {done} could not be written to {self.run.checkpoints}: {error}; free disk space or "
                f"lower output.keep_last, then continue with --resume latest (last complete checkpoint: {kept or 'none'})"
            ) from error
        self._saved_now = True
        return path

    def _judge(self, record: dict[str, Any]) -> list[Trip]:
        """Let the guards act; a rollback that is not possible becomes a stop."""
        trips = self.guards.observe(record)
        decided: list[Trip] = []
        for trip in trips:
            if trip.action == "rollback" and not any(t.action == "rollback" for t in decided):
                trip = self._roll_back(trip)
            kind = {"warn": "warning"}.get(trip.action, trip.action)
            self._event(kind, trip.message, record["iteration"])
            decided.append(trip)
        return decided

    def _roll_back(self, trip: Trip) -> Trip:
        """Restore the last checkpoint, but go on with prompts and noise not used yet."""
        checkpoint = self.run.latest_checkpoint()
        if checkpoint is None or self.rollbacks >= self.config.guards.max_rollbacks:
            reason = "no checkpoint yet" if checkpoint is None else f"{self.rollbacks} rollbacks already"
            return dataclasses.replace(trip, action="stop", message=f"{trip.message}; stopping: {reason}")
        draws, position, rollbacks = self.trainer.draws, self.trainer.stream.position, self.rollbacks + 1
        self._restore(checkpoint)
        self.trainer.draws, self.trainer.stream.position, self.rollbacks = draws, position, rollbacks
        self.run.truncate_metrics(self.trainer.iterations_done)
        message = f"{trip.message}; back to iteration {self.trainer.iterations_done}, with new prompts and noise"
        return dataclasses.replace(trip, message=message)

    def _restore(self, checkpoint: Path) -> None:
        state = load_state(checkpoint)
        theirs, ours = state.get("run"), self.run.identity()
        if theirs and ours and theirs != ours:
            raise InputError(
                f"{checkpoint}: of another run ({theirs}; {self.run.path} is {ours}); name a checkpoint of this one"
            )
        self.trainer.load_state_dict(state["trainer"])
        self.guards.load_state_dict(state["guards"])
        self.rollbacks, self.best = state["rollbacks"], state["best"]
        if state.get("held_out", self._measure) != self._measure:  # a best of other prompts is none of these
            self.best = -math.inf
            self.guards.forget_best()

    @property
    def _measure(self) -> list[int]:
        """What the held-out reward is a mean over: prompts and noises."""
        return [len(self.held_out), self.config.evaluation.noises]

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

    def _scores(self, prompts: Sequence[str], noises: int, stream: Stream) -> Tensor:
        with self.trainer.optimizer.averaged_weights():
            trainer = self.trainer
            scores = trainer.with_memory(lambda: evaluate(trainer.executor, trainer.score, prompts, noises, stream))
        trainer.phase.read()
        return scores

    def _evaluate(self, record: dict[str, Any]) -> dict[str, float]:
        scores = self._scores(self.held_out, self.config.evaluation.noises, Stream.HELD_OUT)
        found = {"reward/held_out": float(scores[0].nanmean())}
        found["reward/held_out_std"] = float(scores[0].nanmean(1).std()) if len(self.held_out) > 1 else 0.0
        for m, reward in list(enumerate(self.config.rewards))[1:]:
            found[f"reward/held_out_{m}_{reward.name}"] = float(scores[m].nanmean())
        self.say(
            f"iteration {record['iteration']}: reward train {record['reward/train']:.3f}, "
            f"held-out {found['reward/held_out']:.3f}, {record['perf/seconds']:.2f} s"
        )
        return found

    def _try_rewards(self) -> None:
        """Score two pictures of noise: a broken reward ends the run here, not after the first rollout.

        Noise may have no score; so a reward without one is asked again, of what the policy draws.
        """
        prompts = (self.held_out * 2)[:2]
        x = self.trainer.executor.initial_noise(torch.arange(2), 0, Stream.SAMPLE)
        scores = self.trainer.score(x, PromptRows(prompts, torch.arange(2, device=x.device)))
        if not bool(scores.isfinite().any(1).all()):
            scores = evaluate(self.trainer.executor, self.trainer.score, prompts, 1, Stream.SAMPLE).flatten(1)
        self.trainer.phase.read()
        for m, some in enumerate(scores.isfinite().any(1).tolist()):
            if not some:
                name = f"rewards.{m} ({self.config.rewards[m].name})"
                raise RunError(f"{name} has no finite score, neither of noise nor of the policy's images: {scores[m].tolist()}")

    def _before(self) -> Tensor | None:
        """Scores of the initial policy on the final comparison's prompts; kept in the run folder for a resumed run."""
        if not self.final_prompts:
            return None
        kept = self.run.read_json(BASELINE)
        if kept is None:
            scores = self._scores(self.final_prompts, self.config.evaluation.final_noises, Stream.FINAL_EVALUATION)[0]
            kept = [[None if math.isnan(s) else s for s in row] for row in scores.tolist()]
            self.run.write_json(BASELINE, kept)
        return torch.tensor([[math.nan if s is None else s for s in row] for row in kept], dtype=torch.float64)

    def _compare(self, before: Tensor | None) -> PairedGain | None:
        if before is None:
            return None
        after = self._scores(self.final_prompts, self.config.evaluation.final_noises, Stream.FINAL_EVALUATION)[0]
        gain = paired_gain(before, after.cpu())
        self.run.write_json("result.json", vars(gain))
        return gain

    def _show(self, iteration: int) -> None:
        """A sample grid of fixed held-out prompts and noise; a failure to write it is told, and ends nothing."""
        trainer, prompts = self.trainer, self.held_out[: self.config.output.grid_prompts]
        if not self.config.output.grid_every:
            return
        with trainer.optimizer.averaged_weights():
            latents, rewards = trainer.with_memory(lambda: self._samples(prompts))
            images = decode(trainer.executor, latents)
        trainer.phase.read()
        try:
            save_grid(self.run.samples / f"step-{iteration:06d}.png", images, prompts, rewards.tolist())
        except OSError as error:
            self._event("warning", f"the sample grid could not be written: {error}")

    def _samples(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        latents = sample_latents(self.trainer.executor, prompts, 1, Stream.SAMPLE)
        everyone = torch.arange(len(prompts), device=latents.device)
        return latents, self.trainer.score(latents, PromptRows(prompts, everyone))[0]

    def _report(self) -> None:
        """Rewrite the live report; a failure there is told, and ends nothing."""
        try:
            write_report([self.run.path], self.run.path / "report.html")
        except Exception as error:
            self._event("warning", f"report.html could not be written: {type(error).__name__}: {error}")

    def _event(self, kind: str, message: str, iteration: int | None = None) -> None:
        self.run.event(self.trainer.iterations_done if iteration is None else iteration, kind, message)
        self.say(message)


def read_metrics(metrics: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Metrics that are tensors or numbers, as numbers, and the picked prompts: the one copy to the host of an iteration."""
    picked: PromptRows = metrics["selection/picked"]
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    values = [value.detach().double().reshape(1) for value in tensors.values()]
    read = torch.cat([*values, picked.text_index.double()]).tolist()
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    texts = [picked.texts[int(i)] for i in read[len(tensors) :]]
    return dict(zip(tensors, read, strict=False)) | numbers, texts


def _finite(record: dict[str, Any]) -> bool:
    return math.isfinite(record["policy/loss"]) and math.isfinite(record["policy/grad_norm"])


def _due(iteration: int, every: int) -> bool:
    return every > 0 and iteration % every == 0
