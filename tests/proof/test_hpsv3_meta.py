"""HPS-v3 at full size on the meta device, where every host sync raises: layout, arithmetic, activations.

Writes ``bench/results/meta/hpsv3.json``.
"""

import json
import struct
from pathlib import Path

import pytest
import torch
from small_qwen import GOLDEN
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adagrpo.errors import InputError
from adagrpo.estimate.counting import OpCounter, PeakMemory
from adagrpo.estimate.rehearsal import fused_attention
from adagrpo.rewards.hpsv3 import FILE, Backbone, Head, Hpsv3, read_config
from adagrpo.rewards.pixels import Normalise, grey_levels, patches, pil_resize, smart_size
from adagrpo.rewards.weights import read_state, unfilled

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "bench" / "results" / "meta" / "hpsv3.json"
WORDS, TEXT, BEFORE = 151658, 700, 15
SIZES = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
SIZES |= {"num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768}
VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584}


def described(folder: Path) -> Path:
    """``config.json`` of Qwen2-VL 7B in the layout of before transformers 5."""
    config = json.loads((GOLDEN / "config.json").read_text()) | SIZES
    config |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    config["vision_config"] |= VISION
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def sparse(file: Path, parts: dict[str, nn.Module]) -> None:
    """A file of bf16 weights as large as the published one, whose values, all zero, take no room."""
    shapes = {name: tuple(t.shape) for part in parts.values() for name, t in part.state_dict().items()}
    shapes["lm_head.weight"] = (WORDS, 3584)
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    written = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(written)) + written)
        opened.truncate(8 + len(written) + end)


def tflop(text: int) -> float:
    """Of one image, by hand (multiply-add = 2 FLOP); attention as torch counts it, without leaving out what is masked."""
    d, inner, patch, length = 3584, 18944, 1024, BEFORE + 256 + text
    language = 28 * (length * (2 * d * d + 2 * d * 512 + 3 * d * inner) + 2 * length**2 * d)
    blocks = 32 * (patch * 12 * 1280**2 + 2 * patch**2 * 1280)
    return 2 * (language + blocks + patch * 1176 * 1280 + 256 * (5120**2 + 5120 * d)) / 1e12


@pytest.mark.proof
def test_full_size(tmp_path: Path) -> None:
    config = described(tmp_path)
    words = {"model.embed_tokens.weight": torch.empty(WORDS, 3584, device="meta")}
    parts = {
        "backbone": unfilled(lambda: Backbone(read_config(config, words, "here"), True)),
        "head": unfilled(lambda: Head(3584)),
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert (counts["backbone"], sum(counts.values())) == (7_744_923_136, 7_748_610_610)
    sparse(tmp_path / FILE, parts)
    (tmp_path / "texts.py").write_text("INSTRUCTION = '{text_prompt}'\nprompt_with_special_token = '<|Reward|>'\n")
    with pytest.raises(InputError, match="holds no tokenizer"):  # the last that is looked at
        Hpsv3.check(str(tmp_path), str(tmp_path), str(tmp_path / "texts.py"), "bf16", "bf16", 1024)
    assert len(read_state(tmp_path / FILE, "here", "meta")) == sum(len(part.state_dict()) for part in parts.values()) + 1

    backbone, record = parts["backbone"].to(torch.bfloat16).to("meta").requires_grad_(False).eval(), {}
    before = torch.empty(BEFORE, dtype=torch.int64, device="meta")
    for count in (1, 8):
        images = torch.empty(count, 3, 1024, 1024, device="meta", dtype=torch.bfloat16)
        after = torch.empty(count, TEXT, dtype=torch.int64, device="meta")
        with torch.no_grad(), fused_attention(), PeakMemory("meta") as memory, OpCounter() as ops:
            size = smart_size((1024, 1024), 28, 256 * 28 * 28, 256 * 28 * 28)
            prepared = patches(Normalise()(pil_resize(grey_levels(images), size) / 255))
            resizing = memory.peak
            with FlopCounterMode(display=False) as counter:
                hidden = backbone(before, *prepared, after, after[:, 0])
        assert hidden.shape == (count, 3584)
        assert counter.get_total_flops() / count / 1e12 == pytest.approx(tflop(TEXT), rel=0.01)
        record[f"{count} images"] = {
            "peak_activations_mib": round(memory.peak / 2**20),
            "of_which_preprocessing_mib": round(resizing / 2**20),
            "copies_to_the_device": ops.transfers.total(),
        }
    whole = {
        "case": f"HPS-v3, bf16, images of 1024 x 1024, {TEXT} tokens after the image, on the meta device",
        "torch": torch.__version__,
        "parameters": counts,
        "tflop_per_image": round(tflop(TEXT), 2),
        "reads_by_the_host": "none: each would raise on the meta device",
        **record,
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
