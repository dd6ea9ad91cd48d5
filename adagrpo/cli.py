"""The command line: parse, build, run, close. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .disk.files import remedy_for
from .errors import InputError, RunError, Stopped
from .parts.isolation import leave_if_hanging
from .recipe.keys import Config
from .recipe.layers import Recipe
from .recipe.load import annotated, read_recipe, recipe_names
from .recipe.rules import MOST_SEED
from .run.signals import leaving
from .text.redaction import redacted, redacted_arguments, restored, scrubbed
from .text.user_text import character_problem, require_within, shown

EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130


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
        print(f"adagrpo: {scrubbed(line)}", file=sys.stderr, flush=True)
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
    _add_bench(commands)
    _add_doctor(commands)
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
    train.add_argument("recipe", nargs="?", help=f"{', '.join(recipe_names())}, or a TOML file")
    train.add_argument("--out", type=_path, help="run folder (default: runs/<recipe>-<first free number>)")
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
    recipe = _configured(read_recipe(args.recipe), overrides, f"train {args.recipe}")
    if args.print_config:
        print(annotated(recipe), end="")
        return 0
    _one_rank("train")
    from .commands import dry_run, train

    if args.dry_run:
        return dry_run(recipe.config, args.out, args.resume)
    return train(recipe.config, args.out, args.resume, args.take_over)


def _one_rank(command: str) -> None:
    """Refuse to be one of several ranks: each would do the whole work."""
    size = os.environ.get("WORLD_SIZE", "1").strip()
    if size not in ("", "0", "1"):
        raise InputError(
            f"WORLD_SIZE = {size}: adagrpo {command} runs on one GPU, several ranks are not supported yet; start it as one "
            "process, without torchrun, or unset WORLD_SIZE"
        )


def _path(text: str) -> Path:
    """A path of the command line, meant as it is written."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    if text.startswith("~"):
        raise argparse.ArgumentTypeError(f"the shell left ~ as it is: write the whole path, or ./{text} for a folder named ~")
    return Path(text)


def _whole(text: str) -> int:
    """A whole number of the command line."""
    try:
        return int(text)
    except ValueError as error:  # also of more digits than Python reads
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number") from error


def _recipe_command(commands: argparse._SubParsersAction, name: str, does: str, description: str) -> argparse.ArgumentParser:
    """A command that takes the recipe's keys as options."""
    description = f"{description} Every key can be set as --section.key VALUE."
    command = commands.add_parser(name, allow_abbrev=False, help=does, description=description)
    command.set_defaults(recipe_keys=True)
    return command


def _add_plan(commands: argparse._SubParsersAction) -> None:
    plan = _recipe_command(
        commands,
        "plan",
        "memory plan and predicted seconds of a recipe, without its model",
        "Print what a recipe will hold in memory and at least take in time. Nothing is downloaded, no GPU is needed.",
    )
    plan.add_argument("recipe", help=f"{', '.join(recipe_names())}, or a TOML file")
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace, overrides: list[str]) -> int:
    recipe = _configured(read_recipe(args.recipe), overrides, f"plan {args.recipe}")
    from .commands import plan

    return plan(recipe.config)


def _add_profile(commands: argparse._SubParsersAction) -> None:
    profile = _recipe_command(
        commands,
        "profile",
        "where an iteration's time, memory and energy go",
        "Run whole iterations of a recipe, one under the profiler and some undisturbed, and write what they took.",
    )
    profile.add_argument("recipe", help=f"{', '.join(recipe_names())}, or a TOML file")
    profile.add_argument("--iterations", type=_whole, default=3, help="timed iterations (default: 3)")
    profile.add_argument("--out", type=_path, help="folder (default: profiles/<device>/<recipe>)")
    profile.set_defaults(run=_profile)


def _profile(args: argparse.Namespace, overrides: list[str]) -> int:
    recipe = read_recipe(args.recipe)
    changed = _configured(recipe, overrides, f"profile {args.recipe}")
    _one_rank("profile")
    from .commands import profile

    return profile(changed.config, recipe.config, args.iterations, args.out)


