"""A log of collectives, ours and those of libraries (FSDP's): what every rank does must be the same, call by call."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..text.strict_json import to_json

NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional")
PACKAGE = Path(__file__).parents[1]
HIDDEN = {PACKAGE / "engine" / f"{name}.py" for name in ("collectives", "ranks", "share")}


@dataclasses.dataclass(frozen=True)
class Call:
    """A collective as one rank called it.

    Attributes:
        op: such as ``allreduce_``.
        shape, dtype: of what this rank gives.
        place: the line of this package that wanted it, ``file:line``.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    place: str

    @property
    def bytes(self) -> int:
        """Of what this rank gives."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return torch.Size(self.shape).numel() * dtype.itemsize


class CollectiveLog(TorchDispatchMode):
    """Within it every collective of this thread is kept, and told to ``write`` before it runs.

    Args:
        write: such as a line in a file, for what a rank that hangs or dies last did.

    Attributes:
        calls: so far.
    """

    def __init__(self, write: Callable[[Call], object] = lambda call: None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.write = write

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Keep it, if it is one."""
        if func.namespace in NAMESPACES and not func.__name__.startswith(("wait_tensor", "monitored")):
            result_first = "gather" in func.__name__ or "scatter" in func.__name__
            given = next(_tensors(args[::-1] if result_first else args), None)
            shape, dtype = (tuple(given.shape), given.dtype) if given is not None else ((0,), torch.uint8)
            call = Call(func.__name__.partition(".")[0], shape, str(dtype).removeprefix("torch."), place())
            self.calls.append(call)
            self.write(call)
        return func(*args, **(kwargs or {}))


def log_into(file: Path) -> CollectiveLog:
    """A log that appends each call to a file of JSON lines."""

    def write(call: Call) -> None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(to_json(dataclasses.asdict(call)) + "\n")

    return CollectiveLog(write)


def _tensors(given: Iterable[Any]) -> Iterator[Tensor]:
    for value in given:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def place() -> str:
    """The line of this package, outside its own machinery of ranks, that is at work in this thread; empty of none."""
    frame = inspect.currentframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and path not in HIDDEN:
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
