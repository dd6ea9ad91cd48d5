"""Prompt files, other sources, and the endless stream."""

import itertools
import json
import os
import socket
import sys
import types
from pathlib import Path

import pytest

from adagrpo.build import load_data
from adagrpo.cli import main
from adagrpo.errors import InputError, RunError
from adagrpo.prompts import index, rows
from adagrpo.prompts import sources as prompts
from adagrpo.prompts.reading import Reading
from adagrpo.prompts.sources import load_prompts
from adagrpo.prompts.stream import PromptStream
from adagrpo.recipe.keys import Config, DataConfig
from adagrpo.tiny.prompts import held_out_prompts, training_prompts

PROMPTS = [str(i) for i in range(10)]


def test_every_epoch_holds_every_prompt_once_in_another_order() -> None:
    stream = PromptStream(PROMPTS, seed=3)
    epochs = [stream.take(10) for _ in range(3)]
    assert all(sorted(epoch) == PROMPTS for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_position_is_the_only_state() -> None:
    whole = PromptStream(PROMPTS, seed=3).take(25)
    late = PromptStream(PROMPTS, seed=3, position=17)
    assert late.take(8) == whole[17:]
    late.position = 4
    assert late.take(3) == whole[4:7]
    assert PromptStream(PROMPTS, seed=4).take(25) != whole


def test_file_is_read_line_by_line(tmp_path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a cat\n\n  zwölf Boxkämpfer \n", "utf-8")
    assert list(load_prompts(str(file))) == ["a cat", "zwölf Boxkämpfer"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "does not exist"),
        (b"\n \n", "holds no prompt"),
        (b"ok\n\xff\xfe", "not UTF-8"),
        (b"a\n\nb\n a \n", "line 4 repeats line 1; remove it or set data.duplicates"),
        (b"a\n" + b"x" * 5000, "line 2 is longer than 4096"),
    ],
)
def test_bad_files(content: bytes | None, word: str, tmp_path) -> None:
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=word) as error:
        load_prompts(str(file))
    assert str(file) in str(error.value) and "data.prompts" in str(error.value)


