"""A whole run around the training loop: evaluate, log, draw, save, resume, compare."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .algorithm.sde import Stream
from .config import Config
from .evaluation import PairedGain, evaluate, paired_gain, sample_latents
from .rewards import PromptRows
from .run.checkpoint import load_state, save_checkpoint
from .run.folder import RunFolder
from .run.grid import save_grid
from .train import Trainer

BASELINE = "baseline.json"


class Fit:
    """Runs a trainer to the end of its recipe inside a run folder.

    Args:
        trainer: at its initial weights.
        run: the folder.
        held_out: prompts of the held-out evaluation.
        say: receives lines for the user.
    """

    def __init__(self, trainer: Trainer, run: RunFolder, held_out: Sequence[str], say: Callable[[str], None] = print) -> None:
        self.trainer, self.run, self.say = trainer, run, say
        self.config: Config = trainer.config
        e = self.config.evaluation
        self.held_out, self.final_prompts = list(held_out)[: e.prompts], list(held_out)[: e.final_prompts]
        if self.config.loss.kl_weight:
            trainer.model.keep_reference()

    def resume(self, checkpoint: Path) -> None:
        """Continue from ``checkpoint``; later lines of ``metrics.jsonl`` are dropped."""
        self.trainer.load_state_dict(load_state(checkpoint, self.trainer.model.device))
        self.run.truncate_metrics(self.trainer.iterations_done)
        self.say(f"resumed from {checkpoint} after iteration {self.trainer.iterations_done}")

    def __call__(self) -> PairedGain | None:
        """Train to the last iteration; returns the paired comparison with the initial policy, if the recipe wants one."""
        before = self._before()
        total = self.config.train.iterations
        bar = tqdm(total=total, initial=self.trainer.iterations_done, disable=None, unit="it", dynamic_ncols=True)
        with bar:
            if self.trainer.iterations_done == 0:
                self._show(0)
            while self.trainer.iterations_done < total:
                record = self._one_iteration()
                bar.set_postfix_str(f"reward {record['reward/train']:.3f}, {_slowest(record)}")
                bar.update()
        return self._compare(before)

    def _one_iteration(self) -> dict[str, Any]:
        started = time.perf_counter()
        metrics = self.trainer.iteration()
        record: dict[str, Any] = {"iteration": self.trainer.iterations_done, **read_metrics(metrics)}
        record |= self._performance(time.perf_counter() - started)
        done, output = self.trainer.iterations_done, self.config.output
        last = done == self.config.train.iterations
        if _due(done, self.config.evaluation.every) or (last and self.config.evaluation.every):
            record["reward/held_out"] = self._held_out()
            tqdm.write(
                f"iteration {done}: reward train {record['reward/train']:.3f}, held-out {record['reward/held_out']:.3f}, "
                f"{record['perf/seconds']:.2f} s"
            )
        if _due(done, output.grid_every) or (last and output.grid_every):
            self._show(done)
        self.run.log(record)
        if _due(done, output.checkpoint_every) or last:
            self.save()
        return record

    def save(self) -> Path:
        """Write a checkpoint; its portable part holds the weight EMA where one is kept."""

        def portable(folder: Path) -> None:
            with self.trainer.optimizer.averaged_weights():
                self.trainer.model.save_portable(folder)

        trainer, keep = self.trainer, self.config.output.keep_last
        return save_checkpoint(self.run.checkpoints, trainer.iterations_done, trainer.state_dict(), portable, keep)

    def _performance(self, seconds: float) -> dict[str, float]:
        record = {"perf/seconds": seconds}
        record |= {f"perf/{phase}_seconds": spent for phase, spent in self.trainer.phase.read().items()}
        for phase, count in self.trainer.executor.counts.items():
            record |= {f"perf/{phase}_evaluations": count.evaluations, f"perf/{phase}_calls": count.calls}
        if self.trainer.model.device.type == "cuda":
            record["mem/peak_bytes"] = torch.cuda.max_memory_allocated(self.trainer.model.device)
        return record

    def _scores(self, prompts: Sequence[str], noises: int, stream: Stream) -> Tensor:
        with self.trainer.optimizer.averaged_weights():
            scores = evaluate(self.trainer.executor, self.trainer.score, prompts, noises, stream)
        self.trainer.phase.read()
        return scores

    def _held_out(self) -> float:
        return float(self._scores(self.held_out, self.config.evaluation.noises, Stream.HELD_OUT)[0].nanmean())

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
        """A sample grid of fixed held-out prompts and noise."""
        trainer, prompts = self.trainer, self.held_out[: self.config.output.grid_prompts]
        if not self.config.output.grid_every:
            return
        with trainer.optimizer.averaged_weights():
            latents = sample_latents(trainer.executor, prompts, 1, Stream.SAMPLE)
            images = torch.cat([trainer.model.decode(latents[part]) for part in trainer.executor.chunks(len(prompts))])
        rewards = trainer.rewards[0](images, PromptRows(prompts, torch.arange(len(prompts), device=images.device)))
        save_grid(self.run.samples / f"step-{iteration:06d}.png", images, prompts, rewards.tolist())


def read_metrics(metrics: dict[str, Tensor]) -> dict[str, float]:
    """All metrics as numbers, in one copy to the host."""
    values = torch.stack([value.detach().to(torch.float64, non_blocking=True).reshape(()) for value in metrics.values()])
    return dict(zip(metrics, values.tolist(), strict=True))


def _due(iteration: int, every: int) -> bool:
    return every > 0 and iteration % every == 0


def _slowest(record: dict[str, Any]) -> str:
    phases = {name: value for name, value in record.items() if name.endswith("_seconds")}
    name = max(phases, key=lambda n: phases[n])
    return f"{name.removeprefix('perf/').removesuffix('_seconds')} {phases[name]:.2f} s"
