"""One self-contained HTML page about one or more runs: ``report.html``.

The page loads nothing and reads well without JavaScript; the script in it only adds values under the pointer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..disk.files import WriteError, write_text, writing
from ..errors import InputError
from .charts import COLOURS, escape, number
from .data import Grid, Run, embedded, read_runs
from .panels import ADVANTAGE, CURRICULUM, MEMORY, POLICY, REWARD, TIME, Charts, phase_seconds
from .verdict import duration, findings, gain_text, headline, intervals, progress, stats, tone

EVENTS_SHOWN = 200
_SECTIONS = (
    ("reward", "Reward", ""),
    ("samples", "Samples", "The same prompts and noise at every step."),
    (
        "curriculum",
        "Curriculum",
        "Which prompts the filter picks: those whose probe lies closest to an EMA of the policy's rewards.",
    ),
    ("advantage", "Advantages", "What the fusion of group and policy level does to the samples."),
    ("policy", "Policy", "How far, and how smoothly, the model moves."),
    ("time", "Time and memory", ""),
    ("events", "Events", ""),
    ("recipe", "Recipe", ""),
    ("machine", "Machine", ""),
)


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the report on run folders to ``out`` in one piece, and return ``out``.

    Raises:
        InputError: a folder is no run folder, or ``out`` cannot be written.
        WriteError: the disk is full.
    """
    page = build_report(folders)
    out = Path(out)
    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except WriteError as error:
        if error.disk:
            raise
        raise InputError(f"{out}: the report cannot be written: {error.reason}") from error
    return out


def build_report(folders: Sequence[Path]) -> str:
    """The report on run folders as HTML. Missing files, keys and values leave out what they would have shown.

    Raises:
        InputError: no folder, or one that is no run folder.
    """
    runs = read_runs(folders)
    charts = Charts(runs)
    bodies = {
        "reward": charts.panels(REWARD) + charts.other_rewards() + charts.held_out_categories() + _legend_of_marks(runs),
        "samples": _samples(runs),
        "curriculum": _join(charts.categories(), charts.panels(CURRICULUM)),
        "advantage": charts.panels(ADVANTAGE),
        "policy": charts.panels(POLICY),
        "time": _join(charts.phases(), charts.panels((*TIME, *charts.each_reward(), *MEMORY))) + _phase_table(runs),
        "events": _events(runs),
        "recipe": _recipes(runs),
        "machine": _machines(runs),
    }
    sections = [(ident, title, intro, bodies[ident]) for ident, title, intro in _SECTIONS if bodies[ident]]
    links = "".join(f'<a href="#{ident}">{title}</a>' for ident, title, _, _ in sections)
    main = "".join(
        f'<section id="{ident}"><h2>{title}</h2>{f"<p class=intro>{escape(intro)}</p>" if intro else ""}{body}</section>'
        for ident, title, intro, body in sections
    )
    files = resources.files(__package__)
    style, script = ((files / name).read_text("utf-8") for name in ("style.css", "script.js"))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/><meta name="color-scheme" content="light dark"/>'
        f"<title>{escape(_title(runs))}</title><style>\n{style}{_viewer_style(runs)}</style></head>\n<body>"
        f"<header>{_header(runs)}</header><nav>{links}</nav><main>{_verdict(runs)}{main}</main>"
        f"<script>\n{script}</script></body></html>\n"
    )


def _legend_of_marks(runs: Sequence[Run]) -> str:
    marked = len(runs) == 1 and any(1 < event.iteration <= runs[0].done for event in runs[0].events)
    return '<p class="constant">Dotted lines across the charts mark <a href="#events">events</a>.</p>' if marked else ""


def _join(figures: str, panels: str) -> str:
    """Figures in the same grid as the panels'."""
    opening = '<div class="charts">'
    if not panels.startswith(opening):
        panels = f"{opening}</div>{panels}" if figures else panels
    return panels.replace(opening, opening + figures, 1) if figures else panels


