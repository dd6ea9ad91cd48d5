"""CLIP score and PickScore against the stock transformers path, on a tiny checkpoint laid out as the published ones."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from pictures import as_pil, by_pillow, resized, triangle
from small_clip import CONTEXT, PREPROCESSING, SIDE, TOKENS, cosines, open_clip_features, write_clip, write_letters
from torch import Tensor

from adagrpo.errors import InputError
from adagrpo.estimate.scorers import activations
from adagrpo.rewards import BUILT_IN, PromptRows, build_reward, check_reward_files
from adagrpo.rewards.base import matched
from adagrpo.rewards.clip import ClipScore, PickScore
from adagrpo.rewards.open_clip import clean_text
from adagrpo.rewards.pixels import CLIP_MEAN, CLIP_STD, center_crop, shorter_side

PROMPTS = ["a cat", "two dogs, 1 cat", "a cat", "the dog's cat. " * 9, ""]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def reward(checkpoint):
    return ClipScore(str(checkpoint))


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images [count, 3, height, width] of 8-bit values: flat, hard-edged and noisy parts."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 7, generator=generator).round()
    blocks = torch.nn.functional.interpolate(coarse, (height, width))
    noise = torch.rand(count, 3, height, width, generator=generator) * (torch.arange(width) > width // 2)
    return ((0.7 * blocks + 0.3 * noise) * 255).round() / 255


def stock(folder, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Cosines [N] and ``exp(logit_scale) * cosines`` of the stock model, its processor run as PickScore's card says."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folder)
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    options = {"padding": True, "truncation": True, "max_length": CONTEXT, "return_tensors": "pt"}
    with torch.no_grad():
        image = model.get_image_features(**processor(images=as_pil(images), **options)).pooler_output
        text = model.get_text_features(**processor(text=prompts, **options)).pooler_output
    image, text = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
    scores = model.logit_scale.exp() * (text @ image.T)
    return (text * image).sum(-1), scores.diagonal().detach()


@pytest.mark.parametrize("size", [(96, 96), (90, 133), (133, 90), (20, 45), (100, 40)])
def test_scores_are_those_of_the_stock_path(checkpoint, size) -> None:
    images = pictures(5, *size)
    cosine, scaled = stock(checkpoint, images, PROMPTS)
    assert cosine.std() > 0.05
    clip = build_reward("clip", {"path": str(checkpoint)})
    pick = build_reward("pickscore", {"path": str(checkpoint), "processor": str(checkpoint)})
    assert isinstance(clip, ClipScore) and isinstance(pick, PickScore)
    torch.testing.assert_close(clip(images, PROMPTS), cosine, atol=1e-5, rtol=0)
    torch.testing.assert_close(pick(images, PROMPTS), scaled, atol=1e-3, rtol=0)
    torch.testing.assert_close(pick(images, PROMPTS), clip(images, PROMPTS) * 100, atol=0, rtol=1e-4)


def test_text_features_are_those_of_the_stock_path(checkpoint, reward) -> None:
    from transformers import AutoTokenizer, CLIPModel

    tokens = AutoTokenizer.from_pretrained(checkpoint)(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    assert tokens.input_ids.shape == (5, CONTEXT)
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(checkpoint).get_text_features(**tokens).pooler_output
        found = reward._text_features(matched(torch.zeros(5, 3, 1, 1), PROMPTS))
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))


class UnreadRows(PromptRows):
    def _materialised(self) -> list[str]:
        raise AssertionError("the index was copied to the host")


def test_prompt_rows_are_gathered_without_reading_the_index(reward) -> None:
    images, index = pictures(40, 48, 40), torch.arange(40) % 3
    texts = ["a cat", "a dog", "cat, dog"]
    expected = reward(images, [texts[i] for i in index.tolist()])
    assert torch.equal(reward(images, UnreadRows(texts, index)), expected)
    torch.testing.assert_close(reward(images[7:9], UnreadRows(texts, index)[7:9]), expected[7:9])
    with pytest.raises(AssertionError, match="copied to the host"):
        list(UnreadRows(texts, index))


def test_the_host_never_waits_for_the_images(checkpoint) -> None:
    """What reads a value raises on the meta device; so the memory plan can rehearse it there, too."""
    found = activations(PickScore(str(checkpoint), processor=str(checkpoint)), 4, (48, 40))
    assert isinstance(found, int), found
    assert found > 4 * 3 * SIDE * SIDE * 4


def test_a_prompt_is_encoded_once_while_it_stays_in_the_cache(checkpoint, monkeypatch) -> None:
    reward = ClipScore(str(checkpoint), prompt_cache=2)
    encoded, encode = [], reward.model.get_text_features
    monkeypatch.setattr(reward.model, "get_text_features", lambda **ids: encoded.append(1) or encode(**ids))

    def calls(*prompts: str) -> int:
        before = len(encoded)
        reward(pictures(len(prompts), SIDE, SIDE), prompts)
        return len(encoded) - before

    assert calls("a", "b", "a") == 2
    assert calls("a") == 0
    assert calls("c") == 1  # b, the least recently used, goes
    assert calls("a", "c") == 0
    assert calls("a", "b", "c") == 1  # more than fit: all that one call needs are kept
    assert calls("a", "b", "c") == 0
    assert calls("d") == 1 and len(reward._cache) == 2


def test_an_image_that_is_not_finite_scores_nan_and_harms_no_other(reward) -> None:
    images, prompts = pictures(4, 40, 70), PROMPTS[:4]
    expected = reward(images, prompts)
    images[1, 0, 5, 0], images[3, 2, 20, 35] = torch.nan, torch.inf  # the first is cropped away
    scores = reward(images, prompts)
    assert scores.isnan().tolist() == [False, True, False, True]
    assert torch.equal(scores[::2], expected[::2])


def test_dtypes_and_shapes(checkpoint, reward) -> None:
    images = pictures(5, 48, 48)
    rounded = ClipScore(str(checkpoint), dtype="bf16")
    scores = rounded(images.bfloat16(), PROMPTS)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scores, reward(images, PROMPTS), atol=0.05, rtol=0)
    assert rounded.model.logit_scale == reward.model.logit_scale
    assert reward(images[:0], []).shape == (0,)
    with pytest.raises(ValueError, match="as many prompts"):
        reward(images, PROMPTS[:2])
    with pytest.raises(ValueError, match="images must be"):
        reward(images[0], PROMPTS[:3])
    with pytest.raises(InputError, match="dtype = fp8: one of fp32, bf16"):
        ClipScore(str(checkpoint), dtype="fp8")


def test_what_is_not_a_clip_model_is_refused(checkpoint, tmp_path, monkeypatch) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(InputError, match=f"rewards: {missing}: no such file or folder, nor a Hub id"):
        ClipScore(str(missing))
    with pytest.raises(InputError, match=f"rewards: {missing}: no such file or folder"):
        PickScore(str(checkpoint), processor=str(missing))
    with pytest.raises(InputError, match=rf"rewards: {tmp_path}: CLIP: lacks .*config\.json"):
        ClipScore(str(tmp_path), processor=str(checkpoint))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"rewards: nobody/nothing: .*can be downloaded from here"):
        ClipScore("nobody/nothing")


def broken(checkpoint, folder, name: str, content: bytes | None):
    shutil.copytree(checkpoint, folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    return str(folder)


def test_incomplete_folders_are_refused(checkpoint, tmp_path) -> None:
    from safetensors.torch import load_file, save

    weights = load_file(checkpoint / "model.safetensors")
    del weights["visual_projection.weight"]
    other = PREPROCESSING | {"resample": 2}
    larger = PREPROCESSING | {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    cases = {
        "CLIP: lacks visual_projection.weight": ("model.safetensors", save(weights, {"format": "pt"})),
        "truncated or damaged": ("model.safetensors", b"not safetensors"),
        "preprocessor_config.json: resample": ("preprocessor_config.json", json.dumps(other).encode()),
        "preprocessor_config.json: size": ("preprocessor_config.json", b'{"crop_size": 32}'),
        r"crops to \(64, 64\)": ("preprocessor_config.json", json.dumps(larger).encode()),
        "holds no tokenizer: none of": ("vocab.json", None),
        "has 87; name complete folders": (
            "vocab.json",
            json.dumps({token: i for i, token in enumerate([*TOKENS, "!"])}).encode(),
        ),
        "can be downloaded": ("preprocessor_config.json", None),
    }
    for number, (message, change) in enumerate(cases.items()):
        with pytest.raises(InputError, match=message):
            ClipScore(broken(checkpoint, tmp_path / str(number), *change))


DAMAGED = {
    "lacks": (lambda t: t.pop("text_projection.weight"), r"CLIP: lacks text_projection\.weight"),
    "holds": (lambda t: t.update(extra=torch.zeros(1)), r"CLIP: holds extra"),
    "shape": (lambda t: t.update({"text_projection.weight": torch.zeros(2)}), r"CLIP: text_projection\.weight has shape \[2\]"),
    "quantised": (
        lambda t: t.update(scale=torch.zeros(1, dtype=torch.uint8)),
        r"CLIP: its weights are quantised: scale \(U8\)",
    ),
    "not finite": (lambda t: t["logit_scale"].fill_(torch.nan), r"CLIP: logit_scale holds values that are not finite"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_weights_that_are_not_a_clip_models_are_named(case: str, checkpoint, tmp_path, capsys) -> None:
    from safetensors.torch import load_file, save_file

    from adagrpo.cli import main

    change, words = DAMAGED[case]
    folder = shutil.copytree(checkpoint, tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=words):
        build_reward("clip", {"path": str(folder)})
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"{TINY}[[rewards]]\nname = 'pickscore'\nkwargs = {{ path = '{folder}', processor = '{folder}' }}\n")
    code = main(["train", str(recipe), "--dry-run"])
    assert code == (0 if case == "not finite" else 2)  # a dry run reads headers only
    assert code == 0 or re.search(words, capsys.readouterr().err)


TINY = """
[data]
prompts = "tiny:even"
held_out = "tiny:held_out"
[model]
max_text_tokens = 12
"""


def test_older_checkpoints_with_position_ids_load_whole(checkpoint, reward, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoint, tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"{part}_model.embeddings.position_ids": torch.arange(n)[None] for part, n in (("text", 16), ("vision", 17))}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    images = pictures(2, 40, 40)
    older = ClipScore(str(folder))
    expected, found = reward.model.state_dict(), older.model.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(found[name], t) for name, t in expected.items())
    torch.testing.assert_close(older(images, PROMPTS[:2]), reward(images, PROMPTS[:2]))


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (images.double() - mean) / std


@pytest.mark.parametrize("size", [(96, 96), (40, 44)])
def test_flow_grpos_score_is_its_formula_in_fp64(size, checkpoint) -> None:
    from transformers import AutoTokenizer, CLIPModel

    images = pictures(5, *size) + 0.3 / 255  # they are not rounded to 8 bits
    options = {"padding": "max_length", "truncation": True, "max_length": CONTEXT, "return_tensors": "pt"}
    tokens = AutoTokenizer.from_pretrained(checkpoint)(PROMPTS, **options)
    seen = center_crop(resized(images, shorter_side(size, SIDE), triangle, 1.0), (SIDE, SIDE), "even")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(checkpoint).double()(pixel_values=normalised(seen), **tokens).logits_per_image
    found = build_reward("clip", {"path": str(checkpoint), "variant": "flow-grpo"})(images, PROMPTS)
    torch.testing.assert_close(found.double(), expected.diagonal() / 30, atol=1e-4, rtol=0)
    assert BUILT_IN["clip"].bounds[1] > 100 / 30  # of features that are one


GOLDEN = Path(__file__).parents[1] / "assets" / "rewards" / "hpsv2" / "HPS_v2.1_compressed.pt"
MODEL = {
    "quick_gelu": True,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 40, "head_width": 20, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 512, "width": 24, "heads": 3, "layers": 2},
}
LETTERS = ["ab cd", "ab, cd", "x yz", "ab cd"]


def open_clip_folder(folder: Path, config: dict | None) -> str:
    """As open_clip's models lie on the Hub, tokenizer included."""
    write_letters(folder)
    torch.save(torch.load(GOLDEN, weights_only=True)["state_dict"], folder / "open_clip_pytorch_model.bin")
    if config is not None:
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    return str(folder)


