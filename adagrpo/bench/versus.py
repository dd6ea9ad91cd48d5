"""``adagrpo bench baseline``: ours against the plain published loop, at the same work, in one process."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import torch

from ..prompts.digest import prompts_digest
from ..recipe.derived import Derived
from ..recipe.keys import Config
from ..train import Trainer
from .baseline import PublishedLoop
from .measure import PHASES, Iteration, bench_trainer, forget_prompts, interleaved, measure, phase_series
from .options import Options
from .records import Record, new_record
from .statistics import Series, ratios


def baseline_command(config: Config, options: Options) -> int:
    """Measure, print, record; 1 when the two did not do the same work."""
    record, problem = measure_versus(config, options)
    for line in versus_report(record):
        print(line)
    print(f"record: {record.write(options.out)}")
    if problem:
        print(f"baseline: {problem}")
    return int(bool(problem))


def plain_loop(config: Config, trainer: Trainer) -> PublishedLoop:
    """The published loop over the same recipe, model, rewards and prompts."""
    return PublishedLoop(config, trainer.model, [placed.reward for placed in trainer.score.rewards], trainer.stream.prompts)


def measure_plain(loop: PublishedLoop) -> Iteration:
    """What one iteration of the plain loop takes."""
    forget_prompts(loop.model)
    loop.phase.read()
    started = time.perf_counter()
    _, rewards = loop.iteration()
    if loop.model.device.type == "cuda":
        torch.cuda.synchronize(loop.model.device)
    total = time.perf_counter() - started
    phases = loop.phase.read()
    seconds = {phase: phases.get(phase, 0.0) for phase in PHASES}
    seconds["other"] = total - sum(phases.values())
    images = Derived(loop.config).candidates + rewards[0].numel()
    return Iteration(total, seconds, dict(loop.evaluations), {}, images, 0, None)


def measure_versus(config: Config, options: Options) -> tuple[Record, str]:
    """Interleaved rounds of ours and the plain loop on one model; and how their work differed, '' for not at all."""
    ours = bench_trainer(config)
    loop = plain_loop(config, ours)
    mine, plain = interleaved(lambda: measure(ours), lambda: measure_plain(loop), options.rounds)
    series = phase_series(mine, "ours/") | phase_series(plain, "plain/")
    del series["plain/calls"]
    ratio = ratios([i.total for i in plain], [i.total for i in mine])
    series["times_faster"] = dataclasses.replace(ratio, better="higher")
    problem = different_work(mine[-1].evaluations, plain[-1].evaluations)
    facts = {
        "prompts_sha256": prompts_digest(loop.stream.prompts),
        "same_work": not problem,
        "images": [mine[-1].images, plain[-1].images],
    }
    device = ours.model.device
    return new_record(f"baseline-{config.name}", device, options.argv, series, facts, config, options.note), problem


def different_work(ours: Mapping[str, int], plain: Mapping[str, int]) -> str:
    """How evaluations by phase differ; '' for not at all."""
    if dict(ours) == dict(plain):
        return ""
    return f"not the same work: ours evaluates {dict(ours)}, the plain loop {dict(plain)}"


def versus_report(record: Record) -> list[str]:
    """The record as lines to read."""
    s = record.series
    ratio = s["times_faster"]
    lines = [
        f"{record.case} on {record.device}: {len(ratio.values)} interleaved rounds, "
        f"{s['ours/evaluations'].median:.0f} evaluations each",
        f"  {'':10}{'ours':>12}{'plain loop':>14}",
    ]
    for phase in PHASES:
        pair = [s.get(f"{who}/seconds/{phase}", Series("s", (0.0,))).median for who in ("ours", "plain")]
        if any(pair):
            lines.append(f"  {phase:10}{pair[0]:10.4f} s{pair[1]:12.4f} s")
    both = [s[f"{who}/seconds"].median for who in ("ours", "plain")]
    lines.append(f"  {'iteration':10}{both[0]:10.4f} s{both[1]:12.4f} s")
    low, high = min(ratio.values), max(ratio.values)
    return [*lines, f"  ours is {ratio.median:.2f}x as fast, ± {ratio.spread:.2f} (rounds {low:.2f} … {high:.2f})"]
