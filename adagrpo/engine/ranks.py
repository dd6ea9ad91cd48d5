"""Who else trains: the only module that knows of other processes, and the only one that may call collectives.

Everything above asks a ``Ranks`` for global tensors and for common decisions. One process is the identity and costs nothing:
tensors are handed back as they came. Tensors go by the default group (NCCL on CUDA, gloo on the CPU); what the processes agree
on goes by a gloo group of its own, which waits for no device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import re
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError, RunError
from ..parts.threads import threads_per_rank
from .collectives import log_into, place
from .heartbeat import Heartbeat
from .meeting import met

T = TypeVar("T")
LOG = "ADAGRPO_COLLECTIVES"
"""Environment variable: a folder for the collectives of each rank, ``rank-N.jsonl``."""

JOINING = 300.0
"""Seconds that ranks have at least to come together: some import their libraries much later than others."""


class MemoryElsewhere(RuntimeError):
    """Another rank ran out of memory in work that all ranks then repeat.

    Attributes:
        rows: of the largest batch that any rank ran.
    """

    def __init__(self, rows: int) -> None:
        super().__init__(f"another rank ran out of memory, in batches of up to {rows}")
        self.rows = rows


class RanksApart(RunError):
    """The others did not come to where this rank waited for them: one of them failed, hangs, or is gone."""


class FirstRankFailed(SystemExit):
    """The first rank ended, and said why: the others end with its exit code and say nothing."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among ``size``.

    Attributes:
        rank: from 0. size: of all.
        side: the group of agreements; None where there is one process.
        timeout: seconds that ranks wait for each other.
        beat: says where this rank is.
    """

    rank: int = 0
    size: int = 1
    side: Any = dataclasses.field(default=None, compare=False, repr=False)
    timeout: float = 600.0
    beat: Heartbeat = dataclasses.field(default_factory=Heartbeat, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size}")

    @property
    def writes(self) -> bool:
        """Whether this rank writes the run folder and speaks to the user."""
        return self.rank == 0

    # ---- tensors ----

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """The parts of all ranks, of equal shapes, in their order along ``dim``."""
        if self.size == 1:
            return part
        sent = part.contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        with self._naming("a gathering of tensors"):
            dist.all_gather(parts, sent)
        return torch.cat(parts, dim)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, in ``value`` itself."""
        if self.size > 1:
            with self._naming("a sum of tensors"):
                dist.all_reduce(value)
        return value

    def mean(self, values: Tensor) -> Tensor:
        """The mean, 0-dim, over these values [N] and as many of every other rank."""
        return self.sum(values.mean().unsqueeze(0)).squeeze(0) / self.size

    def add_up(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over ranks, in one call for each dtype; a missing one counts as zeros, and stays away.

        Args:
            like: of the shapes and dtypes of ``tensors``, none missing.
        """
        if self.size == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in like):
            mine = [(t, ref) for t, ref in zip(tensors, like, strict=True) if ref.dtype is dtype]
            flat = self.sum(torch.cat([(ref.new_zeros(ref.numel()) if t is None else t.flatten()) for t, ref in mine]))
            for (t, _), found in zip(mine, flat.split([ref.numel() for _, ref in mine]), strict=True):
                if t is not None:
                    t.copy_(found.view_as(t))

    def same(self, tensors: Sequence[Tensor]) -> None:
        """Write the first rank's values into the tensors of all."""
        if self.size == 1:
            return
        with torch.no_grad(), self._naming("a broadcast of tensors"):
            for t in tensors:  # one at a time: all at once would be held twice
                first = t.detach().contiguous()
                dist.broadcast(first, 0)
                t.copy_(first)

    # ---- agreements: the host waits for all ranks ----

    def most(self, number: int, at: str) -> int:
        """The largest number of any rank; ``at`` names the place for errors, as in all agreements."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        with self._naming(at):
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.side)
        return int(found)

    def meet(self, at: str) -> None:
        """Wait for all ranks, of which the first one's error names those that do not come.

        Raises:
            RanksApart: some do not come in time.
        """
        if self.size > 1:
            with self._naming(at):
                dist.monitored_barrier(self.side, datetime.timedelta(seconds=self.timeout), wait_all_ranks=True)

    def require_well(self) -> None:
        """Before work in which all ranks must take part.

        Raises:
            MemoryElsewhere: one will not, for it ran out of memory (``engine.retry``).
        """
        if rows := self.most(0, "the end of a phase"):
            raise MemoryElsewhere(rows)

    def all_of(self, mine: T, at: str) -> list[T]:
        """What every rank has, in their order."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        with self._naming(at):
            dist.all_gather_object(found, mine, group=self.side)
        return found

    def told(self, find: Callable[[], T], at: str) -> T:
        """What the first rank finds; the others, which do not look, are told.

        Raises:
            FirstRankFailed: on the others, where it failed; there its error is raised.
        """
        if self.size == 1:
            return find()
        if self.rank:
            code, found = self._from_first(None, at)
            if code:
                raise FirstRankFailed(code)
            return found
        self.beat.at(at)
        try:
            mine = find()
        except BaseException as error:
            with contextlib.suppress(RunError):  # the error itself is the news
                self._from_first((exit_code(error), None), at)
            raise
        return self._from_first((0, mine), at)[1]

    def _from_first(self, value: Any, at: str) -> Any:
        box = [value]
        with self._naming(at):
            dist.broadcast_object_list(box, 0, group=self.side)
        return box[0]

    @contextlib.contextmanager
    def _naming(self, at: str) -> Iterator[None]:
        try:
            with self.beat.waiting(at):
                yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            where = place()
            limit = f"{where}{', ' * bool(where)}train.ranks_timeout = {self.timeout:g} s"
            at = f"{at} ({limit}): {_reason(error)}"
            raise RanksApart(f"rank {self.rank} of {self.size}: the others did not come to {at}") from error


def _reason(error: RuntimeError) -> str:
    """What a library says went wrong, without where its source lies and its advice."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[\S+\] ", "", first).partition(". This is typically")[0]


def exit_code(error: BaseException) -> int:
    """What the command line ends with for it."""
    if isinstance(error, FirstRankFailed):
        return int(error.code or 1)
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "signal", 2)
    return 2 if isinstance(error, InputError) else 1


def world_size() -> int:
    """Processes that torchrun started; 1 without it.

    Raises:
        InputError: the environment is not torchrun's.
    """
    text = os.environ.get("WORLD_SIZE", "").strip()
    if text in ("", "0", "1"):
        return 1
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or not text.isdigit():
        raise InputError(
            f"WORLD_SIZE = {text}: not set by torchrun ({', '.join(missing) or 'no number'} missing); start several ranks by "
            "torchrun --nproc-per-node N -m adagrpo train RECIPE, or unset WORLD_SIZE"
        )
    return int(text)


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


def record_flight(folder: Path, environment: MutableMapping[str, str]) -> None:
    """Have NCCL keep its last collectives, and write them into ``folder`` on a time-out; what the user set stays."""
    wanted = {"BUFFER_SIZE": "2000", "DUMP_TEMP_FILE": str(folder / "nccl-rank-")}
    for name, value in {**{f"TORCH_FR_{name}": v for name, v in wanted.items()}, "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}.items():
        environment.setdefault(name, value)


@contextlib.contextmanager
def joined(device: torch.device, timeout: float = 600.0, dumps: Path | None = None) -> Iterator[Ranks]:
    """Within it this process works with all that torchrun started.

    Args:
        device: of tensors.
        timeout: seconds that ranks wait for each other. NCCL waits a minute longer: it ends the process without a word.
        dumps: folder for what NCCL's flight recorder knows when it gives up; it has to exist by then.

    Raises:
        RunError: they do not come together.
    """
    size = world_size()
    if size == 1:
        yield Ranks()
        return
    if threads := threads_per_rank():
        torch.set_num_threads(threads)
    wait, cuda = datetime.timedelta(seconds=timeout), device.type == "cuda"
    if cuda and dumps is not None:
        record_flight(dumps, os.environ)
    longer = wait + datetime.timedelta(minutes=1) if cuda else wait
    join = max(timeout, JOINING)
    try:
        found, rank, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=join)))
        store = dist.PrefixStore(met(found, rank, size, join), found)
    except dist.DistError as error:
        raise RunError(f"the {size} ranks did not come together within {join:g} s: {_reason(error)}") from error
    backend, on = ("cpu:gloo,cuda:nccl", device) if cuda else ("gloo", None)
    try:
        # The times are set here: gloo keeps some of those that it began with.
        dist.init_process_group(backend, timeout=longer, store=store, rank=rank, world_size=size, device_id=on)
        side = dist.new_group(backend="gloo", timeout=wait)
    except RuntimeError as error:
        raise RunError(f"the {size} ranks did not connect within {timeout:g} s: {_reason(error)}") from error
    ranks = Ranks(rank, size, side, timeout, Heartbeat(rank))
    try:
        with contextlib.ExitStack() as logging:
            if folder := os.environ.get(LOG, ""):
                Path(folder).mkdir(parents=True, exist_ok=True)
                logging.enter_context(log_into(Path(folder) / f"rank-{ranks.rank}.jsonl"))
            yield ranks
    except BaseException:
        if device.type != "cuda":  # there it could wait for kernels that never end; the process's own end lets go of all
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