@pytest.mark.parametrize(("policy", "left"), [("keep", ["a", "b", " a"]), ("drop", ["a", "b"])])
def test_duplicates_stay_or_leave_the_first(policy: str, left: list[str], tmp_path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a\nb\n a\n", "utf-8")
    assert list(load_prompts(str(file), reading=Reading(duplicates=policy))) == [line.strip() for line in left]


def test_unknown_source() -> None:
    with pytest.raises(InputError, match="tiny:wide"):
        load_prompts("tiny:wild")


SCENES = ["a cat, sitting on a mat", 'a sign that says "OPEN", at night', "[photo] of a dog; blurry", "{red|blue} bird, 4k"]
ROWS = [{"prompt": scene, "id": i} for i, scene in enumerate(SCENES)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.csv", "a cat\na dog\n", "its columns or keys are a cat; name the one that holds the prompts by data.field"),
        ("p.JSON", "a cat\n", "is not JSON"),
        ("p.tsv", "a cat\n", "its columns or keys are a cat;"),
        ("p.toml", 'name = "x"\n', "its ending is not that of prompts"),
        ("p.txt.gz", "a cat\n", "compressed"),
        ("p.parquet", "PAR1", "name its folder, as hub:FOLDER"),
        ("p.txt", json.dumps(SCENES), "JSON"),
        ("p.txt", json.dumps(SCENES, indent=2), "it holds JSON; name it p.json,"),
        ("p.txt", json.dumps({"prompts": SCENES}, indent=2), "it holds JSON"),
        ("p.txt", "\n\n".join(json.dumps(row) for row in ROWS), "every line is JSON; name it p.jsonl,"),
        ("p", "\n".join(json.dumps([scene]) for scene in SCENES), "every line is JSON"),
        ("p.txt", 'id,prompt\n1,a cat\n2,"a dog, running"\n', "columns are parted by a comma; name it p.csv,"),
        ("p.txt", "caption;source\na cat;x\na dog;y\n", "columns are parted by a semicolon"),
        ("p.txt", "Prompt\tCategory\tNote\na cat\tx\t1\n", "columns are parted by a tab; name it p.tsv,"),
        ("p.txt", "id,prompt\n1,a cat, sitting\n2,a dog\n", "columns are parted by a comma"),
        ("p.txt", '[\n  "a cat",\n  "a dog"\n', "it holds JSON"),
        ("p.txt", "prompt\na cat\na dog\n", "its first line is prompt"),
        ("p.txt", "single\ta red circle\ncount\ttwo blue squares\n", "columns parted by a tab"),
        ("p.txt", "1,a cat\n2,a dog\n", "begins with a number"),
        ("p.txt", '"a cat"\n"a dog"\n', "a string in quotes"),
        ("p.txt", "id,prompt_en\n1,a red circle\n2,a blue square\n", "columns are parted by a comma"),
        ("p.txt", 'image_path,caption_en,split\na.png,"a cat, sitting",train\n', "columns are parted by a comma"),
        ("p.txt", 'image;blurb\na;"a cat; sitting"\nb;a dog\n', "columns are parted by a semicolon"),
        ("p.txt", "blurb,split\na cat,train\na dog,test\n", "columns are parted by a comma"),
        ("p.txt", "number,words\n1,a cat, sitting\n2,a dog\n", "begins with a number"),
        ("p.txt", "prompt_en\na cat\na dog\n", "its first line is prompt_en"),
        ("p.txt", "- a red circle\n- a blue square\n", "an item of a list"),
        ("p.txt", '"a cat",\n"a dog"\n', "a string in quotes"),
        ("p.txt", "a cat\0\na dog\n", "line 1 holds a NUL"),
        ("p.txt", "a cat\na d\bog\n", r"line 2 holds the control character U\+0008"),
        ("p.txt", "a cat\ra dog\ra bird", r"line 1 holds the control character U\+000D"),
        ("p.txt", "a cat\nsmart \x93quotes\x94\n", r"line 2 holds the control character U\+0093"),
        ("p.txt", "\ufeffa cat\n\ufeffa  cat\n", "line 2 repeats line 1"),
        ("p.txt", "caf\u00e9\ncafe\u0301\n", "line 2 repeats line 1"),
    ],
)
def test_what_cannot_be_meant_as_prompts_is_refused(name: str, content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(content, "utf-8", newline="")
    with pytest.raises(InputError, match=words) as error:
        load_prompts(str(file))
    assert f"data.prompts = {file}: " in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_encodings_are_named(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("a cat\na dog\n".encode(encoding))
    with pytest.raises(InputError, match=r"UTF-(16|32) text; save it as UTF-8"):
        load_prompts(str(file))


@pytest.mark.parametrize(
    "lines",
    [
        SCENES,
        SCENES[2:3],
        ["[cinematic shot]", "[photo]"],
        ["{}x{}", "[1, 2"],
        ['"OPEN" on a sign', '"CLOSED" on a door, "PUSH" beside it'],
        ["2 cats", "3, maybe 4 dogs", "1,000 birds"],
        ["photo, text, dog", "a cat", "a bird, flying"],
        ["a text", "prompt delivery", "caption: a cat"],
        ["a\tb", "c"],
        ["id,prompt,of,a,story"],
        ["red, circle", "blue, square"],
        ["red,circle", "blue,square"],
        ["context,matters", "a cat,sitting"],
        ["prompt_delivery, fast", "a cat", "a dog"],
        ["- a cat", "a dog"],
    ],
)
def test_commas_quotes_and_brackets_are_no_structure(lines: list[str], tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("\ufeff" + "\r\n".join(lines), "utf-8", newline="")
    assert list(load_prompts(str(file))) == lines


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path, words in (
            (tmp_path / "pipe", "a pipe"),
            (tmp_path / "socket", "a socket"),
            (tmp_path, "a folder; name a regular file inside it"),
            (Path("/dev/zero"), "a device"),
            (tmp_path / "loop", "cannot be read"),
            (tmp_path / "pipe" / "below", "does not exist"),
        ):
            with pytest.raises(InputError, match=words):
                load_prompts(str(path))
    with pytest.raises(InputError, match="not the name of a file"):
        load_prompts("a\0b")


@pytest.mark.parametrize(("before", "word"), [("", "cannot be read: File name too long"), ("tiny:", "unknown prompt source")])
def test_a_name_that_no_file_can_have_is_refused_in_bearable_length(before: str, word: str) -> None:
    with pytest.raises(InputError, match=word) as refused:
        load_prompts(before + "[" * 5000)
    assert len(str(refused.value)) < 500


def test_too_large_is_refused_before_it_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = tmp_path / "sparse.txt"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(rows, "MAX_FILE", 1 << 20)
    with pytest.raises(InputError, match="larger than the 1 MB"):
        load_prompts(str(sparse))
    monkeypatch.setattr(index, "MAX_PROMPTS", 3)
    (tmp_path / "many.txt").write_text("a\nb\nc\nd\n", "utf-8")
    with pytest.raises(InputError, match="holds more than the 3 prompts"):
        load_prompts(str(tmp_path / "many.txt"))


def source(monkeypatch: pytest.MonkeyPatch, prompts_of) -> str:
    module = types.ModuleType("prompts_of_test")
    module.prompts = prompts_of  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prompts_of_test", module)
    return "prompts_of_test:prompts"


@pytest.mark.parametrize(
    ("prompts_of", "words"),
    [
        (lambda: (f"prompt {i}" for i in itertools.count()), "more than the 1000 prompts"),
        (lambda: itertools.repeat("x" * 4096), "let it end earlier"),
        (lambda: "a cat", "returned a str"),
        (lambda: {"a": "cat"}, "returned a dict"),
        (lambda: None, "returned a NoneType"),
        (lambda: ["a", 3], "prompt 1 is 3; return non-empty strings"),
        (lambda: ["a", " "], "prompt 1 is ' '"),
        (lambda: ["a", "b\0"], r"prompt 1 holds the control character U\+0000"),
        (lambda: ["\ud800"], r"prompt 0 holds U\+D800, half a character"),
        (lambda: ["x" * 5000], "prompt 0 is longer than 4096"),
        (lambda: (1 // 0 for _ in range(2)), "failed: ZeroDivisionError"),
        (list, "gives no prompt"),
    ],
)
def test_sources_in_code_are_bounded_and_checked(prompts_of, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_PROMPTS", 1000)
    monkeypatch.setattr(prompts, "MAX_TEXT", 1 << 20)
    with pytest.raises((InputError, RunError), match=words) as error:
        load_prompts(source(monkeypatch, prompts_of))
    assert str(error.value).startswith("data.prompts = prompts_of_test:prompts")


def test_a_generator_that_ends_is_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_prompts(source(monkeypatch, lambda: (f"two\nlines {i}" for i in range(3))))[2] == "two\nlines 2"


def test_held_out_prompts_that_also_train_are_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "train.txt").write_text("a cat\ncafe\u0301  at night\na dog\n", "utf-8")
    (tmp_path / "held.txt").write_text("a bird\ncaf\u00e9 at night\na tree\na dog\n", "utf-8")
    files = ["--data.prompts", str(tmp_path / "train.txt"), "--data.held-out", str(tmp_path / "held.txt")]
    assert main(["train", "tiny", "--dry-run", *files]) == 2
    error = capsys.readouterr().err
    assert "2 of its 4 prompts (50%) also train" in error and "'caf\u00e9 at night'" in error and "allow_overlap" in error
    assert main(["train", "tiny", "--dry-run", *files, "--data.allow-overlap"]) == 0
    same = DataConfig("tiny:even", "tiny:even", duplicates="keep")
    with pytest.raises(InputError, match=r"400 of its 400 prompts \(100%\)"):
        load_data(Config(data=same))


@pytest.mark.parametrize("mix", ["even", "wide"])
def test_the_built_in_sources_are_disjoint(mix: str) -> None:
    assert not set(training_prompts(mix)) & set(held_out_prompts())
    load_data(Config(data=DataConfig(f"tiny:{mix}", "tiny:held_out")))
