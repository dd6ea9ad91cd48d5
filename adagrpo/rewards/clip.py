"""Image-text similarity of a CLIP checkpoint: CLIP score as three projects compute it, and PickScore."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .base import TOKENIZER_FILES
from .open_clip import (
    CONFIG,
    WEIGHTS,
    Architecture,
    check_cleaning,
    check_open_clip,
    clean_text,
    configured,
    configured_preprocess,
    load_open_clip,
    read_config,
)
from .pixels import Preprocess
from .similarity import Similarity, check_clip, check_vocabulary, load_clip, read_processor
from .weights import find_file, load_tokenizer, read_dtype, refuse_form

VARIANTS = {  # and the checkpoint of each
    "cosine": "openai/clip-vit-large-patch14",
    "flow-grpo": "openai/clip-vit-large-patch14",
    "mixgrpo": "apple/DFN5B-CLIP-ViT-H-14-384",
}
_STEPS = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True)
_FIXED = {**_STEPS, "resample": 3, "rescale_factor": 1 / 255}  # 3: PIL.Image.Resampling.BICUBIC
_DFN = Architecture(activation="quick_gelu")


class ClipScore(Similarity):
    """Cosine of the angle between image and prompt features, [N] in [-1, 1] (CLIP, arXiv 2103.00020).

    The model is loaded at once, so that a wrong name fails before any long work, and moves to the device of its images. Two
    rewards with one checkpoint hold it once.

    Args:
        path: folder or Hub id (downloaded unless ``HF_HUB_OFFLINE`` is set) of a ``CLIPModel``; "" is the variant's own. For
            ``mixgrpo`` also one in open_clip's layout, or such a file.
        processor: folder or Hub id of its tokenizer and preprocessing; None for ``path``.
        dtype: of both encoders, ``fp32`` or ``bf16``; features are normalised and compared in fp32 either way.
        prompt_cache: prompts whose features are kept, least recently used out first; one call keeps all it needs.
        variant: ``cosine``: as transformers' processor prepares it (Flow-Factory, UniRL). ``flow-grpo``: exp(logit_scale) / 30
            times that, images never rounded and resized bilinearly. ``mixgrpo``: text cleaned and images prepared as open_clip
            does (MixGRPO, DanceGRPO).
        architecture: ``mixgrpo``: ``vision_heads``, ``text_heads``, ``activation`` and ``image_size`` of a file in open_clip's
            layout without an ``open_clip_config.json`` beside it; else those of DFN5B's ViT-H/14.

    Raises:
        InputError: no such checkpoint, or one that is not a complete CLIP model.
    """

    def __init__(
        self,
        path: str = "",
        processor: str | None = None,
        dtype: str = "fp32",
        prompt_cache: int = 4096,
        variant: str = "cosine",
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        path = _known(path, variant, architecture)
        source, where = processor or path, f"rewards: {path}"
        wanted = read_dtype(dtype, where)
        clean = None
        if variant == "mixgrpo":
            check_cleaning()
            clean = clean_text
        file = _open_clip_file(path) if variant == "mixgrpo" else None
        tokenizer = load_tokenizer(source, f"rewards: {source}")
        if file is None:
            preprocess, model = _published_preprocess(source, variant), load_clip(path, dtype)
        else:
            config = read_config(file, where)
            model = load_open_clip(file, configured(config, _DFN).given(architecture, where), where, wanted)
            preprocess = configured_preprocess(config, model.config.vision_config.image_size, where)
        check_vocabulary(tokenizer, source, model.config, path)
        side = model.config.vision_config.image_size
        if (preprocess.crop or preprocess.size) != (side, side):
            raise InputError(
                f"rewards: {path} is made for {side} pixels a side, but {source} crops to {preprocess.crop}; name complete "
                f"folders of one kind"
            )
        factor = float(model.logit_scale.exp()) / 30 if variant == "flow-grpo" else 1.0
        super().__init__(model, tokenizer, preprocess, clean, factor, prompt_cache)

    @staticmethod
    def hub_files(arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """See ``fetching.wanted_files``."""
        words = (*TOKENIZER_FILES, "preprocessor_config.json") if arguments["processor"] else ()
        path = arguments["path"] or VARIANTS[arguments["variant"]]
        return path, *(f"{arguments['processor']}:{name}" for name in words)

    @staticmethod
    def check(
        path: str,
        processor: str | None,
        dtype: str,
        prompt_cache: int,
        variant: str = "cosine",
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        """Raise what the constructor can find without reading weights; Hub ids are only checked for their form."""
        path = _known(path, variant, architecture)
        source, where = processor or path, f"rewards: {path}"
        read_dtype(dtype, where)
        refuse_form(source, f"rewards: {source}")
        file = None
        if variant == "mixgrpo":
            check_cleaning()
            file = _open_clip_file(path) if Path(path).exists() else None
        if Path(source).is_dir():
            load_tokenizer(source, f"rewards: {source}")
        if file is not None:
            config = read_config(file, where)
            made = configured(config, _DFN).given(architecture, where)
            check_open_clip(file, made, where)
            configured_preprocess(config, made.image_size or 1, where)
            return
        if Path(source).is_dir():
            _published_preprocess(source, variant)
        check_clip(path)


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
        self.factor = float(self.model.logit_scale.exp())


def _known(path: str, variant: str, architecture: Mapping[str, Any] | None) -> str:
    """The checkpoint that is meant."""
    if variant not in VARIANTS:
        raise InputError(f"rewards: variant = {variant}: one of {', '.join(VARIANTS)}")
    if architecture and variant != "mixgrpo":
        raise InputError(f"rewards: architecture is for variant = mixgrpo; for {variant}, config.json tells it")
    return path or VARIANTS[variant]


def _open_clip_file(path: str) -> Path | None:
    """The weights of a file, folder or Hub id in open_clip's layout; None for a folder of a ``CLIPModel``."""
    place, where = Path(path), f"rewards: {path}"
    if place.is_dir():
        found = [place / name for name in WEIGHTS if (place / name).is_file()]
        return found[0] if found else None
    if not place.is_file():
        refuse_form(path, where)
        find_file(path, CONFIG, where)
    return find_file(path, WEIGHTS[-1], where)


def _published_preprocess(source: str, variant: str) -> Preprocess:
    """Preprocessing of a folder's or Hub id's ``preprocessor_config.json``; sizes may be integers, as in older ones.

    Raises:
        InputError: it is missing, or not as CLIP's.
    """
    from transformers import ImageProcessingMixin

    config = read_processor(source, ImageProcessingMixin.get_image_processor_dict)[0]
    wrong = [name for name, value in _FIXED.items() if config.get(name, value) != value]
    try:
        size, crop = config["size"], config["crop_size"]
        size = size if isinstance(size, int) else size["shortest_edge"]
        crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        stats = config["image_mean"], config["image_std"]
    except KeyError as error:
        raise InputError(_not_clips(source, [*wrong, *error.args])) from error
    if wrong or max(crop) > size:
        raise InputError(_not_clips(source, wrong or ["crop_size"]))
    if variant == "flow-grpo":
        return Preprocess(size, crop, *stats, way="bilinear", rounding="even")
    return Preprocess(size, crop, *stats)


def _not_clips(source: str, wrong: list[str]) -> str:
    return f"rewards: {source}: preprocessor_config.json: {', '.join(wrong)}: not as CLIP's; name a CLIP model"
