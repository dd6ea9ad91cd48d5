"""Prompt files in the layouts that prompt sets are published in, with what travels beside the prompt."""

import csv
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adagrpo.errors import InputError, RunError
from adagrpo.prompts import content, layouts, objects, rows
from adagrpo.prompts.checks import cleaned, key_of, same
from adagrpo.prompts.prompt import data_of
from adagrpo.prompts.reading import Reading
from adagrpo.prompts.sources import load_prompts, prompt_category

GENEVAL = [
    {"tag": "counting", "include": [{"class": "bench", "count": 2}], "exclude": [{"class": "bench", "count": 3}]},
    {"tag": "position", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]},
]
POINTS = [
    {"Primary Categories": "Design", "Testpoints": ["Style", "Attribute - Quantity"], "Testpoint Description": ["ink", "two"]},
    {"Primary Categories": "Art", "Testpoints": ["Action - Hand"], "Testpoint Description": ['a "wave"']},
]
PAIRS = [
    {"prompt": prompt, "path1": "1.jpg", "path2": "2.jpg", "confidence": sure}
    for prompt, sure in (("a cat", 0.9), ("a dog", 0.7), ("a  cat", 1.0))
]
LIKED = {"prompt": "a cat", "file_path": ["1.jpg"], "human_preference": [1]}
RANKED = {"prompt": "a cat", "image_path": ["1.jpg"], "rank": [1]}
PARTI = (
    'Prompt\tCategory\tChallenge\tNote\n"H I" painted on a wall\tIllustrations\tWriting & Symbols\t\na "b" c \tArts\tBasic\tx\n'
)
PARTI_DATA = {"Category": "Illustrations", "Challenge": "Writing & Symbols", "Note": ""}
THEME = {"一级垂类": "设计"}


def table(*lines: tuple[str, ...], mark: str = ",") -> str:
    """CSV as Python's own writer has it."""
    text = io.StringIO()
    csv.writer(text, delimiter=mark).writerows(lines)
    return text.getvalue()


def lines_of(values: list[dict], *prompts: str) -> str:
    return "".join(json.dumps({**value, "prompt": prompt}) + "\n" for value, prompt in zip(values, prompts, strict=True))