def _title(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    run = runs[0]
    waiting = f"{run.done}/{run.total or '?'} · " if run.state == "unfinished" else ""
    return f"{waiting}{run.name} · run report"


def _header(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f'<p class="kicker">AdaGRPO run report</p><h1>{len(runs)} runs compared</h1>'
    run = runs[0]
    bar = ""
    if run.state != "finished" and run.total:
        bar = f'<progress max="{run.total}" value="{min(run.done, run.total)}">{run.done} of {run.total}</progress>'
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in _facts(run))
    state = f'<li class="state {run.state}">{escape(progress(run))}</li>'
    return f'<p class="kicker">AdaGRPO run report</p><h1>{escape(run.name)}</h1><ul class="facts">{state}{facts}</ul>{bar}'


def _facts(run: Run) -> list[str]:
    seconds = run.known("perf/seconds")[1]
    facts = [duration(float(seconds.sum()))] if seconds.size else []
    device = run.manifest.get("gpu") or run.manifest.get("device")
    seed, commit = run.setting("train", "seed"), run.manifest.get("commit")
    facts += [str(device)] if device else []
    facts += [f"seed {seed}"] if seed is not None else []
    facts += [f"commit {str(commit)[:8]}"] if commit else []
    return facts + ([f"folder {run.label}"] if run.label != run.name else [])


def _verdict(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        health = "".join(f"<div><h3>{_swatch(i)}{escape(run.label)}</h3>{_health(run)}</div>" for i, run in enumerate(runs))
        return f'<section class="verdict">{_results(runs)}<div class="health several">{health}</div></section>'
    run = runs[0]
    label, before, after, sentence = headline(run)
    extra = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in stats(run))
    extra = f'<dl class="stats">{extra}</dl>' if extra else ""
    first = f"<span>{number(before)}</span><i>→</i>" if np.isfinite(before) else ""
    return (
        f'<section class="verdict"><div class="score"><h2>{escape(label)}</h2><p class="big {tone(run)}">'
        f"{first}<b>{number(after)}</b></p>{intervals(runs)[0]}"
        f'<p>{escape(sentence)}</p>{extra}</div><div class="health"><h2>Health</h2>{_health(run)}</div></section>'
    )


def _health(run: Run) -> str:
    rows = []
    for finding in findings(run):
        sign, spoken = ("!", '<span class="hidden">Warning: </span>') if finding.level == "warn" else ("✓", "")
        words = f"<div><b>{spoken}{escape(finding.title)}.</b> {escape(finding.text)}</div>"
        rows.append(f'<li class="{finding.level}"><i aria-hidden="true">{sign}</i>{words}</li>')
    return f"<ul>{''.join(rows)}</ul>" if rows else "<p>Nothing to judge yet.</p>"


def _swatch(index: int) -> str:
    return f'<i class="swatch c{index % COLOURS}"></i>'


def _results(runs: Sequence[Run]) -> str:
    head = ("Run", "State", "Before", "After", "Gain", "95 % interval", "", "Train reward", "Time per iteration", "Warnings")
    rows = []
    for i, (run, drawing) in enumerate(zip(runs, intervals(runs), strict=True)):
        label, before, after, _ = headline(run)
        mark = "" if run.result else f"<small>{escape(label.lower())}</small>"
        seconds = run.known("perf/seconds")[1]
        warned = sum(finding.level == "warn" for finding in findings(run))
        rows.append([
            f"{_swatch(i)}<b>{escape(run.label)}</b>", escape(progress(run)), number(before), number(after) + mark,
            *gain_text(run), drawing, number(run.recent("reward/train")),
            duration(float(np.median(seconds))) if seconds.size else "–", str(warned),
        ])  # fmt: skip
    return _table(head, rows, "results")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str) -> str:
    """A table whose cells are HTML already; it scrolls sideways where it does not fit."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    table = f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _samples(runs: Sequence[Run]) -> str:
    blocks = []
    for index, (run, grids) in enumerate(zip(runs, embedded(runs), strict=True)):
        if not grids:
            continue
        title = f"<h3>{_swatch(index)}{escape(run.label)}</h3>" if len(runs) > 1 else ""
        left_out = len(run.grids) - len(grids)
        note = f'<p class="intro">{left_out} grids between are left out to keep the page small.</p>' if left_out else ""
        later = _viewer(f"v{index}", grids[1:]) if len(grids) > 1 else ""
        size = '<label class="size"><input type="checkbox"/> full size</label>'
        pair = f'<div class="pair">{_picture(grids[0], "Before")}{later}</div>'
        blocks.append(f'<div class="samples"><div class="head">{title}{size}</div>{pair}{note}</div>')
    return "".join(blocks)


def _picture(grid: Grid, title: str) -> str:
    caption = f"<figcaption>{escape(title)}: iteration {grid.iteration}</figcaption>"
    image = f'<img alt="Samples at iteration {grid.iteration}" width="{grid.width}" height="{grid.height}" src="{grid.uri()}"/>'
    return f'<figure class="grid">{caption}<div class="scroll" tabindex="0">{image}</div></figure>'


def _viewer(name: str, grids: Sequence[Grid]) -> str:
    """One grid at a time, the last first; radio buttons switch between them without any script."""
    if len(grids) == 1:
        return _picture(grids[0], "After")
    buttons = "".join(
        f'<input type="radio" name="{name}" id="{name}-{i}"{" checked" if i == len(grids) - 1 else ""}/>'
        f'<label for="{name}-{i}"><span class="hidden">Iteration </span>{grid.iteration}</label>'
        for i, grid in enumerate(grids)
    )
    frames = "".join(_picture(grid, "After" if grid is grids[-1] else "Between") for grid in grids)
    return f'<div class="viewer" role="group" aria-label="Later samples">{buttons}<div class="frames">{frames}</div></div>'


def _viewer_style(runs: Sequence[Run]) -> str:
    """Shows the frame whose radio button is checked."""
    most = max(len(run.grids) for run in runs)
    rules = [f".viewer input:nth-of-type({i}):checked~.frames>:nth-child({i})" for i in range(1, most)]
    return f"{','.join(rules)}{{display:block}}\n" if rules else ""


def _phase_table(runs: Sequence[Run]) -> str:
    times = [{phase: float(values.mean()) for phase, values in phase_seconds(run).items()} for run in runs]
    phases = list(dict.fromkeys(phase for each in times for phase in each))
    if not phases:
        return ""
    if len(runs) > 1:
        head = ["Phase", *(f"{_swatch(i)}{escape(run.label)}, s" for i, run in enumerate(runs))]
        rows = [[escape(phase), *(number(each.get(phase)) for each in times)] for phase in phases]
        return _table(head, rows, "numbers")
    rows, total = [], sum(times[0].values()) or 1.0
    for phase in phases:
        seconds, evaluations = times[0][phase], runs[0].known(f"perf/{phase}_evaluations")[1]
        count = float(evaluations.mean()) if evaluations.size else None
        speed = count / seconds if count and seconds else None
        rows.append(
            [
                escape(phase),
                number(seconds),
                f"{100 * seconds / total:.1f} %",
                "–" if count is None else f"{count:.0f}",
                number(speed),
            ]
        )
    return _table(("Phase", "Seconds", "Share", "Model evaluations", "Evaluations per second"), rows, "numbers")


def _events(runs: Sequence[Run]) -> str:
    rows = [
        [
            str(event.iteration),
            *([f"{_swatch(i)}{escape(run.label)}"] if len(runs) > 1 else []),
            f'<span class="kind {escape(event.kind)}">{escape(event.kind)}</span>',
            escape(event.message),
        ]
        for i, run in enumerate(runs)
        for event in run.events[-EVENTS_SHOWN:]
    ]
    if not rows:
        return ""
    left_out = sum(max(0, len(run.events) - EVENTS_SHOWN) for run in runs)
    note = f'<p class="intro">{left_out} earlier events are left out; events.jsonl has them.</p>' if left_out else ""
    return note + _table(("Iteration", *(("Run",) if len(runs) > 1 else ()), "Kind", "Message"), rows, "events")


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Leaves of nested dicts and lists of dicts, by dotted path."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {str(i): item for i, item in enumerate(value)}
    if isinstance(value, dict):
        return {path: leaf for key, item in value.items() for path, leaf in _flat(item, f"{prefix}.{key}").items()}
    return {prefix[1:]: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)}


def _recipes(runs: Sequence[Run]) -> str:
    difference = ""
    if len(runs) > 1:
        rows = _different([_flat(run.recipe) for run in runs])
        head = ["Key", *(f"{_swatch(i)}{escape(run.label)}" for i, run in enumerate(runs))]
        difference = _table(head, rows, "keys") if rows else '<p class="intro">All runs have the same recipe.</p>'
    texts = [
        f"<details><summary>{escape(run.name if len(runs) == 1 else run.label)}: config.toml</summary>"
        f'<pre tabindex="0">{escape(run.recipe_text)}</pre></details>'
        for run in runs
        if run.recipe_text
    ]
    return difference + "".join(texts)


def _different(tables: Sequence[dict[str, str]]) -> list[list[str]]:
    keys = dict.fromkeys(key for table in tables for key in table)
    different = [key for key in keys if len({table.get(key) for table in tables}) > 1]
    return [[f"<code>{escape(key)}</code>", *(escape(table.get(key, "–")) for table in tables)] for key in different]


def _machines(runs: Sequence[Run]) -> str:
    blocks = []
    for run in runs:
        rows = [[f"<code>{escape(key)}</code>", escape(value)] for key, value in _flat(run.manifest).items()]
        title = "manifest.json" if len(runs) == 1 else f"{run.label}: manifest.json"
        if rows:
            blocks.append(f"<details><summary>{escape(title)}</summary>{_table(('Key', 'Value'), rows, 'keys')}</details>")
    return "".join(blocks)
