"""Rewards inside iterations: host rewards beside the sampling, groupwise ones with whole groups, what is told of each."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy import PROMPTS, ToyModel, half_bright, recorded, toy_config

from adagrpo.algorithm.sde import Stream
from adagrpo.assembly import require_groups
from adagrpo.build import assemble
from adagrpo.engine import scoring
from adagrpo.engine.scoring import labels
from adagrpo.errors import InputError
from adagrpo.evaluate.held_out import evaluate
from adagrpo.recipe.keys import RewardConfig
from adagrpo.rewards.holdings import Offloaded
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder
from adagrpo.run.metrics import read_metrics, reward_words

PLAIN = {"selection": {"candidates": 1}, "advantage": {"weight": 0.0}}


class Host:
    """Mean grey level of 8-bit images, in [0, 1]."""

    host = True

    def __call__(self, images: Tensor, prompts) -> Tensor:
        return images.float().mean((1, 2, 3)) / 255


class Ranks:
    """Place in the group by the sum of the first row."""

    groupwise = host = True

    def __init__(self) -> None:
        self.seen = []

    def __call__(self, images: Tensor, prompts) -> Tensor:
        self.seen.append((images.clone(), list(prompts), prompts.group_index.clone()))
        level, group = images[:, :, 0].float().sum((1, 2)), prompts.group_index
        return torch.stack([((level < value) & (group == g)).sum() for g, value in zip(group, level, strict=True)])


def test_a_host_reward_works_while_the_next_chunk_is_sampled() -> None:
    """It does not end before the whole rollout is sampled: a scorer that waited for it would wait for ever."""
    sampled = threading.Event()

    class Late(Host):
        def __call__(self, images: Tensor, prompts) -> Tensor:
            assert sampled.wait(60)
            return super().__call__(images, prompts)

    config = toy_config(rewards=(RewardConfig("late"), RewardConfig("half")), **PLAIN)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, max_rows=4))
    trainer = assemble(config, ToyModel(), [Late(), half_bright], PROMPTS)
    _, rewards = recorded(trainer)
    run = trainer.executor.run

    def told(*args, **kwargs):
        found = run(*args, **kwargs)
        if "rollout" in args:
            sampled.set()
        return found

    trainer.executor.run = told
    trainer.iteration()
    plain = assemble(dataclasses.replace(config, engine=toy_config().engine), ToyModel(), [Host(), half_bright], PROMPTS)
    _, unchunked = recorded(plain)
    plain.iteration()
    assert rewards[0].shape == (2, 4, 4) and rewards[0].isfinite().all()
    torch.testing.assert_close(rewards[0][1], unchunked[0][1])
    torch.testing.assert_close(rewards[0][0], unchunked[0][0], rtol=0, atol=2 / 255)  # a grey level may round otherwise


def test_images_waiting_for_a_slow_host_reward_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one chunk, the next is handed over when the one before is scored."""
    order = []

    class Slow(Host):
        def __call__(self, images: Tensor, prompts) -> Tensor:
            threading.Event().wait(0.02)
            order.append("scored")
            return super().__call__(images, prompts)

    monkeypatch.setattr(scoring, "MOST_WAITING", 1)
    config = toy_config(rewards=(RewardConfig("slow"),), **PLAIN)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, max_rows=4))
    trainer = assemble(config, ToyModel(), [Slow()], PROMPTS)
    placed = trainer.score.rewards[0]
    begun = placed.begun
    placed.begun = lambda images: (order.append("sent"), begun(images))[1]
    trainer.iteration()
    assert order == ["sent", "scored"] * 4


@pytest.mark.parametrize("max_rows", [0, 3])
def test_a_groupwise_reward_ranks_whole_groups_of_the_rollout(max_rows: int) -> None:
    """Two slots of two forks of four; the images are the rollout's, and the ranks as worked out from them."""
    config = toy_config(rewards=(RewardConfig("half"), RewardConfig("ranks")), **PLAIN)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, max_rows=max_rows))
    reward = Ranks()
    trainer = assemble(config, ToyModel(), [half_bright, reward], PROMPTS)
    groups = trainer.draw()
    ((images, prompts, index),) = reward.seen
    assert index.tolist() == [g for g in range(4) for _ in range(4)]
    assert prompts == [groups.prompts[slot] for slot in (0, 1) for _ in range(8)]
    drawn = trainer.model.decode(groups.samples.final) * 255
    assert (images.float() - drawn).abs().max() <= 0.5 + 1e-3
    level = images[:, :, 0].long().sum((1, 2)).view(4, 4).tolist()
    expected = [[float(sum(other < value for other in group)) for value in group] for group in level]
    assert groups.rewards[1].tolist() == expected
    torch.testing.assert_close(groups.rewards[0].flatten().float(), half_bright(drawn / 255, None))


