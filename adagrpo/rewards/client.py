"""Asking a server for scores: bounded in time, in attempts and in size, and never waiting for what will not come.

A request that fails costs its own images only: they count as failed, with a reason. Retried are a busy or broken server and a
lost connection, nothing else; of several attempts at a request at most one answer is taken, so no image is scored twice.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from ..errors import InputError
from ..parts.isolation import GRACE, POLL, PartHung, stop_asked
from ..text.redaction import scrubbed
from ..text.strict_json import from_json
from ..text.user_text import cut, nearest, shown

T = TypeVar("T")
BUSY = (408, 429, 503)
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
MOST_ANSWER = 64 * 2**20
_JSON = "application/json"


class NoAnswer(Exception):
    """Why a request brought nothing that can be used.

    Attributes:
        kind: ``lost`` (no connection), ``late``, ``busy``, ``broken``, ``refused``; of an answer ``unreadable``, ``unscored``.
        status: of the answer; 0 where there is none, or the answer is not the reason.
    """

    def __init__(self, reason: str, kind: str = "unreadable", status: int = 0) -> None:
        super().__init__(reason)
        self.kind, self.status = kind, status


class _Again(NoAnswer):
    """Another attempt may do better; ``pause``: seconds the server asks to wait."""

    def __init__(self, reason: str, kind: str, status: int = 0, pause: float = 0.0) -> None:
        super().__init__(reason, kind, status)
        self.pause = pause


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long and how hard a server is asked: the table ``kwargs.limits`` of a reward that asks one.

    Attributes:
        timeout: seconds for one request and its answer.
        retries: further attempts at a request while the server is busy (408, 429), broken (5xx) or gone, after pauses of 0.5 s,
            1 s, ... 10 s, or as long as it asks for.
        deadline: seconds for all requests of one call; images without an answer by then have failed.
        concurrency: requests at a time.
        tries: how often a judge is asked until its answer can be read.
    """

    timeout: float = 60.0
    retries: int = 8
    deadline: float = 300.0
    concurrency: int = 8
    tries: int = 3

    @classmethod
    def of(cls, table: Mapping[str, Any] | None) -> Limits:
        """The limits of a recipe's table.

        Raises:
            InputError: an unknown name, or a value out of range.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in (table or {}).items():
            if name not in known:
                hint = f"{nearest(name, [*known])}: one of {', '.join(known)}"
                raise InputError(f"rewards: limits.{name} = {shown(value)}: unknown{hint}")
            whole = isinstance(known[name].default, int)
            low, high = (0 if name == "retries" else 1, 1024) if whole else (0.1, 86400)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
                kind = "a whole number" if whole else "seconds"
                raise InputError(f"rewards: limits.{name} = {shown(value)}: must be {kind} from {low} to {high}")
        return cls(**(table or {}))


class Client:
    """A server, asked by several threads over a pool of connections. Proxies of the environment are not used: they would
    also catch localhost.

    Args:
        url: where it is, ``http://host:port`` and perhaps a path.
        limits: of each call.
        token: sent as ``Authorization: Bearer``; empty sends none.

    Attributes:
        failures: images without a score so far, by the ``kind`` of the reason; ``unscored`` where the server gave none.

    Raises:
        InputError: not the address of a server, no token, or httpx is not installed.
    """

    def __init__(self, url: str, limits: Limits, token: str = "") -> None:
        check_url(url)
        if not (token.isascii() and token.isprintable()):
            raise InputError("rewards: the token is not printable ASCII text, which a header has to be; correct it")
        try:
            import httpx
        except ImportError as error:
            raise InputError("rewards: asking a server needs httpx; pip install 'adagrpo[rewards]'") from error
        self.url, self.limits = url.rstrip("/"), limits
        self.failures: Counter[str] = Counter()
        pool = httpx.Limits(max_connections=limits.concurrency, max_keepalive_connections=limits.concurrency)
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._http = httpx.Client(trust_env=False, limits=pool, headers=headers)
        self._late, self._lost, self._other = httpx.TimeoutException, httpx.TransportError, httpx.HTTPError
        weakref.finalize(self, self._http.close)

    def each(self, count: int, work: Callable[[int, Call[T]], T]) -> list[T | NoAnswer]:
        """What ``work(0, call)`` to ``work(count - 1, call)`` return or say they have no answer, in their order.

        Up to ``concurrency`` run at a time, in threads that are left behind when the call's time is over.

        Raises:
            PartHung: they do not end after the run was asked to stop.
            Exception: whatever else one of them raises.
        """
        return Call(self, count, work).wait()

    def ask(self, call: Call[Any], path: str, content: bytes | None = None, kind: str = _JSON) -> bytes:
        """The body of a successful answer to ``path``: to a POST of ``content``, else to a GET.

        Raises:
            NoAnswer: none in time, or none that could come.
        """
        pause = FIRST_PAUSE
        for attempt in range(self.limits.retries + 1):
            try:
                return self._once(call.end, path, content, kind)
            except _Again as error:
                pause = max(pause, min(error.pause, LONGEST_PAUSE))
                times = f" ({attempt + 1} times)" if attempt else ""
                if attempt == self.limits.retries or not call.pause(pause):
                    raise NoAnswer(f"{error}{times}", error.kind, error.status) from error
            pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError

    def _once(self, end: float, path: str, content: bytes | None, kind: str) -> bytes:
        """One attempt, over at ``end`` of the monotonic clock at the latest (and the time between two pieces of an answer)."""
        started = time.monotonic()
        seconds = min(self.limits.timeout, end - started)
        if seconds <= 0:
            raise NoAnswer("no time was left to ask", "late")
        method, headers = ("GET", {}) if content is None else ("POST", {"Content-Type": kind})
        try:
            with self._http.stream(method, self.url + path, content=content, headers=headers, timeout=seconds) as response:
                status, asked, body = response.status_code, response.headers.get("Retry-After", ""), bytearray()
                if (coding := response.headers.get("Content-Encoding", "identity")) != "identity":
                    raise NoAnswer(f"an answer in {shown(coding)}, which was not asked for: a little of it may unpack to a lot")
                for piece in response.iter_raw():
                    body += piece
                    if len(body) > MOST_ANSWER:
                        raise NoAnswer(f"an answer of more than {MOST_ANSWER // 2**20} MiB")
                    if time.monotonic() - started > seconds:
                        raise _Again(f"no whole answer within {seconds:.3g} s", "late")
        except self._other as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if not isinstance(error, self._lost):
                raise NoAnswer(reason) from error
            raise _Again(reason, "late" if isinstance(error, self._late) else "lost") from error
        if 200 <= status < 300:
            return bytes(body)
        reason = f"status {status}: {_detail(bytes(body))}"
        if status in BUSY or status >= 500:
            pause = float(asked) if asked.isascii() and asked.isdigit() else 0.0
            raise _Again(reason, "busy" if status in BUSY else "broken", status, pause)
        raise NoAnswer(reason, "refused", status)

    def require(self, path: str, statuses: tuple[int, ...] = ()) -> bytes:
        """The answer to a first GET of ``path``, asked once; empty where the status is another one of ``statuses``.

        Raises:
            InputError: no server answers there, or it refuses.
        """
        try:
            return self._once(time.monotonic() + min(self.limits.timeout, 10.0), path, None, _JSON)
        except NoAnswer as error:
            if error.status in statuses:
                return b""
            remedy = "start it, or correct kwargs.url"
            if error.status in (401, 403):
                remedy = "give it the token that it wants: env:VARIABLE reads one from the environment"
            raise InputError(f"rewards: the server at {self.url} does not answer {path or '/'} ({error}); {remedy}") from error

    def scores(self, answers: list[list[float] | NoAnswer], counts: list[int]) -> list[float]:
        """One number per image of requests of ``counts`` images each; NaN, and a warning that says why, where there is none."""
        found: list[float] = []
        reasons: Counter[str] = Counter()
        kinds: Counter[str] = Counter()
        for answer, count in zip(answers, counts, strict=True):
            if isinstance(answer, NoAnswer):
                reasons[str(answer)] += count
                kinds[answer.kind] += count
                answer = [math.nan] * count
            elif failed := sum(map(math.isnan, answer)):
                reasons["no score for them in the answer"] += failed
                kinds["unscored"] += failed
            found += answer
        if reasons:
            self.failures = self.failures + kinds  # another thread may be reading the former ones
            reason, others = reasons.most_common(1)[0][0], f" ({len(reasons) - 1} other reasons)" * (len(reasons) > 1)
            said = f"rewards: {self.url}: no score for {reasons.total()} of {len(found)} images: {reason}{others}"
            warnings.warn(scrubbed(said), RuntimeWarning, stacklevel=3)  # a server may say the token that it refuses
        return found


class Call(Generic[T]):
    """Pieces of work in threads of their own, until all are done or the time is over.

    Attributes:
        end: when the time is over, of the monotonic clock.
    """

    def __init__(self, client: Client, count: int, work: Callable[[int, Call[T]], T]) -> None:
        self.url, self.limits, self.work = client.url, client.limits, work
        self.end = time.monotonic() + client.limits.deadline
        self._over = threading.Event()
        self._changed = threading.Condition()
        self._todo, self._left = iter(range(count)), count
        self._found: list[T | NoAnswer | None] = [None] * count
        self._error: BaseException | None = None

    def pause(self, seconds: float) -> bool:
        """Wait; whether it is worth going on then."""
        return time.monotonic() + seconds < self.end and not self._over.wait(seconds)

    def wait(self) -> list[T | NoAnswer]:
        """See ``Client.each``."""
        for _ in range(min(self.limits.concurrency, self._left)):
            threading.Thread(target=self._run, name="adagrpo-client", daemon=True).start()
        try:
            with self._changed:
                self._wait()
                if self._error is not None:
                    raise self._error
                late = NoAnswer(f"no answer within limits.deadline = {self.limits.deadline:g} s", "late")
                return [late if found is None else found for found in self._found]
        finally:
            self._over.set()  # what comes later was not taken

    def _wait(self) -> None:
        leave = float("inf")
        while self._left and self._error is None and time.monotonic() < self.end + 1:  # they give up by themselves
            self._changed.wait(POLL)
            if stop_asked():
                leave = min(leave, time.monotonic() + GRACE / 2)
            if time.monotonic() > leave:
                raise PartHung(f"{self.url} had not answered {GRACE / 2:g} s after the request to stop")

    def _run(self) -> None:
        while True:
            with self._changed:
                number = None if self._over.is_set() else next(self._todo, None)
            if number is None:
                return
            found: T | NoAnswer | None = None
            error: BaseException | None = None
            try:
                found = self.work(number, self)
            except NoAnswer as reason:
                found = reason
            except BaseException as other:
                error = other
            with self._changed:
                self._found[number], self._error, self._left = found, self._error or error, self._left - 1
                self._changed.notify()


def check_url(url: str) -> None:
    """Refuse what is no address of a server.

    Raises:
        InputError: it is none.
    """
    try:
        parts = urlsplit(url)
        sound = (
            parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment or "@" in parts.netloc)
        )
        sound = sound and (parts.port is None or parts.port > 0) and url.isprintable() and " " not in url
    except ValueError:
        sound = False
    if not sound:
        raise InputError(f"rewards: url = {shown(url)}: not the address of a server; write http://host:port")


def read_json(body: bytes) -> Any:
    """The value of an answer.

    Raises:
        NoAnswer: not JSON.
    """
    try:
        return from_json(body)
    except ValueError as error:
        raise NoAnswer(f"the answer is no JSON: {_start(body)}") from error


def _detail(body: bytes) -> str:
    """What a server says of a failure."""
    try:
        found = from_json(body)
        found = found.get("detail", found.get("error", found)) if isinstance(found, dict) else found
        found = found.get("message", found) if isinstance(found, dict) else found
        return cut(found, 200) if isinstance(found, str) else shown(found, 200)
    except ValueError:
        return _start(body)


def _start(body: bytes) -> str:
    return shown(body[:400].decode("utf-8", "replace"), 200)
