"""Whatever computes the rollouts, they see every trained number: each tensor is moved, and they move as the policy does."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from small_flux import latents, linear_names, small_flux, table_of, velocity
from torch import Tensor, nn
from toy import toy_config, toy_trainer

from adagrpo.errors import InputError, RunError
from adagrpo.forward.backends import build_forward
from adagrpo.forward.forwards import CopyForward, Forward, PolicyForward
from adagrpo.forward.rollout_copy import RolloutCopy
from adagrpo.models.flux import FluxModel
from adagrpo.models.policy import add_lora
from adagrpo.train import Trainer

Build = Callable[[FluxModel], Forward]


def asked(name: str, precision=None, scaling: str = "rowwise") -> Build:
    return lambda model: build_forward(model, table_of(model), name, precision, scaling)


def compiled(scaling: str | None) -> Build:
    """Traced as inductor would have it, then run as it is."""
    return lambda model: CopyForward(model, table_of(model), torch.float32, scaling, compiled=True, compiler="eager")


# With the share of the velocity that rounding may take in this small net; 0 where all is float32. test_forwards.py holds the
# rounding itself to account.
FORWARDS: dict[str, tuple[Build, float]] = {
    "fused": (asked("fused"), 0.0),
    "fused bf16": (asked("fused", torch.bfloat16), 0.5),
    "fused fp8": (asked("fused", "fp8"), 0.5),
    "eager bf16": (asked("eager", torch.bfloat16), 0.5),
    "eager fp8": (asked("eager", "fp8"), 0.5),
    "eager fp8 tensorwise": (asked("eager", "fp8", "tensorwise"), 0.5),
    "compile": (compiled(None), 0.0),
    "compile fp8": (compiled("rowwise"), 0.5),
}

QUICK = {"full": ("fused", "fused fp8"), "adapters": ("fused", "fused fp8", "eager bf16")}
CASES = [
    pytest.param(tuning, name, marks=() if name in quick else pytest.mark.proof)
    for tuning, quick in QUICK.items()
    for name in FORWARDS
]


def policy_velocity(model: FluxModel) -> Tensor:
    return velocity(PolicyForward(model, table_of(model)), model)


@torch.no_grad()
def moves(model: FluxModel) -> list[tuple[str, nn.Parameter, Tensor, Tensor]]:
    """(name, parameter, another value, how the policy's velocity then differs: by 0.1 % or more) of all that is trained."""
    before, found = policy_velocity(model), []
    generator = torch.Generator().manual_seed(7)
    for name, p in model.trainable():
        kept, noise = p.detach().clone(), torch.randn(p.shape, generator=generator)
        p.copy_(kept + 4 * (kept.abs().mean() + 0.1) * noise)
        moved = policy_velocity(model) - before
        assert moved.norm() > 1e-3 * before.norm(), f"{name} moves nothing"
        found.append((name, p, p.detach().clone(), moved))
        p.copy_(kept)
    return found


def poisoned(targets: list[str]) -> FluxModel:
    """Adapters on ``targets`` that no longer are zero."""
    model = small_flux(targets)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.trainable():
            if "lora_B" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def trained(request) -> tuple[FluxModel, list]:
    model = small_flux() if request.param == "full" else poisoned(linear_names(small_flux()))
    for p in model.transformer.parameters():
        p.data.mul_(2 if p.ndim > 1 else 1)  # or text would hardly reach the picture
    return model, moves(model)


@pytest.mark.parametrize(("trained", "name"), CASES, indirect=["trained"])
def test_rollouts_see_every_trained_tensor(trained: tuple[FluxModel, list], name: str) -> None:
    model, changes = trained
    build, rounding = FORWARDS[name]
    assert len(changes) == len(list(model.trainable())) >= 60
    torch._dynamo.reset()
    forward = build(model)
    # In bf16 the measure is the library in bf16, which rounds noise levels too.
    library = model.around(copy.deepcopy(model.transformer).to(torch.bfloat16)) if "bf16" in name else model
    twins = dict(library.transformer.named_parameters())
    before, policy_before, unseen = velocity(forward, model), policy_velocity(library), []
    for tensor, p, value, moved in changes:
        kept = p.detach().clone()
        p.data.copy_(value)
        forward.refresh()
        found = velocity(forward, model) - before
        if library is not model:
            twins[tensor].data.copy_(value)
            moved = policy_velocity(library) - policy_before
            twins[tensor].data.copy_(kept)
        allowed = rounding * (moved + policy_before).norm() if rounding else 0.05 * moved.norm()  # not read: 1 * moved.norm()
        if found.norm() == 0 or (found - moved).norm() > allowed:
            unseen.append(tensor)
        p.data.copy_(kept)
    assert not unseen


def test_an_adapter_on_any_one_module_moves_the_fused_rollouts() -> None:
    names = linear_names(small_flux())
    assert len(names) == 30
    for target in names:
        model = poisoned([target])
        adapted = policy_velocity(model)
        fused = velocity(build_forward(model, table_of(model), "fused"), model)
        model.transformer.disable_adapters()
        moved = (adapted - policy_velocity(model)).norm()
        assert (fused - adapted).norm() < 0.01 * moved, target


@pytest.mark.parametrize("keys", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
def test_adapters_that_a_packed_layer_cannot_hold_are_refused(keys: dict) -> None:
    model = small_flux()
    model.transformer.requires_grad_(False)
    model.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "linear"], **keys))
    with pytest.raises(InputError, match=r"engine.forward = fused: .*have (a|no) rollout copy; use engine.forward = eager"):
        build_forward(model, table_of(model), "fused")


