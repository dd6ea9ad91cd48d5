"""``adagrpo bench seeds`` and ``adagrpo bench probes``: their arguments; what they run is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import named_recipe, require_least, whole_number, written_path
from ..bench.options import Options, measuring
from ..errors import InputError

KNOWN = (
    "known: full, short-4, short-2, racing, pool-3, pool-2, memory, memory-blind, memory-2, memory+pool, "
    "bots, greso, procurl, dps, dapo, random"
)


def add_studies(bench: argparse._SubParsersAction) -> None:
    """Add the studies to the commands of ``bench``."""
    seeds = measuring(
        bench,
        "seeds",
        "end reward of several probes over seeds, with paired intervals",
        "Train every probe on every mix of prompts from every seed, and compare the end rewards.",
        _seeds,
    )
    seeds.add_argument(
        "--probes", default="full,memory", help=f"the others are compared with the first (default: full,memory); {KNOWN}"
    )
    seeds.add_argument("--mixes", help="sources of prompts (default: the recipe's; of recipe tiny also tiny:wide)")
    seeds.add_argument("--seeds", type=whole_number, default=5, help="how many, from the recipe's train.seed on (default: 5)")
    seeds.add_argument("--jobs", type=whole_number, default=1, help="trainings at once (default: 1)")
    seeds.add_argument(
        "--log", type=written_path, help="finished trainings, to go on from (default: runs/seeds-<recipe>.jsonl)"
    )
    probes = measuring(
        bench,
        "probes",
        "how well each probe picks, and what it costs",
        "Let every probe pick with the policy held still, and compare the picks with the paper's and the truth.",
        _probes,
    )
    probes.add_argument("--probes", help=f"names, separated by commas (default: all but dapo); {KNOWN}")
    probes.add_argument(
        "--draws", type=whole_number, default=60, help="of each probe; the first third is left out (default: 60)"
    )
    probes.add_argument("--noises", type=whole_number, default=16, help="images per prompt that are its truth (default: 16)")
    probes.add_argument("--rounds", type=whole_number, default=3, help="iterations that costs are measured on (default: 3)")


def _seeds(args: argparse.Namespace, rest: list[str]) -> int:
    from .seeds import Study, seeds_command

    require_least(args, seeds=1, jobs=1)
    config = named_recipe("tiny", rest, "bench seeds")
    log = args.log or Path(f"runs/seeds-{config.name}.jsonl")
    mixes = "tiny:even,tiny:wide" if config.data.prompts == "tiny:even" else config.data.prompts
    if not args.mixes and not isinstance(mixes, str):
        raise InputError("data.prompts: names several sources; name those to compare by --mixes A,B")
    study = Study(tuple(args.probes.split(",")), tuple((args.mixes or str(mixes)).split(",")), args.seeds, args.jobs, log)
    return seeds_command(config, study, args.out, args.argv, args.note)


def _probes(args: argparse.Namespace, rest: list[str]) -> int:
    from .hosts import PROBES
    from .probes import probes_command

    require_least(args, draws=3, noises=2, rounds=1)
    config = named_recipe("tiny", rest, "bench probes")
    names = args.probes.split(",") if args.probes else [name for name in PROBES if name != "dapo"]
    return probes_command(config, names, args.draws, args.noises, Options(args.rounds, args.out, args.note, args.argv))
