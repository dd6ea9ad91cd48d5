"""``adagrpo bench seeds``: the end reward of several probes over seeds and prompt mixes, with paired intervals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from ..algorithm.sde import Stream
from ..build import build_trainer
from ..config import Config
from ..errors import InputError
from ..evaluation import evaluate
from ..fit import read_metrics
from ..prompts import load_prompts
from ..run.folder import changed_keys, describe_machine
from .hosts import with_probe
from .records import new_record
from .statistics import Series, paired_interval

NAMES = ("probe", "prompts", "seed")


@dataclasses.dataclass(frozen=True)
class Study:
    """What is trained: every probe on every source of prompts from every seed.

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

    def arms(self, config: Config) -> list[tuple[dict[str, Any], Config]]:
        """Name and recipe of every training, in the order trained: whole seeds first.

        Raises:
            InputError: a probe or source of prompts that does not exist, or does not go with the recipe.
        """
        for mix in self.mixes:
            load_prompts(mix, "--mixes", config.data.allow_duplicates, config.data.kwargs)
        found = []
        for seed in range(self.seeds):
            for mix in self.mixes:
                for probe in self.probes:
                    arm = with_probe(config, probe)
                    arm = dataclasses.replace(arm, data=dataclasses.replace(arm.data, prompts=mix))
                    arm = dataclasses.replace(arm, train=dataclasses.replace(arm.train, seed=seed))
                    found.append((dict(zip(NAMES, (probe, mix, seed), strict=True)), arm))
        return found


def seeds_command(config: Config, study: Study, out: Path, argv: tuple[str, ...], note: str) -> int:
    """Train what the log does not hold yet, print, record."""
    if not config.evaluation.final_prompts:
        raise InputError("evaluation.final_prompts = 0: the end reward is that of the final comparison; set it above 0")
    results = trained(config, study)
    series, facts = summary(results, study)
    record = new_record(f"seeds-{config.name}", torch.device("cpu"), argv, series, facts, config, note)
    for line in seeds_report(facts):
        print(line)
    print(f"record: {record.write(out)}")
    return 0


def trained(config: Config, study: Study) -> list[dict[str, Any]]:
    """Results of every arm, from the log or trained now; each is logged as soon as it is there."""
    arms, done = study.arms(config), read_log(study.log)
    todo = [(name, arm) for name, arm in arms if digest(arm) not in done]
    print(f"{len(arms)} trainings, {len(arms) - len(todo)} of them in {study.log}")
    study.log.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // study.jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(study.jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        running = {pool.submit(train_arm, arm): (name, arm) for name, arm in todo}
        try:
            for future in as_completed(running):
                name, arm = running[future]
                result = {**name, "digest": digest(arm), **future.result()}
                done[result["digest"]] = result
                with study.log.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(result) + "\n")
                print(f"{', '.join(map(str, name.values()))}: {result['after']:.4f}, {result['minutes']:.1f} min", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [done[digest(arm)] for _, arm in arms]


def train_arm(config: Config) -> dict[str, Any]:
    """Train without a run folder; the held-out reward before and after, on prompts and noises of the final comparison."""
    started = time.perf_counter()
    trainer, held_out = build_trainer(config)
    e = config.evaluation
    prompts = held_out[: e.final_prompts]

    def reward() -> float:
        with trainer.optimizer.averaged_weights():
            return float(
                evaluate(trainer.executor, trainer.score, prompts, e.final_noises, Stream.FINAL_EVALUATION)[0].nanmean()
            )

    before = reward()
    evaluations = 0
    for _ in range(config.train.iterations):
        read_metrics(trainer.iteration())
        evaluations += sum(count.evaluations for count in trainer.executor.counts.values())
    return {
        "before": before,
        "after": reward(),
        "evaluations": evaluations,
        "minutes": round((time.perf_counter() - started) / 60, 2),
        "machine": describe_machine(trainer.model.device),
    }


def digest(config: Config) -> str:
    """Of the keys that are not at their defaults, so that a new key does not part a log from its trainings."""
    keys = {key: value for key, (_, value) in sorted(changed_keys(Config(), config).items())}
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]


def read_log(path: Path) -> dict[str, dict[str, Any]]:
    """Finished trainings by digest.

    Raises:
        InputError: a broken line.
    """
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            result = json.loads(line)
            found[result["digest"]] = result
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"--log {path}: line {number} is broken; remove it") from error
    return found


def summary(results: Sequence[Mapping[str, Any]], study: Study) -> tuple[dict[str, Series], dict[str, Any]]:
    """End rewards by mix and probe, seed by seed, and what each probe adds to the first, with its 95 % t interval."""
    series, rows = {}, []
    for mix in study.mixes:
        ends = {}
        for probe in study.probes:
            mine = sorted((r for r in results if (r["probe"], r["prompts"]) == (probe, mix)), key=lambda r: r["seed"])
            ends[probe] = [r["after"] for r in mine]
            series[f"{mix}/{probe}"] = Series("reward", tuple(ends[probe]), "higher")
            gains = [r["after"] - r["before"] for r in mine]
            row = {"prompts": mix, "probe": probe, "end": sum(ends[probe]) / len(mine), "gain": sum(gains) / len(mine)}
            if probe != study.probes[0]:
                row["difference"], row["low"], row["high"] = paired_interval(ends[study.probes[0]], ends[probe])
            rows.append(row)
    commits = sorted({str(r["machine"]["commit"]) for r in results})
    return series, {
        "rows": rows,
        "seeds": study.seeds,
        "reference": study.probes[0],
        "trainings": list(results),
        "commits": commits,
    }


def seeds_report(facts: Mapping[str, Any]) -> list[str]:
    """The table as lines to read."""
    lines = [f"end reward over {facts['seeds']} seeds; difference to {facts['reference']}, paired by seed"]
    for row in facts["rows"]:
        line = f"  {row['prompts']:12} {row['probe']:14} {row['end']:.4f}, gain {row['gain']:+.4f}"
        if "difference" in row:
            line += f", {row['difference']:+.4f} (95 % {row['low']:+.4f} … {row['high']:+.4f})"
        lines.append(line)
    return lines
