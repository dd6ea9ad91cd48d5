"""Before a training begins all ranks must be of one mind: the same code, recipe, prompts and weights, and one run folder."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..disk.files import write_text
from ..engine.ranks import Ranks
from ..errors import InputError
from ..text.strict_json import to_json

NONCE = ".ranks"
SEEN_WITHIN = 20.0
"""Seconds in which a network file system shows on every host what was written on one."""


def require_alike(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Refuse ranks that differ in one of ``facts``, JSON values by what they say.

    Raises:
        InputError: on the first rank, naming the odd ones, their hosts and what differs; the others end without a word.
    """
    if ranks.size == 1:
        return
    mine = {name: hashlib.sha256(to_json(value).encode()).hexdigest() for name, value in facts.items()}
    found = ranks.all_of((socket.gethostname(), mine), "the comparison of all ranks")

    def compare() -> None:
        for name in facts:
            usual = Counter(of_rank[name] for _, of_rank in found).most_common(1)[0][0]
            odd = [f"rank {rank} on {host}" for rank, (host, of_rank) in enumerate(found) if of_rank[name] != usual]
            if odd:
                raise InputError(f"{', '.join(odd)}: another {name} than on the other ranks; make it the same everywhere")

    ranks.told(compare, "the comparison of all ranks")


def require_one_folder(ranks: Ranks, folder: Path) -> None:
    """Refuse a run folder that some rank does not see as the first one does.

    Raises:
        InputError: on the first rank, naming the others and their hosts; these end without a word.
    """
    if ranks.size == 1:
        return
    file = folder / NONCE

    def written() -> str:
        write_text(file, nonce := uuid.uuid4().hex)
        return nonce

    nonce = ranks.told(written, "the run folder")
    end, seen = time.monotonic() + SEEN_WITHIN, ""
    while seen != nonce and time.monotonic() < end:
        with contextlib.suppress(OSError):
            seen = file.read_text("utf-8")
        if seen != nonce:
            time.sleep(0.2)
    found = ranks.all_of((socket.gethostname(), seen == nonce), "the run folder")

    def judge() -> None:
        file.unlink(missing_ok=True)
        blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(found) if not sees]
        if blind:
            raise InputError(f"--out {folder}: {', '.join(blind)} cannot see it; name a folder that all nodes share")

    ranks.told(judge, "the run folder")
