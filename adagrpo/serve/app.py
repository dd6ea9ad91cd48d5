"""The application: who may ask, how much, and what is answered. Errors are JSON with ``detail``; none is a score."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ..text.strict_json import to_json
from ..version import VERSION
from .batching import Batcher, Full
from .batching import Request as Scored
from .wire import Asked, Bounds, read_compute, read_score

RETRY_AFTER = "1"
MOST_READ = 16
"""Largest requests that may be read at one time; beyond, they are told to come again."""
ARRIVAL = 120.0
"""Seconds that a request may take to arrive: one whose sender is gone must not keep its place."""
_LOOK = 1.0


class Service:
    """What the routes do.

    Args:
        name: of the reward.
        token: that requests must bear; empty takes everybody's.
    """

    def __init__(self, batcher: Batcher, name: str, token: str, bounds: Bounds) -> None:
        self.batcher, self.name, self.token, self.bounds = batcher, name, token, bounds
        self._reading = 0

    def app(self) -> FastAPI:
        """The application."""
        routes: list[BaseRoute] = [
            Route("/health", self.health, methods=["GET"]),
            Route("/rewards", self.rewards, methods=["GET"]),
            Route("/compute", self.compute, methods=["POST"]),
            Route("/score", self.score, methods=["POST"]),
        ]
        return FastAPI(title=f"adagrpo serve {self.name}", routes=routes, docs_url=None, redoc_url=None, openapi_url=None)

    async def health(self, request: Request) -> Response:
        """Name, version, whether images are scored, and how many wait; status 503 when none are."""
        self._admit(request)
        b = self.batcher
        said = {"status": "ok" if b.ready else "ending", "name": self.name, "version": VERSION, "ready": b.ready}
        return _json(said | {"queue": b.queued, "rows": b.rows, "scored": b.scored}, 200 if b.ready else 503)

    async def rewards(self, request: Request) -> Response:
        """Names of the rewards: one."""
        self._admit(request)
        return _json({"rewards": [self.name]})

    async def compute(self, request: Request) -> Response:
        """Flow-Factory's protocol: a score per image, null where there is none, and ``errors`` that say why."""
        _, scored = await self._scored(request, read_compute)
        errors = {"errors": [reason or None for reason in scored.reasons]} if any(scored.reasons) else {}
        return _json({"rewards": scored.scores, **errors})

    async def score(self, request: Request) -> Response:
        """UniRL's protocol."""
        asked, scored = await self._scored(request, read_score)
        results: list[dict[str, Any]] = []
        errors: list[dict[str, str]] = []
        for score, reason, names in zip(scored.scores, scored.reasons, asked.names, strict=True):
            mine = self.name in names
            results.append({self.name: {"score": score}} if mine and not reason else {})
            strange = {name: f"not served here, but {self.name} is" for name in names if name != self.name}
            errors.append(strange | ({self.name: reason} if mine and reason else {}))
        return _json({"results": results, "errors": errors})

    async def _scored(self, request: Request, read: Callable[[bytes, Bounds], Asked]) -> tuple[Asked, Scored]:
        """A request, and the scores of its images."""
        self._admit(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "send application/json")  # what a page of another site cannot send unasked
        if self.batcher.queued >= self.batcher.most:
            raise _busy()
        asked = await self._read(request, read)
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def settled() -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended meanwhile
                loop.call_soon_threadsafe(done.set)

        try:
            scored = self.batcher.submit(asked.images, asked.prompts, settled)
        except Full as error:
            raise _busy() from error
        while not done.is_set():
            try:
                await asyncio.wait_for(done.wait(), _LOOK)
            except TimeoutError:
                if await request.is_disconnected():
                    scored.given_up = True  # it will ask again, or not at all
                    raise HTTPException(499, "nobody waits for the answer") from None
        return asked, scored

    async def _read(self, request: Request, read: Callable[[bytes, Bounds], Asked]) -> Asked:
        """The request's images; what is read at one time is bounded too."""
        limit, declared = self.bounds.body, request.headers.get("content-length", "")
        size = int(declared) if declared.isascii() and declared.isdigit() else limit
        if size > limit:
            raise _too_large(limit)
        if self._reading + size > MOST_READ * limit:
            raise _busy()
        self._reading += size
        try:
            body = await asyncio.wait_for(_body(request, limit), ARRIVAL)
            return await asyncio.to_thread(read, body, self.bounds)
        except TimeoutError as error:
            raise HTTPException(408, f"no whole request within {ARRIVAL:g} s", {"Connection": "close"}) from error
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        except ClientDisconnect as error:
            raise HTTPException(499, "the request ended early") from error
        finally:
            self._reading -= size

    def _admit(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self.token and not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise HTTPException(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})


async def _body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"a request of more than {limit} bytes; send fewer images in one")


def _busy() -> HTTPException:
    return HTTPException(503, "too many images are waiting", {"Retry-After": RETRY_AFTER})


def _json(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")
