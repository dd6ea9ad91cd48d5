"""CLIP score and PickScore against the stock transformers path, on a tiny checkpoint laid out as the published ones."""

import json
import re
import shutil

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adagrpo.errors import InputError
from adagrpo.rewards import PromptRows, build_reward
from adagrpo.rewards.clip import ClipScore, PickScore

SIDE, CONTEXT = 32, 16
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
SPECIAL_TOKENS = ["<|startoftext|>", "<|endoftext|>"]
TOKENS = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), "ca", "cat</w>", "do", "dog</w>", *SPECIAL_TOKENS]
MERGES = "#version: 0.2\nc a\nca t</w>\nd o\ndo g</w>\n"
SPECIAL = {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
PREPROCESSING = {
    "crop_size": SIDE,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": SIDE,
}
PROMPTS = ["a cat", "two dogs, 1 cat", "a cat", "the dog's cat. " * 9, ""]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with the files of openai/clip-vit-*: slow tokenizer, integer sizes and legacy eos id included."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(TOKENS), "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 2}
    vision = {"image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=layers | text, vision_config=layers | vision, projection_dim=24))
    for weight in model.parameters():  # at their usual scale all texts look alike to so small a model
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else None
    model.logit_scale.data.fill_(4.6052)
    model.save_pretrained(folder)
    tokenizer = {"model_max_length": CONTEXT, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True, **SPECIAL}
    files = {"tokenizer_config": tokenizer, "special_tokens_map": SPECIAL, "preprocessor_config": PREPROCESSING}
    files["vocab"] = {token: i for i, token in enumerate(TOKENS)}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "merges.txt").write_text(MERGES)
    return folder


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


def as_pil(images: Tensor) -> list:
    from PIL import Image

    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]


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


@pytest.mark.parametrize("size", [(96, 96), (90, 133), (133, 90), (32, 32), (20, 45)])
def test_preprocessing_is_the_image_processors_up_to_8_bits(checkpoint, reward, size) -> None:
    from transformers import CLIPImageProcessorPil

    images = pictures(3, *size)
    expected = CLIPImageProcessorPil.from_pretrained(checkpoint)(as_pil(images), return_tensors="pt").pixel_values
    error = (reward.preprocess(images) - expected).abs() * reward.preprocess.std * 255
    assert expected.shape == (3, 3, SIDE, SIDE)
    assert error.max() < 1.6  # two roundings, one per axis, the first spread by the second's weights
    assert error.mean() < 0.3


@pytest.mark.parametrize("size", [(96, 96), (90, 133)])
def test_scores_are_those_of_the_stock_path(checkpoint, size) -> None:
    images = pictures(5, *size)
    cosine, scaled = stock(checkpoint, images, PROMPTS)
    assert cosine.std() > 0.05
    clip = build_reward("clip", {"path": str(checkpoint)})
    pick = build_reward("pickscore", {"path": str(checkpoint), "processor": str(checkpoint)})
    assert isinstance(clip, ClipScore) and isinstance(pick, PickScore)
    torch.testing.assert_close(clip(images, PROMPTS), cosine, atol=5e-3, rtol=0)
    torch.testing.assert_close(pick(images, PROMPTS), scaled, atol=0.5, rtol=0)
    torch.testing.assert_close(pick(images, PROMPTS), clip(images, PROMPTS) * 100, atol=0, rtol=1e-4)


def test_text_features_are_those_of_the_stock_path(checkpoint, reward) -> None:
    from transformers import AutoTokenizer, CLIPModel

    tokens = AutoTokenizer.from_pretrained(checkpoint)(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    assert tokens.input_ids.shape == (5, CONTEXT)
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(checkpoint).get_text_features(**tokens).pooler_output
        found = reward._text_features(PROMPTS, torch.device("cpu"))
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


class NoReads(TorchDispatchMode):
    """Refuses what would make the host wait for a device: reading scalars, and shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


def test_the_host_never_waits_for_the_images(checkpoint) -> None:
    reward = PickScore(str(checkpoint), processor=str(checkpoint))
    with NoReads():
        reward(pictures(4, 48, 40), UnreadRows(["a cat", "a dog"], torch.arange(4) % 2))
        with pytest.raises(AssertionError, match="host wait"):
            torch.ones(1).item()


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
    assert rounded.logit_scale == reward.logit_scale
    assert reward(images[:0], []).shape == (0,)
    with pytest.raises(ValueError, match="as many prompts"):
        reward(images, PROMPTS[:2])
    with pytest.raises(ValueError, match="images must be"):
        reward(images[0], PROMPTS[:3])
    with pytest.raises(InputError, match="dtype = fp8: one of fp32, bf16"):
        ClipScore(str(checkpoint), dtype="fp8")


def test_what_is_not_a_clip_model_is_refused(checkpoint, tmp_path, monkeypatch) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(InputError, match=f"rewards: {missing}: no such folder.*name a CLIP model"):
        ClipScore(str(missing))
    with pytest.raises(InputError, match=f"rewards: {missing}: no such folder"):
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
        "cannot be loaded as a CLIP model.*vocab": ("vocab.json", None),
        "has 87 tokens": ("vocab.json", json.dumps({token: i for i, token in enumerate([*TOKENS, "!"])}).encode()),
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
