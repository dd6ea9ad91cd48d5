"""Recipes: TOML over bases over the defaults of ``recipe.keys``, strict and readable when refused."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import types
import typing
from collections.abc import Callable, Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tomli_w

from ..errors import InputError
from ..text.redaction import REDACTED, is_secret, redacted
from ..text.refusals import UNSUPPORTED
from ..text.user_text import character_problem, cut, nearest, parse_toml, read_text, shown
from .keys import Config
from .layers import Layer, Recipe, resolve

MAX_BYTES = 2**16
MOST_BASES = 8


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in _shipped().iterdir() if entry.name.endswith(".toml"))


def recipe_title(name: str) -> str:
    """What a shipped recipe is: the first sentence of the comment that it begins with."""
    lines = (_shipped() / f"{name}.toml").read_text("utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"(?<=\w[.:;])\s", comment, maxsplit=1)[0].rstrip(".:;")


def load_recipe(recipe: str | Path) -> Config:
    """The keys and values of ``read_recipe``."""
    return read_recipe(recipe).config


def read_recipe(recipe: str | Path) -> Recipe:
    """Read a shipped recipe by name, or a TOML file by path, over the recipe that it names as its ``base``, and so on.

    A base is named as a recipe is, but its path is relative to the file that names it.

    Raises:
        InputError: unknown recipe, unreadable file, unknown key or wrong type; bases in a circle, or too many.
    """
    files = [_open(str(recipe), Path(), "")]
    while base := _base_of(files[-1]):
        circle = base.identity in [file.identity for file in files]
        files.append(base)
        if circle or len(files) > MOST_BASES + 1:
            chain = " → ".join(cut(file.source) for file in files)
            raise InputError(f"{'bases in a circle' if circle else f'more than {MOST_BASES} bases'}: {chain}; leave one out")
    return resolve([_layer(file, file is not files[0]) for file in reversed(files)])


class _File(NamedTuple):
    """A recipe file: name of a shipped recipe or path, the folder that its base is relative to (None if shipped), content."""

    name: str
    folder: Path | None
    tables: dict[str, Any]

    @property
    def source(self) -> str:
        """How messages name it."""
        return f"recipe {self.name}" if self.folder is None else self.name

    @property
    def identity(self) -> str:
        """The same of the same file, however it was named."""
        return self.source if self.folder is None else os.path.realpath(self.name)


def _open(name: str, folder: Path | None, asked: str) -> _File:
    """A recipe by name, or a file relative to ``folder``; ``asked`` is what messages say of who names it."""
    names = recipe_names()
    if name in names:
        text = (_shipped() / f"{name}.toml").read_text("utf-8")
        return _File(name, None, _parsed(text, f"recipe {name}"))
    if folder is None or not os.path.exists(folder / name):
        where = f" relative to {folder}" if asked else ""
        known = f"name one that ships (`adagrpo recipes` lists them), or a TOML file{where}"
        raise InputError(f"{asked}no recipe {shown(name)}{nearest(name, names)}: {known}")
    path = folder / name
    return _File(str(path), path.parent, _parsed(read_text(path, f"{asked}{path}", MAX_BYTES), str(path)))


def _shipped() -> Traversable:
    """The folder of the recipes that ship."""
    return resources.files(__package__) / "shipped"


def _parsed(text: str, source: str) -> dict[str, Any]:
    try:
        return parse_toml(text)
    except ValueError as error:
        raise InputError(f"{source}: not valid TOML: {error}") from error


def _base_of(file: _File) -> _File | None:
    """The file that another names as its base."""
    if "base" not in file.tables:
        return None
    name = file.tables["base"]
    asked = f"{file.source}: base = {shown(name)}: "
    if not isinstance(name, str):
        raise InputError(f"{asked}expected the name of a recipe, or a TOML file")
    if problem := character_problem(name, ""):
        raise InputError(f"{asked}{problem}; remove it")
    return _open(name, file.folder, asked)


def _layer(file: _File, is_base: bool) -> Layer:
    """What a file says, its keys and types checked."""
    tables = _renamed({key: value for key, value in file.tables.items() if key != "base"}, file.source)
    values = _named(_build(Config, tables, file.source, ""), tables)
    if is_base:
        label = f"base {cut(file.name) if file.name.isprintable() else shown(file.name)}"
        return Layer(label, label, values, own=False)
    return Layer("this recipe", file.source, values, own=file.folder is not None)


def _renamed(tables: dict[str, Any], source: str) -> dict[str, Any]:
    """The tables with the present name of a key that had another in earlier versions."""
    data = tables.get("data")
    if not isinstance(data, dict) or not isinstance(keeps := data.get("allow_duplicates"), bool):
        return tables
    if "duplicates" in data:
        raise InputError(f"{source}: data.allow_duplicates is the former name of data.duplicates; leave it out")
    others = {key: value for key, value in data.items() if key != "allow_duplicates"}
    return {**tables, "data": {**others, "duplicates": "keep" if keeps else "error"}}


def _named(config: Any, tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value in ``config``, of the keys in ``tables``."""
    found: dict[str, Any] = {}
    for name, told in tables.items():
        value, key = getattr(config, name), f"{prefix}{name}"
        if dataclasses.is_dataclass(value):
            found |= _named(value, told, f"{key}.")
            continue
        found[key] = value
        if name == "rewards":
            for i, reward in enumerate(value):
                found |= _named(reward, told[i], f"{key}.{i}.")
    return found


