"""Any reward behind an HTTP server: ``adagrpo serve``, and those of Flow-Factory, UniRL, Flow-GRPO and verl-omni."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..prompts.prompt import data_of
from ..text.user_text import cut, nearest, shown
from .client import Call, Client, Limits, NoAnswer, check_url, read_json
from .pictures import KINDS, encoded
from .protocols import PROTOCOLS, Batch


class Remote:
    """What a server's reward says of each image, [N]; NaN where it fails, is late, or says what is no number.

    The server is asked for its health at once, so that a dead one fails before any long work. The metadata of prompts is sent
    where they have any.

    Args:
        url: of the server; of ``flow-grpo`` and ``verl-omni`` the whole address that requests are posted to.
        protocol: ``flow-factory`` (also that of ``adagrpo serve``), ``unirl``, or, by pickle, ``flow-grpo`` and ``verl-omni``.
        reward: which of several: its name, or ``NAME/METRIC`` (``unirl``); the key of the scores in the answer (pickle).
        token: sent as a bearer token; ``env:NAME`` reads it from the environment.
        image: how images are sent, ``png`` (lossless) or ``jpeg`` (quality 95); empty is what the protocol's own client does.
        per_request: images of a request.
        allow_pickle: read pickles, but numbers, text, lists, tables and numpy's arrays only.
        limits: see ``Limits``.

    Attributes:
        provenance: how images are sent, and name and version that the server gave at the start, where it has them.

    Raises:
        InputError: an argument that cannot be meant, no server there, or one that does not have that reward.
    """

    host = True

    def __init__(
        self,
        url: str,
        protocol: str = "flow-factory",
        reward: str = "",
        token: str = "",
        image: str = "",
        per_request: int = 16,
        allow_pickle: bool = False,
        limits: Mapping[str, Any] | None = None,
    ) -> None:
        self.check(url, protocol, reward, token, image, per_request, allow_pickle, limits)
        self.protocol = PROTOCOLS[protocol]
        self.reward, self.kind = reward, image or self.protocol.image
        self.per_request = self.protocol.most or per_request
        self.client = Client(url, Limits.of(limits), token)
        said = self.client.require(self.protocol.alive, () if self.protocol.alive else (400, 404, 405, 500, 501))
        self.provenance = {"image": self.kind, **_server(said)}
        if protocol == "unirl":
            self._choose_reward()

    @property
    def failures(self) -> Mapping[str, int]:
        """Images without a score so far, by the kind of the reason: see ``NoAnswer``."""
        return self.client.failures

    @staticmethod
    def check(
        url: str,
        protocol: str,
        reward: str,
        token: str,
        image: str,
        per_request: int,
        allow_pickle: bool,
        limits: Mapping[str, Any] | None,
    ) -> None:
        """Raise what the constructor can find without asking the server."""
        check_url(url)
        Limits.of(limits)
        if protocol not in PROTOCOLS:
            known = f"{nearest(protocol, [*PROTOCOLS])}: one of {', '.join(PROTOCOLS)}"
            raise InputError(f"rewards: protocol = {shown(protocol)}: unknown{known}")
        if PROTOCOLS[protocol].pickled and not allow_pickle:
            raise InputError(
                f"rewards: protocol = {protocol}: its answers are pickles, which can hold any program; use one of the JSON "
                "protocols, or set allow_pickle = true, which reads numbers, text, lists and arrays there and refuses the rest"
            )
        if image not in ("", *KINDS):
            raise InputError(f"rewards: image = {shown(image)}: one of {', '.join(KINDS)}, or empty")
        if isinstance(per_request, bool) or not isinstance(per_request, int) or not 1 <= per_request <= 1024:
            raise InputError(f"rewards: per_request = {shown(per_request)}: must be a whole number from 1 to 1024")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [N, 3, H, W], uint8 on the CPU, and N prompts -> scores [N] float64."""
        asked, size = list(prompts), self.per_request
        starts = range(0, len(images), size)
        counts = [min(size, len(images) - start) for start in starts]

        def one(number: int, call: Call[list[float]]) -> list[float]:
            rows = range(starts[number], starts[number] + counts[number])
            texts = [asked[i] for i in rows]
            data = [dict(data_of(text)) for text in texts]
            batch = Batch([encoded(images[i], self.kind) for i in rows], [str(text) for text in texts], data)
            body = self.protocol.request(batch, self.reward)
            answer = self.client.ask(call, self.protocol.path, body, self.protocol.kind)
            return self.protocol.scores(answer, counts[number], self.reward)

        scores = self.client.scores(self.client.each(len(counts), one), counts)
        return torch.tensor(scores, dtype=torch.float64)

    def _choose_reward(self) -> None:
        """The server's only reward, or the one that is named, which it must have."""
        try:
            listed = read_json(self.client.require("/rewards"))
            names = [str(name) for name in (listed["rewards"] if isinstance(listed, dict) else listed)]
        except (NoAnswer, LookupError, TypeError) as error:
            raise InputError(f"rewards: the server at {self.client.url} does not list its rewards ({error})") from error
        if not self.reward and len(names) == 1:
            self.reward = names[0]
        if self.reward.partition("/")[0] not in names:
            has = cut(", ".join(names), 200) or "none"
            raise InputError(
                f"rewards: reward = {shown(self.reward)}: the server at {self.client.url} has {has}; name one of them"
            )


def _server(health: bytes) -> dict[str, str]:
    """What a server says of itself."""
    try:
        said = read_json(health)
    except NoAnswer:
        return {}
    return (
        {f"server_{key}": cut(str(said[key])) for key in ("name", "version") if key in said} if isinstance(said, dict) else {}
    )
