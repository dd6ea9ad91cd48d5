"""The memory plan against bytes worked out by hand, and against what real iterations hold."""

import dataclasses
import json

import pytest
import torch
from toy import CHANNELS, LENGTH, ToyModel, half_bright, toy_config, toy_trainer

from adagrpo.build import build_trainer
from adagrpo.cli import main
from adagrpo.errors import InputError
from adagrpo.estimate.counting import PeakMemory
from adagrpo.estimate.memory import Entry, MemoryPlan, PeakMeter, checkpoint_bytes, free_bytes
from adagrpo.estimate.rehearsal import rehearse
from adagrpo.forecast import planned_calls, planned_memory, published_bytes
from adagrpo.recipe.keys import EngineConfig, RewardConfig
from adagrpo.recipe.load import load_recipe
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder

WEIGHTS = CHANNELS * 16 + 16 * CHANNELS + 16
GIB = 2**30


def toy_plan(dtype: torch.dtype = torch.float32, **sections) -> MemoryPlan:
    model = ToyModel(dtype)
    return planned_memory(toy_config(**sections), model, rehearse(model, "a"), [half_bright], 40, 4)


def sizes(plan: MemoryPlan) -> dict[str, int]:
    return {f"{entry.phase} {entry.name}".strip(): entry.bytes for entry in plan.entries}


def test_training_state_of_an_fp32_model() -> None:
    found = sizes(toy_plan())
    assert found["transformer"] == 4 * WEIGHTS and found["fp32 master weights"] == 0
    assert found["optimizer moments"] == 8 * WEIGHTS
    assert found["update gradients"] == found["optimizer gradients"] == 4 * WEIGHTS
    assert found["weight EMA"] == found["KL reference"] == 0


def test_training_state_of_a_bf16_model() -> None:
    found = sizes(toy_plan(torch.bfloat16, optimizer={"ema_decay": 0.9}, loss={"kl_weight": 0.1}))
    assert found["transformer"] == found["KL reference"] == 2 * WEIGHTS
    assert found["fp32 master weights"] == found["weight EMA"] == 4 * WEIGHTS
    assert found["optimizer moments"] == 8 * WEIGHTS
    assert found["update gradients"] == 2 * WEIGHTS and found["optimizer gradients"] == 4 * WEIGHTS


def test_micro_batches_keep_the_gradients_of_earlier_ones() -> None:
    found = sizes(toy_plan(torch.bfloat16, train={"slots": 1, "accumulation": 2}))
    assert found["update gradients"] == (2 + 4) * WEIGHTS


def test_the_device_is_not_looked_up_for_every_weight() -> None:
    """diffusers walks through all of its modules for it: of FLUX.1-dev that took half a minute."""

    class Watched(ToyModel):
        asked = 0

        @property
        def device(self) -> torch.device:
            Watched.asked += 1
            return torch.device("cpu")

        @device.setter
        def device(self, device: torch.device) -> None:
            """It stays where it is."""

    few, many = Watched(), Watched()
    many.transformer.more = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(50))
    asked = []
    for model in (few, many):
        Watched.asked = 0
        planned_memory(toy_config(), model, "not rehearsed", [half_bright], 40, 4)
        asked.append(Watched.asked)
    assert asked[0] == asked[1] > 0


def test_stored_latents_of_forks() -> None:
    """2 slots, 3 candidates, forks at 2 steps, 4 members, all in fp32."""
    latent = 4 * LENGTH * CHANNELS
    anchors = 6 * (1 + 2 * 2)  # final ones, and latents and velocities at both steps
    transitions = 4 * (1 + 1 + 4)  # latent, mean, successors
    assert sizes(toy_plan())["stored latents"] == latent * (anchors + transitions + 16)


def test_stored_latents_of_trajectories() -> None:
    plan = toy_plan(rollout={"plan": "trajectory"}, loss={"old_logp": "recompute"})
    whole = 4 * LENGTH * CHANNELS * (2 * 4 * 2 * (1 + 1 + 1) + 2 * 4)
    assert sizes(plan)["stored latents"] == whole
    of_sample = {"plan": "trajectory", "trained_share": 0.5, "trained_of": "sample"}
    of_prompt = {"plan": "trajectory", "step_per_prompt": True}
    for rollout in (of_sample, of_prompt):  # every stochastic step is stored before each sample's own are picked
        assert sizes(toy_plan(rollout=rollout, loss={"old_logp": "recompute"}))["stored latents"] == whole