def _configured(recipe: Recipe, overrides: list[str], command: str) -> Recipe:
    """The recipe under --section.key VALUE, checked; says which inherited keys do not apply.

    tyro prints help and errors, nearest option included, and exits with code 2.
    """
    if overrides:
        import tyro

        default = redacted(recipe.config)  # its help prints the values
        config = restored(tyro.cli(Config, default=default, args=overrides, prog=f"adagrpo {command}"), recipe.config)
        recipe = recipe.overridden(config, overrides)
    if recipe.notice:
        print(f"note: {recipe.notice}", file=sys.stderr)
    recipe.check()
    return recipe


def _add_fidelity(commands: argparse._SubParsersAction) -> None:
    fidelity = _recipe_command(
        commands,
        "fidelity",
        "how faithful faster rollouts are to the policy's own",
        "Sample the same prompts and noise by the policy and under the recipe's engine and tail keys, and compare images, "
        "reward ranks and picks.",
    )
    fidelity.add_argument("source", help="recipe, run folder or checkpoint folder")
    fidelity.add_argument("--slots", type=_whole, default=20, help="prompts to pick, each among B candidates (default: 20)")
    fidelity.add_argument("--out", type=_path, help="report file (default: runs/fidelity/<recipe>-<levers>.json)")
    fidelity.set_defaults(run=_fidelity)


def _fidelity(args: argparse.Namespace, overrides: list[str]) -> int:
    _one_rank("fidelity")
    from .commands import fidelity, source_recipe

    recipe, checkpoint = source_recipe(args.source)
    changed = _configured(recipe, overrides, f"fidelity {args.source}")
    return fidelity(changed.config, checkpoint, args.slots, args.out)


def _add_sample(commands: argparse._SubParsersAction) -> None:
    sample = commands.add_parser("sample", help="sample images from a recipe's model, a run or a checkpoint")
    sample.add_argument("source", help="recipe, run folder or checkpoint folder")
    sample.add_argument("--prompt", action="append", required=True, help="may be given several times")
    sample.add_argument("--count", type=_whole, default=1, help="images per prompt")
    sample.add_argument("--seed", type=_whole, help="default: the recipe's")
    sample.add_argument("--out", type=_path, default=Path("samples"), help="folder for the PNG files")
    sample.set_defaults(run=_sample)


def _sample(args: argparse.Namespace) -> int:
    _one_rank("sample")
    from .commands import sample

    return sample(args.source, args.prompt, args.count, args.seed, args.out)


