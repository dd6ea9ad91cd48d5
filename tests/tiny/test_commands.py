"""The command functions print what they should and refuse bad input by name."""

import numpy as np
import pytest
from PIL import Image

from adagrpo.errors import InputError
from adagrpo.tiny.commands import build_command, prompts_command, score_command
from adagrpo.tiny.prompts import held_out_prompts, training_prompts
from adagrpo.tiny.render import render
from adagrpo.tiny.scenes import parse_prompt

PROMPT = "two red circles left of a blue square"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(render(parse_prompt(PROMPT), np.random.default_rng(0))).save(path)
    return path


def test_prompts(capsys):
    prompts_command("wide", 3)
    prompts_command(count=401)
    prompts_command(count=2, held_out=True)
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [prompt for _, prompt in lines[:3]] == training_prompts("wide")[:3]
    assert [prompt for _, prompt in lines[3:404]] == [*training_prompts("even"), training_prompts("even")[0]]
    assert [prompt for _, prompt in lines[404:]] == held_out_prompts(2)
    assert [name for name, _ in lines[404:]] == ["single", "count"]


def test_score(picture, capsys):
    score_command([picture], PROMPT)
    path, reward, exact, found = capsys.readouterr().out.strip().split("\t")
    assert path == str(picture) and float(reward) > 0.9 and exact == "exact"
    assert found.count("red circle") == 2 and found.count("blue square") == 1
    score_command([picture, picture], "a green cross")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(float(line.split("\t")[1]) < 0.1 and "not exact" in line for line in lines)


def test_refusals(picture, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        score_command([tmp_path / "missing.png"], PROMPT)
    with pytest.raises(ValueError, match="'a dog'"):
        score_command([picture], "a dog")
    with pytest.raises(ValueError, match="no picture"):
        score_command([], PROMPT)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png"):
        score_command([broken], PROMPT)
    Image.new("RGB", (64, 32)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="64x32"):
        score_command([tmp_path / "wide.png"], PROMPT)
    with pytest.raises(ValueError, match="unknown mix"):
        prompts_command("odd")
    with pytest.raises(ValueError, match="1 or more"):
        prompts_command("even", 0)


def test_build_keeps_an_existing_model(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="not an empty folder"):
        build_command(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model_index.json"]