def test_prompts() -> None:
    found = sizes(toy_plan())
    assert found["prompt cache"] == 0  # the toy keeps none
    assert found["prompts of the batch"] == (2 * 3 + 2) * 16 * 4


def test_calls_follow_max_rows() -> None:
    config = dataclasses.replace(toy_config(), engine=EngineConfig(max_rows=5))
    calls = planned_calls(config)
    assert calls["probe"] == [5] * 6 + [1] * 6 and calls["prefix"] == calls["update"] == [4]
    # Chunk after chunk. 8 of 16 branches enter after step 0, 8 after step 2: 5; then 3 that two join; then 5 and 1 late ones.
    assert calls["rollout"] == [5] * 5 + [3] * 2 + [5] * 3 + [5] * 3 + [1] * 3
    assert calls["decode"] == [5, 1, 5, 5, 5, 1]


def test_resident_peak_and_table() -> None:
    entries = (
        Entry("weights", 2 * GIB, "two", "", 2 * GIB),
        Entry("moments", 3 * GIB, "three", "", 0, "model.tuning = lora"),
        Entry("activations", 4 * GIB, "four", "rollout", 0, "engine.max_rows"),
        Entry("activations", 1 * GIB, "one", "update"),
        Entry("gradients", 5 * GIB, "five", "update"),
    )
    plan = MemoryPlan(entries, GIB // 2, 3)
    assert (plan.resident, plan.peak, plan.loaded) == (5 * GIB, 11 * GIB, 2 * GIB)
    assert plan.phases == {"rollout": 4 * GIB, "update": 6 * GIB} and plan.peak_phase == "update"
    table = plan.table()
    assert "11.00  in phase update" in table and "3 checkpoints of 0.50 GiB" in table
    assert plan.compare(12 * GIB) == "planned 11.00 GiB, peak 12.00 GiB (+9 %)"
    plan.check(9 * GIB, 2 * GIB)
    with pytest.raises(InputError, match=r"needs 9\.00 GiB more in phase update.*1\.00 GiB too little.*model\.tuning = lora"):
        plan.check(8 * GIB)
    with pytest.raises(InputError, match=r"3 checkpoints of 0\.50 GiB.*0\.50 GiB too little.*output\.keep_last"):
        plan.check(None, GIB)
    assert json.loads(json.dumps(plan.as_dict()))["peak_bytes"] == 11 * GIB


def test_a_model_that_cannot_be_rehearsed_is_planned_by_its_parameters() -> None:
    class Stubborn(ToyModel):
        def velocity(self, x, sigma, conditioning):
            if x.device.type == "meta":
                raise RuntimeError("CPU only")
            return super().velocity(x, sigma, conditioning)

    model = Stubborn()
    plan = planned_memory(toy_config(), model, rehearse(model, "a"), [half_bright], 40, 4)
    assert "activations: not known for this model (RuntimeError: CPU only)" in plan.table()
    assert plan.peak == plan.resident + 4 * WEIGHTS and not any(e.name == "activations" for e in plan.entries)


def test_checkpoints_are_as_large_as_planned(tmp_path) -> None:
    trainer = toy_trainer(toy_config(output={"checkpoint_every": 2, "keep_last": 1}))
    run = RunFolder.fresh(tmp_path / "run")
    run.write_start(trainer.config, trainer.model.device, {})
    plan = planned_memory(
        trainer.config, trainer.model, rehearse(trainer.model, "a"), [placed.reward for placed in trainer.score.rewards], 40, 4
    )
    lines: list[str] = []
    Fit(trainer.config, trainer, run, ["a", "b", "c", "d"], lines.append, plan)()
    assert plan.checkpoint == checkpoint_bytes(trainer.optimizer.parameters, False) == 16 * WEIGHTS
    (written,) = run.checkpoints.glob("step-*")
    on_disk = sum(f.stat().st_size for f in written.rglob("*") if f.is_file())
    assert plan.checkpoint < on_disk < plan.checkpoint + 2**15  # names and metadata of a model of 272 weights
    record = run.read_json("memory.json")
    assert record["plan"]["peak_bytes"] == plan.peak and record["measured"]["process_peak_bytes"] > 0
    assert "Python and libraries included" in record["comparison"] and record["comparison"] in lines
    assert any(line.startswith("memory plan: ") for line in lines)


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": "bf16"}, {"dtype": "bf16", "tuning": "lora", "gradient_checkpointing": True}], ids=str
)
def test_a_real_iteration_holds_what_was_planned(changes: dict) -> None:
    """The second iteration of a smaller `tiny`, every tensor of its operators seen, on a CPU."""
    config = load_recipe("tiny")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **changes),
        train=dataclasses.replace(config.train, slots=2),
        rollout=dataclasses.replace(config.rollout, steps=3, sde_steps=(0, 1)),
        evaluation=dataclasses.replace(config.evaluation, every=0, final_prompts=0),
        output=dataclasses.replace(config.output, grid_every=0),
    )
    plans: list[MemoryPlan] = []
    trainer, _ = build_trainer(config, plans.append)
    (plan,) = plans
    trainer.iteration()  # moments exist from here on, and are not seen below
    kept = ("fp32 master weights", "optimizer moments", "prompt cache")
    planned = plan.peak - plan.loaded - sum(e.bytes for e in plan.entries if e.name in kept)
    with PeakMemory("cpu") as memory:
        trainer.iteration()
    assert memory.peak == pytest.approx(planned, rel=0.1)


