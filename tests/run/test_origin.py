"""A checkpoint acts on the base and in the run that it belongs to, or not at all; a copy of it is enough by itself."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import ToyModel, toy_config, toy_trainer

from adagrpo.cli import main
from adagrpo.errors import InputError
from adagrpo.recipe.load import load_recipe, to_toml
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder
from adagrpo.run.origin import Origin
from adagrpo.tiny import tiny_flux_path

FILES = {
    "transformer": ("diffusion_pytorch_model", "proj_out.weight"),
    "vae": ("diffusion_pytorch_model", "decoder.conv_out.weight"),
    "text_encoder": ("model", "final_layer_norm.weight"),
    "text_encoder_2": ("model", "encoder.final_layer_norm.weight"),
}


def started(folder: Path, config=None, model: ToyModel | None = None, resume: bool = False) -> Fit:
    config = config or toy_config()
    run = RunFolder(folder)
    trainer = toy_trainer(config, model)
    if not resume:
        run.write_start(config, trainer.model.device, {})
    said: list[str] = []
    fit = Fit(trainer.config, trainer, run, ["a", "b"], say=said.append)
    fit.said = said
    return fit


def scaled(base: Path, component: str, factor: float) -> None:
    """One tensor of one component times ``factor``."""
    stem, name = FILES[component]
    file = base / component / f"{stem}.safetensors"
    tensors = load_file(file)
    tensors[name] *= factor
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base folder, and finished runs of both kinds of tuning that began from it."""
    folder = tmp_path_factory.mktemp("runs")
    base = shutil.copytree(tiny_flux_path(), folder / "base")
    config = load_recipe("tiny")
    sections = {
        "train": {"iterations": 1, "slots": 1},
        "rollout": {"steps": 3, "sde_steps": (0, 1), "group_size": 2},
        "selection": {"candidates": 2},
        "evaluation": {"every": 0, "prompts": 2, "final_prompts": 0},
        "output": {"grid_every": 0},
        "optimizer": {"lr": 1e-2},
    }
    for section, changes in sections.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
    for tuning in ("full", "lora"):
        model = dataclasses.replace(config.model, path=str(base), tuning=tuning)
        (folder / f"{tuning}.toml").write_text(to_toml(dataclasses.replace(config, model=model)))
        assert main(["train", str(folder / f"{tuning}.toml"), "--out", str(folder / tuning)]) == 0
    return folder


def attempts(runs: Path, tuning: str, tmp_path: Path) -> dict[str, list[str]]:
    """Every command that sets a run's weights on its base."""
    run = str(runs / tuning)
    return {
        "sample": ["sample", run, "--prompt", "a red circle", "--out", str(tmp_path / "png")],
        "export": ["export", run, str(tmp_path / "exported")],
        "resume": ["train", str(runs / f"{tuning}.toml"), "--out", run, "--resume", "latest"],
    }


@contextlib.contextmanager
def another_base(runs: Path, component: str):
    """Within it, the base folder holds another model."""
    scaled(runs / "base", component, 2.0)
    try:
        yield
    finally:
        scaled(runs / "base", component, 0.5)


def test_another_base_under_adapters_is_refused_by_name(runs, tmp_path, capsys) -> None:
    commands = attempts(runs, "lora", tmp_path)
    tried = {"transformer": commands, "vae": ["sample"], "text_encoder": ["export"], "text_encoder_2": ["resume"]}
    for component, names in tried.items():
        with another_base(runs, component):
            for name in names:
                code = main(commands[name])
                message = capsys.readouterr().err
                assert code == 2 and f"{component}: {FILES[component][1]}: other values" in message, (name, message)
    assert not any((tmp_path / "exported").glob("*")) and not any((tmp_path / "png").glob("*.png"))


