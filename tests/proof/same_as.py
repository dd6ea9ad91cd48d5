"""Runs the same recipes on another commit and on this working tree, and compares what they leave bit for bit.

    python tests/proof/same_as.py BASE [--case NAME …] [--strict] [--keep FOLDER]

BASE is a commit, or a folder with another tree. Metrics but times, every tensor and value of checkpoints, exports, results and
images must be equal; what the commands print is compared too, and fails with ``--strict`` only. Nothing of ``adagrpo`` is
imported here: the commands of each tree run in processes of their own, on files alone. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from bitwise import Verdict, compare, shown, words
from trial import Command, load_libraries, tail

ROOT = Path(__file__).resolve().parents[2]
LEFT, RIGHT = "base", "head"
PROMPTS = [
    f"{count} {colour} {shape}" for count in ("two", "three") for colour in ("red", "blue") for shape in ("circles", "squares")
]
PARTS = '''
"""Parts named by import path."""


def farthest(scores, capability, sign=1.0):
    return (sign * (scores[0] - capability.mean[0])).abs().argmax(-1)


def centred(rewards, capability, weights):
    fused = (rewards * weights.view(-1, 1, 1)).sum(0)
    return fused - fused.mean(-1, keepdim=True)


class Contrast:
    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, images, prompts):
        return self.scale * images.flatten(1).std(1)


class Stepped:
    """Mean brightness in steps: many samples of a group are equal."""

    def __init__(self, step=0.1):
        self.step = step

    def __call__(self, images, prompts):
        return (images.flatten(1).mean(1) / self.step).round() * self.step


def prompts(count=6):
    return [f"a red circle number {i}" for i in range(count)]
'''  # fmt: skip
RECIPE: dict[str, Any] = {
    "model.path": "tiny-flux", "model.device": "cpu", "model.max_text_tokens": 12,
    "rollout.eta": 1.0, "rollout.steps": 4, "rollout.sde_steps": [0, 1], "rollout.group_size": 3,
    "selection.candidates": 3, "train.iterations": 3, "train.slots": 2, "optimizer.lr": 1e-4,
    "data.prompts": "tiny:even", "data.held_out": "tiny:held_out",
    "evaluation.every": 2, "evaluation.prompts": 2, "evaluation.final_prompts": 2, "evaluation.final_noises": 1,
    "output.grid_every": 3, "output.grid_prompts": 1, "output.checkpoint_every": 3,
    "rewards": [{"name": "brightness", "weight": 0.7}],
}  # fmt: skip
TRAIN = "train recipe.toml --out run"
MEMORY = {
    "data.prompts": "prompts.txt",
    "data.allow_overlap": True,
    "selection.probe": "memory",
    "selection.allow_unseen": True,
}
TRAJECTORY = {"rollout.plan": "trajectory", "loss.old_logp": "recompute"}
STEPPED = {"rewards": [{"name": "own_parts:Stepped", "kwargs": {"step": 0.1}}]}


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe, by what it changes in ``RECIPE``, and the commands it is run by.

    Attributes:
        code: what the last command exits with; the others exit with 0.
        shows: a metric that is above 0 in some line, or else the case proves nothing.
        handed_over: the head goes on in the folder that the base's first command left.
    """

    keys: dict[str, Any] = dataclasses.field(default_factory=dict)
    commands: tuple[str, ...] = (TRAIN,)
    code: int = 0
    shows: str = "policy/grad_norm"
    handed_over: bool = False

    def recipe(self, name: str) -> dict[str, Any]:
        """The whole recipe, nested as TOML has it."""
        nested: dict[str, Any] = {"name": name}
        for key, value in (RECIPE | self.keys).items():
            *sections, last = key.split(".")
            place = nested
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        return nested