def _add_export(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser("export", help="write what stock diffusers loads: a pipeline folder, or a LoRA file")
    export.add_argument("source", help="run folder or checkpoint folder")
    export.add_argument("out", type=_path, help="new folder")
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    _one_rank("export")
    from .commands import export

    return export(args.source, args.out)


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser("report", help="one self-contained report.html of one or several runs")
    report.add_argument("folders", type=_path, nargs="+", metavar="RUN", help="run folders")
    report.add_argument("--out", type=_path, help="file to write (default: RUN/report.html)")
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from .commands import report

    return report(args.folders, args.out)


def _add_tiny(commands: argparse._SubParsersAction) -> None:
    tiny = commands.add_parser("tiny", help="the built-in world").add_subparsers(
        dest="tiny_command", required=True, metavar="COMMAND"
    )
    build = tiny.add_parser("build", help="train tiny-flux from scratch (about 12 minutes on 2 cores)")
    build.add_argument("out", type=_path, help="new pipeline folder")
    build.add_argument("--seed", type=_whole, default=0)
    build.set_defaults(run=_tiny)
    prompts = tiny.add_parser("prompts", help="print prompts with their category")
    prompts.add_argument("--mix", choices=("even", "wide"), default="even")
    prompts.add_argument("--held-out", action="store_true", help="the held-out prompts instead of a training mix")
    prompts.add_argument("--count", type=_whole, default=20, help="how many (default: 20)")
    prompts.set_defaults(run=_tiny)
    score = tiny.add_parser("score", help="score PNG files against a prompt")
    score.add_argument("images", type=_path, nargs="+")
    score.add_argument("--prompt", required=True)
    score.set_defaults(run=_tiny)


def _tiny(args: argparse.Namespace) -> int:
    _one_rank("tiny")
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
    doctor = commands.add_parser("doctor", help="what this machine has, which backends run on it, and whether they are sound")
    doctor.add_argument(
        "--self-test",
        action=argparse.BooleanOptionalAction,
        help="also prove kernels and forwards, in about two minutes (default: on CUDA); exit code 1 if one fails",
    )
    doctor.add_argument("--all", action="store_true", help="self-test: torch.compile on a CPU too, no time limit")
    doctor.set_defaults(run=_doctor)


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser("bench", help="measure this machine").add_subparsers(
        dest="bench_command", required=True, metavar="COMMAND"
    )
    for name, does in (
        ("iteration", "seconds by phase, throughput, FLOPs, energy, memory"),
        ("budget", "what selection and fusion cost; exit code 1 above the recipe's budget"),
        ("baseline", "against a plain loop over the published algorithm, which decodes image by image"),
    ):
        measuring = _bench_parser(bench, name, does, f"Measure: {does}.", _bench_recipe)
        measuring.add_argument(
            "--iterations", "--rounds", type=_whole, default=6, dest="rounds", help="measured rounds (default: 6)"
        )
        if name == "budget":
            measuring.add_argument(
                "--probes", help="measure and gate these probes, no host plans; `bench probes --help` names them"
            )
        if name == "iteration":
            measuring.add_argument("--peak", type=float, default=0.0, metavar="TFLOPS", help="peak that utilisation refers to")
    known = "known: full, short-4, short-2, racing, pool-3, pool-2, memory, memory-2, memory+pool, random"
    seeds = _bench_parser(
        bench,
        "seeds",
        "end reward of several probes over seeds, with paired intervals",
        "Train every probe on every mix of prompts from every seed, and compare the end rewards.",
        _bench_seeds,
    )
    seeds.add_argument(
        "--probes", default="full,memory", help=f"the others are compared with the first (default: full,memory); {known}"
    )
    seeds.add_argument("--mixes", help="sources of prompts (default: the recipe's; of recipe tiny also tiny:wide)")
    seeds.add_argument("--seeds", type=_whole, default=5, help="how many, from the recipe's train.seed on (default: 5)")
    seeds.add_argument("--jobs", type=_whole, default=1, help="trainings at once (default: 1)")
    seeds.add_argument("--log", type=_path, help="finished trainings, to go on from (default: runs/seeds-<recipe>.jsonl)")
    probes = _bench_parser(
        bench,
        "probes",
        "how well each probe picks, and what it costs",
        "Let every probe pick with the policy held still, and compare the picks with the paper's and the truth.",
        _bench_probes,
    )
    probes.add_argument("--probes", help=f"names, separated by commas (default: all); {known}")
    probes.add_argument("--draws", type=_whole, default=60, help="of each probe; the first third is left out (default: 60)")
    probes.add_argument("--noises", type=_whole, default=16, help="images per prompt that are its truth (default: 16)")
    probes.add_argument("--rounds", type=_whole, default=3, help="iterations that costs are measured on (default: 3)")
    compare = bench.add_parser("compare", help="differences of two records beyond noise")
    compare.add_argument("before", type=_path, metavar="A.json")
    compare.add_argument("after", type=_path, metavar="B.json")
    compare.add_argument("--fail", action="store_true", help="exit code 1 when anything got worse")
    compare.set_defaults(run=_bench_compare)
    kernels = bench.add_parser("kernels", help="time the kernels (CUDA)")
    kernels.add_argument("--op", action="append", default=[], help="this operator only; may be repeated")
    kernels.set_defaults(run=_bench_kernels)
    _add_record_options(kernels)
    gpu = bench.add_parser("gpu", help="what a GPU has to show first: kernels, forwards, iterations (CUDA)")
    gpu.add_argument("--part", choices=("kernels", "forward", "iteration"), help="this part only, at most eight minutes")
    gpu.set_defaults(run=_bench_gpu)
    _add_record_options(gpu)
    readme = bench.add_parser("readme", help="tables and picture of the records")
    readme.add_argument("--results", type=_path, default=Path("bench/results"), help="folder of the records")
    readme.add_argument("--check", action="store_true", help="write nothing; exit code 1 when out of date")
    readme.set_defaults(run=_bench_readme)


def _bench_parser(
    bench: argparse._SubParsersAction, name: str, does: str, description: str, run: Callable[..., int]
) -> argparse.ArgumentParser:
    """A command that measures a recipe, whose keys it takes, and writes a record."""
    usage = f"adagrpo bench {name} [RECIPE] [--section.key VALUE …] [options]"
    command = bench.add_parser(name, help=does, description=description, usage=usage, allow_abbrev=False)
    command.set_defaults(run=run, recipe_keys=True)
    _add_record_options(command)
    return command


def _add_record_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=_path, default=Path("bench/results"), help="folder of the records")
    parser.add_argument("--note", default="", help="what a reader of the record must know")


