"""``adagrpo bench iteration``: where the time of one iteration goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from adagrpo_kernels import implementations

from ..forward.backends import resolve_forward
from ..prompts.digest import prompts_digest
from ..recipe.keys import Config
from .flops import ForwardFlops, count_flops, stated_peak
from .measure import PHASES, EnergyMeter, Iteration, bench_trainer, host_syncs, measure, overlapping, peak_bytes, phase_series
from .options import Options
from .records import Record, new_record
from .statistics import Series


def iteration_command(config: Config, options: Options) -> int:
    """Measure, print, record."""
    record = measure_iterations(config, options)
    print("\n".join(iteration_report(record)))
    print(f"record: {record.write(options.out)}")
    return 0


def measure_iterations(config: Config, options: Options) -> Record:
    """The record of ``options.rounds`` iterations after a warm-up."""
    trainer = bench_trainer(config)
    device = trainer.model.device
    flops, peak = count_flops(trainer.executor), stated_peak(device, options.peak)
    meter = EnergyMeter(device)
    measure(trainer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found = [measure(trainer, meter) for _ in range(options.rounds)]
    memory, ran = peak_bytes(device), implementations()
    series = phase_series(found) | rate_series(found, flops, peak)
    if device.type == "cuda":
        series["peak_memory"] = Series("bytes", (float(memory),))
        if config.engine.overlap:
            with overlapping(trainer):
                measure(trainer)
                series["overlapped/seconds"] = Series("s", tuple(measure(trainer).total for _ in range(options.rounds)))
    syncs = host_syncs(trainer)
    if syncs is not None:
        series["host_syncs"] = Series("syncs", (float(len(syncs)),), exact=True)
    facts: dict[str, Any] = {
        "prompts_sha256": prompts_digest(trainer.stream.prompts),
        "tflop_per_image_forward": flops.forward / 1e12,
        "tflop_per_image_update": flops.update / 1e12,
        "peak_tflops": peak,
        "peak_bytes": memory,
        "peak_bytes_of": "allocator" if device.type == "cuda" else "process",
        "host_syncs": syncs,
        "forward": resolve_forward(config.engine.forward, trainer.model),
        "implementations": ran,
    }
    return new_record(f"iteration-{config.name}", device, options.argv, series, facts, config, options.note)


def rate_series(found: Sequence[Iteration], flops: ForwardFlops, peak: float | None) -> dict[str, Series]:
    """Images, evaluations and FLOPs per second, launches, and energy where it is known."""
    evaluations = [sum(i.evaluations.values()) for i in found]
    rates = tuple(flops.iteration(i.evaluations) / i.total / 1e12 for i in found)
    series = {
        "images": Series("images", tuple(float(i.images) for i in found), "", exact=True),
        "images_per_second": Series("images/s", tuple(i.images / i.total for i in found), "higher"),
        "evaluations_per_second": Series(
            "evaluations/s", tuple(n / i.total for n, i in zip(evaluations, found, strict=True)), "higher"
        ),
        "tflops": Series("TFLOP/s", rates, "higher"),
        "launches": Series("launches", tuple(float(i.launches) for i in found), exact=True),
    }
    if peak is not None:
        series["flop_utilisation"] = Series("of the stated peak", tuple(rate / peak for rate in rates), "higher")
    joules = [i.joules / i.images for i in found if i.joules is not None and i.images]
    if len(joules) == len(found):
        series["joules_per_image"] = Series("J", tuple(joules))
    return series


def iteration_report(record: Record) -> list[str]:
    """The record as lines to read."""
    s, facts = record.series, record.facts
    total = s["seconds"]
    lines = [f"{record.case} on {record.device}: {len(total.values)} iterations, median ± spread"]
    for phase in PHASES:
        name = f"seconds/{phase}"
        if name in s:
            work = s.get(f"evaluations/{phase}")
            counted = f"  {work.median:6.0f} evaluations" if work else ""
            lines.append(f"  {phase:10}{_time(s[name])}  {s[name].median / total.median:6.1%}{counted}")
    lines.append(f"  {'iteration':10}{_time(total)}          {s['evaluations'].median:6.0f} evaluations")
    if "overlapped/seconds" in s:
        lines.append(f"  {'overlapped':10}{_time(s['overlapped/seconds'])}")
    peak = facts["peak_tflops"]
    used = "not stated (no peak for this device; --peak TFLOPS)"
    if peak is not None:
        used = f"{s['flop_utilisation'].median:.1%} of {peak:g} TFLOP/s"
    joules = f"{s['joules_per_image'].median:.1f} J per image" if "joules_per_image" in s else "not measured here"
    syncs = facts["host_syncs"]
    waits = "not known on this device" if syncs is None else f"{len(syncs)} ({', '.join(dict.fromkeys(syncs)) or 'none'})"
    return [
        *lines,
        f"  {s['images_per_second'].median:.1f} images/s ({s['images'].median:.0f} decoded and scored), "
        f"{s['evaluations_per_second'].median:.1f} evaluations/s, {s['tflops'].median:.4g} TFLOP/s",
        f"  FLOP utilisation: {used}; energy: {joules}",
        f"  peak memory: {facts['peak_bytes'] / 2**30:.2f} GiB ({facts['peak_bytes_of']}); blocking host syncs: {waits}; "
        f"launches of our kernels: {s['launches'].median:.0f}",
    ]


def _time(series: Series) -> str:
    return f"{series.median:9.4f} s ± {series.spread:.4f}"
