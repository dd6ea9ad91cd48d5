"""Latents to rewards: on the device, and beside it where a reward works on the host."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..rewards.base import PromptRows
from ..rewards.placed import Pending, PlacedReward
from ..rewards.transfer import HostImages
from .executor import RolloutExecutor
from .overlap import Overlap
from .ranks import Ranks
from .timing import PhaseTimer

MOST_WAITING = 2**30
"""Bytes of images that may wait for host rewards; beyond, sampling waits for the oldest of them."""


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Images whose scores are not all known yet.

    Attributes:
        bytes: on the host, while calls are pending.
        pending: calls of host rewards, by number.
        images: for groupwise rewards; None without them, or without groups.
    """

    bytes: int
    pending: Mapping[int, Pending]
    images: HostImages | None

    @property
    def waits(self) -> bool:
        """Whether calls are under way."""
        return not all(pending.done for pending in self.pending.values())


class Scorer:
    """Decodes and scores in the batches the executor allows; images leave memory chunk by chunk.

    They never leave the device but for host rewards, which work in threads: then in one copy per chunk. A groupwise reward
    waits for all images of a rollout; without groups (probes, evaluations) it has no value, which is NaN here.

    Args:
        executor: its model decodes.
        rewards: M of them.

    Attributes:
        decoded: images so far.
        stream: a second CUDA stream, on which ``overlapped`` works; None is the current one.
        labels: of each reward, no two alike.
    """

    def __init__(self, executor: RolloutExecutor, rewards: Sequence[PlacedReward]) -> None:
        self.executor, self.rewards, self.decoded = executor, list(rewards), 0
        self.stream: torch.cuda.Stream | None = None
        self.labels = labels([reward.entry.name for reward in rewards])
        self.forget()

    def __call__(self, latents: Tensor, prompts: PromptRows) -> Tensor:
        """Scores [M, R], float64, of clean latents [R, L, C].

        Raises:
            RunError: a reward fails, or does not return one number per image.
        """
        chunks = self._begun()
        return self._finished(self._scored(latents, prompts, chunks), chunks)

    def overlapped(self, prompts: PromptRows) -> Overlap:
        """Scores the rows of a rollout, whose prompts these are, chunk by chunk beside the next chunk's rollout."""
        chunks = self._begun()

        def work(latents: Tensor, rows: Tensor) -> Tensor:
            return self._scored(latents, prompts.rows(rows), chunks)

        return Overlap(work, self.stream, lambda scores: self._finished(scores, chunks))

    def score_images(self, images: Tensor, prompts: PromptRows) -> Tensor:
        """Scores [M, R], float64, of images [R, 3, H, W] in [0, 1], which are kept."""
        chunks = self._begun()
        return self._finished(self._score(images, prompts, chunks, kept=True), chunks)

    def forget(self) -> None:
        """Begin to count anew what is told of the rewards."""
        self.spent = PhaseTimer(self.executor.model.device)
        self._known = [(reward.seconds, Counter(reward.failures)) for reward in self.rewards]
        self._scores: list[list[Tensor]] = [[] for _ in self.rewards]

    def failures(self, ranks: Ranks) -> dict[str, Tensor | float]:
        """Share of the images of all ranks without a finite score by reward, 0-dim, and how many there are on this one by the
        reasons that a reward tells."""
        found: dict[str, Tensor | float] = {}
        scored = [(label, torch.cat(scores)) for label, scores in zip(self.labels, self._scores, strict=True) if scores]
        if scored:
            failed = ranks.sum(torch.stack([(~scores.isfinite()).sum() for _, scores in scored])).double()
            shares = zip(scored, failed.unbind(), strict=True)
            found = {f"reward/{label}/failed": count / (scores.numel() * ranks.size) for (label, scores), count in shares}
        for label, reward, (_, before) in zip(self.labels, self.rewards, self._known, strict=True):
            new = Counter(reward.failures) - before
            found |= {f"reward/{label}/failed_{reason}": float(count) for reason, count in sorted(new.items())}
        return found

    def seconds(self) -> dict[str, float]:
        """Seconds that each reward took; of host rewards those of their threads, which may be more than went by."""
        spent = self.spent.read()
        return {
            f"perf/reward/{label}/seconds": spent.get(label, 0.0) + reward.seconds - before
            for label, reward, (before, _) in zip(self.labels, self.rewards, self._known, strict=True)
        }

    def _begun(self) -> list[_Chunk]:
        """Chunks of a scoring that begins; one that was given up leaves neither calls to make nor weights on the device."""
        for reward in self.rewards:
            reward.cancel()
            reward.rest()
        return []

    def _scored(self, latents: Tensor, prompts: PromptRows, chunks: list[_Chunk]) -> Tensor:
        parts = []
        for part in self.executor.limit.decode_chunks(latents.shape[0]):
            self.decoded += part.stop - part.start
            with self.executor.phase("decode"):
                images = self.executor.model.decode(latents[part])
            with self.executor.phase("reward"):
                parts.append(self._score(images, prompts[part], chunks, kept=False))
        return torch.cat(parts, 1)

    def _score(self, images: Tensor, prompts: PromptRows, chunks: list[_Chunk], kept: bool) -> Tensor:
        """Scores [M, r], NaN where they are still to come; not ``kept``: the last reward may write into the images."""
        now = [m for m, reward in enumerate(self.rewards) if not (reward.host or reward.groupwise)]
        scores: dict[int, Tensor] = {}
        if len(now) < len(self.rewards):
            self._send(images, prompts, chunks)
            none = images.new_full(images.shape[:1], torch.nan, dtype=torch.float64)
            scores = dict.fromkeys(range(len(self.rewards)), none)
        for m in now:
            with self.spent(self.labels[m]):
                scores[m] = self.rewards[m](images, prompts, kept or m != now[-1])
        return torch.stack([scores[m] for m in range(len(self.rewards))])

    def _send(self, images: Tensor, prompts: PromptRows, chunks: list[_Chunk]) -> None:
        """Images on their way to the host, where threads wait for them; nothing if no reward there can score them."""
        later = [m for m, reward in enumerate(self.rewards) if reward.host and not reward.groupwise]
        in_groups = prompts.group_index is not None and any(reward.groupwise for reward in self.rewards)
        if not later and not in_groups:
            return
        on_host = HostImages(images, prompts)
        waiting = [chunk for chunk in chunks if chunk.waits]
        while waiting and sum(chunk.bytes for chunk in waiting) + on_host.bytes > MOST_WAITING:
            for pending in waiting.pop(0).pending.values():
                pending.wait()
        calls = {m: self.rewards[m].begun(on_host) for m in later}
        chunks.append(_Chunk(on_host.bytes, calls, on_host if in_groups else None))

    def _finished(self, scores: Tensor, chunks: Sequence[_Chunk]) -> Tensor:
        """Scores [M, R] once all are known; every image is in one of the chunks, if there are any."""
        in_groups = [chunk.images for chunk in chunks if chunk.images is not None]
        if chunks:
            with self.executor.phase("reward"):
                for m, found in self._awaited(chunks, in_groups).items():
                    scores[m] = found.to(scores.device)
        for m, reward in enumerate(self.rewards):
            reward.rest()
            if in_groups or not reward.groupwise:
                self._scores[m].append(scores[m])
        return scores

    def _awaited(self, chunks: Sequence[_Chunk], in_groups: Sequence[HostImages]) -> dict[int, Tensor]:
        """Scores [R] of the host's and the groupwise rewards, by number."""
        found = {}
        for m in chunks[0].pending:
            found[m] = torch.cat([self.rewards[m].collected(chunk.pending[m]) for chunk in chunks])
        for m, reward in enumerate(self.rewards):
            if reward.groupwise and in_groups:
                with self.spent(self.labels[m]):
                    found[m] = reward.of_groups(in_groups, self.executor.model.device)
        return found


def labels(names: Sequence[str]) -> list[str]:
    """The names, with their number in front where several are alike."""
    counts = Counter(names)
    return [f"{m}_{name}" if counts[name] > 1 else name for m, name in enumerate(names)]