def test_the_host_is_checked_too(monkeypatch) -> None:
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
    assert free_bytes(torch.device("meta")) is None
    monkeypatch.setattr("adagrpo.build.free_bytes", lambda device: 1000)
    with pytest.raises(InputError, match=r"cpu has 0\.00 MiB free"):
        build_trainer(load_recipe("tiny"), lambda plan: None)


def test_the_meter_sees_the_process_grow() -> None:
    meter, plan = PeakMeter(torch.device("cpu")), toy_plan()
    block = torch.ones(2**26)  # 256 MiB
    measured, line = meter.report(plan)
    assert measured["process_peak_bytes"] > block.numel() * 4
    assert "the process peaked at" in line


@pytest.mark.parametrize(("name", "kwargs", "size"), [
    ("pickscore", {}, 4 * 986_109_441), ("clip", {"dtype": "bf16"}, 2 * 427_616_513), ("tiny", {}, 0),
    ("clip", {"path": "elsewhere"}, None), ("clip", {"variant": "mixgrpo"}, None), ("mine:reward", {}, None),
])  # fmt: skip
def test_published_sizes_of_rewards(name: str, kwargs: dict, size: int | None) -> None:
    assert published_bytes(name, kwargs) == size


def test_published_sizes_are_those_of_the_architectures() -> None:
    from transformers import CLIPConfig, CLIPModel

    large = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "patch_size": 14,
    }
    huge = {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
        "patch_size": 14,
    }
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    wide = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    for name, vision, text in (("clip", large, base), ("pickscore", huge, wide)):
        with torch.device("meta"):
            model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=text["hidden_size"]))
        assert sum(p.numel() for p in model.parameters()) * 4 == published_bytes(name, {})


def test_plan_command(capsys, tmp_path) -> None:
    assert main(["plan", "tiny", "--train.slots", "2"]) == 0
    out = capsys.readouterr().out
    assert "predicted, not measured" in out and "H100 80 GB: fits" in out and "optimizer moments" in out
    assert main(["plan", "flux1-dev-lora", "--model.path", "someone/else"]) == 2
    assert "its architecture is not known here" in capsys.readouterr().err
    assert main(["plan", "tinny"]) == 2


def test_several_rewards_are_all_in_the_plan() -> None:
    model, linear = ToyModel(), torch.nn.Linear(10, 10)
    config = dataclasses.replace(toy_config(), rewards=(RewardConfig("a"), RewardConfig("b")))

    class Judge:
        def __init__(self) -> None:
            self.model = linear

    found = sizes(planned_memory(config, model, rehearse(model, "a"), [half_bright, Judge()], 40, 4))
    assert found["reward a"] == 0 and found["reward b"] == 4 * 110
