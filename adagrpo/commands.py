"""What the commands do, once their arguments are parsed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from .algorithm.sde import Stream
from .build import build_trainer, check_model, choose_device, load_data, load_plugins
from .config import Config
from .engine.plans import branch_plan, probe_plan, trajectory_plan
from .errors import InputError
from .evaluation import sample_images
from .fit import Fit
from .recipe import load_recipe
from .rewards import check_reward
from .run.checkpoint import INDEX
from .run.folder import RunFolder, next_free
from .run.grid import to_pil
from .run.report import write_report
from .train import Trainer


def train(config: Config, out: Path | None, resume: str | None) -> int:
    """Train a checked recipe to its end; returns the exit code."""
    run, checkpoint = _open_run(config, out, resume)
    trainer, held_out = build_trainer(config)
    if not (run.path / "manifest.json").exists():
        run.write_start(config, trainer.model.device, {"latent_shape": list(trainer.model.latent_shape)})
    tqdm.write(f"{config.name}: {config.train.iterations} iterations on {trainer.model.device}, run folder {run.path}")
    fit = Fit(trainer, run, held_out)
    if checkpoint is not None:
        fit.resume(checkpoint)
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
    trainer = load_trained(source, seed)
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(sample_images(trainer.executor, prompts, count, Stream.SAMPLE)):
        path = out / f"{i // count:03d}-{i % count:03d}.png"
        to_pil(image).save(path)
        print(path)
    return 0


def export(source: str, out: Path) -> int:
    """Write the trained model so that stock diffusers loads it, and say how."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: not an empty folder; name another one")
    out.mkdir(parents=True, exist_ok=True)
    print(load_trained(source).model.export(out))
    return 0


def load_trained(source: str, seed: int | None = None) -> Trainer:
    """The trainer behind a recipe, run or checkpoint, with its trained weights."""
    config, checkpoint = source_config(source)
    trainer, _ = build_trainer(with_seed(config, seed))
    if checkpoint is not None:
        trainer.model.load_portable(checkpoint)
    return trainer


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


def with_seed(config: Config, seed: int | None) -> Config:
    """The recipe with another seed; unchanged for None."""
    return config if seed is None else dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))


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
