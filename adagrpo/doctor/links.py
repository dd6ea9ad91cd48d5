"""What joins the GPUs of this machine to each other and to other machines, by name; how fast that is nobody measures here."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..profiling.power import gpu_uuid

SYSTEM = Path("/sys/class")
# What the nearest thing above both GPUs is, by NVML's numbers; nvidia-smi topo calls them so.
_ABOVE = {0: "one board", 10: "PIX, one PCIe switch", 20: "PXB, several PCIe switches", 30: "PHB, a host bridge"}
_ABOVE |= {40: "NODE, within a NUMA node", 50: "SYS, between NUMA nodes"}
_WARNED = {
    "NCCL_P2P_DISABLE": "GPUs of a node talk by way of the host",
    "NCCL_SHM_DISABLE": "without peer access, GPUs of a node talk by way of the network",
    "NCCL_IB_DISABLE": "nodes talk over sockets, not InfiniBand or RoCE",
    "NCCL_NET_GDR_DISABLE": "what goes to other nodes is copied to the host first",
    "TORCH_NCCL_BLOCKING_WAIT": "the host waits in every collective",
}
_PREFIXES = ("NCCL_", "TORCH_NCCL_", "TORCH_FR_", "GLOO_SOCKET_IFNAME")


def links(device: torch.device, system: Path = SYSTEM, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Lines about NCCL, peers, network devices and the variables that steer them; without CUDA only that nothing is told.

    Args:
        system: folder of the kernel's device classes.
        environment: variables of this process.
    """
    if device.type != "cuda":
        yield "not measured: no CUDA device"
        return
    yield f"NCCL {nccl_version()}"
    yield from peers(torch.cuda.device_count())
    yield from adapters(system / "infiniband")
    yield from interfaces(system / "net")
    yield from variables(environment)
    yield "bandwidth between GPUs and between machines: not measured"


def nccl_version() -> str:
    """Of the NCCL that torch was built with."""
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except AttributeError:
        return "is not in this build of torch: several GPUs cannot train"


def peers(count: int) -> Iterator[str]:
    """Which of ``count`` visible GPUs reach each other's memory, and by what."""
    pairs = list(itertools.combinations(range(count), 2))
    if not pairs:
        yield "one GPU: no peers"
        return
    refused = [pair for pair in pairs if not (_reaches(*pair) and _reaches(*reversed(pair)))]
    yield f"peer access: {_named(refused, pairs, 'not between', 'between no two')}" if refused else "peer access: between all"
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        yield "what joins GPUs: not known: nvidia-ml-py is not installed: pip install 'adagrpo[cuda]'"
        return
    try:
        nvml.nvmlInit()
        try:
            yield from _joined(nvml, count, pairs)
        finally:
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        yield f"what joins GPUs: not known: NVML: {error}"


def adapters(folder: Path) -> Iterator[str]:
    """Ports of the InfiniBand and RoCE adapters."""
    ports = sorted(folder.glob("*/ports/*")) if folder.is_dir() else []
    if not ports:
        yield "no InfiniBand or RoCE adapter: nodes would talk over sockets"
    for port in ports:
        kind = {"InfiniBand": "InfiniBand", "Ethernet": "RoCE"}.get(_word(port / "link_layer"), "unknown kind")
        state = _word(port / "state").partition(": ")[2] or "unknown state"
        yield f"{port.parent.parent.name} port {port.name}: {kind}, {state}, {_word(port / 'rate') or 'rate not told'}"


def interfaces(folder: Path) -> Iterator[str]:
    """Network interfaces that are not known to be down."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name != "lo" and _word(path / "operstate") not in ("down", "lowerlayerdown", "notpresent", ""):
            speed = _word(path / "speed")  # of a virtual one -1, or an error
            found.append(f"{path.name} ({int(speed) / 1000:g} Gb/s)" if speed.isdigit() else path.name)
    yield f"interfaces: {', '.join(found) or 'none'}"


def variables(environment: Mapping[str, str]) -> Iterator[str]:
    """The set ones that steer NCCL, with what some of them do."""
    for name in sorted(name for name in environment if name.startswith(_PREFIXES)):
        value = environment[name]
        switched = name in _WARNED and value not in ("", "0")
        said = f": {_WARNED[name]}" if switched else ""
        if name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING") and value == "0":
            said = ": a rank that waits in vain waits for ever"
        yield f"{name}={value}{said}"


def _reaches(one: int, other: int) -> bool:
    return bool(torch.cuda.can_device_access_peer(one, other))


def _joined(nvml: Any, count: int, pairs: Sequence[tuple[int, int]]) -> Iterator[str]:
    """By what each pair is joined, equal ones in one line."""
    handles = [nvml.nvmlDeviceGetHandleByUUID(gpu_uuid(torch.device("cuda", i))) for i in range(count)]
    kinds: dict[str, list[tuple[int, int]]] = {}
    for one, other in pairs:
        joined = nvml.nvmlDeviceGetP2PStatus(handles[one], handles[other], nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        if joined == nvml.NVML_P2P_STATUS_OK:
            kind = "NVLink"
        else:
            above = nvml.nvmlDeviceGetTopologyCommonAncestor(handles[one], handles[other])
            kind = f"PCIe ({_ABOVE.get(above, f'level {above}')})"
        kinds.setdefault(kind, []).append((one, other))
    for kind, some in kinds.items():
        yield f"{kind}: {_named(some, pairs, 'between', 'between all')}"
    if "NVLink" in kinds:
        yield "NVLink, links that are up: " + ", ".join(f"GPU {i}: {_links_up(nvml, h)}" for i, h in enumerate(handles))


def _links_up(nvml: Any, handle: Any) -> int:
    up = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        with contextlib.suppress(nvml.NVMLError):  # this GPU has fewer
            up += bool(nvml.nvmlDeviceGetNvLinkState(handle, link))
    return up


def _named(some: Sequence[tuple[int, int]], pairs: Sequence[tuple[int, int]], words: str, all_of_them: str) -> str:
    if len(some) == len(pairs):
        return all_of_them
    return f"{words} " + ", ".join(f"{one}-{other}" for one, other in some)


def _word(path: Path) -> str:
    """The content of one of the kernel's files; empty where it refuses."""
    try:
        return path.read_text("ascii", "replace").strip()
    except OSError:
        return ""
