"""The two published texts that HPS-v3 puts around a prompt: read from where its authors' package keeps them, never run.

They are part of the model, as its weights are, and come with its package: a wheel, an installed copy, or a file of the user's.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import string
import zipfile
from importlib.util import find_spec
from pathlib import Path

from ..errors import InputError
from ..models.loading import first_line

REWARD = "<|Reward|>"
_NAMES = ("INSTRUCTION", "prompt_with_special_token")
_MODULE = "hpsv3/dataset/data_collator_qwen.py"
_FIELD = "text_prompt"
_FETCH = "fetch the wheel with `pip download --no-deps hpsv3==1.0.0` and name it as kwargs.texts"
_PUBLISHED = (  # SHA-256 of both in hpsv3 1.0.0
    "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a",
    "2471faca094ae5bd6fe17b71dce20c3d7583625545e235889f7e74e7eeb69d0a",
)


@dataclasses.dataclass(frozen=True)
class Texts:
    """What stands around a prompt.

    Attributes:
        instruction: before it; holds the field ``{text_prompt}``.
        question: after it; holds the reward token.
    """

    instruction: str
    question: str

    def around(self, prompt: str) -> str:
        """The user's turn for a prompt, which may hold braces."""
        return self.instruction.format(**{_FIELD: prompt}) + self.question

    @property
    def provenance(self) -> dict[str, str]:
        """SHA-256 of both texts by their published names, and whether they are those of hpsv3 1.0.0."""
        digests = tuple(hashlib.sha256(text.encode()).hexdigest() for text in (self.instruction, self.question))
        known = "as published in hpsv3 1.0.0" if digests == _PUBLISHED else "not those of hpsv3 1.0.0"
        return {f"{name}_sha256": digest for name, digest in zip(_NAMES, digests, strict=True)} | {"texts": known}


def conversation(turn: str) -> str:
    """The user's turn behind an image, as Qwen2-VL's chat template writes it down for an answer."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{turn}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def read_texts(place: str, where: str) -> Texts:
    """The texts of a wheel, of a Python file, or, if ``place`` is empty, of an installed copy.

    Args:
        where: first words of an error.

    Raises:
        InputError: there is none, or it does not define both, as text with a place for the prompt and one reward token.
    """
    source, named = _source(place, where)
    try:
        found = _constants(source)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{where}: {named} is no Python file that can be parsed ({first_line(error)}); {_FETCH}") from error
    for name in _NAMES:
        if not isinstance(found.get(name), str):
            raise InputError(f"{where}: {named} defines no text {name}; {_FETCH}")
    instruction, question = (str(found[name]) for name in _NAMES)
    if _fields(instruction) != [_FIELD]:
        raise InputError(f"{where}: {named}: {_NAMES[0]} has other fields than one {{{_FIELD}}}; {_FETCH}")
    if REWARD in instruction or question.count(REWARD) != 1:
        raise InputError(f"{where}: {named}: {REWARD} must be in {_NAMES[1]}, once; {_FETCH}")
    return Texts(instruction, question)


def _source(place: str, where: str) -> tuple[bytes, str]:
    """Source of the module that defines the texts, and what to call it."""
    if not place:
        spec = find_spec("hpsv3")  # of the package itself: a module of it could not be found without importing it
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"{where}: needs the two texts that its authors' package puts around a prompt; {_FETCH}")
        place = str(Path(spec.submodule_search_locations[0]).parent / _MODULE)
    try:
        if zipfile.is_zipfile(place):
            with zipfile.ZipFile(place) as wheel:
                return wheel.read(_MODULE), f"{place}: {_MODULE}"
        return Path(place).read_bytes(), place
    except KeyError as error:
        raise InputError(f"{where}: {place} holds no {_MODULE}; {_FETCH}") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{where}: {place} cannot be read ({first_line(error)}); {_FETCH}") from error


def _constants(source: bytes) -> dict[str, object]:
    """Literals that a module binds to names at its top level."""
    found: dict[str, object] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name) and target.id in _NAMES]
            found |= {name: ast.literal_eval(node.value) for name in names}
    return found


def _fields(text: str) -> list[str]:
    try:
        return [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
    except ValueError:
        return []
