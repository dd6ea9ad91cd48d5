"""The paired comparison against scipy's own t interval."""

import math

import pytest
import torch
from scipy import stats

from adagrpo.evaluate.held_out import paired_gain


def test_interval_is_that_of_a_paired_t_test_over_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(40, 3, generator=generator)
    after = before + 0.1 + 0.05 * torch.randn(40, 3, generator=generator)
    gain = paired_gain(before, after)
    truth = stats.ttest_rel(after.double().mean(1).numpy(), before.double().mean(1).numpy())
    interval = truth.confidence_interval(0.95)
    assert gain.low == pytest.approx(interval.low, abs=1e-9)
    assert gain.high == pytest.approx(interval.high, abs=1e-9)
    assert gain.gain == pytest.approx(gain.after - gain.before, abs=1e-9)
    assert (gain.prompts, gain.noises) == (40, 3)


def test_failed_scores_are_left_out() -> None:
    before = torch.tensor([[0.0, math.nan], [1.0, 1.0], [math.nan, math.nan]])
    after = torch.tensor([[0.5, 0.5], [1.5, 1.5], [9.0, 9.0]])
    gain = paired_gain(before, after)
    assert gain.prompts == 2 and gain.gain == pytest.approx(0.5)


def test_a_score_that_failed_once_is_left_out_both_times() -> None:
    before = torch.tensor([[0.0, math.nan, 9.0], [1.0, 1.0, 1.0], [math.nan, math.inf, 5.0]])
    after = torch.tensor([[0.5, 7.0, math.nan], [1.5, 1.5, 1.5], [9.0, 9.0, -math.inf]])
    gain = paired_gain(before, after)
    assert (gain.before, gain.after, gain.gain, gain.prompts) == pytest.approx((0.5, 1.0, 0.5, 2))


@pytest.mark.parametrize(
    ("after", "said"),
    [([[0.5]], "held-out reward 0.250 → 0.500: +0.250 (no interval, 1 prompt x 1 noise)"), ([[math.nan]], "no comparison")],
)
def test_too_few_prompts_for_an_interval_are_said_in_words(after: list[list[float]], said: str) -> None:
    gain = paired_gain(torch.tensor([[0.25]]), torch.tensor(after))
    assert said in str(gain) and "nan" not in str(gain)
