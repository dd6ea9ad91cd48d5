"""The plug-in API in other people's loops: whatever holds numbers is taken, what cannot be meant is refused."""

import inspect
import math
import re
from pathlib import Path

import numpy
import pytest
import torch

from adagrpo import CapabilityCurriculum, fused_advantage

NAN = math.nan
REWARDS = [0, 1, 1, 3]


def by_hand(rewards: list[float], mean: float = 1.0, std: float = 2.0) -> list[float]:
    """Local and mass-calibrated global advantage, in Python's floats."""
    n = len(rewards)
    middle = sum(rewards) / n
    spread = math.sqrt(sum((r - middle) ** 2 for r in rewards) / (n - 1))
    z = [(r - mean) / std for r in rewards]
    up, down = sum(v for v in z if v > 0), -sum(v for v in z if v < 0)
    return [(r - middle) / spread + (v / up if v > 0 else v / down) for r, v in zip(rewards, z, strict=True)]


@pytest.mark.parametrize(
    ("rewards", "dtype"),
    [
        (REWARDS, torch.float32),
        (tuple(map(float, REWARDS)), torch.float32),
        ([torch.tensor(float(r), requires_grad=True) for r in REWARDS], torch.float32),
        ([numpy.float64(r) for r in REWARDS], torch.float32),
        (numpy.array(REWARDS), torch.float32),
        (numpy.array(REWARDS, dtype=numpy.uint8), torch.float32),
        (numpy.array(REWARDS, dtype=numpy.float16), torch.float32),
        (numpy.array(REWARDS, dtype=numpy.float64), torch.float64),
        (numpy.array(REWARDS[::-1], dtype=numpy.float32)[::-1], torch.float32),
        (torch.tensor(REWARDS), torch.float32),
        (torch.tensor(REWARDS, dtype=torch.bfloat16), torch.float32),
        (torch.tensor(REWARDS, dtype=torch.float64), torch.float64),
        (torch.nn.Parameter(torch.tensor(REWARDS, dtype=torch.float32)), torch.float32),
    ],
)
def test_whatever_holds_the_numbers(rewards: object, dtype: torch.dtype) -> None:
    found = fused_advantage(rewards, 1.0, 2.0)
    assert found.dtype is dtype and not found.requires_grad
    assert found.tolist() == pytest.approx(by_hand(REWARDS), rel=1e-6)


def test_truth_values_failed_and_masked_samples_have_a_meaning() -> None:
    flags = fused_advantage(numpy.array([True, False, False, True]), 0.5, 0.5)
    assert flags.tolist() == pytest.approx(by_hand([1, 0, 0, 1], 0.5, 0.5), rel=1e-6)
    truth = [*by_hand(REWARDS), 0.0]
    for failed in (NAN, math.inf):
        assert fused_advantage([*REWARDS, failed], 1.0, 2.0).tolist() == pytest.approx(truth, rel=1e-6)
    masked = numpy.ma.array([*REWARDS, 99], mask=[0, 0, 0, 0, 1])
    assert fused_advantage(masked, 1.0, 2.0).tolist() == pytest.approx(truth, rel=1e-6)
    assert fused_advantage([*REWARDS, 99], 1.0, 2.0, mask=[True] * 4 + [False]).tolist() == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("level", [None, NAN, torch.tensor(NAN)])
def test_without_a_level_the_advantage_is_the_local_one(level: object) -> None:
    """As before the first ``select``; a group lying on one side of any level would have a global part too."""
    found = fused_advantage(REWARDS, level, level)
    middle, spread = 1.25, math.sqrt((1.25**2 + 2 * 0.25**2 + 1.75**2) / 3)
    assert found.tolist() == pytest.approx([(r - middle) / spread for r in REWARDS], rel=1e-5)
    curriculum = CapabilityCurriculum()
    assert torch.equal(fused_advantage(REWARDS, curriculum.mean, curriculum.std), fused_advantage(REWARDS))


def test_levels_may_be_arrays_and_tensors_of_one_value_or_per_group() -> None:
    truth = by_hand(REWARDS)
    for mean, std in ((numpy.float32(1), numpy.array(2)), (torch.tensor(1.0, requires_grad=True), torch.tensor([2.0])), (1, 2)):
        assert fused_advantage(REWARDS, mean, std).tolist() == pytest.approx(truth, rel=1e-6)
    rows = fused_advantage([REWARDS, REWARDS], torch.tensor([[1.0], [NAN]]), 2.0, group_size=4)
    assert rows[0].tolist() == pytest.approx(truth, rel=1e-6)
    assert torch.equal(rows[1], fused_advantage(REWARDS))


