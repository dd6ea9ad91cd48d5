"""Processes that work together as ranks, kept for many tests: each call runs one function on every rank."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

LIMIT = 240.0


class Pool:
    """``size`` gloo processes; ``pool(function, *args)`` gives what ``function(ranks, *args)`` returns on each.

    Args:
        timeout: seconds that ranks wait for each other.
    """

    def __init__(self, size: int, timeout: float = 120.0) -> None:
        self.size, self.timeout = size, timeout
        self.workers: list[tuple[Any, Connection]] = []

    def __call__(self, function: Callable[..., Any], *args: Any, limit: float = LIMIT) -> list[Any]:
        """Raises AssertionError with the tracebacks of the ranks that failed; the next call then has new processes."""
        if not self.workers:
            self._start()
        for _, connection in self.workers:
            connection.send((function, args))
        found = [connection.recv() if connection.poll(limit) else (False, "no answer") for _, connection in self.workers]
        if not all(well for well, _ in found):
            self.close()
            raise AssertionError("\n".join(f"rank {rank}: {told}" for rank, (well, told) in enumerate(found) if not well))
        return [value for _, value in found]

    def close(self) -> None:
        """End the processes at once: they have nothing to lose."""
        for process, _ in self.workers:
            process.kill()
        self.workers = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self.size):
            mine, other = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.size, port, self.timeout, other), daemon=True)
            process.start()
            other.close()
            self.workers.append((process, mine))


def _work(rank: int, size: int, port: int, timeout: float, connection: Connection) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from adagrpo.engine.ranks import joined

    torch.set_num_threads(1)
    with joined(torch.device("cpu"), timeout) as ranks:
        while True:
            function, args = connection.recv()
            try:
                connection.send((True, function(ranks, *args)))
            except BaseException:
                connection.send((False, traceback.format_exc()))
