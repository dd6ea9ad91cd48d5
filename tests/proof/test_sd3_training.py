"""Whole runs of a small SD3: every plan, tuning and guidance is on policy, resumes bit for bit and holds what was planned.

Each case writes its part of ``bench/results/cpu/sd3-training.json``.
"""

import json
from pathlib import Path

import pytest
import torch
from small_sd3 import recipe, saved

from adagrpo.bench.measure import rows_seen
from adagrpo.build import build_trainer
from adagrpo.estimate.counting import PeakMemory
from adagrpo.estimate.memory import MemoryPlan
from adagrpo.forecast import planned_evaluations
from adagrpo.recipe.keys import Config
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder
from adagrpo.run.machine import describe_machine

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "cpu" / "sd3-training.json"
PLANS = {
    "fork": {},
    "window": {"rollout": {"plan": "window", "window_size": 2}, "loss": {"old_logp": "recompute"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("sd3") / "pipeline")


def started(config: Config, path: Path) -> Fit:
    trainer, held_out = build_trainer(config)
    run = RunFolder.fresh(path)
    run.write_start(config, trainer.model.device, {})
    return Fit(config, trainer, run, held_out, say=lambda line: None)


def weights(fit: Fit) -> list[torch.Tensor]:
    return [p.detach().clone() for _, p in fit.trainer.model.trainable()]


def record(case: str, found: dict) -> None:
    about = {"case": "three iterations of a small SD3 of random weights, and one resumed after the second"}
    whole = about | (json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}) | {case: found}
    whole["machine"] = describe_machine(torch.device("cpu"))
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")


@pytest.mark.proof
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_whole_runs(plan: str, tuning: str, guidance: float, folder: Path, tmp_path: Path) -> None:
    each = 2 if guidance > 1 else 1
    model, train = {"tuning": tuning, "guidance": guidance}, {"iterations": 3, "slots": 2}
    config = recipe(folder, model=model, train=train, output={"grid_every": 0, "checkpoint_every": 2}, **PLANS[plan])
    whole = started(config, tmp_path / "whole")
    whole()
    records = [json.loads(line) for line in whole.run.metrics_file.read_text().splitlines()]
    assert [r["iteration"] for r in records] == [1, 2, 3]
    assert all(r["policy/ratio_deviation"] <= 1e-6 for r in records)
    broken = started(config, tmp_path / "broken")
    iteration, calls = broken.trainer.iteration, []

    def dies_in_the_third():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return iteration()

    broken.trainer.iteration = dies_in_the_third
    with pytest.raises(KeyboardInterrupt):
        broken()
    plans: list[MemoryPlan] = []
    trainer, held_out = build_trainer(config, plans.append)
    resumed = Fit(config, trainer, RunFolder.existing(tmp_path / "broken", config), held_out, say=lambda line: None)
    resumed.resume(resumed.run.latest_checkpoint())
    trainer.executor.reset_counts()
    kept = ("fp32 master weights", "optimizer moments", "prompt cache")
    planned = plans[0].peak - plans[0].loaded - sum(e.bytes for e in plans[0].entries if e.name in kept)
    with PeakMemory("cpu") as memory:
        trainer.iteration()
    counted = {phase: count.evaluations for phase, count in trainer.executor.counts.items()}
    same = all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    found = {
        "ratio_deviation": max(r["policy/ratio_deviation"] for r in records),
        "resumed_bitwise": same,
        "evaluations": {"planned": planned_evaluations(config), "counted": counted},
        "rows_of_the_transformer": {"planned": each * sum(counted.values()), "counted": rows_seen(trainer)},
        "bytes": {"planned": planned, "counted": memory.peak},
    }
    record(f"{plan}, {tuning}, guidance {guidance:g}", found)
    assert same and memory.peak == pytest.approx(planned, rel=0.1)
    for kind in ("evaluations", "rows_of_the_transformer"):
        assert found[kind]["planned"] == found[kind]["counted"]