def test_several_groups_are_the_groups_one_by_one() -> None:
    rewards = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = fused_advantage(rewards, 0.4, 0.2, group_size=5)
    for i in range(3):
        for j in range(2):
            assert torch.allclose(found[i, j], fused_advantage(rewards[i, j], 0.4, 0.2), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            (torch.rand(12).unsqueeze(1).expand(12, 3),),
            ValueError,
            r"\[12, 3\]: wants the rewards of one group, \[G\].*\[G, T\]",
        ),
        ((torch.rand(12, 1),), ValueError, r"\[12, 1\]"),
        ((torch.rand(4, 12),), ValueError, r"group_size=12"),
        ((0.5,), ValueError, r"\[G\]"),
        (([],), ValueError, r"\[0\]"),
        (([1.0],), ValueError, "a group of one"),
        (([[1.0, 2.0], [3.0]],), (ValueError, TypeError), "rewards"),
        ((["a", "b"],), TypeError, "rewards must be real numbers"),
        (([1.0, None],), TypeError, "rewards must be real numbers"),
        (({1: 2},), TypeError, "rewards must be real numbers"),
        ((torch.rand(3, dtype=torch.complex64),), TypeError, "complex64"),
        ((numpy.array([1j, 2]),), TypeError, "complex"),
        ((torch.eye(3)[0].to_sparse(),), TypeError, "sparse"),
        (([torch.rand(2), torch.rand(3)],), ValueError, "one shape"),
        ((REWARDS, math.inf, 1.0), ValueError, "mean = inf"),
        ((REWARDS, 0.0, -1.0), ValueError, "std = -1.0"),
        ((REWARDS, "a", 1.0), TypeError, "mean must be real numbers"),
        ((REWARDS, torch.rand(3), 1.0), ValueError, r"mean \[3\].*\[4\]"),
        ((REWARDS, torch.rand(2, 4), 1.0), ValueError, r"mean \[2, 4\].*\[4\]"),
        ((REWARDS, 0.0, 1.0, 0.0), ValueError, "clip = 0.0"),
        ((REWARDS, 0.0, 1.0, NAN), ValueError, "clip = nan"),
        ((REWARDS, 0.0, 1.0, 5.0, NAN), ValueError, "weight = nan"),
        ((REWARDS, 0.0, 1.0, 5.0, 1.0, "mas"), ValueError, "calibration"),
        ((REWARDS, NAN, NAN, 5.0, 1.0, "mas"), ValueError, "calibration"),
        ((REWARDS, 0.0, 1.0, 5.0, 1.0, "mass", [1, 1, 0, 1]), TypeError, "mask must be bool"),
        ((REWARDS, 0.0, 1.0, 5.0, 1.0, "mass", [True]), ValueError, r"mask \[1\]"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: tuple, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        fused_advantage(*arguments)
    if len(arguments) == 1 and isinstance(arguments[0], torch.Tensor) and arguments[0].shape == (12, 3):
        with pytest.raises(ValueError, match="must be the 12 members"):
            fused_advantage(*arguments, group_size=12)


def test_several_slots_fold_once() -> None:
    """Mean of all eight scores at once, 3.5: not one slot after the other."""
    scores = [[0, 3, 9, 4], [1, 5, 2, 4]]
    curriculum = CapabilityCurriculum()
    assert curriculum.select(scores) == [1, 3]
    assert curriculum.mean == pytest.approx(3.5) and int(curriculum.state.count) == 1
    assert curriculum.std == pytest.approx(math.sqrt(sum((s - 3.5) ** 2 for row in scores for s in row) / 8))
    for same in (numpy.array(scores), torch.tensor(scores), numpy.array(scores, dtype=numpy.float32)):
        again = CapabilityCurriculum()
        assert again.select(same) == [1, 3] and again.mean == pytest.approx(3.5)
    assert [type(pick) for pick in curriculum.select(scores)] == [int, int]
    assert type(CapabilityCurriculum().select(numpy.array([0.0, 1.0, 5.0]))) is int


def test_scores_that_cannot_be_meant_leave_the_level() -> None:
    curriculum = CapabilityCurriculum()
    curriculum.select([1.0, 3.0])
    for scores, error, words in (
        ([[1.0, 2.0], [NAN, NAN]], ValueError, r"slots \[1\]"),
        (torch.rand(2, 2, 2), ValueError, r"\[P, B\]"),
        (["good"], TypeError, "real numbers"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "complex64"),
    ):
        with pytest.raises(error, match=words):
            curriculum.select(scores)
    assert (curriculum.mean, int(curriculum.state.count)) == (2.0, 1)


def test_help_says_what_shapes_and_source() -> None:
    text = inspect.getdoc(fused_advantage) or ""
    for word in ("clamp", "2606.06828", "section 3", "[G]", "[..., G]", "group_size", "float32", "NaN", "Raises"):
        assert word in text, word


# ---- a loop shaped like Flow-GRPO's --------------------------------------------------------------------------------------


class FlowLoop:
    """What such a loop has: rewards in numpy, K samples per prompt, advantages spread over T steps, a policy to train."""

    steps = 4

    def __init__(self) -> None:
        self.policy = torch.nn.Parameter(torch.zeros(6))
        self.trained: list[tuple[str, torch.Tensor]] = []

    def sample(self, prompt: str, count: int) -> list[tuple[str, int]]:
        return [(prompt, k) for k in range(count)]

    def score(self, images: list[tuple[str, int]], prompt: str) -> numpy.ndarray:
        assert all(p == prompt for p, _ in images)
        return numpy.array([0.1 * int(prompt[1:]) + 0.01 * k for _, k in images])

    def update(self, prompt: str, images: list, advantage: torch.Tensor) -> None:
        self.trained.append((prompt, advantage))
        advantages = torch.as_tensor(advantage).unsqueeze(1).repeat(1, self.steps)  # [N, T]
        for step in range(self.steps):
            log_prob = self.policy[:1].expand(len(images))
            ratio = torch.exp(log_prob - log_prob.detach())
            (-advantages[:, step] * ratio).mean().backward()


def test_the_documented_snippet_works_in_it() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text("utf-8")
    snippet = next(s for s in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "CapabilityCurriculum" in s)
    loop = FlowLoop()
    batches = [[f"p{i}" for i in range(6)]] * 2
    exec(snippet, {"batches": batches, "sample": loop.sample, "score": loop.score, "update": loop.update})
    assert [int(prompt[1:]) in (2, 3) for prompt, _ in loop.trained] == [True, True]  # the level is 0.25
    for prompt, advantage in loop.trained:
        rewards = [0.1 * int(prompt[1:]) + 0.01 * k for k in range(12)]
        level = math.sqrt(sum((0.1 * i - 0.25) ** 2 for i in range(6)) / 6)
        assert advantage.tolist() == pytest.approx(by_hand_one_sided(rewards, 0.25, level), rel=1e-5)
    assert bool(loop.policy.grad.isfinite().all())


def by_hand_one_sided(rewards: list[float], mean: float, std: float) -> list[float]:
    """As ``by_hand``; all rewards above the level: the centred z."""
    z = [(r - mean) / std for r in rewards]
    if min(z) > 0 or max(z) < 0:
        n, middle = len(rewards), sum(rewards) / len(rewards)
        spread = math.sqrt(sum((r - middle) ** 2 for r in rewards) / (n - 1))
        return [(r - middle) / spread + v - sum(z) / n for r, v in zip(rewards, z, strict=True)]
    return by_hand(rewards, mean, std)


def test_a_shuffled_batch_is_grouped_by_prompt_in_it() -> None:
    """Rewards [N] gathered from all ranks, prompts repeated K times in any order; advantages [N] in that order."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    prompts = [f"p{i % 3}" for i in order]
    gathered = numpy.array([0.1 * (i % 3) + 0.01 * i for i in order], dtype=numpy.float32)
    curriculum = CapabilityCurriculum()
    curriculum.select([[0.0, 0.2, 0.4], [0.1, 0.3, 0.5]])
    advantages = numpy.zeros_like(gathered)
    for prompt in set(prompts):
        rows = numpy.array([p == prompt for p in prompts])
        advantages[rows] = fused_advantage(gathered[rows], curriculum.mean, curriculum.std)
    for number in range(3):
        rows = [n for n, p in enumerate(prompts) if p == f"p{number}"]
        truth = by_hand_one_sided([float(gathered[n]) for n in rows], curriculum.mean, curriculum.std)
        assert advantages[rows].tolist() == pytest.approx(truth, rel=1e-4)
    spread = numpy.repeat(advantages[:, None], 4, axis=1)
    with pytest.raises(ValueError, match=r"\[G, T\]"):
        fused_advantage(numpy.repeat(gathered[:, None], 4, axis=1), curriculum.mean, curriculum.std)
    assert spread.shape == (12, 4)
