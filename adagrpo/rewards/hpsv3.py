"""HPS-v3: human preference learnt on Qwen2-VL (arXiv 2508.03789), from the published file through transformers' Qwen2-VL.

What the published scorer does, and a plain Qwen2-VL does not: tokens have one position each, counted through text and image
alike; the frequencies of both rotary embeddings are rounded to bf16; one token of the prompt is read by a head of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.loading import first_line, read_json_object
from ..models.registry import Component
from ..text.user_text import cut
from .base import matched
from .hpsv3_texts import REWARD, Texts, conversation, read_texts
from .pixels import Normalise, grey_levels, patches, pil_resize, smart_size
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

FILE = "HPSv3.safetensors"
_PIXELS = 256 * 28 * 28  # what every image is resized to, as nearly as its proportions allow
_CHUNK = 8  # images encoded at once
_EMBEDDINGS = "model.embed_tokens.weight"
_NAMES = "Reward|endoftext|im_(start|end)|(object_ref|box|quad|vision)_(start|end)|(vision|image|video)_pad"
_SPECIAL = re.compile(rf"<\|({_NAMES})\|>")
_BACKBONE = Component("Qwen2-VL", "transformers", "Qwen2VLModel", r"^(lm_head|rm_head)\.")
_HEAD = Component("head", "torch", "Linear", r"^(?!rm_head\.)")


class Hpsv3:
    """Human preference for an image given its prompt, [N], unbounded: 10 or so for good pictures by the published weights.

    The published formula: the mean that the head reads at the prompt's reward token. The model is loaded at once, and moves to
    the device of its images; they are resized as by Pillow. A prompt that holds a special token of the tokenizer, or is too
    long, has no score. No more than 8 images are encoded at once.

    Args:
        path: ``HPSv3.safetensors``, a folder that holds it, or its Hub id (downloaded unless ``HF_HUB_OFFLINE`` is set).
        base: folder or Hub id of the model that it was tuned from: its ``config.json`` and tokenizer, no weights.
        texts: the two published texts around a prompt: the wheel of the package ``hpsv3`` 1.0.0, or a Python file that
            defines them; empty for an installed copy. They are parsed, and no code of them is run.
        dtype: of all but the head, which is fp32: ``fp32`` or ``bf16``.
        frequencies: what rotary frequencies are rounded to: ``bf16`` as the published scorer, in training too, or ``fp32``.
        max_prompt_tokens: of the longest prompt that is scored.

    Attributes:
        provenance: of the texts, for the run folder: their digests, and whether they are the published ones.

    Raises:
        InputError: files that are missing, damaged, or not an HPS-v3 model's.
    """

    rehearsable = True

    def __init__(
        self,
        path: str = "MizzenAI/HPSv3",
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        texts: str = "",
        dtype: str = "fp32",
        frequencies: str = "bf16",
        max_prompt_tokens: int = 1024,
    ) -> None:
        where = f"rewards: {path}"
        wanted, rounded = read_dtype(dtype, where), _rounded(frequencies, where)
        found = read_texts(texts, where)
        file, config = find_file(path, FILE, where), find_file(base, "config.json", f"rewards: {base}")
        named = f"rewards: {file}"
        state = read_state(file, named)
        backbone = unfilled(lambda: Backbone(read_config(config, state, named), rounded))
        self.prompts = Prompts(load_tokenizer(base, where), found, backbone.config, max_prompt_tokens, f"rewards: {base}")
        self.backbone = load_state(backbone, state, _BACKBONE, named, str(config), wanted)
        self.head = load_state(unfilled(lambda: Head(backbone.width)), state, _HEAD, named, "HPS-v3", torch.float32)
        self.normalise = Normalise()
        self.provenance: Mapping[str, str] = found.provenance

    @staticmethod
    def check(path: str, base: str, texts: str, dtype: str, frequencies: str, max_prompt_tokens: int) -> None:
        """Raise what the constructor can find without reading weights; of a Hub id, what was downloaded already."""
        where = f"rewards: {path}"
        read_dtype(dtype, where)
        rounded = _rounded(frequencies, where)
        refuse_form(base, f"rewards: {base}")
        found = read_texts(texts, where)
        file, config = known_file(path, FILE, where), known_file(base, "config.json", f"rewards: {base}")
        if file is None or config is None:
            return
        state, named = read_state(file, f"rewards: {file}", "meta"), f"rewards: {file}"
        backbone = unfilled(lambda: Backbone(read_config(config, state, named), rounded))
        check_state(backbone, state, _BACKBONE, named, str(config))
        check_state(unfilled(lambda: Head(backbone.width)), state, _HEAD, named, "HPS-v3")
        if Path(base).is_dir():
            Prompts(load_tokenizer(base, where), found, backbone.config, max_prompt_tokens, f"rewards: {base}")

    @staticmethod
    def check_prompts(prompts: Iterable[str]) -> None:
        """Refuse prompts that hold a special token of Qwen2-VL, or the reward token.

        Raises:
            InputError: naming the first of them.
        """
        for prompt in prompts:
            if found := _SPECIAL.search(prompt):
                raise InputError(f"the prompt {cut(prompt, 60)!r} holds {found[0]}, a special token of the model; remove it")

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] and N prompts -> scores [N] float32; NaN where not all pixels are finite, and for
        prompts that hold a special token or are too long."""
        rows = matched(images, prompts)
        if not len(rows):
            return images.new_zeros(0, dtype=torch.float32)
        for module in (self.backbone, self.head):
            if next(module.parameters()).device != images.device:
                module.to(images.device)
        read = (torch.tensor(self.prompts.before), *self.prompts.table(rows.texts))
        before, tokens, ends, sound = (t.to(images.device, non_blocking=True) for t in read)
        size, scores = smart_size((images.shape[2], images.shape[3]), 28, _PIXELS, _PIXELS), []
        for part, index in zip(images.split(_CHUNK), rows.text_index.split(_CHUNK), strict=True):
            pixels = self.normalise(pil_resize(grey_levels(part), size) / 255)
            found = self.score(before, *patches(pixels), tokens[index], ends[index])
            scores.append(torch.where(sound[index] & part.isfinite().flatten(1).all(1), found, torch.nan))
        return torch.cat(scores)

    @torch.no_grad()
    def score(self, before: Tensor, pixels: Tensor, grid: Tensor, after: Tensor, ends: Tensor) -> Tensor:
        """Scores [N] float32 of N conversations, see ``Backbone``."""
        return self.head(self.backbone(before, pixels, grid, after, ends).float())[:, 0]


