"""What lines of text are instead of prompts: JSON, a table, quoted strings."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence

from ..text.strict_json import from_json
from .fields import COLUMNS

_OTHER_COLUMNS = {"id", "idx", "index", "path", "file", "filename", "url", "split", "category"}
SAMPLE = 200  # lines that tell the structure of a file


def structure_of(head: Sequence[str], whole: Callable[[], str]) -> str | None:
    """What lines are instead of prompts: JSON, a table, quoted strings; None where they are prompts.

    Commas, quotes and brackets are usual in prompts: only what holds for every line is structure.

    Args:
        head: the first ``SAMPLE`` lines, stripped and not blank, at least one.
        whole: the text of the file; empty where it is too much to be looked at.
    """
    if all(line[0] in "[{" and _is_json(line) for line in head):
        return "every line is JSON"
    if head[0] in ("[", "{") or (head[0][0] in "[{" and _is_json(whole())):
        return "it holds JSON"
    if _names(head[0].strip("\"'"), COLUMNS):
        return f"its first line is {head[0]}, as a table's is"
    for mark, name in (("\t", "tab"), (",", "comma"), (";", "semicolon")):
        if _is_table(head, mark):
            return f"it is a table whose columns are parted by a {name}"
    if len(head) > 1 and len({line.count("\t") for line in head}) == 1 and "\t" in head[0]:
        return "every line has columns parted by a tab"
    rows = head[1:] if re.fullmatch(r'"?\w+"?([,;|]"?\w+"?)+', head[0]) and len(head) > 2 else head
    if len(head) > 1 and all(re.match(r"\d+[,;|]", line) for line in rows):
        return "every line begins with a number and a comma"
    if len(head) > 1 and all(line.startswith("- ") for line in head):
        return "every line is an item of a list (- )"
    if len(head) > 1 and all(re.fullmatch(r'"[^"]*",?', line) for line in head):
        return "every line is a string in quotes"
    return None


def _is_table(lines: Sequence[str], mark: str) -> bool:
    """Whether the first line names columns: a prompt's among them, by single words without a blank or above as many columns;
    or by single words above as many columns where a name is usual in tables or a field is quoted."""
    raw = lines[0].split(mark)
    names = [name.strip().strip('"').lower() for name in raw]
    if len(names) < 2 or len(lines) < 2:
        return False
    bare = all(re.fullmatch(r'"?\w+"?', name) for name in raw)
    if any(_names(name, COLUMNS) for name in names):
        if bare:
            return True
    elif not bare or not (
        any(_names(name, _OTHER_COLUMNS) for name in names) or any(re.search(rf'(^|{mark})"', line) for line in lines[1:])
    ):
        return False
    if not all(re.fullmatch(r"[\w .-]{1,40}", name) for name in names):
        return False
    try:
        rows = list(csv.reader(lines, delimiter=mark))
    except csv.Error:
        return False
    return all(len(row) == len(names) for row in rows)


def _names(name: str, columns: set[str]) -> bool:
    """Whether a single word is one of ``columns``, or has it as a part: prompt_en."""
    return re.fullmatch(r"\w+", name) is not None and not columns.isdisjoint(name.lower().split("_"))


def _is_json(text: str) -> bool:
    try:
        return isinstance(from_json(text), dict | list)
    except ValueError:
        return False
