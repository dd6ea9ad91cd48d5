"""What rivals know of prompts: against numbers that released code found, values worked out by hand, and SciPy."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from adagrpo.algorithm.rivals import (
    FAILED,
    MIXED,
    SOLVED,
    BetaRecord,
    ChainRecord,
    Record,
    SkipRecord,
    Visits,
    beta_quantile,
    drawn_by,
    first_kept,
    success,
)

RELEASED: dict[str, Any] = json.loads((Path(__file__).parent.parent / "assets/rivals/released.json").read_text())
EVERYONE = torch.arange(RELEASED["prompts"])


def words(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def half_life(keep: float) -> float:
    return math.log(0.5) / math.log(keep)


def after_each(record: Record) -> list[Any]:
    """The record after each released draw, of groups with as many solved images."""
    found, images = [], torch.arange(RELEASED["images"])
    for draw in RELEASED["draws"]:
        succeeded = torch.stack([(images < solved).double() for solved in draw["solved"]]).unsqueeze(1)
        record = record.after(Visits.of(torch.tensor(draw["prompts"]), succeeded, record.prompts))
        found.append(record)
    return found


def same(found: list[Tensor], released: list[Any]) -> None:
    torch.testing.assert_close(torch.stack(found), torch.tensor(released, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_bots_posteriors_are_those_of_its_released_code() -> None:
    records = after_each(BetaRecord.empty(len(EVERYONE), half_life(0.9)))
    same([1 + record.successes for record in records], RELEASED["bots"]["alpha"])
    same([1 + record.failures for record in records], RELEASED["bots"]["beta"])
    alpha, beta = (torch.tensor(RELEASED["bots"][name][-1], dtype=torch.float64) for name in ("alpha", "beta"))
    torch.testing.assert_close(records[-1].mean(EVERYONE), alpha / (alpha + beta))


def test_dps_chains_are_those_of_its_released_code() -> None:
    records = after_each(ChainRecord.empty(len(EVERYONE), half_life(0.7)))
    same([record.counts for record in records], RELEASED["dps"]["counts"])
    same([record.next for record in records], RELEASED["dps"]["next"])
    assert records[-1].mixed(EVERYONE).tolist() == records[-1].next[:, 1].tolist()


def test_greso_keeps_with_the_chances_of_its_released_code() -> None:
    """There the two p are .5 and .7, which do not move in the first pass."""
    record = SkipRecord.empty(len(EVERYONE), 1)
    records = after_each(SkipRecord(record.prompts, 99, record.run, record.solved, words(0.5, 0.7), record.draws))
    same([record.keeping(EVERYONE) for record in records], RELEASED["greso"]["keeping"])


def test_greso_moves_its_chances_by_the_shares_of_a_draw() -> None:
    """By hand: six prompts in draws of three, the first pass is two draws. Targets: a sixth failed, a twelfth solved."""
    images = {"failed": [0.0, 0.0], "solved": [1.0, 1.0], "mixed": [0.0, 1.0]}
    record = SkipRecord.empty(6, 3)
    expected = [(0.5, 0.5)] * 2 + [(0.49, 0.49), (0.48, 0.5), (0.49, 0.51)]
    draws = [("failed", "solved"), ("failed", "mixed"), ("failed", "solved"), ("failed", "mixed"), ("mixed", "mixed")]
    for outcomes, chances in zip(draws, expected, strict=True):
        succeeded = torch.tensor([[images[name]] for name in outcomes])
        record = record.after(Visits.of(torch.tensor([0, 5]), succeeded, 6))
        torch.testing.assert_close(record.chance, words(*chances))
    assert record.run.tolist() == [0] * 6 and int(record.draws) == 5
    for _ in range(60):
        record = record.after(Visits.of(torch.tensor([0, 5]), torch.tensor([[images["failed"]], [images["solved"]]]), 6))
    torch.testing.assert_close(record.chance, words(0.05, 0.05))
    assert record.run.tolist() == [60, 0, 0, 0, 0, 60] and record.keeping(torch.tensor([[0, 5, 1]])).tolist() == [
        [0.01, 0.01, 1]
    ]


def test_greso_bears_more_failed_prompts_than_solved_ones() -> None:
    """An eighth of each: less than the sixth that may fail, more than the twelfth that may be solved."""
    succeeded = torch.tensor([[0.0, 1.0]]).repeat(8, 1, 1)
    succeeded[0], succeeded[1] = 0.0, 1.0
    visits, record = Visits.of(torch.arange(8), succeeded, 8), SkipRecord.empty(8, 8)
    torch.testing.assert_close(record.after(visits).after(visits).chance, words(0.51, 0.49))


def test_a_run_of_vain_visits_is_of_one_kind() -> None:
    record = SkipRecord.empty(1, 1)
    for value, run in ((0.0, 1), (0.0, 2), (1.0, 1), (0.0, 1)):
        record = record.after(Visits.of(torch.tensor([0]), torch.full((1, 1, 4), value), 1))
        assert record.run.tolist() == [run]


def test_success_by_hand() -> None:
    rewards = torch.tensor([-1.0, 20.0, 22.5, 30.0, math.nan, math.inf])
    found = success(rewards, 20.0, 25.0)
    torch.testing.assert_close(found, words(0, 0, 0.5, 1, math.nan, math.nan), equal_nan=True)
    exact = success(torch.tensor([0.7, 0.69, 1.0, math.nan]), 0.7, 0.7)  # in float32 seven tenths are a little less
    torch.testing.assert_close(exact, words(1, 0, 1, math.nan), equal_nan=True)


def test_visits_by_hand() -> None:
    """Two groups of two images per prompt; prompt 4 comes twice, 3 fails as a whole, 0 is not visited."""
    nan = math.nan
    groups = [
        [[0.2, 0.2], [0.4, 0.4]],  # no group has spread, and success is below a half
        [[0.9, 0.9], [0.9, nan]],
        [[nan, nan], [nan, nan]],
        [[0.0, 1.0], [1.0, 1.0]],
        [[1.0, 1.0], [1.0, 1.0]],
    ]
    visits = Visits.of(torch.tensor([1, 2, 3, 4, 4]), torch.tensor(groups, dtype=torch.float64), 5)
    assert visits.images.tolist() == [0, 4, 3, 0, 8] and visits.visited.tolist() == [False, True, True, False, True]
    torch.testing.assert_close(visits.success, words(0, 0.3, 0.9, 0, 7 / 8))
    assert visits.outcome[visits.visited].tolist() == [FAILED, SOLVED, MIXED]


def test_prompts_without_an_image_are_as_if_not_visited() -> None:
    nothing = Visits.of(torch.tensor([1]), torch.full((1, 2, 3), math.nan), 3)
    beta, chain, skip = BetaRecord.empty(3, 5.0), ChainRecord.empty(3, 5.0), SkipRecord.empty(3, 1)
    solved = Visits.of(torch.tensor([1]), torch.ones(1, 2, 3), 3)
    for _ in range(2):
        beta, chain, skip = beta.after(solved), chain.after(solved), skip.after(solved)
    torch.testing.assert_close(beta.after(nothing).successes, beta.successes * 0.5**0.2)
    assert skip.after(nothing).run.tolist() == skip.run.tolist() == [0, 2, 0]
    torch.testing.assert_close(chain.after(nothing).now, chain.next)


def test_records_are_loaded_as_they_were_saved() -> None:
    empty: list[Record] = [BetaRecord.empty(5, 3.0), ChainRecord.empty(5, 3.0), SkipRecord.empty(5, 2)]
    for record in empty:
        late = after_each(record)[-1]
        loaded = record.loaded(late.state_dict())
        assert late.state_dict() and all(torch.equal(loaded.state_dict()[k], t) for k, t in late.state_dict().items())
        assert {k: v for k, v in vars(loaded).items() if not isinstance(v, Tensor)} == {
            k: v for k, v in vars(late).items() if not isinstance(v, Tensor)
        }


@pytest.mark.parametrize(
    ("alpha", "beta", "close"),
    [(1.0, 1.0, 1e-5), (1.0, 49.0, 1e-5), (480.0, 1.0, 1e-5), (3.3, 17.2, 1e-5), (400.0, 500.0, 4e-5), (24e3, 24e3, 3e-4)],
)
def test_beta_quantiles_are_scipys(alpha: float, beta: float, close: float) -> None:
    share = torch.linspace(0, 0.9999, 301, dtype=torch.float64)
    found = beta_quantile(torch.full_like(share, alpha), torch.full_like(share, beta), share)
    truth = torch.from_numpy(stats.beta.ppf(share.numpy(), alpha, beta))
    torch.testing.assert_close(found, truth, rtol=0, atol=close)


def test_draws_from_a_posterior_are_at_its_quantiles() -> None:
    """Prompt 2 with 3 of 4 images solved: Beta(4, 2); an unknown one is uniform."""
    record = BetaRecord.empty(3, 10.0).after(Visits.of(torch.tensor([2]), torch.tensor([[[1.0, 1.0, 0.0, 1.0]]]), 3))
    found = record.sample(torch.tensor([[2, 0]]), torch.tensor([[0.3, 0.3]]))
    torch.testing.assert_close(found, words(stats.beta.ppf(0.3, 4, 2), 0.3).unsqueeze(0), rtol=0, atol=1e-5)


def test_choices_by_hand() -> None:
    keeping, luck = torch.tensor([[0.2, 0.5, 1.0], [0.2, 0.5, 0.4], [1.0, 1.0, 1.0]]), torch.full((3, 3), 0.45)
    assert first_kept(keeping, luck).tolist() == [1, 1, 0]
    assert first_kept(keeping[:, :1].expand(3, 3) * 0.5, luck).tolist() == [2, 2, 0]
    score = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]], dtype=torch.float64).expand(
        4, 3
    )  # an eighth, a quarter, the rest
    assert drawn_by(score, words(0.12, 0.13, 0.374, 0.376)).tolist() == [0, 1, 1, 2]
