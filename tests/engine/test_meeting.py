"""Ranks meet under a name of their own, whatever earlier ones left in the store."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from adagrpo.engine.meeting import met
from adagrpo.errors import RunError


def start(store: dist.Store, delays: list[float]) -> list[str]:
    def rank(number: int) -> str:
        time.sleep(delays[number])
        return met(store, number, len(delays), 20.0)

    with ThreadPoolExecutor(len(delays)) as ranks:
        return list(ranks.map(rank, range(len(delays))))


def test_every_start_has_one_name_of_its_own_whoever_comes_first() -> None:
    store, names = dist.HashStore(), []
    for delays in ([0.0, 0.2, 0.1], [0.3, 0.0, 0.0], [0.1, 0.3, 0.0]):
        first, *others = start(store, delays)
        assert others == [first, first]
        names.append(first)
    assert len(set(names)) == 3


def test_a_start_that_failed_before_all_had_met_leaves_nothing_that_counts() -> None:
    store = dist.HashStore()
    for rank in (0, 1):  # the third one never came
        with pytest.raises(RunError, match=r"3 ranks did not come together within 0\.2 s"):
            met(store, rank, 3, 0.2)
    first, *others = start(store, [0.3, 0.0, 0.0])
    assert others == [first, first]


def test_the_first_rank_names_those_that_are_missing() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(1) as others:
        waits = others.submit(met, store, 2, 3, 0.5)
        with pytest.raises(RunError, match=r"within 0\.5 s: without rank 1$"):
            met(store, 0, 3, 0.5)
        assert isinstance(waits.exception(), RunError)
