"""Rivals of the curriculum filter: whom they pick, what they sample, and what a repeated draw finds."""

import dataclasses
import math
import re
from pathlib import Path

import numpy
import pytest
import torch
from scipy import stats
from torch import Tensor
from toy import half_bright, run_out_of_memory_once, toy_config, toy_trainer

from adagrpo.algorithm.rivals import MIXED, BetaRecord, ChainRecord, SkipRecord
from adagrpo.algorithm.sde import Stream, philox_uniform
from adagrpo.errors import InputError
from adagrpo.forecast import planned_calls, planned_evaluations
from adagrpo.prompts.stream import PromptStream
from adagrpo.recipe.derived import Derived
from adagrpo.recipe.keys import Config, EngineConfig
from adagrpo.recipe.rules import check, repeats_notice
from adagrpo.run.metrics import read_metrics
from adagrpo.train import Trainer

RIVALS = ["bots", "greso", "procurl", "dps"]
TRAJECTORY = {"rollout": {"plan": "trajectory"}, "loss": {"old_logp": "recompute"}}


def recipe(probe: str, weight: float = 1.0, plan: str = "fork", **selection) -> Config:
    other = TRAJECTORY if plan == "trajectory" else {}
    keys = {"candidates": 3, "probe": probe} | selection
    config = toy_config(train={"slots": 2}, selection=keys, advantage={"weight": weight}, **other)
    check(config)
    return config


def three_kinds(images: Tensor, prompts) -> Tensor:
    """A third of the prompts always fail, a third always succeed, the rest now and then."""
    kind = torch.tensor([int(p.split()[1]) % 3 for p in prompts])
    return torch.where(kind == 2, (half_bright(images, prompts) * 4 + 0.5).clamp(0.01, 0.99), kind.float())


def by_hand(probe: str, trainer: Trainer, numbers: list[list[int]]) -> list[int]:
    """Whom the papers' rules take of each slot, in plain Python, given what is known."""
    record = trainer.knowledge.evidence.record
    seed, draw = trainer.executor.seed, trainer.draws
    luck = philox_uniform(seed, torch.arange(6), draw, Stream.SELECT, 3).reshape(2, 3).tolist()
    return [rule(probe, record, each, lucks) for each, lucks in zip(numbers, luck, strict=True)]


def rule(probe: str, record, numbers: list[int], luck: list[float]) -> int:
    if probe == "greso":
        assert isinstance(record, SkipRecord)
        p = [float(record.chance[int(record.solved[n])]) for n in numbers]
        kept = [u < max(each ** int(record.run[n]), 0.01) for each, n, u in zip(p, numbers, luck, strict=True)]
        return kept.index(True) if any(kept) else 2
    if probe == "dps":
        assert isinstance(record, ChainRecord)
        return int(numpy.argmax([float(record.next[n, MIXED]) for n in numbers]))
    assert isinstance(record, BetaRecord)
    alpha, beta = ([1 + float(t[n]) for n in numbers] for t in (record.successes, record.failures))
    if probe == "bots":
        draws = [stats.beta.ppf(u, a, b) for u, a, b in zip(luck, alpha, beta, strict=True)]
        return int(numpy.argmin([abs(x - 0.5) for x in draws]))
    mass = [math.exp(20 * a * b / (a + b) ** 2) for a, b in zip(alpha, beta, strict=True)]
    return int(numpy.searchsorted(numpy.cumsum(mass) / sum(mass), luck[0], side="right"))


@pytest.mark.parametrize("probe", RIVALS)
def test_each_picks_by_its_own_rule(probe: str) -> None:
    trainer, mixed, offered = toy_trainer(recipe(probe, weight=0.0), reward=three_kinds), 0, 0
    for draw in range(60):
        stream = PromptStream(trainer.stream.prompts, trainer.config.train.seed, trainer.stream.position)
        numbers = torch.tensor(stream.take_numbers(6)).reshape(2, 3).tolist()
        expected = by_hand(probe, trainer, numbers)
        picks = trainer.draw().picks.tolist()
        assert picks == [expected[0], 3 + expected[1]]
        if draw >= 20:
            mixed += sum(numbers[slot][pick % 3] % 3 == 2 for slot, pick in enumerate(picks))
            offered += sum(n % 3 == 2 for each in numbers for n in each)
    assert mixed > offered / 3  # of 80 picks; blind ones take as many as there are


def test_only_the_groups_of_a_draw_are_learnt_from() -> None:
    """As many images of each picked prompt as its groups have rewards; the uniform candidate's image is none of them."""
    trainer = toy_trainer(recipe("bots"), reward=three_kinds)
    groups = trainer.draw()
    record = trainer.knowledge.evidence.record
    images = record.successes + record.failures
    assert {int(n) for n in images.nonzero()} == {int(p.split()[1]) for p in groups.prompts}
    assert images.max() == groups.rewards.numel() / 2


