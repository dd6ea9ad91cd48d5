"""One thread owns the reward; images of several requests go through it together, and each request gets its own scores back."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..rewards import PromptRows, Reward
from ..rewards.placed import Entry, PlacedReward


class Full(Exception):
    """More images are waiting than may; the request was not taken."""


class Request:
    """The images of a request on their way.

    Attributes:
        scores: of each image, NaN where there is none (yet).
        reasons: why an image has none; empty where it has.
        given_up: nobody waits for it any more.
    """

    def __init__(self, count: int, done: Callable[[], object]) -> None:
        self.scores, self.reasons = [math.nan] * count, [""] * count
        self.given_up = False
        self._left, self._done = count, done

    def settle(self, number: int, score: float, reason: str = "") -> None:
        """An image's score, or why it has none; tells when it was the last."""
        self.scores[number], self.reasons[number] = score, reason
        self._left -= 1
        if self._left == 0:
            self._done()


@dataclasses.dataclass(frozen=True, eq=False)
class _Item:
    image: Tensor
    prompt: str
    request: Request
    number: int


class Batcher:
    """Scores images, uint8 [3, H, W], as they come in: up to ``rows`` of one size in a call.

    A call that fails is repeated in halves, so that an image on which the reward fails takes no other with it, and a batch too
    large for the memory becomes smaller.

    Args:
        reward: it works on ``device``, or, if it has ``host = True``, on the CPU.
        name: of the reward, for messages.
        wait: seconds that an image may wait for others to join it.
        most: images that may be waiting.

    Attributes:
        scored: images so far.
    """

    def __init__(self, reward: Reward, name: str, device: torch.device, rows: int, wait: float, most: int) -> None:
        self.reward, self.device = PlacedReward(reward, Entry(name, device=str(device))), device
        self.rows, self.wait, self.most, self.scored = rows, wait, most, 0
        self._waiting: list[_Item] = []
        self._changed = threading.Condition()
        self._working, self._ending = 0, False
        self._thread = threading.Thread(target=self._work, name="adagrpo-serve", daemon=True)
        self._thread.start()

    def submit(self, images: Sequence[Tensor], prompts: Sequence[str], done: Callable[[], object]) -> Request:
        """Take the images of a request; ``done`` is called, in the thread, once all have a score or a reason.

        Raises:
            Full: too many are waiting.
        """
        request = Request(len(images), done)
        items = [_Item(*pair, request, i) for i, pair in enumerate(zip(images, prompts, strict=True))]
        with self._changed:
            if self._ending or (self._waiting and len(self._waiting) + len(items) > self.most):
                raise Full
            self._waiting += items
            self._changed.notify()
        return request

    @property
    def queued(self) -> int:
        """Images that wait or are being scored."""
        with self._changed:
            return len(self._waiting) + self._working

    @property
    def ready(self) -> bool:
        """Whether images are scored."""
        return self._thread.is_alive() and not self._ending

    def close(self, seconds: float) -> None:
        """Score what was taken, then end; waits at most so long."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        while items := self._next():
            self._score(items)
            with self._changed:
                self._working = 0
            self.scored += len(items)
            del items

    def _next(self) -> list[_Item]:
        """The next images of one size; none at the end."""
        with self._changed:
            while True:
                self._waiting = [item for item in self._waiting if not item.request.given_up]
                if self._waiting:
                    break
                if self._ending:
                    return []
                self._changed.wait()
            end = time.monotonic() + self.wait
            while len(found := self._first()) < self.rows and not self._ending and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            taken = set(map(id, found))
            self._waiting = [item for item in self._waiting if id(item) not in taken]
            self._working = len(found)
            return found

    def _first(self) -> list[_Item]:
        size = self._waiting[0].image.shape
        return [item for item in self._waiting if item.image.shape == size][: self.rows]

    def _score(self, items: list[_Item]) -> None:
        try:
            scores = self._called(items)
        except Exception as error:
            reason = f"{error}"  # the error knows the frames, and they the images
        else:
            for item, score in zip(items, scores, strict=True):
                item.request.settle(item.number, score, "" if math.isfinite(score) else "the reward gave it no score")
            return
        if len(items) == 1:
            items[0].request.settle(items[0].number, math.nan, reason)
            return
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        for half in (items[: len(items) // 2], items[len(items) // 2 :]):
            self._score(half)

    def _called(self, items: list[_Item]) -> list[float]:
        device = torch.device("cpu") if self.reward.host else self.device
        images = torch.stack([item.image for item in items]).to(device).float() / 255
        prompts = PromptRows([item.prompt for item in items], torch.arange(len(items), device=device))
        found: list[float] = self.reward(images, prompts, kept=False).tolist()
        return found
