"""Sampling that ran out of memory is tried again, in smaller batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType

import torch

from ..errors import RunError
from ..forward.device import out_of_memory
from .executor import RolloutExecutor
from .ranks import MemoryElsewhere, Ranks


class Attempt:
    """One try, of all ranks; memory that runs out inside, on any of them, does not leave it, if the executors can take smaller
    batches. What ranks do together inside begins with ``Ranks.require_well``, for one that ran out of memory comes here.

    Raises:
        RunError: out of memory again.
    """

    def __init__(self, executor: RolloutExecutor, ranks: Ranks) -> None:
        self._executor, self._ranks, self.failed = executor, ranks, False

    def __enter__(self) -> None:
        self.failed = False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        own, largest = None, error.rows if isinstance(error, MemoryElsewhere) else 0
        if error is None:
            largest = self._ranks.most(0, "the end of sampling")
        elif isinstance(error, RuntimeError) and not largest:
            if not out_of_memory(error):
                return False
            own, largest = error, self._ranks.most(max(1, self._executor.limit.largest), "the end of sampling, out of memory")
        if not largest:
            return False
        device = self._executor.model.device
        if device.type == "cuda":  # the second stream may still read what the attempt held, and its blocks are kept until then
            torch.cuda.synchronize(device)
        self._executor.halve_rows(own, largest)
        self.failed = True
        return True


def attempts(executor: RolloutExecutor, say: Callable[[str], None], ranks: Ranks | None = None) -> Iterator[Attempt]:
    """``for attempt in attempts(...): with attempt: sample()``: once more in batches of half the size if memory runs out, on
    all ranks.

    What the body keeps in variables of its caller outlives a failed attempt: let a function of its own sample.
    """
    while True:
        attempt = Attempt(executor, ranks or Ranks())
        yield attempt
        if not attempt.failed:
            return
        torch.cuda.empty_cache()  # only now is the failed attempt's last tensor gone, with the error that held its frames
        say(f"out of memory while sampling: continuing with engine.max_rows = {executor.limit.max_rows}")


@contextlib.contextmanager
def named_memory(where: str) -> Iterator[None]:
    """Turn memory that runs out inside, where smaller batches are no help, into what to do about it.

    Raises:
        RunError: out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise RunError(
            f"out of memory {where}: lower train.slots (raise train.accumulation instead), set engine.max_rows "
            "or model.gradient_checkpointing = true, and go on with --resume auto; in a new run model.tuning = lora helps"
        ) from error
