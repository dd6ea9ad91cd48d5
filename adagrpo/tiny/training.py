"""Seeded training loops of the recipe: the autoencoder, then text encoders and transformer together by flow matching."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from adagrpo.tiny.architecture import GUIDANCE, TEXT_LENGTH
from adagrpo.tiny.muon import Muon
from adagrpo.tiny.render import render
from adagrpo.tiny.scenes import split_specs

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxPipeline
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Recipe:
    """Iterations, batch sizes and learning rates; work is counted in iterations, so a build depends on no clock."""

    scenes: int = 48_000
    mix: tuple[tuple[str, float], ...] = (
        ("single", 0.10),
        ("count", 0.20),
        ("pair", 0.20),
        ("relation", 0.25),
        ("combination", 0.25),
    )
    vae_iterations: int = 2000
    vae_batch: int = 8
    vae_kl: float = 1e-6
    flow_iterations: int = 1700
    flow_batch: int = 128
    muon_rate: float = 0.02
    adamw_rate: float = 2e-3
    average: float = 0.998
    time_shift: float = 1.8
    evaluated: int = 100  # held-out prompts per category


@dataclass(frozen=True)
class Scenes:
    """Rendered training scenes: prompts and uint8 images of shape [scenes, 3, 32, 32]."""

    prompts: list[str]
    images: torch.Tensor


def render_scenes(recipe: Recipe, seed: int) -> Scenes:
    """Draw the recipe's number of training scenes, categories in the recipe's proportions, never a held-out one."""
    rng = np.random.default_rng(seed)
    names, shares = zip(*recipe.mix, strict=True)
    prompts, images = [], []
    for name in tqdm(rng.choice(names, recipe.scenes, p=shares), "scenes", disable=None, mininterval=1):
        specs = split_specs(str(name), held_out=False)
        spec = specs[rng.integers(len(specs))]
        prompts.append(spec.prompt)
        images.append(render(spec, rng))
    return Scenes(prompts, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous())


def train_vae(vae: AutoencoderKL, images: torch.Tensor, recipe: Recipe, seed: int) -> list[float]:
    """Fit the autoencoder to uint8 images [N, 3, 32, 32] in place and set its latent scale and shift.

    Returns the loss, averaged over each hundredth of the run.
    """
    vae.train().to(memory_format=torch.channels_last)
    inner = [p for name, p in vae.named_parameters() if p.ndim == 4 and "conv_in" not in name and "conv_out" not in name]
    update = _Update(vae.parameters(), inner, recipe, recipe.vae_iterations, decay_share=0.6)
    noise = torch.Generator().manual_seed(seed)
    batches = _batches(len(images), recipe.vae_batch, recipe.vae_iterations, seed)
    losses = []
    for index in tqdm(batches, "autoencoder", recipe.vae_iterations, disable=None, mininterval=1):
        target = _to_signed(images[index]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(target).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample(noise)).sample, target) + recipe.vae_kl * posterior.kl().mean()
        update(loss)
        losses.append(loss.item())
    vae.eval().to(memory_format=torch.contiguous_format)
    latents = encode(vae, images[:2048], normalise=False)
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return _summary(losses)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, normalise: bool = True) -> torch.Tensor:
    """uint8 images [N, 3, 32, 32] -> float32 latents [N, 4, 8, 8], of zero mean and unit deviation if normalised."""
    latents = torch.cat([vae.encode(_to_signed(part)).latent_dist.mode() for part in images.split(256)])
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor if normalise else latents


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """uint8 images [N, 3, 32, 32] -> their reconstructions, float32 in [0, 1]."""
    outputs = [vae.decode(vae.encode(_to_signed(part)).latent_dist.mode()).sample for part in images.split(256)]
    return (torch.cat(outputs) / 2 + 0.5).clamp(0, 1)


def psnr(outputs: torch.Tensor, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of outputs in [0, 1] against uint8 images of the same shape."""
    return -10 * math.log10(F.mse_loss(outputs, images / 255).item())


