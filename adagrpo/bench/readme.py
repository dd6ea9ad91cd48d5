"""``adagrpo bench readme``: tables and picture of ``bench/README.md``, from the records, and tables of ``docs/hosts.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..disk.files import write_text
from ..errors import InputError
from ..report.charts import number
from ..study.seeds import interval
from ..text.strict_json import from_json
from ..text.user_text import read_text
from .hosts import hosts_page
from .measure import PHASES
from .picture import Bars, Point, draw, scatter
from .records import LARGEST, Record, read_record
from .statistics import Series

PICTURE = "phases.svg"
HEAD = """# Measurements

Written by `adagrpo bench readme` from the records below `results/`; the newest of each case and device is shown. Times are
medians over rounds ± spread (1.4826 x the median absolute deviation); what is compared ran interleaved, A B B A, in one
process. Phases do not overlap while they are measured, so they add up; `other` holds the encoding of prompts, which is done
anew in every measured iteration, and the reading of metrics. Evaluations are image-forwards of the transformer, those
of the update included. A record holds all that is needed to repeat it: command line, resolved recipe, versions, device,
threads, commit, and every round. `adagrpo bench compare A.json B.json` tells two of them apart. `make bench` times the parts of
an iteration on your machine with pytest-benchmark ([test_speed.py](test_speed.py)). `adagrpo bench gpu` (`make gpu`) is what a
CUDA device has to show first, in three parts of at most eight minutes and one record each: kernels beside eager and compiled
references, rates of matrix products and attention; the transformer's forwards; iterations by phase.
"""
TABLES = {
    "iteration": "One iteration by phase, in seconds",
    "budget": "What selection and fusion cost, over the identical recipe without them",
    "baseline": "Ours against a plain loop that decodes image by image, same work",
    "kernels": "Kernels",
    "gpu": "First measurements on a GPU",
    "probes": "Probes: what they cost, and how well they pick with the policy held still",
    "seeds": "End reward over seeds; difference to the first probe, paired by seed",
}
EXPLAINED = {
    "baseline": "The plain loop decodes one image at a time, which the released functions do not: most of its distance is "
    "that. The released functions themselves, at equal evaluations on one CPU thread (740, six interleaved rounds), take 1.07 "
    "(rewards in batches) to 1.14 times (one by one) as long as ours.\n\n",
    "gpu": "Medians; products, attention and kernels inside CUDA graphs with a cold L2. A flag says which check failed: the "
    "figures of its row are not to be trusted.\n\n",
    "probes": "Overheads are over the recipe without selection and fusion; `cost` counts evaluations, decoding and scoring at "
    "their measured prices. True regret: distance of the picked prompt's mean reward (over many noises) from the level that "
    "the EMA converges to, in its std, ± standard error; beside it the difference to `full`, paired by draw, and how much it "
    "is above the best of the paper's candidates (best by these means, noise included: too much for every probe alike). "
    "Paper regret: how much farther from the paper's EMA the picks' full-length scores are than those of its own picks, in its "
    "std. Same pick: share of the paper's picks that are picked here too. Spearman: of the judging with the full-length "
    "scores. –: other candidates than the paper's. `random` picks blindly, and pays for full probes that feed the EMA.\n\n",
}


def readme_command(results: Path, check: bool) -> int:
    """Write ``README.md`` and the picture beside ``results``, and the tables of hosts; with ``check`` only tell whether they
    are up to date.

    Raises:
        InputError: no such folder, or a broken record in it.
    """
    if not results.is_dir():
        raise InputError(f"--results {results}: no such folder")
    stale = []
    for path, text in pages(results).items():
        if check:
            if not path.is_file() or path.read_text("utf-8") != text:
                stale.append(str(path))
        else:
            write_text(path, text)
            print(path)
    if stale:
        print(f"out of date: {', '.join(stale)}; run `adagrpo bench readme`")
    return int(bool(stale))


def pages(results: Path) -> dict[Path, str]:
    """Files beside ``results``, and the page of hosts in the ``docs`` beside their folder, and what they should hold."""
    records, others = read_results(results)
    newest: dict[tuple[str, str], tuple[Path, Record]] = {}
    for path, record in sorted(records, key=lambda found: (found[1].date, found[0])):
        newest[record.device, record.case] = (path, record)
    chosen = [newest[key] for key in sorted(newest)]
    bars = [group for _, record in chosen for group in bars_of(record)]
    parts = [HEAD]
    if bars:
        parts.append(f"\n![Seconds of an iteration by phase]({PICTURE})\n")
    for device in sorted({record.device for _, record in chosen}):
        mine = [(path, record) for path, record in chosen if record.device == device]
        parts.append(f"\n## {device}\n")
        for command, title in TABLES.items():
            these = [(path, record) for path, record in mine if record.case.split("-")[0] == command]
            if these:
                parts.append(f"\n**{title}**\n\n{EXPLAINED.get(command, '')}{_table(command, these, results.parent)}")
                if command == "probes":
                    parts += [f"\n![True regret against overhead]({_picture(record)})\n" for _, record in these]
        parts += _notes(mine)
    if others:
        lines = [f"- [{path.relative_to(results)}]({path.relative_to(results.parent)}): {case}" for path, case in others]
        parts.append("\n## Other records\n\n" + "\n".join(lines) + "\n")
    found = {results.parent / "README.md": "".join(parts)}
    for _, record in chosen:
        if record.case.split("-")[0] == "probes":
            found[results.parent / _picture(record)] = scatter_of(record)
    if (page := results.parent.parent / "docs" / "hosts.md").is_file():
        found[page] = hosts_page(page.read_text("utf-8"), results)
    return found | ({results.parent / PICTURE: draw(bars)} if bars else {})


def read_results(results: Path) -> tuple[list[tuple[Path, Record]], list[tuple[Path, str]]]:
    """Records of `adagrpo bench`, and of the other JSON files path and ``case``.

    Raises:
        InputError: a file that is not JSON, or a damaged record.
    """
    records, others = [], []
    for path in sorted(results.rglob("*.json")):
        try:
            data = from_json(read_text(path, str(path), LARGEST))
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{path}: not a record: broken JSON ({error})") from error
        if isinstance(data, dict) and "schema" in data:
            records.append((path, read_record(path)))
        else:
            others.append((path, str(data.get("case", "")) if isinstance(data, dict) else ""))
    return records, others


def bars_of(record: Record) -> list[Bars]:
    """What the picture shows of a record."""
    command = record.case.split("-")[0]
    if command == "iteration":
        prefixes = {"": "iteration"}
    elif command == "baseline":
        prefixes = {"ours/": "ours", "plain/": "plain published loop"}
    elif command == "budget":
        host = _gated(record)[0]
        prefixes = {f"{host}/full/": "AdaGRPO", f"{host}/plain/": "without it"}
    else:
        return []
    bars = {label: {phase: _median(record, f"{at}seconds/{phase}") for phase in PHASES} for at, label in prefixes.items()}
    totals = {label: record.series[f"{at}seconds"].median for at, label in prefixes.items()}
    return [Bars(f"{record.case} on {record.device}{' (see its note)' if record.note else ''}", bars, totals)]


def _table(command: str, found: Sequence[tuple[Path, Record]], base: Path) -> str:
    if command == "iteration":
        phases = [phase for phase in PHASES if any(f"seconds/{phase}" in record.series for _, record in found)]
        head = ["case", "iteration", *phases, "images/s", "evaluations/s", "TFLOP/s", "utilisation", "J/image", "host syncs"]
        rows = [[_link(path, record, base), *_iteration_row(record, phases)] for path, record in found]
    elif command == "budget":
        head = ["case", "host", "evaluations", "overhead", "time", "gated"]
        rows = [[_link(path, record, base), *row] for path, record in found for row in _budget_rows(record)]
    elif command == "baseline":
        head = ["case", "rounds", "evaluations", "ours, s", "plain loop, s", "times faster"]
        rows = [[_link(path, record, base), *_baseline_row(record)] for path, record in found]
    elif command == "probes":
        head = [
            "case",
            "probe",
            "evaluations",
            "cost",
            "true regret",
            "above the best",
            "paper regret",
            "same pick",
            "Spearman",
        ]
        rows = [[_link(path, record, base), *_probe_row(row)] for path, record in found for row in record.facts["rows"]]
    elif command == "seeds":
        head = ["case", "prompts", "probe", "seeds", "end reward", "gain", "difference", "95 % interval"]
        rows = [[_link(path, record, base), *row] for path, record in found for row in _seed_rows(record)]
    elif command == "gpu":
        head = ["part", "table", "case", "shape", "dtype", "time", "TFLOP/s", "of copy", "x eager", "x compile", "flag"]
        rows = [[_link(path, record, base), *row] for path, record in found for row in _gpu_rows(record)]
    else:
        head = ["operator", "case", "shape", "dtype", "µs", "of copy bandwidth", "x eager", "x compile"]
        rows = [[_link(path, record, base), *row] for path, record in found for row in _kernel_rows(record)]
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _iteration_row(record: Record, phases: Iterable[str]) -> list[str]:
    s = record.series
    used = s.get("flop_utilisation")
    joules, syncs = s.get("joules_per_image"), s.get("host_syncs")
    return [
        _with_spread(s["seconds"]),
        *(number(_median(record, f"seconds/{phase}")) for phase in phases),
        number(s["images_per_second"].median),
        number(s["evaluations_per_second"].median),
        number(s["tflops"].median),
        f"{used.median:.1%}" if used else "peak not stated",
        number(joules.median) if joules else "not measured",
        f"{syncs.median:.0f}" if syncs else "not known",
    ]


def _budget_rows(record: Record) -> list[list[str]]:
    s, rows = record.series, []
    for name in s:
        if not name.endswith("/time_ratio"):
            continue
        host, ratio = name.removesuffix("/time_ratio"), s[name]
        full, plain = (s[f"{host}/{who}/evaluations"].median for who in ("full", "plain"))
        gated = "yes" if host in _gated(record) else "no"
        time = f"{ratio.median - 1:+.1%} ± {ratio.spread:.1%}"
        rows.append([host, f"{full:.0f} against {plain:.0f}", f"{full / plain - 1:+.1%}", time, gated])
    return rows


def _gated(record: Record) -> list[str]:
    """What a budget record gates; one name in older records."""
    gated = record.facts["gated"]
    return [gated] if isinstance(gated, str) else gated


def _picture(record: Record) -> str:
    return f"{record.case}-{record.device}.svg"


def scatter_of(record: Record) -> str:
    """The probes of a record, true regret against overhead."""
    rows = record.facts["rows"]
    points = [Point(row["probe"], row["overhead_cost"], row["true_regret"], row["standard_error"] or 0.0) for row in rows]
    return scatter(f"{record.case} on {record.device}: how well probes pick, against what they cost", points)


def _probe_row(row: dict[str, Any]) -> list[str]:
    shown = lambda key, form: "–" if row[key] is None else format(row[key], form)  # noqa: E731
    return [
        row["probe"],
        f"{row['overhead_evaluations']:+.1%}",
        f"{row['overhead_cost']:+.1%}",
        f"{row['true_regret']:.3f} ± {shown('standard_error', '.3f')}",
        f"{row['difference']:+.3f} ± {shown('difference_error', '.3f')}",
        shown("above_best", ".3f"),
        shown("paper_regret", "+.3f"),
        shown("same_pick", ".0%"),
        shown("spearman", ".2f"),
    ]


def _seed_rows(record: Record) -> list[list[str]]:
    rows = []
    for row in record.facts["rows"]:
        against = "reference", ""
        if "difference" in row:
            against = f"{row['difference']:+.4f}", interval(row)
        names = [row["prompts"], row["probe"], str(len(record.facts["seeds"]))]
        rows.append([*names, f"{row['end']:.4f}", f"{row['gain']:+.4f}", *against])
    return rows


def _baseline_row(record: Record) -> list[str]:
    s = record.series
    ratio = s["times_faster"]
    times = [_with_spread(s[f"{who}/seconds"]) for who in ("ours", "plain")]
    return [str(len(ratio.values)), number(s["ours/evaluations"].median), *times, f"{ratio.median:.2f} ± {ratio.spread:.2f}"]


def _kernel_rows(record: Record) -> list[list[str]]:
    keys = ("case", "shape", "dtype", "us", "of_copy", "x_eager", "x_compile")
    show: Any = lambda row, key: str(row[key][0] if key == "us" else row.get(key, "–"))  # noqa: E731
    return [[show(row, key) for key in keys] for row in record.facts["rows"]]


def _gpu_rows(record: Record) -> list[list[str]]:
    rows = []
    for table, measured in record.facts["rows"].items():
        for row in measured:
            times = {key: row[key] for key in ("us", "ms", "seconds") if key in row}
            unit, values = next(iter(times.items()), ("", ()))
            time = f"{number(median(values))} {'µs' if unit == 'us' else unit.replace('seconds', 's')}" if values else "–"
            keys = ("TFLOP/s", "of_copy", "x_eager", "x_compile")
            names = [table, *(str(row.get(key, "–")) for key in ("case", "shape", "dtype"))]
            flag = row.get("failed") or row.get("flag", "")
            rows.append([*names, time, *(str(row.get(key, "–")) for key in keys), flag.replace("|", "/")])
    missing = [["–", name, *["–"] * 7, "not measured"] for name in record.facts["not_measured"]]
    failed = [
        ["check", name, *["–"] * 7, problem.replace("|", "/")] for name, problem in record.facts["checks"].items() if problem
    ]
    return [*rows, *missing, *failed]


def _notes(found: Iterable[tuple[Path, Record]]) -> list[str]:
    lines = []
    for _, record in found:
        machine = record.machine
        state = " with uncommitted changes" if machine.get("dirty") else ""
        torch = machine.get("versions", {}).get("torch")
        note = f" **{record.note}**" if record.note else ""
        commit = (machine.get("commit") or "none")[:9]
        lines.append(f"- {record.case}: {record.date[:10]}, commit {commit}{state}, torch {torch}.{note}\n")
    return ["\n", *lines]


def _link(path: Path, record: Record, base: Path) -> str:
    return f"[{record.case}]({path.relative_to(base)})"


def _with_spread(series: Series) -> str:
    return f"{number(series.median)} ± {number(series.spread, 2)}"


def _median(record: Record, name: str) -> float:
    return record.series[name].median if name in record.series else 0.0
