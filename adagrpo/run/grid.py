"""Sample grids: pictures with prompt and reward printed under each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 192
MARGIN = 8
LINE = 15


def to_pil(image: Tensor) -> Image.Image:
    """An 8-bit picture from [3, H, W] in [0, 1], rounded as diffusers rounds."""
    array = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def save_grid(path: Path, images: Tensor, prompts: Sequence[str], rewards: Sequence[float], columns: int = 5) -> None:
    """Write a PNG of all ``images`` [N, 3, H, W] with captions; small images are enlarged without smoothing."""
    font = ImageFont.load_default(size=12)
    captions = [textwrap.wrap(prompt, 30)[:3] for prompt in prompts]
    rows = -(-len(prompts) // columns)
    columns = min(columns, len(prompts))
    height = CELL + MARGIN + LINE * (max(map(len, captions)) + 1)
    sheet = Image.new("RGB", (columns * (CELL + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        left, top = MARGIN + i % columns * (CELL + MARGIN), MARGIN + i // columns * (height + MARGIN)
        picture = to_pil(image)
        smoothing = Image.Resampling.NEAREST if picture.width < CELL else Image.Resampling.LANCZOS
        side = CELL / max(picture.size)
        picture = picture.resize((round(picture.width * side), round(picture.height * side)), smoothing)
        sheet.paste(picture, (left, top))
        draw.text((left, top + CELL + 3), f"reward {rewards[i]:.2f}", fill=(40, 40, 40), font=font)
        for j, line in enumerate(captions[i]):
            draw.text((left, top + CELL + 3 + LINE * (j + 1)), line, fill=(90, 90, 90), font=font)
    sheet.save(path)
