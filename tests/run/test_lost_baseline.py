"""The initial policy's scores are measured on untrained weights, or the comparison is left out; a partial trace is no trace."""

import gzip
import hashlib
import json

import pytest
import torch
from toy import toy_config, toy_trainer

from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder

CONFIG = toy_config(train={"iterations": 4, "slots": 1})
HELD_OUT = ["a", "b", "c", "d"]


def finished(path) -> Fit:
    run = RunFolder.fresh(path)
    trainer = toy_trainer(CONFIG)
    run.write_start(CONFIG, trainer.model.device, {})
    fit = Fit(trainer.config, trainer, run, HELD_OUT, say=lambda line: None)
    fit()
    return fit


def resumed(path) -> Fit:
    run = RunFolder.existing(path, CONFIG)
    fit = Fit(CONFIG, toy_trainer(CONFIG), run, HELD_OUT, say=lambda line: None)
    fit.resume(run.checkpoints / "step-000002")
    fit()
    return fit


@pytest.mark.parametrize("content", [None, "", "[[0.0, 0.0]]", "{}", '[["a"]]'])
def test_a_lost_baseline_comes_from_the_checkpoint(content, tmp_path) -> None:
    known = finished(tmp_path / "run").run.read_json("result.json")
    file = tmp_path / "run" / "baseline.json"
    before = file.read_bytes()
    file.unlink() if content is None else file.write_text(content)
    assert resumed(tmp_path / "run").run.read_json("result.json") == known and abs(known["gain"]) > 0
    assert file.read_bytes() == before


def test_where_no_checkpoint_has_it_nothing_is_compared(tmp_path) -> None:
    run = finished(tmp_path / "run").run
    state = run.checkpoints / "step-000002" / "state" / "state.pt"
    content = torch.load(state)
    content.pop("baseline", None)
    torch.save(content, state)
    index = state.parents[1] / "checkpoint.json"
    described = json.loads(index.read_text())
    described.pop("seal", None)
    described["files"].pop("state/records.json", None)  # as the former version wrote it
    digest = hashlib.sha256(state.read_bytes()).hexdigest()
    described["files"]["state/state.pt"] = {"bytes": state.stat().st_size, "sha256": digest}
    index.write_text(json.dumps(described))
    known = run.read_json("result.json")
    assert resumed(tmp_path / "run").run.read_json("result.json") == known  # from baseline.json
    (run.path / "baseline.json").unlink()
    fit = resumed(tmp_path / "run")
    assert not (run.path / "result.json").exists() and fit.held_out.baseline is None
    assert "the initial policy's scores are lost" in (run.path / "events.jsonl").read_text()


def test_a_partial_trace_is_told() -> None:
    from adagrpo.run.trace import export_trace

    class Profiler:
        def __init__(self, text: bytes) -> None:
            self.text = text

        def export_chrome_trace(self, path: str) -> None:
            with gzip.open(path, "wb") as file:
                file.write(self.text)

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        export_trace(Profiler(b'{"traceEvents": []}\n'), f"{folder}/whole.json.gz")
        for part in (b"", b'{"traceEvents": [{"name": "a"}, {"na'):
            with pytest.raises(ValueError, match="only a part"):
                export_trace(Profiler(part), f"{folder}/part.json.gz")
