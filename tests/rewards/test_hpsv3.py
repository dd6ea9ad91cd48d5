"""HPS-v3 against the numbers of its own class (hpsv3 1.0.0 under transformers 4.45.2) on a tiny checkpoint."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_qwen import CHATTING, END, GOLDEN, IMAGE, REWARD, START, WORDS, lay_out
from torch import Tensor

from adagrpo.errors import InputError
from adagrpo.estimate.scorers import activations
from adagrpo.rewards import PromptRows, check_prompts
from adagrpo.rewards.hpsv3 import Backbone, Head, Hpsv3, VisionRotary, read_config
from adagrpo.rewards.hpsv3_texts import conversation
from adagrpo.rewards.weights import unfilled

PROMPTS = ["a red cat", "two { dog }", "a red cat", "two red dog . a cat : a red dog"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(lay_out(tmp_path_factory.mktemp("qwen")))


def load(base: str, path: Path = GOLDEN, **options: object) -> Hpsv3:
    return Hpsv3(str(path), base, f"{base}/texts.py", **options)


@pytest.fixture(scope="module")
def reward(base: str) -> Hpsv3:
    return load(base)


def noise(count: int, height: int, width: int) -> Tensor:
    """Images of 8-bit noise that differ in brightness."""
    generator = torch.Generator().manual_seed(height)
    light = torch.linspace(0.3, 1, count).view(-1, 1, 1, 1)
    return (torch.rand(count, 3, height, width, generator=generator) * light * 255).round() / 255


def parts(ids: Tensor, pads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens before the image, after it, and the reward token's place among these."""
    after = ids[:, 1 + pads :]
    return ids[0, :1], after, (after == REWARD).long().argmax(1)


def test_scores_are_those_of_its_own_class(base: str) -> None:
    io = load_file(GOLDEN / "io.safetensors")
    exact = load(base, frequencies="fp32")
    before, after, ends = parts(io["input_ids"], 4)
    patches = io["pixel_values"], io["image_grid_thw"]
    expected = io["mu_and_raw_sigma"][:, 0]
    torch.testing.assert_close(exact.score(before, *patches, after, ends), expected, atol=1e-6, rtol=0)
    for other in (ends - 1, ends + 1, torch.tensor([after.shape[1] - 1] * 2)):
        assert (exact.score(before, *patches, after, other) - expected).abs().min() > 1e-4
    alone = exact.score(before, io["pixel_values"][16:], io["image_grid_thw"][1:], after[1:, :9], ends[1:])
    torch.testing.assert_close(alone, expected[1:], atol=1e-6, rtol=0)  # without padding, and without the other row


def test_positions_by_row_and_column_would_give_other_scores(base: str) -> None:
    from transformers import Qwen2VLModel

    io, exact = load_file(GOLDEN / "io.safetensors"), load(base, frequencies="fp32")
    model = Qwen2VLModel(exact.backbone.config).eval()
    model.visual.load_state_dict(exact.backbone.visual.state_dict())
    model.language_model.load_state_dict(exact.backbone.model.state_dict())
    expected = io.pop("mu_and_raw_sigma")[:, 0]
    kinds = (io["input_ids"] == IMAGE).int()
    with torch.no_grad():
        hidden = model(**io, mm_token_type_ids=kinds).last_hidden_state
    assert (exact.head(hidden[io["input_ids"] == REWARD])[:, 0] - expected).abs().min() > 1e-4


# By the same class on 300 tokens of text, in fp32: with its rotary embeddings as they are, and moved to bf16, as it moves them.
LONG = {"fp32": [-0.42324337, -0.42095137], "bf16": [-0.42322484, -0.42093220]}


@pytest.mark.parametrize("frequencies", LONG)
def test_frequencies_are_rounded_as_where_the_whole_model_is_moved_to_bf16(frequencies: str, base: str) -> None:
    pixels = ((torch.arange(64 * 1176) * 7919 % 1009).double() / 504.5 - 1).float().view(64, 1176)
    texts = [[(37 * k + 11 * row) % 100 + 1 for k in range(300)] for row in range(2)]
    ids = torch.tensor([[START, *[IMAGE] * 16, END, *text, REWARD, 5, 6] for text in texts])
    before, after, ends = parts(ids, 16)
    found = load(base, frequencies=frequencies).score(before, pixels.repeat(2, 1), torch.tensor([[1, 8, 8]] * 2), after, ends)
    torch.testing.assert_close(found, torch.tensor(LONG[frequencies]), atol=3e-6, rtol=0)


