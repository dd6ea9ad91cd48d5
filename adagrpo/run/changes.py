"""What a resumed run may change: what cannot change its result, and what changes it by rounding only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import InputError
from ..recipe.derived import Derived
from ..recipe.keys import Config, GuardConfig, GuardsConfig
from ..rewards import OVER_HTTP
from ..text.redaction import comparable

Reason = Callable[[Config, Config], str]
ROUNDING = "equal to rounding from iteration {} on, not bitwise"
BITWISE = "the result is bitwise that of the unchanged run"
GROWN = "weights and training metrics are bitwise those of a run of that length from its start"
EXTRA_POINT = "the held-out curve has one more point, at the former end, iteration {}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Whether keys may change on resume.

    Attributes:
        refusal: (recipe there, recipe here) → why the change is refused; empty if it is not.
        bitwise: whether the result stays the same bit for bit.
    """

    refusal: Reason
    bitwise: bool = True


@dataclasses.dataclass(frozen=True)
class Changes:
    """Keys that a resumed run changes.

    Attributes:
        keys: ``section.key`` → value before and now.
        bitwise: whether the result stays the same bit for bit.
        extra_point: former last iteration, where only a run that ends there is evaluated; 0 is none.
    """

    keys: Mapping[str, tuple[Any, Any]]
    bitwise: bool
    extra_point: int = 0

    def entry(self, iteration: int) -> dict[str, Any]:
        """For the manifest: what changed after which iteration, and what that means."""
        evaluated = 0 < self.extra_point <= iteration
        meaning = (GROWN if evaluated else BITWISE) if self.bitwise else ROUNDING.format(iteration + 1)
        if evaluated:
            meaning = f"{meaning}; {EXTRA_POINT.format(self.extra_point)}"
        return {"after_iteration": iteration, "keys": {k: list(pair) for k, pair in self.keys.items()}, "meaning": meaning}

    def notice(self, iteration: int) -> str:
        """For the user."""
        return f"resumed with other keys: {differences(self.keys)}; {self.entry(iteration)['meaning']}"

    def touches(self, *keys: str) -> bool:
        """Whether one of ``keys``, or of the keys below them, changes."""
        return any(key == name or key.startswith(f"{name}.") for key in self.keys for name in keys)


NO_CHANGES = Changes({}, True)

ASKING = {"url", "limits", "per_request"}
"""Arguments of a reward that a server gives, which say nothing of its scores."""


def acts(guard: GuardConfig) -> bool:
    """Whether a guard can do more than warn."""
    return guard.limit > 0 and guard.action != "warn"


def _guards(config: Config) -> dict[str, GuardConfig]:
    values = {field.name: getattr(config.guards, field.name) for field in dataclasses.fields(GuardsConfig)}
    return {name: value for name, value in values.items() if isinstance(value, GuardConfig)}


def _free(before: Config, now: Config) -> str:
    return ""


def _fixed(before: Config, now: Config) -> str:
    return "it decides the result"


def _rolls_back(before: Config, now: Config) -> str:
    """What moves the checkpoint that a guard would roll back to."""
    for config in (before, now):
        for name, guard in _guards(config).items():
            if acts(guard) and guard.action == "rollback":
                return f"guards.{name} rolls back, and this decides where to"
    return ""


def _judged(before: Config, now: Config) -> str:
    """What the held-out reward decides."""
    if acts(before.guards.reward_hacking) or acts(now.guards.reward_hacking):
        return "guards.reward_hacking judges by it, and does more than warn"
    kept = before.output.keep_best or now.output.keep_best
    return _rolls_back(before, now) if kept else ""


def _warns(name: str) -> Reason:
    """Of one guard: its keys may change while it only warns."""

    def refusal(before: Config, now: Config) -> str:
        acting = acts(getattr(before.guards, name)) or acts(getattr(now.guards, name))
        return f"guards.{name} does more than warn" if acting else ""

    return refusal


