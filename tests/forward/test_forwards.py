"""The rollout copy and its forwards against the unmodified library: parity, freshness, what FP8 may touch."""

import dataclasses

import pytest
import torch
from adagrpo_kernels import quantize_rowwise_reference
from torch import Tensor, nn

from adagrpo.algorithm.sde import sigma_schedule
from adagrpo.algorithm.tables import RolloutTable, rollout_table
from adagrpo.build import build_model
from adagrpo.forward.backends import build_forward
from adagrpo.forward.forwards import CopyForward, Forward, PolicyForward
from adagrpo.forward.projection import Projection, linear_layers
from adagrpo.models.flux import FLUX1_DEV, FluxModel
from adagrpo.models.making import random_policy
from adagrpo.models.policy import Settings
from adagrpo.models.registry import FLUX
from adagrpo.recipe.keys import ModelConfig

PROMPTS = ["a red circle", "two blue squares", "a cat"]
SLOT, INDEX = torch.tensor([0, 2, 1, 1, 0]), torch.tensor([0, 3, 9, 12, 5])


def tiny(dtype: str = "fp32", tuning: str = "full") -> FluxModel:
    """tiny-flux; adapters are moved off their start at zero."""
    model = build_model(ModelConfig(dtype=dtype, tuning=tuning, lora_rank=8, lora_alpha=12.0, device="cpu"))
    generator = torch.Generator().manual_seed(3)
    for name, p in model.trainable():
        if "lora_B" in name:
            p.data.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def table_for(model: FluxModel) -> RolloutTable:
    wide = torch.float64 if model.dtype is torch.float64 else torch.float32
    return rollout_table(sigma_schedule(10, 3.0), "flow", 0.7).to(model.device, wide)


def latents(model: FluxModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, *model.latent_shape, generator=generator, dtype=torch.float64).to(model.dtype)


@torch.no_grad()
def velocity(forward: Forward, model: FluxModel) -> Tensor:
    prepared = forward.prepare(model.encode(PROMPTS))
    return forward.velocity(latents(model), INDEX, prepared, SLOT).double()


def policy_velocity(model: FluxModel) -> Tensor:
    return velocity(PolicyForward(model, table_for(model)), model)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_fused_forward_is_the_librarys_in_float32(tuning: str) -> None:
    model = tiny("fp32", tuning)
    keys = {name: t.clone() for name, t in model.transformer.state_dict().items()}
    fused = build_forward(model, table_for(model), "fused")
    assert distance(velocity(fused, model), policy_velocity(model)) <= 1e-5
    after = model.transformer.state_dict()
    assert list(after) == list(keys) and all(torch.equal(after[name], t) for name, t in keys.items())


