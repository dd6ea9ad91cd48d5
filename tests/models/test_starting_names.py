"""LoRA files in the names that others write, on both families, against stock diffusers, PEFT and values by hand."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_flux import PROMPTS, latents, small_flux
from small_sd3 import loaded, saved
from torch import Tensor, nn

from adagrpo.errors import InputError
from adagrpo.models.flux import FluxModel
from adagrpo.models.policy import Policy, add_lora
from adagrpo.models.registry import FLUX, SD3, Family
from adagrpo.models.starting import start_from

RANK = 3
FILE = "pytorch_lora_weights.safetensors"


def pair(high: int, wide: int, seed: int) -> tuple[Tensor, Tensor]:
    """A [rank, wide] and B [high, rank]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, wide, generator=generator) / 4, torch.randn(high, RANK, generator=generator) / 4


@torch.no_grad()
def velocity(model: Policy) -> Tensor:
    return model.velocity(latents(model, 2), torch.tensor([0.9, 0.5]), model.encode(PROMPTS))


def begun(model: Policy, file: Path, targets: tuple[str, ...]) -> Policy:
    """The model with adapters of a higher rank and another alpha that began as the file."""
    transformer = copy.deepcopy(model.transformer)
    add_lora(transformer, 4, 8.0, targets)
    start = start_from(model.family, transformer, str(file))
    assert start.adapted > 0
    return model.around(transformer)


def stock(model: Policy, file: Path) -> Policy:
    """The model whose transformer has the file by the pipeline's own loader."""
    kind = model.family.pipeline_class
    parts = [name for name in kind.__init__.__annotations__ if name not in ("transformer", "return")]
    pipeline = kind(transformer=copy.deepcopy(model.transformer), **dict.fromkeys(parts))
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    return model.around(pipeline.transformer)


def same(model: Policy, found: Policy, truth: Policy) -> None:
    ours, wanted = velocity(found), velocity(truth)
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-5)
    assert float((ours - velocity(model)).abs().max()) > 1e-2  # so that the comparison can fail


@torch.no_grad()
def added(model: Policy, deltas: dict[str, Tensor]) -> Policy:
    """The model with these added to the weights of its layers."""
    transformer = copy.deepcopy(model.transformer)
    for name, delta in deltas.items():
        transformer.get_submodule(name).weight += delta
    return model.around(transformer)


# FLUX. Of a layer in the original model's names: outputs and inputs at a width of 32.

KOHYA = {
    "double_blocks_0_img_attn_qkv": (96, 32), "double_blocks_0_txt_attn_qkv": (96, 32),
    "double_blocks_0_img_attn_proj": (32, 32), "double_blocks_0_txt_attn_proj": (32, 32),
    "double_blocks_0_img_mlp_0": (128, 32), "double_blocks_0_txt_mlp_2": (32, 128),
    "double_blocks_0_img_mod_lin": (192, 32), "double_blocks_0_txt_mod_lin": (192, 32),
    "single_blocks_0_linear2": (32, 160), "single_blocks_0_modulation_lin": (96, 32),
}  # fmt: skip
XLABS = {
    "double_blocks.0.processor.qkv_lora1": (96, 32), "double_blocks.0.processor.qkv_lora2": (96, 32),
    "double_blocks.0.processor.proj_lora1": (32, 32), "double_blocks.0.processor.proj_lora2": (32, 32),
    "single_blocks.0.processor.qkv_lora": (96, 32), "single_blocks.0.processor.proj_lora": (32, 160),
}  # fmt: skip
MIXTURE = {
    "transformer_blocks_0_attn_to_out_0": (32, 32), "transformer_blocks_0_attn_add_k_proj": (32, 32),
    "single_transformer_blocks_0_attn_to_v": (32, 32), "x_embedder": (32, 16),
}  # fmt: skip
EVERY = (*FLUX.lora_targets, "ff.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear")
EVERY += ("norm.linear", "proj_out", "norm_out.linear", "x_embedder")


