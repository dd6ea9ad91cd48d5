"""Rewards in bf16 beside themselves in fp32: what is measured, by hand, and that both score the same images of whole groups."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy import PROMPTS, ToyModel, half_bright, toy_config

from adagrpo.cli import main
from adagrpo.evaluate.reward_fidelity import compare_rewards, of_scores, rounded_rewards
from adagrpo.recipe.keys import RewardConfig


def test_scores_by_hand() -> None:
    """Two groups of three: the first keeps its order, the second is turned over; one image is lost."""
    wide = torch.tensor([1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 5.0, math.nan, 7.0], dtype=torch.float64)
    narrow = torch.tensor([1.5, 2.0, 3.0, 12.0, 11.0, 10.0, math.nan, 6.0, 7.0], dtype=torch.float64)
    found = of_scores("r", wide, narrow, 3)
    assert (found.images, found.groups, found.lost) == (9, 3, 1)
    assert found.difference == 0.0 and found.worst_difference == 2.0
    assert found.group_spearman == pytest.approx(0.0)  # (1 - 1) / 2; the third group has one image left
    # ranks of the 7 images scored twice: 1 2 3 5 6 7 4 and 1 2 3 7 6 5 4
    assert found.spearman == pytest.approx(1 - 6 * 8 / (7 * 48))
    assert found.spread == pytest.approx((1 + 1 + math.sqrt(2)) / 3)
    assert not found.passed and "NOT passed" in str(found)
    same = of_scores("r", wide, wide, 3)
    assert same.passed and same.group_spearman == pytest.approx(1) and same.lost == 0
    assert math.isnan(of_scores("r", torch.ones(4), torch.ones(4), 2).group_spearman)


@pytest.mark.parametrize(
    "rollout", [{}, {"plan": "trajectory"}, {"plan": "window", "window_size": 2}], ids=["fork", "trajectory", "window"]
)
def test_both_score_the_groups_that_the_recipe_draws(rollout: dict) -> None:
    seen: list[tuple[Tensor, list[str]]] = []

    def wide(images: Tensor, prompts) -> Tensor:
        seen.append((images.clone(), list(prompts)))
        return half_bright(images, prompts)

    def narrow(images: Tensor, prompts) -> Tensor:
        seen.append((images.clone(), list(prompts)))
        return -half_bright(images, prompts)

    entries = (RewardConfig("fp32"), RewardConfig("x", dtype="bf16"), RewardConfig("x", kwargs={"dtype": "bf16"}))
    config = toy_config(rewards=entries, rollout={"steps": 6, "group_size": 4, **rollout})
    assert rounded_rewards(config) == [1, 2]
    first, second = compare_rewards(config, ToyModel(), [(wide, narrow), (half_bright, half_bright)], PROMPTS, 2)
    each = 4 * (2 if not rollout else 1)
    assert first.images == 2 * each and first.groups == 2 * each // 4
    assert first.spearman == pytest.approx(-1) and first.group_spearman == pytest.approx(-1)
    assert second.passed and second.worst_difference == 0 and (first.reward, second.reward) == ("0_x", "1_x")
    assert [len(images) for images, _ in seen] == [each] * 4
    for (a, texts), (b, same) in (seen[:2], seen[2:]):
        assert torch.equal(a, b) and texts == same and len(set(texts)) == 1
    assert seen[0][1] != seen[2][1]


REWARD = """
import torch

class Mean:
    def __init__(self, dtype="fp32"):
        self.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32

    def __call__(self, images, prompts):
        return images.to(self.dtype).mean((1, 2, 3)).float()
"""


def test_the_command_records_what_it_found(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "means.py").write_text(REWARD, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tmp_path / "r.toml"
    keys = "rollout = {steps = 4, sde_steps = [0], group_size = 3}\nselection = {candidates = 2}\n"
    keys += "model = {family = 'parts:model'}\ndata = {prompts = 'parts:prompts', held_out = 'parts:held_out'}\n"
    recipe.write_text(f"{keys}[[rewards]]\nname = 'means:Mean'\ndtype = 'bf16'\n", "utf-8")
    code = main(["fidelity", str(recipe), "--slots", "2", "--out", str(tmp_path / "out.json")])
    record = json.loads((tmp_path / "out.json").read_text())
    (found,) = record["rewards"]
    assert code == (0 if record["passed"] else 1) and found["passed"] is record["passed"]
    assert found["images"] == 6 and found["groups"] == 2 and 0 < found["worst_difference"] < 0.01
    assert "reward in bf16" in capsys.readouterr().out
    assert main(["fidelity", "tiny"]) == 2 and "rewards.N.dtype" in capsys.readouterr().err
