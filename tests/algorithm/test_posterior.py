"""Posterior of each prompt's mean reward, against the conjugate formulas worked out by hand and against sampling."""

import math

import pytest
import torch

from adagrpo.algorithm.posterior import PromptPosterior, expected_distance


def words(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def at(draw: int) -> torch.Tensor:
    return torch.tensor(draw)


def test_nothing_known_is_the_prior() -> None:
    expected, variance = PromptPosterior.empty(1, 3).predict(torch.tensor([[0, 2]]), words(0.4), words(0.1), 0.6, at(5), 10.0)
    torch.testing.assert_close(expected, torch.full((1, 1, 2), 0.4, dtype=torch.float64))
    torch.testing.assert_close(variance, torch.full((1, 1, 2), 0.04, dtype=torch.float64))


def test_conjugate_update_by_hand() -> None:
    """Prior N(.5, .05), noise .05: two images of mean .9 move the mean to (2*.9 + .5)/3, the variance to .05/3."""
    posterior = PromptPosterior.empty(1, 2).observed(torch.tensor([1]), words(0.9).reshape(1, 1), 2.0, at(3), 10.0)
    expected, variance = posterior.predict(torch.tensor([1, 0]), words(0.5), words(0.1), 0.5, at(3), 10.0)
    torch.testing.assert_close(expected, words((2 * 0.9 + 0.5) / 3, 0.5).unsqueeze(0))
    torch.testing.assert_close(variance, words(0.05 / 3, 0.05).unsqueeze(0))


def test_evidence_fades_by_half_each_half_life() -> None:
    posterior = PromptPosterior.empty(1, 1).observed(torch.tensor([0]), words(1.0).reshape(1, 1), 4.0, at(0), 7.0)
    for draws, left in ((0, 4.0), (7, 2.0), (14, 1.0)):
        expected, _ = posterior.predict(torch.tensor([0]), words(0.0), words(1.0), 0.5, at(draws), 7.0)
        assert float(expected) == pytest.approx(left / (left + 1))
    later = posterior.observed(torch.tensor([0]), words(0.0).reshape(1, 1), 1.0, at(7), 7.0)
    assert float(later.count) == pytest.approx(3) and float(later.total) == pytest.approx(2) and int(later.seen) == 7


def test_repeats_count_twice_and_failures_not_at_all() -> None:
    rewards = torch.tensor([[0.2, 0.6, math.nan], [1.0, 3.0, 1.0]], dtype=torch.float64)
    posterior = PromptPosterior.empty(2, 3).observed(torch.tensor([1, 1, 2]), rewards, 1.0, at(1), 10.0)
    assert posterior.count.tolist() == [0, 2, 0]
    torch.testing.assert_close(posterior.total, torch.tensor([[0, 0.8, 0], [0, 4.0, 0]], dtype=torch.float64))


def test_the_nearest_is_near_or_known_to_be_near() -> None:
    expected = torch.tensor([[[0.5, 0.9, 0.5, 0.45]]], dtype=torch.float64)
    variance = torch.tensor([[[0.05, 0.0, 0.01, 0.001]]], dtype=torch.float64)
    # expected squared distances to .5: .05, .16, .01, .0035
    assert expected_distance(expected, variance, words(0.5), words(0.1), words(1.0)).argmin(1).tolist() == [3]
    two = torch.cat([expected, words(0.9, 0.5, 0.5, 0.9).reshape(1, 1, 4)])
    # Without variance the first reward alone takes candidate 0; the second puts it .4 away, and candidate 2 nowhere.
    assert expected_distance(expected, 0 * variance, words(0.5), words(0.1), words(1.0)).argmin(1).tolist() == [0]
    assert expected_distance(two, 0 * two, words(0.5, 0.5), words(0.1, 0.1), words(1.0, 1.0)).argmin(1).tolist() == [2]


def test_prediction_is_calibrated_on_a_world_that_obeys_it() -> None:
    """400 prompts, spread .22, noise .25: after 4 images the standardised error of the mean is a standard normal's."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    share, var = 0.56, 0.116
    truth = 0.6 + (var * (1 - share)) ** 0.5 * draw(400)
    posterior, everyone = PromptPosterior.empty(1, 400), torch.arange(400)
    for i in range(4):
        images = truth + (var * share) ** 0.5 * draw(400)
        posterior = posterior.observed(everyone, images.unsqueeze(0), 1.0, at(i), 1e9)
    expected, variance = posterior.predict(everyone, words(0.6), words(var), share, at(4), 1e9)
    error = (expected[0] - truth) / variance[0].sqrt()
    assert abs(float(error.mean())) < 0.15 and float(error.std()) == pytest.approx(1, abs=0.1)
