"""Recipes: frozen dataclasses, filled from TOML, overridden on the command line.

Every key acts or is an error. ``load_recipe`` merges a recipe file over the defaults below; ``check`` refuses values that
cannot work together, before any long work starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import tomli_w

from .errors import InputError

KwargValue = bool | int | float | str


@dataclass(frozen=True)
class ModelConfig:
    """The policy: a diffusers pipeline folder or Hub id, and how it is trained."""

    family: Literal["flux"] = "flux"
    """Adapter: flux (any diffusers FLUX pipeline, guidance-distilled or not)."""
    path: str = "tiny-flux"
    """Pipeline folder or Hub id; `tiny-flux` is the model that ships with AdaGRPO."""
    dtype: Literal["bf16", "fp32", "fp64"] = "fp32"
    """Precision of weights and activations. bf16 trains on fp32 master weights."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:N."""
    height: int = 32
    """Image height in pixels; a multiple of the VAE's scale times the patch size."""
    width: int = 32
    """Image width in pixels."""
    max_text_tokens: int = 256
    """Length of the T5 prompt, in tokens."""
    guidance: float = 3.5
    """Distilled guidance fed to the transformer; ignored by models without a guidance embedding."""
    tuning: Literal["full", "lora"] = "full"
    """Train all transformer weights, or low-rank adapters."""
    lora_rank: int = 64
    lora_alpha: float = 128.0
    lora_targets: tuple[str, ...] = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    """Modules that get an adapter, by the end of their name."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time for the update."""
    prompt_cache: int = 512
    """Prompt embeddings kept on the device (2.1 MB each for FLUX.1 at 256 tokens)."""


@dataclass(frozen=True)
class RolloutConfig:
    """How samples are drawn: the grid, the stochastic steps, the groups."""

    plan: Literal["fork", "trajectory", "window"] = "fork"
    """fork: groups branch off an ODE anchor at each stochastic step (AdaGRPO). trajectory: whole stochastic trajectories
    (Flow-GRPO, DanceGRPO, Flow-CPS). window: trajectories, stochastic only in a window that moves (MixGRPO)."""
    scheme: Literal["flow", "dance", "cps"] = "flow"
    eta: float = 0.7
    """Noise strength of the scheme."""
    steps: int = 16
    """Denoising steps T."""
    shift: float = 3.0
    """Time shift of the noise levels."""
    sde_steps: tuple[int, ...] = (0, 2, 4, 6)
    """Stochastic steps, each in [0, steps - 1); plans fork and trajectory."""
    window_size: int = 4
    window_stride: int = 1
    window_every: int = 25
    """Plan window: its length, how far it moves, and after how many iterations."""
    group_size: int = 12
    """Samples per group, at least 2."""
    trained_share: float = 1.0
    """Share of the stochastic steps trained in each iteration, drawn anew each time (DanceGRPO: 0.6)."""
    shared_noise: bool = False
    """Trajectories of a group start from one initial noise (DanceGRPO)."""
    fork_velocity: Literal["fresh", "probe"] = "fresh"
    """fresh: one extra batched call in the geometry of the update, which makes the on-policy ratio exactly 1. probe: the
    velocities of the probe (the released code)."""
    storage: Literal["bf16", "fp16", "fp32", "fp64"] = "fp32"
    """Precision of stored latents; log-probabilities are of the rounded values."""


@dataclass(frozen=True)
class SelectionConfig:
    """The online curriculum filter."""

    candidates: int = 10
    """Candidate prompts B per slot; 1 turns the filter off."""
    strategy: Literal["closest", "random", "easiest", "hardest", "medium"] = "closest"
    alpha: float = 0.8
    """Memory of the capability EMA."""


@dataclass(frozen=True)
class AdvantageConfig:
    """Cross-level advantage fusion."""

    weight: float = 1.0
    """Weight of the advantage against the capability EMA; 0 leaves plain group-relative advantages."""
    calibration: Literal["mass", "zscore", "zscore_centred", "none"] = "mass"
    clip: float = 5.0


@dataclass(frozen=True)
class LossConfig:
    """The policy-gradient objective."""

    clip_range: float = 0.0
    """Half width of the ratio's trust region; 0 is no clipping (the released code)."""
    old_logp: Literal["rollout", "recompute", "detached"] = "rollout"
    """Where the ratio's denominator comes from: stored while sampling, recomputed before the first update in its own
    geometry, or the current value without gradient (the released code: the ratio is then 1 by construction)."""
    kl_weight: float = 0.0
    """Weight of the KL divergence to the initial model, in mean space."""
    kl_variance: Literal["step", "diffusion"] = "step"
    """step divides by 2w² (the Gaussian KL), diffusion by 2g² (Flow-GRPO's code)."""
    step_weights: Literal["uniform", "equal_gradient"] = "uniform"


