"""Held-out rewards and chosen prompts by category, where the prompts have one."""

import json
from pathlib import Path

import pytest
import torch
from toy import toy_config, toy_trainer

from adagrpo.algorithm.sde import Stream
from adagrpo.prompts.prompt import Prompt
from adagrpo.report.page import build_report
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder

HELD_OUT = [Prompt("a", {"Category": "Arts"}), Prompt("b", {"Category": "People"}), "c", Prompt("d", {"Category": "Arts"})]


def fitted(path: Path, held_out: list[str]) -> Fit:
    trainer, run = toy_trainer(toy_config()), RunFolder.fresh(path)
    run.write_start(toy_config(), trainer.model.device, {})
    return Fit(trainer.config, trainer, run, held_out, say=lambda line: None)


def test_the_held_out_reward_by_category(tmp_path: Path) -> None:
    fit = fitted(tmp_path / "run", HELD_OUT)
    scores = fit.held_out.scores(HELD_OUT, 1, Stream.HELD_OUT)[0].double()
    found = fit.held_out.curve()["held_out/categories"]
    expected = {"Arts": float(scores[[0, 3]].mean()), "People": float(scores[1].mean()), "none": float(scores[2].mean())}
    assert found == pytest.approx(expected, rel=1e-5) and list(found) == list(expected)
    assert torch.unique(scores).numel() > 1


def test_the_report_draws_them_and_none_without_categories(tmp_path: Path) -> None:
    fitted(tmp_path / "run", HELD_OUT)()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [sorted(record.get("held_out/categories", {})) for record in records] == [[], ["Arts", "People", "none"]] * 2
    page = build_report([tmp_path / "run"])
    assert "Held-out reward by category" in page and 'data-key="held_out/categories/People"' in page
    assert "held_out/categories" not in fitted(tmp_path / "plain", ["a", "b"]).held_out.curve()
