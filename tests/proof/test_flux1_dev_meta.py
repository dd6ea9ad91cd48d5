"""One whole iteration of `flux1-dev` at full size on the meta device, where every host sync raises; its memory plan, its
operators, and the seconds a device would need at least.

Writes ``bench/results/meta/flux1-dev-iteration.json``.
"""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from adagrpo_kernels import launch_counts, reset_counts
from torch.utils.flop_counter import FlopCounterMode

from adagrpo.build import assemble, build_architecture, build_model
from adagrpo.estimate.counting import OpCounter
from adagrpo.estimate.rehearsal import fused_attention, rehearse
from adagrpo.estimate.roofline import H100, H200, TIERS
from adagrpo.forecast import iteration_prediction, planned_memory
from adagrpo.forward.backends import make_copy
from adagrpo.forward.forwards import CopyForward, PolicyForward
from adagrpo.models.flux import FluxModel
from adagrpo.recipe.derived import Derived
from adagrpo.recipe.load import load_recipe
from adagrpo.rewards import build_reward
from adagrpo.study.hosts import with_probe, without_adagrpo

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
    trainer = assemble(config, build_model(config.model), [build_reward("brightness", {})], [f"p{i}" for i in range(20)])
    parameters = sum(p.numel() for _, p in trainer.model.trainable())
    flops: dict[str, float] = {}
    velocity, started, current = trainer.model.velocity, time.perf_counter(), [""]

    def counted(*args):
        with FlopCounterMode(display=False) as counter:
            v = velocity(*args)
        flops[current[0]] = flops.get(current[0], 0) + counter.get_total_flops()
        return v

    trainer.model.velocity = counted
    trainer.phase.listener = lambda name: current.__setitem__(0, name)
    metrics = trainer.iteration()
    assert all(value.device.type == "meta" for value in metrics.values() if isinstance(value, torch.Tensor))
    counts = {phase: (count.evaluations, count.calls) for phase, count in trainer.executor.counts.items()}
    assert counts == COUNTS
    per_image = {phase: flops[phase] / counts[phase][0] / 1e12 for phase in counts}
    for phase, tflop in per_image.items():
        assert tflop == pytest.approx(TFLOP_PER_IMAGE, rel=0.01), phase
    trainer.model.velocity = velocity
    with OpCounter() as second:
        trainer.iteration()
    assert not second.transfers
    record = {
        "case": "one iteration of recipe flux1-dev on the meta device (random weights, no checkpointing, no chunks)",
        "torch": torch.__version__,
        "parameters": parameters,
        "evaluations_and_calls": counts,
        "tflop_per_image_forward": {phase: round(tflop, 3) for phase, tflop in per_image.items()},
        "pflop_no_grad": round(sum(flops[p] for p in ("probe", "prefix", "rollout")) / 1e15, 3),
        "reads_by_the_host": "none: each would raise on the meta device (copies to the device are counted below)",
        "copies_to_the_device_in_the_second_iteration": {"total": second.transfers.total(), **second.transfers},
        "seconds_on_this_machine": round(time.perf_counter() - started, 1),
    }
    write(record)


# Probes of one slot of ten candidates, by hand: evaluations and calls.
PROBES = {
    "full": (160, 16), "short-4": (40 + 32, 4 + 16), "racing": (100 + 12 + 8 + 4, 10 + 2 + 2 + 2), "pool-2": (32, 16),
    "memory": (32, 16), "memory-2": (48, 16), "memory+pool": (32, 16),
    "bots": (32, 16), "greso": (32, 16), "procurl": (32, 16), "dps": (32, 16),
}  # fmt: skip


@pytest.mark.proof
def test_every_probe_at_full_size_reads_nothing() -> None:
    """Whole iterations of flux1-dev-lora on the meta device; the overheads in seconds are predicted, not measured."""
    base = load_recipe("flux1-dev-lora")
    model_config = dataclasses.replace(base.model, path="random:flux1-dev", device="meta", gradient_checkpointing=False)
    base = dataclasses.replace(base, model=model_config, engine=dataclasses.replace(base.engine, max_rows=0))
    model = build_model(base.model)
    rehearsal = rehearse(build_architecture(load_recipe("flux1-dev-lora").model), "a prompt")
    assert not isinstance(rehearsal, str), rehearsal
    plain = iteration_prediction(without_adagrpo(base), rehearsal, H200)
    found = {}
    for name, expected in PROBES.items():
        config = with_probe(base, name)
        trainer = assemble(config, model, [build_reward("brightness", {})], [f"p{i}" for i in range(20)])
        trainer.iteration()
        counts = {phase: (count.evaluations, count.calls) for phase, count in trainer.executor.counts.items()}
        assert counts == {**COUNTS, "probe": expected}
        prediction = iteration_prediction(config, rehearsal, H200)
        found[name] = {
            "evaluations": expected[0],
            "overhead_in_evaluations": round((expected[0] - 16) / 600, 4),
            "predicted_overhead_in_seconds_h200": {t: round(prediction.total(t) / plain.total(t) - 1, 4) for t in TIERS},
        }
    print(json.dumps(found, indent=1))
    write({"probes_of_flux1_dev_lora": found})


