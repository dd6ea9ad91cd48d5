"""Parts named in a recipe by import path: ``package.module:attribute`` with keyword arguments."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import InputError, RunError


def is_import_path(name: str) -> bool:
    """Whether ``name`` has the form ``package.module:attribute``."""
    module, _, attribute = name.partition(":")
    return bool(attribute) and all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")])


def load_attribute(target: str, key: str) -> Any:
    """The object behind an import path; modules are found from the current folder too.

    Raises:
        InputError: naming the recipe's ``key``, when the module or attribute cannot be imported.
    """
    module, _, attribute = target.partition(":")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise InputError(f"{key} = {target}: cannot be imported: {type(error).__name__}: {error}") from error
    return found


def check_call(function: Callable[..., Any], key: str, target: str, positional: int, kwargs: Mapping[str, Any]) -> None:
    """Refuse a callable that does not accept ``positional`` arguments and ``kwargs``.

    Raises:
        InputError: naming the key and what the call would have been.
    """
    if not callable(function):
        raise InputError(f"{key} = {target}: not callable")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # built-ins without a signature
    try:
        signature.bind(*[None] * positional, **kwargs)
    except TypeError as error:
        given = [f"{positional} arguments"] * bool(positional) + [f"kwargs {', '.join(kwargs)}"] * bool(kwargs)
        raise InputError(f"{key} = {target}: does not take {' and '.join(given) or 'a call'}: {error}") from error


def load_callable(target: str, key: str, positional: int, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """The callable behind an import path with ``kwargs`` bound; its signature is checked now, not in the first iteration.

    What it raises later becomes a ``RunError`` that names ``key``; running out of memory passes through.
    """
    function = load_attribute(target, key)
    check_call(function, key, target, positional, kwargs)

    def call(*args: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (InputError, RunError):
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            raise RunError(f"{key} = {target} failed: {type(error).__name__}: {error}") from error

    return call


def checked(value: Any, shape: Sequence[int], key: str, meaning: str) -> Tensor:
    """A plug-in's result, if it is a tensor of ``shape``.

    Raises:
        RunError: it is not.
    """
    if not isinstance(value, Tensor) or value.shape != tuple(shape):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RunError(f"{key} returned {got}; it must return a tensor of shape {tuple(shape)}, {meaning}")
    return value