def test_scaled_adapters_are_seen() -> None:
    model = small_flux()
    model.transformer.requires_grad_(False)
    config = LoraConfig(
        r=4, use_rslora=True, target_modules=["to_v", "linear"], alpha_pattern={"to_v": 3}, init_lora_weights=False
    )
    model.transformer.add_adapter(config)
    fused = velocity(build_forward(model, table_of(model), "fused"), model)
    assert (fused - policy_velocity(model)).norm() < 1e-5 * fused.norm()


def test_a_transformer_with_more_in_it_than_the_fused_forward_reads_is_refused() -> None:
    def scaled_norm(t) -> None:
        t.norm_out.norm = nn.LayerNorm(32)

    def other_epsilon(t) -> None:
        t.single_transformer_blocks[0].attn.norm_k = nn.RMSNorm(16, eps=1e-5)

    def wrapped_norm(t) -> None:
        t.transformer_blocks[0].attn.norm_q = nn.Sequential(nn.RMSNorm(16, eps=1e-6))

    def wrapped_linear(t) -> None:
        t.transformer_blocks[0].attn.to_out[0] = nn.Sequential(nn.Linear(32, 32))

    for change, match in (
        (scaled_norm, "nothing of the transformer's tensor norm_out.norm.weight"),
        (other_epsilon, "single_transformer_blocks.0.attn.norm_k is not an RMS norm"),
        (wrapped_norm, "transformer_blocks.0.attn.norm_q is not an RMS norm"),
        (wrapped_linear, "no linear layer transformer_blocks.0.attn.to_out.0"),
    ):
        model = small_flux()
        change(model.transformer)
        with pytest.raises(InputError, match=f"engine.forward = fused: .*{match}"):
            build_forward(model, table_of(model), "fused")


def test_float16_is_bounded_where_the_library_bounds_it() -> None:
    """Text that grows beyond float16's range in the first block: the library clips it, so no NaN reaches the picture."""
    model = small_flux(dtype=torch.float16)
    with torch.no_grad():
        model.transformer.transformer_blocks[0].norm1_context.linear.bias[5 * 32 :] = 4000.0  # the MLP's gate
        model.transformer.transformer_blocks[0].ff_context.net[2].bias.fill_(60.0)
    policy, fused = policy_velocity(model), velocity(build_forward(model, table_of(model), "fused"), model)
    assert policy.isfinite().all() and (fused - policy).norm() < 0.02 * policy.norm()


# The copy proves itself once


def move(model: FluxModel) -> None:
    with torch.no_grad():
        for _, p in model.trainable():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", ["fused", "fused fp8", "eager bf16", "eager fp8"])
def test_a_copy_that_follows_proves_it_on_the_first_move_and_never_again(name: str, monkeypatch) -> None:
    model = poisoned(["to_q", "linear", "ff.net.2"])
    forward = FORWARDS[name][0](model)
    proofs: list[int] = []
    differing = RolloutCopy._differing
    monkeypatch.setattr(RolloutCopy, "_differing", lambda self: proofs.append(1) or differing(self))
    forward.refresh()
    forward.refresh()
    assert len(proofs) == 4, "as long as nothing has moved there is nothing to prove"
    move(model)
    forward.refresh()
    assert len(proofs) == 6
    move(model)
    forward.refresh()
    assert len(proofs) == 6


