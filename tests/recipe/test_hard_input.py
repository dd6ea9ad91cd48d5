"""Recipes, options and files that parse but cannot be meant: one error with code 2 that names them, and no waiting."""

import contextlib
import dataclasses
import io
import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from reporting import write_run

from adagrpo.cli import main
from adagrpo.errors import InputError
from adagrpo.recipe.keys import Config, RewardConfig
from adagrpo.recipe.load import load_recipe, to_toml
from adagrpo.recipe.rules import check
from adagrpo.report.page import build_report


def refusal(capsys, *args: str) -> str:
    """The one line of an input error."""
    try:
        code = main(args)
    except SystemExit as stop:  # argparse and tyro leave this way
        code = int(stop.code or 0)
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = " + "[" * 5000 + "]" * 5000, "not valid TOML: nested too deeply"),
        ("x = " + "{a=" * 5000 + "1" + "}" * 5000, "not valid TOML: nested too deeply"),
        ("[data.kwargs]\n" + ".".join("a" * 4000) + " = 1", "data.kwargs.a.a = a dict nested too deeply: expected"),
        ("[train]\nseed = " + "9" * 5000, "9 in line 2 has more than 4300 digits; write a smaller"),
        ("[train]\nseed = 0x" + "f" * 5000, "train.seed = int too long to show: must be at most"),
        ("[optimizer]\nlr = 0x" + "f" * 5000, "optimizer.lr = int too long to show: expected a number"),
        ("[model]\nkwargs = {a = 0x" + "f" * 5000 + "}", "model.kwargs.a = int too long to show: must lie within"),
        ("[train]\nseed = 18446744073709551616", "train.seed = 18446744073709551616: must be at most"),
        ("[train]\nseed = -1", "train.seed = -1: must be at least 0"),
        ("[model]\nguidance = nan", "model.guidance = nan: must be a finite number"),
        ('name = "a\\u0000b"', "holds the control character U+0000"),
        ('[data]\nprompts = "a\\u001bb"', "holds the control character U+001B"),
        ('[data]\nkwargs = {"a\\u0000" = 1}', "the key holds the control character U+0000"),
        ('name = "a\\ud800b"', "not valid TOML"),
        ("name = " + '"' + "x" * 50_000, "not valid TOML"),
        ("plan = " + '"' + "x" * 50_000 + '"', "unknown key plan"),
        ('[rollout]\nplan = "' + "x" * 50_000 + '"', "one of fork, trajectory, window"),
        ('[train]\nseed = "' + "x" * 50_000 + '"', "expected a whole number"),
        (
            "[model]\nskip_guidance_layers = [7, 8, 9]",
            "unknown key model.skip_guidance_layers: skip-layer guidance is not support",
        ),
        (
            "[evaluation]\nskip_layer_guidance_scale = 2.8",
            "key evaluation.skip_layer_guidance_scale: skip-layer guidance is not",
        ),
        ("[model]\ntrue_cfg_scale = 4.0", "key model.true_cfg_scale: classifier-free guidance of FLUX"),
        ("k" * 50_000 + " = 1", "unknown key kkk"),
        ("a = 1\0", "holds a NUL"),
        ("#" * (1 << 16) + "#", "larger than the 64 KB"),
        ("[train]\nslots = 4096\naccumulation = 4096", "cannot be meant"),
        ("[evaluation]\nfinal_prompts = 100000\nfinal_noises = 4096", "evaluation.final_prompts x evaluation.final_noises"),
        ("[output]\ngrid_prompts = 1000000", "output.grid_prompts = 1000000: must be at most"),
        ('[model]\nbuckets = ["' + "9" * 5000 + 'x8"]', "model.buckets.0"),
    ],
)
def test_recipes_that_cannot_be_meant(text: str, words: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "r.toml"
    file.write_text(text, "utf-8")
    error = refusal(capsys, "train", str(file), "--dry-run")
    assert words in error and error.count("\n") == 1 and len(error) < 1000, error


def test_recipes_in_other_encodings_and_places(tmp_path: Path, capsys) -> None:
    text = to_toml(load_recipe("tiny"))
    file = tmp_path / "r.toml"
    file.write_text(text, "utf-8-sig")
    assert load_recipe(file) == load_recipe("tiny")
    file.write_text(text, "utf-16")
    assert "UTF-16 text; save it as UTF-8" in refusal(capsys, "train", str(file), "--dry-run")
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe" in refusal(capsys, "train", str(tmp_path / "pipe"), "--dry-run")
    assert "a folder" in refusal(capsys, "train", str(tmp_path), "--dry-run")
    assert "a device" in refusal(capsys, "plan", "/dev/zero")
    assert "no recipe" in refusal(capsys, "plan", "x" * 5000)


def numbers(config: Any, key: str = "") -> Iterator[tuple[str, type]]:
    """Every key of a recipe that holds a number."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{key}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(value):
            yield from numbers(value, name)
        elif type(value) in (int, float):
            yield name, type(value)


def changed(config: Any, key: str, value: Any) -> Any:
    first, _, rest = key.partition(".")
    return dataclasses.replace(config, **{first: changed(getattr(config, first), rest, value) if rest else value})


def test_no_number_of_a_recipe_may_be_none_or_beyond_reason() -> None:
    keys = list(numbers(Config()))
    assert len(keys) > 60 and ("model.guidance", float) in keys and ("guards.kl.patience", int) in keys
    for key, kind in keys:
        for value in (math.nan, math.inf, -math.inf) if kind is float else (-1, -(2**40), 2**63, 10**400, -(10**5000)):
            with pytest.raises(InputError):
                check(changed(Config(), key, value))
    for value in (math.nan, -1.0):
        with pytest.raises(InputError, match="weight"):
            check(dataclasses.replace(Config(), rewards=(RewardConfig(weight=value),)))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("sample", "tiny", "--prompt", "a\udcff"), "half a character"),
        (("sample", "tiny", "--prompt", "a\0b"), "U+0000"),
        (("sample", "tiny", "--prompt", "x" * 5000), "longer than 4096"),
        (("sample", "tiny", "--prompt", "x", "--out", "a\0b"), "U+0000"),
        (("sample", "tiny", "--prompt", "x", "--seed", "-1"), "--seed -1: must be at least 0"),
        (("sample", "tiny", "--prompt", "x", "--seed", str(2**64)), "--seed 18446744073709551616: must be at most"),
        (("sample", "tiny", "--prompt", "x", "--seed", "9" * 5000), "--seed"),
        (("sample", "tiny", "--prompt", "x", "--count", str(10**12)), "--count 1000000000000: must be at most"),
        (("tiny", "build", "out", "--seed", "-1"), "--seed -1"),
        (("tiny", "build", "out", "--seed", str(2**64)), "--seed 18446744073709551616"),
        (("tiny", "prompts", "--count", str(10**12)), "--count 1000000000000"),
        (("tiny", "prompts", "--count", "0"), "--count 0"),
        (("train", "tiny", "--out", "\udcff", "--dry-run"), "half a character"),
        (("train", "tiny", "--name", "a\x1b[2J", "--dry-run"), "U+001B"),
        (("train", "tiny", "--train.seed", "9" * 5000, "--dry-run"), "train.seed"),
        (("train", "tiny", "--train.seed", str(2**64), "--dry-run"), "train.seed = 18446744073709551616: must be at most"),
        (("train", "tiny", "--optimizer.lr", "nan", "--dry-run"), "optimizer.lr = nan"),
        (("fidelity", "tiny", "--slots", str(10**12), "--engine.forward", "fused"), "--slots 1000000000000"),
        (("profile", "tiny", "--iterations", str(10**12)), "--iterations 1000000000000"),
        (("bench", "iteration", "--iterations", str(10**12)), "--iterations 1000000000000"),
        (("bench", "iteration", "--peak", "nan"), "--peak nan"),
        (("bench", "seeds", "--seeds", str(10**12)), "--seeds 1000000000000"),
        (("bench", "probes", "--noises", str(10**12)), "--noises 1000000000000"),
        (("report", "a\0b"), "U+0000"),
        (("export", "\udcff", "out"), "half a character"),
    ],
)
def test_options_that_cannot_be_meant(args: tuple[str, ...], words: str, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = refusal(capsys, *args)
    assert words in error and len(error) < 2000
    assert not list(tmp_path.iterdir())


def png(width: int, height: int) -> bytes:
    """A picture that claims a size."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png(2**31 - 1, 2**31 - 1), "cannot read|give a square picture"),
        (png(60_000, 60_000), "cannot read|give a square picture"),
        (png(8192, 8192), "8192x8192: give a square picture of 32 to 4096"),
        (png(64, 64), "cannot read"),
        (png(0, 0), "cannot read|give a square"),
        (png(64, 32), "64x32: give a square"),
        (b"", "cannot read"),
        (b"\x89PNG\r\n\x1a\n", "cannot read"),
        (b"\0" * 1000, "cannot read"),
    ],
)
def test_pictures_that_cannot_be_meant(content: bytes, words: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "p.png"
    file.write_bytes(content)
    error = refusal(capsys, "tiny", "score", str(file), "--prompt", "a red circle")
    assert any(word in error for word in words.split("|")) and str(file) in error and error.count("\n") == 1


def test_pictures_that_can_are_scored(tmp_path: Path, capsys) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    assert main(["tiny", "score", str(tmp_path / "p.png"), "--prompt", "a red circle"]) == 0
    os.mkfifo(tmp_path / "pipe.png")
    assert "no picture" in refusal(capsys, "tiny", "score", str(tmp_path / "pipe.png"), "--prompt", "a red circle")


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "events.jsonl", "manifest.json", "result.json"])
def test_a_foreign_run_folder_is_read_without_waiting_and_without_falling(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", grids=2)
    os.mkfifo(run / "samples" / "step-000999.png")
    for content in (None, "[" * 100_000, "x = " + "[" * 5000 + "]" * 5000, f'{{"iteration": {"9" * 5000}}}', "\0", "\ufeff"):
        (run / name).unlink()
        os.mkfifo(run / name) if content is None else (run / name).write_text(content, "utf-8")
        assert "</html>" in build_report([run])


def test_markup_in_prompts_and_messages_stays_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>\u2028\"'&\udcff\0"
    run = write_run(tmp_path / "run", name="</title><b>")
    with (run / "events.jsonl").open("a", encoding="utf-8") as events:
        events.write(json.dumps({"iteration": 3, "kind": evil, "message": evil}) + "\n")
    page = build_report([run])
    assert "alert(1)</script>" not in page and "</title><b>" not in page and page.count("</script>") == 1
    page.encode("utf-8")


def test_what_a_terminal_cannot_show_is_spelt_out(monkeypatch) -> None:
    """A run whose last line holds an arrow must not end in an encoding error."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with contextlib.suppress(SystemExit):
        main(["bench", "iteration", "--help"])
    print("0.1 → 0.2")
    sys.stdout.flush()
    assert b"VALUE \\u2026]" in written.getvalue() and b"0.1 \\u2192 0.2" in written.getvalue()
