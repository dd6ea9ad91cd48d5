"""``adagrpo bench``: its commands and their arguments; what they run is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import named_recipe, require_one_rank, whole_number, written_path
from ..errors import InputError
from ..study.command import add_studies
from ..text.user_text import require_within
from .options import Options, add_record_options, measuring


def add_bench(commands: argparse._SubParsersAction) -> None:
    """Add ``bench`` and its commands, the studies among them."""
    bench = commands.add_parser("bench", help="measure this machine").add_subparsers(
        dest="bench_command", required=True, metavar="COMMAND"
    )
    _add_iterations(bench)
    add_studies(bench)
    compare = bench.add_parser("compare", help="differences of two records beyond noise")
    compare.add_argument("before", type=written_path, metavar="A.json")
    compare.add_argument("after", type=written_path, metavar="B.json")
    compare.add_argument("--fail", action="store_true", help="exit code 1 when anything got worse")
    compare.set_defaults(run=_compare)
    kernels = bench.add_parser("kernels", help="time the kernels (CUDA)")
    kernels.add_argument("--op", action="append", default=[], help="this operator only; may be repeated")
    kernels.set_defaults(run=_kernels)
    add_record_options(kernels)
    gpu = bench.add_parser("gpu", help="what a GPU has to show first: kernels, forwards, iterations (CUDA)")
    gpu.add_argument("--part", choices=("kernels", "forward", "iteration"), help="this part only, at most eight minutes")
    gpu.set_defaults(run=_gpu)
    add_record_options(gpu)
    readme = bench.add_parser("readme", help="tables and picture of the records, tables of docs/hosts.md")
    readme.add_argument("--results", type=written_path, default=Path("bench/results"), help="folder of the records")
    readme.add_argument("--check", action="store_true", help="write nothing; exit code 1 when out of date")
    readme.set_defaults(run=_readme)


def _add_iterations(bench: argparse._SubParsersAction) -> None:
    """Commands that measure whole iterations of a recipe."""
    for name, does in (
        ("iteration", "seconds by phase, throughput, FLOPs, energy, memory"),
        ("budget", "what selection and fusion cost; exit code 1 above the recipe's budget"),
        ("baseline", "against a plain loop over the published algorithm, which decodes image by image"),
    ):
        command = measuring(bench, name, does, f"Measure: {does}.", _iterations)
        command.add_argument(
            "--iterations", "--rounds", type=whole_number, default=6, dest="rounds", help="measured rounds (default: 6)"
        )
        if name == "budget":
            command.add_argument(
                "--probes", help="measure and gate these probes, no host plans; `bench probes --help` names them"
            )
        if name == "iteration":
            command.add_argument("--peak", type=float, default=0.0, metavar="TFLOPS", help="peak that utilisation refers to")


def _iterations(args: argparse.Namespace, rest: list[str]) -> int:
    from ..study.hosts import default_recipe
    from .budget import budget_command
    from .iteration import iteration_command
    from .versus import baseline_command

    require_within("--iterations", args.rounds, 1, 10**6)
    if not 0 <= getattr(args, "peak", 0.0) < float("inf"):
        raise InputError(f"--peak {args.peak}: must be a number of TFLOPS, 0 or more")
    config = named_recipe(default_recipe(args.bench_command), rest, f"bench {args.bench_command}")
    options = Options(args.rounds, args.out, args.note, args.argv, getattr(args, "peak", 0.0))
    if args.bench_command == "budget":
        return budget_command(config, options, tuple(args.probes.split(",")) if args.probes else ())
    return {"iteration": iteration_command, "baseline": baseline_command}[args.bench_command](config, options)


def _compare(args: argparse.Namespace) -> int:
    from .compare import compare_command

    return compare_command(args.before, args.after, args.fail)


def _gpu(args: argparse.Namespace) -> int:
    require_one_rank("bench gpu")
    from .gpu import gpu_command

    return gpu_command(args.part, args.out, args.note, args.argv)


def _kernels(args: argparse.Namespace) -> int:
    require_one_rank("bench kernels")
    from .kernels import kernels_command

    return kernels_command(args.op, args.out, args.note, args.argv)


def _readme(args: argparse.Namespace) -> int:
    from .readme import readme_command

    return readme_command(args.results, args.check)
