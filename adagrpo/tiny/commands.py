"""What `adagrpo tiny` does: make the model, list prompts, score pictures. Plain functions that print."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from adagrpo.disk.lock import holding_new
from adagrpo.prompts.prompt import data_of
from adagrpo.tiny.prompts import UNLEARNABLE, category, held_out_prompts, training_prompts
from adagrpo.tiny.render import IMAGE_SIZE
from adagrpo.tiny.reward import Verdict, inspect
from adagrpo.tiny.scenes import CATEGORIES, parse_prompt

LARGEST = 4096


def build_command(out: Path, seed: int = 0) -> None:
    """Train tiny-flux into a new folder (about 12 minutes on two cores) and print its rewards.

    Raises `InputError` where something is in the folder, or another process has it.
    """
    from adagrpo.tiny.build import build

    with holding_new(Path(out), "tiny build", str(out)):
        log = build(Path(out), seed)
    print(f"wrote {out}: {log['bytes'] / 1e6:.1f} MB in {sum(log['seconds'].values()) / 60:.1f} min")
    print(f"autoencoder: {log['vae']['psnr']:.1f} dB")
    print("\t".join(["reward", *CATEGORIES, "all"]))
    for result in log["evaluation"]:
        print("\t".join([f"{result['steps']} steps", *(f"{result['reward'][name]:.3f}" for name in (*CATEGORIES, "all"))]))


def prompts_command(mix: str = "even", count: int | None = None, held_out: bool = False) -> None:
    """Print prompts, one a line: category, tab, prompt, and a tab and `unlearnable` where it is.

    The first `count` of the mix's pool, which repeats where more are asked for, or of the held-out prompts. Raises
    `ValueError` for an unknown mix or a count that cannot be met.
    """
    if held_out:
        prompts = held_out_prompts(count)
    else:
        pool = training_prompts(mix)
        if count is not None and count < 1:
            raise ValueError(f"count must be 1 or more, got {count}")
        prompts = list(islice(cycle(pool), len(pool) if count is None else count))
    for prompt in prompts:
        print(f"{category(prompt)}\t{prompt}" + f"\t{UNLEARNABLE}" * (UNLEARNABLE in data_of(prompt)))


def score_command(paths: Sequence[Path], prompt: str) -> None:
    """Print the reward of each picture for the prompt and what was found in it.

    Pictures of another size are averaged down to 32x32. Raises `ValueError` for no picture, an unreadable one or a
    prompt that is not of the tiny world, `FileNotFoundError` for a missing file.
    """
    if not paths:
        raise ValueError("no picture to score: name one or more PNG files")
    parse_prompt(prompt)
    for path in paths:
        (verdict,) = inspect(_read(Path(path)), [prompt])
        print(f"{path}\t{verdict.reward:.3f}\t{'exact' if verdict.exact else 'not exact'}\t{_found(verdict)}")


def _read(path: Path) -> torch.Tensor:
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"no picture at {path}: check the path")
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            sound = IMAGE_SIZE <= width == height <= LARGEST
            pixels = np.asarray(picture.convert("RGB")) if sound else np.empty(0)
    except Exception as error:  # Pillow's readers raise types of many kinds
        raise ValueError(f"cannot read {path} as a picture ({error}): give a PNG file") from None
    if not sound:
        raise ValueError(f"{path} is {width}x{height}: give a square picture of {IMAGE_SIZE} to {LARGEST} pixels")
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255


def _found(verdict: Verdict) -> str:
    things = [f"{item.colour or 'uncoloured'} {item.shape} at ({item.x:.0f}, {item.y:.0f})" for item in verdict.objects]
    return ", ".join(things) or "nothing"
