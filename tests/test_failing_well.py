"""What goes wrong during a run: one message, nothing lost, and a way on."""

import dataclasses
import shutil
from collections import namedtuple

import pytest
import torch
from toy import ToyModel, half_bright, toy_config, toy_trainer

from adagrpo.errors import InputError, RunError
from adagrpo.recipe.keys import EngineConfig
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder
from adagrpo.run.metrics import read_metrics


def started(tmp_path, trainer) -> Fit:
    run = RunFolder.fresh(tmp_path / "run")
    run.write_start(trainer.config, trainer.model.device, {})
    return Fit(trainer.config, trainer, run, ["a", "b"], say=lambda line: None)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda images, prompts: images.mean((2, 3)), r"rewards\.0 \(tiny\) returned \(2, 3\)"),
        (lambda images, prompts: 0.5, r"rewards\.0 \(tiny\) returned float"),
        (lambda images, prompts: 1 / 0, r"rewards\.0 \(tiny\) failed: ZeroDivisionError"),
    ],
)
def test_broken_rewards_are_found_before_the_first_iteration(reward, words: str, tmp_path) -> None:
    fit = started(tmp_path, toy_trainer(toy_config(), reward=reward))
    with pytest.raises(RunError, match=words):
        fit()
    assert fit.trainer.iterations_done == 0


def test_failed_scores_are_masked_and_counted() -> None:
    def flaky(images, prompts):
        scores = half_bright(images, prompts)
        return torch.where(torch.arange(len(scores)) % 4 == 1, torch.nan, scores)

    trainer = toy_trainer(toy_config(), reward=flaky)
    before = [p.detach().clone() for _, p in trainer.model.trainable()]
    metrics = read_metrics(trainer.iteration())[0]
    assert metrics["advantage/failed"] == 0.25
    assert all(torch.isfinite(p).all() for _, p in trainer.model.trainable())
    assert any(not torch.equal(a, b) for a, (_, b) in zip(before, trainer.model.trainable(), strict=True))


class HungryModel(ToyModel):
    """Out of memory beyond ``room`` rows, in the phase it is told."""

    def __init__(self, room: int, where: str) -> None:
        super().__init__()
        self.room, self.where = room, where

    def velocity(self, x, sigma, conditioning):
        if self.where == ("update" if torch.is_grad_enabled() else "sample") and x.shape[0] > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().velocity(x, sigma, conditioning)

    def decode(self, x):
        if self.where == "decode" and x.shape[0] > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().decode(x)


@pytest.mark.parametrize("where", ["sample", "decode"])
def test_out_of_memory_while_sampling_halves_the_batch_once(where: str, tmp_path) -> None:
    config = toy_config()  # largest batch: 2 slots x 2 forks x 4 members = 16 rows
    fit = started(tmp_path, toy_trainer(config, HungryModel(8, where)))
    roomy = toy_trainer(dataclasses.replace(config, engine=EngineConfig(max_rows=8)))
    fit()
    assert fit.trainer.executor.limit.max_rows == 8
    assert "engine.max_rows = 8" in (fit.run.path / "events.jsonl").read_text()
    for _ in range(config.train.iterations):
        roomy.iteration()
    for (_, a), (_, b) in zip(fit.trainer.model.trainable(), roomy.model.trainable(), strict=True):
        assert torch.equal(a, b)  # the interrupted draw left no trace


def test_out_of_memory_again_ends_with_the_remedy() -> None:
    trainer = toy_trainer(toy_config(), HungryModel(2, "sample"))
    trainer.notices.say = lambda line: None
    with pytest.raises(RunError, match=r"lower engine\.max_rows"):
        trainer.iteration()


def test_out_of_memory_in_a_reward_counts_as_sampling(tmp_path) -> None:
    def hungry(images, prompts):
        if len(images) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return half_bright(images, prompts)

    fit = started(tmp_path, toy_trainer(toy_config(), reward=hungry))
    fit()
    assert fit.trainer.executor.limit.max_rows == 8


