"""``adagrpo bench budget``: what selection and fusion cost, and the gate on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from ..models.base import FlowModel
from ..prompts.digest import prompts_digest
from ..recipe.derived import Derived
from ..recipe.keys import RIVALS, Config
from ..study.hosts import hosts, with_probe, without_adagrpo
from .measure import PHASES, HostRead, Iteration, bench_trainer, host_read, interleaved, measure, phase_series, rows_seen
from .options import Options
from .records import Record, new_record
from .statistics import Series, ratios


@dataclasses.dataclass(frozen=True)
class Overhead:
    """AdaGRPO against the identical recipe without it, by phase, as shares of the whole iteration without it.

    Attributes:
        host: the host plan or probe.
        full, plain: evaluations by phase.
        seconds: difference of medians by phase.
        time: median over rounds of ``full / plain - 1``; spread beside it.
    """

    host: str
    full: Mapping[str, int]
    plain: Mapping[str, int]
    seconds: Mapping[str, float]
    time: float
    time_spread: float

    @property
    def evaluations(self) -> float:
        """Additional evaluations, as a share."""
        return sum(self.full.values()) / sum(self.plain.values()) - 1

    @property
    def evaluations_by_phase(self) -> dict[str, float]:
        total = sum(self.plain.values())
        phases = dict.fromkeys([*self.full, *self.plain])
        return {phase: (self.full.get(phase, 0) - self.plain.get(phase, 0)) / total for phase in phases}


def budget_command(config: Config, options: Options, probes: Sequence[str] = ()) -> int:
    """Measure, record, print; 1 when what is gated exceeds its limits, or anything works more than its schedule.

    Args:
        probes: names of ``PROBES`` to measure and gate; without any the recipe's own probe is gated, and beside it every other
            host plan that the recipe can express is measured.
    """
    variants, refused = hosts(config)
    if probes:
        variants, refused = {name: with_probe(config, name) for name in probes}, {}
    gated = list(variants) if probes else list(variants)[:1]
    first = bench_trainer(config)
    model = first.model
    found: list[Overhead] = []
    series: dict[str, Series] = {}
    problems: list[str] = []
    reads: dict[str, HostRead] = {}
    for host, variant in variants.items():
        full, plain, rows = measure_host(variant, model, options.rounds)
        overhead = overhead_of(host, full, plain)
        found.append(overhead)
        series |= phase_series(full, f"{host}/full/") | phase_series(plain, f"{host}/plain/")
        series[f"{host}/time_ratio"] = ratios([i.total for i in full], [i.total for i in plain])
        series[f"{host}/evaluation_overhead"] = Series("of plain", (overhead.evaluations,), exact=True)
        problems += off_schedule(host, variant, full) + off_schedule(host, without_adagrpo(variant), plain)
        problems += unseen_work(host, rows, sum(full[-1].evaluations.values()), getattr(model, "rows_per_image", 1))
        if host in gated:
            problems += exceeded(overhead, limits(variant, model.device))
            reads[host] = host_read(variant)
            if reads[host].checked and reads[host].where:
                problems.append(f"{host}: an iteration reads the device: {reads[host].where}")
    facts = {
        "prompts_sha256": prompts_digest(first.stream.prompts),
        "limits": {host: limits(variants[host], model.device) for host in gated},
        "gated": gated,
        "host_reads": {host: read.where for host, read in reads.items()},
        "refused_hosts": refused,
        "problems": problems,
    }
    case = f"budget-{config.name}" + "-probes" * bool(probes)
    record = new_record(case, model.device, options.argv, series, facts, config, options.note)
    for line in budget_report(record, found):
        print(line)
    print(f"record: {record.write(options.out)}")
    for problem in problems:
        print(f"budget: {problem}")
    return int(bool(problems))


def limits(config: Config, device: torch.device) -> dict[str, float]:
    """The recipe's limits by their keys: of evaluations, and on a GPU of time."""
    cheap = "cheap_" if config.selection.probe != "full" else ""
    keys = [f"{cheap}evaluations", *([f"{cheap}time"] if device.type == "cuda" else [])]
    return {key: getattr(config.budget, key) for key in keys}


def measure_host(config: Config, model: FlowModel, rounds: int) -> tuple[list[Iteration], list[Iteration], int | None]:
    """Interleaved iterations with and without AdaGRPO, both on ``model``; and the rows a transformer saw in one with it."""
    full, plain = bench_trainer(config, model), bench_trainer(without_adagrpo(config), model)
    return *interleaved(lambda: measure(full), lambda: measure(plain), rounds), rows_seen(full)


def overhead_of(host: str, full: list[Iteration], plain: list[Iteration]) -> Overhead:
    """Median overhead of interleaved rounds."""
    ratio = ratios([i.total for i in full], [i.total for i in plain])
    whole = Series("s", tuple(i.total for i in plain)).median
    seconds = {}
    for phase in PHASES:
        with_it, without = (Series("s", tuple(i.seconds[phase] for i in each)).median for each in (full, plain))
        seconds[phase] = (with_it - without) / whole
    return Overhead(host, full[-1].evaluations, plain[-1].evaluations, seconds, ratio.median - 1, ratio.spread)


def exceeded(overhead: Overhead, limits: Mapping[str, float]) -> list[str]:
    """What exceeds the limits, which are named by the recipe's keys."""
    problems = []
    for key, limit in limits.items():
        kind = key.removeprefix("cheap_")
        if (got := getattr(overhead, kind)) > limit:
            problems.append(f"{overhead.host}: {kind} {got:+.1%} over the recipe without it; budget.{key} allows {limit:+.1%}")
    return problems