def test_a_fully_trained_transformer_replaces_that_of_the_base_but_not_its_encoders(runs, tmp_path, capsys) -> None:
    commands = attempts(runs, "full", tmp_path)
    with another_base(runs, "transformer"):
        assert [main(commands[name]) for name in ("sample", "resume")] == [0, 0]
        with another_base(runs, "text_encoder_2"):
            assert [main(commands[name]) for name in ("export", "resume")] == [2, 2]
            assert "text_encoder_2: encoder.final_layer_norm.weight: other values" in capsys.readouterr().err


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_copied_checkpoint_samples_and_exports_by_itself(tuning: str, runs, tmp_path, capsys) -> None:
    home = runs / tuning / "checkpoints" / "step-000001"
    copy = shutil.copytree(home, tmp_path / "elsewhere" / "copy")
    for name, source in (("home", home), ("copy", copy)):
        assert main(["sample", str(source), "--prompt", "a red circle", "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "home" / "000-000.png").read_bytes() == (tmp_path / "copy" / "000-000.png").read_bytes()
    shutil.rmtree(copy / "state")  # most of its bytes, and only a resumed run needs them
    assert main(["export", str(copy), str(tmp_path / "exported")]) == 0
    capsys.readouterr()
    older(copy)
    assert main(["sample", str(copy), "--prompt", "a red circle", "--out", str(tmp_path / "png")]) == 2
    assert "holds no config.toml: an older version wrote it" in capsys.readouterr().err
    shutil.copy(runs / f"{tuning}.toml", tmp_path / "config.toml")
    assert main(["sample", str(copy), "--prompt", "a red circle", "--out", str(tmp_path / "png")]) == 0
    assert "records no fingerprint of its base model" in capsys.readouterr().err
    assert (tmp_path / "home" / "000-000.png").read_bytes() == (tmp_path / "png" / "000-000.png").read_bytes()


def test_weights_that_were_altered_on_the_way_are_refused(runs, tmp_path, capsys) -> None:
    copy = shutil.copytree(runs / "lora" / "checkpoints" / "step-000001", tmp_path / "copy")
    file = copy / "pytorch_lora_weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["export", str(copy), str(tmp_path / "exported")]) == 2
    assert f"{file}: missing, truncated or altered" in capsys.readouterr().err


def older(checkpoint: Path) -> None:
    """Make a checkpoint what earlier versions wrote: no recipe, no fingerprint."""
    file = checkpoint / "checkpoint.json"
    index = json.loads(file.read_text())
    del index["seal"]
    for name in ("config.toml", "base.json", "state/records.json"):
        (checkpoint / name).unlink(missing_ok=True)
        del index["files"][name]
    file.write_text(json.dumps(index))


def test_a_checkpoint_of_another_run_is_refused(tmp_path) -> None:
    ours, theirs = (started(tmp_path / name) for name in ("ours", "theirs"))
    for fit in (ours, theirs):
        fit()
    again = started(tmp_path / "ours", resume=True)
    with pytest.raises(InputError, match=r"theirs/checkpoints/step-000004: of another run"):
        again.resume(theirs.run.latest_checkpoint())
    moved = shutil.copytree(tmp_path / "ours", tmp_path / "moved")
    fit = started(moved, resume=True)
    fit.resume(fit.run.latest_checkpoint())  # the same run in another place
    assert fit.trainer.iterations_done == 4


class Framed(ToyModel):
    """Has a part that training never touches."""

    def __init__(self, frame: float) -> None:
        super().__init__()
        self.transformer.register_buffer("frame", torch.full((3, 5), frame))


def test_adapters_by_import_path_are_compared_where_nothing_is_trained(tmp_path) -> None:
    fit = started(tmp_path / "run", model=Framed(1.0))
    fit()
    checkpoint = fit.run.latest_checkpoint()
    started(tmp_path / "run", model=Framed(1.0), resume=True).resume(checkpoint)
    with pytest.raises(InputError, match="transformer: frame: other values"):
        started(tmp_path / "run", model=Framed(2.0), resume=True).resume(checkpoint)


def test_the_kl_term_needs_the_initial_weights_too(tmp_path) -> None:
    for kl, refused in ((0.0, False), (0.1, True)):
        config = toy_config(loss={"kl_weight": kl})
        fit = started(tmp_path / str(kl), config)
        fit()
        other = ToyModel()
        other.transformer.bias.data += 1
        again = started(tmp_path / str(kl), config, other, resume=True)
        if refused:
            with pytest.raises(InputError, match="transformer: bias: other values"):
                again.resume(fit.run.latest_checkpoint())
        else:
            again.resume(fit.run.latest_checkpoint())


def test_a_start_made_again_measures_another_base_anew(tmp_path) -> None:
    def other() -> ToyModel:
        model = ToyModel()
        model.transformer.mix.data += 1
        return model

    fit = started(tmp_path / "run")
    fit.trainer.iteration = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        fit()
    again = started(tmp_path / "run", model=other(), resume=True)
    gain = again().gain
    assert any("another base model" in line and "transformer: mix: other values" in line for line in again.said)
    assert gain == started(tmp_path / "whole", model=other())().gain


def test_a_fingerprint_sees_every_component_tensor_shape_and_place() -> None:
    from adagrpo.models.fingerprint import difference, fingerprint

    def module() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(8))

    one = fingerprint({"a": module(), "b": module()})
    assert difference(one, fingerprint({"a": module(), "b": module()}), {}) is None
    assert {tensor: value.split()[0] for tensor, value in one["a"].items()} == {
        "0.weight": "64x64", "0.bias": "64", "1.weight": "8", "1.bias": "8",
    }  # fmt: skip
    for place in range(64):  # whichever row or column another training changed
        for change in (lambda w, i: w[i].add_(1), lambda w, i: w[:, i].add_(1)):
            other = module()
            with torch.no_grad():
                change(other[0].weight, place)
            found = difference(one, fingerprint({"a": module(), "b": other}), {})
            assert found == "b: 0.weight: other values", place
    wider = torch.nn.Sequential(torch.nn.Linear(65, 64), torch.nn.LayerNorm(8))
    assert difference(one, fingerprint({"a": wider, "b": module()}), {}).startswith(
        "a: 0.weight and 1 more tensors: 64x64 there"
    )
    assert "missing here" in difference(one, fingerprint({"a": module()}), {})
    assert difference(one, fingerprint({"a": wider}), {"a": ["0.weight", "0.bias"], "b": one["b"]}) is None
    half = fingerprint({"a": module().bfloat16()})
    assert half["a"]["1.weight"] != one["a"]["1.weight"]  # of what was loaded, in the dtype it was loaded in


def test_noise_levels_of_the_models_own_are_compared_to_rounding(tmp_path) -> None:
    said: list[str] = []

    def origin(*levels: float) -> Origin:
        own = {"8x8 in 2 steps": torch.tensor(levels)} if levels else {}
        return Origin(ToyModel(), "toy", "", False, own, said.append)

    origin(1, 0.7, 0).write(tmp_path)
    origin(1, 0.7000004, 0).check(tmp_path)
    with pytest.raises(
        InputError, match=r"noise levels of 8x8 in 2 steps: 1\.000000 0\.700000 0\.000000 there, 1\.000000 0\.69"
    ):
        origin(1, 0.69, 0).check(tmp_path)
    assert not said
    origin().write(tmp_path)
    origin(1, 0.7, 0).check(tmp_path)
    assert said == [f"{tmp_path}: records no noise levels of its model's own (an older version's): not compared"]