def _longer(before: Config, now: Config) -> str:
    if now.train.iterations < before.train.iterations:
        return "a run can only grow"
    if before.optimizer.schedule != "constant":
        return f"optimizer.schedule = {before.optimizer.schedule}: every learning rate depends on the length"
    end = before.train.iterations
    if _extra_point(before) and (judge := _judge_of_held_out(before, now)):
        return f"iteration {end} is evaluated only as the last one, and {judge} judges by that"
    every = before.output.checkpoint_every
    if (every <= 0 or end % every) and (why := _rolls_back(before, now)):
        return f"iteration {end} has a checkpoint only as the last one: {why}"
    return ""


def _extra_point(config: Config) -> int:
    """The last iteration, where it is evaluated only because it is the last; else 0."""
    end, every = config.train.iterations, config.evaluation.every
    return end if every > 0 and end % every else 0


def _judge_of_held_out(before: Config, now: Config) -> str:
    """The key that lets held-out values of single iterations decide something; empty if none does."""
    if acts(before.guards.reward_hacking) or acts(now.guards.reward_hacking):
        return "guards.reward_hacking"
    return "output.keep_best" if before.output.keep_best or now.output.keep_best else ""


def _asked_elsewhere(before: Config, now: Config) -> str:
    """Where a server is, and how it is asked, may change; other arguments of rewards may not."""
    for one, other in zip(comparable(before).rewards, comparable(now).rewards, strict=False):
        changed = {name for name in {**one.kwargs, **other.kwargs} if one.kwargs.get(name) != other.kwargs.get(name)}
        if changed - (ASKING if other.name in OVER_HTTP else set()):
            return _fixed(before, now)
    return ""


def _same_batch(before: Config, now: Config) -> str:
    """Other micro-batches of the same prompts are another order of summation."""
    prompts = [Derived(config).slots for config in (before, now)]
    return (
        "" if prompts[0] == prompts[1] else "train.slots × train.accumulation, the prompts of an iteration, must stay the same"
    )


FREE, FIXED, EQUAL = Rule(_free), Rule(_fixed), Rule(_free, bitwise=False)
JUDGED, KEPT = Rule(_judged), Rule(_rolls_back)

# Every key of a recipe, by section; `*` is any entry of a list, `kwargs` stands for all that is in it.
_KEYS: dict[str, list[tuple[Rule, str]]] = {
    "": [(FREE, "name")],
    "model": [
        (FREE, "prompt_cache"),
        (EQUAL, "device gradient_checkpointing"),
        (FIXED, "family kwargs path variant revision dtype height width buckets max_text_tokens guidance timestep"),
        (FIXED, "tuning lora_rank lora_alpha lora_targets lora_from negative_prompt"),
    ],
    "rollout": [
        (FIXED, "plan scheme eta steps shift sde_steps window_size window_stride window_every group_size"),
        (FIXED, "trained_share window_order window_range shared_noise fork_velocity storage tail_steps tail_solver"),
        (FIXED, "granularities granular_end seeds step_per_prompt tail_share trained_of"),
    ],
    "selection": [
        (FIXED, "candidates strategy kwargs alpha probe probe_steps race_steps finalists half_life noise_share group_evidence"),
        (FIXED, "allow_unseen capability success_range target_success sharpness"),
    ],
    "advantage": [(FIXED, "function kwargs weight calibration clip clip_of groups std ddof eps std_floor equal_groups")],
    "loss": [(FIXED, "clip_range old_logp ratio kl_weight kl_space kl_variance step_weights average")],
    "train": [
        (Rule(_longer), "iterations"),
        (Rule(_same_batch, bitwise=False), "slots accumulation"),
        (FREE, "part_timeout ranks_timeout"),
        (FIXED, "seed steps_per_iteration update_by shuffle_advantages"),
    ],
    "optimizer": [
        (FIXED, "lr betas eps weight_decay max_grad_norm schedule warmup_steps final_share"),
        (FIXED, "ema_decay ema_every ema_warmup"),
    ],
    "engine": [
        (EQUAL, "max_rows decode_rows kernels forward precision fp8_scaling attention fp8_attention cuda_graphs overlap"),
    ],
    # What a run may read is no part of its result: the prompts themselves are compared.
    "data": [(FREE, "duplicates broken allow_overlap"), (FIXED, "prompts held_out field held_out_field held_out_share kwargs")],
    "evaluation": [(JUDGED, "every prompts noises"), (FIXED, "final_prompts final_noises guidance")],
    "output": [
        (FREE, "grid_every grid_prompts trace_at loggers keep_last keep_every"),  # the newest checkpoint is always kept
        (KEPT, "checkpoint_every keep_best"),
    ],
    "guards": [(KEPT, "max_rollbacks")],
    "budget": [(FREE, "evaluations time cheap_evaluations cheap_time")],
    "rewards": [
        (FREE, "*.timeout *.offload"),
        (EQUAL, "*.device *.rows"),
        (Rule(_asked_elsewhere, bitwise=False), "*.kwargs"),
        (FIXED, "*.name *.weight *.scale *.shift *.dtype"),
    ],
}


