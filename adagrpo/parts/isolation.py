"""Calling code that is not ours. What it does to torch, to the process or to its arguments ends with the call.

A *part* is whatever a recipe names: a reward, a selection, an advantage, a prompt source, a model adapter; built-in rewards
too, since they call libraries. ``call_part`` gives it tensors of its own, no gradients, and, where it has a time limit, a
thread of its own, which may then hang without holding the run.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
import queue
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from ..errors import RunError, Stopped
from .torch_settings import kept_settings, read_settings, write_settings

T = TypeVar("T")
Outcome = tuple[Any, BaseException | None]
POLL = 0.2
GRACE = 10.0
"""Seconds that a part's call may go on once the run was asked to stop."""


class PartHung(RunError):
    """A part did not return in its time, or not soon enough once the run was asked to stop; its thread is left behind."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Somebody else's code.

    Attributes:
        name: for messages, e.g. ``rewards.0 (clip)``.
        failure: what its exceptions become.
        doing: what it did not manage, behind its name in the message.
        passes: exceptions that are handed on as they are; running out of device memory always is.
        timeout: seconds per call; 0 waits for ever, in the caller's own thread.
        timeout_key: the recipe's key of it.
    """

    name: str
    failure: type[Exception] = RunError
    doing: str = " failed"
    passes: tuple[type[Exception], ...] = ()
    timeout: float = 0.0
    timeout_key: str = ""


def call_part(part: Part, function: Callable[..., Any], *args: Any, gradients: bool = False, copied: bool = True) -> Any:
    """The result of ``function(*args)``, called so that it cannot harm.

    Grad mode, every global switch in ``torch_settings``, CUDA device and stream, working directory, signal handlers and the
    global random states are afterwards what they were. Of the latter every call thus draws the same numbers; a part that
    wants others keeps a generator.

    Args:
        gradients: keep the caller's grad mode, and the graph of the result.
        copied: the tensors in ``args`` are needed again, so the part gets copies.

    Returns:
        Detached copies of the tensors in the result (``gradients``: the result).

    Raises:
        part.failure: whatever the part raised, ``SystemExit`` and ``KeyboardInterrupt`` of its own included; Ctrl-C is not.
        torch.OutOfMemoryError: as it is; see also ``part.passes``.
        PartHung: it did not return in time, or said so itself.
    """
    gradients = gradients and torch.is_grad_enabled()
    result = _called(part, function, own(args) if copied else args, gradients)
    return result if gradients else own(result)


def build_part(part: Part, function: Callable[..., T], *args: Any) -> T:
    """As ``call_part``, for importing and making parts: arguments and result are handed on as they are."""
    found: T = _called(part, function, args, gradients=False)
    return found


def _called(part: Part, function: Callable[..., Any], args: tuple[Any, ...], gradients: bool) -> Any:
    call = _in_thread if part.timeout and not _watched() else _here
    result, error = call(part, function, args, gradients)
    if error is None:
        return result
    remedy = f"; {part.timeout_key} = 0 calls it in the main thread, without a time limit" if call is _in_thread else ""
    try:
        raise_failure(part, error, remedy)
    finally:
        del error  # it knows the frames, and they the tensors


def raise_failure(part: Part, error: BaseException, main_thread_remedy: str = "") -> NoReturn:
    """Raise what a part raised as what ``call_part`` says.

    Args:
        main_thread_remedy: what the message adds where the part wanted the main thread.
    """
    try:
        if isinstance(error, (torch.OutOfMemoryError, PartHung, *part.passes)):
            raise error
        remedy = main_thread_remedy if "main thread" in str(error) else ""
        raise part.failure(f"{part.name}{part.doing}: {type(error).__name__}: {error}{remedy}") from error
    finally:
        del error


def own(value: Any) -> Any:
    """``value`` with detached copies of its tensors: itself, or inside lists, tuples, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(own, value))
    if type(value) in (list, tuple):
        return type(value)(map(own, value))
    if type(value) is dict:
        return {key: own(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: own(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def _here(part: Part, function: Callable[..., Any], args: tuple[Any, ...], gradients: bool) -> Outcome:
    """The call in the caller's thread; only what Ctrl-C raises is raised."""
    try:
        with _sheltered(gradients):
            return function(*args), None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and _from_signal(error):
            raise
        return None, error


def _from_signal(error: KeyboardInterrupt) -> bool:
    """Whether a signal raised it, not the part: its handler ran last, or is Python's own, which leaves no trace."""
    if isinstance(error, Stopped):
        return True
    if threading.current_thread() is not threading.main_thread():
        return False
    handler, trace = signal.getsignal(signal.SIGINT), error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    code = getattr(handler, "__code__", None)
    return handler is signal.default_int_handler or (trace is not None and trace.tb_frame.f_code is code)


@contextlib.contextmanager
def _sheltered(gradients: bool) -> Iterator[None]:
    """Within it nothing has a gradient (unless ``gradients``); afterwards all that a part could have switched is back."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        yield  # an adapter's step in a CUDA graph: reading a random state would end the capture
        return
    with random_states(), _place(), kept_settings(), torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


@contextlib.contextmanager
def random_states(cuda: bool = True) -> Iterator[None]:
    """Keep the global generators of Python, torch and, where it is imported, numpy; ``cuda``: those of the devices too."""
    numpy = sys.modules.get("numpy")
    python, cpu = random.getstate(), torch.get_rng_state()
    legacy = None if numpy is None else numpy.random.get_state(legacy=False)
    devices = torch.cuda.get_rng_state_all() if cuda and torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if numpy is not None:
            numpy.random.set_state(legacy)
        if devices:
            torch.cuda.set_rng_state_all(devices)


@contextlib.contextmanager
def _place() -> Iterator[None]:
    """Keep the working directory, the current CUDA device and stream and, in the main thread, the signals' handlers."""
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGALRM") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers} if main else {}
    try:
        with kept_folder():
            yield
    finally:
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
        if stream is not None:
            torch.cuda.set_stream(stream)  # and its device


