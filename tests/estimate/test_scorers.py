"""Rewards in the memory plan: weights wherever they are, once; activations rehearsed; other devices; offloading."""

import dataclasses
from pathlib import Path

import pytest
import torch
from small_clip import write_clip
from torch import Tensor, nn
from toy import ToyModel, half_bright, toy_config

from adagrpo.errors import InputError
from adagrpo.estimate.counting import PeakMemory, tensor_bytes
from adagrpo.estimate.memory import Entry, MemoryPlan
from adagrpo.estimate.rehearsal import rehearse
from adagrpo.estimate.scorers import ScorerDemand, activations, scorer_entries
from adagrpo.forecast import planned_memory
from adagrpo.recipe.keys import RewardConfig
from adagrpo.rewards import PromptRows, build_reward
from adagrpo.rewards.holdings import weights_of

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")


class Tower:
    """A reward with a module inside a list; ``head`` weights of its own."""

    def __init__(self, tower: nn.Module, head: int) -> None:
        self.parts = [{"tower": tower}, nn.Linear(head, 1, bias=False)]

    def __call__(self, images: Tensor, prompts) -> Tensor:
        return images.mean((1, 2, 3))


class Formula(Tower):
    def activation_bytes(self, rows: int, height: int, width: int) -> int:
        return rows * height * width


def by_place(entries: list[Entry]) -> dict[tuple[str, str, str], int]:
    return {(entry.name, entry.phase, entry.device): entry.bytes for entry in entries}


def test_shared_towers_are_counted_once_and_named() -> None:
    tower = nn.Linear(10, 10, bias=False)
    demands = [ScorerDemand("a", Tower(tower, 3)), ScorerDemand("b", Tower(tower, 5)), ScorerDemand("c", half_bright)]
    a, b, c = scorer_entries(demands, CPU, 4, (8, 8))
    assert (a.bytes, b.bytes, c.bytes) == (4 * 103, 4 * 5, 0) and a.loaded == a.bytes
    assert "shared with a" in b.why and "activations are not known" in a.why and c.why == "no weights"


def test_activations_have_a_phase_of_their_own_and_other_devices_their_own_sum() -> None:
    tower = nn.Linear(10, 10, bias=False)
    demands = [
        ScorerDemand("a", Formula(tower, 2), "cuda", rows=2),  # which is the model's
        ScorerDemand("b", Formula(nn.Linear(1, 1, bias=False), 2), "cuda:1", 4),
        ScorerDemand("c", 1000, "cpu"),
    ]
    entries = scorer_entries(demands, CUDA, 4, (8, 16))
    pictures = 4 * 4 * 3 * 8 * 16
    assert by_place(entries) == {
        ("reward a", "", ""): 4 * 102, ("activations", "reward a", ""): 2 * 8 * 16 + pictures,
        ("reward b", "", "cuda:1"): 4 * 3, ("activations", "", "cuda:1"): 4 * 8 * 16 + pictures, ("reward c", "", "cpu"): 1000,
    }  # fmt: skip
    plan = MemoryPlan(tuple(entries), 0, 1)
    assert plan.resident == 4 * 102 and plan.phases == {"reward a": 2 * 8 * 16 + pictures}
    assert plan.elsewhere == {"cuda:1": 12 + 4 * 8 * 16 + pictures, "cpu": 1000}
    assert "on cuda:1" in plan.table()
    plan.check_elsewhere({CUDA: 0, torch.device("cuda:1"): 10**6, CPU: None}.get)
    with pytest.raises(InputError, match=r"rewards on cuda:1 need .* it has 0\.00 MiB free \(reward b"):
        plan.check_elsewhere(lambda device: 100 if device.type == "cuda" else None)


@pytest.mark.parametrize("overlapped", [False, True])
def test_offloaded_weights_are_there_while_pictures_are_scored(overlapped: bool) -> None:
    demands = [
        ScorerDemand("a", Formula(nn.Linear(10, 10, bias=False), 2), rows=2, offload=True),
        ScorerDemand("b", Formula(nn.Linear(4, 4, bias=False), 2), rows=2),
    ]
    entries = scorer_entries(demands, CUDA, 2, (8, 8), overlapped)
    plan, activation = MemoryPlan(tuple(entries), 0, 1), 2 * 8 * 8 + 4 * 2 * 3 * 8 * 8
    assert plan.resident == 4 * 18
    expected = {"reward a": 4 * 102 + activation, "reward b": 4 * 102 + activation, "decode": 4 * 102}
    assert plan.phases == expected | ({"rollout": 4 * 102 + activation} if overlapped else {})
    # on a CPU there is nowhere to go
    assert MemoryPlan(tuple(scorer_entries(demands, CPU, 2, (8, 8))), 0, 1).resident == 4 * (102 + 18)


def test_a_rehearsed_call_holds_what_a_real_one_does(tmp_path: Path) -> None:
    reward = build_reward("clip", {"path": str(write_clip(tmp_path / "clip"))})
    before = weights_of(reward)
    activations(reward, 1, (40, 56))  # the weights of the resizing are kept from now on
    planned = activations(reward, 1, (40, 56))  # a CPU resizes one picture at a time, a device several
    assert [t.device.type for t in weights_of(reward)] == ["cpu"] * len(before) and not reward._cache
    images, prompts = torch.rand(1, 3, 40, 56), PromptRows(["a picture"], torch.zeros(1, dtype=torch.int64))
    reward(images, prompts)
    reward._cache.clear()
    with torch.no_grad(), PeakMemory("cpu") as memory:
        reward(images, prompts)
    assert planned == pytest.approx(memory.peak, rel=0.01) and planned > 5 * 10**4
    assert tensor_bytes(before) == tensor_bytes(weights_of(build_reward("clip", {"path": str(tmp_path / "clip")})))

    class Fails(Tower):
        rehearsable = True

        def __call__(self, images: Tensor, prompts) -> Tensor:
            return torch.tensor([float(image.mean()) for image in images])

    assert "not known (RuntimeError on meta tensors)" in str(activations(Fails(nn.Linear(1, 1), 1), 2, (8, 8)))


def test_rewards_of_one_name_and_chunks_smaller_than_rows_are_in_the_plan() -> None:
    config = toy_config(rewards=(RewardConfig("a", rows=1), RewardConfig("a", rows=99)))
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, decode_rows=5))
    model = ToyModel()
    rewards = [Formula(nn.Linear(3, 3), 1), Formula(nn.Linear(2, 2), 1)]
    plan = planned_memory(config, model, rehearse(model, "a"), rewards, 40, 4)
    pictures, size = 4 * 5 * 3 * 32 * 32, 32 * 32
    assert plan.phases["reward 0_a"] == size + pictures and plan.phases["reward 1_a"] == 5 * size + pictures
