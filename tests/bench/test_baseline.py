"""The plain published loop and ours: the same picks, rewards and weights, iteration after iteration."""

import dataclasses

import pytest
import torch
from toy import PROMPTS, ToyModel, half_bright, recorded, toy_config, toy_trainer

from adagrpo.bench import baseline
from adagrpo.bench.baseline import PublishedLoop
from adagrpo.bench.options import Options
from adagrpo.bench.versus import different_work, measure_versus, plain_loop, versus_report
from adagrpo.build import build_trainer
from adagrpo.curriculum.picks import rows_of
from adagrpo.errors import InputError
from adagrpo.recipe.keys import RewardConfig
from adagrpo.recipe.load import load_recipe

PROBE = {"rollout": {"steps": 6, "sde_steps": (0, 2), "group_size": 4, "eta": 0.7, "fork_velocity": "probe"},
         "loss": {"old_logp": "detached"}, "train": {"slots": 2, "steps_per_iteration": 2}}  # fmt: skip


@pytest.fixture
def unrounded(monkeypatch) -> None:
    """The plain loop scores what it decoded, not its 8-bit picture: no last bit of a latent tips a level of 1/255."""
    monkeypatch.setattr(baseline, "to_pil", lambda image: image)
    monkeypatch.setattr(baseline, "from_pil", lambda image: image.unsqueeze(0))


def test_the_plain_loop_scores_8_bit_pictures() -> None:
    """Every level, off by a third of a step: what is scored is the level."""
    levels = torch.arange(192).reshape(1, 3, 8, 8) / 255
    model, scored = ToyModel(), []
    model.decode = lambda latents: levels + torch.tensor([-1 / 3, 1 / 3]).repeat(96).reshape(1, 3, 8, 8) / 255
    reward = lambda images, prompts: scored.append(images) or images.mean((1, 2, 3))  # noqa: E731
    loop = PublishedLoop(toy_config(), model, [reward], PROMPTS)
    found = loop.score(torch.zeros(2, 6, 8), ["a", "b"])
    assert len(scored) == 2 and all(torch.equal(images, levels) for images in scored)
    torch.testing.assert_close(found, levels.double().mean().expand(1, 2))


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize("sections", [{}, PROBE, {"loss": {"clip_range": 1e-4}, "advantage": {"weight": 0.0}}])
def test_same_picks_rewards_and_weights(sections) -> None:
    config = toy_config(**sections)
    ours = toy_trainer(config)
    loop = PublishedLoop(config, ToyModel(), [half_bright], PROMPTS)
    picks, rewards = recorded(ours)
    for iteration in range(3):
        ours.iteration()
        found, scored = loop.iteration()
        assert rows_of(found, config.selection.candidates).tolist() == picks[iteration].tolist()
        torch.testing.assert_close(scored, rewards[iteration], rtol=0, atol=1e-5)
        assert dict(loop.evaluations) == {phase: count.evaluations for phase, count in ours.executor.counts.items()}
    before = ToyModel().transformer.state_dict()
    for name, weight in ours.model.transformer.state_dict().items():
        other = loop.model.transformer.state_dict()[name]
        torch.testing.assert_close(other, weight, rtol=0, atol=2e-5)
        assert (weight - before[name]).abs().max() > 1e-3, "nothing was trained"


@pytest.mark.usefixtures("unrounded")
def test_same_on_tiny_flux_and_the_same_work() -> None:
    """By brightness, which is smooth; the tiny world's reward has thresholds."""
    config = load_recipe("bench-tiny")
    rollout = dataclasses.replace(config.rollout, steps=6, sde_steps=(0, 2, 3, 4), group_size=3)
    config = dataclasses.replace(config, rollout=rollout)
    bright = dataclasses.replace(config, rewards=(RewardConfig("brightness"),))
    ours, other = build_trainer(bright)[0], build_trainer(bright)[0]
    loop = plain_loop(bright, other)
    picks, rewards = recorded(ours)
    ours.iteration()
    found, scored = loop.iteration()
    assert rows_of(found, config.selection.candidates).tolist() == picks[0].tolist()
    torch.testing.assert_close(scored, rewards[0], rtol=0, atol=1e-5)
    record, problem = measure_versus(config, Options(rounds=1, out=None))  # type: ignore[arg-type]
    assert problem == "" and record.facts["same_work"] and record.facts["images"] == [22, 22]
    assert record.series["ours/evaluations"].values == record.series["plain/evaluations"].values
    assert "x as fast" in versus_report(record)[-1]


def test_other_work_is_told() -> None:
    assert different_work({"probe": 160}, {"probe": 160}) == ""
    assert "'probe': 16" in different_work({"probe": 160}, {"probe": 16})


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"rollout": {"plan": "trajectory"}, "loss": {"old_logp": "recompute"}}, "rollout.plan"),
        ({"selection": {"strategy": "random"}}, "selection.strategy"),
        ({"advantage": {"equal_groups": "skip"}}, "advantage.equal_groups"),
        ({"loss": {"old_logp": "recompute"}}, "loss.old_logp"),
    ],
)
def test_what_the_published_loop_has_not_is_refused(sections, key) -> None:
    with pytest.raises(InputError, match=key):
        PublishedLoop(toy_config(**sections), ToyModel(), [half_bright], PROMPTS)
