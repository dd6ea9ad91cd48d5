"""Which slots of a draw each rank has: work is numbered over all ranks, so that nothing depends on how many there are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .plans import device_integers
from .ranks import Ranks

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Share:
    """Pieces of work, numbered from 0 over all ranks, and this rank's of them.

    Every rank works on equally many, in calls of equal sizes; one that would have fewer repeats some behind its own as ghosts,
    whose results count nowhere.

    Attributes:
        ranks: who else works.
        places: of each rank the numbers of its pieces.
        real: how many of each rank's are no ghosts.
    """

    ranks: Ranks
    places: tuple[tuple[int, ...], ...]
    real: tuple[int, ...]

    @classmethod
    def alone(cls, total: int) -> Share:
        """All pieces are this process's."""
        return cls(Ranks(), (tuple(range(total)),), (total,))

    @classmethod
    def dealt(cls, ranks: Ranks, total: int, parts: int = 1) -> Share:
        """Each of ``parts`` equal parts is dealt to the ranks in their order, equally many to each.

        Raises:
            ValueError: they cannot be.
        """
        if total % (parts * ranks.size):
            raise ValueError(f"{total} pieces in {parts} parts cannot be dealt to {ranks.size} ranks")
        numbers = torch.arange(total).reshape(parts, ranks.size, -1)
        places = tuple(tuple(numbers[:, rank].flatten().tolist()) for rank in range(ranks.size))
        return cls(ranks, places, tuple(map(len, places)))

    @classmethod
    def spread(cls, ranks: Ranks, total: int) -> Share:
        """Any number of pieces, at least one, dealt in order; the last ranks have ghosts where it is not divisible."""
        each = -(-total // ranks.size)
        owned = [range(min(rank * each, total), min((rank + 1) * each, total)) for rank in range(ranks.size)]
        return cls(ranks, tuple((*own, *[total - 1] * (each - len(own))) for own in owned), tuple(map(len, owned)))

    def redrawn(self, numbers: list[int]) -> Share:
        """Some of the pieces once more, numbered from 0 in the order of ``numbers``, each by the rank that has it."""
        owned = [[i for i, number in enumerate(numbers) if number in places] for places in self.places]
        each = max(map(len, owned))
        return Share(self.ranks, tuple((*own, *[0] * (each - len(own))) for own in owned), tuple(map(len, owned)))

    @property
    def total(self) -> int:
        """Pieces of all ranks."""
        return sum(self.real)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of this rank's pieces, ghosts included."""
        return self.places[self.ranks.rank]

    @property
    def each(self) -> int:
        """Pieces that every rank works on."""
        return len(self.numbers)

    def rows(self, per_piece: int, device: torch.device) -> Tensor:
        """Numbers over all ranks of this rank's rows, int64 [each * per_piece], where every piece has ``per_piece``."""
        if self.ranks.size == 1:
            return torch.arange(self.each * per_piece, device=device)
        return _rows(device_integers(self.numbers, device), per_piece)

    def own(self, whole: Tensor, dim: int = 0) -> Tensor:
        """This rank's part along ``dim`` of a tensor over all pieces, which may have several rows of each."""
        if self.ranks.size == 1:
            return whole
        return whole.index_select(dim, self.rows(whole.shape[dim] // self.total, whole.device))

    def part(self, everything: Sequence[T]) -> Sequence[T]:
        """This rank's part of a sequence over all pieces, which may have several of each."""
        if self.ranks.size == 1:
            return everything
        each = len(everything) // self.total
        return [everything[number * each + i] for number in self.numbers for i in range(each)]

    def gather(self, part: Tensor, dim: int = 0) -> Tensor:
        """The parts of all ranks along ``dim``, in the order of the pieces, without ghosts.

        Raises:
            MemoryElsewhere: another rank will not come, for it ran out of memory.
        """
        if self.ranks.size == 1:
            return part
        self.ranks.require_well()
        found = self.ranks.gather(part, dim)
        return found.index_select(dim, _rows(device_integers(self._order, part.device), part.shape[dim] // self.each))

    def local(self, rows: Tensor, per_piece: int) -> Tensor:
        """Places among this rank's rows of rows of its pieces, by their numbers over all ranks; -1 of other ranks'."""
        if self.ranks.size == 1:
            return rows
        place = device_integers(self._places_here, rows.device)[rows.clamp_min(0) // per_piece]
        return torch.where((rows >= 0) & (place >= 0), place * per_piece + rows.clamp_min(0) % per_piece, -1)

    def taken(self, part: Tensor, rows: Tensor, anywhere: bool) -> Tensor:
        """Rows of a tensor of which each rank has its pieces' part.

        Args:
            part: [each * n, ...], with n rows of every piece.
            rows: int64 [R], numbers over all ranks; equally many on every rank.
            anywhere: they may be of pieces that other ranks have; else they are this rank's.
        """
        if self.ranks.size == 1 or not anywhere:
            return part.index_select(0, self.local(rows, part.shape[0] // self.each))
        self.ranks.require_well()
        wanted = self.ranks.gather(rows, 0)
        place = self.local(wanted, part.shape[0] // self.each)
        here = (place >= 0).reshape(-1, *[1] * (part.ndim - 1))
        found = part.index_select(0, place.clamp_min(0)).where(here, torch.zeros((), dtype=part.dtype, device=part.device))
        whole = self.ranks.sum(found.contiguous().view(torch.uint8)).view(part.dtype)  # one rank's bits, and zeros: exact
        return whole.narrow(0, self.ranks.rank * len(rows), len(rows))

    @functools.cached_property
    def _order(self) -> tuple[int, ...]:
        """Where the ranks' parts, one behind the other, have each piece."""
        where = {n: r * self.each + i for r, own in enumerate(self.places) for i, n in enumerate(own[: self.real[r]])}
        return tuple(where[number] for number in range(self.total))

    @functools.cached_property
    def _places_here(self) -> tuple[int, ...]:
        """The first place of every piece among this rank's; -1 of other ranks'."""
        here = {number: i for i, number in reversed(list(enumerate(self.numbers)))}
        return tuple(here.get(number, -1) for number in range(self.total))


def _rows(pieces: Tensor, per_piece: int) -> Tensor:
    return (pieces.unsqueeze(1) * per_piece + torch.arange(per_piece, device=pieces.device)).flatten()
