"""The shipped folder, and the recipe that makes such folders."""

import json

import pytest
import torch

from adagrpo.tiny import tiny_flux_path
from adagrpo.tiny.muon import Muon, orthogonalise
from adagrpo.tiny.scenes import CATEGORIES

LAYOUT = {
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "T5TokenizerFast",
    "transformer": "FluxTransformer2DModel",
    "vae": "AutoencoderKL",
}


def check_layout(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
    assert {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and entry[0]} == LAYOUT
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    weights = {
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert weights == {name for name in files if name.endswith(".safetensors")}
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer.json", "build.json"} <= files


def test_shipped_folder():
    folder = tiny_flux_path()
    check_layout(folder)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 10e6
    log = json.loads((folder / "build.json").read_text())
    assert 0.5 <= log["evaluation"][0]["reward"]["all"] <= 0.7
    text = "".join(path.read_text() for path in folder.rglob("*.json"))
    assert not any(trace in text for trace in ("/work", "/home", "/tmp", "/root"))


def test_shipped_model_draws_and_the_recipe_runs(tmp_path):
    """One test, because importing diffusers costs seconds."""
    from adagrpo.tiny.build import build
    from adagrpo.tiny.evaluate import evaluate, load, sample
    from adagrpo.tiny.training import Recipe

    result = evaluate(tiny_flux_path(), prompts_per_category=20, steps=8, seed=1)
    assert set(result["reward"]) == {*CATEGORIES, "all"}
    assert 0.4 <= result["reward"]["all"] <= 0.8
    assert result["reward"]["single"] >= 0.8 > 0.65 >= result["reward"]["relation"]
    assert result["exact"]["all"] < result["reward"]["all"]
    pipe = load(tiny_flux_path())
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)} == {torch.float32}
    one, same, other = (sample(pipe, ["a red cross"], 2, seed) for seed in (0, 0, 1))
    assert one.shape == (1, 3, 32, 32) and torch.equal(one, same) and not torch.equal(one, other)

    recipe = Recipe(scenes=64, vae_iterations=2, flow_iterations=2, flow_batch=8, evaluated=1)
    logs = [build(tmp_path / name, seed, recipe) for name, seed in (("one", 0), ("same", 0), ("other", 1))]
    check_layout(tmp_path / "one")
    weights = [
        (tmp_path / name / "transformer/diffusion_pytorch_model.safetensors").read_bytes() for name in ("one", "same", "other")
    ]
    assert weights[0] == weights[1] != weights[2]
    assert logs[0]["loss"] == logs[1]["loss"] != logs[2]["loss"]
    assert json.loads((tmp_path / "one" / "build.json").read_text())["seed"] == 0
    with pytest.raises(FileExistsError):
        build(tmp_path / "one", 0, recipe)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        load(tmp_path)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 16), (2, 16, 48)])
def test_orthogonalise_evens_the_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.3 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    ideal = left @ right
    cosine = (orthogonalise(matrices) * ideal).sum((1, 2)) / orthogonalise(matrices).norm(dim=(1, 2)) / ideal.norm(dim=(1, 2))
    assert cosine.min() > 0.95


def test_muon_step():
    weight, idle = (torch.nn.Parameter(torch.zeros(4, 2, 1, 3)) for _ in range(2))
    optimizer = Muon([weight, idle], lr=0.1)
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert torch.equal(idle, torch.zeros_like(idle))
    values = torch.linalg.svdvals(weight.detach().flatten(1))
    assert values.min() > 0.05 and values.max() < 0.13
    assert (weight.detach() * weight.grad).sum() < 0
