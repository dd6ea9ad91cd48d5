"""The report shows what the run folder says, whatever state the folder is in, and loads nothing from elsewhere."""

from __future__ import annotations

import json
import math
import os
import re
import time
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reporting import Tree, contrast, coordinates, linear, oklab, path_of, plots, value_on, write_run

from adagrpo.disk.files import WriteError
from adagrpo.errors import InputError
from adagrpo.report.charts import BINS, POINTS, Chart, Line, bins, figure, number, smooth, thin, tick_labels
from adagrpo.report.data import embedded, read_runs
from adagrpo.report.page import build_report, write_report
from adagrpo.report.verdict import duration, findings


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny-001", grids=6)


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return build_report([run])


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("key", "role"),
    [
        ("reward/train", "raw"), ("reward/held_out", "dots"), ("advantage/turned", "raw"), ("policy/grad_norm", "raw"),
        ("policy/lr", "line"), ("selection/ema_mean", "line"), ("perf/seconds", "raw"),
    ],
)  # fmt: skip
def test_points_lie_where_the_axes_say(run: Path, page: str, key: str, role: str) -> None:
    plot, path = path_of(page, key, role)
    points = coordinates(path)
    expected = [(r["iteration"], r[key]) for r in metrics(run) if key in r]
    assert len(points) == len(expected)
    low, high = min(v for _, v in expected), max(v for _, v in expected)
    for (x, y), (iteration, value) in zip(points, expected, strict=True):
        read_x, read_y = value_on(plot, x, y)
        assert read_x == pytest.approx(iteration, abs=0.1)
        assert read_y == pytest.approx(value, abs=0.01 * (high - low) + 1e-12)
        assert 0 <= y <= 1000 and 0 <= x <= 1000


def test_logarithmic_axis_and_its_zeros() -> None:
    y = np.array([1e-6, 0.0, 1e-2, 1e-4])
    plot, path = path_of(figure(Chart("t", "", [Line("a", np.arange(4), y, "plain", key="a")], scale="log"), "i"), "a", "line")
    labels = [(t.text, t.get("y")) for t in plot.iter("text") if t.get("class") == "ytick"]
    exponents = {float((label or "").removeprefix("1e").replace("−", "-")): float(at[:-1]) * 10 for label, at in labels}
    slope, offset = np.polyfit(list(exponents), list(exponents.values()), 1)
    at = coordinates(path)[:, 1]
    assert at[[0, 2, 3]] == pytest.approx(offset + slope * np.array([-6, -2, -4]), abs=0.2)
    assert at[1] == 1000, "0 lies on the lower edge"


