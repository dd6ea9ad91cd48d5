"""selection.capability = per_slot: each slot is what one process with one slot would be, as in the released code."""

from __future__ import annotations

import pytest
import torch
from toy import toy_config, toy_trainer

from adagrpo.algorithm.advantages import fused_advantage
from adagrpo.algorithm.selection import CapabilityCurriculum
from adagrpo.errors import InputError
from adagrpo.recipe.rules import check


def test_each_slot_picks_and_fuses_by_the_scores_of_its_own_candidates() -> None:
    trainer = toy_trainer(toy_config(train={"slots": 2}, selection={"candidates": 4, "capability": "per_slot"}))
    slots = [CapabilityCurriculum(alpha=0.8) for _ in range(2)]
    for _ in range(4):
        groups = trainer.draw()
        assert groups.scores is not None and groups.scores.shape == (1, 2, 4)
        advantage, statistics = trainer.advantage(groups.rewards)
        for p, slot in enumerate(slots):
            assert slot.select(groups.scores[0, p]) == int(groups.picks[p]) - 4 * p
            own = slice(2 * p, 2 * p + 2)  # groups: two forks of each slot
            expected = fused_advantage(groups.rewards[0, own], slot.mean, slot.std, group_size=4)
            torch.testing.assert_close(advantage[own], expected.to(advantage), rtol=1e-6, atol=1e-6)
            assert trainer.capability.mean[p, 0] == pytest.approx(slot.mean, rel=1e-12)
        assert float(statistics["reward/train"]) == pytest.approx(float(groups.rewards.mean()))
    assert float((trainer.capability.mean[0] - trainer.capability.mean[1]).abs()) > 1e-3


def test_levels_of_slots_are_saved_and_loaded() -> None:
    config = toy_config(selection={"capability": "per_slot"})
    one, other = toy_trainer(config), toy_trainer(config)
    metrics = one.iteration()
    assert metrics["selection/ema_mean"] == one.capability.mean.mean()
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.capability.mean, one.capability.mean) and other.capability.mean.shape == (2, 1)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"selection": {"probe": "short"}}, "selection.capability = per_slot: needs selection.probe = full, not short"),
        ({"selection": {"probe": "pool"}}, "needs selection.probe = full, not pool"),
        ({"selection": {"candidates": 1}, "advantage": {"weight": 0.0}}, "has no effect here"),
        ({"advantage": {"std": "global"}}, "advantage.std = global: is of all slots together"),
        ({"advantage": {"equal_groups": "refill"}}, "advantage.equal_groups = refill"),
        ({"advantage": {"function": "a:b"}}, "needs a built-in selection.strategy and advantage.function"),
    ],
)
def test_what_needs_one_level_is_refused(sections: dict, message: str) -> None:
    sections = {**sections, "selection": {"capability": "per_slot", **sections.get("selection", {})}}
    with pytest.raises(InputError, match=message):
        check(toy_config(**sections))
