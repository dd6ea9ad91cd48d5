"""From what a run will do to the memory it takes: every entry of the plan, from plain numbers and a rehearsal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..algorithm.tables import RolloutTable
from ..forward.backends import is_policy, make_copy
from ..models.base import FlowModel, guided
from ..models.registry import family_of
from .counting import module_tensors, tensor_bytes
from .memory import Entry, MemoryPlan, checkpoint_bytes, size_text, wide_bytes
from .rehearsal import Rehearsal

MEASURED = "run on meta tensors with fused attention"


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a run asks of memory, beside its model and rewards.

    Attributes:
        calls: rows of each transformer call by phase, and of each call of the decoder under ``decode``.
        stored: bytes of latents and transitions an iteration keeps.
        batch_prompts, evaluation_prompts: prompts encoded for an iteration, and for an evaluation.
        cached_prompts: prompt embeddings kept by the encoder.
        averages: a weight EMA is kept.
        kl: a copy of the initial weights is kept, unless adapters are trained that begin at zero.
        adapters_begin: adapters begin as a file, so that ``kl`` keeps a copy of them, here and in checkpoints.
        accumulates: an optimizer step has several micro-batches.
        rollout_copy: bytes of a copy of the weights made for sampling.
        prepared: bytes of what the calls of a rollout share.
        evaluation_guidance: of evaluation; 0 is the model's.
        overlapped: pictures of a chunk are decoded while the next one is sampled.
        checkpoints: kept on disk at most, the one being written included.
        summed: other ranks train too, and gradients are laid end to end to be summed over them.
    """

    calls: Mapping[str, Sequence[int]]
    stored: int
    batch_prompts: int
    evaluation_prompts: int = 0
    cached_prompts: int = 0
    averages: bool = False
    kl: bool = False
    adapters_begin: bool = False
    accumulates: bool = False
    rollout_copy: int = 0
    prepared: int = 0
    evaluation_guidance: float = 0.0
    overlapped: bool = False
    checkpoints: int = 1
    summed: bool = False

    def largest(self, *phases: str) -> int:
        """Rows of the largest call of ``phases``; 0 without any."""
        return max((rows for phase in phases for rows in self.calls.get(phase, ())), default=0)


@dataclasses.dataclass(frozen=True)
class _Trained:
    """Bytes of what is trained.

    Attributes:
        narrow, wide: as the weights are, and in fp32 at least.
        masters: of their fp32 twins; 0 where they are fp32 themselves.
        remedy: what makes them fewer.
    """

    narrow: int
    wide: int
    masters: int
    full: bool

    @classmethod
    def of(cls, model: FlowModel, trained: Sequence[Tensor]) -> _Trained:
        full = 2 * sum(p.numel() for p in trained) > sum(p.numel() for p in model.transformer.parameters())
        masters = sum(wide_bytes(p) for p in trained if p.element_size() < 4)
        return cls(tensor_bytes(trained), sum(wide_bytes(p) for p in trained), masters, full)

    @property
    def remedy(self) -> str:
        return "model.tuning = lora (in a new run)" if self.full else "model.lora_rank (in a new run)"


def plan_memory(model: FlowModel, rehearsal: Rehearsal | str, demand: Demand, scorers: Sequence[Entry] = ()) -> MemoryPlan:
    """The plan of a run of ``model``, which is loaded but not trained yet.

    Args:
        rehearsal: of the model, or why there is none.
        scorers: what rewards hold and use, see ``scorer_entries``.
    """
    parameters = [p for _, p in model.trainable()]
    trained = _Trained.of(model, parameters)
    kept = [*_weights(model), *_training_state(model, trained, demand)]
    kept += scorers
    kept.append(Entry("stored latents", demand.stored, "anchors, transitions and final latents of an iteration"))
    twice = trained.wide * bool(demand.accumulates and trained.masters)
    of = "of the weights as they multiply"
    backward = Entry("gradients", trained.narrow + twice, of, "update", 0, trained.remedy)
    step = Entry("gradients", trained.wide, "in fp32" if trained.masters else "", "optimizer", 0, trained.remedy)
    steps = [step, *[Entry("gradients end to end", trained.wide, "summed over ranks in one call", "optimizer")] * demand.summed]
    size = checkpoint_bytes(parameters, demand.averages, demand.kl and demand.adapters_begin)
    if isinstance(rehearsal, str):
        unknown = f"activations: not known for this model ({rehearsal})"
        return MemoryPlan((*kept, backward, *steps), size, demand.checkpoints, unknown)
    kept += [*_prompts(rehearsal, demand), *_sampling(rehearsal, demand)]
    update = [backward, _update(model, rehearsal, demand, trained), *steps]
    temporaries = max(0, rehearsal.step_peak(demand.averages) - trained.wide)
    last = Entry("temporaries", temporaries, "of AdamW, one parameter at a time", "optimizer", 0, trained.remedy)
    return MemoryPlan((*kept, *update, last), size, demand.checkpoints)


def _training_state(model: FlowModel, trained: _Trained, demand: Demand) -> list[Entry]:
    """What training holds beside the weights that were loaded."""
    copied = model.transformer.parameters() if trained.full else (p for _, p in model.trainable())
    reference = tensor_bytes(copied) if demand.kl and (trained.full or demand.adapters_begin) else 0
    averages, off = trained.wide * demand.averages, "optimizer.ema_decay = 0 (in a new run)"
    return [
        Entry("fp32 master weights", trained.masters, "what the optimizer steps", "", 0, trained.remedy),
        Entry("optimizer moments", 2 * trained.wide, "two per trained weight", "", 0, trained.remedy),
        Entry("weight EMA", averages, "optimizer.ema_decay", "", 0, off),
        Entry("KL reference", reference, "copy of the initial weights (loss.kl_weight)", "", 0, trained.remedy),
        Entry("rollout copy", demand.rollout_copy, "weights in the form sampling wants"),
    ]


