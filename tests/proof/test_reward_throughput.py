"""Images a second of rewards on reduced random checkpoints, in batches and in the published scorers' way: one image a call.

That way encodes a prompt again with each of its images. Writes ``bench/results/cpu/reward-throughput.json``; no time is judged.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import small_blip
import small_qwen
import torch
from pictures import noise
from small_clip import PREPROCESSING, open_clip_shapes, write_letters
from torch import Tensor

from adagrpo.rewards import Reward, build_reward
from adagrpo.rewards.aesthetic import FILE
from adagrpo.rewards.open_clip import Architecture, load_open_clip
from adagrpo.run.machine import describe_machine

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "cpu" / "reward-throughput.json"
PROMPTS, GROUP, ROUNDS = ["ab cd ef gh " * 5, "x yz, ab cd " * 8], 12, 6
ROWS = (1, 4, 24)  # images a call


def reduced_clip(folder: Path) -> Path:
    """ViT-H/14 of a quarter of its width and an eighth of its layers, 224 pixels and 77 tokens as published; random."""
    shapes = open_clip_shapes(vision=(320, 4), text=(256, 3), embedding=256, vocabulary=512)
    torch.manual_seed(5)
    state = {name: torch.ones(shape) if "ln_" in name else torch.randn(shape) * 0.05 for name, shape in shapes.items()}
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    return write_letters(folder)


def hpsv2(folder: Path) -> Reward:
    place = str(reduced_clip(folder))
    return build_reward("hpsv2", {"path": place, "tokenizer": place, "architecture": {"vision_heads": 4, "text_heads": 4}})


def clip(folder: Path) -> Reward:
    file = reduced_clip(folder) / "HPS_v2.1_compressed.pt"
    heads = {"vision_heads": 4, "text_heads": 4}
    return build_reward("clip", {"path": str(file), "processor": str(folder), "variant": "mixgrpo", "architecture": heads})


def clip_folder(folder: Path) -> str:
    """The same as a folder of transformers'."""
    file = reduced_clip(folder) / "HPS_v2.1_compressed.pt"
    load_open_clip(file, Architecture(4, 4), "here", torch.float32).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING | {"size": 224, "crop_size": 224}))
    return str(folder)


def pickscore(folder: Path) -> Reward:
    place = clip_folder(folder)
    return build_reward("pickscore", {"path": place, "processor": place})


def aesthetic(folder: Path) -> Reward:
    widths = {0: (256, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    state = {f"layers.{i}.weight": torch.randn(out, into) / into for i, (into, out) in widths.items()}
    torch.save(state | {f"layers.{i}.bias": torch.randn(out) for i, (_, out) in widths.items()}, folder / FILE)
    return build_reward("aesthetic", {"path": str(folder), "tower": clip_folder(folder)})


def hpsv3(folder: Path) -> Reward:
    """Qwen2-VL 7B of a fourteenth of its width, four layers, as many tokens as published, about: 256 and 600; random."""
    small_qwen.lay_out(folder)
    sizes = {"hidden_size": 256, "intermediate_size": 1344, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}
    small_qwen.random_weights(folder, sizes, {"depth": 4, "embed_dim": 160, "num_heads": 2, "hidden_size": 256})
    texts = f"INSTRUCTION = '{'rate ' * 600}{{text_prompt}}'\nprompt_with_special_token = '<|Reward|>'\n"
    (folder / "long.py").write_text(texts)
    return build_reward("hpsv3", {"path": str(folder), "base": str(folder), "texts": str(folder / "long.py")})


def imagereward(folder: Path) -> Reward:
    """BLIP large of a quarter of its width, two layers, 224 pixels and 35 tokens as published; random."""
    small_blip.random_weights(folder, {40: 256, 120: 768, 160: 1024, 5: 197, 48: 192, 96: 768})
    return build_reward("imagereward", {"path": str(folder), "tokenizer": str(small_blip.tokenizer(folder))})


REWARDS: dict[str, Callable[[Path], Reward]] = {
    made.__name__: made for made in (hpsv2, clip, pickscore, aesthetic, hpsv3, imagereward)
}


@pytest.mark.proof
@pytest.mark.parametrize("name", REWARDS)
def test_batches_against_one_image_a_call(name: str, tmp_path: Path) -> None:
    reward, images = REWARDS[name](tmp_path), noise(512, 512, count=GROUP * len(PROMPTS))
    prompts = [prompt for prompt in PROMPTS for _ in range(GROUP)]

    def scored(rows: int) -> tuple[float, Tensor]:
        """Seconds and scores; one image a call encodes its prompt, more of them find it encoded."""
        forget(reward)
        started, scores = time.perf_counter(), []
        for first in range(0, len(images), rows):
            scores.append(reward(images[first : first + rows], prompts[first : first + rows]))
            if rows == 1:
                forget(reward)
        return time.perf_counter() - started, torch.cat(scores)

    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    expected = scored(1)[1]
    for number in range(ROUNDS):
        for rows in ROWS if number % 2 else reversed(ROWS):
            took, scores = scored(rows)
            seconds[rows].append(took)
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    record(name, seconds, len(images))


def forget(reward: Reward) -> None:
    """Prompts that were encoded."""
    if (cache := getattr(reward, "_cache", None)) is not None:
        cache.clear()


def record(name: str, seconds: dict[int, list[float]], count: int) -> None:
    """Medians over rounds, those of ratios within each round: what else the machine did falls on both ways alike."""
    whole = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {"case": "rewards on reduced random checkpoints"}
    ratios = {rows: [a / b for a, b in zip(seconds[1], seconds[rows], strict=True)] for rows in ROWS[1:]}
    faster = {rows: round(median(of_rounds), 2) for rows, of_rounds in ratios.items()}
    rates = {rows: round(count / median(times), 2) for rows, times in seconds.items()}
    whole[name] = {"images": count, "pixels": 512, "images_per_second_by_rows": rates, "times_faster_by_rows": faster}
    whole[name]["load_average"] = round(os.getloadavg()[0], 1)
    whole["machine"] = describe_machine(torch.device("cpu"))
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
