"""How ranks find each other: under a name of this start's own.

torchrun keeps one key-value store for all its attempts. What ranks of an attempt that failed left in it, their addresses above
all, is still there when it starts them again, and whoever is early takes it for that of the living (pytorch issue 135712).
"""

from __future__ import annotations

import time
import uuid
from typing import Protocol

from ..errors import RunError
from ..text.strict_json import from_json, to_json

POLL = 0.05
_START = "adagrpo/start"


class Store(Protocol):
    """What of ``torch.distributed.Store`` is used."""

    def set(self, key: str, value: str) -> None:
        """Keep a value."""

    def get(self, key: str) -> bytes:
        """A value that is there."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of them are there."""


def met(store: Store, rank: int, size: int, seconds: float) -> str:
    """The name of this start, once all ranks are in it; an earlier one's is never taken, whatever it left in the store.

    The first rank offers a name, the others answer by a word of their own, and go by the name only if the first rank heard it.

    Raises:
        RunError: some rank does not come in time.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + seconds
    if rank == 0:
        store.set(_START, mine)
        words = {other: f"adagrpo/{mine}/{other}" for other in range(1, size)}
        while missing := [other for other, key in words.items() if not store.check([key])]:
            if time.monotonic() > end:
                raise _apart(size, seconds, f"without rank {', '.join(map(str, missing))}")
            time.sleep(POLL)
        store.set(f"adagrpo/{mine}/all", to_json([store.get(key).decode() for key in words.values()]))
        return mine
    while time.monotonic() < end:
        if store.check([_START]):
            start = store.get(_START).decode()
            store.set(f"adagrpo/{start}/{rank}", mine)
            everyone = f"adagrpo/{start}/all"
            if store.check([everyone]) and from_json(store.get(everyone))[rank - 1] == mine:
                return start
        time.sleep(POLL)
    raise _apart(size, seconds, f"rank {rank} waited for the others")


def _apart(size: int, seconds: float, why: str) -> RunError:
    return RunError(f"the {size} ranks did not come together within {seconds:g} s: {why}")
