"""A vision-language model as the judge, behind a server that speaks OpenAI's chat protocol (vLLM, SGLang, hosted ones)."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..prompts.prompt import data_of
from ..text.strict_json import to_json
from ..text.user_text import cut, read_text, shown
from .client import Call, Client, Limits, NoAnswer, check_url, read_json
from .pictures import KINDS, encoded

IMAGE = "image"
_MOST_TEMPLATE = 2**20
_MOST_REPLY = 2**17
_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")


class Judge:
    """What a judge says of each image, [N]: the number that ``pattern`` finds in its answer, or the mean of several numbers.

    The server is asked once per image at temperature 0. An answer counts only if it can be read in one way: one number per
    pattern, within its range. Others, and answers cut at ``max_tokens``, are asked for again (``limits.tries``); then the image
    has failed. The server is asked for its models at once, so that a dead one fails before any long work.

    Args:
        url: of the server; ``/v1/chat/completions`` is added.
        model: name under which it serves the judge.
        template: text file of what it is asked. ``{prompt}`` stands for the prompt, ``{image}`` for the place of the image
            (without it: in front), and other names in braces for metadata of the prompt.
        pattern: regular expression whose one group is the number, or several of them: the score is then their mean.
        low, high: range of each number; another one cannot be meant.
        api_key: sent as a bearer token; ``env:NAME`` reads it from the environment.
        image: how images are sent, ``jpeg`` (quality 95) or ``png`` (lossless).
        request: further fields of the request; a dot enters a table: ``{max_tokens = 64,
            "chat_template_kwargs.enable_thinking" = false}``.
        limits: see ``Limits``.

    Attributes:
        provenance: digest of the template, and how images are sent.

    Raises:
        InputError: an argument that cannot be meant, no such file, no server there, or one without that model.
    """

    host = True

    def __init__(
        self,
        url: str,
        model: str,
        template: str,
        pattern: str | Sequence[str],
        low: float,
        high: float,
        api_key: str = "",
        image: str = "jpeg",
        request: Mapping[str, Any] | None = None,
        limits: Mapping[str, Any] | None = None,
    ) -> None:
        Judge.check(url, model, template, pattern, low, high, api_key, image, request, limits)
        self.model, self.kind, self.low, self.high = model, image, low, high
        text = _read_template(template)
        self.provenance = {"template_sha256": hashlib.sha256(text.encode()).hexdigest(), "image": image}
        self.parts = _FIELD.split(text)
        self.patterns = [re.compile(p, re.DOTALL) for p in _several(pattern)]
        self.request = _nested({"max_tokens": 4096, **(request or {})})
        self.client = Client(url.rstrip("/").removesuffix("/v1"), Limits.of(limits), api_key)
        self._require_model()

    @property
    def failures(self) -> Mapping[str, int]:
        """Images without a score so far, by the kind of the reason: see ``NoAnswer``."""
        return self.client.failures

    @staticmethod
    def check(
        url: str,
        model: str,
        template: str,
        pattern: str | Sequence[str],
        low: float,
        high: float,
        api_key: str,
        image: str,
        request: Mapping[str, Any] | None,
        limits: Mapping[str, Any] | None,
    ) -> None:
        """Raise what the constructor can find without asking the server."""
        check_url(url)
        Limits.of(limits)
        _nested(request or {})
        if image not in KINDS:
            raise InputError(f"rewards: image = {shown(image)}: one of {', '.join(KINDS)}")
        if not (low < high):
            raise InputError(f"rewards: low = {low:g}, high = {high:g}: low must be the smaller one")
        if not _several(pattern):
            raise InputError("rewards: pattern = []: name at least one regular expression")
        for one in _several(pattern):
            try:
                groups = re.compile(one).groups
            except re.error as error:
                raise InputError(f"rewards: pattern = {shown(one)}: not a regular expression: {error}") from error
            if groups != 1:
                raise InputError(
                    f"rewards: pattern = {shown(one)} has {groups} groups; put the number, and nothing else, into (...), and "
                    "other parts into (?:...)"
                )
        names = _FIELD.split(_read_template(template))[1::2]
        if not set(names) - {IMAGE} or names.count(IMAGE) > 1:
            problem = (
                "the image stands in it several times" if names.count(IMAGE) > 1 else "nothing in it says what was asked for"
            )
            raise InputError(
                f"rewards: template = {template}: {problem}; write {{prompt}} where the prompt belongs, {{image}} once"
            )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [N, 3, H, W], uint8 on the CPU, and N prompts -> scores [N] float64, NaN where no answer can be read.

        Raises:
            InputError: a prompt without metadata that the template names.
        """
        texts = [self._texts(prompt) for prompt in prompts]

        def one(number: int, call: Call[list[float]]) -> list[float]:
            body = self._body(encoded(images[number], self.kind), texts[number])
            for left in reversed(range(self.client.limits.tries)):
                try:
                    return [self.score(self._reply(self.client.ask(call, "/v1/chat/completions", body)))]
                except _Unreadable:
                    if not left or not call.pause(0):
                        raise
            raise AssertionError

        answers = self.client.each(len(images), one)
        return torch.tensor(self.client.scores(answers, [1] * len(images)), dtype=torch.float64)

    def score(self, reply: str) -> float:
        """The score in an answer's text.

        Raises:
            NoAnswer: it cannot be read in one way.
        """
        values = [self._value(pattern, reply) for pattern in self.patterns]
        return sum(values) / len(values)

    def _value(self, pattern: re.Pattern[str], reply: str) -> float:
        found = {match[1] for match in pattern.finditer(reply)}
        if not found:
            raise _Unreadable(f"no number in the answer {_ends(reply)}")
        try:
            values = {float(text) for text in found}
        except (ValueError, TypeError) as error:
            raise _Unreadable(f"no number, but {shown(sorted(map(str, found)))} in the answer {_ends(reply)}") from error
        if len(values) > 1:
            raise _Unreadable(f"{len(values)} different numbers in the answer {_ends(reply)}")
        (value,) = values
        if not self.low <= value <= self.high or not math.isfinite(value):
            raise _Unreadable(f"{value:g} in the answer, outside {self.low:g} to {self.high:g}")
        return value

    def _texts(self, prompt: str) -> list[str]:
        """Two texts, around the image."""
        known = {**data_of(prompt), "prompt": str(prompt)}
        pieces, names = self.parts[::2], self.parts[1::2]
        around = [pieces[0]]
        if IMAGE not in names:
            around.insert(0, "")
        for name, piece in zip(names, pieces[1:], strict=True):
            if name == IMAGE:
                around.append(piece)
            elif name not in known:
                raise InputError(f"rewards: the template names {{{name}}}, which the prompt {shown(str(prompt))} does not have")
            else:
                around[-1] += f"{known[name]}{piece}"
        return around

    def _body(self, picture: bytes, texts: list[str]) -> bytes:
        data = f"data:image/{self.kind};base64,{base64.b64encode(picture).decode()}"
        content: list[dict[str, Any]] = [{"type": "text", "text": text} for text in texts]
        content.insert(1, {"type": "image_url", "image_url": {"url": data}})
        content = [part for part in content if part.get("text") != ""]
        message = {"role": "user", "content": content}
        return to_json({"model": self.model, "messages": [message], "temperature": 0, **self.request}).encode()

    @staticmethod
    def _reply(body: bytes) -> str:
        answer = read_json(body)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (LookupError, TypeError) as error:
            raise NoAnswer(f"the answer is none of a chat: {shown(answer, 200)}") from error
        if not isinstance(text, str) or len(text) > _MOST_REPLY:
            raise _Unreadable("an answer without text" if not isinstance(text, str) else "an answer too long to read")
        if choice.get("finish_reason") == "length":
            raise _Unreadable(f"an answer cut at max_tokens: {_ends(text)}")
        return text

    def _require_model(self) -> None:
        """Refuse a server that is dead, or that lists its models and not this one."""
        body = self.client.require("/v1/models", (404, 405, 501))
        try:
            names = [str(entry["id"]) for entry in read_json(body)["data"]] if body else []
        except (NoAnswer, LookupError, TypeError):
            names = []
        if names and not any(name == self.model or name.endswith(f"/{self.model}") or "*" in name for name in names):
            served = cut(", ".join(names), 200)
            raise InputError(
                f"rewards: model = {self.model}: the server at {self.client.url} serves {served}; name one of them"
            )


class _Unreadable(NoAnswer):
    """An answer from which no score can be read; another one may be better."""


def _several(pattern: str | Sequence[str]) -> list[str]:
    return [pattern] if isinstance(pattern, str) else list(pattern)


def _read_template(path: str) -> str:
    return read_text(path, f"rewards: template = {path}", _MOST_TEMPLATE)


def _nested(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table, with those that dots in its names enter."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if name.partition(".")[0] in ("messages", "model", "stream", "n"):
            raise InputError(f"rewards: request.{name}: is not for a recipe to say; leave it out")
        *path, last = name.split(".")
        inner = found
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise InputError(f"rewards: request.{name}: {part} is a value already; leave one of them out")
        inner[last] = value
    return found


def _ends(reply: str) -> str:
    return shown(cut(reply.strip(), 120), 200)