def test_out_of_memory_in_the_update_names_the_remedy() -> None:
    trainer = toy_trainer(toy_config(), HungryModel(1, "update"))
    with pytest.raises(RunError, match=r"model\.gradient_checkpointing"):
        trainer.iteration()


def test_disk_too_small_is_refused_before_training(tmp_path, monkeypatch) -> None:
    fit = started(tmp_path, toy_trainer(toy_config()))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10, 10, 100))
    with pytest.raises(InputError, match=r"lower output\.keep_last"):
        fit()
    assert fit.trainer.iterations_done == 0


def test_full_disk_while_saving_keeps_the_earlier_checkpoint(tmp_path, monkeypatch) -> None:
    fit = started(tmp_path, toy_trainer(toy_config()))
    save = torch.save

    def full(state, file):
        if state.get("trainer", {}).get("iterations_done") == 4:
            file.write(b"part")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"No space left.*last complete checkpoint: .*step-000002"):
        fit()
    assert [p.name for p in fit.run.checkpoints.iterdir()] == ["step-000002"]


@pytest.mark.parametrize("flat", [0, 1])
@pytest.mark.parametrize("plan", ["fork", "trajectory"])
def test_groups_without_spread_are_refilled_from_new_prompts(plan: str, flat: int) -> None:
    """One slot of the first draw is flat; the refilled iteration trains on the second draw's prompt there."""
    calls = []

    def flat_at_first(images, prompts):
        calls.append(len(images))
        scores = half_bright(images, prompts)
        if len(calls) == 2:  # the rollout of the first draw; slot 0 has the first three candidates
            scores[prompts.text_index // 3 == flat] = 0.5
        return scores

    config = toy_config(
        rollout={"plan": plan},
        advantage={"equal_groups": "refill"},
        loss={"old_logp": "recompute"},
        selection={"candidates": 3},
    )
    trainer = toy_trainer(config, reward=flat_at_first)
    refill, refilled = trainer.refill, []
    trainer.refill = lambda draw: refilled.append(refill(draw)) or refilled[0]
    metrics = trainer.iteration()
    numbers, _ = read_metrics(metrics)
    assert trainer.draws == 2 and trainer.stream.position == 2 * 3 + 1 * 3
    assert numbers["advantage/equal_groups"] == 0 and numbers["policy/ratio_deviation"] <= 1e-6
    picked = metrics["selection/picked"]
    second_draw = picked.texts[6:]
    assert picked[flat] in second_draw and picked[1 - flat] not in second_draw
    assert (refilled[0].picks // 3).tolist() == [0, 1]
    assert second_draw[int(refilled[0].picks[flat]) % 3] == picked[flat]


def test_skipped_groups_leave_the_average() -> None:
    """With half of the groups flat, skipping doubles the gradient of the rest."""

    def half_flat(images, prompts):
        scores = half_bright(images, prompts)
        if len(scores) == 16:
            scores[:8] = 0.5
        return scores

    norms = {}
    for mode in ("keep", "skip"):
        config = toy_config(advantage={"equal_groups": mode})
        norms[mode] = read_metrics(toy_trainer(config, reward=half_flat).iteration())[0]["policy/grad_norm"]
    assert norms["skip"] == pytest.approx(2 * norms["keep"], rel=1e-4)


def test_merged_groups_keep_the_ratio_at_one_with_batch_dependent_rounding() -> None:
    calls = []

    def flat_at_first(images, prompts):
        calls.append(1)
        return (
            half_bright(images, prompts) if len(calls) != 2 else torch.cat([torch.zeros(8), half_bright(images, prompts)[8:]])
        )

    config = toy_config(advantage={"equal_groups": "refill"})
    metrics = read_metrics(toy_trainer(config, ToyModel(row_noise=1e-3), flat_at_first).iteration())[0]
    assert metrics["policy/ratio_deviation"] <= 1e-6