def train_flow(pipe: FluxPipeline, prompts: Sequence[str], latents: torch.Tensor, recipe: Recipe, seed: int) -> list[float]:
    """Fit transformer and text encoders in place to normalised latents [N, 4, 8, 8] and their prompts.

    x_t = (1 - t) clean + t noise, target velocity = noise - clean; t is logit-normal and shifted towards noise. The
    modules end with the running average of their weights. Returns the loss, averaged over each hundredth of the run.
    """
    clip_ids, t5_ids = token_ids(pipe.tokenizer, prompts), token_ids(pipe.tokenizer_2, prompts)
    packed = pipe._pack_latents(latents, *latents.shape)
    image_ids = pipe._prepare_latent_image_ids(1, latents.shape[2] // 2, latents.shape[3] // 2, "cpu", torch.float32)
    text_ids, guidance = torch.zeros(TEXT_LENGTH, 3), torch.full((recipe.flow_batch,), GUIDANCE)
    modules = nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).train()
    inner = [p for name, p in pipe.transformer.named_parameters() if "transformer_blocks" in name and p.ndim == 2]
    update = _Update(modules.parameters(), inner, recipe, recipe.flow_iterations, decay_share=0.4)
    average = [parameter.detach().clone() for parameter in modules.parameters()]
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(len(packed), recipe.flow_batch, recipe.flow_iterations, seed)
    losses = []
    for step, index in enumerate(tqdm(batches, "flow matching", recipe.flow_iterations, disable=None, mininterval=1)):
        clean = packed[index]
        noise = torch.randn(clean.shape, generator=generator)
        time = torch.randn(len(index), generator=generator).sigmoid()
        time = recipe.time_shift * time / (1 + (recipe.time_shift - 1) * time)
        velocity = pipe.transformer(
            hidden_states=torch.lerp(clean, noise, time[:, None, None]),
            timestep=time,
            guidance=guidance,
            pooled_projections=pipe.text_encoder(clip_ids[index]).pooler_output,
            encoder_hidden_states=pipe.text_encoder_2(t5_ids[index])[0],
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample
        loss = F.mse_loss(velocity, noise - clean)
        update(loss)
        keep = min(recipe.average, step / (step + 10))
        torch._foreach_lerp_(average, list(modules.parameters()), 1 - keep)
        losses.append(loss.item())
    with torch.no_grad():
        for parameter, value in zip(modules.parameters(), average, strict=True):
            parameter.copy_(value)
    modules.eval()
    return _summary(losses)


def token_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> torch.Tensor:
    """Prompts -> int64 token ids [N, 12], padded as the stock pipeline pads them."""
    encoded = tokenizer(list(prompts), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    return encoded.input_ids


class _Update:
    """One optimizer step: Muon for the inner matrices, AdamW for the rest, warm-up, then a linear decay to zero."""

    def __init__(
        self,
        parameters: Iterator[nn.Parameter],
        inner: list[nn.Parameter],
        recipe: Recipe,
        iterations: int,
        decay_share: float,
    ) -> None:
        known = {id(parameter) for parameter in inner}
        self.rest = [parameter for parameter in parameters if id(parameter) not in known]
        adamw = torch.optim.AdamW(self.rest, lr=recipe.adamw_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.optimizers: list[torch.optim.Optimizer] = [Muon(inner, lr=recipe.muon_rate), adamw]
        factor = _ramp(iterations, decay_share)
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in self.optimizers]

    def __call__(self, loss: torch.Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.rest, 1.0)  # Muon's step does not depend on the gradient's length
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()


def _to_signed(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


def _batches(total: int, size: int, iterations: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order, at = torch.randperm(total, generator=generator), 0
    for _ in range(iterations):
        if at + size > total:
            order, at = torch.randperm(total, generator=generator), 0
        yield order[at : at + size]
        at += size


def _ramp(iterations: int, decay_share: float, warmup: int = 20) -> Callable[[int], float]:
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup, (iterations - step) / (decay_share * iterations))

    return factor


def _summary(losses: Sequence[float]) -> list[float]:
    size = max(1, len(losses) // 100)
    return [round(float(np.mean(losses[at : at + size])), 5) for at in range(0, len(losses), size)]