def to_toml(config: Config) -> str:
    """The resolved recipe as TOML, without secrets; but for those ``load_recipe`` reads it back to an equal Config."""
    return tomli_w.dumps(_plain(dataclasses.asdict(redacted(config))))


def annotated(recipe: Recipe) -> str:
    """The resolved recipe as by ``to_toml``, with a comment behind every value that says where it comes from."""
    return "\n".join(_annotated(_plain(dataclasses.asdict(redacted(recipe.config))), "", "", recipe.origin)) + "\n"


def _annotated(table: dict[str, Any], header: str, prefix: str, origin: Callable[[str], str]) -> Iterator[str]:
    """Lines of a table whose own tables begin with ``header`` in TOML, and its keys with ``prefix``."""
    tables = {key: value for key, value in table.items() if isinstance(value, dict) or (key == "rewards" and value)}
    for key in [key for key in table if key not in tables]:
        first, *more = tomli_w.dumps({key: table[key]}).rstrip("\n").split("\n")
        yield from (f"{first}  # {origin(prefix + key)}", *more)
    for key, value in tables.items():
        if key == "kwargs":
            inner = {name: table for name, table in value.items() if isinstance(table, dict)}
            plain = {name: leaf for name, leaf in value.items() if name not in inner}
            yield from ("", f"[{header}{key}]  # {origin(prefix + key)}", *tomli_w.dumps(plain).split("\n")[:-1])
            for name, leaves in inner.items():
                (head, *lines) = tomli_w.dumps({name: leaves}).split("\n")[:-1]
                yield from ("", f"[{header}{key}.{head[1:-1]}]", *lines)
        elif key == "rewards":
            for i, reward in enumerate(value):
                yield from ("", f"[[{key}]]", *_annotated(reward, f"{key}.", f"{key}.{i}.", origin))
        else:
            yield from ("", f"[{header}{key}]", *_annotated(value, f"{header}{key}.", f"{prefix}{key}.", origin))


def _build(cls: Any, data: dict[str, Any], source: str, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = list(hints) if prefix else ["base", *hints]
    for key in data:
        if key not in hints:
            why = f": {UNSUPPORTED[key]}" if key in UNSUPPORTED else nearest(key, known)
            raise InputError(f"{source}: unknown key {prefix}{cut(key)}{why}")
    values = {key: _convert(hints[key], value, source, prefix + key) for key, value in data.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, source: str, key: str) -> Any:
    def wrong(expected: str) -> InputError:
        named = any(is_secret(part, "text") for part in f".{key}".partition(".kwargs.")[2].split("."))
        return InputError(f"{source}: {key} = {REDACTED if named else shown(value)}: expected {expected}")

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise wrong("a table")
        return _build(hint, value, source, f"{key}.")
    if origin is Literal:
        if value not in args:
            hint = nearest(value, list(args)) if isinstance(value, str) else ""
            raise InputError(f"{source}: {key} = {shown(value)}{hint}: one of {', '.join(args)}")
        return value
    if origin is tuple:
        fixed = len(args) if args[-1] is not Ellipsis else None
        if not isinstance(value, list) or (fixed and len(value) != fixed):
            raise wrong(f"a list of {fixed} values" if fixed else "a list")
        return tuple(_convert(args[0], item, source, f"{key}.{i}") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong("a table")
        return {k: _convert(args[1], v, source, f"{key}.{k}") for k, v in value.items()}
    if origin is typing.Union:  # a number, or one of some words
        number, words = args[0], typing.get_args(args[1])
        if isinstance(value, str) and value not in words:
            raise wrong(f"a number, or {' or '.join(words)}")
        return value if isinstance(value, str) else _convert(number, value, source, key)
    if origin is types.UnionType:
        for kind in args:
            shape = typing.get_origin(kind) or kind
            if isinstance(value, list if shape is tuple else shape):
                return value if shape is kind else _convert(kind, value, source, key)
        numbers = "a number, true or false, " if float in args else "or "
        table = ", or a table of these" if any(typing.get_origin(kind) is dict for kind in args) else ""
        raise wrong(f"a string, {numbers}a list of strings{table}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise wrong("a number") from error
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise wrong({int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[hint])
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
