"""Everything that is written as JSON is JSON, whatever the numbers and names in it."""

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_config, toy_trainer

from adagrpo.bench.records import new_record
from adagrpo.bench.statistics import Series
from adagrpo.disk.files import write_json
from adagrpo.evaluate.fidelity import Fidelity
from adagrpo.recipe.keys import Config
from adagrpo.run.checkpoint import INDEX, Retention, save_checkpoint
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder
from adagrpo.text.strict_json import from_json, to_json

NAN, INF = math.nan, math.inf
LONE = "\udcff and \ud800"  # how Python reads a file name that is not UTF-8
BAD = {"a": NAN, "b": [INF, {"c": (-INF, 1.5)}], LONE: LONE, "</script>\u2028": 10**30, "t": True, "n": None, "i": -3}


def parsed(file: Path) -> list[Any]:
    """The lines of a file, or its whole, by the standard's letter."""
    text = file.read_bytes().decode("utf-8")  # fails on lone surrogates
    texts = text.splitlines() if file.suffix == ".jsonl" else [text]
    return [json.loads(each, parse_constant=lambda word: pytest.fail(f"{file}: {word}")) for each in texts]


def test_what_json_cannot_say_is_null_or_spelt_out_and_the_rest_stays() -> None:
    found = json.loads(to_json(BAD))
    spelt = r"\udcff and \ud800"
    assert found == {
        "a": None, "b": [None, {"c": [None, 1.5]}], spelt: spelt, "</script>\u2028": 10**30, "t": True, "n": None, "i": -3
    }  # fmt: skip
    plain = {"x": 0.1, "y": [1e-300, "ä", ""], "2": {}}
    assert len(to_json({"\u2028": "a\u0085b\u2029\n\x0b\x1d"}).splitlines()) == 1
    assert to_json(plain, indent=1) == json.dumps(plain, indent=1, ensure_ascii=False)
    with pytest.raises(TypeError):
        to_json({"t": torch.zeros(1)})


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{", "\ufeff[]", b"\xff\xfe", "nul"])
def test_what_cannot_be_read_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        from_json(text)


def test_every_writer_keeps_to_the_standard(tmp_path: Path) -> None:
    run = RunFolder.fresh(tmp_path / "run")
    run.write_start(Config(), torch.device("cpu"), BAD)
    run.log({"iteration": 1, **BAD})
    run.event(1, LONE, LONE)
    write_json(tmp_path / "free.json", BAD)
    checkpoint = save_checkpoint(run.checkpoints, 1, {}, lambda folder: None, Retention(1), held_out=NAN)
    record = new_record("c", torch.device("cpu"), (LONE,), {"s": Series("s", (NAN, INF))}, BAD, None, LONE).write(tmp_path)
    write_json(tmp_path / "fidelity.json", Fidelity(LONE, BAD, "cpu", 1, 1, *[NAN, INF, -INF, NAN, NAN, NAN]).as_json())
    assert parsed(checkpoint / INDEX)[0]["held_out"] is None and parsed(record)[0]["facts"]["b"][0] is None
    written = [file for file in tmp_path.rglob("*.json*") if file.is_file()]
    assert len(written) >= 7
    assert all(parsed(file) for file in written)


@pytest.mark.parametrize(("prompts", "words"), [(1, "no interval, 1 prompt x 1 noise)"), (4, "95 % ")])
def test_a_run_with_one_held_out_prompt_says_that_it_has_no_interval(prompts: int, words: str, tmp_path: Path) -> None:
    evaluation = {"every": 2, "prompts": 1, "final_prompts": prompts, "final_noises": 1}
    trainer = toy_trainer(toy_config(evaluation=evaluation, train={"iterations": 2}))
    run = RunFolder.fresh(tmp_path / "run")
    run.write_start(trainer.config, trainer.model.device, {})
    outcome = Fit(trainer.config, trainer, run, [f"h{i}" for i in range(4)], say=lambda line: None)()
    assert words in str(outcome.gain) and "nan" not in str(outcome.gain)
    (result,) = parsed(run.path / "result.json")
    assert (result["low"] is None) is (prompts == 1) and math.isfinite(result["gain"])
    for file in run.path.glob("*.json*"):
        parsed(file)
    assert ("; no interval." in (run.path / "report.html").read_text("utf-8")) is (prompts == 1)


def test_only_one_module_knows_how_json_is_written() -> None:
    """Others make text that no file receives: digests, and a cell of the report's page."""
    sources = Path(__file__).resolve().parents[2] / "adagrpo"
    writing = {
        str(path.relative_to(sources))
        for path in sources.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dumps", "json.dump")
    }
    assert writing == {"text/strict_json.py", "study/seeds.py", "report/page.py"}
