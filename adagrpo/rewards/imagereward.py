"""ImageReward: human preference learnt on BLIP (arXiv 2304.05977), from the published file through transformers' BLIP."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.registry import Component
from .base import matched
from .heads import LinearHead, read_sides
from .pixels import Preprocess
from .weights import (
    check_state,
    find_file,
    known_file,
    load_state,
    load_tokenizer,
    read_dtype,
    read_state,
    refuse_form,
    unfilled,
)

FILE = "ImageReward.pt"
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the published model's raw scores: it normalises them by these
_TOKENS = 35  # a prompt is cut or padded to as many
_ADDED = ["[DEC]", "[ENC]"]  # after the tokenizer's own: rows of the word embeddings, used by other tasks of BLIP
_HEADS = {"vision_heads": "vision", "text_heads": "text"}
_HEAD_WIDTH = 64  # of both published towers
_TOWERS = Component("BLIP", "transformers", "BlipModel", r"^(blip\.(vision|text)_proj|mlp)\.|position_ids$")
_HEAD = Component("MLP", "torch", "Linear", r"^(?!mlp\.)")
_RENAMED = (
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.", r"vision.encoder.layers.\1."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^(vision\..+)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^(vision\..+)\.attn\.qkv\.", r"\1.self_attn.qkv."),
    (r"^(vision\..+)\.attn\.proj\.", r"\1.self_attn.projection."),
)


class ImageReward:
    """Human preference for an image given its prompt, [N], mean 0 and deviation 1 over its authors' images.

    The published formula: an MLP on the text encoder's first token, which attends to the image; normalised by the mean and
    deviation published with it. Images are prepared as by the model's own code with Pillow and torchvision.

    Args:
        path: ``ImageReward.pt``, a folder that holds it, or its Hub id (downloaded unless ``HF_HUB_OFFLINE`` is set).
        tokenizer: folder or Hub id of BERT's tokenizer.
        dtype: of both towers, ``fp32`` or ``bf16``; the MLP is fp32 either way.
        architecture: ``vision_heads`` and ``text_heads``, which no file tells; 64 channels each as published, if left out.

    Raises:
        InputError: files that are missing, damaged, or not an ImageReward model's.
    """

    rehearsable = True

    def __init__(
        self,
        path: str = "THUDM/ImageReward",
        tokenizer: str = "google-bert/bert-base-uncased",
        dtype: str = "fp32",
        architecture: Mapping[str, int] | None = None,
    ) -> None:
        where = f"rewards: {path}"
        wanted = read_dtype(dtype, where)
        file = find_file(path, FILE, where)
        state, named = read_state(file, where), f"rewards: {file}"
        towers, head = _modules(state, architecture, named)
        self.tokenizer = _load_tokenizer(tokenizer, towers, where)
        self.towers = load_state(towers, _renamed(state), _TOWERS, named, "ImageReward", wanted)
        self.head = load_state(head, state, _HEAD, named, "ImageReward", torch.float32)
        self.preprocess = Preprocess(towers.side, (towers.side, towers.side), rounding="even")

    @staticmethod
    def check(path: str, tokenizer: str, dtype: str, architecture: Mapping[str, int] | None) -> None:
        """Raise what the constructor can find without reading weights; of a Hub id, what was downloaded already."""
        where = f"rewards: {path}"
        read_dtype(dtype, where)
        refuse_form(tokenizer, f"rewards: {tokenizer}")
        if (file := known_file(path, FILE, where)) is None:
            return
        state, named = read_state(file, where, "meta"), f"rewards: {file}"
        towers, head = _modules(state, architecture, named)
        check_state(towers, _renamed(state), _TOWERS, named, "ImageReward")
        check_state(head, state, _HEAD, named, "ImageReward")
        if Path(tokenizer).is_dir():
            _load_tokenizer(tokenizer, towers, where)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] and N prompts -> scores [N] float32, NaN where not all pixels are finite."""
        rows = matched(images, prompts)
        if not len(rows):
            return images.new_zeros(0, dtype=torch.float32)
        for module in (self.towers, self.head):
            if next(module.parameters()).device != images.device:
                module.to(images.device)
        tokens = self.tokenizer(
            list(rows.texts), padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
        )
        ids, mask = (
            tokens[name].to(images.device, non_blocking=True).index_select(0, rows.text_index)
            for name in ("input_ids", "attention_mask")
        )
        scores = self.score(self.preprocess(images), ids, mask)
        return torch.where(images.isfinite().flatten(1).all(1), scores, torch.nan)

    @torch.no_grad()
    def score(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Normalised pixels [N, 3, S, S], token ids and their mask [N, L] -> scores [N] float32."""
        return (self.head(self.towers(pixels, ids, mask).float())[:, 0] - _MEAN) / _STD


class Towers(nn.Module):
    """Both encoders: the text's attends to the image.

    Attributes:
        side: pixels of a side of its images.
    """

    def __init__(self, vision: Any, text: Any) -> None:
        super().__init__()
        from transformers import BlipTextModel, BlipVisionModel

        self.side: int = vision.image_size
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """What the first token has become, [N, D], see ``ImageReward.score``."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        # As what is added to the attention's scores: of a plain mask transformers asks whether it masks anything, and waits.
        added = (1 - mask[:, None, None].to(seen.dtype)) * torch.finfo(seen.dtype).min
        return self.text(input_ids=ids, attention_mask=added, encoder_hidden_states=seen).last_hidden_state[:, 0]


def _modules(state: Mapping[str, Tensor], architecture: Mapping[str, int] | None, where: str) -> tuple[Towers, nn.Module]:
    """Both encoders and the MLP on the meta device, as large as the tensors of a file.

    Raises:
        InputError: tensors that tell the sizes are missing, or heads that do not divide a width.
    """
    from transformers import BlipTextConfig, BlipVisionConfig

    def size(name: str, axis: int) -> int:
        tensor = state.get(name)
        if tensor is None or not -tensor.ndim <= axis < tensor.ndim:
            raise InputError(f"{where}: holds no {name} of an ImageReward model; name its {FILE}")
        return tensor.shape[axis]

    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    width, words = size(f"{vision}pos_embed", 2), f"{text}embeddings.word_embeddings.weight"
    heads = _heads({"vision": width, "text": size(words, 1)}, architecture or {}, where)
    patch = size(f"{vision}patch_embed.proj.weight", 3)
    of_vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=size(f"{vision}blocks.0.mlp.fc1.weight", 0),
        num_hidden_layers=_count(state, rf"{vision}blocks\.(\d+)\."),
        num_attention_heads=heads["vision"],
        image_size=round((size(f"{vision}pos_embed", 1) - 1) ** 0.5) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    of_text = BlipTextConfig(
        vocab_size=size(words, 0),
        hidden_size=size(words, 1),
        encoder_hidden_size=width,
        intermediate_size=size(f"{text}encoder.layer.0.intermediate.dense.weight", 0),
        num_hidden_layers=_count(state, rf"{text}encoder\.layer\.(\d+)\."),
        num_attention_heads=heads["text"],
        max_position_embeddings=size(f"{text}embeddings.position_embeddings.weight", 0),
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # without it there is no attention to the image; the call itself is not a decoder's
        bos_token_id=0,
        eos_token_id=0,
        sep_token_id=0,
        pad_token_id=0,
    )
    sides = read_sides(state, "mlp.", where)
    return unfilled(lambda: Towers(of_vision, of_text)), unfilled(lambda: nn.Sequential(OrderedDict(mlp=LinearHead(sides))))


def _heads(widths: Mapping[str, int], architecture: Mapping[str, int], where: str) -> dict[str, int]:
    """Attention heads of both towers."""
    if strange := sorted(architecture.keys() - _HEADS.keys()):
        raise InputError(f"{where}: kwargs.architecture.{strange[0]}: not known; it has {', '.join(_HEADS)}")
    found = {}
    for key, tower in _HEADS.items():
        heads = architecture.get(key, widths[tower] // _HEAD_WIDTH)
        if not isinstance(heads, int) or heads < 1 or widths[tower] % heads:
            wide = f"heads do not share {widths[tower]} channels evenly; set kwargs.architecture = {{{key} = …}}"
            raise InputError(f"{where}: {key} = {heads}: so many {wide}")
        found[tower] = heads
    return found


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many blocks the names of a file number."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names of ``Towers``."""
    found = {}
    for name, tensor in state.items():
        for pattern, new in _RENAMED:
            name = re.sub(pattern, new, name)
        found[name] = tensor
    return found


def _load_tokenizer(source: str, towers: Towers, where: str) -> Any:
    """BERT's tokenizer with the tokens that BLIP adds, as many as the text encoder has rows for."""
    tokenizer = load_tokenizer(source, where)
    tokenizer.add_tokens(_ADDED, special_tokens=True)
    if len(tokenizer) != towers.text.config.vocab_size:
        raise InputError(
            f"{where}: is made for {towers.text.config.vocab_size} tokens, but {source} has {len(tokenizer)} with "
            f"{' and '.join(_ADDED)}; name the tokenizer of bert-base-uncased"
        )
    return tokenizer