def downs(layers: dict[str, tuple[int, int]], prefix: str, alphas: bool) -> dict[str, Tensor]:
    """kohya's file of these layers, an alpha for each."""
    file = {}
    for i, (name, size) in enumerate(layers.items()):
        a, b = pair(*size, seed=i)
        file |= {f"{prefix}{name}.lora_down.weight": a, f"{prefix}{name}.lora_up.weight": b}
        file |= {f"{prefix}{name}.alpha": torch.tensor(1.0 + i)} if alphas else {}
    return file


def xlabs() -> dict[str, Tensor]:
    file = {}
    for i, (name, size) in enumerate(XLABS.items()):
        a, b = pair(*size, seed=i)
        file |= {f"{name}.down.weight": a, f"{name}.up.weight": b}
    return file


def sparse() -> dict[str, Tensor]:
    """Three adapters of rank 1 written as one of rank 3: diffusers takes it apart."""
    file = downs({"double_blocks_0_img_attn_qkv": (96, 32)}, "lora_unet_", alphas=True)
    up = file["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    up *= torch.eye(3).repeat_interleave(32, 0)
    return file


FILES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "kohya": lambda: downs(KOHYA, "lora_unet_", alphas=True),
    "kohya without alphas": lambda: downs(KOHYA, "lora_unet_", alphas=False),
    "kohya, sparse": sparse,
    "kohya, diffusers' modules": lambda: downs(MIXTURE, "lora_transformer_", alphas=True),
    "x-labs": xlabs,
}


@pytest.fixture(scope="module")
def flux() -> FluxModel:
    return small_flux()


@pytest.mark.parametrize("names", FILES)
def test_flux_takes_others_names_as_stock_diffusers(names: str, flux: FluxModel, tmp_path: Path) -> None:
    save_file(FILES[names](), tmp_path / FILE)
    same(flux, begun(flux, tmp_path / FILE, EVERY), stock(flux, tmp_path / FILE))


def test_the_last_layers_of_flux_count_their_alpha_and_swap_their_halves(flux: FluxModel, tmp_path: Path) -> None:
    """Stock diffusers leaves this alpha out; the original model's first outputs are the shift, diffusers' the scale."""
    layers = {"final_layer_adaLN_modulation_1": (64, 32), "final_layer_linear": (16, 32)}
    file = downs(layers, "lora_unet_", alphas=True)
    save_file(file, tmp_path / FILE)
    (a, b), (c, d) = (pair(*size, seed=i) for i, size in enumerate(layers.values()))
    truth = {"norm_out.linear": torch.cat([b[32:], b[:32]]) @ a * (1 / RANK), "proj_out": d @ c * (2 / RANK)}
    same(flux, begun(flux, tmp_path / FILE, EVERY), added(flux, truth))


def test_the_one_layer_of_a_single_block_becomes_four(tmp_path: Path) -> None:
    """Only at FLUX.1's own width does diffusers know its parts; on the meta device that takes no memory."""
    from diffusers import FluxTransformer2DModel

    shape = {"num_layers": 0, "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 24}
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**shape)
    add_lora(transformer, RANK, 2.0 * RANK, ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    block = transformer.single_transformer_blocks[0]
    parts = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    for name, high in parts.items():
        layer = block.get_submodule(name)
        layer.lora_A["default"].weight = nn.Parameter(torch.zeros(RANK, 3072))
        layer.lora_B["default"].weight = nn.Parameter(torch.zeros(high, RANK))
    save_file(downs({"single_blocks_0_linear1": (sum(parts.values()), 3072)}, "lora_unet_", alphas=True), tmp_path / FILE)
    assert start_from(FLUX, transformer, str(tmp_path)).adapted == 4
    a, b = pair(sum(parts.values()), 3072, seed=0)
    for name, rows in zip(parts, b.split(list(parts.values())), strict=True):
        layer = block.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, a)
        wanted = (rows.double() / RANK / 2).float()  # alpha 1; the adapters' own factor is 2
        assert torch.equal(layer.lora_B["default"].weight, wanted)