def _bench_recipe(args: argparse.Namespace, rest: list[str]) -> int:
    from .bench.budget import budget_command
    from .bench.iteration import Options, iteration_command
    from .bench.versus import baseline_command
    from .study.hosts import default_recipe

    require_within("--iterations", args.rounds, 1, 10**6)
    if not 0 <= getattr(args, "peak", 0.0) < float("inf"):
        raise InputError(f"--peak {args.peak}: must be a number of TFLOPS, 0 or more")
    config = _named_recipe(default_recipe(args.bench_command), rest, f"bench {args.bench_command}")
    options = Options(args.rounds, args.out, args.note, args.argv, getattr(args, "peak", 0.0))
    if args.bench_command == "budget":
        return budget_command(config, options, tuple(args.probes.split(",")) if args.probes else ())
    return {"iteration": iteration_command, "baseline": baseline_command}[args.bench_command](config, options)


def _named_recipe(default: str, rest: list[str], command: str) -> Config:
    """The checked recipe of a command whose first argument may name it."""
    named = bool(rest) and not rest[0].startswith("-")
    recipe, overrides = (rest[0], rest[1:]) if named else (default, rest)
    configured = _configured(read_recipe(recipe), overrides, f"{command} {recipe}")
    _one_rank(command)
    return configured.config


def _at_least(args: argparse.Namespace, **least: int) -> None:
    """Refuse options below their least values, and beyond reason."""
    for option, low in least.items():
        require_within(f"--{option}", getattr(args, option), low, 10**5)


def _bench_probes(args: argparse.Namespace, rest: list[str]) -> int:
    from .bench.iteration import Options
    from .study.hosts import PROBES
    from .study.probes import probes_command

    _at_least(args, draws=3, noises=2, rounds=1)
    config = _named_recipe("tiny", rest, "bench probes")
    names = args.probes.split(",") if args.probes else list(PROBES)
    return probes_command(config, names, args.draws, args.noises, Options(args.rounds, args.out, args.note, args.argv))


def _bench_seeds(args: argparse.Namespace, rest: list[str]) -> int:
    from .study.seeds import Study, seeds_command

    _at_least(args, seeds=1, jobs=1)
    config = _named_recipe("tiny", rest, "bench seeds")
    log = args.log or Path(f"runs/seeds-{config.name}.jsonl")
    mixes = "tiny:even,tiny:wide" if config.data.prompts == "tiny:even" else config.data.prompts
    study = Study(tuple(args.probes.split(",")), tuple((args.mixes or mixes).split(",")), args.seeds, args.jobs, log)
    return seeds_command(config, study, args.out, args.argv, args.note)


def _bench_compare(args: argparse.Namespace) -> int:
    from .bench.compare import compare_command

    return compare_command(args.before, args.after, args.fail)


def _bench_gpu(args: argparse.Namespace) -> int:
    _one_rank("bench gpu")
    from .bench.gpu import gpu_command

    return gpu_command(args.part, args.out, args.note, args.argv)


def _bench_kernels(args: argparse.Namespace) -> int:
    _one_rank("bench kernels")
    from .bench.kernels import kernels_command

    return kernels_command(args.op, args.out, args.note, args.argv)


def _bench_readme(args: argparse.Namespace) -> int:
    from .bench.readme import readme_command

    return readme_command(args.results, args.check)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor.command import doctor

    return doctor(args.self_test, args.all)
