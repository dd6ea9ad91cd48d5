"""How much of the text that a prompt asks for can be read in its picture: the OCR reward of Flow-GRPO (arXiv 2505.05470)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..prompts.prompt import data_of
from ..text.user_text import shown
from .host import HostReward, check_workers, package_folder, shipped

if TYPE_CHECKING:
    from numpy import ndarray

_LIMITS = ("max", "min")


class Ocr(HostReward):
    """1 - d / len(target), [N] in [0, 1]: d is the edit distance from what is read to the target, see ``legibility``.

    What is read are the lines from top to bottom, joined without a separator, of PP-OCR (the detector and the recogniser in the
    wheel of rapidocr, Apache-2.0; no classifier of angles). Nothing is downloaded. Flow-GRPO reads with PaddleOCR 2.9's English
    models: the formula is the same, what is read need not be.

    Args:
        det_limit_side_len: pixels; with ``det_limit_type = max`` text is looked for in pictures whose longer side was shrunk to
            it, with ``min`` in pictures whose shorter side was enlarged to it. PaddleOCR's own is 960: drawn text in pictures
            of 1024 pixels is read better at 512, in a third of the time.
        workers: pictures read at once, one thread each; 0 is one per core, 8 at most.

    Raises:
        InputError: rapidocr, onnxruntime or rapidfuzz is not installed, or a value cannot be.
    """

    def __init__(self, det_limit_side_len: int = 512, det_limit_type: str = "max", workers: int = 0) -> None:
        detector, recogniser = self.check(det_limit_side_len, det_limit_type, workers)
        super().__init__("ocr", workers)
        import numpy as np
        from rapidocr import RapidOCR

        self._engine: Any = RapidOCR(  # one for all threads: a call leaves nothing in it that another's could differ in
            params={
                "Global.log_level": "critical",  # a picture without text is no cause for a warning
                "Global.use_cls": False,
                "Det.model_path": str(detector),
                "Det.limit_side_len": det_limit_side_len,
                "Det.limit_type": det_limit_type,
                "Rec.model_path": str(recogniser),
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )
        # It would load its models at the first picture and the first text: what cannot be loaded fails now.
        for detected in (False, True):  # the last answer is kept
            self._engine(np.zeros((32, 32, 3), np.uint8), use_det=detected)

    @staticmethod
    def check(det_limit_side_len: int, det_limit_type: str, workers: int) -> tuple[Path, Path]:
        """The files of detector and recogniser; raises what the constructor can find without loading them."""
        if det_limit_type not in _LIMITS:
            raise InputError(f"rewards: ocr: det_limit_type = {det_limit_type}: one of {', '.join(_LIMITS)}")
        if det_limit_side_len < 32:
            raise InputError(f"rewards: ocr: det_limit_side_len = {det_limit_side_len}: at least 32 pixels")
        check_workers("ocr", workers)
        models = package_folder("rapidocr", "ocr", needs=("onnxruntime", "rapidfuzz")) / "models"
        return shipped(models, "*_det_*.onnx", "ocr"), shipped(models, "*_rec_*.onnx", "ocr")

    @staticmethod
    def check_prompts(prompts: Sequence[str]) -> None:
        """Refuse prompts that name no text, see ``target_of``."""
        for prompt in prompts:
            target_of(prompt)

    def one(self, picture: ndarray[Any, Any], prompt: str) -> float:
        """The score of an RGB picture uint8 [H, W, 3]."""
        return legibility(self.read(picture), target_of(prompt))

    def read(self, picture: ndarray[Any, Any]) -> str:
        """Everything that is read in an RGB picture uint8 [H, W, 3]."""
        found = self._engine(picture[..., ::-1])  # OpenCV's order of channels
        return "".join(found.txts or ())


def target_of(prompt: str) -> str:
    """The text that a picture of ``prompt`` shall show: its datum ``target``, else what stands first in straight double quotes.

    Raises:
        InputError: naming the prompt, where that is no text or nothing but blanks.
    """
    data, parts = data_of(prompt), prompt.split('"')
    target = data["target"] if "target" in data else parts[1] if len(parts) > 2 else None
    if not isinstance(target, str) or not _compact(target):
        what = "its target is no text" if "target" in data else 'it has no text between straight double quotes (")'
        raise InputError(f"prompt {shown(prompt)}: {what}; quote the text to be read, or give it as target beside the prompt")
    return target


def legibility(read: str, target: str) -> float:
    """1 - d / len(target), in [0, 1], for a target that is not blank.

    Blanks and case do not count. d is 0 where the target is part of what was read, else the Levenshtein distance of the two,
    and never more than the target's length.
    """
    from rapidfuzz.distance import Levenshtein

    found, wanted = _compact(read), _compact(target)
    distance = 0 if wanted in found else min(Levenshtein.distance(found, wanted), len(wanted))
    return 1 - distance / len(wanted)


def _compact(text: str) -> str:
    return re.sub(r"\s+", "", text).lower()
