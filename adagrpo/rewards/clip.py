"""Image-text similarity of a CLIP checkpoint: CLIP score and PickScore.

Images never leave their device: the checkpoint's preprocessing is redone there in floating point.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..models.loading import check_component, check_finite, load_component, refuse_differences
from ..models.registry import Component
from .base import PromptRows

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CHUNK = 32  # images preprocessed and encoded at once
_STEPS = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True)
_CLIP = Component("CLIP", "transformers", "CLIPModel")
_FIXED = {**_STEPS, "resample": 3, "rescale_factor": 1 / 255}  # 3: PIL.Image.Resampling.BICUBIC


class ClipScore:
    """Cosine of the angle between image and prompt features, [N] in [-1, 1] (CLIP, arXiv 2103.00020).

    The model is loaded at once, so that a wrong name fails before any long work, and moves to the device of its images.

    Args:
        path: folder or Hub id (downloaded unless ``HF_HUB_OFFLINE`` is set) of a ``CLIPModel``.
        processor: folder or Hub id of its tokenizer and preprocessing; None for ``path``.
        dtype: of both encoders, ``fp32`` or ``bf16``; features are normalised and compared in fp32 either way.
        prompt_cache: prompts whose features are kept, least recently used out first; one call keeps all it needs.

    Raises:
        InputError: no such checkpoint, or one that is not a complete CLIP model.
    """

    def __init__(
        self,
        path: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        dtype: str = "fp32",
        prompt_cache: int = 4096,
    ) -> None:
        if dtype not in _DTYPES:
            raise InputError(f"rewards: dtype = {dtype}: one of {', '.join(_DTYPES)}")
        source = processor or path
        self.tokenizer, self.preprocess = _load_processor(source)
        self.model = _load_model(path)
        self.logit_scale = float(self.model.logit_scale.exp())  # rounding it to bf16 first would cost 1%
        self.model.to(_DTYPES[dtype])
        text, side = self.model.config.text_config, self.model.config.vision_config.image_size
        if len(self.tokenizer) != text.vocab_size or self.preprocess.crop != (side, side):
            raise InputError(
                f"rewards: {path} is made for {text.vocab_size} tokens and {side} pixels a side, but {source} has "
                f"{len(self.tokenizer)} tokens and crops to {self.preprocess.crop}; name complete folders of one kind"
            )
        self.max_tokens = min(self.tokenizer.model_max_length, text.max_position_embeddings)
        self.prompt_cache = prompt_cache
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @staticmethod
    def check(path: str, processor: str | None, dtype: str, prompt_cache: int) -> None:
        """Raise what the constructor can find without reading weights; Hub ids are only checked for their form."""
        for source in (processor or path, path):
            _refuse_form(source)
        if Path(processor or path).is_dir():
            _load_processor(processor or path)
        if Path(path).is_dir():
            check_component(_CLIP, Path(path), f"rewards: {path}")

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] and N prompts -> scores [N] float32, NaN where not all pixels are finite."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be floats of shape [N, 3, H, W], got {images.dtype} {tuple(images.shape)}")
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} images need as many prompts, got {len(prompts)}")
        if len(images) == 0:
            return images.new_zeros(0, dtype=torch.float32)
        if self.model.device != images.device:
            self.model.to(images.device)
            self.preprocess.to(images.device)
            self._cache.clear()
        text = self._text_features(prompts, images.device)
        return (torch.cat([self._image_features(part) for part in images.split(_CHUNK)]) * text).sum(1)

    def _image_features(self, images: Tensor) -> Tensor:
        """Unit vectors [N, D] float32 of images [N, 3, H, W]; rows of NaN for images that are not finite."""
        pixels = self.preprocess(images).to(self.model.dtype)
        features = _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)
        return torch.where(images.isfinite().flatten(1).all(1)[:, None], features, torch.nan)

    def _text_features(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Unit vectors [N, D] float32 of N prompts."""
        if isinstance(prompts, PromptRows):
            texts, index = prompts.texts, prompts.text_index
        else:
            places = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
            texts, index = tuple(places), torch.tensor([places[prompt] for prompt in prompts])
        table = torch.stack([self._one(text) for text in texts])
        while len(self._cache) > max(self.prompt_cache, len(texts)):
            self._cache.popitem(last=False)
        return table.index_select(0, index.to(device, non_blocking=True))

    def _one(self, prompt: str) -> Tensor:
        """Unit vector [D] float32 of a prompt, encoded alone: it must not depend on what the cache held."""
        if prompt not in self._cache:
            tokens = self.tokenizer(prompt, truncation=True, max_length=self.max_tokens, return_tensors="pt")
            ids = tokens.input_ids.to(self.model.device, non_blocking=True)
            self._cache[prompt] = _unit(self.model.get_text_features(input_ids=ids).pooler_output)[0]
        self._cache.move_to_end(prompt)
        return self._cache[prompt]


