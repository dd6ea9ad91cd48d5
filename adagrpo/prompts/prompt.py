"""A prompt with what travels with it: an OCR target, a GenEval record, test points, a category."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

NO_DATA: Mapping[str, Any] = MappingProxyType({})


class Prompt(str):
    """A prompt's text, a string in every respect, with its metadata.

    Equality, hash, order and JSON are those of the text, and whatever a string's methods return is a plain string. Copies and
    pickles keep the data.

    Attributes:
        data: read-only.
    """

    __slots__ = ("data",)
    data: Mapping[str, Any]

    def __new__(cls, text: str, data: Mapping[str, Any] = NO_DATA) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.data = MappingProxyType(data)
        return prompt

    def __reduce__(self) -> tuple[type[Prompt], tuple[str, dict[str, Any]]]:
        return type(self), (str(self), dict(self.data))

    def __copy__(self) -> Prompt:
        return self

    def __deepcopy__(self, memo: object) -> Prompt:
        return self


def data_of(prompt: str) -> Mapping[str, Any]:
    """The metadata of a prompt; empty for a plain string."""
    return prompt.data if isinstance(prompt, Prompt) else NO_DATA
