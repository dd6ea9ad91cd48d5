"""Prompts, rewards and evaluation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from .kwargs import KwargValue


@dataclass(frozen=True)
class DataConfig:
    """Prompts. Sources: a file (text with one prompt per line, CSV, TSV, JSON, JSON lines), `hub:owner/name`, or a list of
    these, each with `#train` or `#held_out` behind it for a part; `tiny:even`, `tiny:wide`, `tiny:dusty(0.6)`,
    `tiny:held_out`;
    package.module:attribute of a callable (**kwargs) -> sequence of prompts. docs/prompts.md shows each."""

    prompts: str | tuple[str, ...] = "tiny:wide"
    held_out: str | tuple[str, ...] = "tiny:held_out"
    field: str = ""
    """Column or key that holds the prompts, where a source has several that could; empty: the one that clearly does."""
    held_out_field: str = ""
    """The same of held_out; empty: data.field."""
    held_out_share: float = 0.1
    """Share of a source's prompts that are its part `#held_out`; the others are `#train`."""
    duplicates: Literal["error", "keep", "drop"] = "error"
    """What repeated prompts in files and data sets do."""
    broken: Literal["error", "drop"] = "error"
    """What rows of files and data sets do that cannot be read; dropped ones are named in a note."""
    allow_overlap: bool = False
    """Accept held-out prompts that also train: the held-out reward is then not one on unseen prompts."""
    kwargs: dict[str, KwargValue] = dataclasses.field(default_factory=dict)
    """Arguments of prompt sources named by import path."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source, of prompts that train and of held-out ones."""
        return (*listed(self.prompts), *listed(self.held_out))


def listed(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """One value or several, as several."""
    return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class RewardConfig:
    """One reward: a built-in name or package.module:attribute, its weight, its arguments, and how it is called."""

    name: str = "tiny"
    weight: float = 1.0
    """Of its advantages, against those of the other rewards."""
    scale: float = 1.0
    """Its scores are used, and reported, as score × scale + shift; below 0 where less is better."""
    shift: float = 0.0
    """See scale."""
    device: str = ""
    """Where it works: empty is the model's device; cpu, cuda:N. Images are copied there once per chunk."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of its weights, for rewards that have some. Run `adagrpo fidelity` first: it compares bf16 scores with fp32."""
    rows: int = 0
    """Images per call, at most; 0 is a whole chunk of engine.decode_rows."""
    offload: bool = False
    """Its weights wait in the host's memory while nothing is scored."""
    timeout: float = 600.0
    """Seconds that one call may take; 0 waits for ever, and calls a reward that works on the device in the trainer's own
    thread. A reward that takes longer ends the run, after saving it."""
    kwargs: dict[str, KwargValue] = dataclasses.field(default_factory=dict)
    """Its arguments: values, lists of strings, or tables of these, such as `kwargs.architecture = {vision_heads = 16}`."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation by the deterministic sampler."""

    every: int = 20
    """Iterations between evaluations with fixed noise; 0 is never."""
    prompts: int = 50
    noises: int = 1
    final_prompts: int = 150
    """Prompts of the paired comparison before → after; 0 skips it."""
    final_noises: int = 3
    """Noises per prompt of that comparison, seen nowhere else in the run."""
    guidance: float = 0.0
    """Classifier-free guidance of all evaluation, of sample grids and of `adagrpo sample` and `export`, apart from that of the
    training: 0 is model.guidance, 1 is none."""