def forgets_a_twin(model: FluxModel, forward) -> str:
    names = [name for name, p in model.trainable() if not name.startswith(forward.copy._replaced)]
    forward.copy._sources, forward.copy._twins = forward.copy._sources[1:], forward.copy._twins[1:]
    return names[0]


def forgets_a_projection(model: FluxModel, forward) -> str:
    forward.copy.projections[0].refresh = lambda: None
    return next(name for name, p in forward.copy._named.items() if p is forward.copy.projections[0])


def replaces_a_parameter(model: FluxModel, forward) -> str:
    """Loading by assignment leaves the copy with the former object."""
    model.transformer.x_embedder.weight = nn.Parameter(model.transformer.x_embedder.weight.detach() + 1)
    return "x_embedder.weight"


def adds_an_adapter(model: FluxModel, forward) -> str:
    model.transformer.add_adapter(LoraConfig(r=2, target_modules=["proj_out"]))
    return "proj_out"


@pytest.mark.parametrize("fault", [forgets_a_twin, forgets_a_projection, replaces_a_parameter, adds_an_adapter])
@pytest.mark.parametrize("name", ["fused", "fused fp8", "eager fp8"])
def test_a_copy_that_does_not_follow_ends_the_run(name: str, fault) -> None:
    model = small_flux()
    forward = FORWARDS[name][0](model)
    forward.refresh()
    tensor = fault(model, forward)
    move(model)
    with pytest.raises(RunError, match=f"the rollout copy does not follow the policy: .*{tensor}"):
        forward.refresh()


def test_weights_that_were_loaded_before_the_first_iteration_are_proven_there() -> None:
    """As on resume: the copy was built first, the checkpoint loaded then."""
    model = small_flux()
    forward = FORWARDS["fused"][0](model)
    move(model)
    forward.copy._twins = forward.copy._twins[:-1]
    forward.copy._sources = forward.copy._sources[:-1]
    with pytest.raises(RunError, match="does not follow the policy"):
        forward.refresh()


def test_not_a_number_is_equal_to_itself() -> None:
    model = small_flux()
    forward = FORWARDS["fused fp8"][0](model)
    move(model)
    with torch.no_grad():
        model.transformer.x_embedder.bias.fill_(torch.nan)
        model.transformer.transformer_blocks[0].attn.to_q.bias.fill_(torch.nan)
    forward.refresh()
    assert latents(model, 1).isfinite().all()


def test_adapters_that_bind_to_nothing_are_no_adapters() -> None:
    """Named layers without an adapter would be sampled, and trained, as the base."""
    model = small_flux()
    add = model.transformer.add_adapter
    model.transformer.add_adapter = lambda config: add(LoraConfig(r=config.r, target_modules=["to_q"]))
    with pytest.raises(InputError, match=r"model.lora_targets: no adapter was bound to .*attn.to_k"):
        add_lora(model.transformer, 2, 2.0, ["to_q", "to_k"])


def toy_run(**optimizer) -> Trainer:
    """Rollouts by a copy of the toy policy."""
    trainer = toy_trainer(toy_config(optimizer=optimizer))
    trainer.executor.rollout = CopyForward(trainer.model, trainer.executor.rollout_table, torch.float32)
    return trainer


def test_a_run_proves_its_copy_in_the_iteration_after_its_first_update() -> None:
    trainer, plain = toy_run(), toy_trainer(toy_config())
    trainer.iteration()
    assert not trainer.executor.rollout.copy._proven
    trainer.iteration()
    assert trainer.executor.rollout.copy._proven
    plain.iteration()
    plain.iteration()
    assert all(map(torch.equal, trainer.model.transformer.parameters(), plain.model.transformer.parameters()))


def test_a_run_that_moves_nothing_has_nothing_to_prove() -> None:
    trainer = toy_run(lr=0.0)
    for _ in range(3):
        trainer.iteration()
    assert not trainer.executor.rollout.copy._proven


def test_a_run_whose_rollouts_do_not_follow_ends_before_it_samples_with_them() -> None:
    trainer = toy_run()
    trainer.executor.rollout.copy._twins = []
    trainer.executor.rollout.copy._sources = []
    trainer.iteration()
    calls = len(trainer.model.calls)
    with pytest.raises(RunError, match=r"does not follow the policy: mix and 2 more differ"):
        trainer.iteration()
    assert len(trainer.model.calls) == calls
