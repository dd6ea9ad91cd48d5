"""What leaves the house means the same outside: stock diffusers, told what `adagrpo export` prints, draws our pictures."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adagrpo.algorithm.sde import Stream, sigma_schedule
from adagrpo.build import build_model, build_trainer
from adagrpo.cli import main
from adagrpo.errors import InputError, RunError
from adagrpo.models.flux import FluxModel
from adagrpo.recipe.load import load_recipe
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder
from adagrpo.tiny import tiny_flux_path

PROMPTS = ["a red circle", "two blue squares"]
LORA = "pytorch_lora_weights.safetensors"
# Options of a base folder's scheduler that each change the noise levels or the step.
OTHERS = {
    "use_dynamic_shifting": True,
    "use_karras_sigmas": True,
    "shift_terminal": 0.1,
    "stochastic_sampling": True,
    "shift": 7.0,
}
CASES = {
    "full": {},
    "full, average": {"optimizer": {"ema_decay": 0.9}},
    "full, own levels": {"rollout": {"shift": "model"}},
    "lora": {"model": {"lora_rank": 4, "lora_alpha": 12.0}},
    "lora, own levels": {"rollout": {"shift": "model"}},
    "lora, average": {"model": {"lora_rank": 8, "lora_alpha": 16.0}, "optimizer": {"ema_decay": 0.9}},
}


def base_folder(folder: Path, case: str = "") -> Path:
    """A pipeline whose scheduler samples in its own way, at a path that a printed call must quote."""
    base = shutil.copytree(tiny_flux_path(), folder / "a 'base'")
    file = base / "scheduler" / "scheduler_config.json"
    others = OTHERS | {"stochastic_sampling": not case.endswith("own levels")}
    file.write_text(json.dumps(json.loads(file.read_text()) | others))
    return base


def recipe(base: Path, case: str):
    """`tiny`, cut down to two quick iterations from this base."""
    lora = case.startswith("lora")
    sections = {
        "train": {"iterations": 2, "slots": 2},
        "model": {"path": str(base), "tuning": "lora" if lora else "full", "guidance": 2.25},
        "rollout": {"steps": 4, "sde_steps": (0, 1), "group_size": 3, "shift": 1.7},
        "selection": {"candidates": 2},
        "optimizer": {"lr": 3e-2 if lora else 1e-3},
        "evaluation": {"every": 0, "final_prompts": 0},
        "output": {"grid_every": 0, "checkpoint_every": 0},
    }
    config = load_recipe("tiny")
    for section, changes in sections.items():
        changes = changes | CASES[case].get(section, {})
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
    return config


def trained_run(config, folder: Path) -> Fit:
    run = RunFolder.fresh(folder)
    trainer, held_out = build_trainer(config)
    run.write_start(config, trainer.model.device, {})
    fit = Fit(config, trainer, run, held_out, say=lambda line: None)
    fit()
    return fit


def latents_of(trainer) -> torch.Tensor:
    from adagrpo.engine.plans import probe_plan

    plan = probe_plan(range(len(PROMPTS)), trainer.executor.num_steps)
    return trainer.executor.initial_noise(plan.noise_row, 0, Stream.SAMPLE)


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]).astype(int)


def as_printed(text: str, latents: torch.Tensor) -> tuple[np.ndarray, dict]:
    """Pictures of the printed program, its prompt and noise apart, and its variables."""
    text = text.replace("'a lighthouse in a storm', ", "PROMPTS, latents=LATENTS, ").replace(".images[0]", ".images")
    scope = {"PROMPTS": PROMPTS, "LATENTS": latents}
    exec(text, scope)
    return np.stack([np.asarray(image) for image in scope["image"]]).astype(int), scope


@pytest.mark.parametrize("case", CASES)
def test_stock_diffusers_draws_our_pictures_by_the_printed_program(case: str, tmp_path, capsys) -> None:
    config = recipe(base_folder(tmp_path, case), case)
    fit = trained_run(config, tmp_path / "run")
    out, latents = tmp_path / 'to "here"', latents_of(fit.trainer)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), str(out)]) == 0
    printed = capsys.readouterr().out
    found, scope = as_printed(printed, latents)
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main(["sample", str(tmp_path / "run"), *words, "--out", str(tmp_path / "png")]) == 0
    ours = pictures(tmp_path / "png")
    assert abs(ours - found).max() <= 1
    scheduler = scope["pipe"].scheduler
    if case.endswith("own levels"):
        base = json.loads((Path(config.model.path) / "scheduler" / "scheduler_config.json").read_text())
        assert {name: scheduler.config[name] for name in base} == base
        assert "EulerDiscreteScheduler" not in printed
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4), device="cpu")
        torch.testing.assert_close(scheduler.sigmas.double(), sigma_schedule(4, 1.7), atol=1e-6, rtol=0)
        assert not any(scheduler.config[name] for name in OTHERS if name != "shift")
    if case.startswith("lora"):  # what loaders make of it that ignore metadata: alpha is the rank
        bare = tmp_path / "bare"
        bare.mkdir()
        save_file(load_file(out / LORA), bare / LORA)
        found, _ = as_printed(printed.replace(str(out), str(bare)), latents)
        assert abs(ours - found).max() <= 1
    if case.endswith("average"):  # the training is visible, so the comparisons above can fail
        text = printed.replace("pipe.load_lora_weights", "# ").replace(repr(str(out)), repr(config.model.path))
        text = text.replace(
            "\nimage", f"\npipe.scheduler = type(pipe.scheduler).from_config({dict(scheduler.config)!r})\nimage"
        )
        untrained, _ = as_printed(text, latents)
        assert abs(ours - untrained).max() > 8


def test_a_rounding_that_diffusers_does_not_know_is_told(tmp_path, capsys) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        (tiny_flux_path().parents[1] / "recipe" / "shipped" / "tiny.toml")
        .read_text()
        .replace("[model]", "[model]\ntimestep = 'bf16'")
    )
    assert main(["export", str(recipe), str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "# trained with model.timestep = bf16" in text
    compile(text, "printed", "exec")


def lora_model(dtype: str = "fp32", rank: int = 4, alpha: float = 8.0) -> FluxModel:
    model = build_model(
        dataclasses.replace(load_recipe("tiny").model, tuning="lora", lora_rank=rank, lora_alpha=alpha, dtype=dtype)
    )
    generator = torch.Generator().manual_seed(3)
    for _, p in model.trainable():
        p.data = torch.randn(p.shape, generator=generator).to(p.dtype)
    return model


@pytest.mark.parametrize(("dtype", "alpha", "exact"), [("fp32", 8.0, True), ("fp32", 12.0, False), ("bf16", 12.0, True)])
def test_adapters_come_back_as_they_were_saved(dtype: str, alpha: float, exact: bool, tmp_path) -> None:
    """An alpha of 8 at rank 4 is a power of two; bf16 survives a rounding of fp32."""
    saved, loaded = lora_model(dtype, 4, alpha), lora_model(dtype, 4, alpha)
    saved.save_portable(tmp_path)
    for _, p in loaded.trainable():
        p.data.zero_()
    loaded.load_portable(tmp_path)
    for (name, a), (_, b) in zip(saved.trainable(), loaded.trainable(), strict=True):
        assert torch.equal(a, b) if exact or "lora_A" in name else torch.allclose(a, b, rtol=2**-22, atol=0), name
    with safe_open(tmp_path / LORA, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
        assert settings["transformer.lora_alpha"] == settings["transformer.r"] == 4
        b = next(name for name in file.keys() if "lora_B" in name)  # noqa: SIM118
        assert file.get_tensor(b).dtype is torch.float32
        parameter = dict(saved.transformer.named_parameters())[b.removeprefix("transformer.").replace("_B.", "_B.default.")]
        assert torch.equal(file.get_tensor(b), parameter.detach().float() * (alpha / 4))


def test_files_of_earlier_versions_keep_their_alpha(tmp_path) -> None:
    """They hold B itself, and the alpha in the metadata."""
    from diffusers import FluxPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    saved, loaded = lora_model(alpha=12.0), lora_model(alpha=12.0)
    layers = get_peft_model_state_dict(saved.transformer)
    FluxPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, **_collate_lora_metadata({"transformer": saved.transformer})
    )
    for _, p in loaded.trainable():
        p.data.zero_()
    loaded.load_portable(tmp_path)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(saved.trainable(), loaded.trainable(), strict=True))


def test_damaged_or_foreign_weights_are_named(tmp_path) -> None:
    model = lora_model()
    model.save_portable(tmp_path)
    sound = load_file(tmp_path / LORA)
    name = next(name for name in sound if "lora_B" in name)
    plain = re.escape(name.removeprefix("transformer."))
    cases = {
        rf"e\.g\. {plain}": {k: t for k, t in sound.items() if k != name},
        r"e\.g\. extra": sound | {"transformer.extra": torch.zeros(1)},
        rf"{plain} is \[2, 2\]": sound | {name: torch.zeros(2, 2)},
        rf"{plain} holds values that are not finite": sound | {name: sound[name] * torch.inf},
    }
    for words, tensors in cases.items():
        save_file(tensors, tmp_path / LORA)
        with pytest.raises(InputError, match=words):
            model.load_portable(tmp_path)
    (tmp_path / LORA).write_bytes(b"{}")
    with pytest.raises(InputError, match=f"{LORA}: cannot be read"):
        model.load_portable(tmp_path)
    full = build_model(load_recipe("tiny").model)
    weights = full.transformer.state_dict()
    (tmp_path / "transformer").mkdir()
    for words, changed in ((r"proj_out\.bias is \[2\]", torch.zeros(2)), ("not finite", weights["proj_out.bias"] * torch.nan)):
        save_file({**weights, "proj_out.bias": changed}, tmp_path / "transformer" / "model.safetensors")
        with pytest.raises(InputError, match=words):
            full.load_portable(tmp_path)


def test_an_export_that_fails_leaves_nothing_and_says_why(tmp_path, monkeypatch, capsys) -> None:
    def disk_full(self, folder: Path, shift: float, steps: int) -> str:
        (folder / "transformer").mkdir()
        (folder / "model_index.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FluxModel, "export", disk_full)
    assert main(["export", "tiny", str(tmp_path / "out")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_folder_appears_whole_and_its_index_last(tmp_path, monkeypatch) -> None:
    from adagrpo.disk.whole import written_whole

    renamed, rename = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: renamed.append(self.name) or rename(self, target))
    (tmp_path / ".owner.draft" / "transformer").mkdir(parents=True)  # of an export that was killed
    (tmp_path / ".owner.draft" / "transformer" / "old").touch()
    with written_whole(tmp_path) as draft:
        (draft / "model_index.json").touch()
        for name in ("vae", "transformer"):
            (draft / name).mkdir()
        assert not (tmp_path / "model_index.json").exists()
    assert renamed == ["transformer", "vae", "model_index.json"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["model_index.json", "transformer", "vae"]
    with pytest.raises(RunError, match="cannot be written"), written_whole(tmp_path):
        raise OSError("disk")
