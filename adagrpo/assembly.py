"""From a checked recipe to the parts of a trainer: what each is told of the recipe, and nothing else."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .algorithm.sde import sigma_schedule
from .algorithm.tables import RolloutTable
from .curriculum.judge import Judge
from .curriculum.picks import Pick, PickedBy, Strategy, nearest_in_slots, nearest_of_all, picked_in_slots, picked_of_all
from .engine.batch_limit import BatchLimit
from .engine.course import Course
from .engine.executor import Backends, RolloutExecutor
from .engine.fusion import Fuse, Fusion
from .engine.graphs import StepGraphs
from .engine.optimizer import OptimizerSettings, PolicyOptimizer
from .engine.plans import Window
from .engine.ranks import Ranks
from .engine.sampling import ForkSampler, GroupShape, Sampler, StepSchedule, TrajectorySampler
from .engine.share import Share
from .engine.timing import PhaseTimer
from .engine.update import Objective
from .errors import InputError, RunError
from .forward.backends import build_forward
from .models.base import FlowModel
from .models.schedule import own_levels
from .recipe.derived import Derived
from .recipe.keys import JUDGES, Config, bucket_size
from .rewards import Reward, build_reward
from .rewards.placed import Entry, PlacedReward


def build_course(config: Config, ranks: Ranks) -> Course:
    """The numbers of the training."""
    m, train, equal = config.model, config.train, config.advantage.equal_groups
    return Course(
        share=dealt_slots(config, ranks),
        candidates=config.selection.candidates,
        seed=train.seed,
        size=(m.height, m.width),
        buckets=tuple(map(bucket_size, m.buckets)),
        max_rows=config.engine.max_rows,
        refill=equal == "refill",
        skip_equal=equal != "keep",
        pooled=config.selection.pooled,
    )


def dealt_slots(config: Config, ranks: Ranks) -> Share:
    """The slots of an iteration, dealt so that every rank has equally many in every micro-batch of every optimizer step.

    Raises:
        InputError: they cannot be, and the message says how they can; or the recipe's loss is not a sum over ranks.
    """
    if ranks.size > 1 and config.loss.ratio == "guard_batch":
        raise InputError(
            f"loss.ratio = guard_batch: pools over a micro-batch, which {ranks.size} ranks have no whole of; use guard"
        )
    train, total = config.train, Derived(config).slots
    parts = train.steps_per_iteration if train.update_by == "slots" else 1
    fits = lambda slots: slots % ranks.size == 0 and slots * train.accumulation % (parts * ranks.size) == 0  # noqa: E731
    if fits(train.slots):
        return Share.dealt(ranks, total, parts)
    wanted = next(slots for slots in itertools.count(train.slots) if fits(slots))
    by = f" in each of the {parts} optimizer steps" if parts > 1 else ""
    raise InputError(
        f"train.slots = {train.slots}: cannot be dealt to {ranks.size} ranks, equally many to each{by}; start it as "
        f"torchrun … -m adagrpo train {config.name} --train.slots {wanted}, or on another number of ranks"
    )


def build_judge(config: Config, select: Strategy | None = None, unseen: bool = False) -> Judge:
    """How candidates are judged: the class that ``selection.probe`` names, its fields filled by the keys of their names.

    Args:
        select: a user's strategy.
        unseen: while prompts are candidates for the first time. Memory knows nothing of them, so all are its finalists.
    """
    if unseen and Derived(config).looks_at_unseen:
        config = dataclasses.replace(
            config, selection=dataclasses.replace(config.selection, finalists=config.selection.candidates)
        )
    s, r, d = config.selection, config.rollout, Derived(config)
    pick: Pick = picked_of_all if s.pooled else picked_in_slots if select is None else PickedBy(select)
    given = {field.name: getattr(s, field.name) for field in dataclasses.fields(s)} | {
        "steps": r.steps,
        "forks": d.forks,
        "probe_rows": d.table.probe,
        "scored": d.scores_needed,
        "level_read": d.level_read,
        "strategy": d.built_in_strategy,
        "pick": pick,
        "nearest": nearest_of_all if s.pooled else nearest_in_slots,
    }
    module, _, name = JUDGES[s.judge].partition(":")
    judge = getattr(importlib.import_module(f"{__package__}.curriculum.{module}"), name)
    made: Judge = judge(**{field.name: given[field.name] for field in dataclasses.fields(judge)})
    return made


def build_sampler(config: Config, ranks: Ranks) -> Sampler:
    """How groups are drawn."""
    r, train = config.rollout, config.train
    first, end = Derived(config).window_range
    drawn = train.seed if r.window_order == "random" else None
    window = Window(r.window_size, first, end, r.window_every, r.window_stride, drawn) if r.plan == "window" else None
    drawn_by = (r.step_per_prompt, r.trained_of == "sample")
    schedule = StepSchedule(r.steps, r.sde_steps, window, Derived(config).trained_steps, train.seed, *drawn_by)
    shape = GroupShape(r.group_size, train.steps_per_iteration, max(1, train.slots // ranks.size), train.update_by)
    if r.plan == "fork":
        return ForkSampler(schedule, shape, r.fork_velocity == "fresh", r.seeds, Derived(config).tails_per_sample)
    return TrajectorySampler(schedule, shape, r.shared_noise)


def build_fusion(config: Config, weights: Tensor, impl: str | None, fuse: Fuse | None = None) -> Fusion:
    """How rewards become advantages; ``fuse`` is a user's function."""
    a, train, d = config.advantage, config.train, Derived(config)
    shuffle = train.seed if train.shuffle_advantages else None
    tails, seeds = d.tails_per_sample, config.rollout.seeds if a.groups == "prompt" else 1
    names = tuple(r.name if tails == 1 else f"{r.name}_tail{g}" for r in config.rewards for g in range(tails))
    options = (a.clip, a.weight, a.calibration, d.scale, impl, fuse, shuffle)
    return Fusion(names, weights.repeat_interleave(tails), *options, tails, seeds, d.trained_steps)


