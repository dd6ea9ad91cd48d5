"""`bench/README.md` is what its records say."""

import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from adagrpo.bench.picture import Bars, draw
from adagrpo.bench.readme import pages
from adagrpo.bench.records import new_record
from adagrpo.bench.statistics import Series
from adagrpo.cli import main
from adagrpo.errors import InputError

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def test_the_committed_page_is_up_to_date(capsys) -> None:
    assert main(["bench", "readme", "--check", "--results", str(RESULTS)]) == 0, capsys.readouterr().out


def record(seconds: float, date: str):
    rates = {name: Series("", (7.0,)) for name in ("images_per_second", "evaluations_per_second", "tflops")}
    series = {"seconds": Series("s", (seconds,)), "seconds/probe": Series("s", (seconds,)), **rates}
    found = new_record("iteration-tiny", torch.device("cpu"), (), series, {}, note="beside other work")
    return type(found)(**{**vars(found), "date": date})


def test_the_newest_record_of_a_case_is_shown_with_its_note(tmp_path) -> None:
    results = tmp_path / "results"
    record(3.0, "2026-01-02T00:00:00+00:00").write(results)
    record(2.0, "2026-01-01T00:00:00+00:00").write(results)
    assert main(["bench", "readme", "--results", str(results)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "3.00 ± 0" in text and "2.00 ± 0" not in text and "**beside other work**" in text
    assert "peak not stated" in text and "not measured" in text
    ElementTree.fromstring((tmp_path / "phases.svg").read_text())
    assert main(["bench", "readme", "--check", "--results", str(results)]) == 0
    record(4.0, "2026-01-03T00:00:00+00:00").write(results)
    assert main(["bench", "readme", "--check", "--results", str(results)]) == 1


def test_bars_have_lengths_in_proportion() -> None:
    group = Bars("a < b", {"one": {"probe": 1.0, "update": 1.0}, "two": {"probe": 1.0}}, {"one": 2.0, "two": 1.25})
    svg = ElementTree.fromstring(draw([group]))
    space = "{http://www.w3.org/2000/svg}"
    bars = [r for r in svg.iter(f"{space}rect") if r.find(f"{space}title") is not None]
    assert [float(r.get("width", "0")) for r in bars] == pytest.approx([290.0, 290.0, 290.0])
    texts = [t.text for t in svg.iter(f"{space}text")]
    assert "a < b" in texts and "2.00 s" in texts and "1.25 s" in texts


def test_a_broken_record_is_named(tmp_path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json.*broken JSON"):
        pages(tmp_path)
    (tmp_path / "a.json").unlink()
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"a\.json: a pipe"):
        pages(tmp_path)
