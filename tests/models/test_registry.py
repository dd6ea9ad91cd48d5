"""The registry's rows against the libraries they speak of, and what a family that has less is refused."""

import dataclasses
import inspect
import types

import pytest
import torch
from small_flux import small_flux, table_of
from torch import nn
from toy import ToyModel, toy_config

from adagrpo.errors import InputError
from adagrpo.forward import backends
from adagrpo.models.making import meta_policy
from adagrpo.models.policy import Policy, Settings
from adagrpo.models.registry import FAMILIES, FLUX, SD3, Family, attribute, family_of
from adagrpo.models.schedule import own_levels
from adagrpo.recipe.keys import EngineConfig, ModelConfig
from adagrpo.recipe.rules import check

META = Settings(torch.bfloat16, torch.device("meta"), 64, 64, 8)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_a_row_speaks_of_what_the_libraries_have(family: Family) -> None:
    adapter = attribute(family.adapter)
    assert issubclass(adapter, Policy) and adapter.family is family
    takes = inspect.signature(family.pipeline_class.__init__).parameters
    assert {*(c.name for c in family.components), *family.tokenizers} <= takes.keys()
    assert set(family.tokenizers.values()) <= {c.name for c in family.components if c.library == "transformers"}
    for path in family.architectures:
        model = meta_policy(family, path, META)
        layers = [name for name, module in model.transformer.named_modules() if isinstance(module, nn.Linear)]
        assert all(any(name.endswith(f".{target}") for name in layers) for target in family.lora_targets)
        kinds = {type(m).__name__ for m in model.transformer.modules()}
        assert set(family.repeated_blocks) <= kinds
        assert model.transformer._repeated_blocks in ([], list(family.repeated_blocks))
        conditioning = model.encode(["a", "b"])
        assert tuple(conditioning.tensors) == family.text_keys
        x = torch.empty(2, *model.latent_shape, device="meta")
        assert model.velocity(x, torch.empty(2, device="meta"), conditioning).shape == x.shape
        assert own_levels(model, 4, 64, 64).shape == (5,)


def test_blocks_are_those_that_diffusers_repeats() -> None:
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    assert list(FLUX.repeated_blocks) == FluxTransformer2DModel._repeated_blocks
    assert not SD3Transformer2DModel._repeated_blocks and list(SD3.repeated_blocks) == SD3Transformer2DModel._no_split_modules


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_attention_is_said_to_change_where_diffusers_changes_it(family: Family) -> None:
    """``set_attention_backend`` passes over processors that have no backend, and says nothing."""
    path = next(path for path in family.architectures if path.startswith("random:"))
    transformer = meta_policy(family, path, META).transformer
    processors = [m.processor for m in transformer.modules() if hasattr(m, "processor")]
    assert {hasattr(processor, "_attention_backend") for processor in processors} == {family.attention}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Family:
    """A second family beside FLUX, without any forward but the policy's own."""
    for name in FAMILIES.keys() - {FLUX.name}:
        monkeypatch.delitem(FAMILIES, name)
    row = dataclasses.replace(FLUX, name="plain", title="Plain", fused="", fp8=False, repeated_blocks=())
    monkeypatch.setitem(FAMILIES, row.name, row)
    return row


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"forward": "fused"}, "engine.forward = fused: Plain models have auto, eager"),
        ({"forward": "compile"}, "engine.forward = compile: Plain"),
        ({"precision": "fp8"}, "engine.precision = fp8: .* Plain models"),
    ],
)
def test_what_a_family_lacks_is_refused_before_anything_is_loaded(plain: Family, engine: dict, words: str) -> None:
    config = toy_config(engine=EngineConfig(**engine))
    check(config)
    with pytest.raises(InputError, match=words):
        check(dataclasses.replace(config, model=ModelConfig(family="plain")))


def test_a_second_family_is_named_where_the_first_was(plain: Family) -> None:
    with pytest.raises(InputError, match=r"model\.family = plian: must be one of flux, plain, or .*did you mean plain"):
        check(toy_config(model={"family": "plian"}))
    with pytest.raises(InputError, match=r"it needs model\.family = flux or plain"):
        check(toy_config(model={"family": "parts:model"}, engine=EngineConfig(forward="compile")))


def test_forwards_follow_the_models_own_row(plain: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_flux()
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(backends, "forward_problem", lambda name, device: None)
    assert backends.resolve_forward("auto", model) == "compile"
    monkeypatch.setattr(type(model), "family", plain)
    assert backends.resolve_forward("auto", model) == "eager"


def test_a_family_without_a_forward_of_our_own_says_so(plain: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_flux()
    monkeypatch.setattr(type(model), "family", plain)
    with pytest.raises(InputError, match=r"engine\.forward = fused: there is none for this model"):
        backends.make_copy(model, table_of(model), "fused", None)


def test_an_adapter_by_import_path_is_of_no_family() -> None:
    """Whatever its attributes are called."""
    assert family_of(small_flux()) is FLUX and family_of(ToyModel()) is None
    assert family_of(types.SimpleNamespace(family="flux")) is None
    with pytest.raises(InputError, match=r"act on FLUX.* models only"):
        backends.build_forward(ToyModel(), None, "fused")
