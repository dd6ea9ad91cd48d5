"""Kills trainings from outside, damages what they leave behind, and holds the end against an undisturbed run.

Every part prints its seed; the same seed makes the same choices (the moments of the kills still meet the machine as it is).

    python tests/proof/killing.py kills|starts|pairs|damage [--count N] [--seed S] [--only KIND]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from damaging import DAMAGES, TARGETS, damage
from trial import LIMIT, RECIPES, Command, Trial, differences, load_libraries


def kills(trial: Trial, count: int) -> None:
    """Chains of trainings killed at random moments and resumed, until ``count`` kills; one in ten in a process of its own."""
    done = 0
    while done < count:
        name = trial.rng.choice(list(RECIPES))
        trial.reference(name)
        folder, log = trial.new()
        moments = []
        while True:
            args = ("train", str(trial.recipe(name)), "--out", str(folder), "--resume", "auto")
            fresh = trial.rng.random() < 0.1
            command = Command(log, *args, fresh=fresh)
            moment = trial.rng.uniform(0.1, 0.8) * trial.seconds[name] + (5.0 if fresh else 0.0)
            if done >= count or command.wait(moment) is not None:
                break
            command.kill()
            if command.code == -signal.SIGKILL:
                done += 1
                moments.append(f"{moment:.2f} s")
                trial.count("kills")
        code = command.end()
        wrong = [f"exit code {code}"] if code else differences(folder, trial.reference(name))
        trial.judge(f"{folder.name} ({name}, killed after {', '.join(moments) or 'nothing'})", wrong, command.output)


def starts(trial: Trial, count: int) -> None:
    """Trainings killed before their first checkpoint; the same command, or ``--resume auto``, must then just work."""
    for _ in range(count):
        name = trial.rng.choice(list(RECIPES))
        trial.reference(name)
        folder, log = trial.new()
        command = Command(log, "train", str(trial.recipe(name)), "--out", str(folder))
        limit, moment = time.monotonic() + LIMIT, trial.rng.uniform(0.0, 0.35) * trial.seconds[name]
        while command.wait(0) is None and time.monotonic() < limit:
            moment -= 0.005
            if moment <= 0 or any((folder / "checkpoints").glob("step-*")):
                break
            time.sleep(0.005)
        command.kill()
        saved = any((folder / "checkpoints").glob("step-*"))
        trial.count("killed after the first checkpoint" if saved else "killed before the first checkpoint")
        how = ("--resume", "auto") if saved or trial.rng.random() < 0.5 else ()
        trial.finish(name, folder, log, f"killed inside the start, then {' '.join(how) or 'the same command'}", *how)


def pairs(trial: Trial, count: int) -> None:
    """Two trainings of one folder, at once or one a little later: one owner; half the time the owner is killed."""
    ways = ([], ["--resume", "auto"], ["--resume", "latest"])
    for _ in range(count):
        name = trial.rng.choice(list(RECIPES))
        trial.reference(name)
        folder, log = trial.new()
        args = ("train", str(trial.recipe(name)), "--out", str(folder))
        later = trial.rng.choice([0.0, 0.0, trial.rng.uniform(0, trial.seconds[name])])
        first = Command(log, *args, *trial.rng.choice(ways[:2]))
        first.wait(later)
        second = Command(log.with_suffix(".second.log"), *args, *trial.rng.choice(ways))
        both = [first, second]
        if trial.rng.random() < 0.5:
            first.wait(trial.rng.uniform(0, 0.5) * trial.seconds[name])
            first.kill()
            trial.count("owner killed")
        codes = [command.end() for command in both]
        wrong = []
        if sorted(codes) not in ([0, 2], [-9, 0], [-9, 2], [2, 2]) or (codes == [2, 2] and first.code != -9):
            wrong.append(f"exit codes {codes}")
        for command, other in ((first, second), (second, first)):
            told = command.output
            # The last two are true before the other has begun, or when it was killed before its first checkpoint.
            fair = (f"process {other.pid} ", "holds a run already", "no run to resume there", "holds no complete checkpoint")
            if command.code == 2 and not any(words in told for words in fair):
                wrong.append(f"refused without naming the owner: {told.strip().splitlines()[-1:]}")
            if "Traceback" in told:
                wrong.append("a traceback")
        trial.count(f"exit codes {min(codes)} and {max(codes)}")
        if wrong:
            trial.judge(f"{folder.name} ({name}, second {later:.2f} s later)", wrong, first.output + second.output)
        elif 0 in codes:
            trial.judge(f"{folder.name} ({name})", differences(folder, trial.reference(name)), first.output + second.output)
        else:
            trial.finish(name, folder, log, "both gone, then --resume auto", "--resume", "auto")


PARTS: dict[str, tuple[Callable[..., None], int]] = {
    "kills": (kills, 60), "starts": (starts, 20), "pairs": (pairs, 20), "damage": (damage, len(DAMAGES)),
}  # fmt: skip


def run_part(part: str, work: Path, count: int | None = None, seed: int = 0, **options: Any) -> dict[str, Any]:
    """One part; its counts, what went wrong, and seconds."""
    print(f"{part}: seed {seed}, in {work}", flush=True)
    trial, started = Trial(work, random.Random(f"{part}-{seed}")), time.monotonic()
    function, usual = PARTS[part]
    function(trial, count or usual, **options)
    seconds = round(time.monotonic() - started)
    return {"part": part, "seed": seed, **dict(sorted(trial.counts.items())), "wrong": trial.bad, "seconds": seconds}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, help="damage: this kind of file")
    parser.add_argument("--record", type=Path, help="write what was found there, as JSON")
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one, removed if all went well)")
    return parser.parse_args()


def main() -> int:
    """Command line; exit code 1 if anything went wrong."""
    arguments = _arguments()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="killing-"))
    work.mkdir(parents=True, exist_ok=True)
    load_libraries()
    options = {"only": arguments.only} if arguments.part == "damage" else {}
    found = run_part(arguments.part, work, arguments.count, arguments.seed, **options)
    print(json.dumps(found, indent=1))
    if arguments.record:
        arguments.record.write_text(json.dumps(found), "utf-8")
    if not found["wrong"] and arguments.work is None:
        shutil.rmtree(work)
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