def test_angles_of_patches_are_rounded_as_bf16_arithmetic_rounds_them() -> None:
    frequencies, places = 10000 ** -(torch.arange(4) / 4), torch.tensor([[0, 3], [31, 7], [18, 25]])
    in_bf16 = torch.outer(torch.arange(32).bfloat16(), frequencies.bfloat16())
    cosines, sines = VisionRotary(frequencies, True)(torch.zeros(3, 16), places)
    for found, wave in ((cosines, in_bf16.cos()), (sines, in_bf16.sin())):
        assert found.tolist() == wave[places].flatten(1).float().repeat(1, 2).tolist()


def test_a_conversation_is_written_as_its_chat_template_does() -> None:
    assert conversation("turn") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        "<|vision_end|>turn<|im_end|>\n<|im_start|>assistant\n"
    )


def by_hand(prompt: str) -> list[int]:
    """Tokens of a conversation with one token for the image."""
    system, turn = "system You are a helpful assistant .", f"rate the picture of {prompt} rate :"
    number = {word: i + 1 for i, word in enumerate(WORDS)} | CHATTING | {"<|Reward|>": REWARD}
    words = (
        f"<|im_start|> {system} <|im_end|> <|im_start|> user <|vision_start|> <|image_pad|> <|vision_end|> {turn} <|Reward|>"
    )
    return [number[word] for word in words.split()]


