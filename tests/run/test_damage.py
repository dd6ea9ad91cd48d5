"""Whatever befell a run's files: it goes on bitwise, says what it fell back to, or refuses by name; none silent."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from damage import DAMAGES, Damage, delete, flip, folder, swap
from toy import toy_config

from adagrpo.cli import main
from adagrpo.recipe.keys import GuardConfig, GuardsConfig, RewardConfig
from adagrpo.recipe.load import to_toml

CHECKPOINT = "checkpoints/step-000004"
IN_CHECKPOINT = ("state/state.pt", "state/records.json", "checkpoint.json", "toy.pt")
FILES = (
    *(f"{CHECKPOINT}/{name}" for name in IN_CHECKPOINT),
    "config.toml", "manifest.json", "metrics.jsonl", "events.jsonl", "baseline.json", "memory.json", "result.json",
    "report.html", "samples/step-000002.png",
)  # fmt: skip


def recipe(file: Path, seed: int) -> Path:
    config = toy_config(
        model={"family": "parts:model", "device": "cpu"},
        data={"prompts": "parts:prompts", "held_out": "parts:held_out"},
        rewards=(RewardConfig("parts:reward"),),
        train={"iterations": 4, "slots": 1, "seed": seed},
        output={"grid_every": 2, "grid_prompts": 2, "checkpoint_every": 1, "keep_last": 3},
        evaluation={"every": 2, "prompts": 2, "final_prompts": 2, "final_noises": 1},
        guards=GuardsConfig(grad_norm=GuardConfig(limit=1e-9, action="warn")),
        name="toy",
    )
    file.write_text(to_toml(config), "utf-8")
    return file


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """``whole`` and ``other``, two finished runs of seeds 0 and 1, with their recipes."""
    base = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed, name in enumerate(("whole", "other")):
        assert main(["train", str(recipe(base / f"{name}.toml", seed)), "--out", str(base / name)]) == 0
    yield base
    torch.set_num_threads(threads)


def timeless(file: Path) -> list[dict]:
    if not file.exists():
        return []
    records = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith("perf/")} for record in records]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / CHECKPOINT / "toy.pt")


def judge(runs: Path, run: Path, name: str, damage: Damage, capsys) -> str:
    """Damage one file of a copy and resume it; 'bitwise', 'fallback' or 'named'."""
    shutil.copytree(runs / "whole", run)
    damage(run / name, runs / "other" / name)
    capsys.readouterr()
    code = main(["train", str(runs / "whole.toml"), "--out", str(run), "--resume", "latest"])
    case, said = f"{name}, {damage.__name__}", capsys.readouterr()
    if code:
        assert code in (1, 2) and (Path(name).name in said.err or f"--out {run}" in said.err), f"{case}: {said.err}"
        return "named"
    notices = " ".join(e["message"] for e in map(json.loads, (run / "events.jsonl").read_text("utf-8").splitlines()))
    known, now = weights(runs / "whole"), weights(run)
    assert all(torch.equal(known[key], now[key]) for key in known), case
    for file in ("result.json", "baseline.json"):
        assert (run / file).read_bytes() == (runs / "whole" / file).read_bytes(), case
    before, after = (timeless(folder / "metrics.jsonl") for folder in (runs / "whole", run))
    assert [r for r in before if r in after] == after, case
    told = "skipped" in notices or Path(name).name in notices
    assert told or before == after, case
    earlier = (runs / "whole" / "events.jsonl").read_text("utf-8").splitlines()
    assert told or (run / "events.jsonl").read_text("utf-8").splitlines()[: len(earlier)] == earlier, case
    picture = "samples/step-000002.png"
    assert told or (run / picture).read_bytes() == (runs / "whole" / picture).read_bytes(), case
    assert json.loads((run / "manifest.json").read_text())["id"] == json.loads((runs / "whole/manifest.json").read_text())["id"]
    assert not [p for p in run.rglob("*") if "partial" in p.name], case
    return "fallback" if told else "bitwise"


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name: str, runs: Path, tmp_path: Path, capsys) -> None:
    """Two of the kinds of damage; what a checkpoint vouches for is never taken for sound."""
    outcomes = {d.__name__: judge(runs, tmp_path / d.__name__, name, d, capsys) for d in (flip, swap)}
    if name not in ("config.toml", "memory.json", "result.json", "report.html"):
        assert set(outcomes.values()) == {"fallback"}, outcomes


@pytest.mark.parametrize("name", ["metrics.jsonl", "manifest.json", f"{CHECKPOINT}/checkpoint.json", "result.json"])
def test_missing_files_and_folders_in_their_place(name: str, runs: Path, tmp_path: Path, capsys) -> None:
    for damage in (delete, folder):
        assert judge(runs, tmp_path / damage.__name__, name, damage, capsys) in ("bitwise", "fallback")


@pytest.mark.proof
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_in_every_way(name: str, runs: Path, tmp_path: Path, capsys) -> None:
    for damage in DAMAGES:
        judge(runs, tmp_path / damage.__name__, name, damage, capsys)
