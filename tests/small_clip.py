"""Small CLIPs, random weights: a folder as OpenAI's, a tokenizer for the golden, open_clip's layout by hand in fp64."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE, CONTEXT = 32, 16
SPECIAL = {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
ENDS = ["<|startoftext|>", "<|endoftext|>"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
TOKENS = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), "ca", "cat</w>", "do", "dog</w>", *ENDS]
MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]
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


def write_tokenizer(folder: Path, tokens: list[str], merges: list[str], context: int) -> Path:
    """The files of a slow CLIP tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_max_length": context, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True, **SPECIAL}
    files = {"tokenizer_config": settings, "special_tokens_map": SPECIAL, "vocab": {t: i for i, t in enumerate(tokens)}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


def write_clip(folder: Path) -> Path:
    """A folder with the files of openai/clip-vit-*: slow tokenizer, integer sizes and legacy eos id included."""
    from transformers import CLIPConfig, CLIPModel

    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(TOKENS), "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 2}
    vision = {"image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=layers | text, vision_config=layers | vision, projection_dim=24))
    for weight in model.parameters():  # at their usual scale all texts look alike to so small a model
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else None
    model.logit_scale.data.fill_(4.6052)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return write_tokenizer(folder, TOKENS, MERGES, CONTEXT)


LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAIRS = [a + b for a in LETTERS for b in LETTERS][: 510 - 2 * len(LETTERS)]


def write_letters(folder: Path, context: int = 77) -> Path:
    """A tokenizer of 512 tokens, the golden's number: letters, letters that end a word, words of two letters, both ends."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *(f"{pair}</w>" for pair in PAIRS), *ENDS]
    return write_tokenizer(folder, tokens, [f"{a} {b}</w>" for a, b in PAIRS], context)


def spelled(ids: list[int]) -> str:
    """The prompt that ``write_letters`` splits into these tokens between its ends."""
    words = [*LETTERS, *(f"{letter} " for letter in LETTERS), *(f"{pair} " for pair in PAIRS)]
    return "".join(words[i] for i in ids).strip()


def open_clip_shapes(
    vision: tuple[int, int], text: tuple[int, int], embedding: int, vocabulary: int, positions: int = 257
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of open_clip's ViT with patches of 14 pixels; ``vision`` and ``text`` are width and layers."""

    def blocks(prefix: str, width: int, count: int) -> dict[str, tuple[int, ...]]:
        inside = {
            "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
            "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
        }  # fmt: skip
        return {f"{prefix}transformer.resblocks.{i}.{name}": shape for i in range(count) for name, shape in inside.items()}

    seen, read = vision[0], text[0]
    shapes = blocks("visual.", *vision) | blocks("", *text)
    shapes |= {f"visual.ln_{name}.{part}": (seen,) for name in ("pre", "post") for part in ("weight", "bias")}
    shapes |= {"visual.class_embedding": (seen,), "visual.positional_embedding": (positions, seen)}
    shapes |= {"visual.proj": (seen, embedding), "visual.conv1.weight": (seen, 3, 14, 14), "logit_scale": ()}
    shapes |= {"ln_final.weight": (read,), "ln_final.bias": (read,), "text_projection": (read, embedding)}
    return shapes | {"token_embedding.weight": (vocabulary, read), "positional_embedding": (77, read)}


def open_clip_features(
    state: Mapping[str, Tensor], pixels: Tensor, ids: Tensor, heads: tuple[int, int], quick: bool = False
) -> tuple[Tensor, Tensor]:
    """Image [N, D] and text features [M, D] in fp64, not normalised, of a state dict in open_clip's layout.

    Args:
        heads: of the vision and of the text tower.
        quick: x * sigmoid(1.702 x) instead of the exact GELU.
    """
    state = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str, joint: str = ".") -> Tensor:
        return x @ state[f"{name}{joint}weight"].T + state[f"{name}{joint}bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x) if quick else x * (1 + torch.erf(x / 2**0.5)) / 2

    def blocks(x: Tensor, prefix: str, count: int, causal: bool) -> Tensor:
        length, width = x.shape[1:]
        hidden = torch.triu(torch.full((length, length), -torch.inf, dtype=torch.float64), 1) if causal else 0
        number = 0
        while f"{prefix}.{number}.ln_1.weight" in state:
            name = f"{prefix}.{number}"
            q, k, v = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.in_proj", "_").chunk(3, -1)
            q, k, v = (t.unflatten(-1, (count, -1)).transpose(1, 2) for t in (q, k, v))
            mixed = (q @ k.mT / (width // count) ** 0.5 + hidden).softmax(-1) @ v
            x = x + linear(mixed.transpose(1, 2).flatten(2), f"{name}.attn.out_proj")
            x = x + linear(gelu(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")), f"{name}.mlp.c_proj")
            number += 1
        return x

    kernel = state["visual.conv1.weight"]
    patches = F.conv2d(pixels.double(), kernel, stride=kernel.shape[-1]).flatten(2).mT
    x = torch.cat([state["visual.class_embedding"].expand(len(pixels), 1, -1), patches], 1)
    x = norm(x + state["visual.positional_embedding"], "visual.ln_pre")
    x = blocks(x, "visual.transformer.resblocks", heads[0], causal=False)
    image = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]
    x = state["token_embedding.weight"][ids] + state["positional_embedding"][: ids.shape[1]]
    x = norm(blocks(x, "transformer.resblocks", heads[1], causal=True), "ln_final")
    return image, x[torch.arange(len(ids)), ids.argmax(1)] @ state["text_projection"]


def cosines(image: Tensor, text: Tensor) -> Tensor:
    """[N] of rows [N, D]."""
    return (image * text).sum(1) / (image.norm(dim=1) * text.norm(dim=1))
