"""One whole iteration of `sd35-medium-lora` at full size on the meta device, where every host sync raises."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adagrpo.build import assemble, build_model
from adagrpo.estimate.counting import OpCounter
from adagrpo.recipe.load import load_recipe
from adagrpo.rewards import build_reward

# By hand: 10 x 10 probes, 4 forks, 12 x (9 + 7 + 5 + 3) branches.
COUNTS = {"probe": 100, "prefix": 4, "rollout": 288, "update": 4}


@pytest.mark.proof
def test_one_iteration_under_guidance_syncs_nothing() -> None:
    config = load_recipe("sd35-medium-lora")
    model_config = dataclasses.replace(config.model, path="random:sd35-medium", device="meta", gradient_checkpointing=False)
    config = dataclasses.replace(config, model=model_config, engine=dataclasses.replace(config.engine, max_rows=0))
    trainer = assemble(config, build_model(config.model), [build_reward("brightness", {})], [f"p{i}" for i in range(20)])
    assert trainer.model.rows_per_image == 2
    with FlopCounterMode(display=False) as counter:
        metrics = trainer.iteration()
    assert all(value.device.type == "meta" for value in metrics.values() if isinstance(value, torch.Tensor))
    assert {phase: count.evaluations for phase, count in trainer.executor.counts.items()} == COUNTS
    print(f"{counter.get_total_flops() / 1e15:.3f} PFLOP")
    with OpCounter() as second:
        trainer.iteration()
    assert not second.transfers
