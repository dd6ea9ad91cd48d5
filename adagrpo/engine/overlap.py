"""Decode and score finished chunks while the next chunk is sampled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Work = Callable[[Tensor, Tensor], Tensor]


class Overlap:
    """Feeds finished rows of a rollout to ``work``, on a second CUDA stream and one chunk late.

    One chunk late, because the host queues work in order: the next chunk's rollout must be queued before a reward may block
    the host. Elsewhere the work is done in the same order on the one stream there is.

    Args:
        work: (latents [r, L, C], rows int64 [r] of the rollout) -> scores [M, r].
        stream: the second stream; None is the current one.
        finish: is given all scores [M, R], in the order they were worked out in, and says what they are in the end: some may
            have been worked out elsewhere meanwhile.
    """

    def __init__(
        self, work: Work, stream: torch.cuda.Stream | None = None, finish: Callable[[Tensor], Tensor] = lambda scores: scores
    ) -> None:
        self.work, self.stream, self.finish = work, stream, finish
        self._waiting: tuple[Tensor, Tensor, torch.cuda.Event | None] | None = None
        self._done: list[tuple[Tensor, Tensor]] = []

    def __call__(self, latents: Tensor, rows: Tensor) -> None:
        """A chunk is sampled: start the work on the chunk before."""
        finished = None
        if self.stream is not None:
            finished = torch.cuda.Event()
            finished.record()
        before, self._waiting = self._waiting, (latents, rows, finished)
        self._run(before)

    def result(self) -> Tensor:
        """[M, R] in the order of the rollout's rows, once every chunk has been handed over."""
        self._run(self._waiting)
        self._waiting = None
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        rows = torch.cat([rows for _, rows in self._done])
        found = self.finish(torch.cat([scores for scores, _ in self._done], 1))
        return torch.empty_like(found).index_copy(1, rows, found)

    def _run(self, chunk: tuple[Tensor, Tensor, torch.cuda.Event | None] | None) -> None:
        if chunk is None:
            return
        latents, rows, finished = chunk
        with self._on_stream(latents, rows, finished):
            scores = self.work(latents, rows)
        if self.stream is not None:
            scores.record_stream(torch.cuda.current_stream())
        self._done.append((scores, rows))

    @contextlib.contextmanager
    def _on_stream(self, latents: Tensor, rows: Tensor, finished: torch.cuda.Event | None) -> Iterator[None]:
        if self.stream is None or finished is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(finished)
            for tensor in (latents, rows):
                tensor.record_stream(self.stream)
            yield
