"""The command line: parse, build, run, close. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .arguments import configured, require_least, require_one_rank, whole_number, written_path
from .bench.command import add_bench
from .disk.files import remedy_for
from .errors import InputError, RunError, Stopped
from .parts.isolation import leave_if_hanging
from .recipe.load import annotated, read_recipe, recipe_names, recipe_title
from .recipe.ranges import MOST_SEED
from .run.ended import ENDED, ended_before
from .run.signals import leaving
from .serve.command import add_serve
from .text.redaction import redacted_arguments, scrubbed
from .text.user_text import character_problem, require_within, shown

EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130
RECIPE = "one that ships (`adagrpo recipes` lists them), or a TOML file"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done, 1 the run cannot go on or a test failed, 2 bad input, 3 stopped by a guard, 130 left by a second Ctrl-C; stopped by
    a signal (a run after saving): 128 plus its number, 129 SIGHUP, 130 SIGINT, 138 SIGUSR1, 143 SIGTERM.
    """
    code = _run(list(sys.argv[1:] if argv is None else argv))
    if argv is None:
        leave_if_hanging(code)
    return code


def _run(args: list[str]) -> int:
    debug = "--debug" in args
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal's encoding must not end a run that prints its result
            stream.reconfigure(errors="backslashreplace")
    try:
        for argument in args:
            if problem := character_problem(argument):
                raise InputError(f"argument {shown(argument)} {problem}")
        with leaving():
            code = _dispatch([a for a in args if a != "--debug"])
            sys.stdout.flush()
        return code
    except (InputError, RunError) as error:
        if debug:
            raise
        _complain(_one_line(str(error)))
        return EXIT_INPUT if isinstance(error, InputError) else EXIT_FAILED
    except OSError as error:
        if debug:
            raise
        _complain(f"{_one_line(str(error))}{remedy_for(error)}; what was complete on disk is intact")
        return EXIT_FAILED
    except RuntimeError as error:
        kernels = sys.modules.get("adagrpo_kernels")
        if debug or kernels is None or not isinstance(error, kernels.KernelError):
            raise
        remedy = "engine.kernels = auto or reference goes without it"
        _complain(f"{_one_line(str(error))}; {remedy}")
        return EXIT_FAILED
    except Stopped as stopped:
        _complain(f"stopped by {stopped.signal.name}; what was complete on disk is intact")
        return 128 + stopped.signal
    except KeyboardInterrupt:
        _complain("interrupted")
        return EXIT_INTERRUPTED


