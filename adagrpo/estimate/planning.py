"""What a recipe will ask for before it runs: calls, memory, seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..curriculum.cheap import race_stages
from ..engine.plans import branch_plan, chunk_sizes, probe_plan, trajectory_plan, update_batches
from ..errors import InputError
from ..forward.backends import is_policy, make_copy
from ..models.base import FlowModel
from ..models.registry import family_of
from ..recipe.derived import DTYPES, Derived
from ..recipe.keys import Config
from .counting import tensor_bytes
from .memory import MemoryPlan, plan_memory
from .rehearsal import NotRehearsable, Rehearsal
from .roofline import Device, Prediction, predict

# Parameters of the built-in rewards' default checkpoints, for plans that do not load them.
PUBLISHED_PARAMETERS = {"clip": 427_616_513, "pickscore": 986_109_441, "tiny": 0, "brightness": 0}


def planned_calls(config: Config) -> dict[str, list[int]]:
    """Rows of each batched call of one iteration by phase, from the plans alone: of the transformer, and of ``decode``."""
    r, train, limit, d = config.rollout, config.train, config.engine.max_rows, Derived(config)
    slots, candidates, fork, scored = d.slots, d.candidates, r.plan == "fork", d.scores_needed
    calls: dict[str, list[int]] = {}
    judged = [candidates] * scored
    if config.selection.judge != "full":
        calls["probe"], judged = cheap_probe_calls(config)
    elif fork or scored:
        calls["probe"] = probe_plan(range(candidates), r.steps).calls(limit)
    samples = 1 if fork else r.group_size
    batches = update_batches(slots, samples, d.trained_steps, train.steps_per_iteration, train.slots, limit)
    update = [batch.numel() for step in batches for batch in step]
    if fork and r.fork_velocity == "fresh":
        calls["prefix"] = update
    branches = branch_plan(slots, r.sde_steps, r.group_size, r.steps, tails=d.table.tails)
    plan = branches if fork else trajectory_plan(slots, r.group_size, r.steps, (), ())
    calls["rollout"] = plan.calls(limit)
    scored_rows = [n for rows in (*judged, plan.num_rows) for n in chunk_sizes(rows, limit)]
    calls["decode"] = [n for rows in scored_rows for n in chunk_sizes(rows, config.engine.decode_rows)]
    if config.loss.old_logp == "recompute":
        calls["recompute"] = update
    calls["update"] = update
    if config.loss.kl_weight:
        calls["reference"] = update
    return calls


def cheap_probe_calls(config: Config) -> tuple[list[int], list[int]]:
    """Rows of each batched transformer call of a probe that does not finish every candidate, and of what it scores."""
    s, r, slots = config.selection, config.rollout, Derived(config).slots
    parts: list[tuple[int, int]] = []  # rows, steps
    scored: list[int] = []
    fork, first = r.plan == "fork", 0
    finished = slots * (1 + s.finalists * (fork or s.finalists > 1))
    if s.judge == "short":
        parts, scored = [(slots * s.candidates, s.probe_steps)], [slots * s.candidates]
    elif s.judge == "racing":
        for number, stage in enumerate(race_stages(s.candidates, s.race_steps)):
            rows = slots * (stage.per_slot + (number > 0))
            parts.append((rows, stage.last - stage.first))
            scored.append(rows)
        first = s.race_steps[-1]
    elif s.finalists > 1:
        scored = [slots * s.finalists]
    parts.append((finished, r.steps - first))
    limit = config.engine.max_rows
    return [n for rows, steps in parts for n in probe_plan(range(rows), steps).calls(limit)], [*scored, slots]


def planned_evaluations(config: Config) -> dict[str, int]:
    """Transformer image-forwards of one iteration by phase."""
    return {phase: sum(rows) for phase, rows in planned_calls(config).items() if phase != "decode"}


def memory_notice(config: Config, prompts: int) -> str | None:
    """What to tell a run whose probe remembers but will hardly see a prompt twice."""
    s, observed = config.selection, Derived(config).observed
    if s.judge != "memory" or observed >= 2 * prompts:
        return None
    return (
        f"selection.probe = {s.probe} will observe {observed} rewards of {prompts} prompts, fewer than 2 of each, and so pick "
        f"almost blindly: shorten data.prompts to {max(1, observed // 2)}, train longer, or use selection.probe = full"
    )


def require_memory(config: Config, prompts: int) -> None:
    """Refuse a probe that remembers for prompts that hardly repeat, unless it looks at finalists or the recipe accepts it:
    where such prompts cannot be learnt it does as much harm as blind picks.

    Raises:
        InputError: with the remedies.
    """
    if config.selection.finalists >= 2 or config.selection.allow_unseen:
        return
    if notice := memory_notice(config, prompts):
        raise InputError(f"{notice}, selection.finalists = 2 (a look at two of them), or selection.allow_unseen = true")


def rehearse(model: FlowModel, prompt: str) -> Rehearsal | str:
    """The model's rehearsal, or why there is none."""
    try:
        return Rehearsal(model, prompt)
    except NotRehearsable as error:
        return str(error)


