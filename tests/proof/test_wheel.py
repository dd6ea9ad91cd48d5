"""A built wheel works outside the repository: commands, recipes, model and report are in it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.proof
def test_wheel_works_elsewhere(tmp_path) -> None:
    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path / "wheels"), str(ROOT))
    (wheel,) = (tmp_path / "wheels").glob("adagrpo-*.whl")
    assert wheel.stat().st_size < 10e6
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    # Ahead of the checkout's editable install, and nothing of the checkout on the path.
    start = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from adagrpo.cli import main; import adagrpo; "
    where = run(sys.executable, "-c", start + "print(adagrpo.__file__)")
    assert where.startswith(str(tmp_path))
    call = lambda *args: run(sys.executable, "-c", start + f"sys.exit(main({list(args)!r}))")  # noqa: E731
    assert "probe 768" in call("train", "tiny", "--dry-run")
    quick = ["--train.iterations", "1", "--train.slots", "1", "--evaluation.final-prompts", "2", "--evaluation.prompts", "2"]
    assert "held-out reward" in call("train", "tiny", "--out", "run", *quick)
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    call("sample", "run", "--prompt", "a red circle")
    assert "single" in call("tiny", "prompts", "--count", "3")
