"""From a recipe to live objects; everything that can be refused is refused here, before any long work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from adagrpo_kernels._dispatch import device_problem
from torch import Tensor

from .algorithm.selection import CapabilityState
from .assembly import (
    build_course,
    build_executor,
    build_fusion,
    build_judge,
    build_objective,
    build_optimizer,
    build_sampler,
    load_reward,
    own_noise_levels,
    place_rewards,
    replaced_levels,
    require_groups,
)
from .curriculum.judge import Curriculum
from .curriculum.picks import Strategy
from .curriculum.prober import Prober
from .engine.fusion import Fuse
from .engine.notices import Notices
from .engine.ranks import Ranks, local_rank, world_size
from .engine.scoring import Scorer
from .errors import InputError, RunError
from .estimate.memory import MemoryPlan, free_bytes
from .estimate.rehearsal import rehearse
from .forecast import planned_memory
from .forward.backends import require_backends
from .models.base import FlowModel
from .models.fingerprint import base_components
from .models.isolated import isolated_model
from .models.loading import check_finite
from .models.making import load_policy, meta_policy
from .models.pipeline import Source, check_pipeline
from .models.policy import Policy, Settings, add_lora
from .models.registry import FAMILIES
from .models.starting import find_file, start_from
from .parts.plugins import checked, is_import_path, load_callable, make_part
from .prompts.reading import Reading
from .prompts.sources import load_prompts, prompt_notes, require_disjoint
from .prompts.stream import PromptStream
from .recipe.derived import DTYPES, Derived
from .recipe.keys import BUILT_IN_MODEL, BUILT_IN_MODELS, Config, ModelConfig, bucket_size
from .recipe.rules import check
from .rewards import Reward, check_prompts
from .tiny import tiny_flux_path
from .train import Trainer


def choose_device(name: str) -> torch.device:
    """The device of ``model.device``; ``auto`` is CUDA where there is one. Of several CUDA devices a rank has the one of its
    number on its machine.

    Raises:
        InputError: not a device, or CUDA asked for where there is none, or not one for every rank.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if world_size() == 1:
            return torch.device(name)
    device = _device("model.device", name)
    if device.type == "cuda" and world_size() > 1:
        if device.index is not None:
            raise InputError(f"model.device = {name}: every rank would take it; use auto, or cuda")
        device = _device("LOCAL_RANK", f"cuda:{local_rank()}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _device(key: str, name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"{key} = {name}: not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda", "meta"):
        raise InputError(f"{key} = {name}: not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"{key} = {name}: no CUDA device here; use {'auto or ' * (key == 'model.device')}cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"{key} = {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def check_model(config: ModelConfig, restored: bool = False) -> str | None:
    """Refuse a model that cannot be loaded, without reading its weights; the file of ``model.lora_from`` is read, and held
    against the transformer where that is known here, unless adapters of a checkpoint follow (``restored``). Returns what to
    tell, such as what could not be checked."""
    if is_import_path(config.family):
        load_callable(config.family, "model.family", 5, config.kwargs)
        return None
    source = Source(config.path, config.variant, config.revision)
    local = config.path in BUILT_IN_MODELS or check_pipeline(FAMILIES[config.family], source)
    fetch = f"hf download {config.path}{f' --revision {config.revision}' if config.revision else ''}"
    unchecked = "" if local else f"model.path = {config.path}: its files are checked once they are downloaded ({fetch})"
    if config.lora_from and not restored:
        find_file(Path(config.lora_from), f"model.lora_from = {config.lora_from}")
        if local or config.path in FAMILIES[config.family].architectures:
            start = getattr(build_architecture(config), "start", None)
            return "; ".join(filter(None, (unchecked, start and start.notice)))
        unchecked = f"{unchecked}, and model.lora_from against them"
    return unchecked or None


def check_sizes(config: Config) -> None:
    """Refuse picture sizes and noise levels that the model of a folder does not have, without loading it.

    Raises:
        InputError: naming the size, or what its scheduler does not say.
    """
    m = config.model
    if m.family in FAMILIES and Path(_model_path(m)).is_dir():
        model = build_architecture(dataclasses.replace(m, tuning="full", lora_from=""))
        try_buckets(m, model)
        own_noise_levels(config, model)


def try_buckets(config: ModelConfig, model: FlowModel) -> None:
    """Refuse buckets that a model cannot sample; it is left at the size of evaluations.

    Raises:
        InputError: naming the bucket.
    """
    for bucket in config.buckets:
        try:
            model.resize(*bucket_size(bucket))
        except InputError as error:
            raise InputError(f"model.buckets: {error}") from error
    if config.buckets:
        model.resize(config.height, config.width)


def check_engine(config: Config) -> None:
    """Refuse ``engine`` keys that cannot run on the recipe's device, without loading the model."""
    e, device = config.engine, choose_device(config.model.device)
    require_backends(device, e.forward, e.precision == "fp8", e.attention)
    for i, reward in enumerate(config.rewards):
        if reward.device:
            _device(f"rewards.{i}.device", reward.device)
    if e.kernels != "triton":
        return
    problem = device_problem({device.type})
    if config.rollout.storage == "fp64":
        problem = "the kernels do not store fp64 latents"
    if problem:
        raise InputError(f"engine.kernels = triton: {problem}; or use auto or reference")


def build_model(config: ModelConfig, restored: bool = False) -> FlowModel:
    """Load the policy and mark what is trained.

    Args:
        restored: adapters of a checkpoint follow, so that the file of ``model.lora_from`` is not needed.

    Raises:
        InputError: it cannot be loaded, or is not what its files promise, or holds values that are not finite.
    """
    if is_import_path(config.family):
        device = choose_device(config.device)
        given = (config.path, DTYPES[config.dtype], device, config.height, config.width)
        made = isolated_model(make_part(config.family, "model.family", given, config.kwargs), f"model.family = {config.family}")
        check_finite(base_components(made), f"model.family = {config.family}")
        return made
    config = dataclasses.replace(config, lora_from="") if restored else config
    torch.manual_seed(0)  # initial LoRA weights are part of the recipe
    source = Source(_model_path(config), config.variant, config.revision)
    return _prepared(load_policy(FAMILIES[config.family], source, _settings(config, choose_device(config.device))), config)


def build_architecture(config: ModelConfig) -> FlowModel:
    """The policy on the meta device, as ``build_model`` would load it; an adapter named by import path is loaded.

    Raises:
        InputError: an architecture that is not known here.
    """
    if is_import_path(config.family):
        return build_model(config)
    return _prepared(meta_policy(FAMILIES[config.family], _model_path(config), _settings(config, torch.device("meta"))), config)


def _model_path(config: ModelConfig) -> str:
    return str(tiny_flux_path()) if config.path == BUILT_IN_MODEL else config.path


def _settings(config: ModelConfig, device: torch.device) -> Settings:
    c = config
    sizes = (c.height, c.width, c.max_text_tokens)
    return Settings(DTYPES[c.dtype], device, *sizes, c.guidance, c.negative_prompt, c.prompt_cache)


def _prepared(model: Policy, config: ModelConfig) -> Policy:
    """Timestep, adapters and checkpointing as the recipe wants them."""
    model.timestep_rounding = config.timestep
    if config.tuning == "lora":
        add_lora(model.transformer, config.lora_rank, config.lora_alpha, config.lora_targets)
        model.start = start_from(model.family, model.transformer, config.lora_from) if config.lora_from else None
    if config.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
    return model


def build_trainer(
    config: Config,
    planned: Callable[[MemoryPlan], object] | None = None,
    model: FlowModel | None = None,
    restored: bool = False,
    ranks: Ranks | None = None,
) -> tuple[Trainer, Sequence[str]]:
    """A trainer at its initial weights, and the held-out prompts.

    Args:
        planned: receives the memory plan, once it is known to fit and before anything is allocated for training.
        model: trained instead of a newly loaded one.
        restored: see ``build_model``.
        ranks: who else trains; None is nobody.

    Raises:
        InputError: anything wrong with the recipe or what it names, or a training state that cannot fit.
    """
    check(config)
    check_engine(config)
    prompts, held_out = load_data(config)
    own = load_plugins(config)
    rewards = [load_reward(config, i) for i in range(len(config.rewards))]
    require_groups(config, rewards)
    if model is None:
        if config.model.buckets or config.rollout.shift == "model":
            check_sizes(config)
        model = build_model(config.model, restored)
    try_buckets(config.model, model)
    if planned is not None or model.device.type == "cuda":
        plan = planned_memory(
            config, model, rehearse(model, prompts[0]), rewards, len(prompts), len(held_out), ranks.size if ranks else 1
        )
        plan.check(free_bytes(model.device), device=str(model.device))
        plan.check_elsewhere(free_bytes)
        if planned is not None:
            planned(plan)
    trainer = assemble(config, model, rewards, prompts, own, ranks)
    for note in prompt_notes(prompts, held_out):
        trainer.notices(note)
    return trainer, held_out


def assemble(
    config: Config,
    model: FlowModel,
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    own: Own | None = None,
    ranks: Ranks | None = None,
) -> Trainer:
    """A trainer of a checked recipe from what is loaded.

    Args:
        rewards: one per entry of ``config.rewards``.
        prompts: the training prompts.
        own: the user's selection and advantage.
        ranks: who else trains; None is nobody.

    Raises:
        InputError: this machine cannot run what the recipe's ``engine`` keys ask for, or the model says no noise levels.
    """
    own, ranks = own or Own(), ranks or Ranks()
    notices = Notices(print if ranks.writes else lambda message: None)
    if (start := getattr(model, "start", None)) and start.notice:
        notices(start.notice)
    executor = build_executor(config, model, rollouts=True, say=notices)
    if replaced := replaced_levels(config, model):
        notices(replaced)
    score = Scorer(executor, place_rewards(config, rewards))
    if config.engine.overlap and model.device.type == "cuda":
        score.stream = torch.cuda.Stream(model.device)
    weights = torch.tensor([reward.weight for reward in config.rewards], device=model.device)
    prober = Prober(executor, score, weights, config.selection.alpha, Derived(config).forks)
    return Trainer(
        build_course(config, ranks),
        executor,
        score,
        Curriculum(
            build_judge(config, own.select),
            build_judge(config, own.select, unseen=True),
            prober,
            config.selection.capability == "per_slot",
        ),
        build_sampler(config, ranks),
        build_fusion(config, weights, executor.impl, own.fuse),
        build_objective(config),
        build_optimizer(config, model, ranks),
        PromptStream(prompts, config.train.seed),
        notices,
    )


def load_source(config: Config, source: str | Sequence[str], key: str = "data.prompts") -> Sequence[str]:
    """The prompts of a source (``load_prompts``), read as the recipe says.

    Args:
        key: of the recipe, for messages; ``data.held_out`` has a field of its own.
    """
    data = config.data
    field = (data.held_out_field if key == "data.held_out" else "") or data.field
    reading = Reading(field, data.duplicates, data.broken, data.held_out_share)
    return load_prompts(source, key, reading, data.kwargs, config.train.part_timeout)


def load_data(config: Config) -> tuple[Sequence[str], Sequence[str]]:
    """Training and held-out prompts.

    Raises:
        InputError: a source that cannot be meant, prompts in both, or prompts that one of its rewards cannot score.
    """
    data = config.data
    prompts = load_source(config, data.prompts, "data.prompts")
    held_out = load_source(config, data.held_out, "data.held_out")
    if not data.allow_overlap:
        require_disjoint(prompts, held_out, data.prompts, data.held_out)
    for i, reward in enumerate(config.rewards):
        for asked in (prompts, held_out):
            check_prompts(reward.name, reward.kwargs, asked, f"rewards.{i}")
    return prompts, held_out


@dataclasses.dataclass(frozen=True)
class Own:
    """The user's selection strategy and advantage function; None for built-in ones."""

    select: Strategy | None = None
    fuse: Fuse | None = None


def load_plugins(config: Config) -> Own:
    """What the recipe names by import path."""
    select = fuse = None
    s, a, timeout = config.selection, config.advantage, config.train.part_timeout
    if is_import_path(s.strategy):
        select = _selection(load_callable(s.strategy, "selection.strategy", 2, s.kwargs, timeout))
    if is_import_path(a.function):
        fuse = _advantage(load_callable(a.function, "advantage.function", 3, a.kwargs, timeout))
    return Own(select, fuse)


def _advantage(fused: Fuse) -> Fuse:
    """``fused``, the shape of whose result is checked."""

    def fuse(rewards: Tensor, level: CapabilityState, weights: Tensor) -> Tensor:
        found = checked(fused(rewards, level, weights), rewards.shape[1:], "advantage.function", "one advantage per sample")
        return found.to(rewards)

    return fuse


def _selection(chosen: Strategy) -> Strategy:
    """``chosen``, whose picks are read once: one that names no candidate would train another slot's."""

    def select(scores: Tensor, state: CapabilityState) -> Tensor:
        found = checked(chosen(scores, state), scores.shape[1:2], "selection.strategy", "one index per slot", whole=True)
        picks, last = found.to(scores.device, torch.int64), scores.shape[2] - 1
        if bool(((picks < -1) | (picks > last)).any()):
            raise RunError(f"selection.strategy returned {picks.tolist()}; candidates are 0 to {last}, and -1 is none")
        return picks

    return select
