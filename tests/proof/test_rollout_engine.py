"""Recipe `tiny` under the fused forward and under FP8: the picks of the library's forward, and its reward gain.

Each case writes its part of ``bench/results/cpu/rollout-engine-tiny.json``.
"""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from adagrpo.build import build_trainer
from adagrpo.cli import main
from adagrpo.engine.groups import Groups
from adagrpo.recipe.load import load_recipe
from adagrpo.run.machine import describe_machine
from adagrpo.train import Trainer

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "cpu" / "rollout-engine-tiny.json"
CASES = {"fused": {"forward": "fused"}, "fp8": {"forward": "fused", "precision": "fp8"}}
# Lower end of the eager run's gain in bench/results/cpu/tiny-training.json, rounded down.
REACHED = 0.06


def trainer(**engine) -> Trainer:
    config = load_recipe("tiny")
    return build_trainer(dataclasses.replace(config, engine=dataclasses.replace(config.engine, **engine)))[0]


def drawn(one: Trainer) -> Groups:
    """What the next iteration draws."""
    kept: list[Groups] = []
    draw = one.draw
    one.draw = lambda slots: kept.append(draw(slots)) or kept[-1]  # type: ignore[method-assign,func-returns-value]
    assert float(one.iteration()["policy/ratio_deviation"]) <= 1e-6
    del one.draw
    return kept[0]


def record(case: str, found: dict) -> None:
    whole = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {"case": "recipe tiny by other forwards than eager"}
    whole[case] = whole.get(case, {}) | found
    whole["machine"] = describe_machine(torch.device("cpu"))
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")


@pytest.mark.proof
@pytest.mark.parametrize("case", CASES)
def test_five_iterations_from_the_same_state(case: str) -> None:
    eager, other = trainer(forward="eager"), trainer(**CASES[case])
    same = slots = 0
    ranks = []
    for _ in range(5):
        other.load_state_dict(eager.state_dict())
        a, b = (drawn(one) for one in (eager, other))
        same += int((a.picks == b.picks).sum())
        slots += a.picks.numel()
        ranks.append(float(spearmanr(a.scores.flatten(), b.scores.flatten()).statistic))
    record(case, {"same_picks": f"{same} of {slots}", "probe_spearman": [round(r, 4) for r in ranks]})
    if case == "fused":
        assert same == slots and min(ranks) > 0.999
    else:
        assert min(ranks) > 0.8


@pytest.mark.proof
@pytest.mark.parametrize("case", CASES)
def test_the_reward_gain_of_the_eager_forward_is_reached(case: str, tmp_path: Path) -> None:
    started = time.perf_counter()
    keys = [part for key, value in CASES[case].items() for part in (f"--engine.{key}", value)]
    assert main(["train", "tiny", "--out", str(tmp_path / case), *keys]) == 0
    result = json.loads((tmp_path / case / "result.json").read_text("utf-8"))
    lines = [json.loads(line) for line in (tmp_path / case / "metrics.jsonl").read_text("utf-8").splitlines()]
    found = {name: round(value, 4) for name, value in result.items()}
    found["worst_ratio_deviation"] = max(line["policy/ratio_deviation"] for line in lines)
    record(case, {"training": found | {"seconds": round(time.perf_counter() - started)}})
    assert found["worst_ratio_deviation"] <= 1e-6
    assert result["gain"] >= REACHED and result["low"] > 0
