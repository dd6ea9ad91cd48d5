"""The model's own noise levels against diffusers' schedulers and pipelines, and what samples at them."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from small_flux import small_flux
from stock_flux import initial_latents, recipe, stock_images
from torch import Tensor
from toy import ToyModel, toy_config, toy_trainer

from adagrpo.algorithm.sde import sigma_schedule
from adagrpo.assembly import build_table, replaced_levels
from adagrpo.build import build_model, build_trainer
from adagrpo.engine.plans import probe_plan
from adagrpo.errors import InputError
from adagrpo.models.schedule import own_levels, scheduler_levels
from adagrpo.tiny import tiny_flux_path

# As the folders on the Hub have them.
DEV = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
DEV |= {"base_image_seq_len": 256, "max_image_seq_len": 4096}
SCHNELL = DEV | {"use_dynamic_shifting": False, "shift": 1.0}
SD3 = {"num_train_timesteps": 1000, "shift": 3.0}
STEEP = DEV | {"base_image_seq_len": 16, "max_image_seq_len": 32}  # shift exp(0.5) at 16 tokens, exp(0.825) at 24
SIZES = [(512, 512), (1024, 1024), (768, 1344)]


def flux(scheduler: dict | None):
    model = small_flux()
    model.scheduler = scheduler
    return model


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheduler", [DEV, SCHNELL], ids=["dev", "schnell"])
def test_flux_samples_at_the_levels_of_the_stock_call(scheduler: dict, size: tuple[int, int]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for steps in (1, 4, 16, 28):
        stock = FlowMatchEulerDiscreteScheduler(**scheduler)
        stock.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(size[0] * size[1] // 256))
        found = own_levels(flux(scheduler), steps, *size)
        assert found.dtype is torch.float64 and found.shape == (steps + 1,)
        torch.testing.assert_close(found, stock.sigmas.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "shift"), [((512, 512), 1.8776), ((1024, 1024), 3.1582)])
def test_the_dynamic_shift_of_flux1_dev_is_a_number_per_size(size: tuple[int, int], shift: float) -> None:
    """0.5 + 0.65 (L - 256)/3840 is 0.63 for L = 1024 tokens and 1.15 for 4096; exp of that is the shift."""
    for steps in (4, 16):
        torch.testing.assert_close(own_levels(flux(DEV), steps, *size), sigma_schedule(steps, shift), atol=1e-5, rtol=0)
        torch.testing.assert_close(own_levels(flux(SCHNELL), steps, *size), sigma_schedule(steps, 1.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 10, 28])
def test_a_scheduler_that_is_handed_no_levels_has_its_own(steps: int) -> None:
    """SD3's: an even grid from 1 to the lowest shifted level of 1000, shifted once more."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    found = scheduler_levels(FlowMatchEulerDiscreteScheduler(**SD3), steps, None, 1024)
    stock = FlowMatchEulerDiscreteScheduler(**SD3)
    stock.set_timesteps(steps)
    torch.testing.assert_close(found, stock.sigmas.double(), atol=1e-6, rtol=0)
    low = 3e-3 / 1.002
    even = np.linspace(1, low, steps)
    np.testing.assert_allclose(found[:-1], 3 * even / (1 + 2 * even), atol=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (None, "random weights has no scheduler"),
        ({"_class_name": "UniPCMultistepScheduler"}, "of the model's UniPCMultistepScheduler are not known"),
        (DEV | {"invert_sigmas": True}, "invert_sigmas = true in the model's scheduler_config.json: its levels rise"),
        (DEV | {"use_karras_sigmas": True, "use_beta_sigmas": True}, "the model's scheduler cannot be made: Only one of"),
        (DEV | {"base_shift": None}, "the model's scheduler cannot be set up: "),
    ],
)
def test_schedulers_that_cannot_be_followed_are_refused(scheduler: dict | None, words: str) -> None:
    with pytest.raises(InputError, match=rf'^rollout\.shift = "model": .*{words}'):
        own_levels(flux(scheduler), 4, 64, 64)


# Whole recipes


