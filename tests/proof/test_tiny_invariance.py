"""Ten iterations of a real transformer in float64: batch limits and accumulation change neither picks, rewards nor weights.

Writes ``bench/results/cpu/tiny-invariance.json``.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from adagrpo.build import build_trainer
from adagrpo.recipe.load import load_recipe
from adagrpo.run.machine import describe_machine

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "cpu" / "tiny-invariance.json"


def run(slots: int, accumulation: int, max_rows: int) -> tuple[list, list, list]:
    config = load_recipe("tiny")
    sections = {
        "model": {"dtype": "fp64"},
        "rollout": {"storage": "fp64", "group_size": 4, "steps": 6},
        "selection": {"candidates": 4},
        "train": {"iterations": 10, "slots": slots, "accumulation": accumulation},
        "engine": {"max_rows": max_rows},
    }
    for section, changes in sections.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
    trainer, _ = build_trainer(config)
    picks, rewards = [], []
    draw = trainer.draw
    trainer.draw = lambda slots: (picks.append((d := draw(slots)).picks), rewards.append(d.rewards), d)[-1]
    for _ in range(10):
        trainer.iteration()
    return picks, rewards, [p.detach() for _, p in trainer.model.trainable()]


@pytest.mark.proof
def test_limits_and_accumulation_change_nothing() -> None:
    whole = run(8, 1, 0)
    record = {"case": "recipe tiny in float64, 8 slots, 10 iterations, against batches of at most 8 rows and 2 x 4 slots"}
    for name, other in (("max_rows_8", run(8, 1, 8)), ("accumulated_2x4", run(4, 2, 0))):
        assert all(torch.equal(a, b) for a, b in zip(whole[0], other[0], strict=True))
        rewards = max(float((a - b).abs().max()) for a, b in zip(whole[1], other[1], strict=True))
        weights = max(float((a - b).abs().max()) for a, b in zip(whole[2], other[2], strict=True))
        record[name] = {"picks_equal": True, "rewards_max_difference": rewards, "weights_max_difference": weights}
        assert rewards <= 1e-6 and weights <= 1e-6
    record["machine"] = describe_machine(torch.device("cpu"))
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
