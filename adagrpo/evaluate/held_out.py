"""Held-out evaluation by the deterministic sampler, and the paired comparison of two policies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..algorithm.sde import Stream
from ..engine.executor import RolloutExecutor
from ..engine.plans import probe_plan
from ..engine.share import Share
from ..rewards import PromptRows

Scorer = Callable[[Tensor, PromptRows], Tensor]


@dataclasses.dataclass(frozen=True)
class PairedGain:
    """Mean of after - before over prompts, with its 95 % t interval; rewards are means over noises.

    Only what was scored both times counts. ``low`` and ``high`` are NaN with fewer than two such prompts: a single
    difference has no interval; without any, all rewards are NaN.
    """

    before: float
    after: float
    gain: float
    low: float
    high: float
    prompts: int
    noises: int

    def __str__(self) -> str:
        if not self.prompts:
            return "held-out reward: no comparison, for no prompt has a finite reward before and after"
        interval = f"95 % {self.low:+.3f} … {self.high:+.3f}" if self.prompts > 1 else "no interval"
        prompts = f"{self.prompts} {'prompt' if self.prompts == 1 else 'prompts'}"
        noises = f"{self.noises} {'noise' if self.noises == 1 else 'noises'}"
        moved = f"held-out reward {self.before:.3f} → {self.after:.3f}: {self.gain:+.3f}"
        return f"{moved} ({interval}, {prompts} x {noises})"


def sample_latents(
    executor: RolloutExecutor, prompts: Sequence[str], noises: int, stream: Stream, share: Share | None = None
) -> Tensor:
    """Clean latents [N·noises, L, C], ordered (prompt, noise), of the deterministic sampler with fixed noise.

    Args:
        share: of these, this rank's, which alone are sampled; None is all.
    """
    share = share or Share.alone(len(prompts) * noises)
    of_rows = [number // noises for number in share.numbers]
    own = {prompt: i for i, prompt in enumerate(dict.fromkeys(of_rows))}
    conditioning = executor.model.encode([prompts[prompt] for prompt in own])
    plan = probe_plan([own[prompt] for prompt in of_rows], executor.num_steps)
    x = executor.initial_noise(share.rows(1, executor.model.device), 0, stream)
    return executor.run(plan, x, conditioning, 0, "evaluation", on_policy=True).final


def sample_images(executor: RolloutExecutor, prompts: Sequence[str], noises: int, stream: Stream) -> Tensor:
    """The pictures of ``sample_latents``: [N·noises, 3, H, W] in [0, 1]."""
    return decode(executor, sample_latents(executor, prompts, noises, stream))


def decode(executor: RolloutExecutor, latents: Tensor) -> Tensor:
    """Pictures [R, 3, H, W] in [0, 1] of latents [R, L, C], in batches the executor allows."""
    return torch.cat([executor.model.decode(latents[part]) for part in executor.limit.decode_chunks(latents.shape[0])])


def evaluate(
    executor: RolloutExecutor,
    score: Scorer,
    prompts: Sequence[str],
    noises: int,
    stream: Stream,
    share: Share | None = None,
) -> Tensor:
    """Scores [M rewards, N prompts, noises] of the present policy; NaN where a reward failed.

    Args:
        share: of the images, this rank's; the scores are those of all. None is all of them.
    """
    share = share or Share.alone(len(prompts) * noises)
    latents = sample_latents(executor, prompts, noises, stream, share)
    index = share.rows(1, latents.device) // noises
    return share.gather(score(latents, PromptRows(prompts, index)), 1).reshape(-1, len(prompts), noises)


def paired_gain(before: Tensor, after: Tensor) -> PairedGain:
    """Compare scores [N prompts, noises] taken on the same prompts and noises; prompts are the independent unit.

    An image without a finite score, before or after, is left out of both.
    """
    from scipy.stats import t

    scored = before.isfinite() & after.isfinite()
    first, second = (scores.double().where(scored, torch.nan).nanmean(1)[scored.any(1)] for scores in (before, after))
    difference = second - first
    n = difference.numel()
    gain = float(difference.mean())
    half = float(t.ppf(0.975, n - 1) * difference.std() / n**0.5) if n > 1 else float("nan")
    return PairedGain(
        before=float(first.mean()),
        after=float(second.mean()),
        gain=gain,
        low=gain - half,
        high=gain + half,
        prompts=n,
        noises=before.shape[1],
    )
