"""``adagrpo bench budget``: what selection and fusion cost, and the gate on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..config import Config
from ..models.base import FlowModel
from ..run.folder import prompts_digest
from .hosts import hosts, without_adagrpo
from .iteration import Options
from .measure import PHASES, Iteration, bench_trainer, host_read, interleaved, measure, phase_series, rows_seen
from .records import Record, new_record
from .statistics import Series, ratios


@dataclasses.dataclass(frozen=True)
class Overhead:
    """AdaGRPO against the identical recipe without it, by phase, as shares of the whole iteration without it.

    Attributes:
        host: the plan.
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


def budget_command(config: Config, options: Options) -> int:
    """Measure every host, record, print; 1 when the recipe's own plan exceeds a limit or works more than its schedule."""
    variants, refused = hosts(config)
    first = bench_trainer(config)
    model = first.model
    found: list[Overhead] = []
    series: dict[str, Series] = {}
    problems: list[str] = []
    for number, (host, variant) in enumerate(variants.items()):
        full, plain, rows = measure_host(variant, model, options.rounds)
        overhead = overhead_of(host, full, plain)
        found.append(overhead)
        series |= phase_series(full, f"{host}/full/") | phase_series(plain, f"{host}/plain/")
        series[f"{host}/time_ratio"] = ratios([i.total for i in full], [i.total for i in plain])
        series[f"{host}/evaluation_overhead"] = Series("of plain", (overhead.evaluations,), exact=True)
        if number == 0:
            timed = config.budget.time if model.device.type == "cuda" else None
            problems += exceeded(overhead, config.budget.evaluations, timed)
        problems += off_schedule(host, variant, full) + off_schedule(host, without_adagrpo(variant), plain)
        problems += unseen_work(host, rows, sum(full[-1].evaluations.values()))
    read = host_read(config)
    if read.checked and read.where:
        problems.append(f"an iteration reads the device: {read.where}")
    facts = {
        "prompts_sha256": prompts_digest(first.stream.prompts),
        "limits": dataclasses.asdict(config.budget),
        "gated": next(iter(variants)),
        "refused_hosts": refused,
        "host_read": read.where,
        "problems": problems,
    }
    record = new_record(f"budget-{config.name}", model.device, options.argv, series, facts, config, options.note)
    for line in budget_report(record, found):
        print(line)
    print(f"record: {record.write(options.out)}")
    for problem in problems:
        print(f"budget: {problem}")
    return int(bool(problems))


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


def exceeded(overhead: Overhead, evaluations: float, seconds: float | None) -> list[str]:
    """What exceeds the limits; ``seconds`` None leaves the clock out."""
    problems = []
    for key, got, limit in (("evaluations", overhead.evaluations, evaluations), ("time", overhead.time, seconds)):
        if limit is not None and got > limit:
            problems.append(f"{overhead.host}: {key} {got:+.1%} over the recipe without it; budget.{key} allows {limit:+.1%}")
    return problems


def schedule_evaluations(config: Config) -> dict[str, int] | None:
    """Image-forwards of one iteration by phase, by arithmetic on the recipe alone: neither plans nor executor are asked.

    With P slots, B candidates, T steps, stochastic steps S and groups of G: probes P·B·T; groups P·G·(T-1-k) summed over the k
    in S (shortened tails: at most ``tail_steps`` each), whole trajectories P·G·T; the replay one per stored latent.
    None where an iteration's work is not fixed: a drawn share of the steps, or refilled slots.
    """
    r, p = config.rollout, config.train.slots * config.train.accumulation
    if r.trained_share < 1 or config.advantage.equal_groups == "refill":
        return None
    scored = (config.selection.candidates > 1 and config.selection.strategy != "random") or config.advantage.weight > 0
    counts = {"probe": p * config.selection.candidates * r.steps} if r.plan == "fork" or scored else {}
    if r.plan == "fork":
        stored = p * len(r.sde_steps)
        if r.fork_velocity == "fresh":
            counts["prefix"] = stored
        tails = [min(r.steps - 1 - k, r.tail_steps or r.steps) for k in r.sde_steps]
        counts["rollout"] = p * r.group_size * sum(tails)
    else:
        stored = p * r.group_size * (r.window_size if r.plan == "window" else len(r.sde_steps))
        counts["rollout"] = p * r.group_size * r.steps
    if config.loss.old_logp == "recompute":
        counts["recompute"] = stored
    if config.loss.kl_weight:
        counts["reference"] = stored
    return {**counts, "update": stored}


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


def unseen_work(host: str, rows: int | None, counted: int) -> list[str]:
    """Rows that went through a transformer without being counted, where they are known."""
    if rows is None or rows == counted:
        return []
    return [f"{host}: {rows} rows entered a transformer, {counted} evaluations were counted"]


def budget_report(record: Record, found: list[Overhead]) -> list[str]:
    """The overheads as lines to read."""
    lines = [f"{record.case} on {record.device}: AdaGRPO over the identical recipe without selection and fusion"]
    for overhead in found:
        whose = "" if overhead.host == record.facts["gated"] else ", not gated"
        lines.append(
            f"  {overhead.host}{whose}: evaluations {sum(overhead.full.values())} against {sum(overhead.plain.values())}, "
            f"{overhead.evaluations:+.1%}; time {overhead.time:+.1%} ± {overhead.time_spread:.1%}"
        )
        counted = ", ".join(f"{phase} {share:+.1%}" for phase, share in overhead.evaluations_by_phase.items())
        lines.append(f"    evaluations by phase: {counted}")
        timed = ", ".join(f"{phase} {share:+.1%}" for phase, share in overhead.seconds.items() if abs(share) >= 5e-4)
        lines.append(f"    time by phase: {timed}")
    lines += [f"  {host}: not expressible: {reason}" for host, reason in record.facts["refused_hosts"].items()]
    limits = record.facts["limits"]
    gate = f"limit {limits['evaluations']:+.0%} evaluations (counted: probe, prefix, rollout, recompute, update forwards)"
    clock = (
        f", {limits['time']:+.0%} time" if record.device.split("-")[0] not in ("cpu", "meta") else "; time is not gated here"
    )
    reads = record.facts["host_read"]
    return [*lines, f"  {gate}{clock}; device reads in an iteration (meta device): {reads or 'none'}"]
