"""A scorer over HTTP that does what it is told: scores, is slow, breaks, answers nonsense, hangs, goes away."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy
from PIL import Image

Answer = tuple[int, Any]


def picture(text: str) -> numpy.ndarray:
    """Grey levels [H, W, 3] of a base64 file."""
    return numpy.array(Image.open(io.BytesIO(base64.b64decode(text))))


def brightness(body: dict[str, Any]) -> Answer:
    """The mean of each image, in the protocol of Flow-Factory."""
    return 200, {"rewards": [float(picture(text).mean() / 255) for text in body["image"]]}


class Faulty:
    """A server whose answers to POSTs come from ``behave(number of the request, body)``: a status and a value.

    A value of bytes is sent as it is, others as JSON; an exception cuts the connection.

    Attributes:
        seen: bodies of POSTs, in order.
        answered: how many of them got status 200.
        headers: of the last request.
        models: what GET /v1/models and /rewards list.
        coding: what answers to POSTs say of their encoding; empty says nothing.
    """

    def __init__(self, behave: Callable[[int, Any], Answer], port: int = 0) -> None:
        self.behave, self.seen, self.answered, self.headers = behave, [], 0, {}
        self.models, self.health, self.coding = ["judge"], 200, ""
        self.lock, self.leave = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.headers = dict(self.headers)
                listed = {"data": [{"id": name} for name in outer.models], "rewards": outer.models}
                self.send(outer.health, listed)

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(content) if self.headers["Content-Type"] == "application/json" else content
                with outer.lock:
                    outer.headers, number = dict(self.headers), len(outer.seen)
                    outer.seen.append(body)
                try:
                    status, value = outer.behave(number, body)
                except Exception:
                    self.close_connection = True
                    return
                with outer.lock:
                    outer.answered += status == 200
                self.send(status, value)

            def send(self, status: int, value: Any) -> None:
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                if outer.coding and self.command == "POST":
                    self.send_header("Content-Encoding", outer.coding)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = _Quiet(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def hang(self, seconds: float = 30.0) -> None:
        """Wait until the server closes."""
        self.leave.wait(seconds)

    def close(self) -> None:
        """Go away, in the middle of whatever it is doing."""
        self.leave.set()
        self.server.shutdown()
        self.server.server_close()


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, *args: Any) -> None:
        """A client that has gone is what some tests are about."""


@contextlib.contextmanager
def faulty(behave: Callable[[int, Any], Answer]) -> Iterator[Faulty]:
    """A server, gone afterwards."""
    server = Faulty(behave)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def restarting(after: int) -> Iterator[list[Faulty]]:
    """A scorer by brightness that dies after so many requests, with others in its hands, and comes back at its address: the one
    that dies, then the one that follows."""
    lost = threading.Event()

    def behave(number: int, body: Any) -> Answer:
        if number >= after:
            lost.set()
            servers[0].hang()
            raise ConnectionError
        return brightness(body)

    def restart() -> None:
        lost.wait(60)
        servers[0].close()
        time.sleep(0.3)
        servers.append(Faulty(lambda number, body: brightness(body), servers[0].server.server_port))

    servers = [Faulty(behave)]
    thread = threading.Thread(target=restart)
    thread.start()
    try:
        yield servers
    finally:
        lost.set()
        thread.join()
        servers[1].close()


def closed_port() -> int:
    """A port of this machine where nobody listens."""
    server = Faulty(lambda number, body: (200, {}))
    server.close()
    return server.server.server_port


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """What ``function()`` returns, which must not take longer."""
    started = time.monotonic()
    found = function()
    assert time.monotonic() - started < seconds
    return found
