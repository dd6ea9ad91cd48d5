"""What the trainer needs of a reward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, overload

from torch import Tensor


class PromptRows(Sequence[str]):
    """The prompts of a batch of images: texts known to the host, chosen by an index that lives on the device.

    It reads like a list of strings; reading it copies the index to the host, once. A reward that has encoded ``texts``
    already can gather by ``text_index`` instead, and nothing waits for the device.

    Attributes:
        texts: candidate prompts.
        text_index: int64 [N], the text of each image.
    """

    def __init__(self, texts: Sequence[str], text_index: Tensor) -> None:
        self.texts, self.text_index = tuple(texts), text_index
        self._rows: list[str] | None = None

    def rows(self, index: Tensor) -> PromptRows:
        """The images ``index`` (int64 vector on the device); nothing is read."""
        return PromptRows(self.texts, self.text_index.index_select(0, index))

    def copied(self) -> PromptRows:
        """The same rows, on an index of their own."""
        part = PromptRows(self.texts, self.text_index.clone())
        part._rows = None if self._rows is None else list(self._rows)
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
        part = PromptRows(self.texts, self.text_index[key])
        part._rows = None if self._rows is None else self._rows[key]
        return part


class Reward(Protocol):
    """Scores images against prompts.

    It is called without gradients, on images of its own, with random states, default dtype and torch's other global switches
    restored afterwards (``adagrpo.parts.isolation``), and in a thread of its own where ``rewards.N.timeout`` limits its time.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] for images [N, 3, H, W] in [0, 1] on the model's device; NaN marks a failed sample."""
