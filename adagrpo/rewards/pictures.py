"""Images as bytes: 8 bits a value, JPEG and PNG."""

from __future__ import annotations

import io

import numpy
import torch
from torch import Tensor

KINDS = ("png", "jpeg")
JPEG_QUALITY = 95


def encoded(image: Tensor, kind: str) -> bytes:
    """An image, uint8 [3, H, W] on the CPU, as a ``png`` (lossless) or a ``jpeg`` (quality 95) file."""
    from PIL import Image

    file = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture.save(file, "PNG", compress_level=1) if kind == "png" else picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def decoded(content: bytes, longest: int) -> Tensor:
    """The image, uint8 [3, H, W], in a PNG or JPEG file of at most ``longest`` pixels a side; its size is read first.

    Raises:
        ValueError: no such file.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as picture:
            if max(picture.size) > longest:
                raise ValueError(f"{picture.width} x {picture.height} pixels; at most {longest} a side")
            if picture.mode[0] in "IF":
                raise ValueError(
                    f"mode {picture.mode}: more than 8 bits a value, of which converting would cut the upper ones off"
                )
            return torch.from_numpy(numpy.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a PNG or JPEG file ({error})") from error
