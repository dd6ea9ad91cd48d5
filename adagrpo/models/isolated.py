"""A model adapter named by import path, so that nothing it does in a call outlives it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..errors import InputError
from ..parts.isolation import Part, call_part
from .base import FlowModel

# What only computes; a wrong file or a full disk (the rest of the protocol) has handlers of its own.
COMPUTES = ("encode", "decode", "velocity", "resize")
MAY_COMPUTE = ("schedule",)
HANDLES_FILES = ("save_portable", "load_portable", "export", "keep_reference")


def isolated_model(model: Any, name: str) -> FlowModel:
    """``model``, each of whose methods is called as a part (``call_part``).

    Its class becomes a subclass of the former, so that copies, siblings and ``isinstance`` see what they saw. Gradients flow
    through ``velocity`` alone. It runs in the caller's thread and has no time limit: a policy cannot be left behind.

    Args:
        name: for messages.

    Raises:
        InputError: it is no adapter.
    """
    missing = [
        method for method in (*COMPUTES, "around", "trainable", "save_portable") if not callable(getattr(model, method, None))
    ]
    if missing:
        raise InputError(
            f"{name}: made a {type(model).__name__} without {', '.join(missing)}; see adagrpo.models.base.FlowModel"
        )
    kind = type(model)
    held = getattr(model, "__dict__", {})
    computes = [*COMPUTES, *(m for m in MAY_COMPUTE if callable(getattr(model, m, None)))]
    unguarded = [m for m in (*computes, *HANDLES_FILES) if hasattr(model, m) and (m in held or not hasattr(kind, m))]
    if unguarded:
        raise InputError(
            f"{name}: the {kind.__name__} it made has {', '.join(unguarded)} from elsewhere than its class; "
            "define them as methods of the adapter's class (adagrpo.models.base.FlowModel)"
        )
    guarded = {method: _guarded(getattr(kind, method), method, name) for method in computes if hasattr(kind, method)}
    guarded |= {m: _guarded(getattr(kind, m), m, name, (Exception,)) for m in HANDLES_FILES if hasattr(kind, m)}
    try:
        model.__class__ = type(kind.__name__, (kind,), {"__slots__": (), **guarded})
    except TypeError as error:
        raise InputError(
            f"{name}: the {kind.__name__} it made cannot be guarded ({error}); make it an instance of an ordinary class "
            "with the methods of adagrpo.models.base.FlowModel"
        ) from error
    found: FlowModel = model
    return found


def _guarded(
    method: Callable[..., Any], label: str, name: str, passes: tuple[type[Exception], ...] = (InputError,)
) -> Callable[..., Any]:
    part = Part(f"{name}: {label}", passes=passes)

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call_part(part, functools.partial(method, self, **kwargs), *args, gradients=label == "velocity")

    return call