SHORTEST = {"model_cfg": MODEL, "preprocess_cfg": {"interpolation": "bicubic", "resize_mode": "shortest"}}
LARGER = {"model_cfg": MODEL | {"vision_cfg": MODEL["vision_cfg"] | {"image_size": 30}, "quick_gelu": False}}


@pytest.mark.parametrize(
    ("config", "architecture", "seen", "quick"),
    [
        (SHORTEST, {}, "crop", True),
        (SHORTEST | {"preprocess_cfg": {"resize_mode": "squash"}}, {}, "squash", True),
        (LARGER, {}, "larger", False),  # 30 pixels for 2 x 2 patches of 14, as 384 for 27 x 27
        (None, {"vision_heads": 2, "text_heads": 3}, "squash", True),  # DFN's activation and way of resizing
        (None, {"vision_heads": 2, "text_heads": 3, "activation": "gelu"}, "squash", False),
    ],
)
def test_mixgrpos_score_is_open_clips_formula_in_fp64(config, architecture, seen, quick, tmp_path) -> None:
    kwargs = {"path": open_clip_folder(tmp_path, config), "variant": "mixgrpo", "architecture": architecture}
    check_reward_files("clip", kwargs)
    images = pictures(4, 40, 45)
    targets = {"crop": (28, 31), "squash": (28, 28), "larger": (30, 33)}
    side = 30 if seen == "larger" else 28
    small = center_crop(by_pillow(images, targets[seen]) / 255, (side, side), "even")
    reward = build_reward("clip", kwargs)
    words = [reward.tokenizer(prompt).input_ids for prompt in LETTERS]
    ids = torch.tensor([row + [0] * (8 - len(row)) for row in words])
    state = torch.load(GOLDEN, weights_only=True)["state_dict"]
    expected = cosines(*open_clip_features(state, normalised(small), ids, (2, 3), quick))
    torch.testing.assert_close(reward(images, LETTERS).double(), expected, atol=1e-5, rtol=0)


