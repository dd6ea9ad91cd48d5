"""Parts named in a recipe by import path: ``package.module:attribute`` with keyword arguments."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, RunError
from ..text.redaction import resolved
from .isolation import Part, build_part, call_part

TIMEOUT_KEY = "train.part_timeout"


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

    def imported() -> Any:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        return found

    return build_part(Part(f"{key} = {target}", InputError, ": cannot be imported"), imported)


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


def load_callable(
    target: str, key: str, positional: int, kwargs: Mapping[str, Any], timeout: float = 0.0
) -> Callable[..., Any]:
    """The callable behind an import path with ``kwargs`` bound, as ``call_part`` calls it.

    Its signature is checked now, not in the first iteration. What it raises later becomes a ``RunError`` that names ``key``.

    Args:
        timeout: seconds per call; 0 waits for ever.
    """
    function, kwargs = load_attribute(target, key), resolved(kwargs, key)
    check_call(function, key, target, positional, kwargs)
    part = Part(f"{key} = {target}", timeout=timeout, timeout_key=TIMEOUT_KEY)
    return lambda *args: call_part(part, functools.partial(function, **kwargs), *args)


def make_part(
    target: str,
    key: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    taken: Callable[[Any], Any] = lambda made: made,
    timeout: float = 0.0,
) -> Any:
    """What the callable behind an import path makes at the start of a run: a model adapter, prompts.

    Args:
        taken: what is wanted of it, e.g. a list of what it generates; part of the call.
        timeout: seconds; 0 waits for ever.

    Raises:
        InputError: it cannot be imported or called so; of its own making.
        RunError: naming the key, whatever else went wrong.
    """
    function, kwargs = load_attribute(target, key), resolved(kwargs, key)
    check_call(function, key, target, len(args), kwargs)
    part = Part(f"{key} = {target}", passes=(InputError, RunError), timeout=timeout, timeout_key=TIMEOUT_KEY)
    return build_part(part, lambda: taken(function(*args, **kwargs)))


def checked(value: Any, shape: Sequence[int], key: str, meaning: str, whole: bool = False) -> Tensor:
    """A part's result, if it is a dense tensor of real numbers of ``shape``.

    Args:
        whole: they must be integers.

    Raises:
        RunError: it is not.
    """
    if not isinstance(value, Tensor) or value.shape != tuple(shape):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RunError(f"{key} returned {got}; it must return a tensor of shape {tuple(shape)}, {meaning}")
    wrong = value.is_floating_point() or value.dtype is torch.bool if whole else value.is_complex()
    if wrong or value.is_complex() or value.layout is not torch.strided or value.is_quantized:
        kind = "integers" if whole else "real numbers"
        raise RunError(f"{key} returned a {value.layout} tensor of {value.dtype}; it must be a dense tensor of {kind}")
    return value
