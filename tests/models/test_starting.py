"""Adapters that begin as a file: what it means is what its weights say by hand, and what stock diffusers makes of it."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_flux import PROMPTS, latents, small_flux
from torch import Tensor

from adagrpo.build import build_model, build_trainer
from adagrpo.cli import main
from adagrpo.commands import dry_run, train
from adagrpo.errors import InputError
from adagrpo.estimate.memory import MemoryPlan
from adagrpo.models.flux import FluxModel
from adagrpo.models.registry import FLUX
from adagrpo.models.starting import Start, start_from
from adagrpo.recipe.load import load_recipe, to_toml
from adagrpo.recipe.rules import check
from adagrpo.tiny import tiny_flux_path

TARGETS = FLUX.lora_targets
QKV = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
OTHER = "single_transformer_blocks.0.attn.to_q"
LORA = "pytorch_lora_weights.safetensors"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of four modules."""
    return {name: (random(rank, 32, seed=i), random(32, rank, seed=9 + i)) for i, name in enumerate([*QKV, OTHER])}


def named(pairs: dict[str, tuple[Tensor, Tensor]], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{m}.lora_{half}.weight": t for m, pair in pairs.items() for half, t in zip("AB", pair, strict=True)}


def plain(folder: Path) -> dict[str, float]:
    """diffusers' file without settings: alpha is the rank."""
    from diffusers import FluxPipeline

    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=named(weights(), ""))
    return dict.fromkeys(weights(), 1.0)


def described(folder: Path) -> dict[str, float]:
    """The same with settings: alpha 3 of rank 2, another one for a module."""
    from diffusers import FluxPipeline
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_alpha=3, alpha_pattern={OTHER: 5}, target_modules=list(weights()))
    FluxPipeline.save_lora_weights(
        folder, transformer_lora_layers=named(weights(), ""), transformer_lora_adapter_metadata=config.to_dict()
    )
    return dict.fromkeys(QKV, 1.5) | {OTHER: 2.5}


def peft(folder: Path) -> dict[str, float]:
    """PEFT's own, scaled by alpha over the root of the rank."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config = LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=list(weights()))
    model = get_peft_model(small_flux().transformer, config)
    assert not set_peft_model_state_dict(model, named(weights(), "base_model.model.")).unexpected_keys
    model.save_pretrained(folder)
    return dict.fromkeys(weights(), 3 / 2**0.5)


def tensors_with_alpha(folder: Path) -> dict[str, float]:
    """diffusers' names with an alpha beside each."""
    alphas = {f"transformer.{name}.alpha": torch.tensor(3.0) for name in weights()}
    save_file(named(weights(), "transformer.") | alphas, folder / "any.safetensors")
    return dict.fromkeys(weights(), 1.5)


def kohya(folder: Path) -> dict[str, float]:
    """Q, K and V as one adapter of the original model's one layer."""
    pairs = weights()
    shared = pairs[QKV[0]][0]
    up = torch.cat([pairs[name][1] for name in QKV])
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    file = {f"{stem}.lora_down.weight": shared, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(3.0)}
    save_file(file, folder / "any.safetensors")
    return dict.fromkeys(QKV, 1.5)


@torch.no_grad()
def merged(scales: dict[str, float], shared: bool) -> FluxModel:
    """The model whose weights are W + scale B A."""
    model, pairs = small_flux(), weights()
    for name, scale in scales.items():
        a = pairs[QKV[0]][0] if shared else pairs[name][0]
        model.transformer.get_submodule(name).weight += scale * pairs[name][1] @ a
    return model


@torch.no_grad()
def velocity(model: FluxModel) -> Tensor:
    return model.velocity(latents(model, 2), torch.tensor([0.9, 0.5]), model.encode(PROMPTS))


def started(place: Path, targets=TARGETS) -> tuple[FluxModel, Start]:
    """Adapters of rank 4 and alpha 8."""
    model = small_flux(targets)
    model.start = start_from(FLUX, model.transformer, str(place))
    return model, model.start


@pytest.mark.parametrize("write", [plain, described, peft, tensors_with_alpha, kohya], ids=lambda write: write.__name__)
def test_a_file_means_what_it_says(write, tmp_path) -> None:
    scales = write(tmp_path)
    model, start = started(tmp_path)
    assert start.adapted == len(scales) and start.notice.count(f"{len(scales)} of 11 adapters") == 1
    found, bare = velocity(model), velocity(small_flux())
    torch.testing.assert_close(found, velocity(merged(scales, write is kohya)), atol=2e-5, rtol=1e-5)
    assert float((found - bare).abs().max()) > 1e-2  # so that the comparison can fail
    if write is not peft:
        from diffusers import FluxPipeline

        parts = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        stock = FluxPipeline(transformer=small_flux().transformer, **dict.fromkeys(parts))
        stock.load_lora_weights(tmp_path, weight_name=next(tmp_path.glob("*.safetensors")).name)
        torch.testing.assert_close(found, velocity(model.around(stock.transformer)), atol=2e-5, rtol=1e-5)


