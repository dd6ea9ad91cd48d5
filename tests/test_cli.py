"""The command line, in process: help, overrides, errors with code 2 and no traceback."""

import tomllib

import pytest

from adagrpo.cli import main
from adagrpo.recipe.load import recipe_names
from adagrpo.study.hosts import PROBES


def run(capsys, *args: str) -> tuple[int, str, str]:
    try:
        code = main(args)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_print_config_applies_overrides(capsys) -> None:
    code, out, _ = run(
        capsys, "train", "tiny", "--train.slots", "3", "--rollout.sde-steps", "0", "2", "--rewards.0.weight", "0.5",
        "--print-config",
    )  # fmt: skip
    resolved = tomllib.loads(out)
    assert code == 0
    assert resolved["train"]["slots"] == 3
    assert resolved["rollout"]["sde_steps"] == [0, 2]
    assert resolved["rewards"][0]["weight"] == 0.5


def test_help_lists_commands_and_keys(capsys) -> None:
    assert "doctor" in run(capsys, "--help")[1]
    assert "adagrpo recipes" in run(capsys, "train", "--help")[1]
    code, out, _ = run(capsys, "train", "tiny", "--help")
    assert code == 0 and "--selection.candidates" in out and "--optimizer.lr" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("train", "tinny"), ["tinny", "did you mean tiny"]),
        (("train", "tiny", "--train.slotz", "3"), ["train.slotz", "--train.slots"]),
        (
            ("train", "tiny", "--model.skip-layer-guidance-start", "0.1"),
            ["unknown key", "skip-layer guidance is not supported"],
        ),
        (("train", "tiny", "--train.slots", "many"), ["train.slots"]),
        (("train", "tiny", "--rollout.group-size", "1"), ["rollout.group_size = 1"]),
        (("train", "flux1-dev", "--dry-run"), ["prompts.txt", "does not exist"]),
        (("train", "tiny", "--resume", "latest"), ["--out"]),
        (("train", "tiny", "--dry-run", "--model.device", "cuda:0"), ["model.device = cuda:0"]),
        (("train", "tiny", "--dry-run", "--model.device", "gpu"), ["model.device = gpu"]),
        (("sample", "nowhere", "--prompt", "x"), ["nowhere"]),
        (("sample", "tiny", "--prompt", "x", "--count", "0"), ["--count 0"]),
        (("sample", "tiny", "--prompt", "x", "--cuont", "2"), ["--cuont"]),
        (("tiny", "score", "missing.png", "--prompt", "a red circle"), ["missing.png"]),
    ],
)
def test_errors_are_one_message_with_code_two(capsys, args: tuple[str, ...], words: list[str]) -> None:
    code, _, err = run(capsys, *args)
    assert code == 2
    assert "Traceback" not in err
    assert all(word in err for word in words), err


def test_dry_run_prints_the_cost(capsys) -> None:
    code, out, _ = run(capsys, "train", "tiny", "--dry-run")
    assert code == 0
    # 12 slots: 12 x 8 candidates x 8 steps; 12 x 4 forks; 12 x 8 x (7 + 6 + 5 + 4); 12 x 4
    assert "probe 768, prefix 48, rollout 2112, update 48" in out


@pytest.mark.parametrize("command", ["train", "plan", "profile", "fidelity"])
def test_a_wrong_value_names_the_command_once(capsys, command: str) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "tiny", "--engine.precision", "fp9"])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert f"adagrpo {command} tiny" in error and error.count("adagrpo") == 1


def test_help_names_every_probe(capsys) -> None:
    for command in ("probes", "seeds"):
        words = " ".join(run(capsys, "bench", command, "--help")[1].split())
        assert f"known: {', '.join(PROBES)}" in words


def test_recipes_are_listed_with_what_each_is(capsys) -> None:
    code, out, _ = run(capsys, "recipes")
    listed = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0 and list(listed) == recipe_names()
    assert listed["tiny-grpo"] == "The same as `tiny` without curriculum and fusion"
    assert listed["flux1-dev-flow-grpo"].endswith("on FLUX.1-dev") and len(set(listed.values())) > len(listed) - 2
