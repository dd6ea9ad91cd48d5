"""Where prompts come from, and what training and held-out ones must not have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..parts.plugins import is_import_path, make_part
from ..text.user_text import shown
from .file import MAX_BYTES, MAX_PROMPTS, prompt_problem, read_prompt_file, same
from .prompt import Prompt


def load_prompts(
    source: str,
    key: str = "data.prompts",
    allow_duplicates: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = 0.0,
) -> list[str]:
    """Prompts of a source, in order.

    Args:
        source: ``tiny:even``, ``tiny:wide``, ``tiny:held_out``, a text file (``read_prompt_file``), or
            ``package.module:attribute`` of a callable that returns them.
        key: the recipe's key, for messages.
        allow_duplicates: accept repeated lines in a file.
        kwargs: arguments of a source named by import path.
        timeout: seconds that such a source may take; 0 waits for ever.

    Raises:
        InputError: unknown source; a file that cannot be meant as prompts; a callable that returns none, too many, or what
            is no prompt.
        RunError: the callable failed.
    """
    if source.startswith("tiny:"):
        from ..tiny.prompts import held_out_prompts, training_prompts

        mix = source.removeprefix("tiny:")
        if mix not in ("even", "wide", "held_out"):
            raise InputError(f"{key} = {source}: unknown prompt source: tiny:even, tiny:wide or tiny:held_out")
        return held_out_prompts() if mix == "held_out" else training_prompts(mix)
    if is_import_path(source):
        return _from_plugin(source, key, kwargs or {}, timeout)
    return read_prompt_file(Path(source), key, allow_duplicates)


def require_disjoint(prompts: Sequence[str], held_out: Sequence[str], trained: str, judged: str) -> None:
    """Refuse held-out prompts that also train: a gain on them would not be one on unseen prompts.

    Args:
        trained, judged: the two sources, for the message.

    Raises:
        InputError: with how many, and which is the first.
    """
    known = {same(prompt) for prompt in prompts}
    both = [prompt for prompt in held_out if same(prompt) in known]
    if both:
        share = f"{len(both)} of its {len(held_out)} prompts ({len(both) / len(held_out):.0%})"
        raise InputError(
            f"data.held_out = {judged}: {share} also train (data.prompts = {trained}), the first is {shown(both[0])}; take "
            "them out of one of the two, or set data.allow_overlap = true"
        )


def prompt_category(source: str) -> Callable[[str], str] | None:
    """The function that names a prompt's category, for sources that have categories."""
    if not source.startswith("tiny:"):
        return None
    from ..tiny.prompts import category

    return category


def _from_plugin(source: str, key: str, kwargs: Mapping[str, Any], timeout: float) -> list[str]:
    named = f"{key} = {source}"
    prompts: list[str] = make_part(source, key, (), kwargs, lambda found: _read_to_the_end(found, named), timeout)
    return prompts


def _read_to_the_end(found: Any, named: str) -> list[str]:
    """Whatever a source returned or generates, within bounds."""
    if isinstance(found, str | bytes | Mapping) or not isinstance(found, Iterable):
        raise InputError(f"{named}: returned a {type(found).__name__}; return a list of prompts, one string each")
    prompts: list[str] = []
    characters = 0
    for prompt in found:
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"{named}: prompt {len(prompts)} is {shown(prompt)}; return non-empty strings only")
        if problem := prompt_problem(prompt):
            raise InputError(f"{named}: prompt {len(prompts)} {problem}")
        prompts.append(prompt if isinstance(prompt, Prompt) else str(prompt))
        characters += len(prompt)
        if len(prompts) > MAX_PROMPTS or characters > MAX_BYTES:
            limits = f"{MAX_PROMPTS} prompts and {MAX_BYTES / 1e6:.0f} million characters"
            raise InputError(f"{named}: gives more than the {limits} that are read; let it end earlier")
    if not prompts:
        raise InputError(f"{named}: gives no prompt; it must give at least one")
    return prompts
