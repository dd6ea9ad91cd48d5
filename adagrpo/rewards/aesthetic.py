"""LAION's aesthetic predictor v2: how much people like a picture, whatever its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..models.registry import Component
from .heads import LinearHead, read_sides
from .pixels import Preprocess
from .similarity import ImageFeatures, check_clip, load_clip
from .towers import place, shared
from .weights import check_state, load_state, read_dtype, read_state, unfilled

FILE = "sac+logos+ava1-l14-linearMSE.pth"
_SOURCE = f"https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/{FILE.replace('+', '%2B')}"
_DESCRIBED = "the published predictor"
_HEAD = Component("aesthetic head", "torch", "LinearHead")


class Aesthetic(ImageFeatures):
    """Aesthetic score of images, [N], about 1 to 10; prompts are not looked at.

    Linear layers over the unit image features of OpenAI's CLIP ViT-L/14, images resized by Pillow's rules.

    Args:
        path: file of the predictor, or folder that holds it under its published name.
        tower: folder or Hub id of the ``CLIPModel``; it is held once with other rewards that name it.
        dtype: of the tower, ``fp32`` or ``bf16``; the head works in fp32.

    Raises:
        InputError: files that are missing, damaged or something else.
    """

    def __init__(self, path: str = FILE, tower: str = "openai/clip-vit-large-patch14", dtype: str = "fp32") -> None:
        file, where = _file(path), f"rewards: {path}"
        model = load_clip(tower, dtype)

        def load() -> LinearHead:
            state = read_state(file, where)
            return load_state(_unfilled_head(state, where), state, _HEAD, where, _DESCRIBED, torch.float32)

        self.head = shared(("aesthetic", place(file)), load)
        _refuse_width(self.head, model.config.projection_dim, path, tower)
        side = model.config.vision_config.image_size
        super().__init__(model, Preprocess(side, (side, side), rounding="even"))

    @staticmethod
    def check(path: str, tower: str, dtype: str) -> None:
        """Raise what the constructor can find without reading weights; a Hub id is only checked for its form."""
        where = f"rewards: {path}"
        read_dtype(dtype, where)
        state = read_state(_file(path), where, "meta")
        check_state(_unfilled_head(state, where), state, _HEAD, where, _DESCRIBED)
        check_clip(tower)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] -> scores [N] float32, NaN where not all pixels are finite."""
        if len(images) == 0:
            return images.new_zeros(0, dtype=torch.float32)
        features = self._image_features(images)
        self.head.to(images.device)
        return self.head(features)[:, 0]


def _file(path: str) -> Path:
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"rewards: {file}: no such file; fetch it from {_SOURCE} and name it")
    return file


def _unfilled_head(state: Mapping[str, Tensor], where: str) -> LinearHead:
    sides = read_sides(state, "", where)
    return unfilled(lambda: LinearHead(sides))


def _refuse_width(head: LinearHead, width: int, path: str, tower: str) -> None:
    wanted = head.layers["0"].in_features
    if wanted != width:
        raise InputError(
            f"rewards: {path} takes {wanted} features of an image, {tower} makes {width}; name the tower it is for"
        )
