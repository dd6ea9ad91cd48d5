"""What the commands do, once their arguments are parsed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from .algorithm.sde import Stream
from .build import build_model, build_trainer, check_model, choose_device, load_data, load_plugins
from .config import Config
from .engine.plans import branch_plan, probe_plan, trajectory_plan
from .errors import InputError
from .evaluation import sample_images
from .fit import Fit
from .models.base import FlowModel
from .recipe import check, load_recipe
from .rewards import check_reward
from .run.checkpoint import INDEX, verify
from .run.folder import RunFolder, next_free, prompts_digest
from .run.grid import to_pil
from .run.loggers import check_loggers
from .run.report import write_report
from .train import build_executor


def train(config: Config, out: Path | None, resume: str | None) -> int:
    """Train a checked recipe to its end; returns the exit code."""
    run, checkpoint = _open_run(config, out, resume)
    trainer, held_out = build_trainer(config)
    digest = prompts_digest(trainer.stream.prompts, held_out)
    if (run.path / "config.toml").exists():
        run.check_prompts(digest)
    else:
        backends = {"attention": attention_backend(trainer.model.transformer), "dtype": str(trainer.model.dtype)}
        extra = {"latent_shape": list(trainer.model.latent_shape), "backends": backends, "prompts_sha256": digest}
        run.write_start(config, trainer.model.device, extra)
    tqdm.write(f"{config.name}: {config.train.iterations} iterations on {trainer.model.device}, run folder {run.path}")
    fit = Fit(trainer, run, held_out)
    if checkpoint is not None:
        fit.resume(checkpoint)
    else:
        run.truncate_metrics(0)  # of a run that died before its first checkpoint
    outcome = fit()
    if outcome.gain is not None:
        print(outcome.gain)
    return outcome.exit_code


def dry_run(config: Config, out: Path | None = None) -> int:
    """Check what can be checked without loading the model, and print what an iteration would cost."""
    choose_device(config.model.device)
    check_model(config.model)
    prompts, held_out = load_data(config)
    load_plugins(config)
    for i, reward in enumerate(config.rewards):
        check_reward(reward.name, reward.kwargs, f"rewards.{i}")
    check_loggers(config.output.loggers)
    if out is not None:
        RunFolder.check_fresh(out)
    counts = planned_evaluations(config)
    print(f"{config.name}: {len(prompts)} training prompts, {len(held_out)} held-out prompts")
    print("evaluations per iteration: " + ", ".join(f"{phase} {n}" for phase, n in counts.items()))
    return 0


def report(folders: Sequence[Path], out: Path | None) -> int:
    """Write report.html: into the run folder, or for several runs into the current folder."""
    path = write_report(folders, out or (folders[0] if len(folders) == 1 else Path()) / "report.html")
    print(path)
    return 0


def planned_evaluations(config: Config) -> dict[str, int]:
    """Transformer image-forwards of one iteration by phase, from the plans alone."""
    r, slots = config.rollout, config.train.slots * config.train.accumulation
    candidates = slots * config.selection.candidates
    if r.plan == "fork":
        forks = max(1, round(len(r.sde_steps) * r.trained_share))
        counts = {"probe": probe_plan(range(candidates), r.steps).evaluations()}
        if r.fork_velocity == "fresh":
            counts["prefix"] = slots * forks
        counts["rollout"] = branch_plan(slots, r.sde_steps, r.group_size, r.steps).evaluations()
        return {**counts, "update": slots * forks}
    stochastic = r.window_size if r.plan == "window" else len(r.sde_steps)
    transitions = slots * r.group_size * max(1, round(stochastic * r.trained_share))
    probing = config.selection.candidates > 1 or config.advantage.weight > 0
    counts = {"probe": candidates * r.steps} if probing else {}
    counts["rollout"] = trajectory_plan(slots, r.group_size, r.steps, (), ()).evaluations()
    if config.loss.old_logp == "recompute":
        counts["recompute"] = transitions
    return {**counts, "update": transitions}


def sample(source: str, prompts: Sequence[str], count: int, seed: int | None, out: Path) -> int:
    """Write ``count`` PNG files per prompt into ``out``."""
    if count < 1:
        raise InputError(f"--count {count}: must be at least 1")
    config, model = load_trained(source)
    executor = build_executor(config if seed is None else with_seed(config, seed), model)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be created: {error.strerror}") from error
    for i, image in enumerate(sample_images(executor, prompts, count, Stream.SAMPLE)):
        path = out / f"{i // count:03d}-{i % count:03d}.png"
        to_pil(image).save(path)
        print(path)
    return 0


def export(source: str, out: Path) -> int:
    """Write the trained model so that stock diffusers loads it, and say how."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: not an empty folder; name another one")
    config, model = load_trained(source)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be created: {error.strerror}") from error
    print(model.export(out, config.rollout.shift))
    return 0


def load_trained(source: str) -> tuple[Config, FlowModel]:
    """Recipe and model behind a recipe, run or checkpoint, with its trained weights; neither prompts nor rewards are needed.

    Raises:
        InputError: no such source, or a damaged checkpoint.
    """
    config, checkpoint = source_config(source)
    check(config)
    if checkpoint is not None:
        verify(checkpoint)
    model = build_model(config.model)
    if checkpoint is not None:
        model.load_portable(checkpoint)
    return config, model


def source_config(source: str) -> tuple[Config, Path | None]:
    """Recipe and checkpoint behind a recipe name, TOML file, run folder or checkpoint folder.

    Raises:
        InputError: none of these.
    """
    path = Path(source)
    if (path / INDEX).is_file():
        return load_recipe(path.parent.parent / "config.toml"), path
    if (path / "config.toml").is_file():
        return load_recipe(path / "config.toml"), RunFolder(path).latest_checkpoint()
    if path.is_dir():
        raise InputError(f"{source}: neither a run folder (config.toml) nor a checkpoint ({INDEX})")
    return load_recipe(source), None


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


def _open_run(config: Config, out: Path | None, resume: str | None) -> tuple[RunFolder, Path | None]:
    """The run folder and the checkpoint to continue from."""
    if resume is None:
        return RunFolder.fresh(out or next_free(Path("runs"), config.name)), None
    if out is None:
        raise InputError(f"--resume {resume}: name the run folder with --out")
    if resume == "auto" and not (out / "config.toml").exists():
        return RunFolder.fresh(out), None
    run = RunFolder.existing(out, config)
    checkpoint = run.latest_checkpoint() if resume in ("latest", "auto") else Path(resume)
    if checkpoint is None and resume == "latest":
        raise InputError(f"--resume latest: {run.checkpoints} holds no complete checkpoint")
    return run, checkpoint