def _prompts(rehearsal: Rehearsal, demand: Demand) -> list[Entry]:
    each = rehearsal.prompt_bytes
    cache = f"{demand.cached_prompts} of {size_text(each)}"
    batch = f"{demand.batch_prompts} candidates and the picked ones"
    return [
        Entry("prompt cache", demand.cached_prompts * each, cache, "", 0, "model.prompt_cache"),
        Entry("prompts of the batch", demand.batch_prompts * each, batch),
    ]


def _sampling(rehearsal: Rehearsal, demand: Demand) -> list[Entry]:
    """What sampling, evaluation and decoding hold while they run."""
    rows = demand.largest("probe", "prefix", "rollout", "recompute")
    found = rehearsal.forward_peak(rows)
    entries = [Entry("activations", found, f"{_rows(rehearsal, rows)}, {MEASURED}", "rollout", 0, "engine.max_rows")]
    if rows := demand.largest("evaluation"):
        with guided(rehearsal.model, demand.evaluation_guidance):
            found = rehearsal.forward_peak(rows) + demand.evaluation_prompts * rehearsal.prompt_bytes
            why = f"{_rows(rehearsal, rows)} and {demand.evaluation_prompts} prompts, {MEASURED}"
        entries.append(Entry("activations", found, why, "evaluation", 0, "engine.max_rows"))
    rows = demand.largest("decode")
    decoding = rehearsal.decode_peak(rows)
    entries.append(Entry("activations", decoding, f"{rows} pictures, {MEASURED}", "decode", 0, "engine.decode_rows"))
    if demand.prepared:
        why = "modulation of every step and embedded text"
        entries.append(Entry("prepared prompts", demand.prepared, why, "rollout"))
    if demand.overlapped:
        why = f"{rows} pictures of the chunk before (engine.overlap)"
        entries.append(Entry("decoding meanwhile", decoding, why, "rollout", 0, "engine.decode_rows"))
    return entries


def _update(model: FlowModel, rehearsal: Rehearsal, demand: Demand, trained: _Trained) -> Entry:
    """Activations of the replay and its backward pass."""
    rows = demand.largest("update")
    found = max(0, rehearsal.update_peak(rows) - trained.narrow) + (rehearsal.forward_peak(rows) if demand.kl else 0)
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.transformer.modules())
    remedy = "engine.max_rows" if checkpointed else "model.gradient_checkpointing = true"
    why = f"{_rows(rehearsal, rows)}{' recomputed block by block' if checkpointed else ''}, beside the gradients there by then"
    return Entry("activations", found, why, "update", 0, remedy)


def _rows(rehearsal: Rehearsal, rows: int) -> str:
    """Rows of a call; under classifier-free guidance these are images of several rows of the transformer."""
    each = rehearsal.rows_per_image
    return f"{rows} rows" if each == 1 else f"{rows} images of {each} rows"


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
    entries, device = [], model.device.type  # once: diffusers looks for it through all of its modules
    for name, module in {"transformer": model.transformer, **modules_of(model)}.items():
        tensors = [t for t in module_tensors(module) if id(t) not in seen]
        seen |= {id(t) for t in tensors}
        if tensors:
            billions = sum(t.numel() for t in tensors) / 1e9
            kinds = "/".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
            loaded = tensor_bytes(t for t in tensors if t.device.type == device != "meta")
            entries.append(Entry(name, tensor_bytes(tensors), f"{billions:.3g} B weights, {kinds}", "", loaded))
    return entries


@dataclasses.dataclass(frozen=True)
class Latents:
    """Latents that an iteration keeps.

    Attributes:
        elements: of one latent.
        storage, wide, velocity: dtypes of stored latents, of their means, of the model's velocities.
        anchors: trajectories kept at the fork steps. forks: how many these are.
        transitions, successors: stored steps, and the latents that follow them.
        samples: final latents.
    """

    elements: int
    storage: torch.dtype
    wide: torch.dtype
    velocity: torch.dtype
    anchors: int
    forks: int
    transitions: int
    successors: int
    samples: int

    @property
    def bytes(self) -> int:
        """Anchors with their velocities, transitions, final latents."""
        latent = self.storage.itemsize
        anchors = self.anchors * (latent + self.forks * (latent + self.velocity.itemsize))
        transitions = self.transitions * (latent + self.wide.itemsize) + self.successors * latent
        return (anchors + transitions + self.samples * latent) * self.elements


def copy_bytes(
    rehearsal: Rehearsal,
    table: RolloutTable,
    forward: str,
    precision: torch.dtype | str | None,
    scaling: str,
    prompts: int,
) -> tuple[int, int]:
    """Memory of a rollout copy beside the policy, and of what it prepares for ``prompts``; both read off a copy made on the
    meta device.

    Args:
        forward: not ``auto``. precision, scaling: as of ``forward.backends.make_copy``.
    """
    model = rehearsal.model
    if family_of(model) is None or is_policy(model, forward, precision):
        return 0, 0
    copy = make_copy(model, table.to(torch.device("meta"), torch.float32), forward, precision, scaling, impl="reference")
    with torch.no_grad():
        prepared = copy.prepare(rehearsal.conditioning(prompts)).tensors.values()
    return copy.own_bytes, tensor_bytes(prepared) if forward == "fused" else 0
