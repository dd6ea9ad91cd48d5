"""How well each probe picks on recipe `tiny` with the policy held still, against the truth.

The truth is each prompt's mean reward over 16 noises. Regret: how much farther from the EMA the picked prompt's true mean is
than the best candidate's, in the EMA's standard deviation. Writes ``bench/results/cpu/probes-tiny.json``.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adagrpo.algorithm.sde import Stream
from adagrpo.build import build_trainer
from adagrpo.evaluation import evaluate
from adagrpo.planning import planned_evaluations
from adagrpo.recipe import load_recipe
from adagrpo.run.folder import describe_machine
from adagrpo.train import Trainer

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "cpu" / "probes-tiny.json"
DRAWS, WARM, NOISES = 60, 20, 16
CASES = {
    "full": {}, "short 4": {"probe": "short", "probe_steps": 4}, "short 2": {"probe": "short", "probe_steps": 2},
    "memory": {"probe": "memory"}, "random": {"strategy": "random"},
}  # fmt: skip


def trainer(**selection) -> Trainer:
    config = load_recipe("tiny")
    return build_trainer(dataclasses.replace(config, selection=dataclasses.replace(config.selection, **selection)))[0]


def true_means() -> tuple[Tensor, Tensor]:
    """Mean reward of every training prompt, and its standard error."""
    one = trainer()
    scores = evaluate(one.executor, one.score, one.stream.prompts, NOISES, Stream.FINAL_EVALUATION)[0].cpu()
    return scores.mean(1), scores.std(1) / math.sqrt(NOISES)


def without_filter() -> int:
    config = load_recipe("tiny")
    one = dataclasses.replace(config, selection=dataclasses.replace(config.selection, candidates=1))
    return sum(planned_evaluations(one).values())


def watched_numbers(one: Trainer) -> list[int]:
    """Receives the numbers of the prompts that are drawn."""
    taken: list[int] = []
    numbers = one.stream.take_numbers

    def keep(count: int) -> list[int]:
        taken.extend(numbers(count))
        return list(taken)

    one.stream.take_numbers = keep  # type: ignore[method-assign]
    return taken


def no_groups(anchors: Any, anchor_row: Any, picked: Any, picks: Tensor, conditioning: Any) -> tuple[Any, Tensor]:
    """In place of ``Trainer.rollout``: no samples, rewards of nothing."""
    return None, torch.full((1, len(picks), 1), torch.nan, dtype=torch.float64)


@pytest.mark.proof
def test_regret_to_the_truth_of_every_probe() -> None:
    truth, error = true_means()
    base, found = without_filter(), {}
    for name, selection in CASES.items():
        one = trainer(**selection)
        taken = watched_numbers(one)
        if selection.get("probe") != "memory":  # nothing else reads the groups
            one.rollout = no_groups  # type: ignore[method-assign]
        regrets: list[float] = []
        distances: list[float] = []
        for draw in range(DRAWS):
            taken.clear()
            picks = one.draw(one.slots).picks
            level, spread = float(one.capability.mean[0]), float(one.capability.std[0])
            away = (truth[torch.tensor(taken)].reshape(one.slots, -1) - level).abs() / spread
            if draw >= WARM:
                picked = away.gather(1, picks.unsqueeze(1)).squeeze(1)
                regrets += (picked - away.amin(1)).tolist()
                distances += picked.tolist()
        values = torch.tensor(regrets)
        found[name] = {
            "overhead_in_evaluations": round(sum(planned_evaluations(one.config).values()) / base - 1, 4),
            "true_regret_in_ema_std": round(float(values.mean()), 4),
            "standard_error": round(float(values.std() / len(values) ** 0.5), 4),
            "true_distance_in_ema_std": round(sum(distances) / len(distances), 4),
        }
        print(name, found[name], flush=True)
    record = {
        "case": f"recipe tiny, initial policy held still, {DRAWS} draws, first {WARM} left out; truth over {NOISES} noises",
        "standard_error_of_a_true_mean": round(float(error.mean()), 4),
        "probes": found,
        "machine": describe_machine(torch.device("cpu")),
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    assert found["full"]["true_regret_in_ema_std"] < found["random"]["true_regret_in_ema_std"]
    assert found["memory"]["overhead_in_evaluations"] <= 0.05
