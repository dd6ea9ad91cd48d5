"""Trainings as a user runs them: started, watched, killed and compared from outside.

Nothing of ``adagrpo.run`` is used: the command line starts them, and their folders are read by their files.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ITERATIONS = 6
COUNTS = ("two", "three")
LIMIT = 180.0  # seconds after which a command counts as hung
RECIPES = {
    "full": '[optimizer]\nlr = 1e-4\nema_decay = 0.5\nschedule = "linear"\n',
    "lora-memory": '[optimizer]\nlr = 1e-3\n[selection]\nprobe = "memory"\nfinalists = 2\ncandidates = 3\n',
}
SHARED = """
name = "trial"
[model]
path = "tiny-flux"
max_text_tokens = 12
{model}
[rollout]
eta = 1.0
steps = 4
sde_steps = [0, 1]
group_size = 3
[train]
iterations = {iterations}
slots = 2
seed = {seed}
[data]
prompts = "{prompts}"
held_out = "tiny:held_out"
allow_overlap = true
[evaluation]
every = 2
prompts = 3
final_prompts = 4
final_noises = 2
[output]
grid_every = 3
grid_prompts = 2
checkpoint_every = 1
keep_last = 3
[[rewards]]
name = "tiny"
"""


def write_recipe(path: Path, name: str, seed: int = 0) -> Path:
    """A recipe of seconds; ``lora-memory`` sees its few prompts again and again."""
    prompts = path.with_suffix(".txt")
    lines = [f"{count} {colour} {shape}" for count in COUNTS for colour in ("red", "blue") for shape in ("circles", "squares")]
    prompts.write_text("\n".join(lines) + "\n", "utf-8")
    lora = name.startswith("lora")
    model = 'tuning = "lora"\nlora_rank = 4' if lora else ""
    text = SHARED.format(model=model, iterations=ITERATIONS, seed=seed, prompts=prompts if lora else "tiny:even")
    path.write_text(text + RECIPES[name], "utf-8")
    return path


class Command:
    """``adagrpo ARGS`` in a process group of its own; forked from a parent that has the libraries loaded, or started anew."""

    def __init__(self, log: Path, *args: str, fresh: bool = False, enter: Callable[[], object] = lambda: None) -> None:
        """``enter`` is called in the forked process, before it imports ``adagrpo``."""
        self.log, self.args = log, args
        with log.open("ab") as file:
            if fresh:
                command = [sys.executable, "-m", "adagrpo", *args]
                self.pid = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, process_group=0).pid
            else:
                self.pid = self._forked(file.fileno(), args, enter)
        self.code: int | None = None

    @staticmethod
    def _forked(output: int, args: tuple[str, ...], enter: Callable[[], object]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            os.setpgid(0, 0)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            null = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((null, 0), (output, 1), (output, 2)):
                os.dup2(source, target)
            if (torch := sys.modules.get("torch")) is not None:
                torch.set_num_threads(1)  # replaces the parent's thread pool, which two threads must not do at once
            enter()
            from adagrpo.cli import main

            code = main(args)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 71
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            os._exit(code)

    def wait(self, seconds: float = LIMIT) -> int | None:
        """The exit code (negative: the signal it died of), or None while it runs on after ``seconds``."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= end:
                return None
            else:
                time.sleep(0.01)
        return self.code

    def end(self) -> int:
        """Its exit code; a command that hangs is killed and counts as -9."""
        if self.wait() is None:
            self.kill()
        assert self.code is not None
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal the process group, and wait where the signal cannot be refused."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)
        if number == signal.SIGKILL:
            self.wait()

    @property
    def output(self) -> str:
        """What this and earlier commands with the same log printed."""
        return self.log.read_text("utf-8", "replace")


