"""``adagrpo doctor``: what this machine has, and what that means for a run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

import torch

from .run.folder import PACKAGES, describe_machine


def report() -> str:
    """A readable page: versions, device, optional packages, memory and disk, advice."""
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
    return "\n".join([*lines, "", "Advice:", *[f"  - {advice}" for advice in _advice(device)]])


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
    if importlib.util.find_spec("flash_attn") is None:
        advice.append("flash-attn is not installed; torch's own attention is used")
    return advice or ["ready: adagrpo train flux1-dev-lora --data.prompts FILE --data.held-out FILE"]
