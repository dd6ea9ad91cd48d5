"""Text that comes from outside: files that a user names, and strings that a model or a file will receive."""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_LONE = re.compile("[\ud800-\udfff]")


def read_text(path: str | Path, named: str, limit: int) -> str:
    """The text of a UTF-8 file of at most ``limit`` bytes, without the mark that some editors put first.

    What is no regular file is refused without being opened: a pipe or a device may never answer, or never end.

    Args:
        named: what messages begin with, ``data.prompts = p.txt``.

    Raises:
        InputError: no such file, not a regular one, unreadable, larger, or not UTF-8 text.
    """
    content = _read(path, named, limit)
    if encoding := wide_encoding(content):
        raise InputError(f"{named}: {encoding} text; save it as UTF-8")
    if (at := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, at) + 1
        raise InputError(f"{named}: line {line} holds a NUL: a binary file, or UTF-16 text; save it as UTF-8 text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{named}: not UTF-8 text (byte {error.start}); convert it") from error


def open_regular(path: str | Path, named: str) -> int:
    """A handle, for reading, of a regular file; what is none is refused without being opened.

    Raises:
        InputError: no such file, not a regular one, or not to be opened.
    """
    try:
        _require_file(os.stat(path).st_mode, named)
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            _require_file(os.fstat(handle).st_mode, named)  # it may have changed in between
        except BaseException:
            os.close(handle)
            raise
        return handle
    except InputError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{named}: this file does not exist") from error
    except OSError as error:
        raise InputError(f"{named}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{named}: not the name of a file") from error


def size_limit(limit: int) -> str:
    """What is said of a file that is larger than ``limit`` bytes."""
    size = f"{limit // 2**20} MB" if limit >= 2**20 else f"{limit // 2**10} KB"
    return f"larger than the {size} that such a file may have"


def wide_encoding(content: bytes) -> str | None:
    """The encoding that the mark in front says, where it is not UTF-8's."""
    return next((encoding for mark, encoding in _MARKS.items() if content.startswith(mark)), None)


def _read(path: str | Path, named: str, limit: int) -> bytes:
    with os.fdopen(open_regular(path, named), "rb") as file:
        try:
            content = file.read(limit + 1) or b""
        except OSError as error:
            raise InputError(f"{named}: cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise InputError(f"{named}: {size_limit(limit)}")
    return content


def _require_file(mode: int, named: str) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "not a file")
        raise InputError(f"{named}: {kind}; name a regular file{' inside it' if kind == 'a folder' else ''}")


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises:
        ValueError: not TOML, nested too deeply, or an integer too long to be one.
    """
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        found = re.search(r"[=,\[]\s*[+-]?(\d[\d_]{4300,})", text)
        number = f"{cut(found[1], 20)} in line {text.count(chr(10), 0, found.start(1)) + 1}" if found else "an integer"
        raise ValueError(f"{number} has more than 4300 digits; write a smaller number") from error


def character_problem(text: str, spaces: str = "\t\n") -> str | None:
    """Why ``text`` cannot be meant as it stands: a control character (but those of ``spaces``) or a lone surrogate."""
    if text.isprintable():
        return None
    for found in _CONTROL.finditer(text):
        if found[0] not in spaces:
            return f"holds the control character U+{ord(found[0]):04X}"
    if lone := _LONE.search(text):
        return f"holds U+{ord(lone[0]):04X}, half a character: it was not UTF-8 where it came from"
    return None


def require_within(option: str, value: int, low: int, high: int) -> None:
    """Refuse a number out of range.

    Raises:
        InputError: naming the option and the limit.
    """
    if value < low:
        raise InputError(f"{option} {shown(value)}: must be at least {low}")
    if value > high:
        raise InputError(f"{option} {shown(value)}: must be at most {high}")


def shown(value: object, most: int = 80) -> str:
    """A value for a message: as Python writes it, cut in the middle where it is long."""
    try:
        return cut(repr(value), most)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"{type(value).__name__} too long to show"


def cut(text: str, most: int = 80) -> str:
    """A text of at most ``most`` characters, the middle left out."""
    return text if len(text) <= most else f"{text[: most - most // 4 - 1]}…{text[-(most // 4) :]}"


def nearest(word: str, known: Sequence[str]) -> str:
    """A question for a message: the known word that was meant, where one is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
