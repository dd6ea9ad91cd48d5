"""``adagrpo bench seeds``: the end reward of several probes over seeds and prompt mixes, with paired intervals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from ..algorithm.sde import Stream
from ..bench.records import new_record
from ..bench.statistics import Series, paired_interval
from ..build import build_trainer, choose_device, load_source
from ..disk.files import writing
from ..disk.lock import OwnerLock, holding
from ..errors import InputError, RunError
from ..evaluate.held_out import evaluate
from ..models.base import guided
from ..prompts.digest import prompts_digest
from ..recipe.derived import Derived
from ..recipe.keys import Config
from ..run.changes import changed_keys
from ..run.machine import describe_machine
from ..run.metrics import read_metrics
from ..text.strict_json import from_json, to_json
from ..text.user_text import read_text
from .hosts import with_probe

LARGEST_LOG = 256 * 2**20
PERMITS = ("data.allow_overlap",)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One training: what it is called in the results, its recipe, and the digest of its prompts."""

    probe: str
    prompts: str
    seed: int
    config: Config
    prompts_sha256: str

    def __str__(self) -> str:
        return f"{self.probe}, {self.prompts}, seed {self.seed}"

    def entry(self) -> dict[str, Any]:
        """What the log says of it beside its result."""
        names = {key: getattr(self, key) for key in ("probe", "prompts", "seed", "prompts_sha256")}
        return names | {"digest": digest(self.config), "start": start_digest(self.config)}


@dataclasses.dataclass(frozen=True)
class Study:
    """What is trained: every probe on every source of prompts from every seed, which count from the recipe's.

    Attributes:
        probes: names of ``PROBES``; the first is what the others are compared with.
        jobs: trainings at once, each in a process of its own.
        log: JSON lines, one per finished training; those found there are not trained again.
    """

    probes: tuple[str, ...]
    mixes: tuple[str, ...]
    seeds: int
    jobs: int
    log: Path

    def arms(self, config: Config) -> list[Arm]:
        """Every training in its order: whole seeds first.

        Raises:
            InputError: a probe or source of prompts that does not exist, or does not go with the recipe.
        """
        digests = {mix: prompts_digest(load_source(config, mix, "--mixes")) for mix in self.mixes}
        found = []
        for seed in range(config.train.seed, config.train.seed + self.seeds):
            for mix, sha256 in digests.items():
                for probe in dict.fromkeys(self.probes):
                    arm = with_probe(config, probe)
                    arm = dataclasses.replace(arm, data=dataclasses.replace(arm.data, prompts=mix))
                    arm = dataclasses.replace(arm, train=dataclasses.replace(arm.train, seed=seed))
                    found.append(Arm(probe, mix, seed, arm, sha256))
        return found