def _table() -> dict[str, Rule]:
    table = {
        f"{section}.{key}".lstrip("."): rule
        for section, entries in _KEYS.items()
        for rule, keys in entries
        for key in keys.split()
    }
    for guard in _guards(Config()):
        table |= {f"guards.{guard}.{field.name}": Rule(_warns(guard)) for field in dataclasses.fields(GuardConfig)}
    return table


RULES = _table()


def rule_of(key: str) -> Rule:
    """The rule of ``section.key``; a key that is not known decides the result."""
    parts: list[str] = []
    for part in key.split("."):
        parts.append("*" if part.isdigit() else part)
        if part == "kwargs":
            break
    return RULES.get(".".join(parts), FIXED)


def permitted(before: Config, now: Config, changed: Mapping[str, tuple[Any, Any]], place: str) -> Changes:
    """The changes of a resumed run, if all of them may be.

    Args:
        before, now: recipe of the run, and the one it is resumed with.
        changed: the keys in which they differ, with both values.
        place: how messages name the run.

    Raises:
        InputError: a change that could change the result; the message shows it and says why.
    """
    if refused := refusals(before, now, changed):
        shown, why = refused
        raise InputError(
            f"{place}: holds a run of another recipe: {shown}; drop the change or name another --out ({why}; config.toml there "
            "is the run's own recipe)"
        )
    extra_point = _extra_point(before) if "train.iterations" in changed else 0
    return Changes(dict(changed), all(rule_of(key).bitwise for key in changed), extra_point)


def refusals(before: Config, now: Config, changed: Mapping[str, tuple[Any, Any]]) -> tuple[str, str] | None:
    """The changes that may not be, with both values, and why; None if all of them may."""
    refused: dict[str, str] = {key: why for key in changed if (why := rule_of(key).refusal(before, now))}
    if not refused:
        return None
    return differences({key: changed[key] for key in refused}), "; ".join(dict.fromkeys(refused.values()))


def differences(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Keys with both values."""
    return "; ".join(f"{key} = {before} there, {now} here" for key, (before, now) in changed.items())


def changed_keys(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Keys in which two recipes differ, as ``section.key``, with both values; None where a key is missing.

    Recipes that differ in secrets only are the same.
    """
    one, other = (_flat(dataclasses.asdict(config)) for config in (comparable(before), comparable(now)))
    return {key: (one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)}


def _flat(table: Any, prefix: str = "") -> dict[str, Any]:
    """``{"section.key": value}`` of nested tables and lists of tables."""
    items = table.items() if isinstance(table, dict) else enumerate(table)
    flat: dict[str, Any] = {}
    for key, value in items:
        nested = isinstance(value, dict) or (isinstance(value, list | tuple) and any(isinstance(v, dict) for v in value))
        flat |= _flat(value, f"{prefix}{key}.") if nested and value else {f"{prefix}{key}": value}
    return flat