GROWN = ("train recipe.toml --out run --train.iterations 2", f"{TRAIN} --resume latest")
STEPWISE = {"output.checkpoint_every": 1, "output.keep_last": 3}
ROLLBACK = {"limit": 1e-9, "action": "rollback", "patience": 2}
CASES = {
    "full": Case(commands=(TRAIN, "export run exported", "sample run --prompt three-circles --count 2 --out samples")),
    "words": Case(commands=("train recipe.toml --dry-run", "plan recipe.toml", "train recipe.toml --print-config", TRAIN)),
    "short": Case({"selection.probe": "short", "selection.probe_steps": 2}),
    "racing": Case({"selection.probe": "racing", "selection.race_steps": [1, 2]}),
    "pool": Case({"selection.probe": "pool"}),
    "memory": Case(MEMORY | {"train.iterations": 4}),
    "memory+pool": Case(MEMORY | {"selection.probe": "memory+pool", "train.iterations": 4}),
    "short+pool": Case({"selection.probe": "short+pool", "selection.probe_steps": 2}),
    "racing+pool": Case({"selection.probe": "racing+pool", "selection.race_steps": [1, 2]}),
    "finalists": Case(MEMORY | {"selection.allow_unseen": False, "selection.finalists": 2}),
    "plain-grpo": Case({"selection.candidates": 1, "advantage.weight": 0.0}),
    "hardest": Case({"selection.strategy": "hardest", "advantage.calibration": "zscore"}),
    "random": Case({"selection.strategy": "random", "train.shuffle_advantages": True}),
    "window": Case(TRAJECTORY | {"rollout.plan": "window", "rollout.window_size": 2, "rollout.window_every": 1}),
    "trajectory": Case(TRAJECTORY),
    "dance": Case(
        TRAJECTORY
        | {"rollout.scheme": "dance", "rollout.eta": 0.3, "rollout.shared_noise": True, "rollout.trained_share": 0.5}
    ),
    "cps": Case({"rollout.scheme": "cps", "rollout.eta": 0.7, "loss.step_weights": "equal_gradient"}),
    "refill": Case(STEPPED | {"advantage.equal_groups": "refill"}, shows="advantage/equal_groups"),
    "skip": Case(STEPPED | {"advantage.equal_groups": "skip", "train.accumulation": 2}, shows="advantage/equal_groups"),
    "released": Case(
        {"rollout.fork_velocity": "probe", "loss.old_logp": "detached", "train.steps_per_iteration": 2,
         "loss.average": "iteration"}
    ),
    "steps": Case({"train.steps_per_iteration": 2, "loss.clip_range": 1e-4}, shows="policy/clip_share"),
    "recompute": Case({"loss.old_logp": "recompute", "rollout.storage": "bf16"}),
    "kl": Case({"loss.kl_weight": 0.05, "loss.kl_variance": "diffusion"}, shows="policy/kl"),
    "ema": Case({"optimizer.ema_decay": 0.5, "optimizer.schedule": "linear", "optimizer.warmup_steps": 1}),
    "chunked": Case({"engine.max_rows": 4, "engine.decode_rows": 2, "engine.overlap": False}),
    "tail": Case({"rollout.steps": 6, "rollout.tail_steps": 2}),
    "lora": Case({"model.tuning": "lora", "model.lora_rank": 4, "optimizer.lr": 1e-3}, (TRAIN, "export run exported")),
    "bf16": Case({"model.dtype": "bf16", "model.timestep": "bf16", "model.gradient_checkpointing": True}),
    "fp64": Case({"model.dtype": "fp64", "rollout.storage": "fp64", "train.iterations": 2}),
    "fused": Case({"engine.forward": "fused"}),
    "graphs": Case({"engine.cuda_graphs": True, "engine.max_rows": 4}),
    "buckets": Case({"model.buckets": ["32x32", "32x48"], "train.iterations": 4}),
    "multi-reward": Case({"rewards": [{"name": "tiny"}, {"name": "brightness", "weight": 0.3}]}),
    "own-parts": Case(
        {
            "selection.strategy": "own_parts:farthest", "selection.kwargs": {"sign": -1.0},
            "advantage.function": "own_parts:centred", "rewards": [{"name": "own_parts:Contrast", "kwargs": {"scale": 2.0}}],
            "data.prompts": "own_parts:prompts", "data.kwargs": {"count": 9},
        }
    ),
    "resume": Case(STEPWISE | {"optimizer.ema_decay": 0.5}, GROWN),
    "resume-memory": Case(MEMORY | STEPWISE, (TRAIN, f"{TRAIN} --resume run/checkpoints/step-000001")),
    "handed-over": Case(STEPWISE | {"selection.probe": "short", "selection.probe_steps": 2}, GROWN, handed_over=True),
    "rollback": Case(STEPWISE | {"guards.grad_norm": ROLLBACK, "guards.max_rollbacks": 1}, code=3),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two trees, and where its commands run."""

    name: str
    tree: Path
    work: Path

    def folder(self, case: str) -> Path:
        """Where the case runs; the recipe lies there, under the same name on both sides."""
        return self.work / self.name / case

    def log(self, case: str) -> Path:
        """What its commands print."""
        return self.work / self.name / f"{case}.log"

    def run(self, name: str, case: Case, other: Side | None = None) -> str:
        """Run the commands of a case; what went wrong, or ''.

        Args:
            other: the side that leaves a copy behind its first command, for one that is handed over.
        """
        folder = self.folder(name)
        folder.mkdir(parents=True)
        (folder / "recipe.toml").write_text(tomli_w.dumps(case.recipe(name)), "utf-8")
        (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", "utf-8")
        (folder / "own_parts.py").write_text(PARTS, "utf-8")
        commands = list(case.commands)
        if other is not None:
            shutil.copytree(other.folder(f"{name}-left"), folder / "run", symlinks=True)
            shutil.copy(other.folder(f"{name}-left.log"), self.log(name))
            del commands[0]
        for number, command in enumerate(commands, 1):
            ran = Command(self.log(name), *command.split(), enter=lambda: self.enter(folder))
            try:
                ran.end()
            finally:
                if ran.code is None:
                    ran.kill()
            expected = case.code if number == len(commands) else 0
            if ran.code != expected:
                return f"{self.name}: `{command}` exits with {ran.code} instead of {expected}:\n{tail(ran.output)}"
            if case.handed_over and other is None and number == 1:
                shutil.copytree(folder / "run", self.folder(f"{name}-left"), symlinks=True)
                shutil.copy(self.log(name), self.folder(f"{name}-left.log"))
        return ""

    def enter(self, folder: Path) -> None:
        """In the process of a command: import this tree and no other one.

        Raises:
            RuntimeError: another one would be imported.
        """
        os.chdir(folder)
        sys.path[:0] = places = [str(self.tree), str(self.tree / "kernels"), str(folder)]
        os.environ["PYTHONPATH"] = os.pathsep.join(places)
        for package in ("adagrpo", "adagrpo_kernels"):
            spec = importlib.util.find_spec(package)
            if package in sys.modules or spec is None or not Path(str(spec.origin)).is_relative_to(self.tree):
                raise RuntimeError(f"{package} is not that of {self.tree}")


def check_out(base: str, folder: Path) -> Path:
    """The tree of a commit, laid out below ``folder``; a folder is a tree already."""
    if Path(base).is_dir():
        return Path(base).resolve()
    archive = folder / "base.tar"
    subprocess.run(["git", "-C", str(ROOT), "archive", "-o", str(archive), base], check=True)
    with tarfile.open(archive) as file:
        file.extractall(folder / "tree", filter="data")
    return folder / "tree"


def run_case(name: str, case: Case, base: Side, head: Side) -> tuple[Verdict, str]:
    """What was compared, and the first difference of what was printed ('' is none)."""
    wrong = base.run(name, case) or head.run(name, case, base if case.handed_over else None)
    if wrong:
        return Verdict(difference=wrong), ""
    places = {str(side.tree): "TREE" for side in (base, head)} | {str(side.folder(name)): "WORK" for side in (base, head)}
    verdict = compare(base.folder(name), head.folder(name), places)
    if not verdict.difference and not (verdict.lines and verdict.tensors):
        verdict.difference = "nothing to compare: no metrics or no tensors"
    if not verdict.difference and not shown(base.folder(name), case.shows):
        verdict.difference = f"nothing shown: {case.shows} is never above 0"
    one, other = (words(side.folder(name), side.log(name), places) for side in (base, head))
    gone, new = [line for line in one if line not in other], [line for line in other if line not in one]
    moved = "other order or number of lines" if one != other else ""
    return verdict, " ".join([*(f"- {line}" for line in gone[:1]), *(f"+ {line}" for line in new[:1])]) or moved


def row(*cells: object) -> str:
    """A line of the table; columns are wide enough for every case."""
    widths = (max(map(len, CASES)), 7, 7, 5, 7, 7)
    return "  ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def same_as(base: str, cases: Mapping[str, Case], work: Path, strict: bool) -> int:
    """Run and compare ``cases``, print the table; the exit code."""
    sides = Side(LEFT, check_out(base, work), work), Side(RIGHT, ROOT, work)
    started, failed = time.monotonic(), 0
    print(row("case", "metrics", "tensors", "keys", "result", "output"), flush=True)
    for name, case in cases.items():
        verdict, said = run_case(name, case, *sides)
        failed += bool(verdict.difference or (strict and said))
        result, output = "DIFFERS" if verdict.difference else "equal", "differs" if said else "equal"
        print(row(name, verdict.lines, verdict.tensors, verdict.keys, result, output), flush=True)
        for what, found in (("", verdict.difference), ("output ", said)):
            if found:
                print(f"    {what}{found}", flush=True)
    print(f"{len(cases) - failed} of {len(cases)} cases equal to {base}, {time.monotonic() - started:.0f} s")
    return int(failed > 0)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="a commit, or a folder with another tree")
    parser.add_argument("--case", action="append", choices=CASES, metavar="NAME", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--strict", action="store_true", help="also fail where what the commands print differs")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder for the runs, which stays")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as Ctrl-C: nothing stays behind
    load_libraries()
    chosen = {name: CASES[name] for name in args.case or CASES}
    if args.keep:
        args.keep.mkdir(parents=True)
        return same_as(args.base, chosen, args.keep.resolve(), args.strict)
    work = Path(tempfile.mkdtemp(prefix="same-as-")).resolve()  # a TemporaryDirectory would go as the first command ends
    try:
        return same_as(args.base, chosen, work, args.strict)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
