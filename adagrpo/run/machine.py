"""What a record says of the machine it was made on."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("adagrpo", "torch", "triton", "diffusers", "transformers", "peft", "torchao", "safetensors", "numpy")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions, device and commit, for the manifest."""
    versions, commit = code_versions()
    described: dict[str, Any] = {"versions": versions, "python": platform.python_version()}
    described |= {"device": str(device), "commit": commit}
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = torch.version.cuda
    else:
        described["threads"] = torch.get_num_threads()
    return described


def code_versions() -> tuple[dict[str, str | None], str | None]:
    """Versions of the packages that compute (None: not installed), and the commit of this one's checkout."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions, _commit()


def _commit() -> str | None:
    """Commit of the checkout this package runs from; None for an installed wheel."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        tracked = subprocess.run([*command[:3], "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if tracked.returncode == 0 and found.returncode == 0 else None


def processor() -> str:
    """The host's processor by the name Linux gives it; elsewhere its architecture."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def slug(text: str) -> str:
    """Lower-case letters and digits joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
