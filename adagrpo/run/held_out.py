"""What a run measures of its policy on prompts that it never trains on: the curve, the grids, the final comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algorithm.sde import Stream
from ..disk.files import read_json
from ..engine.share import Share
from ..errors import RunError
from ..evaluate.held_out import PairedGain, decode, evaluate, paired_gain, sample_latents
from ..models.base import guided
from ..prompts.sources import prompt_category
from ..recipe.keys import Config
from ..rewards import PromptRows
from ..train import Trainer
from .folder import RunFolder

BASELINE = "baseline.json"


class HeldOut:
    """Scores and pictures of the policy, by its averaged weights where an average is kept.

    Args:
        config: the recipe.
        trainer: of the policy.
        run: the folder.
        prompts: the held-out prompts; the curve, the grids and the comparison take the first of them.
        tell: receives warnings.

    Attributes:
        single, first: numbers of the rewards that score single images, and the first of them, which is the held-out reward.
        baseline: scores [prompts, noises] of the initial policy, fp64; None before they are measured or restored.
    """

    def __init__(
        self, config: Config, trainer: Trainer, run: RunFolder, prompts: Sequence[str], tell: Callable[[str], None]
    ) -> None:
        self.trainer, self.run, self.tell = trainer, run, tell
        self.names, e = [reward.name for reward in config.rewards], config.evaluation
        self.prompts, self.final_prompts = list(prompts[: e.prompts]), list(prompts[: e.final_prompts])
        groupwise = [reward.groupwise for reward in trainer.score.rewards]
        self.single = [m for m, grouped in enumerate(groupwise) if not grouped]
        self.first = self.single[0] if self.single else 0
        self.category = prompt_category(config.data.held_out, self.prompts)
        self.noises, self.final_noises, self.guidance = e.noises, e.final_noises, e.guidance
        self.baseline: Tensor | None = None

    @property
    def measure(self) -> list[int]:
        """What the held-out reward is a mean over: prompts and noises."""
        return [len(self.prompts), self.noises]

    def scores(self, prompts: Sequence[str], noises: int, stream: Stream) -> Tensor:
        """Scores [M, prompts, noises] by the deterministic sampler."""
        with self.trainer.optimizer.averaged_weights(), guided(self.trainer.model, self.guidance):
            for attempt in self.trainer.attempts():
                with attempt:
                    share = Share.spread(self.trainer.ranks, len(prompts) * noises)
                    scores = evaluate(self.trainer.executor, self.trainer.score, prompts, noises, stream, share)
        self.trainer.phase.read()
        return scores

    def curve(self) -> dict[str, Any]:
        """The held-out rewards, for the metrics; the first by category too, where the prompts have some."""
        scores = self.scores(self.prompts, self.noises, Stream.HELD_OUT)
        first = scores[self.first]
        found: dict[str, Any] = {"reward/held_out": float(first.nanmean())}
        found["reward/held_out_std"] = float(first.nanmean(1).std()) if len(self.prompts) > 1 else 0.0
        for m in self.single[1:]:
            found[f"reward/held_out_{m}_{self.names[m]}"] = float(scores[m].nanmean())
        if self.category is not None:
            places: dict[str, list[int]] = {}
            for i, prompt in enumerate(self.prompts):
                places.setdefault(self.category(prompt), []).append(i)
            found["held_out/categories"] = {name: float(first[rows].nanmean()) for name, rows in places.items()}
        return found

    def try_rewards(self) -> None:
        """Score two pictures of noise: a broken reward ends the run here, not after the first rollout.

        Noise may have no score; so a reward without one is asked again, of what the policy draws.

        Raises:
            RunError: a reward fails, or has no finite score for either.
        """
        with guided(self.trainer.model, self.guidance):
            for attempt in self.trainer.attempts():
                with attempt:
                    scores = self._first_scores((self.prompts * 2)[:2])
        self.trainer.phase.read()
        for m, some in enumerate(scores.isfinite().any(1).tolist()):
            if not some and m in self.single:
                name = f"rewards.{m} ({self.names[m]})"
                raise RunError(f"{name} has no finite score, neither of noise nor of the policy's images: {scores[m].tolist()}")

    def _first_scores(self, prompts: Sequence[str]) -> Tensor:
        """Scores [M, 2] of noise, or of what the policy draws."""
        x = self.trainer.executor.initial_noise(torch.arange(2), 0, Stream.SAMPLE)
        scores = self.trainer.score(x, PromptRows(prompts, torch.arange(2, device=x.device)))
        if not bool(scores[self.single].isfinite().any(1).all()):
            scores = evaluate(self.trainer.executor, self.trainer.score, prompts, 1, Stream.SAMPLE).flatten(1)
        return scores

    def before(self) -> Tensor | None:
        """Scores [prompts, noises] of the initial policy on the final comparison's prompts; None if they are lost.

        They are measured on untrained weights only, and kept in every checkpoint; ``baseline.json`` is a copy to look at.
        """
        if not self.final_prompts:
            return None
        shape = (len(self.final_prompts), self.final_noises)
        if self.trainer.iterations_done == 0:
            self.baseline = self.scores(self.final_prompts, shape[1], Stream.FINAL_EVALUATION)[self.first].double().cpu()
        copied = self.trainer.ranks.told(lambda: read_baseline(self.run.path / BASELINE, shape), BASELINE)
        if self.baseline is None and copied is not None:
            self.baseline = copied  # a run of a former version
        if self.baseline is None or self.baseline.shape != shape:
            self.tell(f"the initial policy's scores are lost ({BASELINE}): no final comparison with it")
            return None
        if copied is None or not torch.equal(copied.nan_to_num(math.inf), self.baseline.nan_to_num(math.inf)):
            if self.trainer.iterations_done:
                self.tell(f"{BASELINE} was missing or altered: written anew from the checkpoint")
            self.run.write_json(BASELINE, self.baseline.tolist())
        return self.baseline

    def compare(self, before: Tensor | None) -> PairedGain | None:
        """The trained policy against ``before``; None without it."""
        if before is None:
            return None
        after = self.scores(self.final_prompts, self.final_noises, Stream.FINAL_EVALUATION)[self.first]
        gain = paired_gain(before, after.cpu())
        self.run.write_json("result.json", vars(gain))
        return gain

    def draw_grid(self, count: int) -> tuple[Tensor, Sequence[str], list[float]]:
        """Pictures [count, 3, H, W] of the first prompts with fixed noise, these prompts, and their rewards."""
        trainer, prompts = self.trainer, self.prompts[:count]
        share = Share.spread(trainer.ranks, len(prompts))
        with trainer.optimizer.averaged_weights(), guided(trainer.model, self.guidance):
            for attempt in trainer.attempts():
                with attempt:
                    latents, rewards = self._samples(prompts, share)
            images = share.gather(decode(trainer.executor, latents))
        trainer.phase.read()
        return images, prompts, rewards.tolist()

    def _samples(self, prompts: Sequence[str], share: Share) -> tuple[Tensor, Tensor]:
        """Latents of this rank's prompts, and the rewards of all."""
        latents = sample_latents(self.trainer.executor, prompts, 1, Stream.SAMPLE, share)
        scores = self.trainer.score(latents, PromptRows(prompts, share.rows(1, latents.device)))
        return latents, share.gather(scores, 1)[self.first]


def read_baseline(file: Path, shape: tuple[int, int]) -> Tensor | None:
    """Scores [prompts, noises] in fp64, null as NaN; None where the file is missing, damaged or of another shape."""
    try:
        rows = read_json(file)
        scores = torch.tensor([[math.nan if s is None else float(s) for s in row] for row in rows], dtype=torch.float64)
    except (ValueError, TypeError, RuntimeError):
        return None
    return scores if scores.shape == shape else None
