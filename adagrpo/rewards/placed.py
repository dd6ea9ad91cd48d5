"""A reward as an entry of a recipe has it: where it works, in which batches, and what becomes of its scores."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..parts.beside import Beside, Call
from ..parts.isolation import Part, call_part
from ..parts.plugins import checked
from .base import PromptRows, Reward
from .holdings import Offloaded, placed_on
from .transfer import HostImages


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a recipe calls one of its rewards: keys of ``rewards.N``, and the number N."""

    name: str = "reward"
    number: int = 0
    scale: float = 1.0
    shift: float = 0.0
    device: str = ""
    rows: int = 0
    offload: bool = False
    timeout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Pending:
    """Calls of a host reward under way: those of ``rows`` images each, in order."""

    calls: Sequence[tuple[int, Call]]

    @property
    def done(self) -> bool:
        """Whether all are over."""
        return all(call.done for _, call in self.calls)

    def wait(self) -> None:
        """Until all are over; see ``Call.wait``."""
        for _, call in self.calls:
            call.wait()


class PlacedReward:
    """Calls a reward so that it cannot harm; its scores are float64 on the device of the images, NaN where there is none.

    Args:
        reward: what scores.
        entry: how it is called.

    Attributes:
        host, groupwise: of the reward, see ``Reward``.
        seconds: that its host calls took so far.
    """

    def __init__(self, reward: Reward, entry: Entry = Entry()) -> None:
        self.reward, self.entry = reward, entry
        key = f"rewards.{entry.number}"
        self.part = Part(f"{key} ({entry.name})", timeout=entry.timeout, timeout_key=f"{key}.timeout")
        self.host, self.groupwise = bool(getattr(reward, "host", False)), bool(getattr(reward, "groupwise", False))
        self._beside = Beside(self.part, max(1, int(getattr(reward, "threads", 1))))
        self._weights: Offloaded | None = None
        self.seconds = 0.0

    @property
    def failures(self) -> Mapping[str, int]:
        """Images without a score so far, by reason, where the reward tells them (``Reward``)."""
        told = getattr(self.reward, "failures", None)
        return dict(told) if isinstance(told, Mapping) else {}

    @property
    def provenance(self) -> dict[str, str]:
        """What the reward tells of its origin (``Reward``), for the run folder."""
        told = getattr(self.reward, "provenance", None)
        return {str(key): str(value) for key, value in told.items()} if isinstance(told, Mapping) else {}

    def __call__(self, images: Tensor, prompts: PromptRows, kept: bool = True) -> Tensor:
        """Scores [N] of images [N, 3, H, W] in [0, 1].

        Args:
            kept: the images are needed again, so the reward gets copies.

        Raises:
            RunError: the reward fails, or does not return one number per image.
        """
        if self.host:
            return self.collected(self.begun(HostImages(images, prompts))).to(images.device)
        home, device = images.device, placed_on(self.entry.device, images.device)
        if device != home:
            images, prompts, kept = images.to(device), prompts.to(device), False
        with self._working_on(device):
            parts = [self._scored(images[part], prompts[part], kept) for part in self._slices(len(images))]
        return self._told(parts[0] if len(parts) == 1 else torch.cat(parts)).to(home)

    def begun(self, images: HostImages) -> Pending:
        """A host reward's calls for these images, in threads of their own."""
        parts = self._slices(len(images))
        read = [functools.partial(images.read, part) for part in parts]
        calls = [self._beside(self._with_finite, given) for given in read]
        return Pending([(len(range(len(images))[part]), call) for part, call in zip(parts, calls, strict=True)])

    def collected(self, pending: Pending) -> Tensor:
        """The scores [N] of those calls, on the CPU, once they are over.

        Raises:
            RunError: as of a call.
            PartHung: one did not return in its time.
        """
        found = []
        for rows, call in pending.calls:
            scores, finite = call.result()
            self.seconds += call.seconds
            found.append(self._checked(scores, rows).cpu().masked_fill(~finite, torch.nan))
        return self._told(torch.cat(found))

    def of_groups(self, chunks: Sequence[HostImages], device: torch.device) -> Tensor:
        """Scores [R], on the CPU, of all images of a rollout, which a groupwise reward sees in whole groups, as 8-bit numbers.

        A group with an image that is not finite has no scores: there is nothing to compare it with.

        Args:
            device: of the model; a reward that is no host reward gets floats in [0, 1] there, or where its entry says.
        """
        read = [chunk.read() for chunk in chunks]
        index = torch.cat([rows.group_index for _, rows, _ in read if rows.group_index is not None])
        order = torch.argsort(index, stable=True)
        texts = torch.cat([rows.text_index for _, rows, _ in read])
        prompts = PromptRows(read[0][1].texts, texts, index).rows(order)
        images = torch.cat([pixels for pixels, _, _ in read])[order]
        finite = torch.cat([flags for _, _, flags in read])[order]
        _, group, sizes = torch.unique_consecutive(index[order], return_inverse=True, return_counts=True)
        parts = _whole_groups(sizes.tolist(), self.entry.rows)
        if self.host:
            calls = [self._beside(self.reward, functools.partial(_own_rows, images, prompts, part)) for part in parts]
            results = [call.result() for call in calls]
            found = [self._checked(scores, part.stop - part.start).cpu() for part, scores in zip(parts, results, strict=True)]
            self.seconds += sum(call.seconds for call in calls)
        else:
            with self._working_on(device := placed_on(self.entry.device, device)):
                rows = prompts.to(device)
                found = [self._scored(images[part].to(device).float() / 255, rows[part], False).cpu() for part in parts]
        sound = torch.ones(len(sizes), dtype=torch.int64).scatter_reduce(0, group, finite.long(), "amin").bool()[group]
        scores = torch.cat(found).masked_fill(~sound, torch.nan)
        return self._told(torch.empty_like(scores).index_copy(0, order, scores))

    def cancel(self) -> None:
        """Nobody asks for the calls that were begun."""
        self._beside.cancel()

    def rest(self) -> None:
        """Nothing is scored for a while: weights to be offloaded leave the device."""
        if self._weights is not None and self._weights.here is not None:
            self._weights.leave()

    def _with_finite(self, images: Tensor, prompts: PromptRows, finite: Tensor) -> tuple[Any, Tensor]:
        return self.reward(images, prompts), finite

    def _scored(self, images: Tensor, prompts: PromptRows, kept: bool) -> Tensor:
        scores = call_part(self.part, self.reward, images.clone() if kept else images, prompts.copied(), copied=False)
        return self._checked(scores, len(images)).to(images.device)

    def _checked(self, scores: Any, rows: int) -> Tensor:
        return checked(scores, (rows,), self.part.name, "a score per image").to(torch.float64)

    def _told(self, scores: Tensor) -> Tensor:
        if (self.entry.scale, self.entry.shift) != (1.0, 0.0):
            scores = scores * self.entry.scale + self.entry.shift
        return torch.where(scores.isfinite(), scores, torch.nan)

    def _slices(self, images: int) -> list[slice]:
        rows = self.entry.rows or max(images, 1)
        return [slice(first, min(first + rows, images)) for first in range(0, max(images, 1), rows)]

    @contextlib.contextmanager
    def _working_on(self, device: torch.device) -> Iterator[None]:
        if self.entry.offload:
            self._weights = self._weights or Offloaded(self.reward)
            self._weights.bring(device)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            yield


def _own_rows(images: Tensor, prompts: PromptRows, part: slice) -> tuple[Tensor, PromptRows]:
    return images[part].clone(), prompts[part].copied()


def _whole_groups(sizes: Sequence[int], rows: int) -> list[slice]:
    """Consecutive groups in batches of at most ``rows`` images, one group at least; 0 is all in one."""
    parts: list[slice] = []
    first = last = 0
    for size in sizes:
        if rows and last > first and last + size - first > rows:
            parts.append(slice(first, last))
            first = last
        last += size
    return [*parts, slice(first, last)]
