"""Work numbered over all ranks: what each rank has of it, and how the parts come together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from adagrpo.engine.ranks import Ranks
from adagrpo.engine.share import Share

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Together(Ranks):
    """A rank whose gathering hears what the others' parts are; it ran out of no memory."""

    parts: tuple[Tensor, ...] = ()

    def gather(self, part: Tensor, dim: int) -> Tensor:
        torch.testing.assert_close(part, self.parts[self.rank], rtol=0, atol=0, equal_nan=True)
        return torch.cat(self.parts, dim)

    def most(self, number: int, at: str) -> int:
        return number


def ranks(size: int) -> list[Ranks]:
    return [Ranks(rank, size) for rank in range(size)]


def shares(size: int, total: int, parts: int = 1) -> list[Share]:
    return [Share.dealt(one, total, parts) for one in ranks(size)]


def test_slots_are_dealt_in_order_in_every_part() -> None:
    assert [share.numbers for share in shares(2, 8)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [share.numbers for share in shares(2, 8, parts=2)] == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert Share.alone(3).numbers == (0, 1, 2)
    with pytest.raises(ValueError, match="6 pieces in 1 parts cannot be dealt to 4 ranks"):
        Share.dealt(Ranks(0, 4), 6)


def test_any_number_is_spread_with_ghosts_that_count_nowhere() -> None:
    spread = [Share.spread(one, 5) for one in ranks(3)]
    assert [share.numbers for share in spread] == [(0, 1), (2, 3), (4, 4)] and spread[0].real == (2, 2, 1)
    assert [share.numbers for share in [Share.spread(one, 2) for one in ranks(4)]] == [(0,), (1,), (1,), (1,)]
    assert {share.total for share in spread} == {5} and {share.each for share in spread} == {2}


def test_slots_drawn_again_stay_where_they_are() -> None:
    again = [share.redrawn([1, 4, 5, 7]) for share in shares(2, 8)]
    assert again[0].places == ((0, 0, 0), (1, 2, 3)) and again[0].real == (1, 3) and again[0].total == 4
    assert Share.alone(4).redrawn([2, 3]).numbers == (0, 1)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_come_together_as_one_process_has_them(size: int, parts: int) -> None:
    whole = torch.arange(2 * 8 * 3).reshape(2, 8 * 3)
    own = [share.own(whole, 1) for share in shares(size, 8, parts)]
    for rank, share in enumerate(shares(size, 8, parts)):
        heard = dataclasses.replace(share, ranks=Together(rank, size, parts=tuple(own)))
        assert torch.equal(heard.gather(own[rank], 1), whole)
        rows = share.rows(3, CPU)
        assert torch.equal(own[rank], whole[:, rows]) and share.part(list(range(24))) == rows.tolist()
        assert share.local(rows, 3).tolist() == list(range(len(rows)))
        assert torch.equal(share.taken(own[rank][0], rows.flip(0), anywhere=False), whole[0, rows.flip(0)])


def test_ghosts_are_left_out_when_parts_come_together() -> None:
    again = [share.redrawn([1, 4, 5, 7]) for share in shares(2, 8)]
    parts = tuple(torch.tensor([[float(n), n + 0.5] for n in share.numbers]).flatten() for share in again)
    parts[0][2:] = torch.nan  # of ghosts
    for rank, share in enumerate(again):
        heard = dataclasses.replace(share, ranks=Together(rank, 2, parts=parts))
        assert heard.gather(parts[rank]).tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]


def test_rows_of_other_ranks_are_known_as_such() -> None:
    one, other = shares(2, 4)
    rows = torch.tensor([0, 5, 7, -1, 11])
    assert one.local(rows, 3).tolist() == [0, 5, -1, -1, -1] and other.local(rows, 3).tolist() == [-1, -1, 1, -1, 5]
