"""Prompt lists of the tiny world: training mixes and held-out prompts, the same on every machine."""

from __future__ import annotations

from functools import cache
from itertools import islice

from adagrpo.tiny.scenes import CATEGORIES, SceneSpec, parse_prompt, split_specs, stable_hash

HELD_OUT = 600
_MIXES = {
    "even": dict.fromkeys(CATEGORIES, 80),
    "wide": {"single": 220, "count": 45, "pair": 45, "relation": 45, "combination": 45},
}


def training_prompts(mix: str) -> list[str]:
    """A pool of 400 training prompts; its order interleaves the categories.

    `even`: each category a fifth. `wide`: 55 % trivial singles, as prompt sets from life hold many trivial prompts.
    A category with fewer specifications than its share repeats them evenly (there are 18 single training scenes).
    Raises `ValueError` for another name.
    """
    if mix not in _MIXES:
        raise ValueError(f"unknown mix {mix!r}: one of {tuple(_MIXES)}")
    shares = _MIXES[mix]
    ranked = []
    for order, (name, share) in enumerate(shares.items()):
        prompts = _cycle(name, held_out=False, count=share)
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
