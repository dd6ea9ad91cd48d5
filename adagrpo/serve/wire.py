"""What comes in and goes out: requests of Flow-Factory's and UniRL's JSON protocols, checked before an image is decoded."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..prompts.prompt import Prompt
from ..rewards.pictures import decoded
from ..text.strict_json import from_json
from ..text.user_text import character_problem, shown


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a request may hold.

    Attributes:
        body: bytes.
        images: their number.
        side: pixels of the longer side of an image.
        pixels: of all images together, which unpack to three bytes each.
        prompt: characters of a prompt.
    """

    body: int = 64 * 2**20
    images: int = 256
    side: int = 4096
    pixels: int = 2**28
    prompt: int = 20_000


@dataclasses.dataclass(frozen=True)
class Asked:
    """Images, uint8 [3, H, W], of a request and their prompts; ``names``: of the rewards each is to be scored by."""

    images: list[Tensor]
    prompts: list[Prompt]
    names: list[list[str]] = dataclasses.field(default_factory=list)


def read_compute(body: bytes, bounds: Bounds) -> Asked:
    """A request of Flow-Factory's protocol: ``prompt`` and ``image`` (or ``prompts`` and ``images``), lists of equal length;
    ``kwargs.metadata``, if there is any, is a list of tables.

    Raises:
        ValueError: what is wrong with it.
    """
    table = _table(from_json(body), "the request")
    prompts = _list(table.get("prompt", table.get("prompts")), "prompt")
    images = _list(table.get("image", table.get("images")), "image")
    data = _table(table.get("kwargs") or {}, "kwargs").get("metadata") or [{}] * len(prompts)
    if not len(prompts) == len(images) == len(_list(data, "kwargs.metadata")):
        raise ValueError(f"{len(prompts)} prompts, {len(images)} images and {len(data)} entries of metadata: not one of each")
    if table.get("video") or table.get("condition_images") or table.get("condition_videos"):
        raise ValueError("videos and condition images are not scored here")
    return Asked(*_decoded(images, prompts, data, bounds))


def read_score(body: bytes, bounds: Bounds) -> Asked:
    """A request of UniRL's protocol; of a history, the last turn is scored.

    Raises:
        ValueError: what is wrong with it.
    """
    requests = [_table(one, "a request") for one in _list(_table(from_json(body), "the request").get("requests"), "requests")]
    turns = [_table((_list(one.get("history"), "history") or [None])[-1], "a turn of history") for one in requests]
    names = [[str(name) for name in _list(one.get("required_rewards"), "required_rewards")] for one in requests]
    data = [one.get("metadata") or {} for one in requests]
    return Asked(*_decoded([t.get("image_b64") for t in turns], [t.get("text") for t in turns], data, bounds), names)


def _decoded(
    images: Sequence[Any], prompts: Sequence[Any], data: Sequence[Any], bounds: Bounds
) -> tuple[list[Tensor], list[Prompt]]:
    if not 1 <= len(images) <= bounds.images:
        raise ValueError(f"{len(images)} images; send 1 to {bounds.images}")
    found = []
    for i, text in enumerate(prompts):
        if not isinstance(text, str) or len(text) > bounds.prompt:
            what = f"longer than {bounds.prompt} characters" if isinstance(text, str) else f"{shown(text)}, not text"
            raise ValueError(f"prompt {i} is {what}")
        if problem := character_problem(text):
            raise ValueError(f"prompt {i} {problem}")
        found.append(Prompt(text, _table(data[i], f"metadata {i}")))
    pictures: list[Tensor] = []
    for i, image in enumerate(images):
        pictures.append(_picture(image, i, bounds.side))
        if sum(picture[0].numel() for picture in pictures) > bounds.pixels:
            raise ValueError(f"more than {bounds.pixels} pixels in {i + 1} of {len(images)} images; send fewer in one request")
    return pictures, found


def _picture(text: Any, number: int, longest: int) -> Tensor:
    if not isinstance(text, str):
        raise ValueError(f"image {number} is {shown(text)}, not text in base64")
    try:
        return decoded(base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True), longest)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"image {number}: {error}") from error


def _table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}, not a table")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {shown(value)}, not a list")
    return value
