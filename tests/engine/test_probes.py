"""Probes that do not sample every candidate to the end: what they cost, what feeds the EMA, what a resumed run repeats."""

import dataclasses

import pytest
import torch
from torch import Tensor
from toy import ToyModel, recorded, toy_config, toy_trainer

from adagrpo.config import Config
from adagrpo.engine.counting import OpCounter
from adagrpo.errors import InputError
from adagrpo.fit import read_metrics
from adagrpo.planning import planned_calls, planned_evaluations
from adagrpo.recipe import check
from adagrpo.train import Trainer

OFFICIAL = {"steps": 16, "sde_steps": (0, 2, 4, 6), "group_size": 12}


def recipe(probe: str, slots: int = 2, **selection) -> Config:
    config = toy_config(train={"slots": slots}, selection={"candidates": 3, "probe": probe} | selection)
    check(config)
    return config


def official(probe: str, **selection) -> Config:
    config = toy_config(rollout=OFFICIAL, train={"slots": 1}, selection={"candidates": 10, "probe": probe} | selection)
    check(config)
    return config


# Without a filter an iteration of the official schedule is 16 + 4 + 576 + 4 = 600 evaluations.
@pytest.mark.parametrize(("probe", "selection", "probing", "overhead"), [
    ("full", {}, [10] * 16, 0.24), ("memory", {}, [2] * 16, 16 / 600),
    ("short", {"probe_steps": 4}, [10] * 4 + [2] * 16, 56 / 600), ("short", {"probe_steps": 1}, [10] + [2] * 16, 26 / 600),
])  # fmt: skip
def test_overhead_of_the_official_schedule(probe: str, selection: dict, probing: list[int], overhead: float) -> None:
    config, model = official(probe, **selection), ToyModel()
    trainer = toy_trainer(config, model)
    for _ in range(2):
        model.calls.clear()
        assert read_metrics(trainer.iteration())[0]["policy/ratio_deviation"] <= 1e-6
    assert model.calls[: len(probing)] == probing == planned_calls(config)["probe"]
    counts = {phase: count.evaluations for phase, count in trainer.executor.counts.items()}
    assert counts == planned_evaluations(config)
    assert sum(counts.values()) / 600 - 1 == pytest.approx(overhead)


def scored_prompts(trainer: Trainer) -> list[tuple[int, Tensor]]:
    """Receives (images, prompts' places among the draw's candidates) of every call of the reward."""
    seen: list[tuple[int, Tensor]] = []
    score = trainer.score.rewards[0]

    def watched(images, prompts):
        seen.append((len(images), prompts.text_index.clone()))
        return score(images, prompts)

    trainer.score.rewards[0] = watched
    return seen


