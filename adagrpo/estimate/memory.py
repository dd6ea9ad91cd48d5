"""The memory plan of a run: what will be held and when, worked out before anything is trained, and compared afterwards."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.base import FlowModel
from .counting import module_tensors, tensor_bytes
from .rehearsal import Rehearsal

NOT_COUNTED = "not in it: workspaces of libraries, the allocator's rounding and fragmentation, the CUDA context"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing that takes memory.

    Attributes:
        why: where the figure comes from, in a line.
        phase: when it is held; empty is always.
        loaded: bytes of it that lay on the device already when the plan was made.
        remedy: the key of the recipe that makes it smaller.
    """

    name: str
    bytes: int
    why: str
    phase: str = ""
    loaded: int = 0
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What a run holds; phases do not overlap.

    Attributes:
        checkpoint, checkpoints: bytes of one checkpoint, and how many lie on disk at most (one is being written).
        unknown: what could not be measured; empty if everything was.
    """

    entries: tuple[Entry, ...]
    checkpoint: int
    checkpoints: int
    unknown: str = ""

    @property
    def resident(self) -> int:
        """Bytes held in every phase."""
        return sum(entry.bytes for entry in self.entries if not entry.phase)

    @property
    def phases(self) -> dict[str, int]:
        """Bytes each phase adds to the resident ones."""
        found: dict[str, int] = {}
        for entry in self.entries:
            if entry.phase:
                found[entry.phase] = found.get(entry.phase, 0) + entry.bytes
        return found

    @property
    def peak_phase(self) -> str:
        """The phase that needs most; empty without any."""
        phases = self.phases
        return max(phases, key=phases.__getitem__) if phases else ""

    @property
    def peak(self) -> int:
        """Bytes held at most."""
        return self.resident + max(self.phases.values(), default=0)

    @property
    def loaded(self) -> int:
        """Bytes that lay on the device when the plan was made."""
        return sum(entry.loaded for entry in self.entries)

    def table(self) -> str:
        """A readable page; what takes nothing is left out, rewards excepted."""
        unit, divisor = ("GiB", 2**30) if self.peak >= 2**30 else ("MiB", 2**20)
        entries = sorted((e for e in self.entries if e.bytes or e.name.startswith("reward")), key=lambda e: bool(e.phase))
        width = max(len(e.name) for e in entries)
        number = lambda size: f"{size / divisor:9.2f}"  # noqa: E731
        line = lambda when, what, size, why: f"{when:13} {what:{width}} {number(size)}  {why}".rstrip()  # noqa: E731
        lines, shown = [f"{'when':13} {'what':{width}} {unit:>9}"], ""
        for entry in entries:
            when = entry.phase or "always"
            lines.append(line("" if when == shown else when, entry.name, entry.bytes, entry.why))
            shown = when
        disk = f"{self.checkpoints} checkpoints of {size_text(self.checkpoint)}, the one being written included"
        lines += ["", line("always", "", self.resident, "")]
        lines += [line(f"+ {phase}", "", size, "") for phase, size in self.phases.items()]
        lines.append(line("peak", "", self.peak, f"in phase {self.peak_phase}" if self.peak_phase else ""))
        lines.append(line("disk", "", self.checkpoint * self.checkpoints, disk))
        return "\n".join([*lines, *([self.unknown] if self.unknown else []), NOT_COUNTED])

    def summary(self) -> str:
        """The plan in a line."""
        phase = f" + {size_text(self.peak - self.resident)} in phase {self.peak_phase}" if self.peak_phase else ""
        disk = f"{size_text(self.checkpoint * self.checkpoints)} of checkpoints"
        unknown = f"; {self.unknown}" if self.unknown else ""
        return f"memory plan: {size_text(self.resident)}{phase} = {size_text(self.peak)}; {disk}{unknown}"

    def check(self, free_device: int | None, free_disk: int | None = None, device: str = "the device") -> None:
        """Refuse a run that cannot fit; None is not checked.

        Args:
            free_device: bytes free beside what is ``loaded``.
            free_disk: bytes free for all checkpoints.

        Raises:
            InputError: naming what is too large, by how much, and the keys that help.
        """
        needed = self.peak - self.loaded
        if free_device is not None and needed > free_device:
            missing = needed - free_device
            held = [e for e in self.entries if e.phase in ("", self.peak_phase) and e.bytes > e.loaded]
            held.sort(key=lambda e: e.loaded - e.bytes)
            parts = ", ".join(f"{e.name} {size_text(e.bytes)}" for e in held[:4])
            remedies = dict.fromkeys(e.remedy for e in held if e.remedy and 20 * e.bytes >= missing)
            help_ = ", ".join(remedies) or "a device with more memory"
            phase = f" in phase {self.peak_phase}" if self.peak_phase else ""
            raise InputError(
                f"memory: this run needs {size_text(needed)} more{phase}, {device} has {size_text(free_device)} free: "
                f"{size_text(missing)} too little ({parts}); what helps: {help_}"
            )
        disk = self.checkpoint * self.checkpoints
        if free_disk is not None and disk > free_disk:
            raise InputError(
                f"disk: {self.checkpoints} checkpoints of {size_text(self.checkpoint)} need {size_text(disk)}, "
                f"{size_text(free_disk)} are free: {size_text(disk - free_disk)} too little; what helps: output.keep_last"
            )

    def compare(self, peak: int) -> str:
        """The plan beside the ``peak`` bytes a run took."""
        return f"planned {size_text(self.peak)}, peak {size_text(peak)} ({(peak / max(self.peak, 1) - 1) * 100:+.0f} %)"

    def as_dict(self) -> dict[str, Any]:
        """For ``memory.json``."""
        totals = {"resident_bytes": self.resident, "peak_bytes": self.peak, "peak_phase": self.peak_phase}
        entries = [{k: v for k, v in dataclasses.asdict(e).items() if v != ""} for e in self.entries]
        disk = {"checkpoint_bytes": self.checkpoint, "checkpoints": self.checkpoints}
        return {**totals, **disk, "unknown": self.unknown, "not_counted": NOT_COUNTED, "entries": entries}


def plan_memory(
    model: FlowModel,
    rehearsal: Rehearsal | str,
    calls: Mapping[str, Sequence[int]],
    *,
    stored: int,
    batch_prompts: int,
    cached_prompts: int = 0,
    evaluation_prompts: int = 0,
    rewards: Mapping[str, object] | None = None,
    averages: bool = False,
    kl: bool = False,
    accumulates: bool = False,
    rollout_copy: int = 0,
    prepared: int = 0,
    overlapped: bool = False,
    checkpoints: int = 1,
) -> MemoryPlan:
    """The plan of a run of ``model``, which is loaded but not trained yet.

    Args:
        rehearsal: of the model, or why there is none.
        calls: rows of each transformer call by phase, and of each call of the decoder under ``decode``.
        stored: bytes of latents and transitions an iteration keeps.
        batch_prompts, evaluation_prompts: prompts encoded for an iteration, and for an evaluation.
        cached_prompts: prompt embeddings kept by the encoder.
        rewards: by name; instead of one that is not loaded the bytes of its weights, or None if they are not known.
        averages: a weight EMA is kept.
        kl: a copy of the initial weights is kept, unless adapters are trained.
        accumulates: an optimizer step has several micro-batches.
        rollout_copy: bytes of a copy of the weights made for sampling.
        prepared: bytes of what the calls of a rollout share.
        overlapped: pictures of a chunk are decoded while the next one is sampled.
        checkpoints: kept on disk at most, the one being written included.
    """
    trained = [p for _, p in model.trainable()]
    narrow, wide = tensor_bytes(trained), sum(_wide(p) for p in trained)
    has_masters = any(p.element_size() < 4 for p in trained)
    full = 2 * sum(p.numel() for p in trained) > sum(p.numel() for p in model.transformer.parameters())
    lighter = "model.tuning = lora (in a new run)" if full else "model.lora_rank (in a new run)"
    entries = _weights(model)
    masters = sum(_wide(p) for p in trained if p.element_size() < 4)
    entries += [
        Entry("fp32 master weights", masters, "what the optimizer steps", "", 0, lighter),
        Entry("optimizer moments", 2 * wide, "two per trained weight", "", 0, lighter),
        Entry("weight EMA", wide * averages, "optimizer.ema_decay", "", 0, "optimizer.ema_decay = 0 (in a new run)"),
    ]
    reference = tensor_bytes(model.transformer.parameters()) if kl and full else 0
    entries.append(Entry("KL reference", reference, "copy of the initial weights (loss.kl_weight)", "", 0, lighter))
    entries.append(Entry("rollout copy", rollout_copy, "weights in the form sampling wants"))
    entries += [_reward(name, reward, model.device) for name, reward in (rewards or {}).items()]
    entries.append(Entry("stored latents", stored, "anchors, transitions and final latents of an iteration"))
    size = checkpoint_bytes(trained, averages)
    step = Entry("gradients", wide, "in fp32" if has_masters else "", "optimizer", 0, lighter)
    backward = Entry(
        "gradients", narrow + wide * (accumulates and has_masters), "of the weights as they multiply", "update", 0, lighter
    )
    if isinstance(rehearsal, str):
        unknown = f"activations: not known for this model ({rehearsal})"
        return MemoryPlan((*entries, backward, step), size, checkpoints, unknown)
    each = rehearsal.prompt_bytes
    cache, batch = f"{cached_prompts} of {size_text(each)}", f"{batch_prompts} candidates and the picked ones"
    entries.append(Entry("prompt cache", cached_prompts * each, cache, "", 0, "model.prompt_cache"))
    entries.append(Entry("prompts of the batch", batch_prompts * each, batch))
    measured = "run on meta tensors with fused attention"
    rows = _largest(calls, ("probe", "prefix", "rollout", "recompute"))
    entries.append(
        Entry("activations", rehearsal.forward_peak(rows), f"{rows} rows, {measured}", "rollout", 0, "engine.max_rows")
    )
    if rows := _largest(calls, ("evaluation",)):
        found = rehearsal.forward_peak(rows) + evaluation_prompts * each
        why = f"{rows} rows and {evaluation_prompts} prompts, {measured}"
        entries.append(Entry("activations", found, why, "evaluation", 0, "engine.max_rows"))
    rows = _largest(calls, ("decode",))
    entries.append(
        Entry("activations", rehearsal.decode_peak(rows), f"{rows} pictures, {measured}", "decode", 0, "engine.decode_rows")
    )
    if prepared:
        entries.append(Entry("prepared prompts", prepared, "modulation of every step and embedded text", "rollout"))
    if overlapped:
        why = f"{rows} pictures of the chunk before (engine.overlap)"
        entries.append(Entry("decoding meanwhile", rehearsal.decode_peak(rows), why, "rollout", 0, "engine.decode_rows"))
    rows = _largest(calls, ("update",))
    found = max(0, rehearsal.update_peak(rows) - narrow) + (rehearsal.forward_peak(rows) if kl else 0)
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.transformer.modules())
    remedy = "engine.max_rows" if checkpointed else "model.gradient_checkpointing = true"
    why = f"{rows} rows{' recomputed block by block' if checkpointed else ''}, beside the gradients there by then"
    entries += [backward, Entry("activations", found, why, "update", 0, remedy), step]
    temporaries = max(0, rehearsal.step_peak(averages) - wide)
    entries.append(Entry("temporaries", temporaries, "of AdamW, one parameter at a time", "optimizer", 0, lighter))
    return MemoryPlan(tuple(entries), size, checkpoints)


def checkpoint_bytes(trained: Iterable[Tensor], averages: bool) -> int:
    """Size of one checkpoint: the portable weights, masters, two moments, weight EMA."""
    return sum(p.numel() * p.element_size() + _wide(p) * (4 if averages else 3) for p in trained)


def free_bytes(device: torch.device) -> int | None:
    """Bytes a run may still take on ``device``; on a CPU what the system calls available. None where nothing can be known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):  # free pages and what the page cache can give back
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


