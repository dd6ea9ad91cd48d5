"""The tables of `docs/hosts.md`: figures from recipes, counted by hand where they are shown, and a record that fits them."""

from __future__ import annotations

import json
from pathlib import Path

from adagrpo.bench.hosts import (
    PREDICTED,
    cost_table,
    evaluations,
    host_recipes,
    hosts_page,
    keys_table,
    pairs_table,
    study_table,
)
from adagrpo.forecast import planned_evaluations
from adagrpo.recipe.load import load_recipe

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def row(table: str, name: str) -> list[str]:
    """Cells of a recipe."""
    return next([cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines() if f"| `{name}` |" in line)


def test_what_a_host_says() -> None:
    table = keys_table()
    model, rollout, group, advantage, loss, training, rewards = row(table, "flux1-dev-flow-grpo")
    assert "512 px, guidance 3.5, 128 tokens" in model and "LoRA 64/128 on 12 layers, feed-forward" in model
    assert rollout.startswith("trajectory, 6 steps, shift the model's own; flow 0.9; at 0 – 4")
    assert group == "48 × 24" and "std global, ddof 0, eps 0.0001" in advantage and loss == "clip 0.0001"
    assert "lr 0.0003" in training and "2 updates by slots" in training and rewards == "pickscore"
    assert "window of 3 in 0 – 2, at random" in row(table, "flux1-dev-flow-grpo-fast")[1]
    assert "9 trained, drawn by each sample; one initial noise per group" in row(table, "flux1-dev-dance-grpo")[1]
    assert row(table, "sd35-medium-tempflow")[4] == "clip 0.0001; KL 0.001, of means by step; step weights noise"


def test_what_a_host_costs() -> None:
    """48 x 24 trajectories of 6 steps, 5 of them trained: sampled, old log-probabilities, update; 48 x 10 candidates
    by half the steps, and 48 to the end."""
    plain, ada = 48 * 24 * (6 + 5 + 5), 48 * (10 * 3 + 6)
    record = {"peak_gib": 70.0, "bf16_ceiling_s": 100.2, "eager_bf16_s": 300.4}
    cells = row(cost_table({"flux1-dev-flow-grpo": record}), "flux1-dev-flow-grpo")
    assert cells == ["18,432", f"{plain + ada:,}", f"+{ada / plain:.1%}", "70", "100 … 300", "not predicted"]
    full = {"peak_gib": 240.0, "bf16_ceiling_s": 1.0, "eager_bf16_s": 2.0}
    assert row(cost_table({"flux1-dev-mix-grpo": full}), "flux1-dev-mix-grpo")[3] == "240: does not fit"


def test_tails_that_shrink_count_by_their_mean() -> None:
    """The window begins at 0 … 14; a trajectory takes its start, the window, and 0.4 of the levels that are left but one."""
    steps = [start + 4 + int((25 - (start + 3)) * 0.4) - 1 for start in range(15)]
    update = 2 * 32 * 12 * 4
    assert evaluations(load_recipe("flux1-dev-mix-grpo-flash")) == update + 32 * 12 * sum(steps) / 15


def test_what_a_study_says() -> None:
    gain = {"gain": -0.2, "gain_low": -0.25, "gain_high": -0.15}
    plain = {"prompts": "p", "host": "h", "arm": "plain", "seeds": 5, "after": 0.4, "evaluations": 1234.4} | gain
    other = plain | {"arm": "other", "difference": 0.1, "low": -0.05, "high": 0.25, "detectable": 0.2}
    first, second = study_table([plain, other]).splitlines()[2:]
    assert first == "| `p` | h | plain | 5 | 0.400 | -0.200 (-0.250 … -0.150) |  |  | 1,234 |"
    assert second.endswith("| +0.100 (-0.050 … +0.250) | 0.200 | 1,234 |")
    (pair,) = pairs_table([other | {"reference": "plain"}]).splitlines()[2:]
    assert pair == "| p | h | other | 5 | plain | +0.100 (-0.050 … +0.250) | 0.200 |"


def test_only_what_stands_between_marks_is_written(tmp_path) -> None:
    page = "before\n<!-- keys: written by `adagrpo bench readme` -->\nold\n<!-- end -->\nafter\n"
    written = hosts_page(page, tmp_path)
    assert written.startswith("before\n<!-- keys") and written.endswith("<!-- end -->\nafter\n")
    assert "old" not in written and keys_table() in written
    assert hosts_page(written, tmp_path) == written


def test_the_record_of_predictions_is_of_these_recipes() -> None:
    """A recipe that evaluates something else needs `make proof` to predict it anew."""
    found = json.loads((RESULTS / PREDICTED).read_text("utf-8"))["recipes"]
    names = [name + end for name in host_recipes() for end in ("", "-ada")]
    assert {name: each["evaluations"] for name, each in found.items()} == {
        name: planned_evaluations(load_recipe(name)) for name in names
    }
