"""Keys that nothing reads where they stand: changed from their defaults, they are refused."""

from __future__ import annotations

from collections.abc import Iterator

from ..models.registry import FAMILIES
from ..parts.plugins import is_import_path
from ..text.redaction import redacted
from .dotted import lookup
from .keys import BUILT_IN_MODELS, RIVALS, Config
from .values import Problem

Rule = tuple[bool, str, list[str]]
"""Whether its keys are dead, what they need, and the keys."""


def check_unread(c: Config) -> Iterator[Problem]:
    """Keys changed from their defaults where nothing reads them."""
    default, seen = Config(), redacted(c)
    for dead, needed, keys in (*_of_model(c), *_of_algorithm(c), *_of_data(c)):
        for key in keys:
            if dead and (value := lookup(seen, key)) != lookup(default, key):
                yield Problem(key, value, f"has no effect here: it needs {needed}", unread=key)


def _of_model(c: Config) -> list[Rule]:
    plugin, fp8 = is_import_path(c.model.family), c.engine.precision == "fp8"
    built_in = f"model.family = {' or '.join(FAMILIES)}"
    guided = [family.name for family in FAMILIES.values() if family.guided]
    unguided, weak = c.model.family not in guided, max(c.model.guidance, c.evaluation.guidance) <= 1
    classifier_free = f"model.family = {' or '.join(guided)}: classifier-free guidance"
    return [
        (plugin, built_in, [f"engine.{k}" for k in ("forward", "precision", "attention")]),
        (not fp8, "engine.precision = fp8", ["engine.fp8_scaling"]),
        (c.model.tuning != "lora", "model.tuning = lora", [f"model.lora_{k}" for k in ("rank", "alpha", "targets", "from")]),
        (plugin, built_in, ["model.tuning", "model.gradient_checkpointing", "model.max_text_tokens"]),
        (plugin, built_in, ["model.guidance", "model.timestep", "model.prompt_cache"]),
        (unguided, classifier_free, ["model.negative_prompt", "evaluation.guidance"]),
        (weak, "model.guidance or evaluation.guidance above 1", ["model.negative_prompt"]),
        (plugin or c.model.path in BUILT_IN_MODELS, "a pipeline folder or Hub id", ["model.variant", "model.revision"]),
    ]


def _of_algorithm(c: Config) -> list[Rule]:
    r = c.rollout
    return [
        (r.plan != "fork", "rollout.plan = fork", ["rollout.granularities", "rollout.seeds"]),
        (r.plan != "trajectory", "rollout.plan = trajectory", ["rollout.step_per_prompt"]),
        (r.trained_share == 1 or r.plan == "fork", "rollout.trained_share below 1 without forks", ["rollout.trained_of"]),
        (r.seeds == 1, "rollout.seeds above 1", ["advantage.groups"]),
        (max(r.granularities, default=1) == 1, "a step of rollout.granularities above 1", ["rollout.granular_end"]),
        (c.selection.judge != "short", "selection.probe = short", ["selection.probe_steps"]),
        (c.selection.judge != "racing", "selection.probe = racing", ["selection.race_steps"]),
        (
            c.selection.judge != "memory",
            "selection.probe = memory",
            [f"selection.{k}" for k in ("finalists", "allow_unseen", "noise_share", "group_evidence")],
        ),
        (
            c.selection.judge not in (remember := ("memory", "bots", "procurl", "dps")),
            f"selection.probe = {', '.join(remember)}",
            ["selection.half_life"],
        ),
        (c.selection.judge not in RIVALS, f"selection.probe = {', '.join(RIVALS)}", ["selection.success_range"]),
        (c.selection.judge != "bots", "selection.probe = bots", ["selection.target_success"]),
        (c.selection.judge != "procurl", "selection.probe = procurl", ["selection.sharpness"]),
        (not (r.tail_steps or r.tail_share), "rollout.tail_steps or rollout.tail_share above 0", ["rollout.tail_solver"]),
        (
            r.plan != "window",
            "rollout.plan = window",
            [f"rollout.window_{k}" for k in ("size", "stride", "every", "order", "range")],
        ),
        (r.window_order == "random", "rollout.window_order = sliding", ["rollout.window_stride"]),
        (c.loss.kl_weight == 0, "loss.kl_weight above 0", ["loss.kl_space", "loss.kl_variance"]),
        (c.loss.kl_space != "mean", "loss.kl_space = mean", ["loss.kl_variance"]),
        (c.train.steps_per_iteration == 1, "train.steps_per_iteration above 1", ["loss.average", "train.update_by"]),
        (c.optimizer.ema_decay == 0, "optimizer.ema_decay above 0", ["optimizer.ema_every", "optimizer.ema_warmup"]),
        (
            is_import_path(c.advantage.function),
            "advantage.function = fused",
            [f"advantage.{k}" for k in ("clip_of", "std", "ddof", "eps", "std_floor")],
        ),
        (c.advantage.std != "floored", "advantage.std = floored", ["advantage.std_floor"]),
        (c.advantage.std == "none", "another advantage.std than none", ["advantage.ddof", "advantage.eps"]),
        (c.optimizer.schedule == "constant", "another optimizer.schedule", ["optimizer.final_share"]),
    ]


def _of_data(c: Config) -> list[Rule]:
    return [
        (all(map(is_import_path, c.data.sources)), "a file or data set of prompts", ["data.field", "data.held_out_field"]),
        (
            not any(source.endswith(("#train", "#held_out")) for source in c.data.sources),
            "a source of prompts with #train or #held_out behind it",
            ["data.held_out_share"],
        ),
        (
            not any(map(is_import_path, c.data.sources)),
            "a prompt source named by import path",
            ["data.kwargs"],
        ),
        (
            not any(map(is_import_path, (c.selection.strategy, c.advantage.function, *c.data.sources))),
            "a selection, advantage or prompt source named by import path",
            ["train.part_timeout"],
        ),
    ]
