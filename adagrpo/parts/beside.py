"""Calls of a part that go on while the caller works: a few threads per part, results in the order of the calls.

Grad mode, device, stream and autocast belong to a thread. What belongs to the process (random states of the host, torch's other
switches, the working directory) is brought back when the last of the calls that were begun is waited for, so a part that is
called so must not switch anything that the caller reads meanwhile.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .isolation import Job, Part, Worker, kept_folder, own, raise_failure, random_states, wait_for
from .torch_settings import OF_THREAD, kept_settings

REMEDY = "; it works beside the sampling, and so never in the main thread"


class _Common:
    """What calls at one time keep of the process.

    Read and brought back by who begins them and waits for them: in their own threads that would fall into a part that the
    caller is just calling, whose switches would stay, or be lost under its hands.
    """

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._kept: contextlib.ExitStack | None = None

    def begin(self, job: Job) -> None:
        """A call is about to begin."""
        if self._kept is None:
            self._kept = contextlib.ExitStack()
            for kept in (random_states(cuda=False), kept_folder(), kept_settings()):
                self._kept.enter_context(kept)
        self._jobs.append(job)

    def settle(self) -> None:
        """Bring everything back, unless calls are still to come or under way."""
        self._jobs = [job for job in self._jobs if not job.over]
        if not self._jobs:
            self.restore()

    def restore(self) -> None:
        """Now, although calls that are left behind may go on."""
        kept, self._kept, self._jobs = self._kept, None, []
        if kept is not None:
            kept.close()


@contextlib.contextmanager
def _in_thread() -> Iterator[None]:
    """What a thread keeps from one call to the next."""
    with kept_settings(OF_THREAD), torch.inference_mode(False), torch.no_grad():
        yield


_common = _Common()


class Call:
    """One call under way.

    Attributes:
        seconds: that it took, once its result is read.
    """

    def __init__(self, beside: Beside, job: Job) -> None:
        self._beside, self._job = beside, job
        self.seconds = 0.0

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self._job.done.is_set()

    def wait(self) -> None:
        """Until it is over.

        Raises:
            PartHung: it did not return in its time; the calls behind it are given up too.
        """
        self._beside.wait(self._job)

    def result(self) -> Any:
        """Detached copies of the tensors that the part returned; can be read once.

        Raises:
            part.failure, torch.OutOfMemoryError, PartHung: as ``isolation.call_part``.
        """
        self.wait()
        result, error = self._job.result, self._job.error
        self.seconds = self._job.seconds
        self._job.result = self._job.error = None
        if error is None:
            return own(result)
        try:
            raise_failure(self._beside.part, error, REMEDY)
        finally:
            del error


class Beside:
    """Calls ``part`` in ``threads`` threads of its own.

    Args:
        part: its time limit counts from the beginning of each call.
        threads: calls at one time, at most.
    """

    def __init__(self, part: Part, threads: int = 1) -> None:
        self.part, self.threads = part, threads
        self._worker: Worker | None = None
        self._process = 0
        self._open: list[Job] = []

    def __call__(self, function: Callable[..., Any], given: Callable[[], tuple[Any, ...]]) -> Call:
        """Begin ``function(*given())``; ``given`` runs in the thread too, and may wait for the device."""
        if self._worker is None or self._process != os.getpid():  # threads are not inherited
            self._worker, self._process = Worker(self.threads), os.getpid()
        self._open = [job for job in self._open if not job.done.is_set()]
        job = Job(function, shelter=_in_thread, given=given)
        self._open.append(job)
        _common.begin(job)
        self._worker.put(job)
        return Call(self, job)

    def wait(self, job: Job) -> None:
        """Until ``job`` is over; nothing of it goes on unseen if that is interrupted.

        Raises:
            PartHung: it did not return in its time.
        """
        try:
            wait_for(job, self.part)
        except BaseException:
            self.cancel()
            self._worker = None
            _common.restore()
            raise
        _common.settle()

    def cancel(self) -> None:
        """Calls that have not begun never do: nobody asks for their results."""
        for job in self._open:
            job.cancelled = True
        self._open = []
        _common.settle()
