"""The main job: `tiny` improves the held-out reward, its control with shuffled advantages does not.

Writes ``bench/results/cpu/tiny-training.json``.
"""

import json
import time
from pathlib import Path

import pytest
import torch

from adagrpo.cli import main
from adagrpo.run.machine import describe_machine

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "cpu" / "tiny-training.json"


def trained(folder: Path, *overrides: str) -> dict:
    started = time.perf_counter()
    assert main(["train", "tiny", "--out", str(folder), *overrides]) == 0
    result = json.loads((folder / "result.json").read_text())
    return {**{k: round(v, 4) for k, v in result.items()}, "seconds": round(time.perf_counter() - started)}


@pytest.mark.proof
def test_training_gains_and_shuffled_advantages_do_not(tmp_path) -> None:
    real = trained(tmp_path / "real")
    control = trained(tmp_path / "control", "--train.shuffle-advantages")
    record = {"case": "recipe tiny, and the same with advantages dealt to the wrong samples", "tiny": real, "control": control}
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record | {"machine": describe_machine(torch.device("cpu"))}, indent=1) + "\n", "utf-8")
    assert real["prompts"] >= 150 and real["noises"] >= 3
    assert real["gain"] >= 0.05 and real["low"] > 0
    assert control["gain"] < 0.02
    assert real["seconds"] <= 600
