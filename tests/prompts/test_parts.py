"""Parts of a source, repeated prompts, and how a recipe and a run know their prompts."""

import dataclasses
import hashlib
import json
import unicodedata
from pathlib import Path

import pytest

from adagrpo.build import load_data
from adagrpo.cli import main
from adagrpo.errors import InputError
from adagrpo.prompts.digest import prompts_digest
from adagrpo.prompts.prompt import Prompt, data_of
from adagrpo.prompts.reading import Part, Reading
from adagrpo.prompts.rows import repeats, shared_rows
from adagrpo.prompts.sources import load_prompts, require_disjoint
from adagrpo.recipe.keys import Config, DataConfig
from adagrpo.recipe.load import load_recipe, read_recipe, to_toml

THINGS = ("cat", "Hund", "Ångström", "ﬁsh")
TEXTS = [f"a {size} {colour} {thing}" for size in ("big", "small") for colour in ("red", "Grün", "blue") for thing in THINGS]


def halves(source: Path, share: float) -> tuple[list[str], list[str]]:
    reading = Reading(held_out_share=share, duplicates="keep")
    train, held_out = (list(load_prompts(f"{source}#{part}", reading=reading)) for part in ("train", "held_out"))
    return train, held_out


def test_parts_share_nothing_and_stay_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("\n".join(TEXTS), "utf-8")
    train, held_out = halves(file, 0.3)
    assert train and held_out and sorted(train + held_out) == sorted(TEXTS) and train == [t for t in TEXTS if t in train]
    again = [" \u00a0 ".join(unicodedata.normalize("NFD", text).upper().split()) for text in TEXTS]
    file.write_text("\n".join(["a first one", *again, *TEXTS, *reversed(TEXTS), "another line"]), "utf-8")
    more_train, more_held_out = halves(file, 0.3)
    assert set(train) <= set(more_train) and set(held_out) <= set(more_held_out) and not set(more_train) & set(more_held_out)
    folded = [
        {" ".join(unicodedata.normalize("NFKC", p).casefold().split()) for p in part} for part in (more_train, more_held_out)
    ]
    assert not folded[0] & folded[1]
    require_disjoint(
        load_prompts(f"{file}#train", reading=Reading(duplicates="drop", held_out_share=0.3)), more_held_out, "", ""
    )
    wider = halves(file, 0.6)[1]
    assert set(more_held_out) < set(wider)


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.json"])
def test_every_layout_is_parted_alike(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": text, "x": i} for i, text in enumerate(TEXTS)]
    written = {
        "p.csv": "prompt,x\n" + "".join(f"{row['prompt']},{row['x']}\n" for row in rows),
        "p.jsonl": "\n".join(map(json.dumps, rows)),
        "p.json": json.dumps(rows),
    }
    (tmp_path / name).write_text(written[name], "utf-8")
    (tmp_path / "p.txt").write_text("\n".join(TEXTS), "utf-8")
    assert halves(tmp_path / name, 0.3) == halves(tmp_path / "p.txt", 0.3)


def test_a_part_follows_from_the_text_alone() -> None:
    for text, said in (("a  Cat", b"a cat"), ("STRASSE", b"strasse"), ("Straße", b"strasse"), ("\uff21 dog", b"a dog")):
        place = int(hashlib.blake2b(said, digest_size=8).hexdigest(), 16) / 2**64
        assert Part(True, place + 1e-9).holds(text) and not Part(True, place - 1e-9).holds(text)
        assert not Part(False, place + 1e-9).holds(text) and Part(False, place - 1e-9).holds(text)


def test_an_empty_part_says_what_to_change(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(InputError, match=r"p.txt#held_out: its part #held_out holds no prompt; raise data.held_out_share"):
        load_prompts(f"{tmp_path / 'p.txt'}#held_out", reading=Reading(held_out_share=1e-9))
    with pytest.raises(InputError, match=r"its part #train holds no prompt; lower data.held_out_share"):
        load_prompts(f"{tmp_path / 'p.txt'}#train", reading=Reading(held_out_share=1 - 1e-9))
    with pytest.raises(InputError, match=r"p.txt#test: this file does not exist"):
        load_prompts(f"{tmp_path / 'p.txt'}#test")


def test_repeats_are_told_from_their_first() -> None:
    import numpy as np

    again, first = repeats(np.array([5, -3, 5, 7, -3, 5], np.int64))
    assert again.tolist() == [2, 4, 5] and first.tolist() == [0, 1, 0]
    draw = np.random.default_rng(0)
    some, others = draw.integers(-50, 50, 30), draw.integers(-50, 50, 2**17)[: 2**16 + 7]
    others[:-5] = 99
    for keys in (some, some[:0]):
        assert shared_rows(keys, others).tolist() == [i for i, key in enumerate(keys.tolist()) if key in set(others.tolist())]


@pytest.mark.parametrize("policy", ["error", "keep", "drop"])
def test_equal_prompts_with_other_metadata_are_refused(policy: str, tmp_path: Path) -> None:
    reading = Reading(duplicates=policy)  # type: ignore[arg-type]
    file = tmp_path / "p.jsonl"
    rows = [{"prompt": "a cat", "include": [1], "id": 0}, {"prompt": "a dog"}, {"prompt": "a  cat", "include": [2], "id": 1}]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"line 3 repeats line 1 with other values of include"):
        load_prompts(str(file), reading=reading)
    rows[2]["include"] = [1]
    file.write_text("\n".join(map(json.dumps, rows)))
    if policy == "error":
        with pytest.raises(InputError, match=r'line 3 repeats line 1; remove it or set data.duplicates to "drop" or "keep"'):
            load_prompts(str(file), reading=reading)
    else:
        found = load_prompts(str(file), reading=reading)
        assert list(found) == ["a cat", "a dog", "a  cat"][: 3 if policy == "keep" else 2]
        assert [data_of(prompt).get("id") for prompt in found] == [0, None, 1][: len(found)]


def test_a_run_knows_its_prompts_with_their_metadata(tmp_path: Path) -> None:
    """Plain prompts have the digest that earlier versions gave them; with other metadata it is another."""
    lists = [["a cat", 'zwölf "Boxkämpfer"', "two\nlines"], ["x"] * 5000, []]
    before = hashlib.sha256(json.dumps(lists, ensure_ascii=False).encode()).hexdigest()
    assert prompts_digest(*lists) == before
    (tmp_path / "p.csv").write_text("prompt\na cat\n")
    plain = load_prompts(str(tmp_path / "p.csv"))
    assert prompts_digest(plain) == prompts_digest(["a cat"])
    digests = {prompts_digest([Prompt("a cat", data)]) for data in ({}, {"tag": "x"}, {"tag": "y"}, {"tag": {"x": "\ud800"}})}
    assert len(digests) == 4
    assert prompts_digest([Prompt("a", {"x": 1, "y": 2})]) == prompts_digest([Prompt("a", {"y": 2, "x": 1})])


def test_the_former_key_of_repeated_prompts_means_the_same(tmp_path: Path) -> None:
    for written, meant in (("true", "keep"), ("false", "error")):
        (tmp_path / "r.toml").write_text(f'base = "tiny"\n[data]\nallow_duplicates = {written}\n')
        assert load_recipe(tmp_path / "r.toml").data.duplicates == meant
    (tmp_path / "r.toml").write_text('base = "tiny"\n[data]\nallow_duplicates = true\nduplicates = "drop"\n')
    with pytest.raises(InputError, match=r"allow_duplicates is the former name of data.duplicates"):
        load_recipe(tmp_path / "r.toml")


def test_several_sources_in_a_recipe(tmp_path: Path, capsys) -> None:
    (tmp_path / "one.txt").write_text("a red dog\na blue dog\n")
    (tmp_path / "two.jsonl").write_text('{"prompt": "a green dog"}\n{"prompt": 3}\n')
    text = f'base = "tiny"\n[data]\nprompts = ["{tmp_path}/one.txt", "{tmp_path}/two.jsonl"]\nbroken = "drop"\n'
    (tmp_path / "r.toml").write_text(text)
    config = load_recipe(tmp_path / "r.toml")
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_recipe(tmp_path / "again.toml") == config
    train, held_out = load_data(config)
    assert list(train) == ["a red dog", "a blue dog", "a green dog"] and len(held_out) == 600
    options = ["--data.prompts", str(tmp_path / "one.txt"), str(tmp_path / "two.jsonl"), "--data.broken", "drop"]
    assert main(["train", "tiny", "--dry-run", *options]) == 0
    shown = capsys.readouterr().out
    assert "3 training prompts" in shown and "two.jsonl: left out 1 that cannot be read: line 2 holds 3" in shown


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"field": "text"}, r"data.field = text: has no effect here: it needs a file or data set"),
        ({"prompts": "p.txt", "held_out_share": 0.2}, "data.held_out_share = 0.2: has no effect here"),
        ({"prompts": "p.txt#train", "held_out_share": 1.0}, r"data.held_out_share = 1.0: must lie in \[0, 1\)"),
        ({"prompts": "p.txt#train", "held_out_share": 0.0}, "data.held_out_share = 0.0: must be above 0"),
    ],
)
def test_keys_that_cannot_act_are_refused(changes: dict, words: str, tmp_path: Path) -> None:
    config = dataclasses.replace(Config(), data=DataConfig(**changes))
    (tmp_path / "r.toml").write_text(to_toml(config))
    with pytest.raises(InputError, match=words):
        read_recipe(tmp_path / "r.toml").check()


def test_no_source_is_refused() -> None:
    with pytest.raises(InputError, match=r"data.prompts = \[\]: name at least one source"):
        load_prompts([])
