"""What the commands do, once their arguments are parsed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .algorithm.sde import Stream
from .assembly import build_executor, build_table, dealt_slots, load_reward, own_noise_levels, require_groups, sampled_sizes
from .build import (
    build_architecture,
    build_model,
    build_trainer,
    check_engine,
    check_model,
    check_sizes,
    choose_device,
    load_data,
    load_plugins,
    load_source,
    try_buckets,
)
from .disk.files import replacing, write_json
from .disk.lock import OwnerLock, holding, holding_new
from .disk.whole import written_whole
from .engine.ranks import Ranks, joined
from .errors import InputError
from .estimate.counting import module_tensors, tensor_bytes
from .estimate.memory import MemoryPlan, size_text
from .estimate.nodes import Fabric, host_table
from .estimate.planning import modules_of
from .estimate.rehearsal import rehearse
from .estimate.roofline import H100
from .evaluate.fidelity import Fidelity, changed_levers, compare
from .evaluate.held_out import sample_images
from .evaluate.reward_fidelity import RewardFidelity, compare_rewards, rounded_rewards
from .forecast import iteration_prediction, planned_collectives, planned_evaluations, planned_memory
from .forward.backends import resolve_forward
from .models.base import FlowModel
from .parts.threads import threads_per_rank
from .prompts.checks import prompt_problem
from .prompts.digest import prompts_digest
from .prompts.sources import prompt_notes
from .recipe.derived import Derived
from .recipe.keys import Config, RewardConfig
from .recipe.layers import Recipe
from .recipe.load import read_recipe, to_toml
from .recipe.ranges import MOST_SEED
from .recipe.rules import check, repeats_notice
from .report.page import write_report
from .rewards import Reward, build_reward, check_reward_files
from .rewards.fetching import wanted_files
from .run.alike import require_alike, require_one_folder
from .run.checkpoint import INDEX, verify
from .run.ended import note_end
from .run.failing import accounted
from .run.fit import Fit
from .run.folder import RANKS, RunFolder
from .run.grid import to_pil
from .run.loggers import check_loggers
from .run.machine import code_versions
from .run.opening import begin, check_opening, opened_together
from .run.origin import Origin, recipe_file
from .text.user_text import require_within, shown

# What the driver leaves of 80 and 141 GB, about.
GPU_BYTES = {"H100 80 GB": int(78.5 * 2**30), "H200 141 GB": 139 * 2**30}


def train(config: Config, out: Path | None, resume: str | None, take_over: bool = False) -> int:
    """Train a checked recipe to its end, with all ranks that torchrun started; returns the exit code."""
    if threads := threads_per_rank():
        torch.set_num_threads(threads)
    with joined(choose_device(config.model.device), config.train.ranks_timeout, out and out.absolute() / RANKS) as ranks:
        dealt_slots(config, ranks)  # refused before any work
        with opened_together(ranks, config, out, resume, take_over) as (run, checkpoint), accounted(ranks, run):
            code = _train(config, run, checkpoint, ranks)
            if ranks.writes:
                note_end(run.path, code)
        ranks.most(0, "the closing of the run folder")
        return code


def _train(config: Config, run: RunFolder, checkpoint: Path | None, ranks: Ranks) -> int:
    """Train in a folder that is the first rank's own."""
    memory_plans: list[MemoryPlan] = []
    trainer, held_out = build_trainer(config, memory_plans.append, restored=checkpoint is not None, ranks=ranks)
    digest = prompts_digest(trainer.stream.prompts, held_out)
    backends = {
        "attention": attention_backend(trainer.model.transformer),
        "dtype": str(trainer.model.dtype),
        "forward": resolve_forward(config.engine.forward, trainer.model),
        "rollout_copy_bytes": trainer.executor.rollout.own_bytes,
    }
    began = {"prompts_sha256": digest}
    if (start := getattr(trainer.model, "start", None)) is not None:
        began["lora_from_sha256"] = start.sha256
    rewards = [{"name": reward.entry.name, **reward.provenance} for reward in trainer.score.rewards]
    extra: dict[str, Any] = {
        "latent_shape": list(trainer.model.latent_shape),
        "backends": backends,
        "rewards": rewards,
        **began,
    }
    extra |= {"ranks": ranks.size} if ranks.size > 1 else {}

    def enter() -> str:
        if run.continued and (checkpoint is not None or run.began_with(began)):
            run.check_prompts(digest, checkpoint)
            run.describe(trainer.model.device, extra)
            return ""
        return begin(run, config, trainer.model.device, extra)

    notice = ranks.told(enter, "the beginning of the run folder")
    where = f"{trainer.model.device}, {ranks.size} ranks" if ranks.size > 1 else f"{trainer.model.device}"
    if ranks.writes:
        tqdm.write(f"{config.name}: {config.train.iterations} iterations on {where}, run folder {run.path}")
    fit = Fit(config, trainer, run, held_out, memory_plan=memory_plans[0])
    require_one_folder(ranks, run.path)
    require_alike(ranks, {"code": code_versions(), "recipe": to_toml(config), "prompts": began, "model": fit.state.origin.base})
    if checkpoint is not None:
        fit.resume(checkpoint, verified=True)
    else:
        ranks.told(lambda: run.restore(0), "the records of the run")  # of a run that died before its first checkpoint
    fit.note_opening(notice)
    outcome = fit()
    if outcome.gain is not None and ranks.writes:
        print(outcome.gain)
    return outcome.exit_code