def load_reward(config: Config, number: int) -> Reward:
    """One of the rewards of a recipe, loaded; where others name its checkpoint and work alike, they hold it once.

    Raises:
        InputError: see ``build_reward``.
    """
    entry = config.rewards[number]
    return build_reward(entry.name, entry.kwargs, f"rewards.{number}", entry.dtype, (entry.device, entry.offload))


def place_reward(config: Config, number: int, reward: Reward) -> PlacedReward:
    """One of the rewards of a recipe, as its entry says."""
    keys = [field.name for field in dataclasses.fields(Entry) if field.name != "number"]
    return PlacedReward(reward, Entry(number=number, **{key: getattr(config.rewards[number], key) for key in keys}))


def place_rewards(config: Config, rewards: Sequence[Reward]) -> list[PlacedReward]:
    """The rewards of a recipe, one per entry, each as its entry says."""
    if len(rewards) != len(config.rewards):
        raise ValueError(f"{len(config.rewards)} entries of rewards, but {len(rewards)} rewards")
    return [place_reward(config, number, reward) for number, reward in enumerate(rewards)]


def require_groups(config: Config, rewards: Sequence[object]) -> None:
    """Refuse a groupwise reward (or the class of one) where images without a group must be scored by it.

    Raises:
        InputError: naming the reward and the keys.
    """
    groupwise = [bool(getattr(reward, "groupwise", False)) for reward in rewards]
    if not any(groupwise):
        return
    i = groupwise.index(True)
    named = f"rewards.{i} = {config.rewards[i].name}: compares the images of a group"
    if Derived(config).scores_needed:
        raise InputError(
            f"{named}, and candidates have none: set selection.candidates = 1 (or selection.strategy = random) and "
            "advantage.weight = 0"
        )
    if all(groupwise) and (config.evaluation.every or config.evaluation.final_prompts):
        raise InputError(
            f"{named}, and evaluations have none: add a reward that scores single images, or set evaluation.every and "
            "evaluation.final_prompts to 0"
        )


def build_objective(config: Config) -> Objective:
    """What the update minimises."""
    loss = config.loss
    return Objective(
        old_logp=loss.old_logp,
        clip_range=loss.clip_range or None,
        ratio=loss.ratio,
        kl_weight=loss.kl_weight,
        kl_space=loss.kl_space,
        kl_variance=loss.kl_variance,
        step_weighting=loss.step_weights,
        average=loss.average,
        skip_empty=config.advantage.equal_groups != "keep",
    )


