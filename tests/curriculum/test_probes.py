"""Probes that do not sample every candidate to the end: what they cost, what feeds the EMA, what a resumed run repeats."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from toy import PROMPTS, ToyModel, half_bright, recorded, run_out_of_memory_once, toy_config, toy_trainer

from adagrpo.algorithm.sde import Stream
from adagrpo.algorithm.selection import CapabilityState, closest_distance, select_prompt
from adagrpo.cli import main
from adagrpo.curriculum.base import selection_metrics
from adagrpo.curriculum.picks import nearest_in_slots, nearest_of_all, nearest_picks
from adagrpo.engine.plans import probe_plan
from adagrpo.errors import InputError
from adagrpo.estimate.counting import OpCounter
from adagrpo.forecast import planned_calls, planned_evaluations
from adagrpo.prompts.stream import PromptStream
from adagrpo.recipe.keys import RIVALS, Config, EngineConfig
from adagrpo.recipe.rules import check, repeats_notice
from adagrpo.run.metrics import read_metrics
from adagrpo.train import Trainer

OFFICIAL = {"steps": 16, "sde_steps": (0, 2, 4, 6), "group_size": 12}


def recipe(probe: str, slots: int = 2, **selection) -> Config:
    if probe.startswith("racing"):
        selection = {"race_steps": (1, 3)} | selection
    if probe.startswith("memory"):
        selection = {"allow_unseen": True} | selection
    config = toy_config(train={"slots": slots}, selection={"candidates": 3, "probe": probe} | selection)
    check(config)
    return config


def official(probe: str, **selection) -> Config:
    known = {"allow_unseen": True} if probe.startswith("memory") else {}
    config = toy_config(rollout=OFFICIAL, train={"slots": 1}, selection={"candidates": 10, "probe": probe} | known | selection)
    check(config)
    return config


# Without a filter an iteration of the official schedule is 16 + 4 + 576 + 4 = 600 evaluations.
@pytest.mark.parametrize(("probe", "selection", "probing", "overhead"), [
    ("full", {}, [10] * 16, 0.24), ("memory", {}, [2] * 16, 16 / 600),
    ("short", {"probe_steps": 4}, [10] * 4 + [2] * 16, 56 / 600), ("short", {"probe_steps": 1}, [10] + [2] * 16, 26 / 600),
    ("memory", {"finalists": 2}, [3] * 16, 32 / 600), ("memory+pool", {}, [2] * 16, 16 / 600),
    ("pool", {"candidates": 2}, [2] * 16, 16 / 600), ("short+pool", {"probe_steps": 1}, [10] + [2] * 16, 26 / 600),
    # 10 candidates to step 10, 5 and the uniform one to 12, 3 and it to 14, the pick and it to 16: 120 + 4 - 16 more
    ("racing", {}, [10] * 10 + [6] * 2 + [4] * 2 + [2] * 2, 108 / 600),
    ("racing+pool", {"race_steps": (12,)}, [10] * 12 + [2] * 4, 112 / 600),
    ("bots", {}, [2] * 16, 16 / 600), ("greso", {}, [2] * 16, 16 / 600), ("procurl", {}, [2] * 16, 16 / 600),
    ("dps", {}, [2] * 16, 16 / 600),
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
    score = trainer.score.rewards[0].reward

    def watched(images, prompts):
        seen.append((len(images), prompts.text_index.clone()))
        return score(images, prompts)

    trainer.score.rewards[0].reward = watched
    return seen


@pytest.mark.parametrize("probe", ["short", "memory", *RIVALS])
def test_one_uniform_candidate_of_each_slot_is_scored_and_feeds_the_ema(probe: str) -> None:
    trainer = toy_trainer(recipe(probe))
    seen, finals = scored_prompts(trainer), []
    for draw in range(6):
        seen.clear()
        trainer.iteration()
        images, places = seen[1 if probe == "short" else 0]
        assert images == 2 and [int(p) // 3 for p in places] == [0, 1]
        finals.append(trainer.knowledge.evidence.recent[-1, 0, draw % 3 * 2 : draw % 3 * 2 + 2])
    recent = torch.cat(finals[3:])
    assert torch.equal(trainer.knowledge.evidence.recent[-1, 0].sort().values, recent.sort().values)


@pytest.mark.parametrize("probe", ["short", "memory", "racing", "pool", "memory+pool", "racing+pool", *RIVALS])
def test_the_ema_is_fed_by_the_images_of_the_uniform_candidates(probe: str) -> None:
    """Their scores are those that the full probe gives the same candidates: full length, same noise, and not the picks'."""
    cheap, full = toy_trainer(recipe(probe), reward=half_bright), toy_trainer(recipe("full"), reward=half_bright)
    if probe == "pool":
        cheap.draw(), full.draw()
        torch.testing.assert_close(cheap.capability.mean, full.capability.mean)
        return
    prober, uniform, apart = cheap.curriculum.prober, [], 0
    chosen = cheap.probe_and_select
    cheap.probe_and_select = lambda c: uniform.append(prober.uniform(c.slots, c.per_slot, c.draw, step=1)) or chosen(c)
    for number in range(4):
        picks, truth = cheap.draw().picks, full.draw().scores
        first = number % 3 * 2
        rows = uniform[-1]
        torch.testing.assert_close(
            cheap.knowledge.evidence.recent[-1, 0, first : first + 2], truth[0].flatten()[rows], rtol=1e-5, atol=1e-6
        )
        apart += int((picks != rows).sum())
    assert apart >= 2


