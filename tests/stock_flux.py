"""Short recipes of `tiny`, and what the stock pipeline makes of the same latents."""

import dataclasses

import numpy as np
import torch

from adagrpo.algorithm.sde import Stream
from adagrpo.engine.plans import probe_plan
from adagrpo.recipe.load import load_recipe

PROMPTS = ["a red circle", "two blue squares"]


def recipe(**sections):
    """`tiny`, cut down to two quick iterations; keyword ``model={...}`` changes single keys."""
    small = {
        "train": {"iterations": 2, "slots": 2},
        "rollout": {"steps": 4, "sde_steps": (0, 1), "group_size": 3},
        "selection": {"candidates": 2},
        "evaluation": {"every": 0, "final_prompts": 0},
        "output": {"grid_every": 0, "checkpoint_every": 0},
    }
    config = load_recipe("tiny")
    for section in {**small, **sections}:
        changes = {**small.get(section, {}), **sections.get(section, {})}
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
    return config


def stock_images(pipeline, config, latents: torch.Tensor) -> np.ndarray:
    """What the stock pipeline makes of the same latents, 8-bit."""
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        prompt=PROMPTS,
        height=config.model.height,
        width=config.model.width,
        num_inference_steps=config.rollout.steps,
        guidance_scale=config.model.guidance,
        max_sequence_length=config.model.max_text_tokens,
        latents=latents,
        output_type="pil",
    )
    return np.stack([np.asarray(image) for image in out.images]).astype(int)


def initial_latents(trainer) -> torch.Tensor:
    plan = probe_plan(range(len(PROMPTS)), trainer.executor.num_steps)
    return trainer.executor.initial_noise(plan.noise_row, 0, Stream.SAMPLE)
