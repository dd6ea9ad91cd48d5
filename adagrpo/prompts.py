"""Prompt sources and the endless seeded stream that feeds training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import InputError
from .plugins import is_import_path, load_callable

MAX_CHARACTERS = 4096


def load_prompts(
    source: str, key: str = "data.prompts", allow_duplicates: bool = False, kwargs: Mapping[str, Any] | None = None
) -> list[str]:
    """Prompts of a source, in order.

    Args:
        source: ``tiny:even``, ``tiny:wide``, ``tiny:held_out``, a UTF-8 text file with one prompt per line (blank lines
            are ignored), or ``package.module:attribute`` of a callable that returns them.
        key: the recipe's key, for messages.
        allow_duplicates: accept repeated lines in a file.
        kwargs: arguments of a source named by import path.

    Raises:
        InputError: unknown source; file missing, empty, not UTF-8, or with over-long or repeated lines.
    """
    if source.startswith("tiny:"):
        from .tiny.prompts import held_out_prompts, training_prompts

        mix = source.removeprefix("tiny:")
        if mix not in ("even", "wide", "held_out"):
            raise InputError(f"{key} = {source}: unknown prompt source: tiny:even, tiny:wide or tiny:held_out")
        return held_out_prompts() if mix == "held_out" else training_prompts(mix)
    if is_import_path(source):
        return _from_plugin(source, key, kwargs or {})
    return _from_file(Path(source), key, allow_duplicates)


def prompt_category(source: str) -> Callable[[str], str] | None:
    """The function that names a prompt's category, for sources that have categories."""
    if not source.startswith("tiny:"):
        return None
    from .tiny.prompts import category

    return category


def _from_plugin(source: str, key: str, kwargs: Mapping[str, Any]) -> list[str]:
    prompts = list(load_callable(source, key, 0, kwargs)())
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise InputError(f"{key} = {source}: must return at least one prompt, and only non-empty strings")
    return prompts


def _from_file(path: Path, key: str, allow_duplicates: bool) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise InputError(f"{key} = {path}: this file does not exist; name a text file with one prompt per line") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{key} = {path}: not UTF-8 text (byte {error.start}); convert it") from error
    except OSError as error:
        raise InputError(f"{key} = {path}: cannot be read: {error.strerror}") from error
    prompts: dict[str, int] = {}
    kept = []
    for number, line in enumerate(lines, 1):
        prompt = line.strip()
        if not prompt:
            continue
        if len(prompt) > MAX_CHARACTERS:
            raise InputError(f"{key} = {path}: line {number} is longer than {MAX_CHARACTERS} characters; shorten it")
        first = prompts.setdefault(prompt, number)
        if first != number and not allow_duplicates:
            raise InputError(
                f"{key} = {path}: line {number} repeats line {first}; remove it or set data.allow_duplicates = true"
            )
        kept.append(prompt)
    if not kept:
        raise InputError(f"{key} = {path}: holds no prompt; write one per line")
    return kept


class PromptStream:
    """An endless stream over a list of prompts, shuffled anew each epoch; a function of seed and position alone.

    Attributes:
        position: prompts taken so far; setting it rewinds or forwards the stream.
    """

    def __init__(self, prompts: Sequence[str], seed: int, position: int = 0) -> None:
        self.prompts, self.seed, self.position = list(prompts), seed, position
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def take(self, count: int) -> list[str]:
        """The next ``count`` prompts."""
        return [self.prompts[i] for i in self.take_numbers(count)]

    def take_numbers(self, count: int) -> list[int]:
        """The next ``count`` prompts by their place in the list."""
        taken = [self._at(self.position + i) for i in range(count)]
        self.position += count
        return taken

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.prompts))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.prompts), generator=generator)
        return int(self._order[offset])
