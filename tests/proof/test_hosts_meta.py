"""What `adagrpo plan` predicts of every host's recipe on one H200, at full size on the meta device.

Writes ``bench/results/meta/hosts.json``, which ``docs/hosts.md`` shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adagrpo.bench.hosts import PREDICTED, host_recipes
from adagrpo.build import build_architecture
from adagrpo.estimate.rehearsal import Rehearsal, rehearse
from adagrpo.estimate.roofline import H200
from adagrpo.forecast import iteration_prediction, planned_evaluations, planned_memory
from adagrpo.models.base import FlowModel
from adagrpo.recipe.load import load_recipe

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / PREDICTED


@pytest.mark.proof
def test_every_host_is_predicted() -> None:
    rehearsed: dict[str, tuple[FlowModel, Rehearsal]] = {}
    found = {}
    for name in [name + end for name in host_recipes() for end in ("", "-ada")]:
        config = load_recipe(name)
        key = repr(config.model)
        if key not in rehearsed:
            model = build_architecture(config.model)
            rehearsal = rehearse(model, "a prompt")
            assert not isinstance(rehearsal, str), rehearsal
            rehearsed[key] = model, rehearsal
        memory = planned_memory(config, *rehearsed[key])
        seconds = iteration_prediction(config, rehearsed[key][1], H200)
        assert not memory.unknown and memory.peak > 0
        assert 0 < seconds.total("bf16 ceiling") < seconds.total("eager bf16")
        found[name] = {
            "evaluations": planned_evaluations(config),
            "peak_gib": round(memory.peak / 2**30, 1),
            "peak_phase": memory.peak_phase,
            "eager_bf16_s": round(seconds.total("eager bf16"), 1),
            "bf16_ceiling_s": round(seconds.total("bf16 ceiling"), 1),
        }
    record = {
        "case": f"what is predicted of every host's recipe on one {H200.name}: not measured",
        "torch": torch.__version__,
        "recipes": found,
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