def test_where_there_are_no_groups_a_groupwise_reward_has_no_value(tmp_path: Path) -> None:
    config = toy_config(rewards=(RewardConfig("ranks"), RewardConfig("half")), train={"iterations": 2, "slots": 2}, **PLAIN)
    reward = Ranks()
    trainer = assemble(config, ToyModel(), [reward, half_bright], PROMPTS)
    run = RunFolder.fresh(tmp_path / "run")
    run.write_start(config, trainer.model.device, {})
    Fit(config, trainer, run, ["a", "b", "c", "d"], say=lambda line: None)()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(reward.seen) == 2 and all(len(images) == 16 for images, _, _ in reward.seen)
    assert 0 <= records[0]["reward/train"] <= 3 and records[0]["reward/ranks/failed"] == 0
    # the held-out reward is that of the first reward that scores single images
    assert not [key for key in records[1] if key.startswith("reward/held_out_") and "ranks" in key]
    scores = evaluate(trainer.executor, trainer.score, ["a", "b", "c", "d"], 1, Stream.HELD_OUT)
    assert records[1]["reward/held_out"] == pytest.approx(float(scores[1].mean())) and scores[0].isnan().all()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({}, "selection.candidates = 1"),
        ({"selection": {"candidates": 1}}, "advantage.weight = 0"),
        ({"selection": {"candidates": 3}, "advantage": {"weight": 0.0}}, "rewards.0 = ranks: compares the images of a group"),
        (PLAIN, "add a reward that scores single images"),
    ],
)
def test_groupwise_rewards_are_refused_where_they_mean_nothing(sections: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        require_groups(toy_config(rewards=(RewardConfig("ranks"),), **sections), [Ranks])
    never = {**PLAIN, "evaluation": {"every": 0, "final_prompts": 0}}
    require_groups(toy_config(rewards=(RewardConfig("ranks"),), **never), [Ranks])
    require_groups(toy_config(), [half_bright])


def test_seconds_and_failures_of_each_reward_are_told() -> None:
    """Every third image fails by the first reward; the second says why. Two of one name have their numbers."""

    class Third:
        def __call__(self, images: Tensor, prompts) -> Tensor:
            return torch.where(torch.arange(len(images)) % 3 == 0, torch.nan, images.mean((1, 2, 3)))

    class Tells(Host):
        def __init__(self) -> None:
            self.failures = {"no target": 5}

        def __call__(self, images: Tensor, prompts) -> Tensor:
            self.failures = {"no target": self.failures["no target"] + 1, "timeout": 0}
            return super().__call__(images, prompts).masked_fill(torch.arange(len(images)) == 0, torch.inf)

    config = toy_config(rewards=(RewardConfig("x"), RewardConfig("y"), RewardConfig("x")), **PLAIN)
    trainer = assemble(config, ToyModel(), [Third(), Tells(), half_bright], PROMPTS)
    for _ in range(2):
        metrics, _ = read_metrics(trainer.iteration())
        told = {key: value for key, value in metrics.items() if "failed" in key and key.startswith("reward/")}
        assert told == {
            "reward/0_x/failed": pytest.approx(6 / 16), "reward/y/failed": pytest.approx(1 / 16), "reward/2_x/failed": 0.0,
            "reward/y/failed_no target": 1.0,
        }  # fmt: skip
        seconds = trainer.score.seconds()
        assert list(seconds) == [f"perf/reward/{name}/seconds" for name in ("0_x", "y", "2_x")]
        assert all(value > 0 for value in seconds.values())
    words = {"perf/reward/a/seconds": 1.25, "perf/reward/b/seconds": 0.5, "reward/b/failed": 0.125}
    assert reward_words(words) == "; a 1.25 s; b 0.50 s, 12.5% failed"
    assert reward_words({"perf/reward/a/seconds": 1.25, "reward/a/failed": 0.0}) == ""
    assert labels(["a", "b", "a"]) == ["0_a", "b", "2_a"]


def test_weights_move_once_per_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = []
    bring, leave = Offloaded.bring, Offloaded.leave
    monkeypatch.setattr(
        Offloaded, "bring", lambda self, device: (self.here == device or moves.append("in"), bring(self, device))
    )
    monkeypatch.setattr(Offloaded, "leave", lambda self: (moves.append("out"), leave(self)))
    config = toy_config(rewards=(RewardConfig("half", offload=True),))
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, max_rows=3))
    trainer = assemble(config, ToyModel(), [half_bright], PROMPTS)
    trainer.iteration()
    assert moves == ["in", "out"] * 2  # probe, rollout


def test_memory_that_runs_out_sends_offloaded_weights_away_before_the_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are there when it runs out, in the second chunk of the first try."""
    here, calls = [], []

    def reward(images: Tensor, prompts) -> Tensor:
        calls.append(len(images))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return half_bright(images, prompts)

    config = toy_config(rewards=(RewardConfig("half", offload=True),), **PLAIN)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, max_rows=4))
    trainer = assemble(config, ToyModel(), [reward], PROMPTS)
    placed, sampler = trainer.score.rewards[0], trainer.sampler

    def sampled(*args, **kwargs):
        here.append(placed._weights is not None and placed._weights.here is not None)
        return sampler(*args, **kwargs)

    sampled.shape, sampled.rows_per_slot = sampler.shape, sampler.rows_per_slot
    monkeypatch.setattr(trainer, "sampler", sampled)
    metrics, _ = read_metrics(trainer.iteration())
    assert here == [False, False] and metrics["reward/half/failed"] == 0 and trainer.executor.limit.max_rows == 2