class Backbone(nn.Module):
    """Qwen2-VL without its vocabulary's head, with positions that count through text and image alike.

    Attributes:
        config: its ``Qwen2VLConfig``.
        width: channels of a token.
    """

    def __init__(self, config: Any, rounded: bool) -> None:
        super().__init__()
        from transformers import Qwen2VLModel

        whole = Qwen2VLModel(config)
        self.config, self.width = config, config.text_config.hidden_size
        self.visual, self.model = whole.visual, whole.language_model
        self.visual.rotary_pos_emb = VisionRotary(self.visual.rotary_pos_emb.inv_freq, rounded)
        if rounded:
            self.model.rotary_emb.inv_freq = self.model.rotary_emb.inv_freq.bfloat16().float()

    def forward(self, before: Tensor, pixels: Tensor, grid: Tensor, after: Tensor, ends: Tensor) -> Tensor:
        """What the token at ``ends`` has become.

        No token sees what follows it, so that tokens after ``ends``, such as padding, change nothing.

        Args:
            before: int64 [B], tokens before each image.
            pixels, grid: of N equally large images, as ``pixels.patches`` gives them.
            after: int64 [N, A], tokens after the image.
            ends: int64 [N], the place of the reward token among them.

        Returns:
            [N, width].
        """
        count, embed = len(after), self.model.embed_tokens
        image = self.visual(pixels, grid_thw=grid).pooler_output.view(count, -1, self.width)
        row = torch.cat([embed(before).expand(count, -1, -1), image.to(embed.weight.dtype), embed(after)], 1)
        places = torch.arange(row.shape[1], device=row.device).expand(3, count, -1)
        hidden = self.model(inputs_embeds=row, position_ids=places, use_cache=False).last_hidden_state
        return hidden[torch.arange(count, device=row.device), ends + (row.shape[1] - after.shape[1])]


