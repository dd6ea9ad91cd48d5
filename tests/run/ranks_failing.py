"""Trainings on two ranks that fail as they are told, each rank a process with the command line of its own. Used by
test_failing.py.

    python tests/run/ranks_failing.py FOLDER CASE...

A case is FAULT, in a run folder of that name, or FAULT@ATTEMPT, or FAULT@ATTEMPT of NAME. Plays torchrun: as soon as one rank
ends with anything but 0, the others get SIGTERM. Prints the exit codes of each case.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import parts
import torch
import torch._dynamo
import torch.distributed.tensor
from toy import half_bright

import adagrpo.commands  # once for all ranks
import adagrpo.train
from adagrpo.cli import main
from adagrpo.train import Trainer

LIMIT = 40.0


def in_second(method: str, fault: Callable[[], object]) -> None:
    """The fault befalls this rank when its second iteration comes to ``method``."""
    before = getattr(Trainer, method)

    def faulty(self, *given):
        if self.iterations_done == 1:
            fault()
        return before(self, *given)

    setattr(Trainer, method, faulty)


def fail() -> None:
    raise ValueError("planted")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ask(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def out_of_memory() -> None:
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    adagrpo.train.update_policy = full  # type: ignore[assignment]


def dead_reward() -> None:
    in_second("probe_and_select", lambda: calls.append(1))
    calls: list[int] = []

    def reward():
        return lambda images, prompts: half_bright(images, prompts) if not calls else 1 / 0

    parts.reward = reward


def broken_gradient() -> None:
    update = Trainer.update

    def faulty(self, groups, advantage):
        return update(self, groups, advantage * (torch.nan if self.iterations_done == 1 else 1))

    Trainer.update = faulty  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[int], object]] = {
    "raise": lambda rank: rank == 1 and in_second("advantage", fail),
    "raise on the first": lambda rank: rank == 0 and in_second("advantage", fail),
    "hang": lambda rank: rank == 1 and in_second("advantage", lambda: time.sleep(600)),
    "kill": lambda rank: rank == 1 and in_second("refresh", die),
    "kill the first": lambda rank: rank == 0 and in_second("refresh", die),
    "reward": lambda rank: rank == 1 and dead_reward(),
    "memory": lambda rank: rank == 1 and in_second("advantage", out_of_memory),
    "nan": lambda rank: rank == 1 and broken_gradient(),
    "signal": lambda rank: in_second("advantage", ask(signal.SIGUSR1)),
    "signal and hang": lambda rank: in_second("advantage", ask(signal.SIGTERM)) or FAULTS["hang"](rank),
    "well": lambda rank: None,
}


def rank(number: int, port: int, fault: str, name: str, base: Path, attempt: int) -> None:
    said = os.open(base / f"{name}-{number}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"TORCHELASTIC_RESTART_COUNT": str(attempt), "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR1"}
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(LIMIT)
    torch.set_num_threads(1)
    code = 70
    try:
        FAULTS[fault](number)
        code = main(["train", str(base / "recipe.toml"), "--out", str(base / name), "--resume", "auto"])
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(fault: str, name: str, base: Path, attempt: int) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    living = {}
    for number in range(2):
        if not (pid := os.fork()):
            rank(number, port, fault, name, base, attempt)
        living[pid] = number
    codes, end, told = [0, 0], time.monotonic() + LIMIT, False
    while living:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[living.pop(pid)] = os.waitstatus_to_exitcode(status)
        if (any(codes) and not told) or time.monotonic() > end:
            told = True
            for pid in living:
                os.kill(pid, signal.SIGTERM if time.monotonic() < end else signal.SIGKILL)
        time.sleep(0.02)
    return codes


if __name__ == "__main__":
    for case in sys.argv[2:]:
        what, _, of = case.partition(" of ")
        planted, _, count = what.partition("@")
        print(case, *run(planted, of or planted, Path(sys.argv[1]), int(count or 0)), sep="\t", flush=True)
