"""Prompts in JSON: an object or a string per line, or one list of them."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from ..errors import InputError
from ..text.strict_json import from_json
from ..text.user_text import shown
from .checks import cleaned
from .content import BLOCK, LONGEST_ROW, Content
from .fields import prompt_field, shows_pictures
from .index import Index
from .prompt import Prompt
from .structure import SAMPLE

_BLANKS = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class JsonLines:
    """JSON lines: each a string, or an object with the prompt under one key. What else it holds is the prompt's data.

    Attributes:
        field: the key; empty where rows are strings.
    """

    def __init__(self, content: Content, field: str) -> None:
        head = [row for _, _, row in itertools.islice(self.rows(content), SAMPLE)]
        row = next((row for row in head if not isinstance(row, ValueError)), "")
        if head and all(isinstance(each, ValueError) for each in head):
            raise InputError(
                f"{content.named}: is not JSON ({head[0]}): write an object or string per line, or one list of them"
            )
        if isinstance(row, dict):
            self.field, self.pictures = prompt_field(row, field, content.named), shows_pictures(row)
        else:
            self.field, self.pictures = "", False
        self.has_data = bool(self.field) and not self.pictures

    def rows(self, content: Content) -> Iterator[tuple[int, int, Any]]:
        """Start, end and value of every row; a ``ValueError`` for what is no JSON."""
        for start, block in content.blocks():
            for raw in block.split(b"\n"):
                if line := raw.strip():
                    yield start, start + len(raw), _value(line)
                start += len(raw) + 1

    def scan(self, content: Content, index: Index) -> None:
        """Put every row into the index."""
        field = self.field
        for start, stop, row in self.rows(content):
            found = row if not field else row.get(field) if isinstance(row, dict) else None
            if isinstance(found, str) and (text := cleaned(found)):
                index.add(start, stop, text)
            else:
                index.refuse(start, self._problem(row))

    def parse(self, raw: bytes) -> Prompt:
        """The prompt of a row."""
        row = from_json(raw.decode())
        if not self.field:
            return Prompt(cleaned(row))
        text = cleaned(row.pop(self.field))
        return Prompt(text, row) if self.has_data else Prompt(text)

    def _problem(self, row: Any) -> str:
        """Why a row is none."""
        if isinstance(row, ValueError):
            return f"is not JSON: {row}"
        if self.field:
            if not isinstance(row, dict) or self.field not in row:
                return f"has no {shown(self.field)}: {shown(row)}"
            row = row[self.field]
        if not isinstance(row, str):
            return f"holds {shown(row)} where the prompt should be"
        return "holds an empty prompt"


class JsonList(JsonLines):
    """One JSON list of strings or objects. It is read element by element, so that its length costs no memory."""

    def rows(self, content: Content) -> Iterator[tuple[int, int, Any]]:
        """Start, end and value of every element.

        Raises:
            InputError: it is not one list.
        """
        text = _Window(content)
        text.expect("[")
        if text.next() != "]":
            yield text.element()
            while text.next() == ",":
                text.at += 1
                text.next()
                yield text.element()
        text.expect("]")
        if text.next():
            raise text.error("goes on behind the list")


class _Window:
    """The part of a JSON text that is looked at: ``text``, up to byte ``read``; its character ``at`` is the next one."""

    def __init__(self, content: Content) -> None:
        self.content, self.read = content, content.start
        self.text, self.at = "", 0
        self._known = (0, content.start)  # a character and its byte
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def fill(self) -> bool:
        """Read on; False at the end."""
        more = self.content.read(self.read, min(self.read + BLOCK, self.content.size))
        if not more or len(self.text) - self.at > LONGEST_ROW:
            return False
        self._known, self.read = (0, self.offset(self.at)), self.read + len(more)
        try:
            self.text = self.text[self.at :] + self._decoder.decode(more)
        except UnicodeDecodeError as error:
            line = self.content.line(self.read - len(more) + max(0, error.start))
            raise InputError(f"{self.content.named}: line {line} is not UTF-8 text; convert the file") from error
        self.at = 0
        return True

    def offset(self, at: int) -> int:
        """The byte of a character; of one that is not before those asked for earlier."""
        character, byte = self._known
        self._known = (at, byte + len(self.text[character:at].encode()))
        return self._known[1]

    def next(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            self.at = _BLANKS.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.fill():
                return ""

    def expect(self, mark: str) -> None:
        """Step over ``mark``."""
        if self.next() != mark:
            raise self.error(f"needs a {mark} here")
        self.at += 1

    def element(self) -> tuple[int, int, Any]:
        """Start, end and value of the next element."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise self.error("is nested too deeply") from error
            except ValueError as error:
                if self.fill():
                    continue
                self.at = getattr(error, "pos", self.at)
                raise self.error(f"is not JSON: {getattr(error, 'msg', error)}") from error
            if end < len(self.text) or not self.fill():
                break
        start, self.at = self.offset(self.at), end
        return start, self.offset(end), value

    def error(self, problem: str) -> InputError:
        """An error that names the line."""
        return InputError(f"{self.content.named}: line {self.content.line(self.offset(self.at))} {problem}")


def _value(line: bytes) -> Any:
    """The value of a line without blanks around it, or the error."""
    try:
        text = line.decode()
        value, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError) as error:
        return error if isinstance(error, ValueError) else ValueError("nested too deeply")
    return value if end == len(text) else ValueError(f"goes on behind column {end}")
