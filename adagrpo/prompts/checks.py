"""What a prompt may hold, and when two say the same."""

from __future__ import annotations

import unicodedata

from ..text.user_text import character_problem

MAX_CHARACTERS = 4096


def cleaned(text: str) -> str:
    """A prompt as it stands in a file, without what editors and tables leave around and in it."""
    return text.strip() if text.isprintable() else text.replace("\ufeff", "").replace("\r\n", "\n").strip()


def prompt_problem(prompt: str, spaces: str = "\t\n") -> str | None:
    """Why a prompt is refused, with the remedy; None where it is not. ``spaces``: control characters that may stand in it."""
    if len(prompt) <= MAX_CHARACTERS and prompt.isprintable():
        return None
    if len(prompt) > MAX_CHARACTERS:
        return f"is longer than {MAX_CHARACTERS} characters; shorten it"
    if problem := character_problem(prompt, spaces):
        return f"{problem}; remove it"
    return None


def same(prompt: str) -> str:
    """What prompts have in common that say the same: neither Unicode's composed forms nor runs of blanks tell them apart."""
    if prompt.isascii() and prompt.isprintable() and "  " not in prompt:
        return prompt.strip()
    return " ".join(unicodedata.normalize("NFC", prompt).split())


def key_of(prompt: str) -> int:
    """64 bits of what a prompt says, within this process: of a million prompts, two that differ share them once in 10^7."""
    return hash(same(prompt).encode("utf-8", "surrogatepass"))