def test_an_alpha_may_be_an_integer(tmp_path) -> None:
    tensors_with_alpha(tmp_path)
    file = tmp_path / "any.safetensors"
    of_floats = velocity(started(file)[0])
    save_file({name: t.long() if name.endswith(".alpha") else t for name, t in load_file(file).items()}, file)
    assert torch.equal(velocity(started(file)[0]), of_floats)


def test_a_lower_rank_leaves_the_rest_as_initialised(tmp_path) -> None:
    plain(tmp_path)
    model, fresh = started(tmp_path)[0], small_flux(TARGETS)
    for name, (a, b) in weights().items():
        ours, begun = (m.transformer.get_submodule(name) for m in (model, fresh))
        found_a, found_b = (half["default"].weight for half in (ours.lora_A, ours.lora_B))
        assert torch.equal(found_a[:2], a) and torch.equal(found_a[2:], begun.lora_A["default"].weight[2:])
        assert torch.equal(found_b[:, :2], b / 2) and not found_b[:, 2:].any()  # ours are multiplied by 8 / 4


def without(name: str):
    return lambda file: {key: t for key, t in file.items() if key != name}


def beside(name: str, tensor: Tensor):
    return lambda file: file | {name: tensor}


FIRST = f"transformer.{QKV[0]}"
REFUSED = {
    "unmatched": (beside("transformer.blocks.7.to_q.lora_A.weight", random(2, 32)), r"lacks its other half"),
    "stranger": (
        lambda f: f | {f"transformer.blocks.7.to_q.lora_{h}.weight": random(2, 2) for h in "AB"},
        r"blocks\.7\.to_q.*no layer of this transformer",
    ),
    "kohya's stranger": (
        lambda f: f | {f"lora_unet_input_blocks_4.lora_{h}.weight": random(2, 2) for h in ("down", "up")},
        r"lora_unet_input_blocks_4\.lora_down\.weight: no layer",
    ),
    "beyond lora_targets": (
        lambda f: f | {f"transformer.transformer_blocks.0.ff.net.0.proj.lora_{h}.weight": random(2, 2) for h in "AB"},
        r"which model\.lora_targets leaves out; add 'ff\.net\.0\.proj' to it",
    ),
    "half": (without(f"{FIRST}.lora_B.weight"), r"to_q\.lora_A\.weight lacks its other half"),
    "no LoRA": (beside("transformer.proj_out.weight", random(2, 2)), r"no weight of a LoRA in the names of"),
    "text encoder": (beside("text_encoder.layers.0.q.lora_A.weight", random(2, 2)), r"text_encoder\.layers.*text encoder"),
    "kohya's text encoder": (beside("lora_te1_text_model.lora_up.weight", random(2, 2)), r"lora_te1.*text encoder"),
    "DoRA": (beside(f"{FIRST}.lora_magnitude_vector", random(2)), r"a DoRA; merge it"),
    "kohya's DoRA": (beside("lora_unet_x.dora_scale", random(2)), r"a DoRA; merge it"),
    "LoKr": (beside("lora_unet_x.lokr_w1", random(2)), r"a LoHa or LoKr"),
    "bias": (beside(f"{FIRST}.lora_B.bias", random(2)), r"holds biases"),
    "alpha of nothing": (beside("transformer.proj_out.alpha", torch.tensor(1.0)), r"proj_out\.alpha belongs to no weight"),
    "not finite": (lambda f: f | {f"{FIRST}.lora_A.weight": torch.full((2, 32), torch.nan)}, r"to_q.*not finite"),
    "integers": (lambda f: f | {f"{FIRST}.lora_A.weight": torch.ones(2, 32, dtype=torch.int8)}, r"is torch\.int8; save it in"),
    "shape": (lambda f: f | {f"{FIRST}.lora_A.weight": random(2, 31)}, r"\[2, 31\] and \[32, 2\], not \[rank, 32\]"),
    "rank": (lambda f: named(weights(6), "transformer."), r"rank 6, above model\.lora_rank = 4; set model\.lora_rank = 6"),
    "both names": (
        lambda f: f | named(weights(), "base_model.model."),
        r"base_model\.model\..* and transformer\..* both adapt",
    ),
    "nothing": (lambda f: {}, r"holds no weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str, tmp_path) -> None:
    plain(tmp_path)
    change, message = REFUSED[case]
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file(change(load_file(tmp_path / LORA)), tmp_path / LORA)
    with pytest.raises(InputError, match=f"(?s)^model.lora_from = .*{message}"):
        started(tmp_path)


def test_places_and_settings_are_refused_by_name(tmp_path) -> None:
    def refused(message: str, place: Path = tmp_path) -> None:
        with pytest.raises(InputError, match=message):
            started(place)

    refused("no such file", tmp_path / "gone")
    refused(r"holds no \.safetensors file")
    for name in "ab":
        save_file(named(weights(), "base_model.model."), tmp_path / f"{name}.safetensors")
    refused(r"holds 2 \.safetensors files")
    refused(r"without adapter_config\.json", tmp_path / "a.safetensors")
    config = tmp_path / "adapter_config.json"
    for settings, message in (
        ({"peft_type": "LOKR"}, "of a LOKR"),
        ({"use_dora": True}, "of a DoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the weights under"),
    ):
        config.write_text(json.dumps(settings))
        refused(message, tmp_path / "a.safetensors")
    config.write_text("{")
    refused("cannot be read", tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"\x09")
    refused("cannot be read", tmp_path / "a.safetensors")


def recipe(lora: Path, **sections):
    """`tiny`, cut down to two quick iterations of adapters that begin as a file."""
    small = {
        "train": {"iterations": 2, "slots": 1},
        "model": {"tuning": "lora", "lora_rank": 4, "lora_alpha": 12.0, "lora_from": str(lora)},
        "rollout": {"steps": 4, "sde_steps": (0, 1), "group_size": 3},
        "selection": {"candidates": 1},
        "loss": {"kl_weight": 0.1},
        "optimizer": {"lr": 1e-2},
        "evaluation": {"every": 0, "final_prompts": 0},
        "output": {"grid_every": 0, "checkpoint_every": 1, "keep_last": 3},
    }
    config = load_recipe("tiny")
    for section in {**small, **sections}:
        changes = {**small.get(section, {}), **sections.get(section, {})}
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
    check(config)
    return config


def lora_of_tiny(folder: Path, rank: int = 3) -> Path:
    """A LoRA of the shipped model's first attention."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    wide = FluxTransformer2DModel.load_config(tiny_flux_path() / "transformer")
    size = wide["attention_head_dim"] * wide["num_attention_heads"]
    layers = {name: (random(rank, size) / 9, random(size, rank) / 9) for name in QKV}
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=named(layers, ""))
    return folder / LORA


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]


def test_a_run_begins_with_the_file_and_goes_on_without_it(tmp_path) -> None:
    lora = lora_of_tiny(tmp_path / "lora")
    config, digest = recipe(lora), hashlib.sha256(lora.read_bytes()).hexdigest()
    assert train(config, tmp_path / "whole", None) == 0
    assert (tmp_path / "whole" / "events.jsonl").read_text().count("weights for 3 of 28 adapters") == 1
    assert json.loads((tmp_path / "whole" / "manifest.json").read_text())["lora_from_sha256"] == digest
    first, second = metrics(tmp_path / "whole")
    assert first["policy/kl"] == 0 < second["policy/kl"]  # to where it began, not to the model without adapters
    shutil.rmtree(shutil.copytree(tmp_path / "whole", tmp_path / "broken") / "checkpoints" / "step-000002")
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, lora_from=""))
    with pytest.raises(InputError, match=r"model\.lora_from.*it decides the result"):
        train(other, tmp_path / "broken", "latest")
    lora.unlink()
    assert dry_run(config, tmp_path / "broken", "latest") == 0
    with pytest.raises(InputError, match="no such file"):
        dry_run(config, tmp_path / "new", "auto")
    assert train(config, tmp_path / "broken", "latest") == 0
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    last = [load_file(tmp_path / run / "checkpoints" / "step-000002" / LORA) for run in ("whole", "broken")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
    assert main(["export", str(tmp_path / "whole"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / LORA).is_file()
    with pytest.raises(InputError, match="no such file"):
        build_model(config.model)


def test_the_plan_and_the_reference_hold_a_copy_of_the_first_adapters(tmp_path) -> None:
    plans: list[MemoryPlan] = []
    config = recipe(lora_of_tiny(tmp_path), optimizer={"lr": 1e-1})
    trainer, _ = build_trainer(config, plans.append)
    model, adapters = trainer.model, sum(4 * p.numel() for _, p in trainer.model.trainable())
    assert next(e.bytes for e in plans[0].entries if e.name == "KL reference") == adapters
    assert plans[0].checkpoint == 5 * adapters
    model.keep_reference()
    x, sigma, text = latents(model, 2), torch.tensor([0.9, 0.5]), model.encode(PROMPTS)
    with torch.no_grad():
        before = model.velocity(x, sigma, text)
    trainer.iteration()
    with torch.no_grad():
        after = model.velocity(x, sigma, text)
        with model.reference():
            reference = model.velocity(x, sigma, text)
        assert torch.equal(model.velocity(x, sigma, text), after)
    assert torch.equal(reference, before) and not torch.equal(after, before)


def test_a_dry_run_reads_the_file(tmp_path, capsys) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe(lora_of_tiny(tmp_path, rank=3))))
    assert main(["train", str(file), "--dry-run"]) == 0
    assert "the others begin at zero" in capsys.readouterr().out
    assert main(["train", str(file), "--dry-run", "--model.lora-rank", "2"]) == 2
    assert "set model.lora_rank = 3" in capsys.readouterr().err
    assert main(["train", str(file), "--dry-run", "--model.tuning", "full"]) == 2
    assert "it needs model.tuning = lora" in capsys.readouterr().err
