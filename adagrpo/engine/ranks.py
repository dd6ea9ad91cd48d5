"""Who else trains: the only module that knows of other processes, and the only one that may call collectives.

Everything above asks a ``Ranks`` for its place among all slots, for global tensors and for common decisions. One process is the
identity and costs nothing: tensors are handed back as they came. Several processes are refused at the start of a command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among ``size``; slots are dealt to ranks in order, equally many to each.

    Attributes:
        rank: from 0. size: of all.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size}")

    @property
    def writes(self) -> bool:
        """Whether this rank writes the run folder."""
        return self.rank == 0

    def first(self, each: int) -> int:
        """Global number of this rank's first row, where every rank has ``each``."""
        return self.rank * each

    def rows(self, rows: Tensor, each: int) -> Tensor:
        """Global numbers of this rank's ``rows``, int64, where every rank has ``each``."""
        return rows if self.rank == 0 else rows + self.first(each)

    def share(self, everything: Sequence[T]) -> Sequence[T]:
        """This rank's part of a sequence that every rank knows."""
        each = len(everything) // self.size
        return everything[self.first(each) : self.first(each) + each]

    def own(self, everything: Tensor, dim: int = 0) -> Tensor:
        """This rank's part along ``dim`` of a tensor over all ranks."""
        if self.size == 1:
            return everything
        each = everything.shape[dim] // self.size
        return everything.narrow(dim, self.first(each), each)

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """The parts of all ranks, in their order, along ``dim``."""
        self._alone()
        return part

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks."""
        self._alone()
        return value

    def agree(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        self._alone()
        return flag

    def _alone(self) -> None:
        if self.size > 1:
            raise NotImplementedError(f"collectives over {self.size} ranks")
