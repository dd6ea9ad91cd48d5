"""Prompts by device index: they read like a list, and only reading them copies the index."""

import pytest
import torch

from adagrpo.errors import InputError
from adagrpo.rewards import PromptRows, build_reward


def test_reads_like_a_list() -> None:
    rows = PromptRows(["a", "b", "c"], torch.tensor([2, 0, 0, 1]))
    assert len(rows) == 4 and list(rows) == ["c", "a", "a", "b"] and rows[1] == "a"
    assert list(rows[1:3]) == ["a", "a"] and list(rows[2:][1:]) == ["b"]


def test_slicing_does_not_read_the_index() -> None:
    rows = PromptRows(["a", "b"], torch.zeros(6, dtype=torch.int64, device="meta"))
    assert len(rows[2:5]) == 3  # on the meta device any read would raise


def test_rewards_by_name_and_by_import_path() -> None:
    images = torch.full((2, 3, 4, 4), 0.25)
    for name in ("brightness", "adagrpo.rewards.brightness:Brightness"):
        assert torch.equal(build_reward(name, {})(images, ["", ""]), torch.tensor([0.25, 0.25]))


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("beauty", {}, "unknown reward 'beauty'"),
        ("adagrpo.rewards.nothing:Reward", {}, "cannot be imported"),
        ("adagrpo.rewards.brightness:Darkness", {}, "cannot be imported"),
        ("brightness", {"gamma": 2}, "does not take kwargs"),
    ],
)
def test_bad_rewards_are_named(name: str, kwargs: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_reward(name, kwargs)