class PickScore(ClipScore):
    """Human preference learnt from Pick-a-Pic, [N], around 20 for the published weights (PickScore, arXiv 2305.01569).

    The published formula: ``exp(logit_scale) * cos(text, image)``, tokens and pixels prepared as for the CLIP model the
    weights were tuned from (``processor``). Arguments and errors as for ``ClipScore``.
    """

    def __init__(
        self,
        path: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        dtype: str = "fp32",
        prompt_cache: int = 4096,
    ) -> None:
        super().__init__(path, processor, dtype, prompt_cache)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As ``ClipScore``, times ``exp(logit_scale)``."""
        return super().__call__(images, prompts) * self.logit_scale


class Preprocess(nn.Module):
    """What ``CLIPImageProcessor`` does, on the images' device and without rounding to 8 bits.

    Args:
        config: content of ``preprocessor_config.json``; sizes may be integers, as in older checkpoints.
        source: where it was found, for errors.
    """

    mean: Tensor  # [1, 3, 1, 1]
    std: Tensor

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        super().__init__()
        wrong = [name for name, value in _FIXED.items() if config.get(name, value) != value]
        try:
            size, crop = config["size"], config["crop_size"]
            self.size: int = size if isinstance(size, int) else size["shortest_edge"]
            self.crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
            for name in ("mean", "std"):
                value = torch.tensor(config[f"image_{name}"], dtype=torch.float32).view(1, 3, 1, 1)
                self.register_buffer(name, value, persistent=False)
        except KeyError as error:
            wrong += error.args
        if wrong or max(self.crop) > self.size:
            what = ", ".join(wrong) or "crop_size"
            raise InputError(f"rewards: {source}: preprocessor_config.json: {what}: not as CLIP's; name a CLIP model")

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] float in [0, 1] -> pixel values [N, 3, *crop] float32."""
        height, width = images.shape[2:]
        short = min(height, width)
        to_height, to_width = self.size * height // short, self.size * width // short
        # PIL resizes the width, then the height (Pillow 13 reverses this for tall images), and clips after each.
        for shape in ((height, to_width), (to_height, to_width)):
            images = F.interpolate(images.float(), shape, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (to_height - self.crop[0]) // 2, (to_width - self.crop[1]) // 2
        return (images[:, :, top : top + self.crop[0], left : left + self.crop[1]] - self.mean) / self.std


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1)


def _load_model(path: str) -> Any:
    """A frozen fp32 ``CLIPModel`` on the CPU, every tensor of it from its files."""
    where = f"rewards: {path}"
    if Path(path).is_dir():
        weights = check_component(_CLIP, Path(path), where)
        model = load_component(_CLIP, Path(path), weights, torch.float32, where)
    else:
        load = partial(_CLIP.cls.from_pretrained, dtype=torch.float32, output_loading_info=True)
        model, info = _loaded(path, load)
        misshaped = {name: (tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"]}
        refuse_differences(_CLIP, where, info["missing_keys"], info["unexpected_keys"], misshaped)
    check_finite({_CLIP.name: model}, where)
    return model.requires_grad_(False).eval()


def _load_processor(source: str) -> tuple[Any, Preprocess]:
    """Tokenizer and preprocessing of a folder or Hub id."""
    from transformers import AutoTokenizer, ImageProcessingMixin

    tokenizer = _loaded(source, AutoTokenizer.from_pretrained)
    return tokenizer, Preprocess(_loaded(source, ImageProcessingMixin.get_image_processor_dict)[0], source)


def _refuse_form(path: str) -> None:
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise InputError(f"rewards: {path}: no such folder, nor a Hub id of the form owner/name; name a CLIP model")


def _loaded(path: str, load: Callable[[str], Any]) -> Any:
    """``load(path)`` with one readable error instead of a traceback."""
    _refuse_form(path)
    try:
        return load(path)
    except Exception as error:  # safetensors and tokenizers raise what derives from nothing narrower
        raise InputError(
            f"rewards: {path}: cannot be loaded as a CLIP model; name a folder that holds one, or a Hub id that can be "
            f"downloaded from here ({str(error).strip().splitlines()[0]})"
        ) from error
