"""Pictures with text, drawn by Pillow in its own font."""

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def drawn(text: str, side: int, ink: str = "black", paper: str = "white", width: float = 0.9) -> Tensor:
    """uint8 [3, side, side]: one line in the middle, as large as ``width`` of the picture's width allows."""
    picture = Image.new("RGB", (side, side), paper)
    draw = ImageDraw.Draw(picture)
    size = next(size for size in range(side, 0, -1) if draw.textlength(text, ImageFont.load_default(size)) <= width * side)
    draw.text((side / 2, side / 2), text, ink, ImageFont.load_default(size), anchor="mm")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(side, side, 3).permute(2, 0, 1).contiguous()