@contextlib.contextmanager
def kept_folder() -> Iterator[None]:
    """Keep the working directory."""
    folder = None
    with contextlib.suppress(OSError):
        folder = os.getcwd()
    try:
        yield
    finally:
        if folder is not None:
            with contextlib.suppress(OSError):
                os.chdir(folder)


# ---- threads -----------------------------------------------------------------------------------------------------------------

_stop_asked: list[Callable[[], bool]] = []
_under_way: set[Job] = set()


@contextlib.contextmanager
def leaving_when(asked: Callable[[], bool]) -> Iterator[None]:
    """Within it a part's call that goes on for ``GRACE`` seconds after ``asked()`` has turned true is left behind."""
    _stop_asked.append(asked)
    try:
        yield
    finally:
        _stop_asked.remove(asked)


def stop_asked() -> bool:
    """Whether the run was asked to stop: what waits for others should then come to an end."""
    return any(asked() for asked in _stop_asked)


def leave_if_hanging(code: int) -> None:
    """End the process with exit code ``code`` if a part is at work in it: the interpreter's end could wait for that part."""
    if _under_way:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _watched() -> bool:
    """Whether something that sees nothing but its own thread is at work: a profiler, or one of torch's modes."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return bool(torch.autograd._profiler_enabled() or modes)


class Job:
    """One call in a thread of its own, under the caller's stream, number of threads and context variables.

    Args:
        shelter: what it is called in; None restores everything after the call, for a caller that waits.
        given: makes the arguments, in the thread; the part's time begins behind it.

    Attributes:
        done: it is over. seconds: that it took. cancelled: it is not to begin.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...] = (),
        shelter: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
        given: Callable[[], tuple[Any, ...]] | None = None,
    ) -> None:
        self.function, self.args, self.shelter, self.given = function, args, shelter or _in_waited_thread, given
        self.done, self.cancelled = threading.Event(), False
        self.began: float | None = None
        self.seconds = 0.0
        self.result: Any = None
        self.error: BaseException | None = None
        self.stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        self.threads, self.context = torch.get_num_threads(), contextvars.copy_context()

    @property
    def over(self) -> bool:
        """It does not go on, nor will it begin."""
        return self.done.is_set() or (self.cancelled and self not in _under_way)

    def run(self) -> None:
        """In the thread."""
        _under_way.add(self)
        try:
            if self.stream is not None:
                torch.cuda.set_stream(self.stream)
            if torch.get_num_threads() != self.threads:
                torch.set_num_threads(self.threads)
            args = self.args if self.given is None else self.given()
            self.began = time.monotonic()
            with self.shelter():
                self.result = self.context.run(self.function, *args)
            self.seconds = time.monotonic() - self.began
        except BaseException as error:
            self.error = error
        args = ()
        del self.function, self.args, self.given
        _under_way.discard(self)
        self.done.set()


def _in_waited_thread() -> contextlib.AbstractContextManager[None]:
    return _sheltered(gradients=False)


class Worker:
    """Threads that take one job after the other; kept, because libraries keep handles and buffers per thread."""

    def __init__(self, threads: int = 1) -> None:
        jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.put = jobs.put
        for _ in range(threads):
            threading.Thread(target=_work, args=(jobs,), name="adagrpo-part", daemon=True).start()
            weakref.finalize(self, jobs.put, None)


def _work(jobs: queue.SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        if not job.cancelled:
            job.run()
        del job  # and its tensors


_local = threading.local()
os.register_at_fork(after_in_child=lambda: setattr(_local, "worker", None))  # threads are not inherited


def _in_thread(part: Part, function: Callable[..., Any], args: tuple[Any, ...], gradients: bool) -> Outcome:
    """The call by this thread's worker, for as long as ``part`` may take; never with gradients."""
    worker: Worker | None = getattr(_local, "worker", None)
    if worker is None:
        worker = _local.worker = Worker()
    job, settings, folder = Job(function, args), read_settings(), os.getcwd()
    del args
    worker.put(job)
    try:
        wait_for(job, part)
    except BaseException:
        _local.worker = None
        write_settings(settings)  # what the thread had switched when it was left stays no longer
        with contextlib.suppress(OSError):
            os.chdir(folder)
        raise
    result, error = job.result, job.error
    job.result = job.error = None
    return result, error


def wait_for(job: Job, part: Part) -> None:
    """Until the job is done; ``part.timeout`` counts from its beginning, 0 is no limit.

    Raises:
        PartHung: its time is over.
    """
    end = asked_at = float("inf")
    while not job.done.wait(min(POLL, max(0.0, end - time.monotonic()))):
        now = time.monotonic()
        if job.began is not None and part.timeout:
            end = job.began + part.timeout
        if stop_asked():
            asked_at = min(asked_at, now)
        if now >= end:
            key = part.timeout_key
            raise PartHung(f"{part.name} did not return within {part.timeout:g} s; raise {key} (0 waits for ever) or mend it")
        if now >= asked_at + GRACE:
            raise PartHung(f"{part.name} did not return within {GRACE:g} s of the request to stop")
