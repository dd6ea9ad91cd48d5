"""A prompt is a string in every respect, and its metadata travels with it."""

import copy
import json
import pickle

import pytest
import torch

from adagrpo.prompts.prompt import Prompt, data_of
from adagrpo.prompts.sources import load_prompts
from adagrpo.rewards import PromptRows

DATA = {"target": "STOP", "objects": [{"class": "dog", "count": 2}]}


def test_a_prompt_is_its_text() -> None:
    prompt = Prompt("a sign", DATA)
    assert prompt == "a sign" and hash(prompt) == hash("a sign") and {"a sign": 1}[prompt] == 1
    assert json.dumps({prompt: [prompt]}) == '{"a sign": ["a sign"]}' and f"{prompt}!" == "a sign!"
    assert type(str(prompt)) is type(prompt.upper()) is str
    assert data_of(prompt) == DATA and data_of("a sign") == {} == data_of(Prompt("a sign"))
    with pytest.raises(TypeError):
        prompt.data["target"] = "GO"  # type: ignore[index]


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda prompt: pickle.loads(pickle.dumps(prompt))])
def test_copies_and_pickles_keep_the_data(way) -> None:
    found = way(Prompt("a sign", DATA))
    assert type(found) is Prompt and found == "a sign" and data_of(found) == DATA


def test_rows_give_each_image_its_prompt_and_its_group() -> None:
    texts = [Prompt("a sign", DATA), "a cat", Prompt("two dogs", {"target": None})]
    rows = PromptRows(texts, torch.tensor([2, 0, 0, 1]), torch.tensor([7, 7, 8, 8]))
    assert [dict(data_of(prompt)) for prompt in rows] == [{"target": None}, DATA, DATA, {}]
    for part in (rows[1:3], rows.rows(torch.tensor([1, 2])), rows[1:].copied()[:2], rows.to("cpu")[1:3]):
        assert part.group_index.tolist() == [7, 8] and data_of(part[0]) == data_of(part[1]) == DATA
    assert PromptRows(texts, torch.tensor([0]))[:1].copied().group_index is None


def test_a_source_by_import_path_hands_its_data_on(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "signs.py").write_text(
        "from adagrpo.prompts.prompt import Prompt\ndef prompts():\n    return [Prompt('a sign', {'target': 'GO'}), 'a cat']\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert [dict(data_of(prompt)) for prompt in load_prompts("signs:prompts")] == [{"target": "GO"}, {}]
