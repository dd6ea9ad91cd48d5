"""The FLUX adapter against the stock diffusers pipeline, on real checkpoints."""

import dataclasses
from pathlib import Path

import pytest
import torch
from stock_flux import PROMPTS, initial_latents, recipe, stock_images

from adagrpo.algorithm.sde import Stream, sigma_schedule
from adagrpo.algorithm.tables import rollout_table
from adagrpo.build import build_model, build_trainer
from adagrpo.engine.plans import probe_plan
from adagrpo.errors import InputError
from adagrpo.forward.forwards import PolicyForward
from adagrpo.models.fused_flux import FusedFluxForward
from adagrpo.models.making import load_policy
from adagrpo.models.pipeline import Source
from adagrpo.models.policy import Policy, Settings, add_lora
from adagrpo.models.registry import FLUX
from adagrpo.recipe.load import load_recipe
from adagrpo.tiny import tiny_flux_path


def load(folder: Path, width: int = 32, prompt_cache: int = 512) -> Policy:
    settings = Settings(torch.float32, torch.device("cpu"), 32, width, 12, prompt_cache=prompt_cache)
    return load_policy(FLUX, Source(str(folder)), settings)


def test_models_without_guidance_embedding(tmp_path) -> None:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    pipeline = FluxPipeline.from_pretrained(tiny_flux_path(), torch_dtype=torch.float32)
    settings = dict(pipeline.transformer.config) | {"guidance_embeds": False}
    torch.manual_seed(0)
    pipeline.transformer = FluxTransformer2DModel.from_config(settings)
    pipeline.save_pretrained(tmp_path / "schnell")
    config = recipe(model={"path": str(tmp_path / "schnell")})
    trainer, _ = build_trainer(config)
    latents = initial_latents(trainer)
    plan = probe_plan(range(2), config.rollout.steps)
    final = trainer.executor.run(plan, latents, trainer.model.encode(PROMPTS), 0, "test").final
    ours = (trainer.model.decode(final) * 255).round().permute(0, 2, 3, 1).numpy().astype(int)
    assert abs(ours - stock_images(pipeline, config, latents)).max() <= 1


def test_velocity_follows_the_stock_rounding_of_the_timestep_in_bf16() -> None:
    """The stock pipeline rounds t in [0, 1000] to bf16 before dividing; the adapter must feed the same value."""
    model = build_model(dataclasses.replace(load_recipe("tiny").model, dtype="bf16"))
    seen = {}
    forward = model.transformer.forward
    model.transformer.forward = lambda **kwargs: seen.update(kwargs) or forward(**kwargs)
    x = torch.zeros(1, *model.latent_shape)
    model.velocity(x, torch.tensor([0.97826]), model.encode(PROMPTS[:1]))
    assert torch.equal(seen["timestep"], torch.tensor([978.26]).to(torch.bfloat16) / 1000)
    assert seen["hidden_states"].dtype is torch.bfloat16


def test_timesteps_that_are_truncated() -> None:
    """1000 sigma of 923.08 and 964.29 are 923 and 964; of 875 it stays."""
    model = build_model(dataclasses.replace(load_recipe("tiny").model, timestep="truncated"))
    sigmas = sigma_schedule(10, 3.0)[1:4].float()
    assert (model.timestep(sigmas, torch.float32) * 1000).round(decimals=3).tolist() == [964, 923, 875]