def _complain(line: str) -> None:
    """A line on standard error; where that takes no more, the exit code has to say it."""
    with contextlib.suppress(OSError, ValueError):
        several = os.environ.get("WORLD_SIZE", "1").strip() not in ("", "0", "1")
        who = f"adagrpo, rank {os.environ.get('RANK', '?')}" if several else "adagrpo"
        print(f"{who}: {scrubbed(line)}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # else the interpreter tries again as it ends, and changes the exit code
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(message: str) -> str:
    """The message on one line, control characters (of file names, keys, model output) made visible."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


def _dispatch(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="adagrpo", description="Online RL for text-to-image flow models, with a capability curriculum."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an input error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_fidelity(commands)
    _add_plan(commands)
    _add_profile(commands)
    _add_sample(commands)
    _add_export(commands)
    _add_report(commands)
    _add_tiny(commands)
    add_bench(commands)
    _add_doctor(commands)
    add_serve(commands)
    _add_recipes(commands)
    args, rest = parser.parse_known_args(argv)
    args.argv = redacted_arguments(argv)
    takes_keys = getattr(args, "recipe_keys", False)
    if rest and not takes_keys:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args.run(args, rest) if takes_keys else args.run(args)


def _add_train(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train",
        add_help=False,
        allow_abbrev=False,
        help="train a recipe",
        description="Train a recipe. Every key of it can be set as --section.key VALUE.",
        epilog="`adagrpo train RECIPE --help` lists every key of the recipe with its value.",
    )
    train.add_argument("recipe", nargs="?", help=RECIPE)
    train.add_argument("--out", type=written_path, help="run folder (default: runs/<recipe>-<first free number>)")
    train.add_argument("--resume", metavar="latest|auto|CHECKPOINT", help="continue the run in --out")
    train.add_argument(
        "--take-over", action="store_true", help="take the folder from an owner on another host that is silent for 5 minutes"
    )
    train.add_argument("--dry-run", action="store_true", help="check everything that can be checked, then stop")
    train.add_argument(
        "--print-config",
        action="store_true",
        help="print the whole recipe as TOML, and where each value comes from",
    )
    train.add_argument("-h", "--help", action="store_true", help="show this help")
    train.set_defaults(run=_train, parser=train, recipe_keys=True)


def _train(args: argparse.Namespace, overrides: list[str]) -> int:
    if args.recipe is None:
        args.parser.print_help()
        return 0 if args.help else EXIT_INPUT
    overrides = overrides + (["--help"] if args.help else [])
    recipe = configured(read_recipe(args.recipe), overrides, f"train {args.recipe}")
    if args.print_config:
        print(annotated(recipe), end="")
        return 0
    if not args.dry_run and (ended := ended_before(args.out)) is not None:
        if os.environ.get("RANK") == "0":
            _complain(f"the run in {args.out} ended on purpose, with {ended} ({ENDED} there): not started again")
        return ended
    from .commands import dry_run, train

    if args.dry_run:
        require_one_rank("train --dry-run")
        return dry_run(recipe.config, args.out, args.resume)
    return train(recipe.config, args.out, args.resume, args.take_over)


def _recipe_command(commands: argparse._SubParsersAction, name: str, does: str, description: str) -> argparse.ArgumentParser:
    """A command that takes the recipe's keys as options."""
    description = f"{description} Every key can be set as --section.key VALUE."
    command = commands.add_parser(name, allow_abbrev=False, help=does, description=description)
    command.set_defaults(recipe_keys=True)
    return command


def _add_recipes(commands: argparse._SubParsersAction) -> None:
    recipes = commands.add_parser(
        "recipes", help="list the recipes that ship", description="Print the recipes that ship, and what each is."
    )
    recipes.set_defaults(run=_recipes)


def _recipes(args: argparse.Namespace) -> int:
    require_one_rank("recipes")
    names = recipe_names()
    for name in names:
        print(f"{name:{max(map(len, names))}}  {recipe_title(name)}")
    return 0


def _add_plan(commands: argparse._SubParsersAction) -> None:
    plan = _recipe_command(
        commands,
        "plan",
        "memory plan and predicted seconds of a recipe, without its model",
        "Print what a recipe will hold in memory and at least take in time. Nothing is downloaded, no GPU is needed.",
    )
    plan.add_argument("recipe", help=RECIPE)
    plan.add_argument("--ranks", type=whole_number, default=1, help="ranks on each node, one per GPU (default: 1)")
    plan.add_argument("--nodes", type=whole_number, default=1, help="default: 1")
    plan.add_argument("--network", type=whole_number, help="GB/s that a node sends to others (default: 50, an assumption)")
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace, overrides: list[str]) -> int:
    recipe = configured(read_recipe(args.recipe), overrides, f"plan {args.recipe}")
    require_least(args, ranks=1, nodes=1, **({} if args.network is None else {"network": 1}))
    from .commands import plan
    from .estimate.nodes import Fabric, Figure

    fabric = Fabric(args.ranks, args.nodes)
    if args.network is not None:
        fabric = dataclasses.replace(fabric, between=Figure(args.network, "est", "--network"))
    return plan(recipe.config, fabric)


def _add_profile(commands: argparse._SubParsersAction) -> None:
    profile = _recipe_command(
        commands,
        "profile",
        "where an iteration's time, memory and energy go",
        "Run whole iterations of a recipe, one under the profiler and some undisturbed, and write what they took.",
    )
    profile.add_argument("recipe", help=RECIPE)
    profile.add_argument("--iterations", type=whole_number, default=3, help="timed iterations (default: 3)")
    profile.add_argument("--out", type=written_path, help="folder (default: profiles/<device>/<recipe>)")
    profile.set_defaults(run=_profile)


def _profile(args: argparse.Namespace, overrides: list[str]) -> int:
    recipe = read_recipe(args.recipe)
    changed = configured(recipe, overrides, f"profile {args.recipe}")
    require_one_rank("profile")
    from .commands import profile

    return profile(changed.config, recipe.config, args.iterations, args.out)


def _add_fidelity(commands: argparse._SubParsersAction) -> None:
    fidelity = _recipe_command(
        commands,
        "fidelity",
        "how faithful faster rollouts are to the policy's own, and rewards in bf16 to themselves in fp32",
        "Sample the same prompts and noise by the policy and under the recipe's engine and tail keys, and compare images, "
        "reward ranks and picks. Score the same groups by the recipe's bf16 rewards and by these in fp32, and compare both.",
    )
    fidelity.add_argument("source", help="recipe, run folder or checkpoint folder")
    fidelity.add_argument(
        "--slots", type=whole_number, default=20, help="prompts to pick, each among B candidates (default: 20)"
    )
    fidelity.add_argument("--out", type=written_path, help="report file (default: runs/fidelity/<recipe>-<levers>.json)")
    fidelity.set_defaults(run=_fidelity)