def memory_plan(
    config: Config,
    model: FlowModel,
    rehearsal: Rehearsal | str,
    rewards: Sequence[object] | None = None,
    prompts: int | None = None,
    held_out: int | None = None,
) -> MemoryPlan:
    """The memory plan of a recipe.

    Args:
        rewards: one per entry of ``config.rewards``; None takes what is published of them.
        prompts, held_out: how many there are, if it is known.
    """
    e, o, d = config.evaluation, config.output, Derived(config)
    known = held_out if held_out is not None else max(e.prompts, e.final_prompts, o.grid_prompts)
    held = {
        name: min(count, known) for name, count in (("each", e.prompts), ("final", e.final_prompts), ("grid", o.grid_prompts))
    }
    rows = max(held["each"] * e.noises * bool(e.every), held["final"] * e.final_noises, held["grid"] * bool(o.grid_every))
    calls = planned_calls(config)
    calls["evaluation"] = chunk_sizes(rows, config.engine.max_rows)[:1]
    calls["decode"] += [n for batch in calls["evaluation"] for n in chunk_sizes(batch, config.engine.decode_rows)]
    capacity = getattr(getattr(model, "encoder", None), "capacity", 0)
    everything = capacity if prompts is None else prompts + known
    copied, prepared = 0, 0
    if not isinstance(rehearsal, str):
        copied, prepared = copy_bytes(config, rehearsal, model.device.type, d.candidates)
    chunked = config.engine.max_rows and max(d.candidates, d.slots * d.samples_per_slot) > config.engine.max_rows
    loaded: dict[str, object] = {}
    for i, reward in enumerate(config.rewards):
        loaded[reward.name] = published_bytes(reward.name, reward.kwargs) if rewards is None else rewards[i]
    return plan_memory(
        model,
        rehearsal,
        calls,
        stored=stored_bytes(config, model),
        batch_prompts=d.candidates + d.slots,
        cached_prompts=min(capacity, everything),
        evaluation_prompts=max(held.values()) if rows else 0,
        rewards=loaded,
        averages=config.optimizer.ema_decay > 0,
        kl=config.loss.kl_weight > 0,
        accumulates=len(calls["update"]) > config.train.steps_per_iteration,
        checkpoints=d.checkpoints_kept + 1,
        rollout_copy=copied,
        prepared=prepared,
        overlapped=bool(chunked) and config.engine.overlap and model.device.type != "cpu",
    )


def copy_bytes(config: Config, rehearsal: Rehearsal, device: str, prompts: int) -> tuple[int, int]:
    """Memory of the recipe's rollout copy beside the policy, and of what it prepares for ``prompts``; both read off a copy
    made on the meta device."""
    e, model = config.engine, rehearsal.model
    forward = e.forward if e.forward != "auto" else "eager" if device == "cpu" else "compile"
    precision = Derived(config).precision
    if family_of(model) is None or is_policy(model, forward, precision):
        return 0, 0
    table = Derived(config).table.to(torch.device("meta"), torch.float32)
    copy = make_copy(model, table, forward, precision, e.fp8_scaling, impl="reference")
    with torch.no_grad():
        prepared = copy.prepare(rehearsal.conditioning(prompts)).tensors.values()
    return copy.own_bytes, tensor_bytes(prepared) if forward == "fused" else 0


def iteration_prediction(config: Config, rehearsal: Rehearsal, device: Device) -> Prediction:
    """Predicted seconds of one iteration of a recipe; with forks, FP8 would serve probes and tails."""
    fp8 = ("probe", "rollout") if config.rollout.plan == "fork" else ("probe",)
    steps, averages = config.train.steps_per_iteration, config.optimizer.ema_decay > 0
    return predict(rehearsal, planned_calls(config), device, steps, fp8, averages)


def stored_bytes(config: Config, model: FlowModel) -> int:
    """Latents an iteration keeps: anchors with their velocities, transitions, final latents."""
    s, d = config.selection, Derived(config)
    length, channels = model.latent_shape
    latent, wide, rows = d.storage.itemsize, d.wide.itemsize, d.groups * config.rollout.group_size
    anchored = d.slots * {"short": 2, "memory": s.finalists + 1}.get(s.judge, s.candidates) if d.forks else 0
    anchors = anchored * (latent + len(d.forks) * (latent + model.dtype.itemsize))
    successors = rows if d.forks else d.transitions
    return (anchors + d.transitions * (latent + wide) + (successors + rows) * latent) * length * channels


def published_bytes(name: str, kwargs: Mapping[str, object]) -> int | None:
    """Size of a built-in reward with its default checkpoint; None if it is not known."""
    if "path" in kwargs or name not in PUBLISHED_PARAMETERS:
        return None
    return PUBLISHED_PARAMETERS[name] * DTYPES[str(kwargs.get("dtype", "fp32"))].itemsize
