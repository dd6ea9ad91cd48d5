"""A full disk at any write: exit code 1, the first message with its remedy, and a run that goes on once there is room."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from full_disk import full_after
from toy import toy_config

from adagrpo.cli import main
from adagrpo.recipe.keys import GuardConfig, GuardsConfig, RewardConfig
from adagrpo.recipe.load import to_toml

# Opened by the owner's lock, not by the run; and files that only grow.
APPENDED = ("metrics.jsonl", "events.jsonl")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    config = toy_config(
        model={"family": "parts:model", "device": "cpu"},
        data={"prompts": "parts:prompts", "held_out": "parts:held_out"},
        rewards=(RewardConfig("parts:reward"),),
        train={"iterations": 2, "slots": 1},
        output={"grid_every": 1, "grid_prompts": 2, "checkpoint_every": 1, "trace_at": 1},
        evaluation={"every": 1, "prompts": 2, "final_prompts": 2, "final_noises": 1},
        guards=GuardsConfig(grad_norm=GuardConfig(limit=1e-9, action="warn")),
        name="toy",
    )
    file = tmp_path_factory.mktemp("recipe") / "toy.toml"
    file.write_text(to_toml(config), "utf-8")
    return str(file)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> tuple[list[str], dict]:
    """Every path that an undisturbed run opens for writing, and its result."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    with full_after(10**9, out) as seen:
        assert main(["train", recipe, "--out", str(out)]) == 0
    yield [str(Path(path).relative_to(out)) for path in seen], json.loads((out / "result.json").read_text())
    torch.set_num_threads(threads)


def test_only_drafts_and_growing_files_are_opened(whole) -> None:
    paths = [path for path in whole[0] if not path.startswith(".owner.") and path not in APPENDED]
    direct = [path for path in paths if not re.search(r"(^|/)\.(partial-|step-\d+\.partial)", path)]
    assert set(direct) <= {".", "checkpoints", "samples", "traces"}, direct  # folders
    names = ("config.toml", "manifest", "memory", "baseline", "result", "report", "png", "state.pt", "checkpoint.json", "gz")
    assert all(any(name in path for path in paths) for name in names), paths


def full(recipe: str, out: Path, writes: int, capsys, number: int = errno.ENOSPC) -> str:
    """The complaint of a run whose disk is full after some writes."""
    capsys.readouterr()
    with full_after(writes, out, number):
        code = main(["train", recipe, "--out", str(out)])
    complaint = capsys.readouterr().err
    assert code == 1, (writes, code, complaint)
    return complaint


def at_every_write(every: int, recipe: str, whole, tmp_path: Path, capsys) -> None:
    for writes in range(0, len(whole[0]), every):
        out = tmp_path / str(writes)
        complaint = full(recipe, out, writes, capsys)
        assert complaint.count("\n") == 1 and "No space left on device" in complaint, (writes, complaint)
        assert "free disk space" in complaint, (writes, complaint)
        assert not [p for p in out.rglob("*") if "partial" in p.name], writes
        assert main(["train", recipe, "--out", str(out), "--resume", "auto"]) == 0, writes
        assert json.loads((out / "result.json").read_text()) == whole[1], writes
        assert main(["report", str(out)]) == 0


def test_full_at_some_writes(recipe, whole, tmp_path, capsys) -> None:
    at_every_write(11, recipe, whole, tmp_path, capsys)


@pytest.mark.proof
def test_full_at_every_write(recipe, whole, tmp_path, capsys) -> None:
    at_every_write(1, recipe, whole, tmp_path, capsys)


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EROFS, errno.EIO])
def test_other_disks_that_take_no_more(number: int, recipe, whole, tmp_path, capsys) -> None:
    place = next(i for i, path in enumerate(whole[0]) if path == "metrics.jsonl")
    complaint = full(recipe, tmp_path / "run", place, capsys, number)
    remedy = {errno.EDQUOT: "within your quota", errno.EROFS: "make the file system writable", errno.EIO: "check the disk"}
    assert "metrics.jsonl" in complaint and remedy[number] in complaint


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ValueError("os error 28"),
    ],
)
def test_whatever_a_library_raises_is_one_error(error: Exception, tmp_path) -> None:
    from adagrpo.disk.files import write_error

    found = write_error(tmp_path / "file", error)
    assert found.disk and found.remedy == "free disk space" and "No space left on device" in found.reason
    assert not write_error(tmp_path / "file", TypeError("no number")).disk


CHILD = """
import resource, signal, sys
from adagrpo.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.proof
def test_what_the_kernel_refuses_while_torch_writes_is_named(recipe, tmp_path) -> None:
    """A real refusal in the middle of a file: larger than this process may write."""
    here = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", CHILD, "6000", "train", recipe, "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": ":".join([str(here), *sys.path]), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "File too large; raise the limit on file sizes" in done.stderr
