"""A recording as a folder: summary for people and for programs, pictures, trace."""

from __future__ import annotations

import dataclasses
import os
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..disk.files import write_json, write_text
from ..estimate.memory import size_text
from ..estimate.roofline import H100, H200, Device
from ..forecast import planned_calls
from ..recipe.keys import Config
from ..report.charts import number
from ..run.changes import changed_keys
from ..run.machine import describe_machine, processor, slug
from ..train import Trainer
from .figures import memory_curve, phase_bars, roofline
from .points import Point, phase_points
from .record import SNAPSHOT, TRACE, Recording, record

JSON, PAGE, FIGURES = "summary.json", "summary.md", ("phases.svg", "roofline.svg", "memory.svg")
FILES = (TRACE, SNAPSHOT, JSON, PAGE, *FIGURES)


def device_slug(device: torch.device) -> str:
    """Name of the folder of a device's profiles."""
    return slug(torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{processor_name()}")


def processor_name() -> str:
    """The CPU's name without its trademarks."""
    return re.sub(r"\([RTM]+\)", "", processor())


def write_profile(trainer: Trainer, config: Config, recipe: Config, iterations: int, folder: Path) -> str:
    """Record ``trainer`` into an existing folder, and return what to print. What an earlier profile left there goes.

    Args:
        config: of the trainer.
        recipe: as its file has it, before anything was overridden.

    Raises:
        RunError: the recording cannot go on; nothing but the snapshot of an out-of-memory error is left in ``folder``.
    """
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".recording-") as name:
        draft = Path(name)
        try:
            load = os.getloadavg()[0]
            recording = record(trainer, iterations, draft, snapshot=folder / SNAPSHOT)
            roof = stated_rates(trainer.model.device)
            summary, points = _summary(trainer, config, recipe, recording, roof, load)
            write_json(draft / JSON, summary)
            page = markdown(summary)
            write_text(draft / PAGE, page)
            for file, picture in zip(FIGURES, _pictures(summary, recording, points, roof), strict=True):
                write_text(draft / file, picture)
        finally:
            trainer.phase.listener = lambda phase: None
        for file in FILES:
            if (draft / file).exists():
                (draft / file).replace(folder / file)
    return page


