"""HPS v2 and v2.1, human preference as a CLIP learnt it (arXiv 2306.09341)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .base import TOKENIZER_FILES
from .open_clip import Architecture, check_cleaning, check_open_clip, clean_text, load_open_clip
from .pixels import Preprocess
from .similarity import Similarity, check_vocabulary
from .weights import find_file, known_file, load_tokenizer, read_dtype, refuse_form

FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


class Hpsv2(Similarity):
    """Cosine of the angle between image and prompt features, [N], about 0.25 to 0.35 for the published weights.

    It equals the authors' own code in fp32: open_clip's cleaned text and its tokens, images resized in floating point. Scores
    of v2.0 and v2.1 are not comparable, nor are those of different prompts.

    Args:
        path: file, folder that holds it, or Hub id (downloaded unless ``HF_HUB_OFFLINE`` is set).
        version: ``v2.0`` or ``v2.1``, which file of a folder or repository is meant.
        tokenizer: folder or Hub id of CLIP's tokenizer; the published models' vocabulary is that of all CLIPs.
        dtype: of both encoders, ``fp32`` or ``bf16``; features are normalised and compared in fp32 either way.
        prompt_cache: prompts whose features are kept.
        architecture: ``vision_heads`` and ``text_heads`` of a model that is not the published ViT-H/14.

    Raises:
        InputError: files that are missing, damaged or something else, or a missing package.
    """

    def __init__(
        self,
        path: str = "xswu/HPSv2",
        version: str = "v2.1",
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        dtype: str = "fp32",
        prompt_cache: int = 4096,
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        where = f"rewards: {path}"
        wanted = read_dtype(dtype, where)
        check_cleaning()
        words = load_tokenizer(tokenizer, f"rewards: {tokenizer}")
        file = find_file(path, _file_of(version), where)
        model = load_open_clip(file, Architecture().given(architecture, where), where, wanted)
        check_vocabulary(words, tokenizer, model.config, path)
        side = model.config.vision_config.image_size
        preprocess = Preprocess(side, (side, side), way="bicubic", rounding="even")
        super().__init__(model, words, preprocess, clean_text, prompt_cache=prompt_cache)

    @staticmethod
    def hub_files(arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """See ``fetching.wanted_files``."""
        words = tuple(f"{arguments['tokenizer']}:{name}" for name in TOKENIZER_FILES)
        return f"{arguments['path']}:{_file_of(arguments['version'])}", *words

    @staticmethod
    def check(
        path: str, version: str, tokenizer: str, dtype: str, prompt_cache: int, architecture: Mapping[str, Any] | None
    ) -> None:
        """Raise what the constructor can find without reading weights; of Hub ids only what was fetched before."""
        where = f"rewards: {path}"
        read_dtype(dtype, where)
        check_cleaning()
        made = Architecture().given(architecture, where)
        if (file := known_file(path, _file_of(version), where)) is not None:
            check_open_clip(file, made, where)
        refuse_form(tokenizer, f"rewards: {tokenizer}")
        if Path(tokenizer).is_dir():
            load_tokenizer(tokenizer, f"rewards: {tokenizer}")


def _file_of(version: str) -> str:
    if version not in FILES:
        raise InputError(f"rewards: version = {version}: one of {', '.join(FILES)}")
    return FILES[version]