@dataclass(frozen=True)
class TrainConfig:
    """Length and shape of the run."""

    iterations: int = 300
    seed: int = 0
    slots: int = 1
    """Prompts trained at once."""
    accumulation: int = 1
    """Micro-batches of `slots` prompts per iteration; the iteration trains slots × accumulation prompts."""
    steps_per_iteration: int = 1
    """Optimizer steps per iteration; the trained steps are dealt to them in order (the released code: one per step)."""
    shuffle_advantages: bool = False
    """Control experiment: deal the advantages of each group to the wrong samples."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on fp32 weights."""

    lr: float = 2e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or falling to `final_share` of lr at the last iteration."""
    warmup_steps: int = 0
    final_share: float = 0.0
    ema_decay: float = 0.0
    """Average of the weights, used for evaluation and export; 0 is off."""


@dataclass(frozen=True)
class EngineConfig:
    """How it runs; never what it computes."""

    max_rows: int = 0
    """Largest batch of the transformer and the decoder, in images; 0 is unlimited."""


@dataclass(frozen=True)
class DataConfig:
    """Prompts. Sources: `tiny:even`, `tiny:wide`, `tiny:held_out`, or a UTF-8 text file with one prompt per line."""

    prompts: str = "tiny:wide"
    held_out: str = "tiny:held_out"


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


@dataclass(frozen=True)
class OutputConfig:
    """What the run folder receives, and how often (in iterations)."""

    grid_every: int = 20
    grid_prompts: int = 10
    checkpoint_every: int = 50
    keep_last: int = 2


@dataclass(frozen=True)
class RewardConfig:
    """One reward: a built-in name, its weight, and its arguments."""

    name: str = "tiny"
    weight: float = 1.0
    kwargs: dict[str, KwargValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """A recipe."""

    name: str = "unnamed"
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    rewards: tuple[RewardConfig, ...] = (RewardConfig(),)


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("adagrpo") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(recipe: str | Path) -> Config:
    """Read a shipped recipe by name, or a TOML file by path.

    Raises:
        InputError: unknown recipe, unreadable file, unknown key or wrong type.
    """
    names = recipe_names()
    if str(recipe) in names:
        text, source = (
            (resources.files("adagrpo") / "recipes" / f"{recipe}.toml").read_text("utf-8"),
            f"recipe {recipe}",
        )
    else:
        path = Path(recipe)
        if not path.is_file():
            raise InputError(
                f"no recipe {str(recipe)!r}{_hint(str(recipe), names)}: name one of {', '.join(names)}, or a TOML file"
            )
        try:
            text, source = path.read_text("utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    try:
        return _build(Config, tomllib.loads(text), source, "")
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{source}: not valid TOML: {error}") from error


def to_toml(config: Config) -> str:
    """The resolved recipe as TOML; ``load_recipe`` reads it back to an equal Config."""
    return tomli_w.dumps(_plain(dataclasses.asdict(config)))


def check(config: Config) -> None:
    """Refuse values that are out of range or cannot work together.

    Raises:
        InputError: naming the key, the value and what is allowed.
    """
    for rule in (_check_ranges, _check_rollout, _check_training, _check_rewards):
        for key, value, remedy in rule(config):
            raise InputError(f"{key} = {value}: {remedy}")


Problem = tuple[str, Any, str]


def _check_ranges(c: Config) -> typing.Iterator[Problem]:
    at_least: dict[str, float] = {
        "model.height": 8, "model.width": 8, "model.max_text_tokens": 1, "model.lora_rank": 1, "model.prompt_cache": 1,
        "rollout.steps": 1, "rollout.eta": 0, "rollout.group_size": 2, "rollout.window_size": 1,
        "rollout.window_stride": 0, "rollout.window_every": 1, "selection.candidates": 1, "loss.clip_range": 0,
        "loss.kl_weight": 0, "train.iterations": 1, "train.seed": 0, "train.slots": 1, "train.accumulation": 1,
        "train.steps_per_iteration": 1, "optimizer.lr": 0, "optimizer.eps": 0, "optimizer.weight_decay": 0,
        "optimizer.warmup_steps": 0, "engine.max_rows": 0, "evaluation.every": 0, "evaluation.prompts": 1,
        "evaluation.noises": 1, "evaluation.final_prompts": 0, "evaluation.final_noises": 1, "output.grid_every": 0,
        "output.grid_prompts": 1, "output.checkpoint_every": 0, "output.keep_last": 1,
    }  # fmt: skip
    above_zero = ("rollout.shift", "advantage.clip", "optimizer.max_grad_norm", "model.lora_alpha")
    below_one = ("selection.alpha", "optimizer.ema_decay", "optimizer.betas.0", "optimizer.betas.1")
    for key, low in at_least.items():
        if not low <= (value := _lookup(c, key)) < float("inf"):
            yield key, value, f"must be at least {low}"
    for key in above_zero:
        if not 0 < (value := _lookup(c, key)) < float("inf"):
            yield key, value, "must be above 0"
    for key in below_one:
        if not 0 <= (value := _lookup(c, key)) < 1:
            yield key, value, "must lie in [0, 1)"
    if not 0 <= c.optimizer.final_share <= 1:
        yield "optimizer.final_share", c.optimizer.final_share, "must lie in [0, 1]"
    if not 0 < c.rollout.trained_share <= 1:
        yield "rollout.trained_share", c.rollout.trained_share, "must lie in (0, 1]"


def _check_rollout(c: Config) -> typing.Iterator[Problem]:
    r = c.rollout
    if r.scheme == "cps" and r.eta > 1:
        yield "rollout.eta", r.eta, "must lie in [0, 1] for scheme cps"
    if r.eta == 0:
        yield "rollout.eta", r.eta, "must be above 0: without noise there is nothing to reinforce"
    if r.plan == "window":
        if r.window_size > r.steps - 1:
            yield "rollout.window_size", r.window_size, f"must be at most rollout.steps - 1 = {r.steps - 1}"
    else:
        if not r.sde_steps or list(r.sde_steps) != sorted(set(r.sde_steps)):
            yield "rollout.sde_steps", list(r.sde_steps), "must name at least one step, rising, without repeats"
        if r.sde_steps and not 0 <= min(r.sde_steps) <= max(r.sde_steps) < r.steps - 1:
            yield (
                "rollout.sde_steps",
                list(r.sde_steps),
                f"must lie in 0 … {r.steps - 2} (rollout.steps = {r.steps}; the last step has no useful noise)",
            )
    if r.fork_velocity == "probe" and r.plan != "fork":
        yield "rollout.fork_velocity", r.fork_velocity, "needs rollout.plan = fork"
    if r.shared_noise and r.plan == "fork":
        yield (
            "rollout.shared_noise",
            r.shared_noise,
            "acts on plans trajectory and window; forks share their anchor anyway",
        )
    if (c.model.dtype == "fp64") != (r.storage == "fp64"):
        yield "rollout.storage", r.storage, "fp64 latents go with model.dtype = fp64, and only with it"


def _check_training(c: Config) -> typing.Iterator[Problem]:
    trained = c.rollout.window_size if c.rollout.plan == "window" else len(c.rollout.sde_steps)
    trained = max(1, round(trained * c.rollout.trained_share))
    if trained % c.train.steps_per_iteration:
        yield (
            "train.steps_per_iteration",
            c.train.steps_per_iteration,
            f"must divide the {trained} trained steps of an iteration",
        )
    if c.loss.old_logp == "rollout" and (c.rollout.plan != "fork" or c.rollout.fork_velocity != "fresh"):
        yield (
            "loss.old_logp",
            c.loss.old_logp,
            "log-probabilities stored by this plan come from another batch geometry than the update's, so the ratio would "
            "not start at 1: use recompute (or rollout.plan = fork with fork_velocity = fresh)",
        )
    if c.selection.candidates == 1 and c.selection.strategy not in ("closest", "random"):
        yield "selection.candidates", 1, f"strategy {c.selection.strategy} needs at least two candidates"


def _check_rewards(c: Config) -> typing.Iterator[Problem]:
    if not c.rewards:
        yield "rewards", "[]", "name at least one reward"
    for i, reward in enumerate(c.rewards):
        if not 0 < reward.weight < float("inf"):
            yield f"rewards.{i}.weight", reward.weight, "must be above 0"


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


def _build(cls: Any, data: dict[str, Any], source: str, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise InputError(f"{source}: unknown key {prefix}{key}{_hint(key, list(hints))}")
    values = {key: _convert(hints[key], value, source, prefix + key) for key, value in data.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, source: str, key: str) -> Any:
    def wrong(expected: str) -> InputError:
        return InputError(f"{source}: {key} = {value!r}: expected {expected}")

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise wrong("a table")
        return _build(hint, value, source, f"{key}.")
    if origin is Literal:
        if value not in args:
            raise InputError(f"{source}: {key} = {value!r}{_hint(str(value), list(args))}: one of {', '.join(args)}")
        return value
    if origin is tuple:
        fixed = len(args) if args[-1] is not Ellipsis else None
        if not isinstance(value, list) or (fixed and len(value) != fixed):
            raise wrong(f"a list of {fixed} values" if fixed else "a list")
        return tuple(_convert(args[0], item, source, f"{key}.{i}") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong("a table")
        return {k: _convert(args[1], v, source, f"{key}.{k}") for k, v in value.items()}
    if origin is types.UnionType:
        if not isinstance(value, args):
            raise wrong("a string, a number, true or false")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise wrong({int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[hint])
    return value


def _hint(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
