"""One whole iteration of `sd35-medium-lora` at full size on the meta device, where every host sync raises.

Writes ``bench/results/meta/sd35-medium-iteration.json``.
"""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adagrpo.build import assemble, build_model
from adagrpo.estimate.counting import OpCounter
from adagrpo.recipe.load import load_recipe
from adagrpo.rewards import build_reward

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "meta" / "sd35-medium-iteration.json"
# By hand: 10 x 10 probes, 4 forks, 12 x (9 + 7 + 5 + 3) branches.
COUNTS = {"probe": 100, "prefix": 4, "rollout": 288, "update": 4}


def tflop_per_image(size: int, text: int, rank: int) -> float:
    """Of a forward under classifier-free guidance, by hand from the architecture (multiply-add = 2 FLOP).

    A block of width D has 12 D x D products for a token of either stream (q, k, v, out and a feed-forward of 4 D), the first 13
    a second attention of the picture alone (4 more), the last one only q, k and v of the text. Modulations are products of one
    token. Each of 8 adapters (7 in the last block) takes 2 D x rank.
    """
    d, blocks, second, image = 1536, 24, 13, (size // 16) ** 2
    square, adapter = d * d, 2 * d * rank
    products = image * ((12 * blocks + 4 * second) * square + 4 * blocks * adapter)
    products += text * ((12 * (blocks - 1) + 3) * square + (4 * (blocks - 1) + 3) * adapter)
    products += (9 * second + 6 * (blocks - second) + 6 * (blocks - 1) + 2 + 2) * square
    products += text * 4096 * d + 2 * image * 64 * d + (256 + 2048 + 2 * d) * d
    attention = 2 * d * (blocks * (image + text) ** 2 + second * image**2)
    return 2 * 2 * (products + attention) / 1e12


@pytest.mark.proof
def test_one_iteration_under_guidance_syncs_nothing() -> None:
    config = load_recipe("sd35-medium-lora")
    m = dataclasses.replace(config.model, path="random:sd35-medium", device="meta", gradient_checkpointing=False)
    config = dataclasses.replace(config, model=m, engine=dataclasses.replace(config.engine, max_rows=0))
    trainer = assemble(config, build_model(config.model), [build_reward("brightness", {})], [f"p{i}" for i in range(20)])
    model = trainer.model
    assert model.rows_per_image == 2
    flops: dict[str, int] = {}
    velocity, started, current = model.velocity, time.perf_counter(), [""]

    def counted(*args):
        with FlopCounterMode(display=False) as counter:
            v = velocity(*args)
        flops[current[0]] = flops.get(current[0], 0) + counter.get_total_flops()
        return v

    model.velocity = counted
    trainer.phase.listener = lambda name: current.__setitem__(0, name)
    metrics = trainer.iteration()
    assert all(value.device.type == "meta" for value in metrics.values() if isinstance(value, torch.Tensor))
    counts = {phase: count.evaluations for phase, count in trainer.executor.counts.items()}
    assert counts == COUNTS
    by_hand = tflop_per_image(m.height, 77 + m.max_text_tokens, m.lora_rank)
    per_image = {phase: flops[phase] / counts[phase] / 1e12 for phase in counts}
    assert m.height == m.width
    for phase, tflop in per_image.items():
        assert tflop == pytest.approx(by_hand, rel=0.01), phase
    model.velocity = velocity
    with OpCounter() as second:
        trainer.iteration()
    assert not second.transfers
    trained = {name for name, _ in model.trainable()}
    record = {
        "case": "one iteration of recipe sd35-medium-lora on the meta device (random weights, no checkpointing, no chunks)",
        "torch": torch.__version__,
        "size": [m.height, m.width],
        "text_tokens": 77 + m.max_text_tokens,
        "guidance": m.guidance,
        "rows_per_image": model.rows_per_image,
        "parameters": {
            "transformer": sum(p.numel() for name, p in model.transformer.named_parameters() if name not in trained),
            "trained": sum(p.numel() for _, p in model.trainable()),
        },
        "evaluations": counts,
        "tflop_per_image_forward": {phase: round(tflop, 3) for phase, tflop in per_image.items()},
        "tflop_per_image_forward_by_hand": round(by_hand, 3),
        "pflop_no_grad": round(sum(flops[p] for p in ("probe", "prefix", "rollout")) / 1e15, 3),
        "reads_by_the_host": "none: each would raise on the meta device (copies to the device are counted below)",
        "copies_to_the_device_in_the_second_iteration": {"total": second.transfers.total(), **second.transfers},
        "seconds_on_this_machine": round(time.perf_counter() - started, 1),
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