@pytest.mark.proof
@pytest.mark.parametrize("recipe", ["flux1-dev", "flux1-dev-lora"])
def test_plan_and_prediction_at_the_settings_of_the_recipe(recipe: str) -> None:
    config, started = load_recipe(recipe), time.perf_counter()
    model = build_architecture(config.model)
    rehearsal = rehearse(model, "a prompt")
    assert not isinstance(rehearsal, str), rehearsal
    plan = planned_memory(config, model, rehearsal)
    planned = time.perf_counter() - started
    assert planned < 60  # about 10 s on an idle core
    predictions = {device.name: iteration_prediction(config, rehearsal, device) for device in (H100, H200)}
    with OpCounter() as forward:
        rehearsal.forward(10)
    print(f"\n{recipe}\n{plan.table()}\n")
    print(*(prediction.table() for prediction in predictions.values()), sep="\n\n")
    print(f"aten operators of an eager forward: {forward.ops.total()}, {forward.ops.most_common(8)}")
    assert forward.transfers.total() == 0
    operators = {"total": forward.ops.total(), **dict(forward.ops.most_common())}
    sizes = {entry.name: entry.bytes for entry in plan.entries if not entry.phase}
    assert sizes["text_encoder"] + sizes["text_encoder_2"] == pytest.approx(2 * 4.885e9, rel=1e-3)
    if recipe == "flux1-dev":  # 11.9 B weights: bf16, fp32 masters, two fp32 moments
        assert [sizes[name] / 11901408320 for name in ("transformer", "fp32 master weights", "optimizer moments")] == [2, 4, 8]
    for prediction in predictions.values():
        eager, step_by_step, ceiling, quantised = (prediction.total(tier) for tier in TIERS)
        assert quantised < ceiling < step_by_step and ceiling < eager
    rounded = lambda seconds: {tier: round(s, 3) for tier, s in seconds.items()}  # noqa: E731
    write(
        {
            f"plan_of_{recipe}": {
                "planning_seconds_on_this_machine": round(planned, 1),
                "memory": plan.as_dict(),
                "aten_operators_of_an_eager_forward_of_10_rows": operators,
                "predicted_seconds_not_measured": {
                    device: {phase.phase: rounded(phase.seconds) for phase in prediction.phases}
                    | {"sum": rounded({tier: prediction.total(tier) for tier in TIERS})}
                    for device, prediction in predictions.items()
                },
                "fp8_share_of_forward_flops": round(predictions[H100.name].fp8_share, 4),
                "assumptions": {
                    device.name: {
                        name: {"value": figure.value, "label": figure.label, "source": figure.source}
                        for name, figure in vars(device).items()
                        if name != "name"
                    }
                    for device in (H100, H200)
                },
            }
        }
    )


@pytest.mark.proof
@pytest.mark.parametrize("recipe", ["flux1-dev", "flux1-dev-lora"])
def test_operators_of_a_forward_by_each_backend(recipe: str) -> None:
    """aten operators (no views) and launches of our kernels, 10 rows; blocks compile without a break."""
    config = load_recipe(recipe)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path="random:flux1-dev", device="meta"))
    model = build_model(config.model)
    table = Derived(config).table.to(model.device, torch.float32)
    slot, index = torch.zeros(10, dtype=torch.int64, device="meta"), torch.zeros(10, dtype=torch.int64, device="meta")
    x = torch.empty(10, *model.latent_shape, dtype=torch.bfloat16, device="meta")
    conditioning = model.encode(["a prompt"])
    found: dict[str, dict[str, int]] = {}
    for name, forward in {
        "eager bf16": PolicyForward(model, table),
        "eager fp8": make_copy(model, table, "eager", "fp8", impl="triton"),
        "fused bf16": make_copy(model, table, "fused", None, impl="triton"),
        "fused fp8": make_copy(model, table, "fused", "fp8", impl="triton"),
    }.items():
        with torch.no_grad(), fused_attention():
            prepared = forward.prepare(conditioning)
            forward.velocity(x, index, prepared, slot)
            reset_counts()
            with OpCounter() as counter:
                forward.velocity(x, index, prepared, slot)
        launches = sum(launch_counts().values())
        found[name] = {"aten": counter.ops.total(), "our_kernels": launches, "sum": counter.ops.total() + launches}
    graphs, breaks = compiled_graphs(model)
    found["compile bf16"] = {"graphs": graphs, "breaks": breaks}
    print(f"\n{recipe}: {json.dumps(found, indent=1)}")
    write({f"operators_of_a_forward_of_10_rows_of_{recipe}": found})
    assert breaks == 0
    assert found["fused fp8"]["sum"] < found["fused bf16"]["sum"] + 400 < found["eager bf16"]["sum"]


def compiled_graphs(model: FluxModel) -> tuple[int, int]:
    """Graphs that torch.compile makes of the repeated blocks, traced on meta tensors, and breaks between them."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    table = Derived(load_recipe("flux1-dev")).table.to(model.device, torch.float32)
    copy = CopyForward(model, table, torch.bfloat16, compiled=True, compiler="eager")
    x = torch.empty(10, *model.latent_shape, dtype=torch.bfloat16, device="meta")
    zeros = torch.zeros(10, dtype=torch.int64, device="meta")
    with torch.no_grad():
        copy.velocity(x, zeros, copy.prepare(model.encode(["a prompt"])), zeros)
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def write(part: dict) -> None:
    """Add to the record, in place of what it says about the same."""
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    RECORD.write_text(json.dumps(before | part, indent=1) + "\n", "utf-8")