def schedule_evaluations(config: Config) -> dict[str, int] | None:
    """Image-forwards of one iteration by phase, by arithmetic on the recipe alone: neither plans nor executor are asked, so
    that what the gate watches cannot move the truth it is held against.

    With P slots, T steps, stochastic steps S and groups of G: ``scheduled_probes``; groups P·G·(T-1-k) summed over the k in S
    (shortened tails: at most ``tail_steps`` each), whole trajectories P·G·T; the replay one per stored latent.
    None where an iteration's work is not fixed: a drawn share of the steps, refilled slots, other tails.
    """
    r, p = config.rollout, Derived(config).slots
    other = (r.plan == "window" and r.tail_steps > 0) or r.tail_share > 0 or r.granularities != (1,)
    if r.trained_share < 1 or config.advantage.equal_groups == "refill" or other:
        return None
    counts = {"probe": scheduled_probes(config)} if r.plan == "fork" or Derived(config).scores_needed else {}
    if r.plan == "fork":
        stored = p * len(r.sde_steps) * r.seeds
        if r.fork_velocity == "fresh":
            counts["prefix"] = stored
        tails = [min(r.steps - 1 - k, r.tail_steps or r.steps) for k in r.sde_steps]
        counts["rollout"] = p * (r.seeds * r.group_size * sum(tails) + (r.seeds - 1) * r.steps)
    else:
        stored = p * r.group_size * (1 if r.step_per_prompt else r.window_size if r.plan == "window" else len(r.sde_steps))
        last = r.sde_steps[-1] if r.sde_steps and r.plan == "trajectory" else r.steps - 1
        counts["rollout"] = p * r.group_size * min(r.steps, last + 1 + (r.tail_steps or r.steps))
    if config.loss.old_logp == "recompute":
        counts["recompute"] = stored
    if Derived(config).initial_model_read:
        counts["reference"] = stored
    return {**counts, "update": stored}


def scheduled_probes(config: Config) -> int:
    """Image-forwards of an iteration's probes: P·B·T for the full one.

    A short one of m steps: P·B·m; a race of previews after e1 < e2 … steps: P·B·e1 + P·(ceil(B/2) + 1)·(e2 - e1) + …; memory
    and rivals sample nobody, or memory K finalists. All of these then finish the pick, if there are forks, and the uniform
    candidate: 2P·T, a race from its last preview on; rivals the latter only where the capability EMA is read.
    """
    s, r, p = config.selection, config.rollout, Derived(config).slots
    if s.judge == "full":
        return p * s.candidates * r.steps
    picked = 1 if r.plan == "fork" else 0
    if s.judge == "short":
        return p * (s.candidates * s.probe_steps + (picked + 1) * r.steps)
    if s.judge in RIVALS:
        a = config.advantage
        return p * (picked + (a.weight > 0 or a.std == "floored")) * r.steps
    if s.judge == "memory":
        return p * ((s.finalists if s.finalists > 1 else picked) + 1) * r.steps
    per_slot, running, before = 0, s.candidates, 0
    for preview in s.race_steps:
        per_slot += (running + (before > 0)) * (preview - before)
        running, before = math.ceil(running / 2), preview
    return p * (per_slot + (picked + 1) * (r.steps - before))


def off_schedule(host: str, config: Config, found: list[Iteration]) -> list[str]:
    """Iterations whose counted evaluations are not those of the recipe's schedule."""
    schedule = schedule_evaluations(config)
    if schedule is None:
        return []
    for iteration in found:
        if iteration.evaluations != schedule:
            wrong = {
                phase: f"{iteration.evaluations.get(phase, 0)} instead of {schedule.get(phase, 0)}"
                for phase in dict.fromkeys([*schedule, *iteration.evaluations])
                if iteration.evaluations.get(phase, 0) != schedule.get(phase, 0)
            }
            said = ", ".join(f"{phase} {text}" for phase, text in wrong.items())
            return [f"{host}: evaluations off the recipe's schedule: {said}"]
    return []


def unseen_work(host: str, rows: int | None, counted: int, each: int) -> list[str]:
    """Rows that went through a transformer without being counted, where they are known; an evaluation is of ``each``."""
    if rows is None or rows == counted * each:
        return []
    return [f"{host}: {rows} rows entered a transformer, {counted} evaluations{f' of {each}' * (each > 1)} were counted"]


def budget_report(record: Record, found: list[Overhead]) -> list[str]:
    """The overheads as lines to read."""
    lines = [f"{record.case} on {record.device}: AdaGRPO over the identical recipe without selection and fusion"]
    for overhead in found:
        limits = record.facts["limits"].get(overhead.host, {})
        said = ", ".join(f"{key} {limit:+.0%}" for key, limit in limits.items())
        lines.append(
            f"  {overhead.host} ({f'limit: {said}' if said else 'not gated'}): evaluations {sum(overhead.full.values())} "
            f"against {sum(overhead.plain.values())}, {overhead.evaluations:+.1%}; time {overhead.time:+.1%} ± "
            f"{overhead.time_spread:.1%}"
        )
        counted = ", ".join(f"{phase} {share:+.1%}" for phase, share in overhead.evaluations_by_phase.items())
        lines.append(f"    evaluations by phase: {counted}")
        timed = ", ".join(f"{phase} {share:+.1%}" for phase, share in overhead.seconds.items() if abs(share) >= 5e-4)
        lines.append(f"    time by phase: {timed}")
    lines += [f"  {host}: not expressible: {reason}" for host, reason in record.facts["refused_hosts"].items()]
    reads = ", ".join(f"{host}: {where or 'none'}" for host, where in record.facts["host_reads"].items())
    return [
        *lines,
        "  counted are the forwards of probe, prefix, rollout, recompute and update; time is gated on a GPU only",
        f"  device reads in an iteration (meta device): {reads}",
    ]