@pytest.mark.parametrize("probe", RIVALS)
@pytest.mark.parametrize(("plan", "weight", "rows"), [
    ("fork", 1.0, [4] * 6), ("fork", 0.0, [2] * 6), ("trajectory", 1.0, [2] * 6), ("trajectory", 0.0, []),
])  # fmt: skip
def test_they_sample_the_anchors_and_what_feeds_the_level(probe: str, plan: str, weight: float, rows: list[int]) -> None:
    """Two slots: the picks' where groups fork from them, the uniform candidates' where advantages read the level."""
    config = recipe(probe, weight, plan)
    trainer, images = toy_trainer(config), []
    decode = trainer.model.decode
    trainer.model.decode = lambda x: images.append(len(x)) or decode(x)
    for _ in range(2):
        images.clear()
        numbers, _ = read_metrics(trainer.iteration())
        assert numbers["policy/ratio_deviation"] <= 1e-6
        assert ("selection/ema_mean" in numbers) == (weight > 0)
    planned = planned_calls(config)
    assert planned.get("probe", []) == rows and sum(images) == sum(planned["decode"])
    assert {phase: c.evaluations for phase, c in trainer.executor.counts.items()} == planned_evaluations(config)
    assert int(trainer.capability.count[0]) == (2 if weight > 0 else 0)
    plain = toy_config(train={"slots": 2}, selection={"candidates": 1}, advantage={"weight": 0.0}, **(
        TRAJECTORY if plan == "trajectory" else {}
    ))  # fmt: skip
    if weight == 0:
        assert planned_calls(config) == planned_calls(plain)


def test_the_page_says_what_each_costs() -> None:
    """Of the published schedule of one slot, 600 evaluations without a filter: where advantages read the level, and not."""
    page = (Path(__file__).parents[2] / "docs" / "probes.md").read_text("utf-8").partition("## Rivals")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", page, re.MULTILINE))
    assert list(rows) == RIVALS
    official = {"rollout": {"steps": 16, "sde_steps": (0, 2, 4, 6), "group_size": 12}, "train": {"slots": 1}}
    for probe, said in rows.items():
        counts = []
        for weight in (1.0, 0.0):
            config = toy_config(**official, selection={"candidates": 10, "probe": probe}, advantage={"weight": weight})
            counts.append(sum(planned_evaluations(config).values()))
        assert said == ", ".join(f"{count / 600 - 1:+.1%}".replace("%", " %") for count in counts)


def test_a_floor_under_the_spread_feeds_the_level_too() -> None:
    config = recipe("bots", 0.0)
    floored = dataclasses.replace(config, advantage=dataclasses.replace(config.advantage, std="floored"))
    assert not Derived(config).scores_needed and Derived(floored).scores_needed
    assert planned_calls(floored)["probe"] == [4] * 6


@pytest.mark.parametrize("probe", RIVALS)
def test_a_draw_that_ran_out_of_memory_is_repeated_from_the_same_state(probe: str) -> None:
    trainer = toy_trainer(recipe(probe), reward=three_kinds)
    failed = run_out_of_memory_once(trainer)
    halved = EngineConfig(max_rows=2)
    trainer.iteration()
    assert trainer.executor.limit.max_rows == halved.max_rows
    calm = toy_trainer(dataclasses.replace(recipe(probe), engine=halved), reward=three_kinds)
    calm.iteration()
    ours, theirs = (t.knowledge.evidence.record.state_dict() for t in (trainer, calm))
    assert failed and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_old_checkpoint_of_memory_has_no_record() -> None:
    trainer = toy_trainer(toy_config(selection={"candidates": 3, "probe": "memory"}))
    assert set(trainer.state_dict()["filter"]) == {"levels", "posterior", "recent"}


@pytest.mark.parametrize(("selection", "other", "message"), [
    ({"probe": "bots", "success_range": (1.0, 0.0)}, {}, "success_range = .1.0, 0.0.: must not fall"),
    ({"probe": "dps", "success_range": (0.0, math.inf)}, {}, "success_range.1 = inf: must be a finite number"),
    ({"probe": "memory", "success_range": (0.0, 2.0)}, {}, "has no effect here: it needs selection.probe = bots, greso"),
    ({"probe": "greso", "half_life": 3.0}, {}, "half_life = 3.0: has no effect here: it needs selection.probe = memory, bots"),
    ({"probe": "dps", "target_success": 0.4}, {}, "it needs selection.probe = bots"),
    ({"probe": "bots", "target_success": 1.5}, {}, "must be at most 1"),
    ({"probe": "bots", "sharpness": 3.0}, {}, "it needs selection.probe = procurl"),
    ({"probe": "procurl", "sharpness": -1.0}, {}, "must be at least 0"),
    ({"probe": "bots", "finalists": 2}, {}, "it needs selection.probe = memory"),
    ({"probe": "bots", "candidates": 1}, {}, "it needs selection.candidates above 1"),
    ({"probe": "bots", "strategy": "hardest"}, {}, "selection.probe = bots knows closest only"),
    ({"probe": "bots"}, {"advantage": {"equal_groups": "refill"}}, "needs selection.probe = full"),
    ({"probe": "dps"}, {"rollout": {"fork_velocity": "probe"}, "loss": {"old_logp": "detached"}}, "it must be fresh"),
])  # fmt: skip
def test_what_cannot_work_together_is_refused(selection: dict, other: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(toy_config(selection={"candidates": 3} | selection, **other))


def test_prompts_that_hardly_repeat_are_said_and_not_refused() -> None:
    """2 slots, 10 iterations: 20 groups."""
    config = toy_config(train={"slots": 2, "iterations": 10}, selection={"candidates": 3, "probe": "bots"})
    assert repeats_notice(config, 10) is None
    notice = repeats_notice(config, 11)
    assert notice is not None and "selection.probe = bots will observe 20 rewards of 11 prompts" in notice
