"""What a recipe will ask for before it runs: calls, memory, seconds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from .assembly import build_judge, build_objective, build_sampler, dealt_slots, sampled_sizes
from .engine.plans import chunk_sizes
from .engine.ranks import Ranks
from .engine.scoring import labels
from .engine.update import SUMS
from .estimate.calls import decoded, iteration_calls
from .estimate.memory import MemoryPlan, wide_bytes
from .estimate.nodes import Collective
from .estimate.planning import Demand, Latents, copy_bytes, plan_memory
from .estimate.rehearsal import Rehearsal
from .estimate.roofline import Device, Prediction, predict
from .estimate.scorers import ScorerDemand, scorer_entries
from .forward.backends import resolve_forward
from .models.base import FlowModel
from .recipe.derived import DTYPES, Derived
from .recipe.keys import Config
from .rewards import BUILT_IN


def dealt(config: Config, ranks: int) -> Config:
    """The recipe of one process that trains as much as each of ``ranks`` ranks does of this one.

    Raises:
        InputError: the slots cannot be dealt.
    """
    dealt_slots(config, Ranks(size=ranks))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, slots=config.train.slots // ranks))


def evaluated(config: Config, ranks: int = 1, known: int | None = None) -> tuple[int, int]:
    """Pictures that each of ``ranks`` ranks draws in the largest evaluation, and their prompts, of ``known`` ones."""
    e, o = config.evaluation, config.output
    most = lambda prompts: prompts if known is None else min(prompts, known)  # noqa: E731
    each, final, grid = (most(prompts) for prompts in (e.prompts, e.final_prompts, o.grid_prompts))
    pictures = max(each * e.noises * bool(e.every), final * e.final_noises, grid * bool(o.grid_every))
    rows = -(-pictures // ranks)
    return rows, min(max(each, final, grid), rows)


def planned_calls(config: Config, iteration: int | None = None, ranks: int = 1, unseen: bool = False) -> dict[str, list[int]]:
    """Rows of each batched call of an iteration by phase, see ``iteration_calls``; of ``ranks`` ranks those of each.

    Args:
        unseen: of an iteration whose candidates are new (``Candidates.unseen``).
    """
    config = dealt(config, ranks)
    e, d = config.engine, Derived(config)
    parts = (build_judge(config, unseen=unseen).legs(d.slots), build_sampler(config, Ranks()), build_objective(config))
    return iteration_calls(*parts, d.slots, d.table.tails, e.max_rows, e.decode_rows, iteration)


def planned_evaluations(config: Config, iteration: int | None = None, ranks: int = 1, unseen: bool = False) -> dict[str, int]:
    """Transformer image-forwards of one iteration by phase; arguments as of ``planned_calls``."""
    calls = planned_calls(config, iteration, ranks, unseen)
    return {phase: sum(rows) for phase, rows in calls.items() if phase != "decode"}


def planned_collectives(config: Config, model: FlowModel, ranks: int) -> list[Collective]:
    """What ``ranks`` ranks tell each other in an iteration that draws once, groups of equal rewards are not drawn again.

    Scores of candidates by each batch that is scored, rewards of all groups, the mean weight of steps, gradients of each
    optimizer step in the dtype that it steps, and metrics; not what pooled picks, which other ranks may have sampled, were
    sampled from.
    """
    d, number, rewards = Derived(config), torch.float64.itemsize, len(config.rewards)
    legs = build_judge(config).legs(d.slots)
    scored = [rows for leg in legs[:1] + legs[1:][-1:] for rows in leg.scored]
    for leg in legs[1:-1]:  # later heats of a race: racers, and the uniformly drawn beside them
        scored += [leg.scored[0] - d.slots, d.slots]
    counted = (1 if config.loss.average == "iteration" else config.train.steps_per_iteration) * number
    gathered = [Collective("scores", "all-gather", rewards * rows * number) for rows in scored]
    gathered.append(
        Collective("rewards", "all-gather", rewards * d.groups * config.rollout.group_size * d.tails_per_sample * number)
    )
    gradients = sum(wide_bytes(p) for _, p in model.trainable())
    weighted = config.loss.step_weights != "uniform"
    return [
        *gathered,
        *[Collective("weights", "all-reduce", d.wide.itemsize)] * weighted,
        *[Collective("groups", "all-reduce", counted)] * (config.advantage.equal_groups != "keep"),
        Collective("gradients", "all-reduce", gradients, config.train.steps_per_iteration),
        Collective("metrics", "all-gather", ranks * len(SUMS) * number),
        Collective("failures", "all-reduce", rewards * number),
        Collective("agreements", "all-reduce", number, len(gathered) + 1, host=True),
    ]


def planned_memory(
    config: Config,
    model: FlowModel,
    rehearsal: Rehearsal | str,
    rewards: Sequence[object] | None = None,
    prompts: int | None = None,
    held_out: int | None = None,
    ranks: int = 1,
) -> MemoryPlan:
    """The memory plan of a recipe.

    Args:
        rewards: one per entry of ``config.rewards``; None takes what is published of them.
        prompts, held_out: how many there are, if it is known.
        ranks: that train; the plan is of each.
    """
    config = dealt(config, ranks)
    e, o, d, limit = config.evaluation, config.output, Derived(config), config.engine.max_rows
    known = held_out if held_out is not None else max(e.prompts, e.final_prompts, o.grid_prompts)
    rows, shown = evaluated(config, ranks, held_out)
    calls = planned_calls(config, unseen=True)
    calls["evaluation"] = chunk_sizes(rows, limit)[:1]
    calls["decode"] += decoded(calls["evaluation"], limit, config.engine.decode_rows)
    capacity = getattr(getattr(model, "encoder", None), "capacity", 0)
    copied, prepared = 0, 0
    if not isinstance(rehearsal, str):
        forward = resolve_forward(config.engine.forward, model, planned=True)
        copied, prepared = copy_bytes(rehearsal, d.table, forward, d.precision, config.engine.fp8_scaling, d.candidates)
    demand = Demand(
        calls,
        stored=stored_latents(config, model).bytes,
        batch_prompts=d.candidates + d.slots,
        evaluation_prompts=shown,
        cached_prompts=min(capacity, capacity if prompts is None else prompts + known),
        averages=config.optimizer.ema_decay > 0,
        kl=d.initial_model_read,
        adapters_begin=bool(config.model.lora_from),
        accumulates=len(calls["update"]) > config.train.steps_per_iteration,
        rollout_copy=copied,
        prepared=prepared,
        evaluation_guidance=e.guidance,
        overlapped=0 < limit < max(d.candidates, d.slots * d.samples_per_slot)
        and config.engine.overlap
        and model.device.type != "cpu",
        checkpoints=d.checkpoints_kept + 1,
        summed=ranks > 1,
    )
    size = max(sampled_sizes(config), key=math.prod)
    chunk = demand.largest("decode")
    scorers = scorer_entries(_scorers(config, rewards, chunk), model.device, chunk, size, demand.overlapped)
    return plan_memory(model, rehearsal, demand, scorers)


def _scorers(config: Config, rewards: Sequence[object] | None, chunk: int) -> list[ScorerDemand]:
    """The rewards, or what is published of their sizes."""
    if rewards is None:
        rewards = [published_bytes(reward.name, reward.kwargs, reward.dtype) for reward in config.rewards]
    named = zip(labels([r.name for r in config.rewards]), config.rewards, rewards, strict=True)
    return [ScorerDemand(label, reward, r.device, min(r.rows or chunk, chunk), r.offload) for label, r, reward in named]


def stored_latents(config: Config, model: FlowModel) -> Latents:
    """What an iteration keeps."""
    d = Derived(config)
    on_grid = [leg.rows for leg in build_judge(config, unseen=True).legs(d.slots) if leg.steps[-1] < config.rollout.steps]
    length, channels = model.latent_shape
    samples = d.groups * config.rollout.group_size
    picked = config.rollout.step_per_prompt or config.rollout.trained_of == "sample"  # a sample's own, once all are stored
    transitions = samples * d.stochastic_steps if picked else d.transitions
    return Latents(
        elements=length * channels,
        storage=d.storage,
        wide=d.wide,
        velocity=model.dtype,
        anchors=max(on_grid) + d.slots * (config.rollout.seeds - 1) if d.forks else 0,
        forks=len(d.forks),
        transitions=transitions,
        successors=samples if d.forks else transitions,
        samples=samples * d.tails_per_sample,
    )


def iteration_prediction(config: Config, rehearsal: Rehearsal, device: Device, ranks: int = 1) -> Prediction:
    """Predicted seconds that each of ``ranks`` ranks computes in an iteration; with forks, FP8 would serve probes and tails."""
    fp8 = ("probe", "rollout") if config.rollout.plan == "fork" else ("probe",)
    steps, averages = config.train.steps_per_iteration, config.optimizer.ema_decay > 0
    return predict(rehearsal, planned_calls(config, ranks=ranks), device, steps, fp8, averages)


_OTHER_WEIGHTS = {"path", "tower", "clip", "variant"}  # arguments of rewards that name another checkpoint


def published_bytes(name: str, kwargs: Mapping[str, object], dtype: str = "fp32") -> int | None:
    """Size of a built-in reward with its default checkpoint; None if it is not known."""
    parameters = BUILT_IN[name].parameters if name in BUILT_IN and not kwargs.keys() & _OTHER_WEIGHTS else None
    if parameters is None:
        return None
    return parameters * DTYPES[str(kwargs.get("dtype", dtype))].itemsize