def dry_run(config: Config, out: Path | None = None, resume: str | None = None) -> int:
    """Check what can be checked without loading the model, and print what an iteration would cost."""
    check_engine(config)
    goes_on = out is not None and resume is not None and not RunFolder.never_saved(out)
    fetched = [wanted for i, r in enumerate(config.rewards) for wanted in wanted_files(r.name, r.kwargs, f"rewards.{i}")]
    for notice in (check_model(config.model, restored=goes_on), *fetched):
        if notice:
            print(f"note: {notice}")
    check_sizes(config)
    prompts, held_out = load_data(config)
    load_plugins(config)
    found = [check_reward_files(r.name, r.kwargs, f"rewards.{i}", r.dtype) for i, r in enumerate(config.rewards)]
    require_groups(config, found)
    check_loggers(config.output.loggers)
    if out is not None:
        check_opening(config, out, resume)
    print(f"{config.name}: {len(prompts)} training prompts, {len(held_out)} held-out prompts")
    d = Derived(config)
    new = d.unseen_iterations(len(prompts)) if d.looks_at_unseen else 0
    if new < config.train.iterations:
        print(f"evaluations per iteration: {_evaluations(config)}")
    if new:
        print(f"evaluations in each of the first {new}, whose candidates are looked at: {_evaluations(config, unseen=True)}")
    rows = d.rows_per_image
    guidance = f"an evaluation is of one image, {rows} rows of the transformer (model.guidance)" if rows > 1 else None
    for notice in (guidance, repeats_notice(config, len(prompts)), *prompt_notes(prompts, held_out)):
        if notice:
            print(f"note: {notice}")
    return 0


def _evaluations(config: Config, unseen: bool = False) -> str:
    return ", ".join(f"{phase} {n}" for phase, n in planned_evaluations(config, unseen=unseen).items())


def report(folders: Sequence[Path], out: Path | None) -> int:
    """Write report.html: into the run folder, or for several runs into the current folder."""
    path = write_report(folders, out or (folders[0] if len(folders) == 1 else Path()) / "report.html")
    print(path)
    return 0


def plan(config: Config, fabric: Fabric | None = None) -> int:
    """Print the memory plan and the predicted seconds of an iteration; nothing is downloaded, nothing is trained.

    Args:
        fabric: the ranks that train, of each of which the plan then is; None is one process.
    """
    fabric = fabric or Fabric()
    ranks = fabric.ranks
    evaluations = planned_evaluations(config, ranks=ranks)  # refuses slots that cannot be dealt
    model = build_architecture(config.model)
    try_buckets(config.model, model)
    for sampled in sampled_sizes(config):
        build_table(config, model, sampled)  # refuses what training would
    rehearsal = rehearse(model, "a prompt")
    memory = planned_memory(config, model, rehearsal, ranks=ranks)
    slots = Derived(config).slots
    whose = "for one GPU" if ranks == 1 else f"of each of {fabric}: {slots // ranks} of the {slots} slots of an iteration"
    print(f"{config.name}: memory plan {whose}\n\n{memory.table()}\n")
    for name, size in GPU_BYTES.items():
        try:
            memory.check(size, device=name)
            print(f"{name}: fits, {size_text(size - memory.peak)} to spare")
        except InputError as error:
            print(f"{name}: does not fit: {error}")
    if ranks > 1:
        print(f"\n{_several(config, model, memory, fabric, evaluations)}")
    if not isinstance(rehearsal, str):
        prediction = iteration_prediction(config, rehearsal, H100, ranks)
        print(f"\n{prediction.table()}")
        if ranks > 1:
            print(f"\n{fabric.table(planned_collectives(config, model, ranks), prediction)}")
    return 0