def test_a_file_of_open_clip_may_be_named_and_its_tokenizer_elsewhere(tmp_path) -> None:
    folder = Path(open_clip_folder(tmp_path / "a", SHORTEST))
    words = write_letters(tmp_path / "words")
    kwargs = {"variant": "mixgrpo", "processor": str(words)}
    images = pictures(2, 30, 30)
    expected = build_reward("clip", {"variant": "mixgrpo", "path": str(folder)})(images, LETTERS[:2])
    file = folder / "open_clip_pytorch_model.bin"
    assert torch.equal(build_reward("clip", kwargs | {"path": str(file)})(images, LETTERS[:2]), expected)
    with pytest.raises(InputError, match="no tokenizer can be loaded from"):
        build_reward("clip", {"variant": "mixgrpo", "path": str(file)})


REFUSED = {
    r"resizes by longest and bicubic": SHORTEST | {"preprocess_cfg": {"resize_mode": "longest"}},
    r"resizes by shortest and bilinear": SHORTEST | {"preprocess_cfg": {"interpolation": "bilinear"}},
    r"names no vision_cfg and text_cfg": {"model_cfg": {"vision_cfg": {}}},
    r"names a hf_model_name: not a CLIP": {"model_cfg": MODEL | {"text_cfg": {"hf_model_name": "roberta-base"}}},
    r"vision_heads = 3 do not share 40 channels": {"model_cfg": MODEL | {"vision_cfg": {"width": 40, "head_width": 13}}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_configurations_of_open_clip_that_cannot_be_followed_are_refused(message: str, tmp_path) -> None:
    kwargs = {"path": open_clip_folder(tmp_path, REFUSED[message]), "variant": "mixgrpo"}
    for use in (check_reward_files, build_reward):
        with pytest.raises(InputError, match=message):
            use("clip", kwargs)


def test_variants_are_named_and_keep_to_their_arguments(checkpoint) -> None:
    for use in (check_reward_files, build_reward):
        with pytest.raises(InputError, match="variant = mixgpro: one of cosine, flow-grpo, mixgrpo"):
            use("clip", {"path": str(checkpoint), "variant": "mixgpro"})
        with pytest.raises(InputError, match=r"architecture is for variant = mixgrpo; for cosine, config\.json tells it"):
            use("clip", {"path": str(checkpoint), "architecture": {"vision_heads": 2}})


CLEANED = {
    "The  dog\u2019s\tCAT ": "the dog's cat",  # a curly apostrophe
    "\u201ccat\u201d": '"cat"',
    "\uff24\uff2f\uff27\u3000\uff11": "dog 1",  # of full width
    "cat &amp; dog": "cat & dog",
    "cat &amp;lt; dog": "cat < dog",
    "sch\u00c3\u00b6n": "sch\u00f6n",  # UTF-8 that was read as Latin-1
}


@pytest.mark.parametrize("prompt", CLEANED)
def test_text_is_cleaned_as_open_clip_does(prompt: str) -> None:
    assert clean_text(prompt) == CLEANED[prompt]


def test_only_open_clips_variants_clean_text(checkpoint) -> None:
    prompts, plain = ["the dog\u2019s cat", "a cat &amp; dog"], ["the dog's cat", "a cat & dog"]
    images = pictures(2, 40, 40)
    of = {name: build_reward("clip", {"path": str(checkpoint), "variant": name}) for name in ("cosine", "flow-grpo", "mixgrpo")}
    for name in ("cosine", "flow-grpo"):
        assert (of[name](images, prompts) - of[name](images, plain))[0].abs() > 1e-4
    assert torch.equal(of["mixgrpo"](images, prompts), of["mixgrpo"](images, plain))
    assert torch.equal(of["mixgrpo"](images, plain), of["cosine"](images, plain))  # a CLIPModel's folder, nothing to clean


def test_cleaning_needs_a_package(checkpoint, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    with pytest.raises(InputError, match=r"needs ftfy: pip install 'adagrpo\[rewards\]'"):
        build_reward("clip", {"path": str(checkpoint), "variant": "mixgrpo"})


def test_chunks_do_not_matter(reward) -> None:
    images, prompts = pictures(7, 40, 44), [*PROMPTS, "a dog", "a"]
    one_by_one = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(reward(images, prompts), one_by_one, atol=2e-6, rtol=0)