@pytest.mark.parametrize("probe", ["short", "memory"])
def test_one_uniform_candidate_of_each_slot_is_scored_and_feeds_the_ema(probe: str) -> None:
    trainer = toy_trainer(recipe(probe))
    seen, finals = scored_prompts(trainer), []
    for draw in range(6):
        seen.clear()
        trainer.iteration()
        images, places = seen[1 if probe == "short" else 0]
        assert images == 2 and [int(p) // 3 for p in places] == [0, 1]
        finals.append(trainer.filter.recent[0, draw % 3 * 2 : draw % 3 * 2 + 2])
    recent = torch.cat(finals[3:])
    assert torch.equal(trainer.filter.recent[0].sort().values, recent.sort().values)
    drawn = {int(p) % 3 for _, places in seen for p in places}
    assert drawn <= {0, 1, 2}


@pytest.mark.parametrize("probe", ["short", "memory"])
def test_the_ema_is_that_of_full_length_uniform_scores(probe: str) -> None:
    """alpha .8 over the mean of the last three draws' scores, worked out from what the reward returned."""
    trainer = toy_trainer(recipe(probe))
    window, mean, var = [], None, None
    finish = trainer.finish

    def watched(*args):
        result = finish(*args)
        window.append(trainer.filter.recent[0, trainer.draws % 3 * 2 : trainer.draws % 3 * 2 + 2].clone())
        return result

    trainer.finish = watched
    for _ in range(5):
        trainer.iteration()
        scores = torch.cat(window[-3:])
        batch = (scores.mean(), scores.var(correction=0))
        mean, var = batch if mean is None else (0.8 * mean + 0.2 * batch[0], 0.8 * var + 0.2 * batch[1])
        torch.testing.assert_close(trainer.capability.mean[0], mean)
        torch.testing.assert_close(trainer.capability.var[0], var)


def test_uniform_candidates_are_uniform() -> None:
    trainer = toy_trainer(recipe("memory", slots=1))
    counts = torch.zeros(3)
    for draw in range(600):
        trainer.draws = draw
        counts[int(trainer._uniform(torch.zeros(1, 3), step=1))] += 1
    assert ((counts - 200).abs() < 45).all()  # 4 standard deviations of a binomial


def test_forks_start_from_the_picks_own_trajectory() -> None:
    """Only the pick's latents may be forked: its noise and prompt are those the full probe would have used."""
    cheap, full = toy_trainer(recipe("memory")), toy_trainer(recipe("full"))
    picks: list[Tensor] = []
    nearest = cheap.pick_cheaply
    cheap.pick_cheaply = lambda *args: picks.append(nearest(*args)) or picks[-1]
    draws: dict[str, object] = {}
    for name, one in (("cheap", cheap), ("full", full)):
        update = one.update
        one.update = lambda draw, advantage, name=name, update=update: draws.setdefault(name, draw) and update(draw, advantage)
        if name == "full":
            one.select = lambda scores, slots: picks[0]
        one.iteration()
    a, b = (draws[name].samples for name in ("cheap", "full"))
    torch.testing.assert_close(a.transitions.latent, b.transitions.latent)
    torch.testing.assert_close(a.final, b.final)


def test_memory_learns_which_prompts_are_near() -> None:
    """A reward that is the prompt's own number: what was trained on is known, and the nearest of the known is picked."""
    trainer = toy_trainer(recipe("memory", slots=1), reward=own_number)
    for _ in range(40):
        trainer.iteration()
    posterior, level = trainer.filter.posterior, trainer.capability.mean[0]
    known = posterior.count > 0
    assert known.sum() > 20
    estimate = posterior.total[0, known] / posterior.count[known]
    torch.testing.assert_close(estimate, torch.arange(40, dtype=torch.float64)[known] / 40)
    late = [int(read_metrics(trainer.iteration())[1][0].split()[1]) / 40 for _ in range(10)]
    assert sum(abs(p - float(level)) for p in late) / 10 < 0.2  # a random pick is .25 away


def own_number(images: Tensor, prompts) -> Tensor:
    """The prompt's number over 40, whatever the image."""
    return torch.tensor([int(p.split()[1]) / 40 for p in prompts], dtype=torch.float64) + 0 * images.mean((1, 2, 3))


@pytest.mark.parametrize("probe", ["short", "memory"])
def test_a_resumed_run_picks_what_the_uninterrupted_one_does(probe: str) -> None:
    whole, first = toy_trainer(recipe(probe)), toy_trainer(recipe(probe))
    _, rewards = recorded(whole)
    for _ in range(5):
        whole.iteration()
    for _ in range(3):
        first.iteration()
    second = toy_trainer(recipe(probe))
    second.load_state_dict(first.state_dict())
    for (_, p), (_, q) in zip(first.model.trainable(), second.model.trainable(), strict=True):
        q.data.copy_(p)
    _, again = recorded(second)
    for _ in range(2):
        second.iteration()
    assert all(map(torch.equal, rewards[3:], again))


def test_a_draw_that_ran_out_of_memory_is_repeated_from_the_same_state() -> None:
    trainer, calm = toy_trainer(recipe("memory")), toy_trainer(recipe("memory"))
    rollout, failed = trainer.rollout, []

    def once(*args):
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError
        return rollout(*args)

    trainer.rollout, trainer.say = once, lambda message: None
    trainer.iteration(), calm.iteration()
    assert torch.equal(trainer.filter.posterior.count, calm.filter.posterior.count)
    torch.testing.assert_close(trainer.filter.recent, calm.filter.recent, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(trainer.capability.mean, calm.capability.mean)


@pytest.mark.parametrize("probe", ["short", "memory"])
def test_nothing_is_read_on_the_host(probe: str) -> None:
    """On meta tensors every read raises; what is sent to the device are the toy's embeddings and the prompts' numbers."""
    trainer = toy_trainer(recipe(probe), ToyModel(device="meta"), lambda images, prompts: images.mean((1, 2, 3)))
    trainer.iteration()
    with OpCounter() as counter:
        trainer.iteration()
    assert counter.transfers.total() == 2


@pytest.mark.parametrize(("selection", "other", "message"), [
    ({"probe": "memory", "candidates": 1}, {}, "it needs selection.candidates above 1"),
    ({"probe": "memory", "strategy": "hardest"}, {}, "selection.probe = memory knows closest only"),
    ({"probe": "short"}, {"advantage": {"equal_groups": "refill"}}, "equal_groups = refill: needs selection.probe = full"),
    ({"probe": "short", "half_life": 3.0}, {}, "selection.half_life = 3.0: has no effect here"),
    ({"probe_steps": 3}, {}, "selection.probe_steps = 3: has no effect here"),
    ({"probe": "memory", "noise_share": 1.0}, {}, "selection.noise_share = 1.0: must lie in"),
])  # fmt: skip
def test_what_cannot_work_together_is_refused(selection: dict, other: dict, message: str) -> None:
    config = toy_config(selection={"candidates": 3} | selection, **other)
    with pytest.raises(InputError, match=message):
        check(config)


def test_trajectories_take_cheap_probes_too() -> None:
    config = toy_config(
        rollout={"plan": "trajectory"}, loss={"old_logp": "recompute"}, selection={"candidates": 3, "probe": "memory"}
    )
    check(config)
    assert read_metrics(toy_trainer(dataclasses.replace(config)).iteration())[0]["policy/ratio_deviation"] <= 1e-6


def test_phases_that_nest_are_refused_and_no_probe_nests_them() -> None:
    for probe in ("full", "short", "memory"):
        trainer = toy_trainer(recipe(probe))
        trainer.iteration()
        with (
            pytest.raises(RuntimeError, match="phase reward inside phase select"),
            trainer.phase("select"),
            trainer.phase("reward"),
        ):
            pass
        trainer.iteration()