def wide(guidance: bool) -> FluxModel:
    """A double and a single block of FLUX.1-dev's width: 480 M weights, filled from a short random sequence for speed."""
    blocks = FLUX1_DEV["transformer"] | {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": guidance}
    model = random_policy(FLUX, FLUX1_DEV | {"transformer": blocks}, Settings(torch.float32, torch.device("meta"), 64, 96, 8))
    transformer = model.transformer.to_empty(device="cpu").requires_grad_(False)
    sequence = torch.randn(1_000_003, generator=torch.Generator().manual_seed(2))
    for name, p in transformer.named_parameters():
        scale = 0.02 if p.ndim > 1 else 0.1
        p.copy_((scale * sequence).repeat(-(-p.numel() // len(sequence)))[: p.numel()].view_as(p) + ("norm_" in name))
    model.encoder.device = torch.device("cpu")
    return model


@pytest.mark.parametrize("guidance", [True, False])
def test_the_fused_forward_is_the_librarys_at_the_width_of_flux1_dev(guidance: bool) -> None:
    model = wide(guidance)
    assert model.latent_shape == (24, 64) and model.transformer.inner_dim == 3072
    fused = build_forward(model, table_for(model), "fused")
    assert distance(velocity(fused, model), policy_velocity(model)) <= 1e-5


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_bf16_errs_at_most_twice_as_much_as_the_librarys_bf16(tuning: str) -> None:
    truth = policy_velocity(tiny("fp64", tuning))
    model = tiny("bf16", tuning)
    eager = distance(policy_velocity(model), truth)
    fused = distance(velocity(build_forward(model, table_for(model), "fused"), model), truth)
    assert 1e-3 < eager < 0.1 and fused <= 2 * eager


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("name", ["eager", "fused"])
def test_fp8_stays_near_and_says_that_it_is_lossy(name: str, tuning: str) -> None:
    model = tiny("fp32", tuning)
    forward = build_forward(model, table_for(model), name, "fp8")
    assert forward.lossy and not build_forward(model, table_for(model), "fused").lossy
    assert 1e-3 < distance(velocity(forward, model), policy_velocity(model)) < 0.06
    quantised = [p for p in forward.copy.projections if p.weight.dtype is torch.float8_e4m3fn]
    # Width 128. 2 double blocks of two streams: QKV and out 4 x 128², MLP 8 x 128²; 4 single: QKV 3, MLP 4, out 5 x 128².
    assert sum(p.weight.numel() for p in quantised) == (2 * 2 * 12 + 4 * 12) * 128**2


@pytest.mark.parametrize("scaling", ["rowwise", "tensorwise"])
def test_a_quantised_projection_multiplies_exactly_what_it_stores(scaling: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(48, 32).requires_grad_(False), nn.Linear(48, 16).requires_grad_(False)]
    x = torch.randn(2, 5, 48) * torch.logspace(-2, 2, 5).unsqueeze(1)

    def quantise(t: Tensor):
        return (
            quantize_rowwise_reference(t) if scaling == "rowwise" else Projection.__init__.__globals__["quantize_tensorwise"](t)
        )

    projection = Projection(layers, torch.float32, quantise, scaling)
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers]).double()
    qx, qw = quantise(x), quantise(weight)
    exact = (qx.values.double() * qx.scale.double()) @ (qw.values.double() * qw.scale.double()).T + bias
    torch.testing.assert_close(projection(x).double(), exact, rtol=1e-5, atol=1e-5)
    plain = x.double() @ weight.double().T + bias
    assert distance(projection(x).double(), plain) < 0.06


def train_step(model: FluxModel, size: float) -> None:
    """Move every trainable weight by ``size`` of its own typical value."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, p in model.trainable():
            p += size * p.abs().mean() * torch.randn(p.shape, generator=generator).to(p.dtype)


FORWARDS = [("eager", torch.bfloat16), ("fused", None), ("eager", "fp8"), ("fused", "fp8")]


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(("name", "precision"), FORWARDS)
def test_the_copy_moves_as_the_policy_moves_and_only_when_told(name: str, precision, tuning: str) -> None:
    model = tiny("fp32", tuning)
    forward = build_forward(model, table_for(model), name, precision)
    tensors = [*forward.copy.transformer.parameters(), *(b for p in forward.copy.projections for b in p.buffers())]
    addresses = [t.data_ptr() for t in tensors]
    before, policy_before = velocity(forward, model), policy_velocity(model)
    train_step(model, 0.3 if tuning == "full" else 1.5)
    assert torch.equal(velocity(forward, model), before)
    forward.refresh()
    moved, policy_moved = velocity(forward, model) - before, policy_velocity(model) - policy_before
    assert policy_moved.norm() > 0.1 * policy_before.norm()
    # What is left is the rounding of bf16 or FP8 (see above: 3 to 4 % of the velocity) at two different weights.
    assert (moved - policy_moved).norm() < (1e-5 if precision is None else 0.06) * policy_before.norm()
    assert [t.data_ptr() for t in tensors] == addresses


def test_small_updates_of_adapters_survive_an_fp8_base() -> None:
    """An update of 1e-4 of the weights would drown in the rounding of the base, were it merged."""
    model = tiny("fp32", "lora")
    source = dict(linear_layers(model.transformer))["transformer_blocks.0.attn.to_q"]
    projection = Projection([source], torch.float32, quantize_rowwise_reference)
    x = torch.randn(3, 7, 128, generator=torch.Generator().manual_seed(6))
    before, scaling = projection(x), source.scaling["default"]
    a, b = source.lora_A["default"].weight, source.lora_B["default"].weight
    update = 1e-4 * source.base_layer.weight.norm() * torch.randn_like(b) / (b.numel() ** 0.5 * a.norm() * scaling)
    with torch.no_grad():
        b += update
    projection.refresh()
    expected = scaling * (x.double() @ a.double().T @ update.double().T)
    assert distance((projection(x) - before).detach().double(), expected.detach()) < 0.02


def test_a_copy_of_adapters_shares_the_frozen_base() -> None:
    model = tiny("bf16", "lora")
    forward = CopyForward(model, table_for(model), torch.bfloat16)
    adapters = sum(p.numel() * 2 for _, p in model.trainable())
    assert forward.own_bytes == adapters
    base = dict(model.transformer.named_parameters())["transformer_blocks.0.attn.to_q.base_layer.weight"]
    twin = dict(forward.copy.transformer.named_parameters())["transformer_blocks.0.attn.to_q.base_layer.weight"]
    assert base.data_ptr() == twin.data_ptr()


@pytest.mark.parametrize("precision", [None, "fp8"])
def test_blocks_compile_without_graph_breaks(precision) -> None:
    """``fullgraph`` makes a break an error; tracing is the same for every compiler."""
    model = tiny()
    scaling = "rowwise" if precision else None
    torch._dynamo.reset()
    compiled = CopyForward(model, table_for(model), torch.float32, scaling, compiled=True, compiler="aot_eager")
    plain = CopyForward(model, table_for(model), torch.float32, scaling)
    assert distance(velocity(compiled, model), velocity(plain, model)) < (1e-6 if precision is None else 0.01)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_what_all_steps_share_is_computed_once() -> None:
    model = tiny()
    fused = build_forward(model, table_for(model), "fused")
    calls = {"time_text_embed": 0, "context_embedder": 0, "pos_embed": 0}
    for name in calls:
        module = fused.copy.transformer.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    prepared = fused.prepare(model.encode(PROMPTS))
    for step in range(3):
        fused.velocity(latents(model), INDEX.clamp_max(step), prepared, SLOT)
    assert calls == {"time_text_embed": 1, "context_embedder": 1, "pos_embed": 1}
    assert prepared.tensors["modulation"].shape[:2] == (len(PROMPTS), 10)


def test_other_sizes_get_their_own_rotary_tables() -> None:
    model = tiny()
    fused = build_forward(model, table_for(model), "fused")
    for size in ((32, 48), (32, 32), (48, 32)):
        model.resize(*size)
        assert distance(velocity(fused, model), policy_velocity(model)) <= 1e-5
    assert len(fused._rotary) == 3


def test_what_would_be_slower_than_without_it_is_refused_by_name(tmp_path) -> None:
    from adagrpo.commands import load_trained
    from adagrpo.errors import InputError
    from adagrpo.recipe.keys import Config, EngineConfig
    from adagrpo.recipe.load import to_toml
    from adagrpo.recipe.rules import check

    for keys, match in (
        ({"forward": "fused", "fp8_attention": True}, r"engine.fp8_attention = true: Q, K and V .*passes of their own"),
        ({"fp8_attention": True}, r"engine.fp8_attention = true: .*passes of their own"),
        ({"forward": "fused", "precision": "fp8", "fp8_scaling": "tensorwise"}, r"fp8_scaling = tensorwise: .*use rowwise"),
    ):
        with pytest.raises(InputError, match=match):
            check(dataclasses.replace(Config(), engine=EngineConfig(**keys)))
    check(dataclasses.replace(Config(), engine=EngineConfig(forward="compile", precision="fp8", fp8_scaling="tensorwise")))
    with pytest.raises(InputError, match=r"fp8_scaling = tensorwise: .*use rowwise"):
        build_forward(model := tiny(), table_for(model), "fused", "fp8", "tensorwise")
    older = dataclasses.replace(Config(), engine=EngineConfig(forward="fused", fp8_attention=True))
    (tmp_path / "older.toml").write_text(to_toml(older), "utf-8")
    config, _ = load_trained(str(tmp_path / "older.toml"))  # its trained weights stay within reach
    assert config == older


def test_what_a_machine_cannot_run_is_refused_with_the_reason() -> None:
    from adagrpo.errors import InputError

    model = tiny()
    with pytest.raises(InputError, match=r"engine.attention = flash3: needs a CUDA device"):
        build_forward(model, table_for(model), attention="flash3")
    with pytest.raises(InputError, match="FLUX and SD3 models only"):
        from toy import ToyModel

        build_forward(ToyModel(), table_for(model), "fused")
    assert build_forward(model, table_for(model)) is None