def load_libraries() -> None:
    """Once, before the first fork: what every training imports."""
    import torch

    torch.set_num_threads(1)
    import diffusers
    import peft  # noqa: F401
    import transformers
    from diffusers import FluxPipeline  # noqa: F401

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` without what a clock or the allocator measured."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("perf/", "mem/"))} for line in lines]


def digest_of(value: Any) -> Any:
    """A nested state with tensors as (dtype, shape, bytes' digest)."""
    import torch

    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(data.tobytes()).hexdigest()
    if isinstance(value, dict):
        return {str(k): digest_of(v) for k, v in value.items()}
    return [digest_of(v) for v in value] if isinstance(value, list | tuple) else value


def last_state(folder: Path) -> Any:
    """The trainer's state in the newest checkpoint."""
    import torch

    newest = max((folder / "checkpoints").glob("step-*"), key=lambda p: p.name)
    state = torch.load(newest / "state" / "state.pt", weights_only=True)
    return digest_of({"trainer": state["trainer"], "guards": state["guards"], "best": state["best"]})


def weights(folder: Path) -> Any:
    """Every tensor of every weight file of the newest checkpoint."""
    from safetensors.torch import load_file

    newest = max((folder / "checkpoints").glob("step-*"), key=lambda p: p.name)
    return {str(p.relative_to(newest)): digest_of(load_file(p)) for p in sorted(newest.rglob("*.safetensors"))}


def result(folder: Path) -> Any:
    """The headline."""
    return json.loads((folder / "result.json").read_text("utf-8"))


ASPECTS: dict[str, Callable[[Path], Any]] = {
    "metrics.jsonl": metrics, "state.pt": last_state, "weights": weights, "result.json": result,
}  # fmt: skip


def differences(folder: Path, reference: Path) -> list[str]:
    """Aspects in which a finished run is not the reference, bit for bit."""
    found = []
    for name, aspect in ASPECTS.items():
        try:
            if aspect(folder) != aspect(reference):
                found.append(name)
        except (OSError, ValueError, KeyError) as error:
            found.append(f"{name} ({type(error).__name__}: {error})")
    return found


@dataclasses.dataclass
class Trial:
    """Where a part works, and what it found."""

    work: Path
    rng: random.Random
    bad: list[str] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    made: int = 0

    def count(self, what: str) -> None:
        """One more of ``what``."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def new(self) -> tuple[Path, Path]:
        """A run folder that does not exist, and a log beside it."""
        self.made += 1
        return self.work / f"run-{self.made:03d}", self.work / f"run-{self.made:03d}.log"

    def recipe(self, name: str, seed: int = 0) -> Path:
        """The recipe's file."""
        path = self.work / f"{name}-{seed}.toml"
        return path if path.exists() else write_recipe(path, name, seed)

    def reference(self, name: str, seed: int = 0) -> Path:
        """The undisturbed run of a recipe, made once."""
        folder = self.work / f"reference-{name}-{seed}"
        if not folder.exists():
            started = time.monotonic()
            command = Command(self.work / f"{folder.name}.log", "train", str(self.recipe(name, seed)), "--out", str(folder))
            if command.end():
                raise SystemExit(f"the undisturbed run ended with {command.code}:\n{command.output}")
            self.seconds[name] = time.monotonic() - started
        return folder

    def finish(self, name: str, folder: Path, log: Path, how: str, *resume: str) -> None:
        """Run to the end and compare with the undisturbed run."""
        command = Command(log, "train", str(self.recipe(name)), "--out", str(folder), *resume)
        code = command.end()
        wrong = [f"exit code {code}"] if code else differences(folder, self.reference(name))
        self.judge(f"{folder.name} ({name}, {how})", wrong, command.output)

    def judge(self, case: str, wrong: list[str], output: str) -> None:
        """Count a case; one that went wrong is told at once."""
        self.count("wrong" if wrong else "bitwise")
        if wrong:
            self.bad.append(f"{case}: {'; '.join(wrong)}")
            print(f"WRONG {self.bad[-1]}\n{tail(output)}", flush=True)


def tail(text: str) -> str:
    """The last lines, indented."""
    return "\n".join(f"    {line}" for line in text.replace("\r", "\n").splitlines()[-12:])
