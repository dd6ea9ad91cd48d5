"""One number for lists of prompts, by which a run knows them again."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from json.encoder import encode_basestring

from .prompt import data_of

_WITH_DATA = json.JSONEncoder(sort_keys=True, default=str).encode


def prompts_digest(*lists: Sequence[str]) -> str:
    """SHA-256 of prompt lists with their metadata, as JSON; no list is held as a whole."""
    digest = hashlib.sha256()
    for i, prompts in enumerate(lists):
        digest.update(b", [" if i else b"[[")
        pieces = _pieces(prompts)
        while some := "".join(itertools.islice(pieces, 4096)):
            digest.update(some.encode())
        digest.update(b"]")
    digest.update(b"]")
    return digest.hexdigest()


def _pieces(prompts: Sequence[str]) -> Iterator[str]:
    """A prompt is a string, one with metadata a list of the two."""
    for i, prompt in enumerate(prompts):
        yield ", " if i else ""
        if data := dict(data_of(prompt)):
            yield _WITH_DATA([prompt, data])
        else:
            yield encode_basestring(prompt)
