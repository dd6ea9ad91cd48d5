"""How sources of prompts are read, and which part of them."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Attributes:
        field: column or key of the prompt; empty where the source has one that is clearly it.
        duplicates: what repeated prompts do: end with an error, stay, or leave one.
        broken: what rows that cannot be read do: end with an error, or drop out with a note.
        held_out_share: of the part ``#held_out``.
    """

    field: str = ""
    duplicates: Literal["error", "keep", "drop"] = "error"
    broken: Literal["error", "drop"] = "error"
    held_out_share: float = 0.1


@dataclass(frozen=True)
class Part:
    """The prompts of a source that train, or those that are held out.

    A prompt's part follows from what it says alone. So prompts that say the same are in one part, whatever their case, blanks
    and Unicode forms, and none changes its part when others come or go, or from one machine to the next.
    """

    held_out: bool
    share: float

    def holds(self, prompt: str) -> bool:
        """Whether the prompt is in this part."""
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).casefold())
        digest = hashlib.blake2b(" ".join(folded.split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return (int.from_bytes(digest, "big") < self.share * 2**64) == self.held_out
