"""What rewards made of a ``transformers.CLIPModel`` share: image features, and their cosine with those of the prompts.

Images never leave their device: preprocessing is redone there (``pixels``). A prompt is encoded once while it stays in a cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..models.loading import check_component, check_finite, first_line, load_component, refuse_differences
from ..models.registry import Component
from .base import PromptRows, matched
from .pixels import Preprocess
from .towers import place, shared
from .weights import read_dtype, refuse_form

CLIP = Component("CLIP", "transformers", "CLIPModel")


class ImageFeatures:
    """Unit vectors of images by the vision tower of a ``CLIPModel``, which moves to the device of its images."""

    rehearsable = True

    def __init__(self, model: Any, preprocess: Preprocess) -> None:
        self.model, self.preprocess = model, preprocess

    def _image_features(self, images: Tensor) -> Tensor:
        """Unit vectors [N, D] float32 of images [N, 3, H, W] in [0, 1]; rows of NaN for images that are not finite."""
        if self.model.device != images.device:
            self.model.to(images.device)
        pixels = self.preprocess(images)  # the model rounds them itself
        features = _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)
        return torch.where(images.isfinite().flatten(1).all(1)[:, None], features, torch.nan)


class Similarity(ImageFeatures):
    """Cosine of the angle between image and prompt features, [N] in [-1, 1], times a factor.

    Args:
        model: a frozen ``CLIPModel``.
        tokenizer: its own, of which ``check_vocabulary`` has approved.
        preprocess: of images.
        clean: what is done to a prompt before it is split into tokens; None is nothing.
        factor: of the cosine.
        prompt_cache: prompts whose features are kept, least recently used out first; one call keeps all it needs.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        preprocess: Preprocess,
        clean: Callable[[str], str] | None = None,
        factor: float = 1.0,
        prompt_cache: int = 4096,
    ) -> None:
        super().__init__(model, preprocess)
        self.tokenizer, self.clean, self.factor, self.prompt_cache = tokenizer, clean, factor, prompt_cache
        self.max_tokens = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] and N prompts -> scores [N] float32, NaN where not all pixels are finite."""
        rows = matched(images, prompts)
        if not len(rows):
            return images.new_zeros(0, dtype=torch.float32)
        return (self._image_features(images) * self._text_features(rows)).sum(1) * self.factor

    def _text_features(self, rows: PromptRows) -> Tensor:
        """Unit vectors [N, D] float32 of the prompts of N images, on the device of their index."""
        table = torch.stack([self._one(text, rows.text_index.device) for text in rows.texts])
        while len(self._cache) > max(self.prompt_cache, len(rows.texts)):
            self._cache.popitem(last=False)
        return table.index_select(0, rows.text_index)

    def _one(self, prompt: str, device: torch.device) -> Tensor:
        """Unit vector [D] float32 of a prompt, encoded alone: it must not depend on what the cache held.

        A text attends backwards only and is read at its end: padding, which some of the published scorers do, changes nothing.
        """
        if prompt not in self._cache:
            text = self.clean(prompt) if self.clean else prompt
            tokens = self.tokenizer(text, truncation=True, max_length=self.max_tokens, return_tensors="pt")
            ids = tokens.input_ids.to(device, non_blocking=True)
            self._cache[prompt] = _unit(self.model.get_text_features(input_ids=ids).pooler_output)[0]
        elif self._cache[prompt].device != device:
            self._cache[prompt] = self._cache[prompt].to(device)
        self._cache.move_to_end(prompt)
        return self._cache[prompt]


def load_clip(path: str, dtype: str) -> Any:
    """The frozen ``CLIPModel`` of a folder or Hub id, every tensor of it from its files; shared, ``logit_scale`` always fp32.

    Raises:
        InputError: no such checkpoint, or one that is not a complete CLIP model.
    """
    wanted = read_dtype(dtype, f"rewards: {path}")
    return shared((CLIP.kind, place(path), wanted), lambda: in_dtype(_load_clip(path), wanted))


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The ``CLIPModel`` in a dtype but for its ``logit_scale``, which bf16 would change by up to 1%."""
    scale = model.logit_scale.detach().float()
    model.to(dtype)
    model.logit_scale = nn.Parameter(scale, requires_grad=False)
    return model


def check_clip(path: str) -> None:
    """Raise what ``load_clip`` can find without reading weights; a Hub id is only checked for its form."""
    where = f"rewards: {path}"
    refuse_form(path, where)
    if Path(path).is_dir():
        check_component(CLIP, Path(path), where)


def check_vocabulary(tokenizer: Any, source: str, config: Any, path: str) -> None:
    """Refuse a tokenizer that is not of the model: other tokens, or another one at the end, where a text is read.

    Raises:
        InputError: they do not belong together.
    """
    size, end = config.text_config.vocab_size, config.text_config.eos_token_id
    if len(tokenizer) != size:
        raise InputError(
            f"rewards: {path} is made for {size} tokens, but {source} has {len(tokenizer)}; name complete folders of one kind"
        )
    if tokenizer.eos_token_id != (size - 1 if end == _LEGACY_END else end):
        raise InputError(f"rewards: {source} ends a text with token {tokenizer.eos_token_id}, {path} reads it at token {end}")


def read_processor(source: str, read: Callable[[str], Any]) -> Any:
    """``read(source)`` of a folder or Hub id, with one readable error instead of a traceback.

    Raises:
        InputError: it cannot be read.
    """
    refuse_form(source, f"rewards: {source}")
    try:
        return read(source)
    except Exception as error:  # safetensors and tokenizers raise what derives from nothing narrower
        raise InputError(
            f"rewards: {source}: cannot be loaded as a CLIP model; name a folder that holds one, or a Hub id that can be "
            f"downloaded from here ({first_line(error)})"
        ) from error


_LEGACY_END = 2  # in configurations of OpenAI's CLIP; the end of a text is then its highest token


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1)


def _load_clip(path: str) -> nn.Module:
    where = f"rewards: {path}"
    if Path(path).is_dir():
        weights = check_component(CLIP, Path(path), where)
        model = load_component(CLIP, Path(path), weights, torch.float32, where)
    else:
        load = partial(CLIP.cls.from_pretrained, dtype=torch.float32, output_loading_info=True)
        model, info = read_processor(path, load)
        misshaped = {name: (tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"]}
        refuse_differences(CLIP, where, info["missing_keys"], info["unexpected_keys"], misshaped)
    check_finite({CLIP.name: model}, where)
    frozen: nn.Module = model.requires_grad_(False).eval()
    return frozen
