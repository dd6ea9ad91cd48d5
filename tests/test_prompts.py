"""Prompt files and the endless stream."""

import pytest

from adagrpo.errors import InputError
from adagrpo.prompts import PromptStream, load_prompts

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
    assert load_prompts(str(file)) == ["a cat", "zwölf Boxkämpfer"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "does not exist"),
        (b"\n \n", "holds no prompt"),
        (b"ok\n\xff\xfe", "not UTF-8"),
        (b"a\n\nb\n a \n", "line 4 repeats line 1; remove it or set data.allow_duplicates"),
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


def test_duplicates_can_be_allowed(tmp_path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a\nb\na\n", "utf-8")
    assert load_prompts(str(file), allow_duplicates=True) == ["a", "b", "a"]


def test_unknown_source() -> None:
    with pytest.raises(InputError, match="tiny:wide"):
        load_prompts("tiny:wild")
