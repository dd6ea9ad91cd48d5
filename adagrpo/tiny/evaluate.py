"""How well a tiny-flux folder draws the held-out prompts, through the stock diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adagrpo.tiny.architecture import GUIDANCE, TEXT_LENGTH
from adagrpo.tiny.prompts import category, held_out_prompts
from adagrpo.tiny.render import IMAGE_SIZE
from adagrpo.tiny.reward import inspect
from adagrpo.tiny.scenes import CATEGORIES

if TYPE_CHECKING:
    from diffusers import FluxPipeline

_BATCH = 50


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and notes of diffusers and transformers while a folder is read or written."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def load(folder: Path) -> FluxPipeline:
    """A tiny-flux folder as a stock `FluxPipeline` in float32, quiet and without progress bars.

    Raises `FileNotFoundError` where the folder holds no pipeline.
    """
    if not (Path(folder) / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} is no pipeline folder: it has no model_index.json")
    from diffusers import FluxPipeline

    with quiet():
        pipe = FluxPipeline.from_pretrained(folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: FluxPipeline, prompts: list[str], steps: int, seed: int) -> torch.Tensor:
    """Draw one picture per prompt by the stock call: float32 [N, 3, 32, 32] in [0, 1], seeded Gaussian noise."""
    generator = torch.Generator().manual_seed(seed)
    pictures = [
        pipe(
            prompt=prompts[at : at + _BATCH],
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            max_sequence_length=TEXT_LENGTH,
            generator=generator,
            output_type="pt",
        ).images
        for at in range(0, len(prompts), _BATCH)
    ]
    return torch.cat(pictures).float()


def evaluate(folder: Path, prompts_per_category: int = 60, steps: int = 8, seed: int = 0) -> dict[str, Any]:
    """Sample held-out prompts from a folder and score them.

    Returns `reward` and `exact` (share of pictures with everything right), each a dict of the five categories and
    `all` (their mean), with `steps`, `prompts_per_category` and `seed`. Raises `ValueError` for more prompts than
    there are, `FileNotFoundError` for a folder without a pipeline.
    """
    prompts = held_out_prompts(prompts_per_category * len(CATEGORIES))
    verdicts = inspect(sample(load(folder), prompts, steps, seed), prompts)
    return {
        "steps": steps,
        "prompts_per_category": prompts_per_category,
        "seed": seed,
        "reward": _by_category(prompts, [verdict.reward for verdict in verdicts]),
        "exact": _by_category(prompts, [verdict.exact for verdict in verdicts]),
    }


def _by_category(prompts: list[str], values: list[float] | list[bool]) -> dict[str, float]:
    names = np.array([category(prompt) for prompt in prompts])
    means = {name: float(np.mean(np.asarray(values, dtype=float)[names == name])) for name in CATEGORIES}
    return {name: round(mean, 4) for name, mean in (means | {"all": float(np.mean(list(means.values())))}).items()}