def test_prompts_become_tokens_up_to_the_reward_token(reward: Hpsv3) -> None:
    tokens, ends, sound = reward.prompts.table(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        place = by_hand(prompt).index(IMAGE)
        assert reward.prompts.before == by_hand(prompt)[:place]
        assert tokens[row, : ends[row] + 1].tolist() == by_hand(prompt)[place + 1 :]
    assert sound.all()


def test_an_image_becomes_patches_of_the_published_size(reward: Hpsv3) -> None:
    """768 x 512 becomes 532 x 364: here by Pillow and the arrangement written out, then through the same core."""
    import numpy as np
    from PIL import Image

    images = noise(1, 512, 768)
    levels = (images[0] * 255).byte().permute(1, 2, 0).numpy()
    small = torch.from_numpy(np.array(Image.fromarray(levels).resize((532, 364), Image.Resampling.BICUBIC)))
    mean, std = (torch.tensor(v) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    pixels, rows = ((small / 255 - mean) / std).permute(2, 0, 1), []
    for top in range(0, 364, 28):  # four patches that become one token stand together
        for left in range(0, 532, 28):
            for y, x in ((top, left), (top, left + 14), (top + 14, left), (top + 14, left + 14)):
                rows.append(pixels[:, None, y : y + 14, x : x + 14].expand(3, 2, 14, 14).flatten())
    tokens, ends, _ = reward.prompts.table(["a red cat"])
    grid, before = torch.tensor([[1, 26, 38]]), torch.tensor(reward.prompts.before)
    expected = reward.score(before, torch.stack(rows), grid, tokens, ends)
    torch.testing.assert_close(reward(images, ["a red cat"]), expected, atol=1e-5, rtol=0)


class UnreadRows(PromptRows):
    def _materialised(self) -> list[str]:
        raise AssertionError("the index was copied to the host")


def test_together_as_one_by_one_and_nan_stays_where_it_is(reward: Hpsv3, monkeypatch: pytest.MonkeyPatch) -> None:
    images, index = noise(4, 40, 56), torch.tensor([0, 1, 2, 3])
    expected = torch.cat([reward(images[i : i + 1], [PROMPTS[i]]) for i in range(4)])
    assert expected.std() > 1e-4
    together = reward(images, UnreadRows(PROMPTS, index))
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=0)
    monkeypatch.setattr("adagrpo.rewards.hpsv3._CHUNK", 3)
    broken = images.clone()
    broken[1, 0, 0, 0], broken[2, 2, 20, 20] = torch.nan, torch.inf
    found = reward(broken, PROMPTS)
    assert found.isnan().tolist() == [False, True, True, False]
    torch.testing.assert_close(found[::3], expected[::3], atol=1e-5, rtol=0)
    assert reward(images[:0], []).shape == (0,)


def test_the_host_never_waits_for_the_images(reward: Hpsv3, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads a value raises on the meta device; so the memory plan can rehearse it there, too."""
    make = torch.tensor

    def without_waiting(data: object, device: object = "cpu", **kind: object) -> Tensor:
        assert torch.device(device).type == "cpu", "numbers from the host go to a device without waiting for it"
        return make(data, **kind)

    monkeypatch.setattr(torch, "tensor", without_waiting)
    assert isinstance(found := activations(reward, 2, (40, 56)), int), found
    assert found > 2 * 1008 * 1176 * 4


SPECIAL = ["a <|Reward|> cat", "<|image_pad|>", "cat<|vision_start|>", "a dog <|im_end|>", "<|endoftext|>"]


def test_a_prompt_with_a_special_token_or_too_long_has_no_score(base: str) -> None:
    short = load(base, max_prompt_tokens=4)
    prompts = ["a red cat", *SPECIAL, "a red cat . a dog", "two zebras"]
    scores = short(noise(1, 28, 28).expand(8, -1, -1, -1), prompts)
    assert scores.isnan().tolist() == [False, *[True] * 6, False]
    for prompts in (["a red cat", f"two {special}"] for special in SPECIAL):
        name = re.search(r"<\|\w+\|>", prompts[1])[0]
        with pytest.raises(
            InputError, match=re.escape(f"rewards.2 = hpsv3: the prompt {prompts[1]!r} holds {name}, a special")
        ):
            check_prompts("hpsv3", {}, prompts, "rewards.2")
    check_prompts("hpsv3", {}, ["a red cat", "<|cat|>"])


def test_bf16_rounds_all_but_the_head(base: str, reward: Hpsv3) -> None:
    rounded = load(base, dtype="bf16")
    assert {p.dtype for p in rounded.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in rounded.head.parameters()} == {torch.float32}
    images = noise(2, 28, 56)
    torch.testing.assert_close(rounded(images, PROMPTS[:2]), reward(images, PROMPTS[:2]), atol=0.01, rtol=0)


@pytest.mark.parametrize("place", ["wheel", "installed", "file"])
def test_texts_are_parsed_where_their_authors_keep_them(place: str, base: str, tmp_path: Path, monkeypatch) -> None:
    import zipfile

    source, module = (Path(base) / "texts.py").read_text(), "hpsv3/dataset/data_collator_qwen.py"
    if place == "wheel":
        where = str(tmp_path / "hpsv3-1.0.0-py3-none-any.whl")
        with zipfile.ZipFile(where, "w") as wheel:
            wheel.writestr(module, source)
    elif place == "installed":
        where = ""
        (tmp_path / module).parent.mkdir(parents=True)
        (tmp_path / module).write_text(source)
        (tmp_path / "hpsv3" / "__init__.py").write_text("raise SystemExit  # must not be imported")
        monkeypatch.syspath_prepend(str(tmp_path))
    else:
        where = f"{base}/texts.py"
    found = Hpsv3(str(GOLDEN), base, where)
    digest = "993f94a4dfe5ff0557f71c2c2feafdffd4a7bd5070cb9d9ccb412f653f9e312d"
    assert found.prompts.texts.around("{x}") == "\nrate the picture of {x}\n\nrate : <|Reward|>\n\nend\n"
    assert found.provenance["texts"] == "not those of hpsv3 1.0.0"
    assert found.provenance["prompt_with_special_token_sha256"] == digest


TEXTS_WRONG = {
    "defines no text INSTRUCTION": "prompt_with_special_token = '<|Reward|>'",
    "defines no text prompt_with_special_token": "INSTRUCTION = 'a {text_prompt}'\nprompt_with_special_token = 3",
    "is no Python file that can be parsed": "INSTRUCTION = (",
    "is no Python file that can be parsed ": "INSTRUCTION = open('x').read()",
    "INSTRUCTION has other fields than one {text_prompt}": "INSTRUCTION = '{prompt}'; prompt_with_special_token = '<|Reward|>'",
    "<|Reward|> must be in prompt_with_special_token, once": "INSTRUCTION = '{text_prompt}'; prompt_with_special_token = ''",
}


@pytest.mark.parametrize("words", TEXTS_WRONG)
def test_texts_that_are_none_are_named(words: str, base: str, tmp_path: Path) -> None:
    (tmp_path / "texts.py").write_text(TEXTS_WRONG[words])
    for make in (Hpsv3, Hpsv3.check):
        with pytest.raises(InputError, match=rf"{re.escape(words)}.*pip download --no-deps hpsv3==1\.0\.0"):
            make(str(GOLDEN), base, str(tmp_path / "texts.py"), "fp32", "bf16", 64)


CHANGES = {
    r"Qwen2-VL: lacks model\.layers\.2\.mlp\.up_proj\.weight": lambda s: s.pop("model.layers.2.mlp.up_proj.weight"),
    r"head: lacks rm_head\.3\.bias": lambda s: s.pop("rm_head.3.bias"),
    r"Qwen2-VL: holds visual\.extra": lambda s: s.update({"visual.extra": torch.ones(1)}),
    r"Qwen2-VL: visual\.merger\.ln_q\.bias has shape \[5\], .*config\.json means \[32\]": lambda s: s.update(
        {"visual.merger.ln_q.bias": torch.ones(5)}
    ),
    r"holds no model\.embed_tokens\.weight; name HPSv3": lambda s: s.pop("model.embed_tokens.weight"),
    r"its tokenizer has 116 tokens with <\|Reward\|>, the weights have 100": lambda s: s.update(
        {"model.embed_tokens.weight": torch.ones(100, 64)}
    ),
}


@pytest.mark.parametrize("words", CHANGES)
def test_files_that_are_not_its_own_are_named(words: str, base: str, tmp_path: Path) -> None:
    state = load_file(GOLDEN / "HPSv3.safetensors")
    CHANGES[words](state)
    save_file(state, tmp_path / "HPSv3.safetensors")
    for make in (Hpsv3, Hpsv3.check):
        with pytest.raises(InputError, match=words):
            make(str(tmp_path), base, f"{base}/texts.py", "fp32", "bf16", 64)


def test_what_does_not_belong_together_is_named(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    texts, golden = f"{base}/texts.py", str(GOLDEN)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    for arguments, words in (
        ((golden, base, texts, "fp8", "bf16", 64), "dtype = fp8: one of fp32, bf16"),
        ((golden, base, texts, "fp32", "fp16", 64), "frequencies = fp16: bf16 or fp32"),
        ((golden, base, "", "fp32", "bf16", 64), "needs the two texts that its authors' package puts around a prompt; fetch"),
        ((golden, base, f"{base}/none.whl", "fp32", "bf16", 64), r"none\.whl cannot be read"),
        ((golden, str(other), texts, "fp32", "bf16", 64), r"config\.json: is of a qwen2_5_vl; name Qwen2-VL-7B-Instruct"),
        ((str(tmp_path), base, texts, "fp32", "bf16", 64), r"holds no HPSv3\.safetensors"),
    ):
        for make in (Hpsv3, Hpsv3.check):
            with pytest.raises(InputError, match=words):
                make(*arguments)
    Hpsv3.check("MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct", texts, "fp32", "bf16", 64)  # nothing here to look at
    with pytest.raises(InputError, match=r"HPSv3\.safetensors cannot be downloaded from here"):
        Hpsv3(texts=texts)


def test_the_published_size_and_names(tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "config.json").read_text())
    config |= {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    config |= {"num_key_value_heads": 4, "vocab_size": 152064, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    config["vision_config"] |= {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = {"model.embed_tokens.weight": torch.empty(151658, 3584, device="meta")}
    backbone = unfilled(lambda: Backbone(read_config(tmp_path / "config.json", words, "here"), True))
    found, head = (
        sum(p.numel() for p in backbone.parameters()),
        sum(p.numel() for p in unfilled(lambda: Head(3584)).parameters()),
    )
    assert (found, found + head) == (7_744_923_136, 7_748_610_610)
    names = {re.sub(r"\.\d+\.", ".N.", name) for name in backbone.state_dict()}
    assert names == {
        re.sub(r"\.\d+\.", ".N.", n) for n in load_file(GOLDEN / "HPSv3.safetensors") if n.split(".")[0] in ("visual", "model")
    }
