"""One whole iteration of `flux1-dev` at full size on the meta device, where every host sync raises.

Writes ``bench/results/meta/flux1-dev-iteration.json``.
"""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adagrpo.build import build_model
from adagrpo.recipe import load_recipe
from adagrpo.rewards import build_reward
from adagrpo.train import Trainer

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "meta" / "flux1-dev-iteration.json"
# One image-forward at 512 x 512 and 256 text tokens (multiply-add = 2 FLOP), and the iteration's counts, worked out by
# hand from the architecture and the schedule: 10 x 16 probes, 4 forks, 12 x (15 + 13 + 11 + 9) branches.
TFLOP_PER_IMAGE = 17.7
COUNTS = {"probe": (160, 16), "prefix": (4, 1), "rollout": (576, 15), "update": (4, 1)}


@pytest.mark.proof
def test_one_iteration_syncs_nothing_and_costs_what_arithmetic_says() -> None:
    config = load_recipe("flux1-dev")
    model_config = dataclasses.replace(config.model, path="random:flux1-dev", device="meta", gradient_checkpointing=False)
    config = dataclasses.replace(config, model=model_config, engine=dataclasses.replace(config.engine, max_rows=0))
    trainer = Trainer(config, build_model(config.model), [build_reward("brightness", {})], [f"p{i}" for i in range(20)])
    parameters = sum(p.numel() for _, p in trainer.model.trainable())
    flops: dict[str, float] = {}
    velocity, started = trainer.executor.velocity, time.perf_counter()

    def counted(*args):
        with FlopCounterMode(display=False) as counter:
            v = velocity(*args)
        flops[args[-1]] = flops.get(args[-1], 0) + counter.get_total_flops()
        return v

    trainer.executor.velocity = counted
    metrics = trainer.iteration()
    assert all(value.device.type == "meta" for value in metrics.values() if isinstance(value, torch.Tensor))
    counts = {phase: (count.evaluations, count.calls) for phase, count in trainer.executor.counts.items()}
    assert counts == COUNTS
    per_image = {phase: flops[phase] / counts[phase][0] / 1e12 for phase in counts}
    for phase, tflop in per_image.items():
        assert tflop == pytest.approx(TFLOP_PER_IMAGE, rel=0.01), phase
    record = {
        "case": "one iteration of recipe flux1-dev on the meta device (random weights, no checkpointing, no chunks)",
        "torch": torch.__version__,
        "parameters": parameters,
        "evaluations_and_calls": counts,
        "tflop_per_image_forward": {phase: round(tflop, 3) for phase, tflop in per_image.items()},
        "pflop_no_grad": round(sum(flops[p] for p in ("probe", "prefix", "rollout")) / 1e15, 3),
        "reads_by_the_host": "none: each would raise on the meta device (copies to the device are not seen by it)",
        "seconds_on_this_machine": round(time.perf_counter() - started, 1),
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