def sampled_sizes(config: Config) -> list[tuple[int, int]]:
    """Height and width of every picture size of a recipe, that of evaluations first, each once."""
    m = config.model
    return list(dict.fromkeys([(m.height, m.width), *map(bucket_size, m.buckets)]))


def build_table(config: Config, model: FlowModel, size: tuple[int, int]) -> RolloutTable:
    """Every step of rollouts of this size, float64 on the CPU.

    Raises:
        InputError: the model does not say the noise levels that are to be its own.
    """
    d = Derived(config)
    return d.table_at(lambda steps: own_levels(model, steps, *size)) if config.rollout.shift == "model" else d.table


def own_noise_levels(config: Config, model: FlowModel) -> dict[str, Tensor]:
    """The levels of every size and number of steps that a recipe takes from its model; none where ``shift`` is a number.

    Raises:
        InputError: the model does not say them.
    """
    s, r = config.selection, config.rollout
    counts = (r.steps, *[s.probe_steps] * (s.judge == "short")) if r.shift == "model" else ()
    sizes = sampled_sizes(config)
    return {f"{h}x{w} in {steps} steps": own_levels(model, steps, h, w) for h, w in sizes for steps in counts}


def replaced_levels(config: Config, model: FlowModel) -> str | None:
    """What to tell a run whose ``rollout.shift`` is not that of the model's own pipeline."""
    shift, steps = config.rollout.shift, config.rollout.steps
    if shift == "model" or not callable(getattr(model, "schedule", None)):
        return None
    for size in sampled_sizes(config):
        try:
            own = own_levels(model, steps, *size)
        except (InputError, RunError):  # there is nothing to replace
            return None
        if not torch.allclose(own, sigma_schedule(steps, shift), rtol=0, atol=1e-5):
            level, even = float(own[1]), 1 - 1 / steps
            shifted = level * (1 - even) / (even * (1 - level)) if level < 1 else 1.0
            alike = torch.allclose(own, sigma_schedule(steps, shifted), rtol=0, atol=1e-5)
            what = f"those of shift {shifted:.5g}" if alike else "which no shift describes"
            sized = "x".join(map(str, size))
            return f'rollout.shift = {shift:g} replaces the model\'s own noise levels at {sized}, {what}; "model" takes them'
    return None


def build_executor(
    config: Config,
    model: FlowModel,
    phase: PhaseTimer | None = None,
    rollouts: bool = False,
    say: Callable[[str], None] = print,
) -> RolloutExecutor:
    """The executor of a recipe; ``rollouts`` also builds what the recipe's ``engine`` keys ask for to compute them.

    Raises:
        InputError: this machine cannot run what they ask for, or the model says no noise levels.
    """
    e, d = config.engine, Derived(config)
    sizes, impl = sampled_sizes(config), d.kernels
    table = build_table(config, model, sizes[0]).to(model.device, d.wide)  # one for all that reads it: it changes in place
    by_size = config.rollout.shift == "model" and len(sizes) > 1
    tables = {size: build_table(config, model, size) for size in sizes if by_size}
    forward, graphs = None, None
    if rollouts:
        forward = build_forward(model, table, e.forward, d.precision, e.fp8_scaling, e.attention, impl, say)
        graphs = StepGraphs(model.device, say) if e.cuda_graphs else None
    limit, backends = BatchLimit(e.max_rows, e.decode_rows), Backends(impl, forward, graphs)
    return RolloutExecutor(model, table, config.train.seed, d.storage, limit, phase, backends, tables)


def build_optimizer(config: Config, model: FlowModel, ranks: Ranks | None = None) -> PolicyOptimizer:
    """The optimizer of a recipe over the model's trainable parameters; ``ranks``: who else steps them."""
    o = config.optimizer
    settings = OptimizerSettings(
        lr=o.lr,
        betas=o.betas,
        eps=o.eps,
        weight_decay=o.weight_decay,
        max_grad_norm=o.max_grad_norm,
        total_steps=Derived(config).optimizer_steps,
        schedule=o.schedule,
        warmup=o.warmup_steps,
        final_share=o.final_share,
        ema_decay=o.ema_decay,
        ema_every=o.ema_every,
        ema_warmup=o.ema_warmup,
    )
    return PolicyOptimizer((p for _, p in model.trainable()), settings, ranks)