# SD3

LAYERS = {"transformer_blocks.0.attn.to_q": (32, 32), "transformer_blocks.0.attn2.to_out.0": (32, 32)}
LAYERS |= {"transformer_blocks.1.attn.add_v_proj": (32, 32), "transformer_blocks.1.ff.net.2": (32, 128)}
TARGETS = (*SD3.lora_targets, "attn2.to_out.0", "ff.net.2")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Policy:
    return loaded(saved(tmp_path_factory.mktemp("sd3") / "pipeline"))


def halves(prefix: str) -> dict[str, Tensor]:
    pairs = {name: pair(*size, seed=i) for i, (name, size) in enumerate(LAYERS.items())}
    return {f"{prefix}{name}.lora_{half}.weight": t for name, ab in pairs.items() for half, t in zip("AB", ab, strict=True)}


def deltas(scales: list[float]) -> dict[str, Tensor]:
    pairs = [pair(*size, seed=i) for i, size in enumerate(LAYERS.values())]
    return {name: s * b @ a for name, (a, b), s in zip(LAYERS, pairs, scales, strict=True)}


@pytest.mark.parametrize("described", [False, True])
def test_sd3_takes_diffusers_names(described: bool, sd3: Policy, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig

    config = LoraConfig(r=RANK, lora_alpha=5, alpha_pattern={"transformer_blocks.1.ff.net.2": 7}, target_modules=list(LAYERS))
    settings = {"transformer_lora_adapter_metadata": config.to_dict()} if described else {}
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=halves(""), **settings)
    found = begun(sd3, tmp_path / FILE, TARGETS)
    same(sd3, found, stock(sd3, tmp_path / FILE))
    same(sd3, found, added(sd3, deltas([5 / RANK, 5 / RANK, 5 / RANK, 7 / RANK] if described else [1.0] * 4)))


def test_sd3_takes_pefts_names(sd3: Policy, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

    config = LoraConfig(r=RANK, lora_alpha=5, target_modules=list(LAYERS))
    model = get_peft_model(copy.deepcopy(sd3.transformer), config)
    assert not set_peft_model_state_dict(model, halves("base_model.model.")).unexpected_keys
    model.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(sd3.transformer), tmp_path).get_base_model()
    same(sd3, begun(sd3, tmp_path, TARGETS), sd3.around(theirs))


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_", "transformer_"])
def test_sd3_takes_kohyas_names_of_its_layers(prefix: str, sd3: Policy, tmp_path: Path) -> None:
    layers = {name.replace(".", "_"): size for name, size in LAYERS.items()}
    save_file(downs(layers, prefix, alphas=True), tmp_path / FILE)
    same(sd3, begun(sd3, tmp_path / FILE, TARGETS), added(sd3, deltas([1 / RANK, 2 / RANK, 3 / RANK, 4 / RANK])))


ORIGINAL = "lora_unet_joint_blocks_0_x_block_attn_qkv"


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (SD3, "transformer.transformer_blocks.9.attn.to_q.lora_A.weight"),
        (SD3, f"{ORIGINAL}.lora_down.weight"),
        (FLUX, "lora_unet_double_blocks_40_img_attn_proj.lora_down.weight"),
        (FLUX, "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"),
    ],
)
def test_names_that_nothing_converts_are_refused(family: Family, name: str, flux, sd3, tmp_path: Path) -> None:
    a, b = pair(32, 32, seed=0)
    save_file({name: a, name.replace("down", "up").replace("_A", "_B"): b}, tmp_path / FILE)
    stem = name.rpartition(".weight")[0].rpartition(".")[0]
    message = f"{stem}.*: no layer of this transformer has that name, and diffusers converts it to none of {family.title}'s"
    with pytest.raises(InputError, match=f"^model.lora_from = .*{message}; name a LoRA of this architecture"):
        begun(flux if family is FLUX else sd3, tmp_path / FILE, family.lora_targets)
