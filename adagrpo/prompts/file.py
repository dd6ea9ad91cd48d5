"""Prompt files: one prompt per line, and nothing that was meant as something else."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..text.strict_json import from_json
from ..text.user_text import character_problem, read_text

MAX_CHARACTERS = 4096
MAX_PROMPTS = 2_000_000
MAX_BYTES = 256 * 2**20

_TABLES = {".csv": "a CSV table", ".tsv": "a TSV table", ".xlsx": "a spreadsheet", ".ods": "a spreadsheet"}
_DOCUMENTS = {".json": "JSON", ".jsonl": "JSON lines", ".ndjson": "JSON lines", ".parquet": "Parquet", ".arrow": "Arrow"}
_CONFIGURATION = {".toml": "TOML", ".yaml": "YAML", ".yml": "YAML", ".xml": "XML", ".html": "HTML"}
_PACKED = dict.fromkeys((".gz", ".zip", ".zst", ".xz", ".bz2"), "compressed data")
_SUFFIXES = {**_TABLES, **_DOCUMENTS, **_CONFIGURATION, **_PACKED}
_COLUMNS = {"prompt", "prompts", "caption", "captions", "text", "texts", "description", "descriptions"}
_OTHER_COLUMNS = {"id", "idx", "index", "path", "file", "filename", "url", "split", "category"}
_SAMPLE = 200  # lines that tell the structure of a file


def read_prompt_file(path: Path, key: str, allow_duplicates: bool) -> list[str]:
    """The prompts of a UTF-8 text file, one per line, in order; blank lines are ignored.

    Raises:
        InputError: naming ``key``, file and line: not such a file, a table or document instead of lines, too large, no prompt,
            over-long, repeated or garbled lines.
    """
    named = f"{key} = {path}"
    if kind := _SUFFIXES.get(path.suffix.lower()):
        raise InputError(f"{named}: {_refusal(f'its name says {kind}', path)}")
    numbered = enumerate(read_text(path, named, MAX_BYTES).split("\n"), 1)
    lines = [(number, line) for number, raw in numbered if (line := raw.replace("\ufeff", "").strip())]
    if not lines:
        raise InputError(f"{named}: holds no prompt; write one per line")
    if len(lines) > MAX_PROMPTS:
        raise InputError(f"{named}: holds {len(lines)} prompts; at most {MAX_PROMPTS} are read: shorten it")
    if structure := structure_of([line for _, line in lines]):
        raise InputError(f"{named}: {_refusal(structure, path)}")
    first: dict[str, int] = {}
    for number, line in lines:
        if problem := prompt_problem(line, spaces="\t"):
            raise InputError(f"{named}: line {number} {problem}")
        known = first.setdefault(same(line), number)
        if known != number and not allow_duplicates:
            raise InputError(f"{named}: line {number} repeats line {known}; remove it or set data.allow_duplicates = true")
    return [line for _, line in lines]


def prompt_problem(prompt: str, spaces: str = "\t\n") -> str | None:
    """Why a prompt is refused, with the remedy; None where it is not. ``spaces``: control characters that may stand in it."""
    if len(prompt) > MAX_CHARACTERS:
        return f"is longer than {MAX_CHARACTERS} characters; shorten it"
    if problem := character_problem(prompt, spaces):
        return f"{problem}; remove it"
    return None


def same(prompt: str) -> str:
    """What prompts have in common that say the same: neither Unicode's composed forms nor runs of blanks tell them apart."""
    return " ".join(unicodedata.normalize("NFC", prompt).split())


def structure_of(lines: Sequence[str]) -> str | None:
    """What lines are instead of prompts: JSON, a table, quoted strings; None where they are prompts.

    Commas, quotes and brackets are usual in prompts: only what holds for every line (of the first few hundred) is structure.

    Args:
        lines: stripped and not blank.
    """
    head = lines[:_SAMPLE]
    if all(line[0] in "[{" and _is_json(line) for line in head):
        return "every line is JSON"
    bracketed = lines[0][0] in "[{" and lines[-1][-1] in "]}"
    if lines[0] in ("[", "{") or (bracketed and _is_json("\n".join(lines))):
        return "it holds JSON"
    if _names(lines[0].strip("\"'"), _COLUMNS):
        return f"its first line is {lines[0]}, as a table's is"
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
    if any(_names(name, _COLUMNS) for name in names):
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


def _refusal(reason: str, path: Path) -> str:
    ending, name = path.suffix.lower(), path.name
    if "JSON" in reason:
        lines = ending in (".jsonl", ".ndjson") or "every line" in reason
        how = f" (`jq -r {'.prompt' if lines else '.[]'} {name} > prompts.txt`, with your field's name)"
    else:
        how = ", without columns, names and quotes"
    return f"{reason}; a prompt file is plain text with one prompt per line: write the prompts alone to a .txt file{how}"