@pytest.mark.parametrize("probe", ["short", "memory", "racing", "memory+pool", *RIVALS])
def test_the_ema_is_that_of_full_length_uniform_scores(probe: str) -> None:
    """alpha .8 over the mean of the last three draws' scores, worked out from what the reward returned."""
    trainer = toy_trainer(recipe(probe))
    window, mean, var = [], None, None
    for draw in range(5):
        trainer.iteration()
        window.append(trainer.knowledge.evidence.recent[-1, 0, draw % 3 * 2 : draw % 3 * 2 + 2].clone())
        scores = torch.cat(window[-3:])
        batch = (scores.mean(), scores.var(correction=0))
        mean, var = batch if mean is None else (0.8 * mean + 0.2 * batch[0], 0.8 * var + 0.2 * batch[1])
        torch.testing.assert_close(trainer.capability.mean[0], mean)
        torch.testing.assert_close(trainer.capability.var[0], var)


def test_a_memory_without_evidence_draws_its_picks_anew() -> None:
    """Nothing is known at the first draw: by other noise than the uniform candidates'."""
    apart = 0
    for draw in range(8):
        trainer = toy_trainer(recipe("memory"))
        trainer.draws = draw
        first, second = (trainer.curriculum.prober.uniform(2, 3, draw, step) for step in (1, 2))
        picks = trainer.draw().picks
        assert torch.equal(picks, second)
        apart += int((picks != first).sum())
    assert apart >= 5  # of 16, two thirds expected


def test_uniform_candidates_are_uniform() -> None:
    trainer = toy_trainer(recipe("memory", slots=1))
    counts = torch.zeros(3)
    for draw in range(600):
        counts[int(trainer.curriculum.prober.uniform(1, 3, draw, step=1))] += 1
    assert ((counts - 200).abs() < 45).all()  # 4 standard deviations of a binomial


@pytest.mark.parametrize("keys", [
    {"probe": "memory"}, {"probe": "memory", "finalists": 2}, {"probe": "memory+pool"}, {"probe": "short", "probe_steps": 1},
    {"probe": "racing", "race_steps": (1, 3)}, {"probe": "racing", "race_steps": (2,)},
    {"probe": "racing+pool", "race_steps": (1, 2)}, {"probe": "bots"}, {"probe": "greso"},
])  # fmt: skip
def test_forks_start_from_the_picks_own_trajectory(keys: dict) -> None:
    """Only the pick's latents may be forked: its noise and prompt are those the full probe would have used."""
    cheap, full = toy_trainer(recipe(**keys)), toy_trainer(recipe("full"))
    for _ in range(3):
        a = cheap.draw()
        choice = full.probe_and_select
        full.probe_and_select = lambda c, picks=a.picks, choice=choice: dataclasses.replace(
            choice(c), picks=picks, anchor_row=picks
        )
        b = full.draw()
        full.probe_and_select = choice
        torch.testing.assert_close(a.samples.transitions.latent, b.samples.transitions.latent)
        torch.testing.assert_close(a.samples.final, b.samples.final)