def pipeline_folder(folder, guidance_embeds: bool, scheduler: dict):
    """tiny-flux's encoders around a transformer of random weights, in the layout of FLUX.1-schnell or -Krea-dev."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    pipeline = FluxPipeline.from_pretrained(tiny_flux_path(), torch_dtype=torch.float32)
    torch.manual_seed(0)
    settings = dict(pipeline.transformer.config) | {"guidance_embeds": guidance_embeds}
    pipeline.transformer = FluxTransformer2DModel.from_config(settings)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**scheduler)
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.mark.parametrize(("guidance", "scheduler"), [(False, SCHNELL), (True, DEV)], ids=["schnell", "krea"])
def test_relatives_of_flux1_dev_sample_as_the_stock_pipeline_and_train(guidance: bool, scheduler: dict, tmp_path) -> None:
    pipeline = pipeline_folder(tmp_path / "model", guidance, scheduler)
    config = recipe(model={"path": str(tmp_path / "model"), "guidance": 4.5}, rollout={"shift": "model"})
    trainer, _ = build_trainer(config)
    latents, rows = initial_latents(trainer), probe_plan(range(2), config.rollout.steps)
    final = trainer.executor.run(rows, latents, trainer.model.encode(["a red circle", "two blue squares"]), 0, "test").final
    ours = (trainer.model.decode(final) * 255).round().permute(0, 2, 3, 1).numpy().astype(int)
    assert abs(ours - stock_images(pipeline, config, latents)).max() <= 1
    assert torch.equal(trainer.executor.rollout_table.sigmas, pipeline.scheduler.sigmas[:-1])
    before = [p.detach().clone() for p in trainer.model.transformer.parameters()]
    assert float(trainer.iteration()["policy/ratio_deviation"]) <= 1e-6
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.transformer.parameters(), strict=True))
    assert trainer.notices.told_early() == []
    trainer, _ = build_trainer(dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, shift=3.0)))
    own = "1.5831" if guidance else "1"  # exp(0.5 - 0.65 * 240/3840) at 16 tokens
    told = f'rollout.shift = 3 replaces the model\'s own noise levels at 32x32, those of shift {own}; "model" takes them'
    assert trainer.notices.told_early() == [told]


def sampled_levels(trainer) -> dict[int, set[float]]:
    """Noise levels that the policy and a fused copy are evaluated at from now on, by the tokens of the picture."""
    model, seen = trainer.model, {}
    timestep = model.timestep

    def recorded(sigma: Tensor, dtype: torch.dtype) -> Tensor:
        seen.setdefault(model.latent_shape[0], set()).update(sigma.tolist())
        return timestep(sigma, dtype)

    model.timestep = recorded
    return seen


@pytest.mark.parametrize("forward", ["eager", "fused"])
def test_every_picture_size_has_its_levels(forward: str) -> None:
    rollout = {"steps": 6, "sde_steps": (0, 2), "group_size": 3, "shift": "model"}
    config = recipe(
        model={"path": "tiny-flux", "buckets": ("32x48", "32x32")},
        rollout=rollout,
        selection={"candidates": 2, "probe": "short", "probe_steps": 3},
        engine={"forward": forward, "cuda_graphs": True},
    )
    model = build_model(config.model)
    model.scheduler = STEEP
    trainer, _ = build_trainer(config, model=model)
    of = {
        16: {*sigma_schedule(6, math.exp(0.5))[:-1].tolist(), *sigma_schedule(3, math.exp(0.5))[:-1].tolist()},
        24: {*sigma_schedule(6, math.exp(0.825))[:-1].tolist(), *sigma_schedule(3, math.exp(0.825))[:-1].tolist()},
    }
    seen = sampled_levels(trainer)
    for _ in range(5):
        assert float(trainer.iteration()["policy/ratio_deviation"]) <= 1e-6
        assert model.latent_shape[0] == 16
        torch.testing.assert_close(trainer.executor.rollout_table.sigmas[1].item(), sigma_schedule(6, math.exp(0.5))[1].item())
    assert seen.keys() == of.keys()
    for tokens, levels in seen.items():
        assert all(min(abs(level - own) for own in of[tokens]) < 1e-6 for level in levels)
        assert all(min(abs(level - own) for level in levels) < 1e-6 for own in of[tokens])


def test_a_tables_rows_are_those_of_a_number() -> None:
    """So a plan needs no model; and shift 1 by a scheduler is shift 1 by the formula."""
    numbered = recipe(rollout={"shift": 1.0, "tail_steps": 2}, selection={"candidates": 2, "probe": "short", "probe_steps": 2})
    own = dataclasses.replace(numbered, rollout=dataclasses.replace(numbered.rollout, shift="model"))
    one, other = build_table(numbered, flux(None), (32, 32)), build_table(own, flux(SCHNELL), (32, 32))
    assert (one.tails, one.probe, one.num_steps) == (other.tails, other.probe, other.num_steps)
    assert torch.equal(one.position, other.position)
    for field in dataclasses.fields(one.steps):
        torch.testing.assert_close(getattr(one.steps, field.name), getattr(other.steps, field.name), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.history, other.history, atol=1e-5, rtol=1e-4)


def test_a_notice_is_told_only_where_levels_differ() -> None:
    config = recipe(rollout={"shift": 3.0})
    assert replaced_levels(config, flux(SCHNELL | {"shift": 3.0})) is None
    assert replaced_levels(config, flux(None)) is None and replaced_levels(config, ToyModel()) is None
    assert "which no shift describes" in replaced_levels(config, flux(SCHNELL | {"use_karras_sigmas": True}))
    sizes = dataclasses.replace(config, model=dataclasses.replace(config.model, height=512, width=512, buckets=("1024x1024",)))
    shifted = dataclasses.replace(sizes, rollout=dataclasses.replace(sizes.rollout, shift=math.exp(0.63)))
    assert "at 1024x1024, those of shift 3.1582" in replaced_levels(shifted, flux(DEV))


class OwnGrid(ToyModel):
    def schedule(self, steps: int, height: int, width: int) -> Tensor:
        return torch.linspace(0.9, 0, steps + 1)


def test_an_adapter_by_import_path_says_its_levels_or_is_refused() -> None:
    config = toy_config(rollout={"shift": "model"})
    trainer = toy_trainer(config, OwnGrid())
    assert trainer.executor.rollout_table.sigmas.tolist() == pytest.approx([0.9, 0.75, 0.6, 0.45, 0.3, 0.15])
    assert float(trainer.iteration()["policy/ratio_deviation"]) == 0
    with pytest.raises(InputError, match=r'rollout\.shift = "model": the model \(ToyModel\) has no method schedule'):
        toy_trainer(config)
