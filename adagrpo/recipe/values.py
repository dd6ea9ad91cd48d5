"""What no key of a recipe may hold, whichever it is: numbers that are none, integers beyond reason, garbled text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..text.redaction import redacted
from ..text.user_text import character_problem
from .derived import Derived
from .keys import Config

# Counts; the seed has a range of its own. Arguments of parts by import path may be any 64-bit integer, as TOML has them.
MOST = 2**31
MOST_ARGUMENT = 2**63 - 1
MOST_EVALUATIONS = 10**7
MOST_IMAGES = 10**7


class Problem(NamedTuple):
    """What a recipe may not hold.

    Attributes:
        key, value, remedy: what the message says.
        unread: the key that nothing reads beside the others; empty where values contradict each other or reason.
    """

    key: str
    value: Any
    remedy: str
    unread: str = ""


def check_values(config: Config) -> Iterator[Problem]:
    """Key, value and remedy of whatever no key may hold, and of more work than an iteration can be meant to be."""
    yield from value_problems(dataclasses.asdict(redacted(config)))
    d = Derived(config)
    if (evaluations := config.rollout.steps * (d.candidates + d.slots * d.samples_per_slot)) > MOST_EVALUATIONS:
        yield Problem(
            "train.slots x train.accumulation",
            d.slots,
            f"an iteration of up to {evaluations:.1e} evaluations cannot be meant (at most {MOST_EVALUATIONS:.0e}): lower it, "
            "rollout.steps, rollout.group_size or selection.candidates",
        )
    e = config.evaluation
    for key, images in (("noises", e.prompts * e.noises), ("final_noises", e.final_prompts * e.final_noises)):
        if images > MOST_IMAGES:
            name = key.replace("noises", "prompts")
            yield Problem(
                f"evaluation.{name} x evaluation.{key}", images, f"must be at most {MOST_IMAGES} images: lower one of them"
            )


def value_problems(table: Any, key: str = "") -> Iterator[Problem]:
    """Key, value and remedy of every leaf of nested tables and lists that cannot be meant."""
    argument = "kwargs" in key.split(".")
    if isinstance(table, dict | list | tuple):
        for name, value in table.items() if isinstance(table, dict) else enumerate(table):
            if problem := character_problem(str(name), ""):
                yield Problem(f"{key}.{name}".lstrip("."), value, f"the key {problem}; remove it")
            yield from value_problems(value, f"{key}.{name}".lstrip("."))
    elif isinstance(table, str) and (problem := character_problem(table, "\t\n" if argument else "")):
        yield Problem(key, table, f"{problem}; remove it")
    elif isinstance(table, float) and not (argument or math.isfinite(table)):
        yield Problem(key, table, "must be a finite number")
    elif type(table) is int and key != "train.seed" and abs(table) > (limit := MOST_ARGUMENT if argument else MOST):
        yield Problem(key, table, f"must lie within ±{limit}")
