"""HPS v2 against open_clip's own numbers on a tiny checkpoint, and against its formula by hand in fp64."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from pictures import cubic, noise, resized
from safetensors.torch import load_file
from small_clip import cosines, open_clip_features, open_clip_shapes, spelled, write_letters
from torch import Tensor

from adagrpo.errors import InputError
from adagrpo.rewards import BUILT_IN, PromptRows, build_reward, check_reward_files
from adagrpo.rewards.hpsv2 import Hpsv2
from adagrpo.rewards.open_clip import Architecture, unfilled_clip
from adagrpo.rewards.pixels import CLIP_MEAN, CLIP_STD

GOLDEN = Path(__file__).parents[1] / "assets" / "rewards" / "hpsv2"
HEADS = {"vision_heads": 2, "text_heads": 3}  # in no file
FILE = "HPS_v2.1_compressed.pt"


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> str:
    return str(write_letters(tmp_path_factory.mktemp("letters") / "words"))


@pytest.fixture(scope="module")
def reward(words: str) -> Hpsv2:
    made = build_reward("hpsv2", {"path": str(GOLDEN), "tokenizer": words, "architecture": HEADS})
    assert isinstance(made, Hpsv2)
    return made


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "io.safetensors")


def prompts_of(ids: Tensor) -> list[str]:
    """The prompts that become these tokens: what is between 510 and 511."""
    return [spelled(row[1 : row.index(511)]) for row in ids.tolist()]


def test_scores_are_those_of_open_clip(reward: Hpsv2, golden) -> None:
    prompts = prompts_of(golden["ids"])
    for prompt, ids in zip(prompts, golden["ids"].tolist(), strict=True):
        assert reward.tokenizer(prompt).input_ids == ids[: ids.index(511) + 1]
    images = golden["pixels_uint8"] / 255
    torch.testing.assert_close(reward(images, prompts), golden["score"], atol=1e-6, rtol=0)
    nudged = (images + 0.4 / 255).clamp(max=1)  # they are rounded to 8 bits
    assert torch.equal(reward(nudged, prompts), reward(images, prompts))


def test_the_numbers_tell_position_and_heads(words: str, golden, monkeypatch) -> None:
    images, prompts = golden["pixels_uint8"] / 255, prompts_of(golden["ids"])
    other = Hpsv2(str(GOLDEN), tokenizer=words, architecture=HEADS | {"vision_heads": 4})
    assert (other(images, prompts) - golden["score"]).abs().max() > 1e-3
    other = Hpsv2(str(GOLDEN), tokenizer=words, architecture=HEADS)
    monkeypatch.setattr(other.model.text_model, "eos_token_id", 49407)  # of the published vocabulary, which this has not
    assert (other(images, prompts) - golden["score"]).abs().max() > 1e-3


def by_hand(images: Tensor, ids: Tensor) -> Tensor:
    """Scores [N] in fp64: a cubic filter over 8-bit images in one pass, torchvision's middle, open_clip's model."""
    height, width = images.shape[2:]
    short = min(height, width)
    seen = resized((images.double() * 255).round() / 255, (28 * height // short, 28 * width // short), cubic, 2.0)
    top, left = (round((side - 28) / 2) for side in seen.shape[2:])
    seen = seen[:, :, top : top + 28, left : left + 28]
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    state = torch.load(GOLDEN / FILE, weights_only=True)["state_dict"]
    return cosines(*open_clip_features(state, (seen - mean) / std, ids, (2, 3)))


@pytest.mark.parametrize("size", [(40, 45), (45, 40), (90, 90)])
def test_scores_are_the_formula_by_hand(size, reward: Hpsv2, golden) -> None:
    images = noise(*size, count=4)
    expected = by_hand(images, golden["ids"])
    torch.testing.assert_close(reward(images, prompts_of(golden["ids"])).double(), expected, atol=1e-5, rtol=0)


def test_an_odd_margin_is_shared_out_as_torchvision_does(reward: Hpsv2, golden, monkeypatch) -> None:
    """A margin of 3: the scores above would be others if the crop began at 1, not 2."""
    images, prompts = noise(40, 45, count=4), prompts_of(golden["ids"])
    expected = reward(images, prompts)
    monkeypatch.setattr(reward.preprocess, "rounding", "down")
    assert (reward(images, prompts) - expected).abs().max() > 1e-3


def test_chunks_and_order_do_not_matter(reward: Hpsv2, golden) -> None:
    texts, index = prompts_of(golden["ids"]), torch.tensor([0, 2, 1, 2, 3, 0, 1])
    images = noise(50, 70, count=7)
    together = reward(images, PromptRows(texts, index))
    one_by_one = torch.cat([reward(images[i : i + 1], [texts[j]]) for i, j in enumerate(index.tolist())])
    torch.testing.assert_close(together, one_by_one, atol=1e-6, rtol=0)
    in_two = torch.cat([reward(images[:3], PromptRows(texts, index)[:3]), reward(images[3:], PromptRows(texts, index)[3:])])
    torch.testing.assert_close(together, in_two, atol=1e-6, rtol=0)
    images[4, 1, 20, 20] = torch.nan
    torch.testing.assert_close(reward(images, PromptRows(texts, index)).isnan(), torch.arange(7) == 4, atol=0, rtol=0)


def test_long_prompts_are_cut_and_end_all_the_same(reward: Hpsv2, monkeypatch) -> None:
    images = noise(28, 28, count=2)
    long = " ".join(["ab", "cd"] * 60)
    encoded, encode = [], reward.model.get_text_features
    monkeypatch.setattr(reward.model, "get_text_features", lambda **ids: encoded.append(ids["input_ids"]) or encode(**ids))
    scores = reward(images, [long, long + " ef gh"])
    assert [ids.shape for ids in encoded] == [(1, 77)] * 2
    assert torch.equal(*encoded) and encoded[0][0, [0, -1]].tolist() == [510, 511]
    state = torch.load(GOLDEN / FILE, weights_only=True)["state_dict"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    pixels = ((images * 255).round() / 255 - mean) / std
    expected = cosines(*open_clip_features(state, pixels, torch.cat(encoded), (2, 3)))
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)


def test_versions_are_files(words: str, tmp_path: Path) -> None:
    shutil.copy(GOLDEN / FILE, tmp_path / "HPS_v2_compressed.pt")
    kwargs = {"path": str(tmp_path), "tokenizer": words, "architecture": HEADS}
    check_reward_files("hpsv2", kwargs | {"version": "v2.0"})
    build_reward("hpsv2", kwargs | {"version": "v2.0"})
    build_reward("hpsv2", kwargs | {"path": str(tmp_path / "HPS_v2_compressed.pt")})  # a file is what it is
    for use in (check_reward_files, build_reward):
        with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}.* holds no {re.escape(FILE)}"):
            use("hpsv2", kwargs)
        with pytest.raises(InputError, match=r"version = v3: one of v2\.0, v2\.1"):
            use("hpsv2", kwargs | {"version": "v3"})


def save(file: Path, change) -> str:
    state = torch.load(GOLDEN / FILE, weights_only=True)["state_dict"]
    change(state)
    torch.save({"state_dict": state}, file)
    return str(file)


BLOCK = "visual.transformer.resblocks.1.attn.in_proj_weight"
DAMAGED = {
    f"lacks {re.escape(BLOCK)}": lambda s: s.pop(BLOCK),
    r"holds transformer\.resblocks\.0\.gamma": lambda s: s.update({"transformer.resblocks.0.gamma": torch.ones(1)}),
    r"text_projection has shape \[23, 24\]": lambda s: s.update(text_projection=torch.zeros(23, 24)),
    r"visual\.proj has shape \[24, 40\]": lambda s: s.update({"visual.proj": torch.zeros(24, 40)}),
    r"visual\.conv1\.weight is missing: no CLIP in open_clip's layout": lambda s: s.pop("visual.conv1.weight"),
    r"token_embedding\.weight is torch\.int8: quantised": lambda s: s.update(
        {"token_embedding.weight": s["token_embedding.weight"].to(torch.int8)}
    ),
    r"visual\.proj holds values that are not finite": lambda s: s["visual.proj"][3].fill_(torch.inf),
}


@pytest.mark.parametrize("words_of_error", DAMAGED)
def test_a_file_that_is_something_else_is_named_with_its_tensor(words_of_error: str, words: str, tmp_path: Path) -> None:
    file = save(tmp_path / "some.pt", DAMAGED[words_of_error])
    kwargs = {"path": file, "tokenizer": words, "architecture": HEADS}
    with pytest.raises(InputError, match=rf"{re.escape(file)}.*{words_of_error}"):
        build_reward("hpsv2", kwargs)
    if "finite" not in words_of_error:  # a dry run reads headers only
        with pytest.raises(InputError, match=rf"{re.escape(file)}.*{words_of_error}"):
            check_reward_files("hpsv2", kwargs)


WRONG = {
    r"heads are in no file.*vision tower has 40; set kwargs\.architecture = { vision_heads = ": {
        "architecture": {"text_heads": 3}
    },
    r"architecture has no heads; it takes activation, image_size, text_heads, vision_heads": {"architecture": {"heads": 2}},
    r"architecture\.text_heads = 0: a whole number above 0": {"architecture": HEADS | {"text_heads": 0}},
    r"architecture\.activation = relu: one of gelu, quick_gelu": {"architecture": HEADS | {"activation": "relu"}},
    r"text_heads = 5 do not share 24 channels; correct kwargs\.architecture": {"architecture": HEADS | {"text_heads": 5}},
    r"dtype = fp8: one of fp32, bf16": {"dtype": "fp8"},
    r"nowhere: .*no such file or folder": {"path": "/nowhere/at/all"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused_before_and_while_loading(message: str, words: str) -> None:
    kwargs = {"path": str(GOLDEN), "tokenizer": words, "architecture": HEADS} | WRONG[message]
    for use in (check_reward_files, build_reward):
        with pytest.raises(InputError, match=message.replace("nowhere: ", "nowhere/at/all: ")):
            use("hpsv2", kwargs)


def test_another_vocabulary_is_refused(words: str, tmp_path: Path) -> None:
    tokens = (Path(words) / "vocab.json").read_text().replace(', "<|startoftext|>": 510', ', "!": 512, "<|startoftext|>": 510')
    folder = shutil.copytree(words, tmp_path / "more")
    (folder / "vocab.json").write_text(tokens)
    with pytest.raises(InputError, match=r"is made for 512 tokens, but .*more has 513"):
        Hpsv2(str(GOLDEN), tokenizer=str(folder), architecture=HEADS)


def test_the_published_model_is_the_size_of_its_files() -> None:
    shapes = open_clip_shapes(vision=(1280, 32), text=(1024, 24), embedding=1024, vocabulary=49408)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    model = unfilled_clip(state, Architecture(), "here")
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441 == BUILT_IN["hpsv2"].parameters
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.num_attention_heads, text.num_attention_heads, vision.hidden_act) == (16, 16, "gelu")
    assert (vision.image_size, text.eos_token_id, text.max_position_embeddings) == (224, 49407, 77)
    assert model.vision_model.encoder.layers[0].mlp.fc1.weight.is_meta
