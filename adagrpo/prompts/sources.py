"""Where prompts come from, and what training and held-out ones must not have in common."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..parts.plugins import is_import_path, make_part
from ..text.user_text import cut, shown
from .checks import prompt_problem
from .fields import category_of
from .hub import HubRows
from .prompt import Prompt, data_of
from .reading import Part, Reading
from .rows import FileRows, PromptList, Rows, keys_of, shared_rows

# Of sources in code, whose prompts are held.
MAX_PROMPTS = 2_000_000
MAX_TEXT = 256 * 2**20
LONGEST_NAME = 300
"""Characters of a source's name in messages."""
HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
"""The files of HPDv2's benchmark, a folder."""
_LOOKED_AT = 20


def load_prompts(
    source: str | Sequence[str],
    key: str = "data.prompts",
    reading: Reading | None = None,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = 0.0,
) -> Sequence[str]:
    """Prompts of a source, in order, with their metadata (``Prompt``); those of files and data sets are parsed on use.

    Args:
        source: ``tiny:even``, ``tiny:wide``, ``tiny:dusty(SHARE)``, ``tiny:held_out``; ``package.module:attribute`` of a
            callable that returns them; a file by its ending (``layouts``), the folder of HPDv2's benchmark, ``hub:owner/name``
            (``HubRows``), each of these with ``#train`` or ``#held_out`` behind it for a part; or several files and data sets.
        key: the recipe's key, for messages.
        reading: how files and data sets are read.
        kwargs: arguments of a source named by import path.
        timeout: seconds that such a source may take; 0 waits for ever.

    Raises:
        InputError: unknown source; a file that cannot be meant as prompts; a callable that returns none, too many, or what
            is no prompt.
        RunError: the callable failed.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise InputError(f"{key} = []: name at least one source of prompts")
    if len(sources) == 1 and not sources[0].startswith("hub:"):
        if sources[0].startswith("tiny:"):
            return _tiny(sources[0], key)
        if is_import_path(sources[0]):
            return _from_plugin(sources[0], key, kwargs or {}, timeout)
    reading = reading or Reading()
    found = [rows for each in sources for rows in _stored(each, key, reading, len(sources) > 1)]
    return PromptList([rows for rows, _ in found], [category for _, category in found], reading.duplicates)


def require_disjoint(
    prompts: Sequence[str], held_out: Sequence[str], trained: str | Sequence[str], judged: str | Sequence[str]
) -> None:
    """Refuse held-out prompts that also train: a gain on them would not be one on unseen prompts.

    Args:
        trained, judged: the two sources, for the message.

    Raises:
        InputError: with how many, and which is the first.
    """
    both = shared_rows(keys_of(held_out), keys_of(prompts))
    if len(both):
        share = f"{len(both)} of its {len(held_out)} prompts ({len(both) / len(held_out):.0%})"
        raise InputError(
            f"data.held_out = {_named(judged)}: {share} also train (data.prompts = {_named(trained)}), the first is "
            f"{shown(str(held_out[int(both[0])]))}; take them out of one of the two, or set data.allow_overlap = true"
        )


def prompt_notes(*lists: Sequence[str]) -> list[str]:
    """What there is to tell of prompts that were loaded: rows that were left out."""
    return [note for prompts in lists if isinstance(prompts, PromptList) for note in prompts.notes]


def prompt_category(source: str | Sequence[str], prompts: Sequence[str]) -> Callable[[str], str] | None:
    """The function that names a prompt's category; None where a source's prompts, by the first of them, have none."""
    if isinstance(source, str) and source.startswith("tiny:"):
        from ..tiny.prompts import category

        return category
    if all(category_of(data_of(prompt)) is None for prompt in prompts[:_LOOKED_AT]):
        return None
    return lambda prompt: category_of(data_of(prompt)) or "none"


def _named(source: str | Sequence[str]) -> str:
    return source if isinstance(source, str) else ", ".join(source)


def _tiny(source: str, key: str) -> list[str]:
    from ..tiny.prompts import held_out_prompts, training_prompts

    mix = source.removeprefix("tiny:")
    if mix == "held_out":
        return held_out_prompts()
    try:
        return training_prompts(mix)
    except ValueError as error:
        known = "tiny:even, tiny:wide, tiny:dusty(0.6) or tiny:held_out"
        raise InputError(f"{key} = {cut(source, LONGEST_NAME)}: unknown prompt source: {known}") from error


def _stored(source: str, key: str, reading: Reading, several: bool) -> Iterable[tuple[Rows, str]]:
    """The rows of a file, folder or data set, and the category of those that have none, by the file's name."""
    named = f"{key} = {cut(source, LONGEST_NAME)}"
    divided = re.fullmatch(r"(.*)#(train|held_out)", source, re.DOTALL)
    part = Part(divided[2] == "held_out", reading.held_out_share) if divided else None
    name = divided[1] if divided else source
    if name.startswith("hub:"):
        yield HubRows(name.removeprefix("hub:"), named, reading, part), ""
        return
    if several and (name.startswith("tiny:") or is_import_path(name)):
        raise InputError(f"{named}: only files and data sets can be several; name this source alone")
    path = Path(name)
    styles = [path / f"{style}.json" for style in HPD_STYLES]
    if all(map(os.path.isfile, styles)):  # of a name that no file can have it says no
        for style in styles:
            yield FileRows(style, f"{key} = {style}", reading, part), style.stem
    else:
        yield FileRows(path, named, reading, part), path.stem if several else ""


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
        if len(prompts) > MAX_PROMPTS or characters > MAX_TEXT:
            limits = f"{MAX_PROMPTS} prompts and {MAX_TEXT / 1e6:.0f} million characters"
            raise InputError(f"{named}: gives more than the {limits} that are read; let it end earlier")
    if not prompts:
        raise InputError(f"{named}: gives no prompt; it must give at least one")
    return prompts
