"""Series, records and their comparison, on synthetic rounds."""

import dataclasses
import json
import os
import random

import pytest
import torch

from adagrpo.bench.compare import compare
from adagrpo.bench.records import Record, device_slug, new_record, read_record
from adagrpo.bench.statistics import Series, change
from adagrpo.cli import main
from adagrpo.errors import InputError
from adagrpo.recipe.keys import Config
from adagrpo.recipe.load import load_recipe


def record(case: str = "iteration-tiny", **series: Series) -> Record:
    return new_record(case, torch.device("cpu"), ("bench", "iteration"), series, {"peak_tflops": None}, Config(), "a note")


def rounds(mean: float, noise: float, seed: int, count: int = 6) -> Series:
    generator = random.Random(seed)
    return Series("s", tuple(mean * (1 + generator.gauss(0, noise)) for _ in range(count)))


def test_median_and_spread_are_those_worked_out_by_hand() -> None:
    series = Series("s", (1.0, 2.0, 4.0, 8.0, 100.0))
    assert series.median == 4.0
    assert series.spread == pytest.approx(1.4826 * 3.0)  # distances 3, 2, 0, 4, 96
    assert dataclasses.replace(series, exact=True).spread == 0


def test_noise_is_not_flagged_and_a_real_change_is() -> None:
    false = sum(change("s", rounds(1.0, 0.03, 2 * i), rounds(1.0, 0.03, 2 * i + 1)) is not None for i in range(400))
    found = sum(change("s", rounds(1.0, 0.03, 2 * i), rounds(1.2, 0.03, 2 * i + 1)) is not None for i in range(400))
    assert false <= 12 and found >= 392, (false, found)


def test_the_rule_by_hand() -> None:
    quiet = Series("s", (1.0, 1.0, 1.0))
    assert change("s", quiet, Series("s", (1.009,) * 3)) is None  # below 1 %
    slower = change("s", quiet, Series("s", (1.02,) * 3))
    assert slower is not None and slower.verdict == "worse" and slower.share == pytest.approx(0.02)
    wide = Series("s", (0.9, 1.0, 1.1))  # spread 0.148, pooled with itself 0.148: three times that is 0.445
    assert change("s", wide, Series("s", (1.3, 1.4, 1.5))) is None
    assert change("s", wide, Series("s", (1.4, 1.5, 1.6))) is not None
    counted = Series("evaluations", (740.0,), exact=True)
    more = change("n", counted, Series("evaluations", (741.0,), exact=True))
    assert more is not None and more.verdict == "worse"
    faster = change("r", Series("images/s", (10.0,), "higher"), Series("images/s", (12.0,), "higher"))
    assert faster is not None and faster.verdict == "better"
    other = change("i", Series("images", (10.0,), "", True), Series("images", (12.0,), "", True))
    assert other is not None and other.verdict == "changed"


def test_a_record_survives_its_file_and_names_what_repeats_it(tmp_path) -> None:
    written = record(seconds=Series("s", (1.0, 1.1)))
    path = written.write(tmp_path)
    assert read_record(path) == written
    commit = (written.machine["commit"] or "no-commit")[:9]
    assert path.relative_to(tmp_path).as_posix() == (
        f"cpu-{torch.get_num_threads()}-threads/{written.date[:10]}-{commit}-iteration-tiny.json"
    )
    data = json.loads(path.read_text())
    assert data["schema"] == 1 and data["argv"] == ["bench", "iteration"] and data["note"] == "a note"
    assert {"versions", "python", "device", "commit", "threads", "processor", "dirty"} <= data["machine"].keys()
    assert data["series"]["seconds"]["values"] == [1.0, 1.1]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(data["recipe"], "utf-8")
    assert load_recipe(recipe) == Config()


def test_device_slug() -> None:
    assert device_slug(torch.device("cpu")) == f"cpu-{torch.get_num_threads()}-threads"
    assert device_slug(torch.device("meta")) == "meta"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["no such record"]),
        ("{", ["broken JSON"]),
        ("[" * 100_000, ["broken JSON", "nested too deeply"]),
        (f'{{"schema": {"9" * 5000}}}', ["broken JSON"]),
        ("\0", ["holds a NUL"]),
        (os.mkfifo, ["a pipe"]),
        (os.mkdir, ["a folder"]),
        ('{"schema": 1, "series": {"s": {"unit": "s", "values": [NaN], "better": "", "exact": false}}}', ["finite values"]),
        ("[]", ["schema None"]),
        ('{"schema": 99}', ["schema 99", "expected 1"]),
        ('{"schema": 1, "series": {}}', ["damaged record", "KeyError"]),
        ('{"schema": 1, "series": {"s": {"unit": "s", "values": [], "better": "", "exact": false}}}', ["finite values"]),
    ],
)
def test_what_is_no_record_is_one_error(text, words, tmp_path, capsys) -> None:
    path = tmp_path / "a.json"
    if callable(text):
        text(path)
    elif text is not None:
        path.write_text(text, "utf-8")
    with pytest.raises(InputError) as error:
        read_record(path)
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)
    assert main(["bench", "compare", str(path), str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_compare_shows_only_what_differs_and_fails_on_regressions(tmp_path, capsys) -> None:
    counted = Series("evaluations", (740.0,) * 6, exact=True)
    before = record(seconds=rounds(1.0, 0.02, 1), probe=rounds(0.2, 0.02, 2), evaluations=counted)
    after = record(seconds=rounds(1.3, 0.02, 3), probe=rounds(0.2, 0.02, 4), evaluations=counted)
    assert [(c.name, c.verdict) for c in compare(before, after)] == [("seconds", "worse")]
    a, b = before.write(tmp_path / "a"), after.write(tmp_path / "b")
    assert main(["bench", "compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "seconds: " in out and "probe" not in out and "2 of 3 quantities within noise" in out and "a note" in out
    assert main(["bench", "compare", str(a), str(b), "--fail"]) == 1
    assert main(["bench", "compare", str(b), str(a), "--fail"]) == 0  # faster is no regression


def test_records_of_other_cases_and_devices_are_refused(tmp_path, capsys) -> None:
    one, two = (record(case, seconds=rounds(1.0, 0.02, 1)) for case in ("iteration-tiny", "budget-tiny"))
    with pytest.raises(InputError, match="different cases"):
        compare(one, two)
    elsewhere = dataclasses.replace(one, device="nvidia-h100")
    with pytest.raises(InputError, match="different devices"):
        compare(one, elsewhere)
    other = dataclasses.replace(one, machine=one.machine | {"processor": "another"})
    with pytest.raises(InputError, match="different processors"):
        compare(one, other)
    with pytest.raises(InputError, match="no quantity in common"):
        compare(one, record(other=rounds(1.0, 0.02, 1)))
    a, b = one.write(tmp_path / "a"), elsewhere.write(tmp_path / "b")
    assert main(["bench", "compare", str(a), str(b), "--fail"]) == 2
    assert "different devices" in capsys.readouterr().err
