"""``adagrpo doctor``: what this machine has, what of the engine it can run, and what that means for a run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from adagrpo_kernels._dispatch import device_problem

from .engine.backends import attention_problem, forward_problem, fp8_attention_problem, precision_problem
from .run.folder import PACKAGES, describe_machine

FIDELITY = Path("runs") / "fidelity"
REPORT_KEYS = {"recipe", "levers", "device", "spearman", "same_pick", "passed"}


def report(fidelity: Path = FIDELITY) -> str:
    """A readable page: versions, device, memory and disk, backends with reasons, fidelity reports of a folder, advice."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe_machine(device)
    lines = [f"Python {machine['python']} at {sys.prefix}"]
    lines += [f"  {name:13} {machine['versions'][name] or 'not installed'}" for name in PACKAGES]
    lines += ["", f"Device: {machine.get('gpu', 'CPU')}"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        lines.append(f"  compute capability {properties.major}.{properties.minor}, CUDA {torch.version.cuda}")
        lines.append(f"  memory {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    else:
        lines.append(f"  {torch.get_num_threads()} threads")
    lines.append(f"  disk {shutil.disk_usage('.').free / 2**30:.0f} GiB free in the current folder")
    lines.append(f"  HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', 'unset')}")
    lines += ["", "Backends:", *backends(device), "", "Fidelity of lossy levers:", *fidelity_lines(fidelity)]
    return "\n".join([*lines, "", "Advice:", *[f"  - {advice}" for advice in _advice(device)]])


def backends(device: torch.device) -> Iterator[str]:
    """One line for each value of the ``engine`` keys: yes, or why not and what helps."""
    on_cuda = device.type == "cuda"
    compiled = forward_problem("compile", device)
    resolved = "compile" if on_cuda and compiled is None else "eager"
    graphs = None if on_cuda else "needs a CUDA device; here it runs under the capture's contract, without graphs"
    simulated = None if on_cuda else "needs Hopper; here its rounding is simulated, without any gain"
    rows: list[tuple[str, str, str | None]] = [
        ("forward", "eager", None),
        ("forward", "compile", compiled),
        ("forward", "fused", None),
        ("precision", "bf16", None),
        ("precision", "fp8", precision_problem("fp8", device)),
        *(("attention", name, attention_problem(name, device)) for name in ("native", "cudnn", "flash", "flash3")),
        ("fp8_attention", "true", fp8_attention_problem(device) or simulated),
        ("cuda_graphs", "true", graphs),
        ("kernels", "triton", device_problem({device.type})),
    ]
    for key, value, problem in rows:
        note = f"no: {problem}" if problem else "yes"
        if not problem and not on_cuda and (key, value) in (("precision", "fp8"), ("forward", "fused"), ("precision", "bf16")):
            note = "yes, for tests: it saves no time on a CPU"
        yield f"  engine.{f'{key} = {value}':24} {note}"
    yield f"  engine.{'forward = auto':24} means {resolved} here"


def fidelity_lines(folder: Path) -> Iterator[str]:
    """What the fidelity reports in ``folder`` say; FP8 is recommended by a report that passed, never without one."""
    found = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not found:
        yield f"  none in {folder}: `adagrpo fidelity RECIPE --engine.precision fp8 --engine.forward fused` makes one"
    for path in found:
        try:
            report = json.loads(path.read_text("utf-8"))
            missing = REPORT_KEYS - report.keys()
        except (OSError, ValueError, AttributeError) as error:
            yield f"  {path}: cannot be read as a fidelity report ({error}); remove it or make it again"
            continue
        if missing:
            yield f"  {path}: not a fidelity report (no {', '.join(sorted(missing))})"
            continue
        levers = ", ".join(f"{key} = {value}" for key, value in report["levers"].items())
        pick = "" if report["same_pick"] is None else f", same pick {report['same_pick']:.0%}"
        rank = "undefined" if report["spearman"] is None else f"{report['spearman']:.3f}"
        verdict = "passed: recommended" if report["passed"] else "not passed: not recommended"
        yield f"  {levers}, recipe {report['recipe']} on {report['device']}: Spearman {rank}{pick}; {verdict}"


def _advice(device: torch.device) -> list[str]:
    if device.type == "cpu":
        return ["no CUDA device: `adagrpo train tiny` runs here in minutes; FLUX.1-dev needs an H100 or H200"]
    advice = []
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    if gib < 70:
        advice.append(f"{gib:.0f} GiB is too little for FLUX.1-dev with its text encoders in bf16 (about 34 GiB) and an update")
    elif gib < 100:
        advice.append("recipe flux1-dev-lora fits with gradient checkpointing; keep engine.max_rows low")
    return advice or ["ready: adagrpo train flux1-dev-lora --data.prompts FILE --data.held-out FILE"]
