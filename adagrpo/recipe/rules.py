"""What a recipe may hold: values within their ranges that work together, and no key that nothing reads.

Every key acts or is an error. ``check`` refuses before any long work starts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from ..algorithm.selection import STRATEGIES
from ..errors import InputError
from ..models.registry import FAMILIES
from ..parts.plugins import is_import_path
from ..text.redaction import redacted_kwargs
from ..text.refusals import FP8_ATTENTION, TENSORWISE_FUSED
from ..text.user_text import cut, nearest, shown
from .derived import Derived
from .dotted import lookup
from .keys import BUILT_IN_MODELS, RIVALS, Config
from .ranges import LONGEST_TIMEOUT, check_ranges
from .unread import check_unread
from .values import Problem, check_values


def check(config: Config, where: Callable[[str], str] = lambda key: "") -> None:
    """Refuse values that are out of range or cannot work together.

    Args:
        where: what a message adds about the origin of a key.

    Raises:
        InputError: naming the key, the value and what is allowed.
    """
    for key, value, remedy, _ in problems(config):
        raise InputError(f"{key} = {cut(value) if isinstance(value, str) else shown(value)}: {remedy}{where(key)}")


def problems(config: Config) -> Iterator[Problem]:
    """What the recipe may not hold. A rule may rely on those before it: the second problem is one once the first is mended."""
    rules = (
        check_values,
        _check_name,
        _check_unfused,
        check_ranges,
        _check_plugins,
        _check_family,
        check_unread,
        _check_sizes,
        _check_rollout,
        _check_groups,
        _check_training,
        _check_own_levels,
        _check_rewards,
    )
    for rule in rules:
        yield from rule(config)


def repeats_notice(config: Config, prompts: int) -> str | None:
    """What to tell a run whose probe remembers but will hardly see a prompt twice, or mostly see prompts for the first time."""
    s, d, iterations = config.selection, Derived(config), config.train.iterations
    observed, new = d.observed, d.unseen_iterations(prompts)
    if d.looks_at_unseen and 2 * new > iterations:
        return (
            f"selection.probe = {s.probe} looks at every candidate in the first {new} of {iterations} iterations, until each "
            f"of {prompts} prompts was one: shorten data.prompts, train longer, or use selection.probe = short"
        )
    if d.looks_at_unseen or s.judge not in ("memory", *RIVALS) or observed >= 2 * prompts:
        return None
    return (
        f"selection.probe = {s.probe} will observe {observed} rewards of {prompts} prompts, fewer than 2 of each, and so pick "
        f"almost blindly: shorten data.prompts to {max(1, observed // 2)}, train longer, or use selection.probe = full"
    )


def _check_unfused(c: Config) -> Iterator[Problem]:
    """Keys that would slow a run down, by how they are computed today."""
    e = c.engine
    if e.fp8_attention:
        yield Problem("engine.fp8_attention", "true", FP8_ATTENTION)
    if e.forward == "fused" and e.precision == "fp8" and e.fp8_scaling == "tensorwise":
        yield Problem("engine.fp8_scaling", e.fp8_scaling, TENSORWISE_FUSED)


def _check_name(c: Config) -> Iterator[Problem]:
    """It becomes the name of a folder, with a number behind it."""
    name = c.name
    if name in ("", ".", "..") or name != name.strip() or "/" in name or "\\" in name or not name.isprintable():
        yield Problem(
            "name",
            repr(name),
            "must be the name of a folder: no separators, control characters or outer spaces (--out takes a path)",
        )
    elif len(name.encode()) > 200:
        yield Problem("name", repr(name[:20] + "…"), "must be at most 200 bytes long")


def _check_rollout(c: Config) -> Iterator[Problem]:
    r = c.rollout
    if r.shift != "model" and (isinstance(r.shift, str) or not 0 < r.shift < float("inf")):
        yield Problem("rollout.shift", r.shift, 'must be a number above 0, or "model"')
    if r.scheme == "cps" and r.eta > 1:
        yield Problem("rollout.eta", r.eta, "must lie in [0, 1] for scheme cps")
    if r.eta == 0:
        yield Problem("rollout.eta", r.eta, "must be above 0: without noise there is nothing to reinforce")
    if r.plan == "window":
        within = r.window_range
        if within and not (len(within) == 2 and 0 <= within[0] < within[1] <= r.steps - 1):
            remedy = f"must be two steps, rising, within 0 … {r.steps - 1} (rollout.steps = {r.steps}; the last is never in it)"
            yield Problem("rollout.window_range", list(within), remedy)
        elif r.window_size > (longest := within[1] - within[0] if within else r.steps - 1):
            what = "the length of rollout.window_range" if within else "rollout.steps - 1"
            yield Problem("rollout.window_size", r.window_size, f"must be at most {what} = {longest}")
    else:
        if not r.sde_steps or list(r.sde_steps) != sorted(set(r.sde_steps)):
            yield Problem("rollout.sde_steps", list(r.sde_steps), "must name at least one step, rising, without repeats")
        if r.sde_steps and not 0 <= min(r.sde_steps) <= max(r.sde_steps) < r.steps - 1:
            yield Problem(
                "rollout.sde_steps",
                list(r.sde_steps),
                f"must lie in 0 … {r.steps - 2} (rollout.steps = {r.steps}; the last step has no useful noise)",
            )
    if r.fork_velocity == "probe" and r.plan != "fork":
        yield Problem("rollout.fork_velocity", r.fork_velocity, "needs rollout.plan = fork", unread="rollout.fork_velocity")
    if r.fork_velocity == "probe" and _is_lossy(c):
        yield Problem(
            "rollout.fork_velocity",
            r.fork_velocity,
            "the probe runs in another precision than the update, and its velocity would enter a log-probability: use fresh",
        )
    if r.shared_noise and r.plan == "fork":
        yield Problem(
            "rollout.shared_noise",
            r.shared_noise,
            "acts on plans trajectory and window; forks share their anchor anyway",
            unread="rollout.shared_noise",
        )
    if (c.model.dtype == "fp64") != (r.storage == "fp64"):
        yield Problem("rollout.storage", r.storage, "fp64 latents go with model.dtype = fp64, and only with it")


def _check_groups(c: Config) -> Iterator[Problem]:
    """Anchors, tails and steps of a prompt."""
    r = c.rollout
    steps = list(r.granularities)
    if not steps or steps != sorted(set(steps)) or steps[0] < 1:
        yield Problem("rollout.granularities", steps, "must name at least one number of steps above 0, rising, without repeats")
    if Derived(c).granularities:
        for key in ("rollout.tail_steps", "rollout.tail_share"):
            if length := lookup(c, key):
                yield Problem(key, length, "rollout.granularities already says how long the tails are")
        for key, value, needed in (
            ("selection.probe", c.selection.judge, "full"), ("advantage.equal_groups", c.advantage.equal_groups, "keep"),
        ):  # fmt: skip
            if value != needed:
                yield Problem(key, value, f"tails of several granularities know {needed} only")
    for key in ("rollout.tail_steps", "rollout.tail_share"):
        if r.step_per_prompt and (length := lookup(c, key)):
            yield Problem(key, length, "must be 0 with rollout.step_per_prompt")
    if r.tail_steps and r.tail_share:
        yield Problem("rollout.tail_share", r.tail_share, "rollout.tail_steps already says how long the tails are")
    if r.step_per_prompt and r.trained_share < 1:
        yield Problem("rollout.trained_share", r.trained_share, "must be 1 with rollout.step_per_prompt")
    if r.seeds > 1 and r.fork_velocity == "probe":
        yield Problem("rollout.fork_velocity", "probe", "the probe has one anchor of each prompt: rollout.seeds needs fresh")
    if r.seeds > 1 and c.advantage.groups == "prompt" and c.advantage.equal_groups != "keep":
        yield Problem("advantage.equal_groups", c.advantage.equal_groups, "groups of several anchors know keep only")


def _is_lossy(c: Config) -> bool:
    """Whether rollouts compute something else than the policy does."""
    e = c.engine
    return e.precision == "fp8" or (e.precision == "bf16" and c.model.dtype != "bf16")


def _check_sizes(c: Config) -> Iterator[Problem]:
    for i, bucket in enumerate(c.model.buckets):
        if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", bucket):
            yield Problem(f"model.buckets.{i}", bucket, "must be HEIGHTxWIDTH in pixels, such as 512x768")
    if len(set(c.model.buckets)) < len(c.model.buckets):
        yield Problem("model.buckets", list(c.model.buckets), "names a size twice")


def _check_training(c: Config) -> Iterator[Problem]:
    fork, by, parts = c.rollout.plan == "fork", c.train.update_by, c.train.steps_per_iteration
    if fork and by == "samples":
        yield Problem("train.update_by", by, "members of a fork's group share one transition: use steps or slots")
    dealt = {
        "steps": (Derived(c).trained_steps, "trained steps of an iteration"),
        "slots": (Derived(c).slots, "prompts of an iteration (train.slots x train.accumulation)"),
        "samples": (c.rollout.group_size, "samples of a group (rollout.group_size)"),
    }
    if dealt[by][0] % parts:
        yield Problem("train.steps_per_iteration", parts, f"must divide the {dealt[by][0]} {dealt[by][1]}")
    if c.loss.old_logp == "rollout" and (c.rollout.plan != "fork" or c.rollout.fork_velocity != "fresh"):
        yield Problem(
            "loss.old_logp",
            c.loss.old_logp,
            "log-probabilities stored by this plan come from another batch geometry than the update's, so the ratio would "
            "not start at 1: use recompute (or rollout.plan = fork with fork_velocity = fresh)",
        )
    if c.loss.ratio != "plain" and c.rollout.scheme == "cps":
        yield Problem(
            "loss.ratio", c.loss.ratio, "needs a Gaussian's log-probability, which rollout.scheme = cps has not: use plain"
        )
    if c.guards.kl.limit and not c.loss.kl_weight:
        yield Problem(
            "guards.kl.limit",
            c.guards.kl.limit,
            "needs loss.kl_weight above 0: without it the divergence is not computed",
            unread="guards.kl.limit",
        )
    if c.output.keep_best and not c.evaluation.every:
        yield Problem("output.keep_best", True, "needs evaluation.every above 0", unread="output.keep_best")
    yield from _check_probe(c)
    if c.selection.candidates == 1 and c.selection.strategy not in ("closest", "random"):
        yield Problem(
            "selection.candidates",
            1,
            f"strategy {c.selection.strategy} needs at least two candidates",
            unread="selection.strategy",
        )


def _check_probe(c: Config) -> Iterator[Problem]:
    s, steps = c.selection, c.rollout.steps
    if s.probe == "full":
        return
    if s.candidates == 1 or s.strategy == "random":
        yield Problem(
            "selection.probe",
            s.probe,
            "judges candidates: it needs selection.candidates above 1 and no random strategy",
            unread="selection.probe",
        )
    if s.probe != "short" and s.strategy != "closest":
        yield Problem("selection.strategy", s.strategy, f"selection.probe = {s.probe} knows closest only")
    if is_import_path(s.strategy):
        yield Problem("selection.strategy", s.strategy, "a strategy named by import path needs selection.probe = full")
    rising = list(s.race_steps) == sorted(set(s.race_steps)) and s.race_steps
    if s.judge == "racing" and not (rising and s.race_steps[0] >= 1 and s.race_steps[-1] < steps):
        yield Problem("selection.race_steps", list(s.race_steps), f"must rise within 1 … {steps - 1} (rollout.steps = {steps})")
    if s.judge == "racing" and len(s.race_steps) > (halvings := (s.candidates - 1).bit_length()):
        yield Problem("selection.race_steps", list(s.race_steps), f"{s.candidates} candidates can be halved {halvings} times")
    if s.success_range[0] > s.success_range[1]:
        yield Problem("selection.success_range", list(s.success_range), "must not fall")
    if s.finalists > s.candidates:
        yield Problem("selection.finalists", s.finalists, f"must be at most selection.candidates = {s.candidates}")
    if s.judge != "full" and c.rollout.fork_velocity == "probe":
        yield Problem("rollout.fork_velocity", "probe", f"with selection.probe = {s.probe} it must be fresh")
    if c.advantage.equal_groups == "refill":
        yield Problem("advantage.equal_groups", "refill", "needs selection.probe = full")


def _check_own_levels(c: Config) -> Iterator[Problem]:
    """Levels of single slots need scores of their own candidates in every draw."""
    s, key = c.selection, "selection.capability"
    if s.capability == "shared":
        return
    if not Derived(c).scores_needed:
        yield Problem(key, s.capability, "has no effect here: nothing reads the capability EMA", unread=key)
    elif s.probe != "full":
        yield Problem(key, s.capability, f"needs selection.probe = full, not {s.probe}")
    if is_import_path(s.strategy) or is_import_path(c.advantage.function):
        yield Problem(key, s.capability, "needs a built-in selection.strategy and advantage.function, which take one level")
    for k, value in (("advantage.equal_groups", "refill"), ("advantage.std", "global")):
        if lookup(c, k) == value:
            yield Problem(k, value, "is of all slots together: not with selection.capability = per_slot")


def _check_plugins(c: Config) -> Iterator[Problem]:
    for key, names, section in (
        ("model.family", tuple(FAMILIES), c.model),
        ("selection.strategy", STRATEGIES, c.selection),
        ("advantage.function", ("fused",), c.advantage),
    ):
        name = lookup(c, key)
        if name not in names and not is_import_path(name):
            yield Problem(key, name, f"must be one of {', '.join(names)}, or package.module:attribute{nearest(name, names)}")
        if name in names and section.kwargs:
            unread = f"{key.split('.')[0]}.kwargs"
            yield Problem(unread, redacted_kwargs(section.kwargs), f"acts only when {key} is an import path", unread)


def _check_family(c: Config) -> Iterator[Problem]:
    """What the family's rollouts cannot be computed with."""
    family, e = FAMILIES.get(c.model.family), c.engine
    if family is None:
        return
    if e.forward not in ("auto", *family.forwards):
        yield Problem("engine.forward", e.forward, f"{family.title} models have auto, {', '.join(family.forwards)}")
    if e.precision == "fp8" and not family.fp8:
        yield Problem("engine.precision", "fp8", f"no layers of {family.title} models are known to bear it: use auto or bf16")
    if e.attention != "auto" and not family.attention:
        yield Problem(
            "engine.attention", e.attention, f"diffusers cannot change the attention of {family.title} models: use auto"
        )
    for key in ("model.guidance", "evaluation.guidance"):
        if family.guided and 0 < (scale := lookup(c, key)) < 1:
            yield Problem(key, scale, "must be above 1, or 1 for no guidance: between 0 and 1 there is none either")
    known = BUILT_IN_MODELS | {path: each.name for each in FAMILIES.values() for path in each.architectures}
    if (owner := known.get(c.model.path, family.name)) != family.name:
        remedy = f"set model.family = {owner}, or name a pipeline folder or Hub id of one"
        yield Problem("model.path", c.model.path, f"is no {family.title} model: {remedy}")


