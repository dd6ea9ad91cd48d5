"""Rewards: callables from images and prompts to scores; one file each, heavy imports inside."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .base import PromptRows, Reward

__all__ = ["PromptRows", "Reward", "build_reward"]

BUILT_IN = {
    "tiny": "adagrpo.tiny.reward:TinyReward",
    "brightness": "adagrpo.rewards.brightness:Brightness",
    "clip": "adagrpo.rewards.clip:ClipScore",
    "pickscore": "adagrpo.rewards.clip:PickScore",
}


def build_reward(name: str, kwargs: Mapping[str, Any]) -> Reward:
    """A built-in reward by name, or ``package.module:attribute`` called with ``kwargs``.

    Raises:
        InputError: unknown name, import failure, or arguments it does not take.
    """
    target = BUILT_IN.get(name, name)
    module, _, attribute = target.partition(":")
    if not attribute:
        raise InputError(f"rewards: unknown reward {name!r}: one of {', '.join(BUILT_IN)}, or package.module:attribute")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"rewards: {name!r} cannot be imported: {error}") from error
    try:
        return factory(**kwargs)
    except TypeError as error:
        raise InputError(f"rewards: {name!r} does not take kwargs {dict(kwargs)}: {error}") from error