def test_bands_and_stacks(run: Path, page: str) -> None:
    plot, _ = path_of(page, "selection/ema_mean", "line")
    band = coordinates(next(p for p in plot.iter("path") if p.get("class") == "band c0"))
    first, last = metrics(run)[0], metrics(run)[-1]
    for index, source, sign in ((0, first, 1), (len(band) // 2 - 1, last, 1), (-1, first, -1)):
        expected = source["selection/ema_mean"] + sign * source["selection/ema_std"]
        assert value_on(plot, *band[index])[1] == pytest.approx(expected, abs=0.005)
    areas = [p for plot in plots(page) for p in plot.iter("path") if p.get("data-key") == "selection/categories/"]
    records, heights = metrics(run), {}
    for area in areas:
        points = coordinates(area)
        heights[area.get("data-label")] = (points[-1, 1] - points[0, 1]) / 1000
    chosen = [pair for r in records[:4] for pair in r["selection/categories"].items()]
    for name, height in heights.items():
        assert height == pytest.approx(sum(n for k, n in chosen if k == name) / 32, abs=2e-3), (
            "24 bins, the first of 4 iterations"
        )
    assert sum(heights.values()) == pytest.approx(1, abs=2e-3)


def test_smoothing_and_thinning_keep_what_matters() -> None:
    assert np.allclose(smooth(np.full(200, 3.0)), 3)
    gap = np.arange(200.0)
    gap[50] = np.nan
    assert np.isnan(smooth(gap)[50]) and np.allclose(smooth(gap)[[20, 100]], [20, 100])
    y = np.random.default_rng(0).normal(size=100_000)
    y[[12_345, 77_777]] = 50, -50
    y[300:1100] = np.nan
    keep = thin(y)
    assert keep.size <= POINTS and {0, 12_345, 77_777, 99_999} <= set(keep.tolist())
    assert np.isnan(y[keep]).any(), "a long gap stays a gap"
    assert thin(np.arange(10.0)).tolist() == list(range(10))
    edges, values = bins(np.arange(1, 100_001), np.ones((2, 100_000)), mean=False)
    assert values.shape[1] <= BINS and values.sum() == 200_000 and edges[[0, -1]].tolist() == [0.5, 100_000.5]


def test_numbers_read_well() -> None:
    values = (0, 0.6549, -0.2, 1.2e-7, 1234.5, 12, 1e9, None, math.nan)
    assert [number(v) for v in values] == ["0", "0.655", "−0.200", "1.2e−7", "1234", "12.0", "1e9", "–", "–"]
    assert tick_labels([0.0, 0.25, 0.5], 0.25) == ["0", "0.25", "0.50"]
    assert tick_labels([-1e-3, -2.5e-4, 0.0], 2.5e-4) == ["−1e−3", "−2.5e−4", "0"]
    assert tick_labels([20_000.0, 40_000.0], 20_000.0) == ["20k", "40k"]
    assert [duration(s) for s in (1.84, 75, 500, 8000)] == ["1.8 s", "75 s", "8 min 20 s", "2 h 13 min"]


def test_headline_and_health(run: Path, page: str) -> None:
    text = Tree(page).visible
    assert "+0.250 (95 % interval +0.216 … +0.286): a gain, over 150 prompts × 3 noises." in text
    assert (
        "finished, 100 of 100 iterations" in text
        and "Constant throughout: clipped, clipped high, clipped low 0; mean ratio 1.00." in text
    )
    (read,) = read_runs([run])
    assert [f.title for f in findings(read) if f.level == "warn"] == ["Events: 1 × memory, 1 × warning"]


def alter(run: Path, change) -> list[str]:
    """Titles of the warnings after ``change`` has edited each record in place."""
    records = metrics(run)
    for r in records:
        change(r)
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run / "events.jsonl").unlink(missing_ok=True)
    return [f.title for f in findings(read_runs([run])[0]) if f.level == "warn"]


def test_the_first_iteration_at_fault_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    alter(run, lambda r: r.update({"policy/ratio_deviation": 1e-3 if r["iteration"] in (70, 90) else 1e-7}))
    assert "limit 1e−5. First above it at iteration 70." in Tree(build_report([run])).visible


def fall(record: dict[str, Any]) -> None:
    if "reward/held_out" in record:
        record["reward/held_out"] = 1 - abs(record["iteration"] - 50) / 60


@pytest.mark.parametrize(
    ("title", "change"),
    [
        ("Held-out reward falls", fall),
        ("On-policy ratio is off", lambda r: r.update({"policy/ratio_deviation": 1e-3 if r["iteration"] == 70 else 1e-7})),
        ("Most groups teach nothing", lambda r: r.update({"advantage/equal_groups": 0.8})),
        ("Failed rewards", lambda r: r.update({"advantage/failed": 0.1 if r["iteration"] > 90 else 0.0})),
        ("Numbers that are not finite", lambda r: r.update({"policy/grad_norm": None if r["iteration"] == 9 else 0.1})),
    ],
)  # fmt: skip
def test_each_rule_warns_of_its_fault_only(tmp_path: Path, title: str, change) -> None:
    run = write_run(tmp_path / "run")
    assert alter(run, lambda r: None) == []
    assert alter(run, change) == [title]


def test_what_is_not_measured_is_not_called_zero(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    alter(run, lambda r: r.update({"policy/kl": 0.0}))
    assert "kL divergence" not in (text := Tree(build_report([run])).visible)
    assert "KL divergence 0 (measured only with loss.kl_weight above 0)" in text


def test_numbers_beyond_all_sense_do_no_harm(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", iterations=20)
    alter(
        run,
        lambda r: r.update({"policy/kl": 1e-320, "policy/grad_norm": 1e99, "policy/loss": -(10**400), "reward/train": 1e308}),
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 1000000000000000000000000000000, "reward/train": 1}\n{"iteration": -1}\n')
    (read,) = read_runs([run])
    assert read.done == 20 and not np.isfinite(read.column("reward/train")).any()
    assert plots(build_report([run]))


def test_user_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&\"'\x00\ud800"
    run = write_run(tmp_path / "<script>&\"'", name="<i>name&")
    records = metrics(run)
    for r in records:
        r["selection/categories"] = {evil: 3, '"><img src=x onerror=alert(1)>': 1}
        r[f"perf/{evil}_seconds"] = r[f"perf/reward/{evil}/seconds"] = r[f"reward/{evil}/failed"] = 1.0
        r[f"reward/held_out_{evil}"] = 0.5
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run / "events.jsonl").write_text(json.dumps({"iteration": 5, "kind": '"><b>', "message": evil}) + "\n")
    (run / "manifest.json").write_text(json.dumps({evil: evil}))
    page = build_report([run])
    page.encode("utf-8")
    tree = Tree(page)
    assert sum(tag == "script" for tag, _ in tree.tags) == 1
    assert not any(tag in ("b", "img") and "onerror" in attrs for tag, attrs in tree.tags)
    assert "<script>alert(1)</script>&\"'" in tree.visible and "<i>name&" in tree.visible
    assert plots(page), "the charts are well-formed XML"


def test_seconds_failures_and_reasons_of_each_reward_are_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    records = metrics(run)
    for i, r in enumerate(records):
        for name in ("ocr", "pkg:Reward", *"abcdefghij"):
            r |= {f"perf/reward/{name}/seconds": 1.5 + 0.1 * i, f"reward/{name}/failed": 0.01 * i}
    records[3]["reward/ocr/failed_no text"] = 4.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    visible = Tree(build_report([run])).visible
    for words in ("Seconds by reward", "Failed by reward", "Reasons of failures", "pkg:Reward", "ocr: no text"):
        assert words in visible, words
    assert "Failed by reward: pkg:Reward" in Tree(build_report([run, run])).visible
    assert "Failed by reward" not in Tree(build_report([write_run(tmp_path / "other")])).visible


def test_how_long_ranks_wait_and_for_whom_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    waited = {f"ranks/waited_seconds_{name}": share for name, share in (("min", 0.1), ("median", 0.2), ("max", 0.9))}
    records = [
        r | {k: v * (1 + i % 3) for k, v in waited.items()} | {"ranks/slowest": i % 4} for i, r in enumerate(metrics(run))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    visible = Tree(build_report([run])).visible
    assert "Waiting for other ranks" in visible and "Slowest rank" in visible
    assert "Slowest rank" not in Tree(build_report([write_run(tmp_path / "other")])).visible


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    tree = Tree(page)
    for tag, attrs in tree.tags:
        assert tag not in ("link", "iframe", "object", "base", "use"), tag
        assert not (tag == "script" and attrs.get("src"))
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            assert (attrs.get(name) or "#").startswith(("#", "data:image/png;base64,")), attrs
        assert not any(name.startswith("on") for name in attrs)
    assert not re.search(
        r"https?://|@import|url\(|fetch\(|XMLHttpRequest|innerHTML", re.sub(r"data:image/png;base64,[\w+/=]+", "", page)
    )


def test_structure_is_accessible(page: str) -> None:
    tree = Tree(page)
    ids = [attrs["id"] for _, attrs in tree.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    for plot in plots(page):
        title, description = plot.find("title"), plot.find("desc")
        assert plot.get("role") == "img" and title is not None and description is not None
        assert plot.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}" and title.text and description.text
    assert all(attrs.get("alt") and attrs.get("width") for tag, attrs in tree.tags if tag == "img")
    targets = {attrs["href"] for tag, attrs in tree.tags if tag == "a"}
    assert targets <= {f"#{i}" for i in ids} and len(targets) == 9
    shown = [attrs for tag, attrs in tree.tags if tag == "img"]
    assert [attrs["alt"] for attrs in shown] == [f"Samples at iteration {i}" for i in (0, 20, 40, 60, 80, 100)]
    assert sum("checked" in attrs for _, attrs in tree.tags) == 1


@pytest.mark.parametrize("missing", ["config.toml", "manifest.json", "metrics.jsonl", "events.jsonl", "result.json", "samples"])
def test_missing_parts_are_left_out(tmp_path: Path, missing: str) -> None:
    run = write_run(tmp_path / "run", grids=2)
    path = run / missing
    path.unlink() if path.is_file() else path.rename(tmp_path / "elsewhere")
    Tree(build_report([run]))


def test_damaged_files_are_told_and_survived(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", iterations=30, grids=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('not json\n[1]\n{"iteration": "x"}\n{"iteration": 31, "reward/train": {"deep": []}, "policy/kl": NaN}\n')
        file.write('{"iteration": 30, "reward/train": 1e400, "policy/lr": "text", "policy/loss": true}\n{"iteration": 32, "rew')
    for name in ("manifest.json", "result.json"):
        (run / name).write_text("{")
    (run / "config.toml").write_text("name = ")
    grid = run / "samples" / "step-000030.png"
    grid.write_bytes(grid.read_bytes()[:-20])
    (run / "samples" / "step-x.png").write_bytes(b"")
    (read,) = read_runs([run])
    assert read.done == 31 and len(read.grids) == 2 and math.isnan(read.column("reward/train")[29])
    assert "3 unreadable lines of metrics.jsonl left out." in read.notes and len(read.notes) == 6
    assert "3 unreadable lines" in Tree(build_report([run])).visible


def test_runs_still_going(tmp_path: Path) -> None:
    for iterations in (0, 1, 2, 10, 57):
        run = write_run(tmp_path / str(iterations), iterations=iterations)
        tree = Tree(build_report([run]))
        assert f"unfinished, {iterations} of 100 iterations" in tree.visible
        assert any(tag == "progress" and attrs["value"] == str(iterations) for tag, attrs in tree.tags)
    assert "Held-out reward so far" in tree.visible
    with (run / "events.jsonl").open("a") as file:
        file.write('{"iteration": 57, "kind": "signal", "message": "stopped by SIGTERM"}\n')
    assert "stopped, 57 of 100 iterations" in Tree(build_report([run])).visible


def test_repeated_iterations_count_once_and_the_last_line_holds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", iterations=20)
    again = metrics(run)[9] | {"reward/train": 0.999}
    del again["reward/held_out"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    (read,) = read_runs([run])
    assert read.iteration.tolist() == list(range(1, 21)) and read.column("reward/train")[9] == 0.999
    assert read.known("reward/held_out")[0].tolist() == [20]


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"tiny-{i}", seed=i, level=0.3 - 0.1 * i, lr=(1 + i) * 1e-4, grids=2) for i in range(3)]
    page = build_report(runs)
    tree = Tree(page)
    for i, run in enumerate(runs):
        plot, path = path_of(page, "reward/train", "raw", run=i)
        x, y = coordinates(path)[41]
        value = metrics(run)[41]["reward/train"]
        assert value_on(plot, x, y) == (pytest.approx(42, abs=0.1), pytest.approx(value, abs=0.003))
        assert path.get("class") == f"raw c{i}" and path.get("data-label") == run.name
    keys = re.findall(r"<code>([\w.]+)</code>", page[page.index('id="recipe"') : page.index('id="machine"')])
    assert keys == ["train.seed", "optimizer.lr"]
    assert "3 runs compared" in tree.visible and "+0.200" in tree.visible and tree.visible.count("Before: iteration 0") == 3
    assert sum("interval" in (attrs.get("class") or "").split() for _, attrs in tree.tags) == 3
    assert "All runs have the same recipe." in Tree(build_report([runs[0], runs[0]])).visible


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a" / "run", 3), write_run(tmp_path / "b" / "run", 3)
    assert [r.label for r in read_runs([a, b, b])] == ["a/run", "b/run (2)", "b/run (3)"]


def test_images_between_first_and_last_keep_to_the_budget(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", grids=11)])
    size = max(grid.size for grid in run.grids) * 4 / 3
    assert [g.iteration for g in embedded([run], 1)[0]] == [0, 100]
    assert [g.iteration for g in embedded([run], int(5 * size))[0]] == [0, 20, 50, 80, 100]
    assert len(embedded([run])[0]) == 11


def test_not_a_run_folder(tmp_path: Path) -> None:
    for folder, said in ((tmp_path, "not a run folder"), (tmp_path / "absent", "no such folder")):
        with pytest.raises(InputError, match=said) as caught:
            build_report([folder])
        assert str(folder) in str(caught.value) and "adagrpo train" in str(caught.value)
    with pytest.raises(InputError, match="at least one"):
        build_report([])


def test_writing_is_atomic(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep" / "report.html"
    assert write_report([run], out) == out
    whole = out.read_text("utf-8")
    assert whole == build_report([run]) and [p.name for p in out.parent.iterdir()] == ["report.html"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WriteError, match="No space left"):
        write_report([run], out)
    assert out.read_text("utf-8") == whole and [p.name for p in out.parent.iterdir()] == ["report.html"]


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    page = build_report([write_run(tmp_path / "run", iterations=1000, total=1000)])
    assert len(page) < 600_000
    assert max(len(coordinates(path)) for plot in plots(page) for path in plot.iter("path")) <= 2 * POINTS


@pytest.mark.proof
def test_a_long_run_is_reported_in_half_a_second(tmp_path: Path) -> None:
    run, spent = write_run(tmp_path / "run", iterations=1000, total=1000), []
    for _ in range(3):
        start = time.process_time()
        build_report([run])
        spent.append(time.process_time() - start)
    assert min(spent) < 0.5, spent


def test_script_and_style_are_plain() -> None:
    files = resources.files("adagrpo.report")
    assert "</script" not in (files / "script.js").read_text("utf-8")
    assert "</style" not in (files / "style.css").read_text("utf-8")


SIGHT = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def test_colours_differ_for_colour_blind_readers_and_stand_out() -> None:
    """Machado et al. (2009) simulation; distance in Oklab x 100; contrast of WCAG 2 against the card."""
    style = (resources.files("adagrpo.report") / "style.css").read_text("utf-8")
    for theme in re.findall(r":root \{.*?\}", style, re.DOTALL):
        colours = dict(re.findall(r"--(\w+): (#\w+);", theme))
        card = linear(colours["card"])
        palette = [linear(colours[f"c{i}"]) for i in range(8)]
        for colour in palette:
            assert contrast(colour, card) >= 3
        for text in ("ink", "soft", "good", "warn", "link"):
            assert contrast(linear(colours[text]), card) >= 4.5
            assert contrast(linear(colours[text]), linear(colours["page"])) >= 4.5
        for matrix in SIGHT.values():
            seen = [oklab(np.asarray(matrix) @ colour) for colour in palette]
            assert min(100 * np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 8


def test_gaps_repeats_and_damaged_pictures_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", iterations=40, grids=3)
    metrics = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*metrics[:10], *metrics[13:], metrics[20]]) + "\n", "utf-8")
    events = (run / "events.jsonl").read_bytes() if (run / "events.jsonl").exists() else b""
    (run / "events.jsonl").write_bytes(b"\x00\x01\n" + events)
    picture = sorted((run / "samples").glob("*.png"))[0]
    content = bytearray(picture.read_bytes())
    content[len(content) // 2] ^= 1
    picture.write_bytes(content)
    (read,) = read_runs([run])
    assert "metrics.jsonl lacks 3 iterations between the first and the last." in read.notes
    assert "metrics.jsonl has 1 repeated iterations: the last of each counts." in read.notes
    assert "1 unreadable line of events.jsonl left out." in read.notes
    assert f"samples/{picture.name} is damaged and left out." in read.notes
    assert picture not in [grid.path for grid in read.grids]