class VisionRotary(nn.Module):
    """Rotary embedding of patches by row and column, in the place of transformers' own, whose grids may lie on the host.

    Args:
        frequencies: [D / 4].
        rounded: frequencies, angles, cosines and sines are rounded to bf16 one after the other, as in a model moved to it.
    """

    frequencies: Tensor

    def __init__(self, frequencies: Tensor, rounded: bool) -> None:
        super().__init__()
        self.rounded = rounded
        self.register_buffer("frequencies", self._round(frequencies), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, D] float32 of T patches at ``position_ids`` [T, 2]."""
        places = position_ids.to(x.device, non_blocking=True)
        angles = self._round(places[..., None].float() * self.frequencies).flatten(1).repeat(1, 2)
        return self._round(angles.cos()), self._round(angles.sin())

    def _round(self, values: Tensor) -> Tensor:
        return values.bfloat16().float() if self.rounded else values


class Head(nn.Module):
    """What HPS-v3 reads a preference from: [N, width] -> [N, 2], its mean and the logarithm of its deviation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)]
        self.rm_head = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.rm_head(x)


class Prompts:
    """Prompts as tokens of the conversation that HPS-v3 was tuned on, up to the reward token.

    Args:
        tokenizer: of the base model; gets the reward token.
        texts: around a prompt.
        config: of the model that reads them.
        longest: tokens of a prompt, at most.
        where: first words of an error.

    Attributes:
        before: tokens before the image.

    Raises:
        InputError: the tokenizer is not the model's, or the texts hold special tokens of their own.
    """

    def __init__(self, tokenizer: Any, texts: Texts, config: Any, longest: int, where: str) -> None:
        self.tokenizer, self.texts, self.longest = tokenizer, texts, longest
        tokenizer.add_tokens([REWARD], special_tokens=True)
        vocabulary, last = config.text_config.vocab_size, tokenizer.convert_tokens_to_ids(REWARD)
        if len(tokenizer) != vocabulary or last != vocabulary - 1:
            raise InputError(
                f"{where}: its tokenizer has {len(tokenizer)} tokens with {REWARD}, the weights have {vocabulary}; name the "
                "model that they were tuned from"
            )
        self._special = dict.fromkeys(tokenizer.get_added_vocab().values())
        self._image, self._reward = config.image_token_id, last
        empty = self._tokens("")
        self._wanted = Counter(token for token in empty if token in self._special)
        if self._wanted[self._image] != 1 or self._wanted[last] != 1:
            raise InputError(f"{where}: its tokenizer has no <|image_pad|> with the number {self._image}; name a Qwen2-VL")
        place = empty.index(self._image)
        self.before, self._least = empty[:place], len(empty)
        self._after = lru_cache(maxsize=4096)(self._read)

    def table(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens after the image, int64 [T, A] padded on the right; the reward token's place among them, int64 [T]; whether
        there is a score, bool [T]."""
        read = [self._after(prompt) for prompt in prompts]
        rows = [after or self._after("") for after in read]
        longest = max(len(row) for row in rows)
        tokens = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
        ends = torch.tensor([len(row) - 1 for row in rows])
        return tokens, ends, torch.tensor([bool(after) for after in read])

    def _tokens(self, prompt: str) -> list[int]:
        return self.tokenizer(conversation(self.texts.around(prompt)), add_special_tokens=False).input_ids

    def _read(self, prompt: str) -> tuple[int, ...]:
        """Tokens after the image up to the reward token; none for a prompt without a score."""
        tokens = self._tokens(prompt)
        strange = Counter(token for token in tokens if token in self._special) - self._wanted
        if strange or len(tokens) - self._least > self.longest:
            return ()
        return tuple(tokens[tokens.index(self._image) + 1 : tokens.index(self._reward) + 1])


def read_config(file: Path, state: Mapping[str, Tensor], where: str) -> Any:
    """The ``Qwen2VLConfig`` of a ``config.json``, with as many words as the weights have.

    Raises:
        InputError: it describes no Qwen2-VL, or the weights have no embeddings.
    """
    from transformers import Qwen2VLConfig

    content = read_json_object(file, f"rewards: {file.parent}")
    if content.get("model_type") != "qwen2_vl":
        raise InputError(f"rewards: {file}: is of a {content.get('model_type')}; name Qwen2-VL-7B-Instruct as kwargs.base")
    if _EMBEDDINGS not in state:
        raise InputError(f"{where}: holds no {_EMBEDDINGS}; name {FILE}")
    try:
        return Qwen2VLConfig(**content | {"vocab_size": state[_EMBEDDINGS].shape[0]})
    except Exception as error:  # any class may refuse any configuration in its own way
        raise InputError(f"rewards: {file}: describes no Qwen2-VL: {first_line(error)}") from error


def _rounded(frequencies: str, where: str) -> bool:
    if frequencies not in ("bf16", "fp32"):
        raise InputError(f"{where}: frequencies = {frequencies}: bf16 or fp32")
    return frequencies == "bf16"
