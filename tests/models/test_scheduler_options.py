"""Every option of a base's scheduler: followed as its own pipeline does, or refused by name; a run belongs to its levels."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import small_sd3
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from stock_flux import recipe

from adagrpo.assembly import own_noise_levels
from adagrpo.build import build_model
from adagrpo.cli import main
from adagrpo.models.making import meta_policy
from adagrpo.models.policy import Settings
from adagrpo.models.registry import FLUX
from adagrpo.models.schedule import own_levels
from adagrpo.recipe.load import to_toml
from adagrpo.tiny import tiny_flux_path

STEPS = 3
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 40}
OPTIONS = {
    "fixed": {"shift": 2.5},
    "dynamic": DYNAMIC,
    "linear": DYNAMIC | {"time_shift_type": "linear"},
    "terminal": DYNAMIC | {"shift_terminal": 0.02},
    "karras": {"shift": 3.0, "use_karras_sigmas": True},
    "exponential": {"shift": 3.0, "use_exponential_sigmas": True},
    "beta": {"shift": 3.0, "use_beta_sigmas": True},
}


@pytest.fixture(scope="module")
def flux():
    """A policy, and what draws a picture of 32 x 48 pixels in so many steps by its stock pipeline."""
    pipeline = FluxPipeline.from_pretrained(tiny_flux_path(), torch_dtype=torch.float32)
    settings = Settings(torch.float32, torch.device("meta"), 32, 48)

    def drawn() -> None:
        pipeline("a red circle", height=32, width=48, num_inference_steps=STEPS, max_sequence_length=12, output_type="latent")

    return meta_policy(FLUX, str(tiny_flux_path()), settings), pipeline, drawn


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    folder = small_sd3.saved(tmp_path_factory.mktemp("sd3") / "pipeline")
    pipeline = small_sd3.small_pipeline()

    def drawn() -> None:
        sized = {"height": small_sd3.HEIGHT, "width": small_sd3.WIDTH, "num_inference_steps": STEPS}
        pipeline("a red circle", **sized, max_sequence_length=small_sd3.T5_TOKENS, output_type="latent")

    return small_sd3.loaded(folder), pipeline, drawn


@pytest.mark.parametrize("family", ["flux", "sd3"])
@pytest.mark.parametrize("option", OPTIONS)
def test_levels_are_those_that_the_stock_pipeline_was_at(option: str, family: str, request) -> None:
    model, pipeline, drawn = request.getfixturevalue(family)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**OPTIONS[option])
    drawn()
    model.scheduler = dict(pipeline.scheduler.config)
    found = own_levels(model, STEPS, 32, 48)
    torch.testing.assert_close(found, pipeline.scheduler.sigmas.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(1000 * found[:-1], pipeline.scheduler.timesteps.double(), atol=1e-3, rtol=0)


REFUSED = {
    "stochastic_sampling": (True, "its pipeline draws noise at every step, .* none; set it to false there, or name a number"),
    "invert_sigmas": (True, "its levels rise, .*; set it to false there"),
    "num_train_timesteps": (500, "timesteps here are 1000 times the noise level; set it to 1000 there"),
    "_class_name": ("UniPCMultistepScheduler", None),
}


@pytest.mark.parametrize("command", [["train", "--dry-run"], ["plan"]], ids=["dry run", "plan"])
def test_options_with_another_meaning_are_refused_before_weights_are_read(command: list[str], tmp_path, capsys) -> None:
    base, file = small_sd3.saved(tmp_path / "base"), tmp_path / "r.toml"
    own = dict(small_sd3.small_pipeline().scheduler.config)
    for weights in base.rglob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")  # headers are whole
    for option, (value, why) in REFUSED.items():
        edit(base, **(own | {option: value}))
        words = (
            f"{option} = {json.dumps(value)} in the model's scheduler_config.json: {why}" if why else f"{value} are not known"
        )
        file.write_text(to_toml(small_sd3.recipe(base, rollout={"shift": "model"})))
        capsys.readouterr()
        assert main([command[0], str(file), *command[1:]]) == 2
        assert re.search(rf'^adagrpo: rollout\.shift = "model": .*{words}', capsys.readouterr().err)
    file.write_text(to_toml(small_sd3.recipe(base, rollout={"shift": 3.0})))
    assert main([command[0], str(file), *command[1:]]) == 0


def edit(base: Path, **options) -> None:
    file = base / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def test_a_run_at_the_models_own_levels_does_not_go_on_at_others(tmp_path, capsys) -> None:
    base, file, run = shutil.copytree(tiny_flux_path(), tmp_path / "base"), tmp_path / "r.toml", tmp_path / "run"
    output = {"grid_every": 0, "checkpoint_every": 1}
    config = recipe(model={"path": str(base)}, train={"iterations": 1, "slots": 1}, rollout={"shift": "model"}, output=output)
    file.write_text(to_toml(config))
    assert main(["train", str(file), "--out", str(run)]) == 0
    edit(base, base_shift=0.7)  # which a fixed shift does not read
    assert main(["sample", str(run), "--prompt", "a red circle", "--out", str(tmp_path / "same")]) == 0
    edit(base, shift=2.0)
    longer = ["train", str(file), "--out", str(run), "--resume", "latest"]
    for command in (longer, ["export", str(run), str(tmp_path / "out")]):
        capsys.readouterr()
        assert main(command) == 2
        told = "noise levels of 32x32 in 4 steps: 1.000000 0.900000 0.750000 0.500000 0.000000 there, 1.000000 0.857143"
        assert told in capsys.readouterr().err
    number = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, shift=3.0))
    assert own_noise_levels(number, build_model(config.model)) == {}  # the base's scheduler is then of no matter
