"""ImageReward against the numbers of its own code (image-reward 1.5 under transformers 4.45.2) on a tiny checkpoint."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_blip import GOLDEN, tokenizer
from torch import Tensor

from adagrpo.errors import InputError
from adagrpo.estimate.scorers import activations
from adagrpo.rewards.base import PromptRows
from adagrpo.rewards.imagereward import ImageReward, Towers, unfilled

HEADS = {"vision_heads": 4, "text_heads": 4}  # in no file
PROMPTS = ["a red cat", "Two dogs", "a red cat", "the cat on the mat in the mat " * 9]
IDS = [[2, 5, 7, 8, 3], [2, 6, 9, 14, 3], [2, 5, 7, 8, 3], [2, *([13, 8, 10, 13, 11, 12, 13, 11] * 9)[:33], 3]]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return str(tokenizer(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def reward(bert: str) -> ImageReward:
    return ImageReward(str(GOLDEN), bert, architecture=HEADS)


def noise(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return (torch.rand(count, 3, height, width, generator=generator) * 255).round() / 255


def test_scores_are_those_of_its_own_code(reward: ImageReward) -> None:
    io = load_file(GOLDEN / "io.safetensors")
    with torch.no_grad():
        seen = reward.towers.vision(pixel_values=io["pixel_values"]).last_hidden_state
    torch.testing.assert_close(seen, io["vision_hidden"], atol=2e-6, rtol=0)
    scores = reward.score(io["pixel_values"], io["input_ids"], io["attention_mask"])
    torch.testing.assert_close(scores, io["reward"][:, 0], atol=1e-6, rtol=0)
    other = ImageReward(str(GOLDEN), reward.tokenizer.name_or_path, architecture={"vision_heads": 2, "text_heads": 4})
    wrong = other.score(io["pixel_values"], io["input_ids"], io["attention_mask"])
    assert (wrong - io["reward"][:, 0]).abs().max() > 1e-5  # the numbers tell how many heads there are


def test_prompts_become_berts_tokens_and_images_the_normalised_middle(reward: ImageReward) -> None:
    images = noise(4, 32, 39)
    ids = torch.tensor([row + [0] * (35 - len(row)) for row in IDS])
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    pixels = (images[..., 4:36] - mean) / std  # a margin of 7 is shared out as 4 and 3: round(3.5) is 4
    expected = reward.score(pixels, ids, (ids != 0).long())
    assert expected.std() > 1e-4
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-5, rtol=0)
    shifted = reward.score((images[..., 3:35] - mean) / std, ids, (ids != 0).long())
    assert (shifted - expected).abs().max() > 1e-4


class UnreadRows(PromptRows):
    def _materialised(self) -> list[str]:
        raise AssertionError("the index was copied to the host")


def test_together_as_one_by_one_and_nan_stays_where_it_is(reward: ImageReward) -> None:
    images, index = noise(5, 48, 40), torch.tensor([0, 1, 0, 2, 1])
    texts = ["a red cat", "two dogs on the mat", "the dog"]
    expected = torch.cat([reward(images[i : i + 1], [texts[index[i]]]) for i in range(5)])
    torch.testing.assert_close(reward(images, UnreadRows(texts, index)), expected, atol=1e-5, rtol=0)
    images[1, 0, 0, 0], images[3, 2, 20, 20] = torch.nan, torch.inf
    found = reward(images, [texts[i] for i in index])
    assert found.isnan().tolist() == [False, True, False, True, False]
    torch.testing.assert_close(found[::2], expected[::2], atol=1e-5, rtol=0)
    assert reward(images[:0], []).shape == (0,)


def test_the_host_never_waits_for_the_images(reward: ImageReward) -> None:
    """What reads a value raises on the meta device; so the memory plan can rehearse it there, too."""
    assert isinstance(found := activations(reward, 4, (48, 40)), int) and found > 4 * 3 * 32 * 32 * 4


def test_bf16_rounds_the_towers_only(bert: str, reward: ImageReward) -> None:
    rounded = ImageReward(str(GOLDEN / "ImageReward.pt"), bert, "bf16", HEADS)
    assert {p.dtype for p in rounded.towers.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in rounded.head.parameters()} == {torch.float32}
    images = noise(4, 32, 32)
    torch.testing.assert_close(rounded(images, PROMPTS), reward(images, PROMPTS), atol=2e-3, rtol=0)


def without(name: str):
    return lambda state: state.pop(name)


CHANGES = {
    r"ImageReward\.pt: BLIP: lacks text\.encoder\.layer\.1\.crossattention\.self\.key\.bias": without(
        "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"
    ),
    r"ImageReward\.pt: MLP: lacks mlp\.layers\.4\.bias": without("mlp.layers.4.bias"),
    r"ImageReward\.pt: holds no blip\.visual_encoder\.pos_embed of an ImageReward model": without(
        "blip.visual_encoder.pos_embed"
    ),
    r"ImageReward\.pt: BLIP: holds blip\.visual_encoder\.extra": lambda s: s.update(
        {"blip.visual_encoder.extra": torch.ones(1)}
    ),
    r"BLIP: vision\.encoder\.layers\.1\.self_attn\.qkv\.bias has shape \[7\], ImageReward means \[120\]": lambda s: s.update(
        {"blip.visual_encoder.blocks.1.attn.qkv.bias": torch.ones(7)}
    ),
}


@pytest.mark.parametrize("words", CHANGES)
def test_files_that_are_not_its_own_are_named(words: str, bert: str, tmp_path: Path) -> None:
    state = torch.load(GOLDEN / "ImageReward.pt", weights_only=True)
    CHANGES[words](state)
    torch.save(state, tmp_path / "ImageReward.pt")
    for make in (ImageReward, ImageReward.check):
        with pytest.raises(InputError, match=f"^rewards: .*{words}"):
            make(str(tmp_path), bert, "fp32", HEADS)


def test_what_does_not_belong_together_is_named(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    other = tokenizer(tmp_path, 3)
    shutil.copy(GOLDEN / "io.safetensors", tmp_path / "ImageReward.pt")
    for arguments, words in (
        ((str(GOLDEN), bert, "fp32", None), r"vision_heads = 0: .*kwargs\.architecture = {vision_heads = "),
        ((str(GOLDEN), bert, "fp32", {"vision_heads": 3}), r"vision_heads = 3: so many heads do not share 40"),
        ((str(GOLDEN), bert, "fp32", {"depth": 3}), r"kwargs\.architecture\.depth: not known; it has vision_heads, text_heads"),
        ((str(GOLDEN), bert, "fp8", HEADS), "dtype = fp8: one of fp32, bf16"),
        ((str(GOLDEN), str(other), "fp32", HEADS), re.escape(f"made for 60 tokens, but {other} has 20 with [DEC] and [ENC]")),
        ((str(tmp_path), bert, "fp32", HEADS), r"ImageReward\.pt is truncated or damaged"),
        ((str(GOLDEN), str(GOLDEN), "fp32", HEADS), r"holds no tokenizer: none of tokenizer\.json, vocab\.json, vocab\.txt"),
        ((str(GOLDEN.parent), bert, "fp32", HEADS), r"this folder holds no ImageReward\.pt \(but .*imagereward"),
    ):
        for make in (ImageReward, ImageReward.check):
            with pytest.raises(InputError, match=words):
                make(*arguments)
    ImageReward.check("THUDM/ImageReward", "google-bert/bert-base-uncased", "fp32", None)  # nothing here to look at
    with pytest.raises(InputError, match=r"ImageReward\.pt cannot be downloaded from here"):
        ImageReward("THUDM/ImageReward", bert)


def test_the_published_size() -> None:
    from transformers import BlipTextConfig, BlipVisionConfig

    vision = BlipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224, patch_size=16
    )
    text = BlipTextConfig(vocab_size=30524, encoder_hidden_size=1024, num_attention_heads=12, is_decoder=True)
    towers = unfilled(lambda: Towers(vision, text))
    mlp = sum(a * b + b for a, b in ((768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)))
    assert sum(p.numel() for p in towers.parameters()) + mlp == 446_206_689
