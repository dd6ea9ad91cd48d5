"""``adagrpo doctor``: what this machine has, which backends run on it and why not the others, and whether they are sound."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from adagrpo_kernels._dispatch import VARIABLE, device_problem

from ..forward.backends import (
    ATTENTION,
    attention_problem,
    auto_forward,
    forward_problem,
    precision_problem,
)
from ..recipe.keys import Config
from ..run.machine import PACKAGES, describe_machine
from ..text.refusals import FP8_ATTENTION, TENSORWISE_FUSED
from ..text.strict_json import from_json
from ..text.user_text import read_text
from .links import links

FIDELITY = Path("runs/fidelity")
MAKE_FIDELITY = "adagrpo fidelity RECIPE --engine.precision fp8"


def doctor(self_test: bool | None = None, everything: bool = False) -> int:
    """Print the report, then the self-test's rows as they come; exit code 1 if a row failed.

    Args:
        self_test: None is: where there is a CUDA device.
        everything: ``selftest.self_test``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(report(device), flush=True)
    if not (device.type == "cuda" if self_test is None else self_test):
        return 0
    from . import selftest

    print("\nSelf-test (seconds per iteration are tiny-flux's: they rank nothing for FLUX.1):", flush=True)
    begun, outcomes = time.perf_counter(), []
    for row in selftest.self_test(device, everything):
        print(row, flush=True)
        outcomes.append(row.outcome)
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in (selftest.PASSED, selftest.FAILED, selftest.SKIPPED))
    print(f"  {counts}; {time.perf_counter() - begun:.0f} s")
    return 1 if selftest.FAILED in outcomes else 0


def doctor_recipe(config: Config) -> int:
    """Print the rows of ``rehearse.check_recipe`` as they come; exit code 1 if one failed."""
    from . import rehearse

    outcomes = []
    for row in rehearse.check_recipe(config):
        print(row, flush=True)
        outcomes.append(row.outcome)
    if rehearse.FAILED in outcomes:
        print(f"\n{config.name} cannot be trained here as it is: {outcomes.count(rehearse.FAILED)} checks failed")
        return 1
    print(f"\n{config.name} can be trained here")
    return 0


def report(device: torch.device) -> str:
    """A readable page: versions, device, memory and disk, backends, links between GPUs, FP8, advice."""
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
    lines += ["", "Backends:"]
    lines += [
        f"  engine.{key:13} = {value:8} {f'no: {problem}' if problem else 'yes'}" for key, value, problem in backends(device)
    ]
    lines += ["", "`auto` here:", *[f"  engine.{key:13} {value}" for key, value in automatic(device)]]
    lines += ["", "Several GPUs:", *[f"  {line}" for line in links(device)]]
    lines += ["", "Fidelity of lossy levers:", *[f"  {line}" for line in fidelity(FIDELITY, device)]]
    return "\n".join([*lines, "", "Advice:", *[f"  - {advice}" for advice in _advice(device)]])


def backends(device: torch.device) -> Iterator[tuple[str, str, str | None]]:
    """Key of ``engine``, value, and why it cannot run here; None where it can."""
    for forward in ("eager", "compile", "fused"):
        yield "forward", forward, forward_problem(forward, device)
    for precision in ("bf16", "fp8"):
        yield "precision", precision, precision_problem(precision, device)
    for attention in ATTENTION:
        yield "attention", attention, attention_problem(attention, device)
    yield "fp8_scaling", "tensorwise", precision_problem("fp8", device) or TENSORWISE_FUSED
    yield "fp8_attention", "true", FP8_ATTENTION
    graphs = None if device.type == "cuda" else "needs a CUDA device; elsewhere the steps run directly, under a capture's rules"
    yield "cuda_graphs", "true", graphs
    yield "kernels", "triton", device_problem({device.type})


def automatic(device: torch.device) -> Iterator[tuple[str, str]]:
    """Key of ``engine`` and what ``auto`` is here, for FLUX models."""
    yield "forward", auto_forward(device)
    yield "precision", "the model's own (model.dtype)"
    yield "attention", "torch's choice"
    problem = device_problem({device.type}) if device.type == "cuda" else None
    chosen = "triton" if device.type == "cuda" else "reference"
    chosen = f"reference, because {problem}" if problem else chosen
    named = os.environ.get(VARIABLE, "auto")
    yield "kernels", chosen if named == "auto" else f"{named} ({VARIABLE})"


def fidelity(folder: Path, device: torch.device) -> Iterator[str]:
    """What the fidelity reports in ``folder`` say, then whether FP8 is recommended."""
    recipes = []
    for path in sorted(folder.glob("*.json")):
        try:
            found = from_json(read_text(path, "report", 2**24))
        except ValueError as error:
            yield f"{path}: not readable JSON ({error})"
            continue
        try:
            levers = ", ".join(f"{key} = {value}" for key, value in found["levers"].items())
            figures = f"Spearman {_figure(found['spearman'])}, same pick {_figure(found['same_pick'])}"
            passed, recipe, where = found["passed"] is True, str(found["recipe"]), found["device"]
        except (KeyError, TypeError, AttributeError) as error:
            yield f"{path}: not a fidelity report ({type(error).__name__}: {error})"
            continue
        yield f"{path}: {levers}; recipe {recipe}, {where}: {figures}: {'passed' if passed else 'NOT passed'}"
        if passed and found["levers"].get("engine.precision") == "fp8":
            recipes.append(recipe)
    problem = precision_problem("fp8", device)
    if problem:
        yield f"FP8 cannot run here: {problem}"
    elif recipes:
        names = ", ".join(dict.fromkeys(recipes))
        yield f"FP8 is recommended for {names}, with the levers and on the device of a report that passed"
    else:
        yield f"FP8 is not recommended: no report in {folder} passed with it; make one: {MAKE_FIDELITY}"


def _figure(value: Any) -> str:
    measured = isinstance(value, (int, float)) and math.isfinite(value)
    return f"{value:.3f}" if measured else "not measured"


def _advice(device: torch.device) -> list[str]:
    if device.type == "cpu":
        return ["no CUDA device: `adagrpo train tiny` runs here in minutes; FLUX.1-dev needs an H100 or H200"]
    advice = []
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    if gib < 70:
        advice.append(f"{gib:.0f} GiB is too little for FLUX.1-dev with its text encoders in bf16 (about 34 GiB) and an update")
    elif gib < 100:
        advice.append("recipe flux1-dev-lora fits with gradient checkpointing; keep engine.max_rows low")
    if importlib.util.find_spec("triton") is None:
        advice.append("triton is not installed: pip install 'adagrpo[cuda]'")
    return advice or ["ready: adagrpo train flux1-dev-lora --data.prompts FILE --data.held-out FILE"]