def seeds_command(config: Config, study: Study, out: Path, argv: tuple[str, ...], note: str) -> int:
    """Train what the log does not hold yet, print, record."""
    if not config.evaluation.final_prompts:
        raise InputError("evaluation.final_prompts = 0: the end reward is that of the final comparison; set it above 0")
    device, threads = choose_device(config.model.device), max(1, (os.cpu_count() or 1) // study.jobs)
    with holding(OwnerLock(study.log.parent, "bench seeds", f"--log {study.log}", file=study.log.name)):
        results = trained(study, study.arms(config), describe_machine(device) | {"threads": threads})
    series, facts = summary(results, study.probes[0])
    record = new_record(f"seeds-{config.name}", device, argv, series, facts, config, note)
    if device.type == "cpu":
        record = dataclasses.replace(record, device=f"cpu-{threads}-threads")
    for line in seeds_report(facts):
        print(line)
    print(f"record: {record.write(out)}")
    return 0


def trained(study: Study, arms: Sequence[Arm], machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Results of every arm, from the log or trained now; each is logged as soon as it is there.

    Args:
        machine: what trains; goes into the log with ``threads`` of each training.

    Raises:
        InputError: the log was made with other prompts.
        RunError: a training failed; those beside it were finished and logged first.
    """
    done = read_log(study.log)
    for arm in arms:
        if done.get(digest(arm.config), {}).get("prompts_sha256", arm.prompts_sha256) != arm.prompts_sha256:
            raise InputError(
                f"--log {study.log}: {arm} was trained on other prompts than {arm.prompts} has now; name another log"
            )
    todo = [arm for arm in arms if digest(arm.config) not in done]
    print(f"{len(arms)} trainings, {len(arms) - len(todo)} of them in {study.log}", flush=True)
    context, failed = multiprocessing.get_context("spawn"), ""
    running: dict[Future[dict[str, Any]], Arm] = {}
    with ProcessPoolExecutor(study.jobs, context, begin_worker, (machine["threads"],)) as pool:
        try:
            while running or (todo and not failed):
                while todo and not failed and len(running) < study.jobs:
                    config = todo[0].config
                    before = next((r["before"] for r in done.values() if r.get("start") == start_digest(config)), None)
                    running[pool.submit(train_arm, config, before)] = todo[0]
                    todo = todo[1:]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    arm = running.pop(future)
                    try:
                        result = future.result()
                    except Exception as error:
                        failed = failed or f"{arm}: {type(error).__name__}: {error}"
                        continue
                    done[digest(arm.config)] = arm.entry() | result | {"machine": dict(machine)}
                    with writing(study.log), study.log.open("a", encoding="utf-8") as log:
                        log.write(to_json(done[digest(arm.config)]) + "\n")
                    print(f"{arm}: {result['after']:.4f}, {result['minutes']:.1f} min", flush=True)
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    if failed:
        raise RunError(f"{failed}; finished trainings are in {study.log}: the same command goes on from there")
    return [done[digest(arm.config)] for arm in arms]


def begin_worker(threads: int) -> None:
    """Set the threads of a training, which ends when the process that asked for it does, however that ends."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def train_arm(config: Config, before: float | None = None) -> dict[str, Any]:
    """Train without a run folder; the held-out reward before and after, on prompts and noises of the final comparison.

    Of several rewards it is the first, as everywhere. ``before`` is given where another training began with it
    (``start_digest``).

    Raises:
        RunError: the reward before or after training is not finite.
    """
    started = time.perf_counter()
    trainer, held_out = build_trainer(config)
    if Derived(config).initial_model_read:
        trainer.model.keep_reference()
    e = config.evaluation
    prompts = held_out[: e.final_prompts]

    def reward() -> float:
        with trainer.optimizer.averaged_weights(), guided(trainer.model, e.guidance):
            scores = evaluate(trainer.executor, trainer.score, prompts, e.final_noises, Stream.FINAL_EVALUATION)
        trainer.phase.read()
        return float(scores[0].nanmean())

    before = reward() if before is None else before
    if not math.isfinite(before):
        raise RunError(f"the held-out reward before training is {before}")
    evaluations = 0
    for _ in range(config.train.iterations):
        read_metrics(trainer.iteration())
        trainer.phase.read()
        evaluations += sum(count.evaluations for count in trainer.executor.counts.values())
    after = reward()
    if not math.isfinite(after):
        raise RunError(f"the held-out reward after training is {after}")
    minutes = round((time.perf_counter() - started) / 60, 2)
    return {"before": before, "after": after, "evaluations": evaluations, "minutes": minutes}


def digest(config: Config) -> str:
    """Of the keys that are not at their defaults, so that a new key does not part a log from its trainings; what only permits
    something is left out."""
    keys = {key: value for key, (_, value) in sorted(changed_keys(Config(), config).items()) if key not in PERMITS}
    if config.selection.judge == "memory":  # of earlier logs, whose memory picked blindly and whose digests do not say so
        keys["selection.allow_unseen"] = config.selection.allow_unseen
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]


def start_digest(config: Config) -> str:
    """Of the keys that the reward before training follows from."""
    r, default = config.rollout, Config()
    sampling = {key: getattr(r, key) for key in ("steps", "shift", "storage")}
    start = dataclasses.replace(
        default,
        model=config.model,
        rollout=dataclasses.replace(default.rollout, **sampling),
        train=dataclasses.replace(default.train, seed=config.train.seed),
        engine=config.engine,
        data=dataclasses.replace(config.data, prompts=default.data.prompts),
        evaluation=config.evaluation,
        rewards=config.rewards,
    )
    return digest(start)


def read_log(path: Path) -> dict[str, dict[str, Any]]:
    """Finished trainings by digest.

    Raises:
        InputError: not such a log, or a broken line.
    """
    if not os.path.lexists(path):
        return {}
    found = {}
    for number, line in enumerate(read_text(path, f"--log {path}", LARGEST_LOG).split("\n"), 1):
        if not line.strip():
            continue
        try:
            result = from_json(line)
            result["machine"]["commit"], result["prompts_sha256"]
            if not all(math.isfinite(result[key]) for key in ("before", "after", "seed")):
                raise ValueError("a reward that is no number")
            found[str(result["digest"])] = result
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"--log {path}: line {number} is broken ({type(error).__name__}); remove it") from error
    return found


def summary(results: Sequence[Mapping[str, Any]], reference: str) -> tuple[dict[str, Series], dict[str, Any]]:
    """End rewards by mix and probe, seed by seed, and what each probe adds to ``reference``, with its 95 % t interval."""
    series, rows, seeds = {}, [], sorted({r["seed"] for r in results})
    for mix in dict.fromkeys(r["prompts"] for r in results):
        ends: dict[str, list[float]] = {}
        for probe in dict.fromkeys(r["probe"] for r in results):
            mine = sorted((r for r in results if (r["probe"], r["prompts"]) == (probe, mix)), key=lambda r: r["seed"])
            ends[probe] = [r["after"] for r in mine]
            series[f"{mix}/{probe}"] = Series("reward", tuple(ends[probe]), "higher")
            gains = [r["after"] - r["before"] for r in mine]
            row = {"prompts": mix, "probe": probe, "end": sum(ends[probe]) / len(mine), "gain": sum(gains) / len(mine)}
            if probe != reference:
                found = paired_interval(ends[reference], ends[probe])
                row |= {
                    key: v if math.isfinite(v) else None for key, v in zip(("difference", "low", "high"), found, strict=True)
                }
            rows.append(row)
    commits = sorted({str(r["machine"]["commit"]) for r in results})
    facts = {"reference": reference, "seeds": seeds, "rows": rows, "trainings": list(results), "commits": commits}
    return series, facts


def seeds_report(facts: Mapping[str, Any]) -> list[str]:
    """The table as lines to read."""
    lines = [f"end reward over {len(facts['seeds'])} seeds; difference to {facts['reference']}, paired by seed"]
    for row in facts["rows"]:
        line = f"  {row['prompts']:12} {row['probe']:14} {row['end']:.4f}, gain {row['gain']:+.4f}"
        if "difference" in row:
            line += f", {row['difference']:+.4f} (95 % {interval(row)})"
        lines.append(line)
    if len(facts["commits"]) > 1:
        lines.append(f"  trained at {len(facts['commits'])} commits: {', '.join(commit[:9] for commit in facts['commits'])}")
    return lines


def interval(row: Mapping[str, Any]) -> str:
    """Limits of a difference; a single seed has none."""
    return "unknown: one seed" if row["low"] is None else f"{row['low']:+.4f} … {row['high']:+.4f}"
