"""JSON as the standard has it: what is not a number becomes null, what is no Unicode text is spelt out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

# Line ends to Python, JavaScript and editors, but not to JSON; they can only stand inside strings.
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def to_json(value: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """JSON that every reader accepts (RFC 8259), that encodes as UTF-8, and without ``indent`` is one line to every reader.

    NaN and infinities, which JSON does not have, become null; lone surrogates, as undecodable file names bring them, are
    spelt out (``\\udcff``).

    Args:
        value: dicts, lists, tuples, strings, numbers, bools and None.
        default: makes one of these of anything else.

    Raises:
        TypeError: something else, without ``default``.
    """
    return json.dumps(_clean(value), indent=indent, ensure_ascii=False, allow_nan=False, default=default).translate(_LINE_ENDS)


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text, of files by earlier versions or other hands too: ``NaN`` is read as such.

    Raises:
        ValueError: not JSON, not Unicode, nested too deeply, or an integer too long.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _clean(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_key(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list | tuple) else value


def _key(key: Any) -> Any:
    """A name; numbers become theirs, as ``json`` does it."""
    return key if isinstance(key, int | float | None) else _clean(key)