def _several(config: Config, model: FlowModel, memory: MemoryPlan, fabric: Fabric, evaluations: Mapping[str, int]) -> str:
    """What several ranks share, and what they do not."""
    e, each, ranks = config.evaluation, sum(evaluations.values()), fabric.ranks
    lines = []
    if config.model.tuning == "full":
        lines.append(
            "every rank holds all weights, masters, moments and gradients: full fine-tuning is not sharded, so that more ranks "
            "make none of it smaller\n"
        )
    if config.selection.pooled:
        lines.append(
            f"selection.probe = {config.selection.probe}: a pick may be another rank's; its latents and embeddings move too, "
            "which is not counted below\n"
        )
    trained = {id(p) for _, p in model.trainable()} if config.model.tuning == "lora" else set()
    modules = {"transformer": model.transformer, **modules_of(model)}.values()
    read = {id(t): t for module in modules for t in module_tensors(module) if id(t) not in trained}
    rewards = {entry.name: entry for entry in memory.entries if entry.name.startswith("reward ")}.values()
    offloaded = sum(entry.bytes for entry in rewards if "offloaded" in entry.why)
    lines.append(host_table(tensor_bytes(read.values()) + sum(r.bytes for r in rewards), offloaded, fabric.per_node))
    phases = ", ".join(f"{phase} {n}" for phase, n in evaluations.items())
    lines.append(f"\nevaluations of an iteration: {phases} on each rank, {ranks} x {each} = {ranks * each} in all")
    if e.every:
        pictures = e.prompts * e.noises
        lines.append(f"held-out evaluations: {-(-pictures // ranks)} of {pictures} pictures on each rank")
    return "\n".join(lines)


def sample(source: str, prompts: Sequence[str], count: int, seed: int | None, out: Path) -> int:
    """Write ``count`` PNG files per prompt into ``out``."""
    require_within("--count", count, 1, 10**5)
    if seed is not None:
        require_within("--seed", seed, 0, MOST_SEED)
    for prompt in prompts:
        if problem := prompt_problem(prompt):
            raise InputError(f"--prompt {shown(prompt)} {problem}")
    with holding(OwnerLock(out, "sample", f"--out {out}")):
        config, model = load_trained(source)
        executor = build_executor(config if seed is None else with_seed(config, seed), model)
        for i, image in enumerate(sample_images(executor, prompts, count, Stream.SAMPLE)):
            path = out / f"{i // count:03d}-{i % count:03d}.png"
            with replacing(path) as draft:
                to_pil(image).save(draft)
            print(path)
    return 0


FIDELITY = Path("runs") / "fidelity"


def fidelity(config: Config, checkpoint: Path | None, slots: int, out: Path | None) -> int:
    """Compare a checked recipe's rollouts with the policy's own, and its rewards in bf16 with themselves in fp32; exit code 1
    when they are not faithful enough."""
    require_within("--slots", slots, 1, 10**5)
    check_engine(config)
    levers, rounded = changed_levers(config), rounded_rewards(config)
    if not levers and not rounded:
        keys = "engine.precision, engine.forward, engine.attention, rollout.tail_steps, rollout.tail_share or rewards.N.dtype"
        raise InputError(f"{config.name}: its rollouts are the policy's own; set {keys}")
    prompts = load_source(config, config.data.prompts)
    rewards = [load_reward(config, i) for i in range(len(config.rewards))]
    model = load_model(config, checkpoint)
    found: list[Fidelity | RewardFidelity] = []
    record: dict[str, Any] = {"recipe": config.name}
    if levers:
        with tqdm(total=slots, unit="slot", disable=None) as bar:
            rollouts = compare(config, model, rewards, prompts, slots, lambda done: bar.update(done - bar.n))
        found, record = [rollouts], rollouts.as_json()
    if rounded:
        pairs = [(_in_fp32(config.rewards[i], f"rewards.{i}"), rewards[i]) for i in rounded]
        with tqdm(total=slots, unit="slot", disable=None) as bar:
            judged = compare_rewards(config, model, pairs, prompts, slots, lambda done: bar.update(done - bar.n))
        found, record = [*found, *judged], record | {"rewards": [reward.as_json() for reward in judged]}
    passed = all(one.passed for one in found)
    named = [*map(str, levers.values()), *["rewards-bf16"] * bool(rounded)]
    path = out or FIDELITY / f"{config.name}-{'-'.join(named)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record | {"passed": passed})
    print("\n\n".join(map(str, found)), path, sep="\n")
    return 0 if passed else 1