class PeakMeter:
    """The most memory a run took: torch's own peak on CUDA; on a CPU that of the whole process, libraries included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._cuda_peak, self._start = device, 0, resident_set()

    def observe(self) -> None:
        """Read CUDA's peak, before somebody resets it."""
        if self.device.type == "cuda":
            self._cuda_peak = max(self._cuda_peak, torch.cuda.max_memory_allocated(self.device))

    def report(self, plan: MemoryPlan) -> tuple[dict[str, int], str]:
        """Bytes for ``memory.json``, and a line for people."""
        if self.device.type == "cuda":
            self.observe()
            return {"peak_bytes": self._cuda_peak}, plan.compare(self._cuda_peak)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        grown = max(0, peak - self._start)
        line = f"planned {size_text(plan.peak)} of tensors; the process peaked at {size_text(peak)}, {size_text(grown)} above"
        line += " what it held before training (Python and libraries included)"
        return {"process_peak_bytes": peak, "process_growth_bytes": grown}, line


def size_text(size: float) -> str:
    """Bytes for people, in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


def modules_of(owner: object) -> dict[str, nn.Module]:
    """Modules among the attributes of ``owner``, those of a diffusers pipeline included, each once."""
    found: dict[str, nn.Module] = {}
    for name, value in [*getattr(owner, "__dict__", {}).items()]:
        parts = getattr(value, "components", None)
        inside = dict(parts) if isinstance(parts, Mapping) else {name: value}
        for key, part in inside.items():
            if isinstance(part, nn.Module) and not any(part is known for known in found.values()):
                found[key] = part
    return found


def _weights(model: FlowModel) -> list[Entry]:
    seen: set[int] = set()
    entries = []
    for name, module in {"transformer": model.transformer, **modules_of(model)}.items():
        tensors = [t for t in module_tensors(module) if id(t) not in seen]
        seen |= {id(t) for t in tensors}
        if tensors:
            billions = sum(t.numel() for t in tensors) / 1e9
            kinds = "/".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
            loaded = tensor_bytes(t for t in tensors if t.device.type == model.device.type != "meta")
            entries.append(Entry(name, tensor_bytes(tensors), f"{billions:.3g} B weights, {kinds}", "", loaded))
    return entries


def _reward(name: str, reward: object, device: torch.device) -> Entry:
    if isinstance(reward, int):
        return Entry(
            f"reward {name}", reward, "its published size; not loaded here" if reward else "not loaded here: size not known"
        )
    modules = [reward] if isinstance(reward, nn.Module) else modules_of(reward).values()
    tensors = [t for module in modules for t in module_tensors(module)]
    loaded = tensor_bytes(t for t in tensors if t.device.type == device.type)
    return Entry(f"reward {name}", tensor_bytes(tensors), "weights" if tensors else "no weights", "", loaded)


def _wide(p: Tensor) -> int:
    return p.numel() * max(p.element_size(), 4)


def _largest(calls: Mapping[str, Sequence[int]], phases: Sequence[str]) -> int:
    return max((rows for phase in phases for rows in calls.get(phase, ())), default=0)


def resident_set() -> int:
    """Bytes of this process in memory now; where that cannot be read, its peak so far."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
