"""torch.compile for rollouts: one static graph per shape, however many there are, and a failure that is told."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from ..errors import RunError
from .device import capturing, out_of_memory

T = TypeVar("T")
Say = Callable[[str], None]
DISABLING = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
ENDLESS = 2**31 - 1


def disabled() -> str | None:
    """The environment variable that turns torch.compile into nothing; None where there is none."""
    return next((name for name in DISABLING if os.environ.get(name) == "1"), None)


def without_limits() -> AbstractContextManager[Any]:
    """Within it no number of graphs makes torch.compile raise or run a function uncompiled.

    Its two limits count per code object over the whole process: all blocks of all copies share them, and each number of
    rows, size and text length is a graph of its own. They guard against functions that never stop recompiling; ours have
    as many graphs as the recipe has shapes.
    """
    return torch._dynamo.config.patch(recompile_limit=ENDLESS, accumulated_recompile_limit=ENDLESS)


class Compilation:
    """Runs what contains compiled functions, until one of them cannot be compiled.

    Args:
        what: subject of the notice.
        undo: makes every compiled function plain again.
        say: told when that happens, and the run goes on; None makes it an error.
    """

    def __init__(self, what: str, undo: Callable[[], None], say: Say | None) -> None:
        self.what, self.undo, self.say = what, undo, say
        self.active = True

    def __call__(self, run: Callable[[], T]) -> T:
        """``run()``; after a failure once more, uncompiled, so that an error of the computation itself is raised as what it is.

        Raises:
            RunError: it cannot be compiled, and nobody is to be told.
        """
        if not self.active:
            return run()
        try:
            with without_limits():
                return run()
        except Exception as error:
            if out_of_memory(error) or capturing():  # the capture's failure; what is compiled has run before
                raise
            self.active = False
            self.undo()
            inner = getattr(error, "inner_exception", error)  # torch names the compiler first, then what it raised
            reason = f"{type(inner).__name__}: {(str(inner).strip().splitlines() or ['no message'])[0]}"
            if self.say is None:
                with contextlib.suppress(torch.OutOfMemoryError):  # no news beside the first error
                    run()
                raise RunError(
                    f"{self.what} cannot be compiled: {reason}; use another engine.forward, such as eager"
                ) from error
            self.say(f"{self.what} cannot be compiled and run uncompiled from now on, slower: {reason}")
            return run()
