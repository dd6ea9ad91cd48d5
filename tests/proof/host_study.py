"""What prompt selection and the floor under the std do where prompts cannot be learnt: end rewards of arms over fresh seeds.

On ``tiny:dusty(0.6)`` fork, Flow-GRPO, DanceGRPO and Flow-CPS, each plain, with AdaGRPO and its full probe, and plain with
``advantage.std = floored``; on fork also AdaGRPO with the floor and with other probes: memory as it is, with a look at every
candidate while prompts are new, and blind, without (``selection.allow_unseen``). On ``tiny:even`` fork alone. Each arm is held
against its host's plain one, paired by seed. A log keeps finished trainings; the same command goes on from it:

    python tests/proof/host_study.py

It writes ``bench/results/cpu/host-study.json``, which ``adagrpo bench readme`` makes the table of ``docs/hosts.md`` from.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from adagrpo.bench.statistics import detectable_difference, paired_interval
from adagrpo.build import load_source
from adagrpo.disk.files import write_json
from adagrpo.disk.lock import OwnerLock, holding
from adagrpo.prompts.digest import prompts_digest
from adagrpo.recipe.keys import Config
from adagrpo.recipe.load import load_recipe
from adagrpo.recipe.rules import check
from adagrpo.run.machine import describe_machine
from adagrpo.study.hosts import with_probe
from adagrpo.study.seeds import Arm, Study, digest, read_log, trained

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "cpu" / "host-study.json"
DUSTY, EVEN = "tiny:dusty(0.6)", "tiny:even"
SEEDS = range(100, 105)
PLAIN, ADA, FLOORED = "plain", "AdaGRPO, full", "plain, floored"
HOSTS = {"fork": "tiny-grpo", "Flow-GRPO": "tiny-flow-grpo", "DanceGRPO": "tiny-dance-grpo", "Flow-CPS": "tiny-flow-cps"}
BLIND = {"AdaGRPO, memory, blind": "memory-blind", "AdaGRPO, memory, blind, 2 finalists": "memory-2"}
PROBES = {"AdaGRPO, memory": "memory", "AdaGRPO, short-4": "short-4"}
PAIRS = [
    (ADA, "AdaGRPO, short-4"),
    (ADA, "AdaGRPO, memory"),
    ("AdaGRPO, memory, blind", "AdaGRPO, memory"),
    (FLOORED, ADA),
    (FLOORED, "AdaGRPO, full, floored"),
]
"""Arms of fork on dusty prompts that are also held against each other."""
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "train": {"iterations": 30, "slots": 8},
    "evaluation": {"every": 0, "final_prompts": 150, "final_noises": 6},
    "output": {"grid_every": 0},
}


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """The recipe with other keys of some sections."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()}
    )


def host(name: str) -> dict[str, Config]:
    """A host's three arms."""
    plain = changed(load_recipe(HOSTS[name]), **CHANGES)
    ada = changed(plain, selection={"candidates": 8, "strategy": "closest", "alpha": 0.8}, advantage={"weight": 1.0})
    return {PLAIN: plain, ADA: ada, FLOORED: changed(plain, advantage={"std": "floored"})}


def cases() -> list[tuple[str, str, str, Config]]:
    """Every arm: prompts, host, its name and recipe."""
    fork = host("fork")
    found = [(EVEN, "fork", name, config) for name, config in fork.items()]
    fork |= {name: with_probe(fork[ADA], probe) for name, probe in PROBES.items()}
    blind = changed(fork[ADA], selection={"allow_unseen": True})
    fork |= {name: with_probe(blind, probe) for name, probe in BLIND.items()}
    fork["AdaGRPO, full, floored"] = changed(fork[ADA], advantage={"std": "floored"})
    for name in HOSTS:
        arms = fork if name == "fork" else host(name)
        found += [(DUSTY, name, arm, config) for arm, config in arms.items()]
    return found


def arms() -> list[Arm]:
    """Every training; whole seeds of fork first, then of the other hosts, then of those that remember."""
    found = []
    digests: dict[str, str] = {}
    for part in range(3):
        for seed in SEEDS:
            for prompts, name, arm, config in cases():
                if (2 if "memory" in arm else int(name != "fork")) == part:
                    config = changed(config, data={"prompts": prompts}, train={"seed": seed})
                    check(config)
                    if prompts not in digests:
                        digests[prompts] = prompts_digest(load_source(config, prompts, "data.prompts"))
                    found.append(Arm(f"{name}: {arm}", prompts, seed, config, digests[prompts]))
    return found


def rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each arm's end reward and gain, and its difference to the plain arm of its host, with their 95 % t intervals; arms of
    fewer than three seeds are left out."""
    found = []
    for prompts, name, arm, _ in cases():
        mine, plain = (
            {r["seed"]: r for r in results if (r["prompts"], r["probe"]) == (prompts, f"{name}: {which}")}
            for which in (arm, PLAIN)
        )
        seeds = sorted(mine.keys() & plain.keys())
        if len(seeds) < 3:
            continue
        before, ends, reference = (
            [of[seed][key] for seed in seeds] for of, key in ((mine, "before"), (mine, "after"), (plain, "after"))
        )
        row = {"prompts": prompts, "host": name, "arm": arm, "seeds": len(seeds), "before": fmean(before), "after": fmean(ends)}
        row |= dict(zip(("gain", "gain_low", "gain_high"), paired_interval(before, ends), strict=True))
        if arm != PLAIN:
            row |= dict(zip(("difference", "low", "high"), paired_interval(reference, ends), strict=True))
            row["detectable"] = detectable_difference(reference, ends)
        row["evaluations"] = fmean(mine[seed]["evaluations"] for seed in seeds)
        found.append(row)
    return found


def pairs(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The differences of ``PAIRS``, with their 95 % t intervals; those of fewer than three seeds are left out."""
    found = []
    for names in PAIRS:
        ends = [
            {r["seed"]: r["after"] for r in results if (r["prompts"], r["probe"]) == (DUSTY, f"fork: {name}")} for name in names
        ]
        seeds = sorted(ends[0].keys() & ends[1].keys())
        if len(seeds) < 3:
            continue
        reference, other = ([each[seed] for seed in seeds] for each in ends)
        row = {"prompts": DUSTY, "host": "fork", "reference": names[0], "arm": names[1], "seeds": len(seeds)}
        row |= dict(zip(("difference", "low", "high"), paired_interval(reference, other), strict=True))
        found.append(row | {"detectable": detectable_difference(reference, other)})
    return found


def main() -> int:
    """Train what the log lacks, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--log", type=Path, default=RECORD.with_suffix(".jsonl"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="train only arms whose name has this")
    parser.add_argument("--record", action="store_true", help="train nothing: record what the log has")
    args = parser.parse_args()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    wanted = arms()
    if not args.record:
        study = Study((), (), len(SEEDS), args.jobs, args.log)
        machine = describe_machine(torch.device("cpu")) | {"threads": 1}
        with holding(OwnerLock(args.log.parent, "the study", f"--log {args.log}", file=args.log.name)):
            trained(study, [arm for arm in wanted if args.only in str(arm)], machine)
    done = read_log(args.log)
    results = [done[digest(arm.config)] for arm in wanted if digest(arm.config) in done]
    record = {"case": f"prompts that cannot be learnt: {len(results)} of {len(wanted)} trainings", "rows": rows(results)}
    write_json(
        RECORD, record | {"pairs": pairs(results), "trainings": results, "machine": describe_machine(torch.device("cpu"))}
    )
    print(RECORD)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