def stated_rates(device: torch.device) -> Device | None:
    """The roof of ``device``, where its rates are stated."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((known for key, known in (("H100", H100), ("H200", H200)) if key in name), None)


def _summary(
    trainer: Trainer, config: Config, recipe: Config, recording: Recording, roof: Device | None, load: float
) -> tuple[dict[str, Any], list[Point]]:
    device = trainer.model.device
    counts = recording.timed[-1].counts
    machine = describe_machine(device)
    if device.type == "cpu":
        machine |= {"processor": processor_name(), "cores": os.cpu_count(), "load_before": load}
    pictures = planned_calls(config)["decode"]
    counted = phase_points(trainer.model, trainer.stream.prompts[0], pictures, recording.phases, counts)
    points = [*(counted if not isinstance(counted, str) else ()), *recording.kernels]
    images = sum(pictures)
    inside = {phase: dataclasses.asdict(count) for phase, count in counts.items() if phase not in recording.phases}
    seconds = [one.seconds for one in recording.timed]
    summary = {
        "recipe": config.name,
        "machine": machine,
        "changed_keys": {key: list(values) for key, values in changed_keys(recipe, config).items()},
        "iterations": {"warmup": recording.warmup, "traced": 1, "timed": len(seconds)},
        "seconds": {
            "mean": recording.seconds,
            "median": statistics.median(seconds),
            "each": seconds,
            "traced": recording.traced.seconds,
        },
        "images": images,
        "phases": _phases(recording),
        "counted_inside_update": inside,
        "clock": recording.clock,
        "operators": [dataclasses.asdict(operator) for operator in recording.operators],
        "kernels": {"launches": recording.launches, "implementations": recording.implementations},
        "points": [dataclasses.asdict(p) | {"intensity": p.intensity, "tflops": p.tflops, "gb_s": p.gigabytes} for p in points],
        "points_missing": counted if isinstance(counted, str) else None,
        "roof": dataclasses.asdict(roof) if roof is not None else None,
        "memory": {
            "what": "CUDA tensors; paler: the phase's peak"
            if device.type == "cuda"
            else "the whole process at the phases' boundaries",
            "peak_bytes": recording.peak,
            "timeline": [dataclasses.asdict(sample) for sample in recording.memory],
        },
        "power": _energy(recording, images),
        "notices": recording.notices,
    }
    return summary, points


def _phases(recording: Recording) -> list[dict[str, Any]]:
    """Seconds of each phase, its share of the iteration, and its work where any was counted."""
    counts = recording.timed[-1].counts
    return [
        {
            "phase": phase,
            "seconds": seconds,
            "share": seconds / recording.seconds,
            "evaluations": counts[phase].evaluations if phase in counts else None,
            "calls": counts[phase].calls if phase in counts else None,
        }
        for phase, seconds in recording.phases.items()
    ]


def _energy(recording: Recording, images: int) -> dict[str, Any]:
    """Watts and joules of an iteration of so many images, or why they are not known."""
    energy = recording.energy
    if isinstance(energy, str):
        return {"watts": None, "joules_per_iteration": None, "joules_per_image": None, "reason": energy}
    joules = energy.joules / len(recording.timed)
    power = {"watts": energy.watts, "joules_per_iteration": joules, "joules_per_image": joules / images}
    return power | {"samples": energy.samples}


def _pictures(
    summary: Mapping[str, Any], recording: Recording, points: Sequence[Point], roof: Device | None
) -> tuple[str, str, str]:
    where = f"{summary['recipe']}, {_device(summary)}"
    return (
        phase_bars(recording.phases, f"Seconds per phase of an iteration: {where}"),
        roofline(points, roof, f"Roofline: {where}"),
        memory_curve(recording.memory, f"Memory of an iteration: {where}", summary["memory"]["what"]),
    )


def _device(summary: Mapping[str, Any]) -> str:
    machine = summary["machine"]
    return machine.get("gpu") or f"{machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"


def markdown(summary: Mapping[str, Any]) -> str:
    """The page for people."""
    machine, seconds, memory, power = (summary[key] for key in ("machine", "seconds", "memory", "power"))
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    count = summary["iterations"]
    lines = [
        f"# Profile of {summary['recipe']} on {_device(summary)}",
        "",
        f"- versions: Python {machine['python']}, {versions}; commit {machine['commit'] or 'unknown'}",
        f"- an iteration without the profiler: {number(seconds['mean'])} s mean, {number(seconds['median'])} s median, "
        f"{number(min(seconds['each']))} … {number(max(seconds['each']))} s, of {count['timed']}",
        f"- under the profiler: {number(seconds['traced'])} s; images sampled: {summary['images']}",
        *([f"- {machine['cores']} cores; load before: {machine['load_before']:.1f}"] if "cores" in machine else []),
        f"- peak memory ({memory['what'].split(';')[0]}): {size_text(memory['peak_bytes'])}",
        f"- power: {_power(power)}",
    ]
    lines += [f"- {key} = {now} (recipe: {before})" for key, (before, now) in summary["changed_keys"].items()]
    lines += [f"- notice: {notice}" for notice in summary["notices"]]
    lines += ["", "## Phases", "", "Overlap is off, so they add up.", ""]
    lines += ["| phase | seconds | share | evaluations | calls |", "|---|---|---|---|---|"]
    for row in summary["phases"]:
        work = "|".join(f" {row[key] if row[key] is not None else '–'} " for key in ("evaluations", "calls"))
        lines.append(f"| {row['phase']} | {number(row['seconds'])} | {row['share']:.1%} |{work}|")
    for phase, work in summary["counted_inside_update"].items():
        lines.append(f"| {phase} | in update | | {work['evaluations']} | {work['calls']} |")
    lines += ["", f"## Operators by their own {summary['clock']} time, one traced iteration", ""]
    lines += ["| operator | calls | seconds | share |", "|---|---|---|---|"]
    for row in summary["operators"]:
        name = row["name"].replace("|", "\\|")
        lines.append(f"| `{name}` | {row['calls']} | {number(row['seconds'])} | {row['share']:.1%} |")
    launches = ", ".join(f"{name} {n}" for name, n in summary["kernels"]["launches"].items())
    lines += ["", f"Our own kernels launched: {launches or 'none'}. What ran for each operator of the algorithm: "]
    lines[-1] += ", ".join(f"{name} {how}" for name, how in summary["kernels"]["implementations"].items()) + "."
    lines += ["", "## Achieved", ""]
    if summary["points_missing"]:
        lines += [f"The phases' forwards could not be counted: {summary['points_missing']}", ""]
    lines += ["| what | GFLOP | GB | FLOPs per byte | TFLOP/s | GB/s |", "|---|---|---|---|---|---|"]
    for p in summary["points"]:
        figures = (p["flops"] / 1e9, p["bytes"] / 1e9, p["intensity"], p["tflops"], p["gb_s"])
        lines.append(f"| {p['name']} | " + " | ".join(map(number, figures)) + " |")
    lines += ["", "FLOPs and bytes are counted on the eager model, each operator's operands once; seconds are measured."]
    if summary["roof"] is None:
        lines.append("No roof is stated for this device.")
    return "\n".join(lines) + "\n"


def _power(power: Mapping[str, Any]) -> str:
    if power["watts"] is None:
        return f"not measured: {power['reason']}"
    iteration, image = number(power["joules_per_iteration"]), number(power["joules_per_image"])
    return f"{number(power['watts'])} W mean, {iteration} J per iteration, {image} J per image ({power['samples']} samples)"