def _check_rewards(c: Config) -> Iterator[Problem]:
    if not c.rewards:
        yield Problem("rewards", "[]", "name at least one reward")
    for i, reward in enumerate(c.rewards):
        if not 0 < reward.weight < float("inf"):
            yield Problem(f"rewards.{i}.weight", reward.weight, "must be above 0")
        if not (reward.scale and abs(reward.scale) < float("inf")):
            yield Problem(f"rewards.{i}.scale", reward.scale, "must be a number other than 0")
        if not 0 <= reward.rows < float("inf"):
            yield Problem(f"rewards.{i}.rows", reward.rows, "must be at least 0 (a whole chunk)")
        if not re.fullmatch(r"|cpu|cuda(:\d{1,3})?", reward.device):
            yield Problem(f"rewards.{i}.device", reward.device, "must be cpu, cuda, cuda:N or empty (the model's device)")
        if reward.dtype != "fp32" and "dtype" in reward.kwargs:
            yield Problem(
                f"rewards.{i}.kwargs.dtype", reward.kwargs["dtype"], f"rewards.{i}.dtype is given too; remove one of them"
            )
        if not 0 <= reward.timeout <= LONGEST_TIMEOUT:
            yield Problem(
                f"rewards.{i}.timeout", reward.timeout, f"must be from 0 (waits for ever) to {LONGEST_TIMEOUT:g} seconds"
            )