def toy_race(pooled: bool = False, slots: int = 2) -> tuple[Trainer, list[list[float]]]:
    """A race of 8 candidates per slot whose previews are worth what their prompts are; the worths of each scored batch."""
    keys = {"probe": "racing+pool" if pooled else "racing", "race_steps": (1, 2, 3), "candidates": 8}
    seen: list[list[float]] = []

    def number(images: Tensor, prompts) -> Tensor:
        seen.append([worth(p) for p in prompts])
        return own_number(images, prompts)

    return toy_trainer(recipe(slots=slots, **keys), reward=number), seen


@pytest.mark.parametrize("pooled", [False, True])
def test_a_race_halves_the_field_by_distance_to_the_level_of_each_preview(pooled: bool) -> None:
    """First draw, by hand: the first level is the mean of all 16, the later ones that of the two uniform candidates."""
    trainer, seen = toy_race(pooled)
    draw = trainer.draw()
    everyone, level = seen[0], sum(seen[0]) / 16
    assert [len(batch) for batch in seen[:4]] == [16, 8 + 2, 4 + 2, 2]  # the last scores the uniform candidates' images

    def halves(numbers: list[float], level: float) -> list[float]:
        lanes = [numbers] if pooled else [numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]]
        return [n for lane in lanes for n in sorted(lane, key=lambda n: abs(n - level))[: len(lane) // 2]]

    racing, uniform = everyone, seen[1][-2:]
    for number, batch in enumerate((*seen[1:3], [everyone[int(p)] for p in draw.picks])):
        racing = halves(racing, level if number == 0 else sum(uniform) / 2)
        assert batch[: len(racing)] == racing and batch[len(racing) :] in ([], uniform)
    assert seen[3] == uniform
    assert [worth(draw.prompts.texts[int(p)]) for p in draw.picks] == racing


def test_later_levels_of_a_race_are_of_the_last_draws_uniform_candidates() -> None:
    """alpha .8 over the window of the last 8 draws, worked out from what was scored beside the survivors."""
    trainer, seen = toy_race()
    window, mean = [], None
    for _ in range(10):
        seen.clear()
        trainer.draw()
        window.append(seen[1][-2:])
        recent = [n for pair in window[-8:] for n in pair]
        batch = sum(recent) / len(recent)
        mean = batch if mean is None else 0.8 * mean + 0.2 * batch
        assert float(trainer.knowledge.evidence.levels[1].mean[0]) == pytest.approx(mean)


def test_a_races_previews_are_the_images_expected_from_the_full_trajectory() -> None:
    """x - sigma*v of step 2 on the trajectories of the full probe, decoded."""
    trainer, full = toy_trainer(recipe("racing", race_steps=(3,))), toy_trainer(recipe("full"))
    images: list[Tensor] = []
    trainer.score.rewards[0].reward = lambda pictures, prompts: images.append(pictures) or pictures.mean((1, 2, 3))
    trainer.draw()
    rows, model = torch.arange(6), full.model
    x = full.executor.initial_noise(rows, 0, Stream.PROBE_INIT)
    kept = full.executor.run(
        probe_plan(range(6), 4, keep=(2,)), x, model.encode([full.stream.prompts[i] for i in next_numbers(full, 6)]), 0, "probe"
    )
    sigma = full.executor.rollout_table.sigmas[2]
    torch.testing.assert_close(images[0], model.decode(kept.latents[2] - sigma * kept.velocities[2]))


def next_numbers(trainer: Trainer, count: int) -> list[int]:
    """Of the prompts that the next draw will take."""
    return PromptStream(trainer.stream.prompts, trainer.config.train.seed, trainer.stream.position).take_numbers(count)


def test_slots_whose_previews_all_fail_are_not_trained() -> None:
    trainer = toy_trainer(recipe("racing", race_steps=(1, 2)))
    fails = lambda images, prompts: torch.where(prompts.text_index < 3, torch.nan, images.mean((1, 2, 3)))  # noqa: E731
    trainer.score.rewards[0].reward = fails
    draw = trainer.draw()
    assert int(draw.picks[0]) == -1 and int(draw.picks[1]) >= 3
    assert draw.rewards[0, :2].isnan().all() and draw.rewards[0, 2:].isfinite().all()


def test_the_pool_takes_the_nearest_of_all_slots() -> None:
    trainer = toy_trainer(recipe("pool", slots=4, candidates=2), reward=own_number)
    for _ in range(3):
        draw = trainer.draw()
        level = float(trainer.capability.mean[0])
        numbers = torch.tensor([worth(p) for p in draw.prompts.texts], dtype=torch.float64)
        expected = sorted(range(8), key=lambda row: (abs(float(numbers[row]) - level), row))[:4]
        assert draw.picks.tolist() == expected
        torch.testing.assert_close(draw.rewards.mean((0, 2)).reshape(4, -1).mean(1), numbers[draw.picks])


@pytest.mark.parametrize("probe", ["memory", "memory+pool"])
def test_finalists_are_looked_at_and_remembered(probe: str) -> None:
    """Two of three candidates are scored in full length, and the posterior decides anew, by the conjugate formula.

    No prompt of the second draw was seen before: prior N(mu, .44 var), one look of noise .56 var.
    """
    trainer = toy_trainer(recipe(probe, finalists=2), reward=own_number)
    trainer.draw()
    before, level = trainer.knowledge.evidence.posterior.count.clone(), trainer.capability
    seen = scored_prompts(trainer)
    draw = trainer.draw()
    (looked, finalists), (_, uniform) = seen[:2]
    assert looked == 4 and len(uniform) == 2
    number = lambda row: worth(draw.prompts.texts[int(row)])  # noqa: E731
    mu, var = float(level.mean[0]), float(level.var[0])

    def distance(row: int) -> float:
        precision = 1 / (0.56 * var) + 1 / (0.44 * var)
        return (number(row) / (0.56 * var) / precision + mu / (0.44 * var) / precision - mu) ** 2 + 1 / precision

    if probe == "memory":
        assert [int(row) // 3 for row in finalists] == [0, 0, 1, 1]
        assert draw.picks.tolist() == [min(pair, key=distance) for pair in finalists.reshape(2, 2).tolist()]
    else:
        assert draw.picks.tolist() == sorted(finalists.tolist(), key=distance)[:2]
    again = sum(row in uniform.tolist() for row in finalists.tolist())
    gained = float(trainer.knowledge.evidence.posterior.count.sum() - before.sum())
    assert gained == pytest.approx(4 - again + 2 + 2 * 2)  # looks, a uniform image per slot, groups worth two
    posterior, known = trainer.knowledge.evidence.posterior, trainer.knowledge.evidence.posterior.count > 0
    estimate = posterior.total[0, known] / posterior.count[known]
    torch.testing.assert_close(estimate, torch.tensor([worth(p) for p in PROMPTS], dtype=torch.float64)[known])


def test_finalists_decide_in_several_draws() -> None:
    """The first of two is not always taken."""
    trainer, later = toy_trainer(recipe("memory", finalists=2), reward=own_number), 0
    seen = scored_prompts(trainer)
    for _ in range(8):
        seen.clear()
        draw = trainer.draw()
        later += sum(pick != first for pick, first in zip(draw.picks.tolist(), seen[0][1].tolist()[::2], strict=True))
    assert 3 <= later <= 13


def test_pooled_judges_pick_the_nearest_of_all_slots() -> None:
    short = toy_trainer(recipe("short+pool", slots=4), reward=own_number)
    memory = toy_trainer(recipe("memory+pool", slots=4), reward=own_number)
    doubled = 0
    for _ in range(12):  # the posterior must come to tell prompts apart
        draw = short.draw()
        away = (draw.scores[0].flatten() - short.knowledge.evidence.levels[0].mean[0]).abs()
        assert draw.picks.tolist() == away.sort(stable=True).indices[:4].tolist()
        doubled += len({int(row) // 3 for row in draw.picks}) < 4
        before, level = memory.knowledge.evidence, memory.capability
        places = torch.tensor(next_numbers(memory, 12))
        draw = memory.draw()
        if before.posterior.count.any():
            _, distance = before.judged(places.reshape(4, 3), level, memory.curriculum.prober.weights, memory.draws - 1)
            assert distance.flatten()[draw.picks].max() <= distance.flatten().sort().values[3] + 1e-8
    assert doubled  # a slot that gave two picks, as only a pool allows


def test_distance_of_several_rewards_by_hand() -> None:
    """Weights 1 and 3, EMAs 0 and 1, stds 1 and 2; the same pick as the per-slot rule's."""
    words = lambda *values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    state = CapabilityState(words(0.0, 1.0), words(1.0, 4.0), torch.tensor([1, 1]))
    scores = torch.tensor([[[0.5, -2.0, torch.nan]], [[1.0, 2.0, 1.0]]], dtype=torch.float64)
    weights = words(1.0, 3.0)
    assert closest_distance(scores, state, weights).tolist() == [[0.5, 2.0 + 3 * 0.5, torch.inf]]
    assert select_prompt(scores, state, "closest", weights).tolist() == [0]
    assert nearest_picks(closest_distance(scores, state, weights), nearest_of_all).tolist() == [0]
    failed = torch.tensor([[torch.inf, 1.0], [torch.inf, torch.inf]])
    assert nearest_picks(failed, nearest_of_all).tolist() == [1, -1] == nearest_picks(failed, nearest_in_slots).tolist()


@pytest.mark.parametrize("race_steps", [(1, 2), (3,)])
def test_a_race_without_forks_trains_on_its_winner(race_steps: tuple[int, ...]) -> None:
    """Plan trajectory: nobody finishes the pick's own trajectory, and the pick is still the race's."""
    config = toy_config(rollout={"plan": "trajectory"}, loss={"old_logp": "recompute"}, train={"slots": 2},
                        selection={"candidates": 4, "probe": "racing", "race_steps": race_steps})  # fmt: skip
    check(config)
    racing, forks = toy_trainer(config, reward=own_number), toy_trainer(
        recipe("racing", candidates=4, race_steps=race_steps), reward=own_number
    )  # fmt: skip
    for _ in range(4):
        assert torch.equal(racing.draw().picks, forks.draw().picks)
        assert torch.equal(racing.knowledge.evidence.levels[-1].mean, forks.knowledge.evidence.levels[-1].mean)


def test_the_logged_distance_leaves_failed_slots_out() -> None:
    trainer = toy_trainer(recipe("full"), reward=own_number)
    trainer.score.rewards[0].reward = lambda images, prompts: own_number(images, prompts).masked_fill(
        prompts.text_index >= 3, torch.nan
    )
    draw = trainer.draw()
    assert int(draw.picks[1]) == -1
    away = abs(float(draw.scores[0, 0, int(draw.picks[0])]) - float(trainer.capability.mean[0]))
    metrics = selection_metrics(draw.scores, draw.picks, trainer.knowledge)
    assert float(metrics["selection/distance"]) == pytest.approx(away)


@pytest.mark.parametrize("keys", [
    {"probe": "full"}, {"probe": "pool"}, {"probe": "short", "probe_steps": 2}, {"probe": "short+pool", "probe_steps": 2},
    {"probe": "racing", "race_steps": (1, 3)}, {"probe": "racing", "race_steps": (3,), "candidates": 2}, {"probe": "memory"},
    {"probe": "memory", "finalists": 2}, {"probe": "memory", "allow_unseen": True},
])  # fmt: skip
@pytest.mark.parametrize("plan", ["fork", "trajectory"])
def test_images_and_evaluations_are_the_planned_ones(keys: dict, plan: str) -> None:
    other = {"rollout": {"plan": "trajectory"}, "loss": {"old_logp": "recompute"}} if plan == "trajectory" else {}
    config = toy_config(train={"slots": 2}, selection={"candidates": 3} | keys, **other)
    check(config)
    trainer, images = toy_trainer(config), []
    decode = trainer.model.decode
    trainer.model.decode = lambda x: images.append(len(x)) or decode(x)
    assert read_metrics(trainer.iteration())[0]["policy/ratio_deviation"] <= 1e-6
    planned = planned_calls(config, unseen=True)
    assert sum(images) == sum(planned["decode"])
    counted = {phase: c.evaluations for phase, c in trainer.executor.counts.items()}
    assert counted == planned_evaluations(config, unseen=True)


def test_memory_learns_which_prompts_are_near() -> None:
    """A reward that is the prompt's own number: what was trained on is known, and the nearest of the known is picked."""
    trainer = toy_trainer(recipe("memory", slots=1), reward=own_number)
    for _ in range(40):
        trainer.iteration()
    posterior, level = trainer.knowledge.evidence.posterior, trainer.capability.mean[0]
    known = posterior.count > 0
    assert known.sum() > 20
    estimate = posterior.total[0, known] / posterior.count[known]
    torch.testing.assert_close(estimate, torch.tensor([worth(p) for p in PROMPTS], dtype=torch.float64)[known])
    late = [worth(read_metrics(trainer.iteration())[1][0]) for _ in range(10)]
    assert sum(abs(p - float(level)) for p in late) / 10 < 0.2  # a random pick is .25 away


def worth(prompt: str) -> float:
    """In (0, 1]: roots, of which no two are equally far from a mean of others, as whole numbers often are."""
    return math.sqrt((int(prompt.split()[1]) + 1) / 40)


def own_number(images: Tensor, prompts) -> Tensor:
    """What the prompt is worth, whatever the image."""
    return torch.tensor([worth(p) for p in prompts], dtype=torch.float64) + 0 * images.mean((1, 2, 3))


@pytest.mark.parametrize("probe", ["short", "memory", "racing", "pool", "racing+pool", "short+pool", "memory+pool", *RIVALS])
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
    trainer = toy_trainer(recipe("memory"))
    failed = run_out_of_memory_once(trainer)
    trainer.iteration()
    assert failed
    halved = EngineConfig(max_rows=trainer.executor.limit.max_rows)  # the same batches round alike on every processor
    calm = toy_trainer(dataclasses.replace(recipe("memory"), engine=halved))
    calm.iteration()
    assert torch.equal(trainer.knowledge.evidence.posterior.count, calm.knowledge.evidence.posterior.count)
    torch.testing.assert_close(
        trainer.knowledge.evidence.recent, calm.knowledge.evidence.recent, rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(trainer.capability.mean, calm.capability.mean)


@pytest.mark.parametrize("probe", ["short", "memory", "racing", "pool", "racing+pool", "short+pool", "memory+pool", *RIVALS])
def test_nothing_is_read_on_the_host(probe: str) -> None:
    """On meta tensors every read raises; what is sent to the device are the toy's embeddings and, where remembered, numbers."""
    trainer = toy_trainer(recipe(probe), ToyModel(device="meta"), lambda images, prompts: images.mean((1, 2, 3)))
    trainer.iteration()
    with OpCounter() as counter:
        trainer.iteration()
    assert counter.transfers.total() == (1 if probe == "pool" else 2)


@pytest.mark.parametrize(("selection", "other", "message"), [
    ({"probe": "memory", "candidates": 1}, {}, "it needs selection.candidates above 1"),
    ({"probe": "memory", "strategy": "hardest"}, {}, "selection.probe = memory knows closest only"),
    ({"probe": "short"}, {"advantage": {"equal_groups": "refill"}}, "equal_groups = refill: needs selection.probe = full"),
    ({"probe": "short", "half_life": 3.0}, {}, "selection.half_life = 3.0: has no effect here"),
    ({"probe_steps": 3}, {}, "selection.probe_steps = 3: has no effect here"),
    ({"probe": "racing", "race_steps": (2, 1)}, {}, "race_steps = .2, 1.: must rise within 1 … 5"),
    ({"probe": "racing"}, {}, "race_steps = .10, 12, 14.: must rise within 1 … 5"),
    ({"probe": "racing", "race_steps": (1, 2, 3)}, {}, "race_steps = .1, 2, 3.: 3 candidates can be halved 2 times"),
    ({"probe": "memory", "finalists": 4}, {}, "selection.finalists = 4: must be at most selection.candidates = 3"),
    ({"probe": "pool", "strategy": "medium"}, {}, "selection.probe = pool knows closest only"),
    ({"finalists": 2}, {}, "selection.finalists = 2: has no effect here"),
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
    for probe in ("full", "short", "racing", "memory", *RIVALS):
        trainer = toy_trainer(recipe(probe))
        trainer.iteration()
        with (
            pytest.raises(RuntimeError, match="phase reward inside phase select"),
            trainer.phase("select"),
            trainer.phase("reward"),
        ):
            pass
        trainer.iteration()


def test_nearest_rows_by_hand() -> None:
    distance = torch.tensor([[3.0, 1.0, 1.0, torch.inf], [0.5, 4.0, 2.0, 5.0]])
    assert nearest_in_slots(distance, 2).tolist() == [1, 2, 4, 6]
    assert nearest_of_all(distance, 1).tolist() == [4, 1]
    assert nearest_of_all(distance, 2).tolist() == [4, 1, 2, 6]


def test_a_memory_that_will_hardly_see_a_prompt_twice_says_so() -> None:
    """2 slots, 10 iterations: 40 observations, the pick's groups and a uniform image each; 60 with two finalists."""
    blind = {"candidates": 3, "probe": "memory", "allow_unseen": True}
    config = toy_config(train={"slots": 2, "iterations": 10}, selection=blind)
    assert repeats_notice(config, 20) is None
    notice = repeats_notice(config, 21)
    assert notice is not None and "observe 40 rewards of 21 prompts" in notice and "shorten data.prompts to 20" in notice
    assert repeats_notice(toy_config(train={"slots": 2, "iterations": 10}, selection=blind | {"finalists": 2}), 30) is None
    assert repeats_notice(toy_config(), 10**6) is None


def test_a_memory_that_mostly_sees_prompts_for_the_first_time_says_so() -> None:
    """2 slots of 3 candidates see 30 prompts in 5 iterations, half of 10; one more takes another iteration."""
    config = toy_config(train={"slots": 2, "iterations": 10}, selection={"candidates": 3, "probe": "memory"})
    assert repeats_notice(config, 30) is None
    notice = repeats_notice(config, 31)
    assert notice is not None and "every candidate in the first 6 of 10 iterations, until each of 31 prompts was one" in notice


@pytest.mark.parametrize("probe", ["memory", "memory+pool"])
def test_memory_looks_at_every_candidate_until_each_prompt_was_one(probe: str) -> None:
    """Picked of new prompts is who scores nearest to the level, in the first draw to the mean of all; draws of the full probe
    beside it have the same images."""
    config = recipe(probe, allow_unseen=False)
    memory, full = toy_trainer(config, reward=half_bright), toy_trainer(recipe("full"), reward=half_bright)
    new, known = len(PROMPTS) // 6, -(-len(PROMPTS) // 6)
    assert new >= 2
    counted = 0
    for draw in range(known + 1):
        level, truth = memory.capability.mean[0], full.draw().scores[0]
        picks = memory.draw().picks
        counted += sum(planned_calls(config, unseen=draw < known)["probe"])
        assert memory.executor.counts["probe"].evaluations == counted
        if draw < new:
            distance = (truth - (level if draw else truth.mean())).abs()
            rule = nearest_of_all if "+pool" in probe else nearest_in_slots
            assert picks.tolist() == rule(distance, 1).tolist()
            assert int((memory.knowledge.evidence.posterior.count > 0).sum()) == 6 * (draw + 1)


def test_recipe_fast_says_how_long_it_looks(tmp_path, capsys) -> None:
    """300 iterations show 10 candidates each."""
    (tmp_path / "held.txt").write_text("unseen\n")
    files = ["--data.prompts", str(tmp_path / "p.txt"), "--data.held-out", str(tmp_path / "held.txt")]
    command = ["train", "flux1-dev-fast", "--dry-run", "--model.device", "cpu", *files]
    usual, looks = "evaluations per iteration: probe 32,", "of the first {}, whose candidates are looked at: probe 176,"
    for prompts, new, told in ((300, 30, [usual]), (1501, 151, [usual, "first 151 of 300"]), (5000, 300, ["first 300 of 300"])):
        (tmp_path / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(prompts)))
        assert main([*command]) == 0
        out = capsys.readouterr().out
        assert all(line in out for line in (looks.format(new), *told))
        assert (usual in out) == (usual in told) and ("note: selection.probe" in out) == (len(told[-1]) < 20)
    assert main([*command, "--selection.allow-unseen"]) == 0
    out = capsys.readouterr().out
    assert usual in out and "looked at" not in out and "so pick almost blindly" in out