def test_the_released_rounding_of_the_timestep_reaches_every_forward() -> None:
    """bf16(sigma): at 5 of the 16 official noise levels it differs from the pipelines', by 2 to 4 of 1000."""
    config = load_recipe("tiny").model
    stock, theirs = (build_model(dataclasses.replace(config, timestep=timestep)) for timestep in ("pipeline", "bf16"))
    sigmas = sigma_schedule(16, 3.0)[:-1].float()
    seen_by = [(model.timestep(sigmas, torch.bfloat16) * 1000).double() for model in (theirs, stock)]  # as transformers do it
    differ = (seen_by[0] - seen_by[1]).abs()
    assert (differ > 0).sum() == 5 and set(differ[differ > 0].tolist()) <= {2.0, 4.0}
    table = rollout_table(sigma_schedule(16, 3.0), "flow", 0.7).to(theirs.device, torch.float32)
    x, index = torch.randn(1, *theirs.latent_shape, generator=torch.Generator().manual_seed(0)), int(differ.argmax())
    seen = {}
    forward = theirs.transformer.forward
    theirs.transformer.forward = lambda **kwargs: seen.update(kwargs) or forward(**kwargs)
    at = (torch.tensor([index]), torch.tensor([0]))
    with torch.no_grad():
        velocities = [
            built.velocity(x, at[0], built.prepare(model.encode(PROMPTS[:1])), at[1])
            for model in (theirs, stock)
            for built in (PolicyForward(model, table), FusedFluxForward(model, table, torch.float32))
        ]
    assert torch.equal(seen["timestep"], sigmas[index : index + 1].to(torch.bfloat16).float())
    policy, fused, other, other_fused = velocities
    gap = float((policy - other).norm())
    assert gap > 0
    assert float((policy - fused).norm()) < 0.1 * gap and float((other - other_fused).norm()) < 0.1 * gap


def test_prompt_cache_is_bounded_and_exact() -> None:
    model = load(tiny_flux_path(), prompt_cache=2)
    first = model.encode(["a red circle", "two blue squares", "a green cross"])
    assert len(model.encoder._cache) == 2
    again = model.encode(["a green cross", "a red circle"])
    for name, tensor in again.tensors.items():
        assert torch.equal(tensor, first.tensors[name][[2, 0]])
    assert not torch.equal(first.tensors["prompt_embeds"][0], first.tensors["prompt_embeds"][1])


def test_gradient_checkpointing_changes_nothing() -> None:
    weights = []
    for checkpointing in (False, True):
        trainer, _ = build_trainer(recipe(model={"gradient_checkpointing": checkpointing}))
        trainer.iteration()
        weights.append([p.detach().clone() for _, p in trainer.model.trainable()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_reference_is_the_initial_policy(tuning: str) -> None:
    trainer, _ = build_trainer(recipe(model={"tuning": tuning}, optimizer={"lr": 1e-2}))
    model = trainer.model
    model.keep_reference()
    x, sigma = trainer.executor.initial_noise(torch.arange(2), 0, Stream.SAMPLE), torch.tensor([0.9, 0.5])
    text = model.encode(PROMPTS)
    with torch.no_grad():
        before = model.velocity(x, sigma, text)
    trainer.iteration()
    trainer.iteration()
    with torch.no_grad():
        after = model.velocity(x, sigma, text)
        with model.reference():
            reference = model.velocity(x, sigma, text)
        assert torch.equal(model.velocity(x, sigma, text), after)
    assert torch.equal(reference, before) and not torch.equal(after, before)


def test_bad_models_are_named(tmp_path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "missing")
    with pytest.raises(InputError, match=r"model_index\.json"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(InputError, match=r"model_index\.json cannot be read"):
        load(tmp_path)
    with pytest.raises(InputError, match="multiples of 8"):
        load(tiny_flux_path(), width=36)
    model = load(tiny_flux_path())
    with pytest.raises(InputError, match=r"attn\.to_z"):
        add_lora(model.transformer, 4, 4.0, ["attn.to_q", "attn.to_z"])
    with pytest.raises(InputError, match="missing; name a checkpoint"):
        model.load_portable(tmp_path)


@pytest.mark.parametrize(("dtype", "storage"), [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
def test_on_policy_ratio_of_a_real_transformer(dtype: str, storage: str) -> None:
    trainer, _ = build_trainer(recipe(model={"dtype": dtype}, rollout={"storage": storage}))
    assert float(trainer.iteration()["policy/ratio_deviation"]) <= 1e-6
