"""The numbers of a training that no part of it owns."""

from __future__ import annotations

import dataclasses

from .ranks import Ranks
from .share import Share


@dataclasses.dataclass(frozen=True)
class Course:
    """How much each iteration trains, and at which picture size.

    Attributes:
        share: which of the P slots of an iteration are this rank's. candidates: B.
        seed: of the bucket that each iteration draws.
        size, buckets: picture sizes (height, width) in pixels: outside iterations, and to draw from; empty is always ``size``.
        max_rows: of the recipe; a run that ran out of memory has less.
        refill: draw slots whose groups all lack spread once more.
        skip_equal: leave groups whose rewards are all equal out of the loss.
        pooled: a slot may take a candidate of another one.
    """

    share: Share
    candidates: int
    seed: int
    size: tuple[int, int]
    buckets: tuple[tuple[int, int], ...] = ()
    max_rows: int = 0
    refill: bool = False
    skip_equal: bool = False
    pooled: bool = False

    @property
    def slots(self) -> int:
        """P, of all ranks."""
        return self.share.total

    @property
    def ranks(self) -> Ranks:
        """Who trains."""
        return self.share.ranks
