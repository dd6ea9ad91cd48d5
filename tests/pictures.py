"""Images that are hard to resize alike, and what Pillow and filters written out in fp64 make of them."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def noise(height: int, width: int, count: int = 1) -> Tensor:
    """Images in [0, 1], not rounded: noise beside hard edges, the hardest to resize alike."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    images = torch.rand(count, 3, height, width, generator=generator)
    images[:, :, :, : width // 3] = images[:, :, :, : width // 3].round()
    return images


def as_pil(images: Tensor) -> list:
    from PIL import Image

    return [Image.fromarray((image.numpy().transpose(1, 2, 0) * 255).round().astype("uint8")) for image in images]


def by_pillow(images: Tensor, size: tuple[int, int]) -> Tensor:
    from PIL import Image

    resized = [np.array(picture.resize(size[::-1], Image.Resampling.BICUBIC)) for picture in as_pil(images)]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float()


def resized(images: Tensor, size: tuple[int, int], kernel: Callable[[float], float], support: float) -> Tensor:
    """Images [N, C, H, W] in fp64 by a filter that is stretched where the image shrinks, weights summing to one."""
    for axis, out in ((2, size[0]), (3, size[1])):
        scale = images.shape[axis] / out
        stretch = max(scale, 1.0)
        weights = torch.zeros(out, images.shape[axis], dtype=torch.float64)
        for i in range(out):
            centre = (i + 0.5) * scale
            for j in range(max(0, int(centre - support * stretch + 0.5)), int(centre + support * stretch + 0.5)):
                if j < images.shape[axis]:
                    weights[i, j] = kernel(abs(j + 0.5 - centre) / stretch)
        weights /= weights.sum(1, keepdim=True)
        images = torch.tensordot(images.double(), weights, dims=([axis], [1])).movedim(-1, axis)
    return images


def cubic(x: float) -> float:
    """Keys' filter with a = -1/2."""
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def triangle(x: float) -> float:
    return max(0.0, 1 - x)
