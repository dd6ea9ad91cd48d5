"""The comparison behind ``same_as.py`` sees one bit, a lost key and a lost line; and nothing where there is nothing."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parent))
from bitwise import compare, plain, same, shown

LINE = {
    "iteration": 1,
    "perf/seconds": 0.5,
    "perf/probe_seconds": 0.1,
    "perf/probe_calls": 4,
    "loss": 0.1,
    "picked": ["a", "b"],
}


def run_folder(path: Path, line: dict = LINE, weight: float = 1.0, step: float = 3.0, place: str = "here") -> Path:
    """What a run leaves, in small."""
    (path / "step-1").mkdir(parents=True)
    (path / "metrics.jsonl").write_text(json.dumps(line) + "\n", "utf-8")
    save_file({"w": torch.tensor([0.5, weight])}, path / "step-1" / "model.safetensors")
    torch.save({"optimizer": [{"step": torch.tensor(step)}], "draws": 7, "filter": None}, path / "step-1" / "state.pt")
    (path / "step-1" / "config.json").write_text(json.dumps({"path": f"/{place}/model"}), "utf-8")
    (path / "1.png").write_bytes(b"image")
    (path / "manifest.json").write_text(json.dumps({"id": place}), "utf-8")
    return path


def test_equal_folders_are_equal_and_counted(tmp_path: Path) -> None:
    timed = LINE | {"perf/seconds": 9.0, "perf/probe_seconds": 8.0}
    base, head = run_folder(tmp_path / "base"), run_folder(tmp_path / "head", timed, place="there")
    verdict = compare(base, head, {"/here": "TREE", "/there": "TREE"})
    assert (verdict.difference, verdict.lines, verdict.tensors, verdict.keys) == ("", 1, 2, 2 + 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"line": LINE | {"loss": 0.1 + 2e-17}}, "metrics.jsonl:1: loss"),
        ({"line": LINE | {"perf/probe_calls": 5}}, "perf/probe_calls"),
        ({"line": {k: v for k, v in LINE.items() if k != "perf/seconds"}}, "perf/seconds only in base"),
        ({"line": LINE | {"new": 1}}, "new only in head"),
        ({"line": LINE | {"picked": ["b", "a"]}}, "picked/0"),
        ({"line": LINE | {"iteration": 1.0}}, "iteration"),
        ({"weight": 1.0 + 2**-23}, "step-1/model.safetensors: w: 1 of 2 numbers differ"),
        ({"step": 4.0}, "step-1/state.pt: optimizer/0/step"),
        ({"place": "elsewhere"}, "step-1/config.json: path"),
    ],
)
def test_the_first_difference_is_named(tmp_path: Path, change: dict, named: str) -> None:
    found = compare(run_folder(tmp_path / "base"), run_folder(tmp_path / "head", **change), {}).difference
    assert named in found


def test_files_are_compared_by_name_and_content(tmp_path: Path) -> None:
    base, head = run_folder(tmp_path / "base"), run_folder(tmp_path / "head")
    (head / "1.png").write_bytes(b"imagE")
    assert compare(base, head, {}).difference == "1.png: other bytes"
    (head / "1.png").unlink()
    assert compare(base, head, {}).difference == "1.png only in base"
    (base / "1.png").unlink()
    (head / "metrics.jsonl").write_text(2 * (json.dumps(LINE) + "\n"), "utf-8")
    assert compare(base, head, {}).difference == "metrics.jsonl: 1 lines != 2"


def test_a_metric_is_shown_only_above_zero(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "base", LINE | {"kl": 0.0, "clipped": None})
    assert shown(folder, "loss") and not any(shown(folder, name) for name in ("kl", "clipped", "missing"))


def test_leaves_are_the_same_only_in_type_and_every_bit() -> None:
    nan, zero = torch.tensor([float("nan"), 0.0]), torch.tensor(0.0)
    assert same(nan, nan.clone()) and same(float("nan"), float("nan")) and same(None, None)
    assert not same(zero, -zero) and not same(0.0, -0.0) and not same(1, True) and not same(1, 1.0)
    assert not same(zero, zero.double()) and not same(torch.zeros(2), torch.zeros(1, 2)) and not same(None, zero)


def test_words_keep_counts_and_lose_times() -> None:
    said = "/a/tree/x.py:12: Warning\n 50%|###  | 1/2\nprobe 24, update 36\ndone in 3.2 s by 1a2b3c4d\nreward 0.25 at /a/run\n"
    assert plain(said, {"/a/tree": "TREE", "/a/run": "WORK"}) == [
        "TREE: Warning", "probe 24, update 36", "done in TIME by ID", "reward 0.25 at WORK",
    ]  # fmt: skip
