"""Prompt lists of the tiny world: training mixes and held-out prompts, the same on every machine.

Prompts of real sets can be unlearnable: what they ask for, the reward cannot judge or the model cannot draw, and their scores
differ by nothing that matters. ``dusty`` mixes have such prompts, see ``UNLEARNABLE``.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import islice

from adagrpo.prompts.prompt import Prompt
from adagrpo.tiny.scenes import CATEGORIES, SceneSpec, parse_prompt, split_specs, stable_hash

HELD_OUT = 600
UNLEARNABLE = "unlearnable"
"""Key of the metadata of a prompt whose pictures ``TinyReward`` scores by their brightness, whatever they show."""
_MIXES = {
    "even": dict.fromkeys(CATEGORIES, 80),
    "wide": {"single": 220, "count": 45, "pair": 45, "relation": 45, "combination": 45},
}


def training_prompts(mix: str) -> list[str]:
    """A pool of 400 training prompts, 1,000 of a dusty mix; its order interleaves the categories.

    `even`: each category a fifth. `wide`: 55 % trivial singles, as prompt sets from life hold many trivial prompts.
    `dusty(SHARE)`: each category a fifth, and of the different prompts of each that share, to the nearest prompt, unlearnable
    (`Prompt`s with `UNLEARNABLE` in their metadata); so many prompts that hardly one is seen twice in a short training.
    A category with fewer specifications than its share repeats them evenly (there are 18 single training scenes).
    Raises `ValueError` for another name.
    """
    dusty = _dust(mix)
    if dusty is None and mix not in _MIXES:
        raise ValueError(f"unknown mix {mix!r}: even, wide, or dusty(SHARE) with SHARE above 0 and below 1, such as dusty(0.6)")
    shares = _MIXES[mix] if dusty is None else dict.fromkeys(CATEGORIES, 200)
    ranked = []
    for order, (name, share) in enumerate(shares.items()):
        prompts = _cycle(name, held_out=False, count=share)
        if dusty is not None:
            different = sorted(set(prompts), key=lambda prompt: stable_hash(f"dust {prompt}"))
            unlearnable = set(different[: round(dusty * len(different))])
            prompts = [Prompt(prompt, {UNLEARNABLE: True}) if prompt in unlearnable else prompt for prompt in prompts]
        ranked += [((rank + 0.5) / share, order, prompt) for rank, prompt in enumerate(prompts)]
    return [prompt for _, _, prompt in sorted(ranked)]


def held_out_prompts(count: int | None = None) -> list[str]:
    """The first `count` (all 600 by default) held-out prompts, categories in turn, so that every prefix is balanced.

    Every scene specification is absent from training in all its wordings. There are 6 single and 18 count scenes, which
    repeat; the other categories do not. Raises `ValueError` for a count outside 1-600.
    """
    count = HELD_OUT if count is None else count
    if not 1 <= count <= HELD_OUT:
        raise ValueError(f"there are {HELD_OUT} held-out prompts, asked for {count}")
    each = -(-count // len(CATEGORIES))
    columns = [_cycle(name, held_out=True, count=each) for name in CATEGORIES]
    return [prompt for row in zip(*columns, strict=True) for prompt in row][:count]


def category(prompt: str) -> str:
    """The category of a prompt, one of `CATEGORIES`. Raises `ValueError` where it is not of the tiny world."""
    return parse_prompt(prompt).category


def _dust(mix: str) -> float | None:
    """The share of unlearnable prompts of a dusty mix; None of other names."""
    found = re.fullmatch(r"dusty\((\d*\.\d+)\)", mix, re.ASCII)
    return float(found[1]) if found and 0 < float(found[1]) < 1 else None


def _cycle(name: str, held_out: bool, count: int) -> list[str]:
    prompts = _ordered(name, held_out)
    rounds = -(-count // len(prompts))
    return list(islice((prompt for _ in range(rounds) for prompt in prompts), count))


@cache
def _ordered(name: str, held_out: bool) -> tuple[str, ...]:
    """Every prompt of a category, in the order it is taken."""

    def order(spec: SceneSpec) -> tuple[bool, int]:
        # One wording of every scene before the other wordings, each in an order that looks random and never changes.
        wordings = sorted({spec.prompt, spec.mirrored.prompt}, key=stable_hash)
        return spec.prompt != wordings[0], stable_hash(f"order {spec.prompt}")

    return tuple(spec.prompt for spec in sorted(split_specs(name, held_out), key=order))
