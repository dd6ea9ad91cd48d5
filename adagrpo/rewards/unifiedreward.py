"""UnifiedReward (arXiv 2503.05236): a judge of images, served by vLLM or SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..text.user_text import shown
from .judge import Judge

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)"
# Labels of the answers, and the range of each number. What the axes of v2 exceed is clipped in their mean, as upstream does it.
_ANSWERS = {
    "v1": (["Final Score:" + _NUMBER], 1.0, 5.0),
    "v2": ([rf"{axis} Score \(1-5\):{_NUMBER}" for axis in ("Alignment", "Coherence", "Style")], float("-inf"), float("inf")),
}


class UnifiedReward(Judge):
    """The judge's score of each image, [N]: of ``v1``, the point from 1 to 5 behind "Final Score"; of ``v2``, the mean of its
    three axes, clipped to 1 to 5 and mapped to 0 to 1. Flow-GRPO trains on a fifth of the point: ``scale = 0.2``.

    Args:
        url: of the server: ``vllm serve CodeGoat24/UnifiedReward-... --served-model-name UnifiedReward``.
        template: text file with the published instruction for scoring one image, ``{prompt}`` in place of the caption: the
            repository CodeGoat24/UnifiedReward has it for each version; it is not part of this package.
        version: of the answers: ``v1`` (UnifiedReward, UnifiedReward-qwen) or ``v2`` (UnifiedReward-2.0).
        model, api_key, image, request, limits: see ``Judge``. Models of qwen3.5 want
            ``request = {"chat_template_kwargs.enable_thinking" = false}``.

    Raises:
        InputError: as ``Judge``.
    """

    def __init__(
        self,
        url: str,
        template: str = "",
        version: str = "v1",
        model: str = "UnifiedReward",
        api_key: str = "",
        image: str = "jpeg",
        request: Mapping[str, Any] | None = None,
        limits: Mapping[str, Any] | None = None,
    ) -> None:
        pattern, low, high = _answers(template, version)
        super().__init__(url, model, template, pattern, low, high, api_key, image, request, limits)
        self.version = version

    @staticmethod
    def check(  # type: ignore[override]
        url: str,
        template: str,
        version: str,
        model: str,
        api_key: str,
        image: str,
        request: Mapping[str, Any] | None,
        limits: Mapping[str, Any] | None,
    ) -> None:
        """Raise what the constructor can find without asking the server."""
        Judge.check(url, model, template, *_answers(template, version), api_key, image, request, limits)

    def score(self, reply: str) -> float:
        """See ``Judge.score``."""
        mean = super().score(reply)
        return mean if self.version == "v1" else (min(max(mean, 1.0), 5.0) - 1) / 4


def _answers(template: str, version: str) -> tuple[list[str], float, float]:
    if version not in _ANSWERS:
        raise InputError(f"rewards: version = {shown(version)}: one of {', '.join(_ANSWERS)}")
    if not template:
        raise InputError(
            "rewards: template = '': name a text file with the instruction for scoring one image that the repository "
            "CodeGoat24/UnifiedReward publishes for this version, with {prompt} in place of the caption"
        )
    return _ANSWERS[version]
