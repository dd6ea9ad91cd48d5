"""Every damage to every kind of file of a run folder, and how the run then goes on."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from trial import ITERATIONS, RECIPES, Command, Trial, differences, tail


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of file in a run folder."""

    pattern: str

    def of(self, folder: Path) -> Path:
        """The newest such file."""
        return max(folder.glob(self.pattern))


TARGETS = {
    "state": Target("checkpoints/step-*/state/state.pt"),
    "weights": Target("checkpoints/step-*/**/*.safetensors"),
    "index": Target("checkpoints/step-*/checkpoint.json"),
    "older-state": Target("checkpoints/step-*2/state/state.pt"),
    "older-index": Target("checkpoints/step-*2/checkpoint.json"),
    "config": Target("config.toml"),
    "manifest": Target("manifest.json"),
    "metrics": Target("metrics.jsonl"),
    "events": Target("events.jsonl"),
    "memory": Target("memory.json"),
    "baseline": Target("baseline.json"),
    "report": Target("report.html"),
    "grid": Target("samples/*.png"),
}


def _swapped(path: Path, data: bytes, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def _folder(path: Path, data: bytes, other: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_bytes(data)


def _dangling(path: Path, data: bytes, other: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _flipped(data: bytes, at: int, bit: int = 1) -> bytes:
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[Path, bytes, Path], object]] = {
    "deleted": lambda path, data, other: path.unlink(),
    "empty": lambda path, data, other: path.write_bytes(b""),
    "half": lambda path, data, other: path.write_bytes(data[: len(data) // 2]),
    "last byte missing": lambda path, data, other: path.write_bytes(data[:-2]),
    "zeros": lambda path, data, other: path.write_bytes(bytes(len(data))),
    "one bit": lambda path, data, other: path.write_bytes(_flipped(data, len(data) // 2)),
    "first byte": lambda path, data, other: path.write_bytes(_flipped(data, 0, 0x90)),
    "wrong type": lambda path, data, other: path.write_bytes(b"[1, 2]\n"),
    "doubled": lambda path, data, other: path.write_bytes(data + data),
    "another run's": _swapped,
    "a folder": _folder,
    "a dangling link": _dangling,
}


def interrupted(trial: Trial, name: str, seed: int = 0) -> Path:
    """A run that was told to stop in its middle."""
    folder = trial.work / f"interrupted-{name}-{seed}"
    if not folder.exists():
        command = Command(trial.work / f"{folder.name}.log", "train", str(trial.recipe(name, seed)), "--out", str(folder))
        while command.wait(0) is None and not (folder / "checkpoints" / f"step-{ITERATIONS // 2:06d}").exists():
            time.sleep(0.005)
        command.kill(signal.SIGTERM)
        if command.end() != 128 + signal.SIGTERM:
            raise SystemExit(f"the run to be damaged ended with {command.code}:\n{command.output}")
    return folder


def damage(trial: Trial, count: int, only: str | None = None) -> None:
    """Every damage to every kind of file: resumed bitwise, refused by name, or gone on with a notice; never silent."""
    for kind, target in TARGETS.items():
        if only and kind != only:
            continue
        for how, spoil in list(DAMAGES.items())[:count]:
            name = trial.rng.choice(list(RECIPES))
            trial.reference(name)
            folder, log = trial.new()
            shutil.copytree(interrupted(trial, name), folder)
            if not any(folder.glob(target.pattern)):
                trial.count(f"{kind}: no such file")
                continue
            path = target.of(folder)
            before = (folder / "events.jsonl").read_bytes()
            spoil(path, path.read_bytes(), target.of(interrupted(trial, name, seed=1)))
            command = Command(log, "train", str(trial.recipe(name)), "--out", str(folder), "--resume", "latest")
            verdict, wrong = outcome(command, folder, trial.reference(name), path, before)
            if kind == "config" and how == "another run's" and "another recipe" in command.output:
                wrong = ""
            trial.count(f"{kind}: {verdict}")
            if wrong:
                trial.bad.append(f"{folder.name} ({name}, {kind} {how}): {wrong}")
                print(f"WRONG {trial.bad[-1]}\n{tail(command.output)}", flush=True)


def outcome(command: Command, folder: Path, reference: Path, path: Path, events: bytes) -> tuple[str, str]:
    """How a run went on after damage, in a few words, and what is wrong with that."""
    code, told = command.end(), command.output
    known = folder / "events.jsonl"
    told += known.read_bytes().removeprefix(events).decode("utf-8", "replace") if known.is_file() else ""
    step = next((part for part in path.parts if part.startswith("step-")), path.name)
    named = path.name in told or step in told
    if "Traceback" in told:
        return "traceback", "a traceback"
    if code in (1, 2):
        return "refused", "" if named else f"refused without naming {path.name}"
    if code:
        return "died", f"exit code {code}"
    differing = differences(folder, reference)
    if not differing:
        return ("bitwise, with a notice" if named else "bitwise"), ""
    if set(differing) <= {"metrics.jsonl"} and named:
        return "lines set aside with a notice", ""
    return "different", f"{'' if named else 'silently '}different: {', '.join(differing)}"
