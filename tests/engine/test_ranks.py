"""A rank's part of the work is what one process does for its slots: noise, prompts, selection, statistics, advantages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from toy import PROMPTS, ToyModel, half_bright, toy_config

from adagrpo.build import assemble
from adagrpo.engine.groups import Groups
from adagrpo.engine.ranks import Ranks
from adagrpo.recipe.keys import Config
from adagrpo.train import Trainer


@dataclasses.dataclass(frozen=True)
class Recording(Ranks):
    """One process that keeps what it would have gathered."""

    kept: list[Tensor] = dataclasses.field(default_factory=list)

    def gather(self, part: Tensor, dim: int) -> Tensor:
        self.kept.append(part)
        return part


@dataclasses.dataclass(frozen=True)
class Played(Ranks):
    """One of several ranks, which hears what one process had of all of them, and must have said its part of it."""

    kept: list[Tensor] = dataclasses.field(default_factory=list)

    def gather(self, part: Tensor, dim: int) -> Tensor:
        whole = self.kept.pop(0)
        torch.testing.assert_close(part, self.own(whole, dim), rtol=1e-5, atol=1e-6)
        return whole


def recipe(plan: str, slots: int, **selection) -> Config:
    loss = {"old_logp": "rollout" if plan == "fork" else "recompute"}
    return toy_config(rollout={"plan": plan}, loss=loss, train={"slots": slots}, selection={"candidates": 3} | selection)


def trainer(config: Config, ranks: Ranks) -> Trainer:
    return assemble(config, ToyModel(), [half_bright], PROMPTS, ranks=ranks)


def drawn(one: Trainer) -> tuple[Groups, Tensor, dict[str, Tensor]]:
    groups = one.draw(one.course.slots)
    return groups, *one.advantage(groups.rewards)


@pytest.mark.parametrize("plan", ["fork", "trajectory"])
@pytest.mark.parametrize("strategy", ["closest", "random"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_does_its_part_of_one_process_work(plan: str, strategy: str, rank: int) -> None:
    config, kept = recipe(plan, 4, strategy=strategy), []
    whole, part = trainer(config, Recording(kept=kept)), trainer(config, Played(rank, 2, kept))
    assert part.course.slots == 2
    for _ in range(3):
        groups, advantage, statistics = drawn(whole)
        mine, own_advantage, own_statistics = drawn(part)
        assert not kept, "a rank gathers what one process would have"
        half = slice(6 * rank, 6 * rank + 6)
        assert list(mine.prompts.texts) == list(groups.prompts.texts[half])
        assert mine.picks.tolist() == (groups.picks[2 * rank : 2 * rank + 2] - 6 * rank).tolist()
        close = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(mine.samples.final, groups.samples.final.chunk(2)[rank], **close)
        torch.testing.assert_close(own_advantage, advantage.chunk(2)[rank], **close)
        assert all(torch.equal(statistics[key], own_statistics[key]) for key in statistics)
        assert torch.equal(whole.capability.mean, part.capability.mean)


def test_several_ranks_have_no_collectives_yet() -> None:
    ranks = Ranks(1, 2)
    assert not ranks.writes and ranks.share("abcd") == "cd" and ranks.first(5) == 5
    assert ranks.rows(torch.arange(3), 3).tolist() == [3, 4, 5] and ranks.own(torch.arange(4)).tolist() == [2, 3]
    for collective in (lambda: ranks.gather(torch.zeros(1), 0), lambda: ranks.sum(torch.zeros(1)), lambda: ranks.agree(True)):
        with pytest.raises(NotImplementedError, match="collectives over 2 ranks"):
            collective()
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Ranks(2, 2)