def _fidelity(args: argparse.Namespace, overrides: list[str]) -> int:
    require_one_rank("fidelity")
    from .commands import fidelity, source_recipe

    recipe, checkpoint = source_recipe(args.source)
    changed = configured(recipe, overrides, f"fidelity {args.source}")
    return fidelity(changed.config, checkpoint, args.slots, args.out)


def _add_sample(commands: argparse._SubParsersAction) -> None:
    sample = commands.add_parser("sample", help="sample images from a recipe's model, a run or a checkpoint")
    sample.add_argument("source", help="recipe, run folder or checkpoint folder")
    sample.add_argument("--prompt", action="append", required=True, help="may be given several times")
    sample.add_argument("--count", type=whole_number, default=1, help="images per prompt")
    sample.add_argument("--seed", type=whole_number, help="default: the recipe's")
    sample.add_argument("--out", type=written_path, default=Path("samples"), help="folder for the PNG files")
    sample.set_defaults(run=_sample)


def _sample(args: argparse.Namespace) -> int:
    require_one_rank("sample")
    from .commands import sample

    return sample(args.source, args.prompt, args.count, args.seed, args.out)


def _add_export(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser("export", help="write what stock diffusers loads: a pipeline folder, or a LoRA file")
    export.add_argument("source", help="run folder or checkpoint folder")
    export.add_argument("out", type=written_path, help="new folder")
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    require_one_rank("export")
    from .commands import export

    return export(args.source, args.out)


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser("report", help="one self-contained report.html of one or several runs")
    report.add_argument("folders", type=written_path, nargs="+", metavar="RUN", help="run folders")
    report.add_argument("--out", type=written_path, help="file to write (default: RUN/report.html)")
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from .commands import report

    return report(args.folders, args.out)


def _add_tiny(commands: argparse._SubParsersAction) -> None:
    tiny = commands.add_parser("tiny", help="the built-in world").add_subparsers(
        dest="tiny_command", required=True, metavar="COMMAND"
    )
    build = tiny.add_parser("build", help="train tiny-flux from scratch (about 12 minutes on 2 cores)")
    build.add_argument("out", type=written_path, help="new pipeline folder")
    build.add_argument("--seed", type=whole_number, default=0)
    build.set_defaults(run=_tiny)
    prompts = tiny.add_parser("prompts", help="print prompts with their category")
    prompts.add_argument("--mix", default="even", help="even, wide or dusty(SHARE), SHARE of it unlearnable (default: even)")
    prompts.add_argument("--held-out", action="store_true", help="the held-out prompts instead of a training mix")
    prompts.add_argument("--count", type=whole_number, default=20, help="how many (default: 20)")
    prompts.set_defaults(run=_tiny)
    score = tiny.add_parser("score", help="score PNG files against a prompt")
    score.add_argument("images", type=written_path, nargs="+")
    score.add_argument("--prompt", required=True)
    score.set_defaults(run=_tiny)


def _tiny(args: argparse.Namespace) -> int:
    require_one_rank("tiny")
    from .tiny import commands

    try:
        if args.tiny_command == "build":
            require_within("--seed", args.seed, 0, MOST_SEED)
            commands.build_command(args.out, args.seed)
        elif args.tiny_command == "prompts":
            require_within("--count", args.count, 1, 10**6)
            commands.prompts_command(args.mix, args.count, args.held_out)
        else:
            commands.score_command(args.images, args.prompt)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    return 0


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    doctor = commands.add_parser(
        "doctor", allow_abbrev=False, help="what this machine has, which backends run on it, and whether they are sound"
    )
    doctor.add_argument(
        "--self-test",
        action=argparse.BooleanOptionalAction,
        help="also prove kernels and forwards, in about two minutes (default: on CUDA); exit code 1 if one fails",
    )
    doctor.add_argument("--all", action="store_true", help="self-test: torch.compile on a CPU too, no time limit")
    doctor.add_argument(
        "--recipe",
        help="can this machine train it? Files, packages, memory, disk, each reward on two pictures, two iterations; keys of "
        "the recipe can be set as --section.key VALUE; exit code 1 if something fails",
    )
    doctor.set_defaults(run=_doctor, parser=doctor, recipe_keys=True)


def _doctor(args: argparse.Namespace, overrides: list[str]) -> int:
    from .doctor.command import doctor, doctor_recipe

    if args.recipe is None:
        if overrides:
            args.parser.error(f"unrecognized arguments: {' '.join(overrides)}")
        return doctor(args.self_test, args.all)
    require_one_rank("doctor")
    return doctor_recipe(configured(read_recipe(args.recipe), overrides, f"doctor --recipe {args.recipe}").config)