def _in_fp32(reward: RewardConfig, key: str) -> Reward:
    """The same reward in fp32."""
    return build_reward(reward.name, {name: v for name, v in reward.kwargs.items() if name != "dtype"}, key)


PROFILES = Path("profiles")


def profile(config: Config, recipe: Config, iterations: int, out: Path | None) -> int:
    """Record whole iterations of a checked recipe into a folder of profiles; ``recipe`` is what its file says."""
    from .bench.measure import pass_new_prompts
    from .profiling.summary import device_slug, write_profile

    require_within("--iterations", iterations, 1, 10**5)
    folder = out or PROFILES / device_slug(choose_device(config.model.device)) / config.name
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, overlap=False))
    with holding(OwnerLock(folder, "profile", f"--out {folder}")):
        trainer, _ = build_trainer(config)
        pass_new_prompts(trainer, config)
        print(write_profile(trainer, config, recipe, iterations, folder))
    print(folder)
    return 0


def export(source: str, out: Path) -> int:
    """Write the trained model so that stock diffusers loads it, and say how."""
    with holding_new(out, "export", str(out)):
        config, model = load_trained(source)
        with written_whole(out) as draft:
            call = model.export(draft, config.rollout.shift, config.rollout.steps)
        print(call.replace(f"/{draft.name}", ""))
    return 0


def load_trained(source: str) -> tuple[Config, FlowModel]:
    """Recipe and model behind a recipe, run or checkpoint, with its trained weights; neither prompts nor rewards are needed.

    Raises:
        InputError: no such source, a damaged checkpoint, or one of another base model.
    """
    recipe, checkpoint = source_recipe(source)
    if recipe.notice:
        print(f"note: {recipe.notice}", file=sys.stderr)
    config = recipe.config
    engine = dataclasses.replace(config.engine, fp8_attention=False, fp8_scaling="rowwise")
    check(dataclasses.replace(config, engine=engine))  # what rollouts are refused today, an older run may have had
    model: Any = load_model(config, checkpoint)
    if config.evaluation.guidance:
        model.guidance = config.evaluation.guidance
    return config, model


def load_model(config: Config, checkpoint: Path | None) -> FlowModel:
    """The recipe's model, with the weights of a checkpoint of it, whose files were checked.

    Raises:
        InputError: the checkpoint belongs to another base model.
    """
    model = build_model(config.model, restored=checkpoint is not None)
    if checkpoint is not None:
        say = lambda message: print(f"note: {message}", file=sys.stderr)  # noqa: E731
        levels = own_noise_levels(config, model)
        Origin(model, config.model.path, to_toml(config), False, levels, say).check(checkpoint)
        model.load_portable(checkpoint)
    return model


def source_recipe(source: str) -> tuple[Recipe, Path | None]:
    """Recipe and (sound) checkpoint behind a recipe name, TOML file, run folder or checkpoint folder.

    Of a run it is the newest sound one; what is skipped is said.

    Raises:
        InputError: none of these, a damaged checkpoint, or one without its recipe.
    """
    path = Path(source)
    if (path / INDEX).is_file():
        verify(path, state=False)
        return read_recipe(recipe_file(path)), path
    if (path / "config.toml").is_file():
        run = RunFolder(path)
        checkpoint = run.sound_checkpoint()
        for notice in run.notices:
            print(f"note: {notice}", file=sys.stderr)
        if checkpoint is None:
            print(f"note: {path} has no checkpoint yet: these are the initial weights", file=sys.stderr)
        return read_recipe(path / "config.toml"), checkpoint
    if path.is_dir():
        raise InputError(f"{source}: neither a run folder (config.toml) nor a checkpoint ({INDEX})")
    return read_recipe(source), None


def with_seed(config: Config, seed: int) -> Config:
    """The recipe with another seed."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))


def attention_backend(transformer: object) -> str:
    """Name of diffusers' attention backend in use; ``none`` for models without one."""
    for module in getattr(transformer, "modules", list)():
        processor = getattr(module, "processor", None)
        if processor is not None and hasattr(processor, "_attention_backend"):
            backend = processor._attention_backend
            return "default" if backend is None else str(getattr(backend, "value", backend))
    return "none"
