"""What the trainer needs of a reward."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Protocol, overload

import torch
from torch import Tensor

SEE_CARD = "see the model card"
TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
"""What of a Hub repository a tokenizer is loaded from."""


@dataclasses.dataclass(frozen=True)
class BuiltIn:
    """A reward that a recipe names by a word.

    Attributes:
        target: import path of its class.
        parameters: of its default checkpoint; 0 has no weights, None is not known.
        licence: of the weights; as published, or where to look.
        files: what the defaults load: Hub ids, ``owner/name`` or, of a single file, ``owner/name:path``.
        size: bytes of these files; None is not known.
        bounds: least and greatest score there can be.
    """

    target: str
    parameters: int | None = None
    licence: str = SEE_CARD
    files: tuple[str, ...] = ()
    size: int | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)


class PromptRows(Sequence[str]):
    """The prompts of a batch of images: texts known to the host, chosen by an index that lives on the device.

    It reads like a list of strings (``Prompt`` where there is metadata, see ``data_of``); reading it copies the index to the
    host, once. A reward that has encoded ``texts`` already can gather by ``text_index`` instead, and nothing waits for the
    device.

    Attributes:
        texts: candidate prompts.
        text_index: int64 [N], the text of each image.
        group_index: int64 [N], images with the same number are one group; None where there are no groups (probes,
            evaluations).
    """

    def __init__(self, texts: Sequence[str], text_index: Tensor, group_index: Tensor | None = None) -> None:
        self.texts, self.text_index, self.group_index = tuple(texts), text_index, group_index
        self._rows: list[str] | None = None

    def rows(self, index: Tensor) -> PromptRows:
        """The images ``index`` (int64 vector on the device); nothing is read."""
        group = None if self.group_index is None else self.group_index.index_select(0, index)
        return PromptRows(self.texts, self.text_index.index_select(0, index), group)

    def copied(self) -> PromptRows:
        """The same rows, on indices of their own."""
        group = None if self.group_index is None else self.group_index.clone()
        part = PromptRows(self.texts, self.text_index.clone(), group)
        part._rows = None if self._rows is None else list(self._rows)
        return part

    def to(self, device: torch.device | str) -> PromptRows:
        """The same rows, with indices on ``device``."""
        group = None if self.group_index is None else self.group_index.to(device)
        part = PromptRows(self.texts, self.text_index.to(device), group)
        part._rows = self._rows
        return part

    def _materialised(self) -> list[str]:
        if self._rows is None:
            self._rows = [self.texts[i] for i in self.text_index.tolist()]
        return self._rows

    def __len__(self) -> int:
        return self.text_index.shape[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._materialised())

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> PromptRows: ...
    def __getitem__(self, key: int | slice) -> str | PromptRows:
        if not isinstance(key, slice):
            return self._materialised()[key]
        group = None if self.group_index is None else self.group_index[key]
        part = PromptRows(self.texts, self.text_index[key], group)
        part._rows = None if self._rows is None else self._rows[key]
        return part


def matched(images: Tensor, prompts: Sequence[str]) -> PromptRows:
    """The prompts as rows on the images' device: each text once, and an index.

    Raises:
        ValueError: images that are not [N, 3, H, W] floats or bytes, or another number of prompts.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ValueError(f"images must be floats of shape [N, 3, H, W], got {images.dtype} {tuple(images.shape)}")
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} images need as many prompts, got {len(prompts)}")
    if not isinstance(prompts, PromptRows):
        places = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
        prompts = PromptRows(tuple(places), torch.tensor([places[prompt] for prompt in prompts], dtype=torch.int64))
    return prompts if prompts.text_index.device == images.device else prompts.to(images.device)


class Reward(Protocol):
    """Scores images against prompts.

    Attributes that a class may have: ``host = True``: it works on the host, and is called with images uint8 [N, 3, H, W] on the
    CPU, in a thread beside sampling (it must leave torch's global switches alone); ``threads``: how many such calls may run at
    once (1). ``groupwise = True``: its scores compare the images of a group (``PromptRows.group_index``), and it is called with
    whole groups. ``failures``: a mapping from reasons to how many images had no score for each so far, told in the metrics.
    ``provenance``: a mapping of texts, such as digests of what it was made from, which the run folder keeps.

    For the memory plan: ``rehearsable = True``: a deep copy whose tensors are all on the meta device can be called there; or
    ``activation_bytes(rows, height, width)``: what a call needs at most beside weights and images.

    It is called without gradients, on images of its own, with random states, default dtype and torch's other global switches
    restored afterwards (``adagrpo.parts.isolation``), and in a thread of its own where ``rewards.N.timeout`` limits its time.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] for images [N, 3, H, W], floats in [0, 1] on the device; NaN marks a failed sample."""
