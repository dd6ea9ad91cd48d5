"""The range of every number of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .dotted import lookup
from .keys import Config, GuardConfig, GuardsConfig
from .values import Problem

MOST_SEED = 2**42
LONGEST_TIMEOUT = 1e6


def check_ranges(c: Config) -> Iterator[Problem]:
    """Values outside their range."""
    at_least: dict[str, float] = {
        "model.guidance": 0, "advantage.weight": 0, "advantage.ddof": 0, "advantage.eps": 0, "rollout.seeds": 1,
        "model.height": 8, "model.width": 8, "model.max_text_tokens": 1, "model.lora_rank": 1, "model.prompt_cache": 1,
        "rollout.steps": 1, "rollout.eta": 0, "rollout.group_size": 2, "rollout.window_size": 1,
        "rollout.window_stride": 0, "rollout.window_every": 1, "selection.candidates": 1, "loss.clip_range": 0,
        "loss.kl_weight": 0, "train.iterations": 1, "train.seed": 0, "train.slots": 1, "train.accumulation": 1,
        "train.steps_per_iteration": 1, "optimizer.lr": 0, "optimizer.eps": 0, "optimizer.weight_decay": 0,
        "optimizer.warmup_steps": 0, "optimizer.ema_every": 1,
        "engine.max_rows": 0, "engine.decode_rows": 0, "evaluation.every": 0,
        "evaluation.prompts": 1, "evaluation.guidance": 0, "train.part_timeout": 0, "train.ranks_timeout": 1,
        "evaluation.noises": 1, "evaluation.final_prompts": 0, "evaluation.final_noises": 1, "output.grid_every": 0,
        "output.grid_prompts": 1, "output.checkpoint_every": 0, "output.keep_last": 1, "output.keep_every": 0,
        "output.trace_at": 0, "rollout.tail_steps": 0, "rollout.tail_share": 0, "guards.max_rollbacks": 0,
        "selection.probe_steps": 1, "selection.finalists": 1, "selection.group_evidence": 0,
        "selection.target_success": 0, "selection.sharpness": 0,
        "budget.evaluations": 0, "budget.time": 0, "budget.cheap_evaluations": 0, "budget.cheap_time": 0,
    }  # fmt: skip
    at_most = {
        "rollout.steps": 4096, "rollout.group_size": 4096, "train.slots": 4096, "train.accumulation": 4096,
        "selection.candidates": 4096, "train.seed": MOST_SEED, "evaluation.noises": 4096, "evaluation.final_noises": 4096,
        "train.iterations": 2**31, "model.height": 2**14, "model.width": 2**14, "model.max_text_tokens": 4096,
        "model.lora_rank": 4096, "selection.probe_steps": 4096, "rollout.tail_steps": 4096, "output.grid_prompts": 1024,
        "train.part_timeout": LONGEST_TIMEOUT, "train.ranks_timeout": LONGEST_TIMEOUT, "advantage.ddof": 1,
        "rollout.seeds": 4096, "rollout.tail_share": 1, "selection.target_success": 1,
    }  # fmt: skip
    above_zero = (
        "selection.half_life", "selection.noise_share", "advantage.clip", "advantage.std_floor", "optimizer.max_grad_norm",
        "model.lora_alpha", "data.held_out_share",
    )  # fmt: skip
    below_one = (
        "selection.noise_share", "selection.alpha", "optimizer.ema_decay", "optimizer.betas.0", "optimizer.betas.1",
        "data.held_out_share",
    )  # fmt: skip
    for key, low in at_least.items():
        if not low <= (value := lookup(c, key)) < float("inf"):
            yield Problem(key, value, f"must be at least {low}")
    for key, high in at_most.items():
        if (value := lookup(c, key)) > high:
            yield Problem(key, value, f"must be at most {high}")
    for key in above_zero:
        if not 0 < (value := lookup(c, key)) < float("inf"):
            yield Problem(key, value, "must be above 0")
    for key in below_one:
        if not 0 <= (value := lookup(c, key)) < 1:
            yield Problem(key, value, "must lie in [0, 1)")
    for guard in dataclasses.fields(GuardsConfig):
        if isinstance(value := getattr(c.guards, guard.name), GuardConfig):
            if not 0 <= value.limit < float("inf"):
                yield Problem(f"guards.{guard.name}.limit", value.limit, "must be at least 0 (0 is off)")
            if value.patience < 1:
                yield Problem(f"guards.{guard.name}.patience", value.patience, "must be at least 1")
    if not 0 <= c.optimizer.final_share <= 1:
        yield Problem("optimizer.final_share", c.optimizer.final_share, "must lie in [0, 1]")
    if not 0 < c.rollout.trained_share <= 1:
        yield Problem("rollout.trained_share", c.rollout.trained_share, "must lie in (0, 1]")
