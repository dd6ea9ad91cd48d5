"""A whole run of the toy model as the command line does it: its recipe, and the lines that it wrote."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from toy import toy_config

from adagrpo.recipe.keys import Config, GuardConfig, GuardsConfig, RewardConfig

QUIET = GuardsConfig(
    **{f.name: GuardConfig() for f in dataclasses.fields(GuardsConfig) if f.name != "max_rollbacks"}, max_rollbacks=1
)


def recipe(**sections) -> Config:
    config = toy_config(
        model={"family": "parts:model", "path": "", "device": "cpu"},
        data={"prompts": "parts:prompts", "held_out": "parts:held_out"},
        evaluation={"every": 3, "prompts": 5, "noises": 1, "final_prompts": 5, "final_noises": 1},
        output={"grid_every": 3, "grid_prompts": 3, "checkpoint_every": 1, "keep_last": 9},
        train={"iterations": 3, "slots": 2},
        optimizer={"lr": 1e-2, "eps": 1e-3, "ema_decay": 0.5},
        **sections,
    )
    return dataclasses.replace(config, rewards=(RewardConfig(name="parts:reward"),), guards=QUIET)


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    file = out / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