@pytest.mark.parametrize(
    ("name", "text", "prompts", "data", "category"),
    [
        ("hpd_benchmark.json", json.dumps(["a cat", "café, at night"]), ["a cat", "café, at night"], {}, None),
        ("hpdv2_train.json", json.dumps([LIKED]), ["a cat"], {}, None),
        ("hpdv2_test.json", json.dumps([RANKED, RANKED]), ["a cat"], {}, None),
        ("hpdv3.json", json.dumps(PAIRS, indent=1), ["a cat", "a dog"], {}, None),
        ("metadata.jsonl", lines_of(GENEVAL, "two benches", "a cat"), ["two benches", "a cat"], GENEVAL[0], "counting"),
        ("ocr.txt", 'A board that reads "Hello, World"\n', ['A board that reads "Hello, World"'], {}, None),
        (
            "unigen.csv",
            table(
                ("index", "prompt_en", "sub_dims_en"),
                ("0", "two cats", json.dumps(POINTS[0])),
                ("1", "a wave", json.dumps(POINTS[1])),
            ),
            ["two cats", "a wave"],
            {"index": "0", "sub_dims_en": POINTS[0]},
            "Design",
        ),
        (
            "zh.csv",
            table(("prompt_zh", "sub_dims_zh"), ("两只猫", json.dumps(THEME, ensure_ascii=False))),
            ["两只猫"],
            {"sub_dims_zh": THEME},
            THEME["一级垂类"],
        ),
        ("PartiPrompts.tsv", PARTI, ['"H I" painted on a wall', 'a "b" c'], PARTI_DATA, "Illustrations"),
        ("drawbench.csv", 'Prompts,Category\n"A car, parked.",Colors\n', ["A car, parked."], {"Category": "Colors"}, "Colors"),
        ("captions.json", '{"id": 1, "caption": "a cat"}\n{"id": 2, "caption": "b"}\n', ["a cat", "b"], {"id": 1}, None),
        ("semicolons.csv", 'text;x\r\n"a; b";1\r\n"two\r\nlines";2\r\n', ["a; b", "two\nlines"], {"x": "1"}, None),
        ("strings.jsonl", '"a cat"\n\n"a dog"', ["a cat", "a dog"], {}, None),
    ],
)
def test_published_layouts(
    name: str, text: str, prompts: list[str], data: dict[str, Any], category: str | None, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("\ufeff" + text, "utf-8", newline="")
    found = load_prompts(str(tmp_path / name))
    assert list(found) == prompts and [found[i] for i in range(len(found))] == prompts
    assert dict(data_of(found[0])) == data
    named = prompt_category(name, found)
    assert (named and named(found[0])) == category


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.csv", "prompt_en,prompt_zh\na,b\n", "prompt_en, prompt_zh could each hold the prompts; name one by data.field"),
        ("p.csv", "id,prompt\n1,a\n2,b,c\n", r"line 3 has 3 columns, the first line names 2: \['2', 'b', 'c'\]"),
        ("p.csv", "id,prompt\n1,a\n2,\n", "line 3 holds an empty prompt"),
        ("p.csv", 'id,prompt\n1,a\n\n2,"b\nc\n', r"line 4 is no row of a table \(unexpected end of data, up to line 5\)"),
        ("p.csv", "prompt,prompt\na,b\n", "names prompt twice"),
        ("p.csv", "id,prompt\n", "holds no prompt"),
        ("p.csv", "id,prompt\n1,a\n2,A\n3,a\n", "line 4 repeats line 2; remove it or set data.duplicates"),
        ("p.csv", "tag,prompt\n1,a\n2,A\n3,a\n", "line 4 repeats line 2 with other values of tag"),
        ("p.csv", b"prompt\na\nb\xff\n", "line 3 is not UTF-8"),
        ("p.csv", b"prompt\na\nb\0\n", "line 3 holds a NUL"),
        ("p.csv", 'prompt,sub_dims_en\na,"{""x"": 1}"\nb,"{""x"" 1}"\n', "line 3 holds broken JSON in column sub_dims_en: Exp"),
        ("p.tsv", "prompt\tx\na\t1\nb\n", "line 3 has 1 columns"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt" "b"}\n', r"line 3 is not JSON: Expecting ':'.* \(data.broken = \"drop\""),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2 has no 'prompt'"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "line 2 holds 3 where the prompt should be"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "\\ud800"}\n', r"line 2 holds U\+D800"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "a\\u0007"}\n', r"line 2 holds the control character U\+0007"),
        ("p.jsonl", '{"prompt": "' + "x" * 5000 + '"}\n', "line 1 is longer than 4096"),
        ("p.jsonl", '{"a": 1, "b": "x"}\n', "its columns or keys are a, b; name the one"),
        ("p.json", '["a",\n"b"\n"c"]', "line 3 needs a ] here"),
        ("p.json", '["a",\n"b",]', r"line 2 is not JSON: Expecting value"),
        ("p.json", '["a",\n"b"', "line 2 needs a ] here"),
        ("p.json", '["a"]\n["b"]', "line 2 goes on behind the list"),
        ("p.json", '["a",\n{"prompt": "b"}]', "line 2 holds {'prompt': 'b'} where the prompt should be"),
        ("p.json", "[" * 100_000, "line 1 is nested too deeply"),
        ("p.json", "[]", "holds no prompt"),
        ("p.json", '{"prompts":\n["a", "b"]}', "is not JSON"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read_are_named(name: str, text: str | bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words) as error:
        load_prompts(str(tmp_path / name))
    assert str(error.value).startswith(f"data.prompts = {tmp_path / name}: ")


def test_the_field_is_named_and_broken_rows_drop_out(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text('prompt_en,prompt_zh,sub_dims_en\na,b,"{""x"": 1}"\nc,d,"{""x"" 1}"\ne\nf,g,\n')
    found = load_prompts(str(file), reading=Reading("prompt_zh", broken="drop"))
    assert list(found) == ["b", "g"] and data_of(found[0])["sub_dims_en"] == {"x": 1}
    (note,) = found.notes  # type: ignore[attr-defined]
    assert "left out 2" in note and "line 3 holds broken JSON" in note and "line 4 has 1 columns" in note
    with pytest.raises(InputError, match=r"no column or key promt_zh \(did you mean prompt_zh\?\): it has prompt_en"):
        load_prompts(str(file), reading=Reading("promt_zh"))


def odd_texts() -> list[str]:
    """Lines that a reader could cut wrongly."""
    words = ["a cat", "two  blanks", " lead", "trail ", "é", "e\u0301", "猫", "x" * 70]
    pieces = [*words, '"', ",", "\ufeff", "\u00a0", "\t", "𝒳", "\\", "[", "}"]
    draw = random.Random(0)
    return ["".join(draw.choices(pieces, k=draw.randint(0, 4))) for _ in range(300)]


def as_text(texts: list[str]) -> tuple[str, str]:
    return "p.txt", "a prompt first\r\n" + "\n".join(texts)


def as_csv(texts: list[str]) -> tuple[str, str]:
    rows = [(same(cleaned(text)), f"{text}\n{text}") for text in texts]
    return "p.csv", table(("x", "prompt"), ("1", "a prompt first"), *rows)


def as_lines(texts: list[str]) -> tuple[str, str]:
    rows = [{"prompt": text, "x": [same(cleaned(text))]} for text in ["a prompt first", *texts]]
    return "p.jsonl", "\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows))


def as_list(texts: list[str]) -> tuple[str, str]:
    rows = [{"prompt": text, "x": {"y": same(cleaned(text))}} for text in ["a prompt first", *texts]]
    return "p.json", json.dumps(rows, ensure_ascii=False, indent=1)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("written", [as_text, as_csv, as_lines, as_list])
def test_rows_are_cut_where_they_end(
    written: Callable[[list[str]], tuple[str, str]], held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the pieces are that a file is read in, and whether it is held or stays on the disk."""
    for module in (content, objects, layouts, rows):
        monkeypatch.setattr(module, "BLOCK", 64, raising=False)
        monkeypatch.setattr(module, "HELD", 2**20 if held else 0, raising=False)
    texts = odd_texts()
    name, text = written(texts)
    (tmp_path / name).write_text(text, "utf-8", newline="")
    found: Any = load_prompts(
        str(tmp_path / name), reading=Reading(field="" if name == "p.txt" else "prompt", duplicates="keep", broken="drop")
    )
    multiplied = [f"{text}\n{text}" for text in texts] if name == "p.csv" else texts
    expected = ["a prompt first", *(prompt for text in multiplied if (prompt := cleaned(text)))]
    assert list(found) == expected
    assert [found[i] for i in (0, 7, len(found) - 1, -1)] == [expected[i] for i in (0, 7, -1, -1)]
    assert found[3:9] == expected[3:9]
    assert found.keys.tolist() == [key_of(prompt) for prompt in expected]


def test_a_large_file_must_stay_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "HELD", 4)
    file = tmp_path / "p.txt"
    file.write_text("a cat\na dog\n")
    found = load_prompts(str(file))
    file.rename(tmp_path / "q.txt")
    file.write_text("another file\n")
    assert found[1] == "a dog"
    with (tmp_path / "q.txt").open("a") as handle:
        handle.write("a bird\n")
    with pytest.raises(RunError, match=r"p.txt: changed while it was read; restore it"):
        found[1]
    monkeypatch.setattr(content, "HELD", 2**20)
    found = load_prompts(str(tmp_path / "q.txt"))
    (tmp_path / "q.txt").write_text("gone\n")
    assert list(found) == ["a cat", "a dog", "a bird"]


def test_a_folder_of_hpdv2_and_several_files_have_categories(tmp_path: Path) -> None:
    for style in ("anime", "concept-art", "paintings", "photo"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(3)]))
    found = load_prompts(str(tmp_path))
    named = prompt_category(str(tmp_path), found)
    assert len(found) == 12 and found[3] == "concept-art 0"
    assert named is not None and [named(found[i]) for i in (0, 3, 11)] == ["anime", "concept-art", "photo"]
    (tmp_path / "colour.txt").write_text("a red bench\n")
    (tmp_path / "parti.tsv").write_text("Prompt\tCategory\na cat\tAnimals\n")
    several = load_prompts([str(tmp_path / name) for name in ("colour.txt", "parti.tsv", "photo.json")])
    assert list(several) == ["a red bench", "a cat", "photo 0", "photo 1", "photo 2"]
    assert [prompt_category("", several)(prompt) for prompt in several[:3]] == ["colour", "Animals", "photo"]  # type: ignore[misc]
    (tmp_path / "again.txt").write_text("a bird\n\na  cat\n")
    with pytest.raises(
        InputError, match=rf"{tmp_path}/again.txt: line 3 repeats data.prompts = {tmp_path}/parti.tsv: line 2 with other values"
    ):
        load_prompts([str(tmp_path / "parti.tsv"), str(tmp_path / "again.txt")])
    with pytest.raises(InputError, match="only files and data sets can be several"):
        load_prompts([str(tmp_path / "parti.tsv"), "tiny:wide"])


def test_a_data_set_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines_of(GENEVAL, "two benches", "a dog left of a cat"))
    (folder / "test.jsonl").write_text('{"tag": "x", "include": [], "prompt": " a bird "}\n')
    with pytest.raises(InputError, match="has the splits train, test; name one behind a colon: hub:"):
        load_prompts(f"hub:{folder}")
    found = load_prompts(f"hub:{folder}:train")
    assert list(found) == ["two benches", "a dog left of a cat"]
    assert data_of(found[1])["include"][1]["position"] == ["left of", 0] or data_of(found[1])["tag"] == "position"
    assert list(load_prompts(f"hub:{folder}:test")) == ["a bird"]
    with pytest.raises(InputError, match="has no split dev"):
        load_prompts(f"hub:{folder}:dev")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'adagrpo\[data\]'"):
        load_prompts("hub:owner/name")
