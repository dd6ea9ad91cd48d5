"""Preprocessing of images on their device, as the reward models' own code does it on the host with Pillow or torchvision.

Published rewards see 8-bit pictures, resized in ways that differ: what a model was tuned on is what it has to be shown. Images
are [N, 3, H, W]; sizes are (height, width). Grey levels are whole numbers 0 .. 255 held in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Size = tuple[int, int]
Window = tuple[tuple[int, int], tuple[int, int]]
"""Rows and columns of an image: (first, how many) of each."""
Way = Literal["pil", "bicubic", "bilinear"]
Rounding = Literal["down", "even"]

_BLOCK = 32  # places of an axis computed from what lies around them
_IMAGES = 8  # resized at once on an accelerator: their fp64 copy takes 0.2 GB at 1024 pixels; a CPU's caches hold no two

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def grey_levels(images: Tensor) -> Tensor:
    """Nearest 8-bit levels of images in [0, 1], float32; uint8 images are levels already. NaN stays NaN."""
    if images.dtype == torch.uint8:
        return images.float()
    return (images.float() * 255).round().clamp(0, 255)


def pil_resize(levels: Tensor, size: Size, window: Window | None = None) -> Tensor:
    """Grey levels [N, 3, H, W] -> [N, 3, *size], as Pillow's ``Image.resize`` with ``BICUBIC``, level for level.

    Of a ``window`` of the resized image nothing else is worked out: the middle of a strip costs no more than that of a square.

    Pillow resizes one axis after the other and rounds to 8 bits after each: the width first, but the height first where a
    picture more than twice as high as wide loses height. Its weights are whole multiples of 2^-22, so sums of weighted levels
    are exact in fp64, in whatever order a device adds them.
    """
    at_once = 1 if levels.device.type == "cpu" else _IMAGES
    window = window or ((0, size[0]), (0, size[1]))
    return torch.cat([_pil_resize(part, size, window) for part in levels.split(at_once)])


def _pil_resize(levels: Tensor, size: Size, window: Window) -> Tensor:
    height, width = levels.shape[2:]
    axes = (2, 3) if height > 2 * width and size[0] < height else (3, 2)
    for axis in axes:
        before, after, (first, count) = levels.shape[axis], size[axis - 2], window[axis - 2]
        if before == after:
            levels = levels.narrow(axis, first, count)
        else:
            exact = levels.double()
            sums = [
                weights @ exact[:, :, start:stop] if axis == 2 else exact[..., start:stop] @ weights.T
                for start, stop, weights in _pil_weights(before, after, first, count, levels.device)
            ]
            levels = (torch.cat(sums, axis) + 0.5).floor_().clamp_(0, 255).float()
    return levels


@lru_cache(maxsize=32)
def _pil_weights(before: int, after: int, begin: int, count: int, device: torch.device) -> list[tuple[int, int, Tensor]]:
    """Keys' cubic filter (a = -1/2), stretched where an axis shrinks, as Pillow rounds it.

    Of each block of ``count`` places after, from ``begin`` on: the first place before that it needs, the one behind the last,
    fp64 [block, last - first].
    """
    scale = before / after
    stretch = max(scale, 1.0)
    place = torch.arange(before, dtype=torch.float64)
    centre = ((torch.arange(begin, begin + count, dtype=torch.float64) + 0.5) * scale)[:, None]
    within = (place >= (centre - 2 * stretch + 0.5).trunc()) & (place < (centre + 2 * stretch + 0.5).trunc())
    x = ((place - centre + 0.5) * (1 / stretch)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0)) * within
    fixed = weights / weights.sum(1, keepdim=True) * 2**22
    blocks = ((fixed.abs() + 0.5).floor() * fixed.sign() / 2**22).split(_BLOCK)
    needed = [block.any(0).nonzero()[:, 0].tolist() for block in blocks]
    spans = [(places[0], places[-1] + 1) for places in needed]
    return [(first, last, block[:, first:last].to(device)) for block, (first, last) in zip(blocks, spans, strict=True)]


def shorter_side(size: Size, target: int) -> Size:
    """The size of an image whose shorter side becomes ``target``; the other is rounded down (torchvision, transformers)."""
    short = min(size)
    return target * size[0] // short, target * size[1] // short


def middle(outer: Size, size: Size, rounding: Rounding) -> Window:
    """The middle of ``outer``, which is at least ``size`` large.

    An odd margin is shared out by ``rounding``: ``down`` leaves the smaller part above and to the left (transformers),
    ``even`` the even part (torchvision, by Python's ``round``).
    """
    margins = (outer[0] - size[0], outer[1] - size[1])
    top, left = (round(margin / 2) if rounding == "even" else margin // 2 for margin in margins)
    return (top, size[0]), (left, size[1])


def center_crop(images: Tensor, size: Size, rounding: Rounding) -> Tensor:
    """The ``middle`` of images [N, C, H, W]."""
    (top, height), (left, width) = middle((images.shape[2], images.shape[3]), size, rounding)
    return images[:, :, top : top + height, left : left + width]


class Normalise(nn.Module):
    """(images - mean) / std, of images in [0, 1] by channel; float32, on the device of its images."""

    mean: Tensor  # [1, 3, 1, 1]
    std: Tensor

    def __init__(self, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.mean.device != images.device:
            self.to(images.device)
        return (images - self.mean) / self.std


class Preprocess(Normalise):
    """Images in [0, 1] -> normalised pixel values [N, 3, *crop] float32.

    Args:
        size: of the shorter side before the crop; a pair is the size itself, whatever the proportions.
        crop: size cut from the middle; None for none.
        mean, std: by channel.
        way: of resizing. ``pil``: 8-bit, by ``pil_resize``. ``bicubic``: of 8-bit images in floating point, both axes at once,
            without bounds (torchvision on tensors, as HPS-v2). ``bilinear``: the same on images that were never rounded (as
            Flow-GRPO's CLIP score).
        rounding: of the crop's odd margins, see ``middle``.
    """

    def __init__(
        self,
        size: int | Size,
        crop: Size | None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        way: Way = "pil",
        rounding: Rounding = "down",
    ) -> None:
        super().__init__(mean, std)
        self.size, self.crop, self.way, self.rounding = size, crop, way, rounding

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        size = shorter_side((height, width), self.size) if isinstance(self.size, int) else self.size
        if self.way == "pil":
            window = None if self.crop is None else middle(size, self.crop, self.rounding)
            return super().forward(pil_resize(grey_levels(images), size, window) / 255)
        images = images.float() if self.way == "bilinear" else grey_levels(images) / 255
        if size != (height, width):
            images = F.interpolate(images, size, mode=self.way, antialias=True)
        if self.crop is not None:
            images = center_crop(images, self.crop, self.rounding)
        return super().forward(images)


def smart_size(size: Size, factor: int, least: int, most: int) -> Size:
    """The size that Qwen2-VL gives an image: multiples of ``factor`` with ``least`` to ``most`` pixels in all.

    Raises:
        ValueError: a side is more than 200 times the other.
    """
    if max(size) > 200 * min(size):
        raise ValueError(f"images of {size[1]} x {size[0]} pixels are too elongated: at most 200 times as long as wide")
    rounded = tuple(round(side / factor) * factor for side in size)
    if math.prod(rounded) > most:
        shrink = math.sqrt(math.prod(size) / most)
        rounded = tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in size)
    elif math.prod(rounded) < least:
        grow = math.sqrt(least / math.prod(size))
        rounded = tuple(math.ceil(side * grow / factor) * factor for side in size)
    return rounded[0], rounded[1]


def patches(pixels: Tensor, patch: int = 14, merge: int = 2, frames: int = 2) -> tuple[Tensor, Tensor]:
    """What Qwen2-VL's vision tower takes: patches in the order in which ``merge`` x ``merge`` of them become one token.

    Args:
        pixels: [N, 3, H, W], sides multiples of ``patch * merge``; each image is a film of ``frames`` equal pictures.

    Returns:
        [N * H * W / patch², 3 * frames * patch²], and the grid (1, H / patch, W / patch) of each image, int64 [N, 3] on the
        host, which reads it.
    """
    count, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    tiled = pixels.view(count, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    tiled = tiled.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    return tiled.reshape(count * rows * columns, -1), torch.tensor([[1, rows, columns]]).repeat(count, 1)
