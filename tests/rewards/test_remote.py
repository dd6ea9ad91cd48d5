"""Scores over HTTP: each image gets its own score once, whatever the server does, and nothing waits for ever."""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import pickle
import threading
import time
from datetime import date

import numpy
import pytest
import torch
from fault_server import Faulty, brightness, closed_port, faulty, picture, restarting, within
from PIL import Image

from adagrpo.errors import InputError
from adagrpo.parts.isolation import PartHung, leaving_when
from adagrpo.prompts.prompt import Prompt
from adagrpo.rewards import build_reward, check_reward_files, client, pickled
from adagrpo.rewards.pickled import restricted_loads
from adagrpo.rewards.remote import Remote

QUICK = {"timeout": 5.0, "retries": 2, "deadline": 20.0, "concurrency": 4}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.05)


def images(count: int, side: int = 8) -> torch.Tensor:
    """Each of one grey level of its own."""
    levels = torch.arange(count, dtype=torch.uint8)[:, None, None, None] * 2 + 1
    return levels.expand(count, 3, side, side).contiguous()


def expected(count: int) -> list[float]:
    return [(2 * i + 1) / 255 for i in range(count)]


def scored(remote: Remote, count: int) -> list[float]:
    return remote(images(count), [f"p{i}" for i in range(count)]).tolist()


def complained(remote: Remote, count: int) -> tuple[list[float], str]:
    """Scores, and why some are missing."""
    with pytest.warns(RuntimeWarning) as told:
        found = scored(remote, count)
    (said,) = [str(warning.message) for warning in told if warning.category is RuntimeWarning]
    assert remote.client.url in said
    return found, said


def remote(server: Faulty, **kwargs) -> Remote:
    limits = {**QUICK, **kwargs.pop("limits", {})}
    return Remote(server.url, **{"per_request": 3, "limits": limits, **kwargs})


def test_scores_come_in_order_and_each_image_is_sent_once() -> None:
    with faulty(lambda number, body: brightness(body)) as server:
        found = scored(remote(server), 20)
    assert found == pytest.approx(expected(20), abs=1e-12)
    sent = sorted(
        (prompt, int(picture(text).mean()))
        for body in server.seen
        for prompt, text in zip(body["prompt"], body["image"], strict=True)
    )
    assert sent == sorted((f"p{i}", 2 * i + 1) for i in range(20))
    assert [len(body["image"]) for body in server.seen].count(3) == 6 and len(server.seen) == 7
    assert server.seen[0]["kwargs"] is None


def test_metadata_token_and_jpeg_are_sent() -> None:
    with faulty(lambda number, body: brightness(body)) as server:
        one = remote(server, token="a token", image="jpeg")
        told = Prompt("told", {"include": [{"class": "cat"}], "day": date(2024, 5, 6)})
        assert one(images(2), ["plain", told]).isfinite().all()
    assert server.headers["Authorization"] == "Bearer a token"
    assert server.seen[0]["kwargs"] == {"metadata": [{}, {"include": [{"class": "cat"}], "day": "2024-05-06"}]}
    assert Image.open(io.BytesIO(base64.b64decode(server.seen[0]["image"][0]))).format == "JPEG"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_or_broken_server_is_asked_again(status: int) -> None:
    """Every other request breaks; no image is scored by two answers."""
    with faulty(lambda number, body: (status, {"detail": "busy"}) if number % 2 else brightness(body)) as server:
        found = scored(remote(server, limits={"retries": 9}), 12)
    assert found == pytest.approx(expected(12), abs=1e-12)
    assert server.answered == 4


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_a_refusal_is_not_repeated(status: int) -> None:
    with faulty(lambda number, body: (status, {"detail": "no such thing"})) as server:
        one = remote(server)
        found, said = complained(one, 6)
        complained(one, 2)
    assert all(map(math.isnan, found)) and len(server.seen) == 3
    reason = f"status {status}: no such thing"
    assert said.endswith(f"no score for 6 of 6 images: {reason}") and one.failures == {"refused": 8}


def test_attempts_are_bounded() -> None:
    with faulty(lambda number, body: (500, b"<html>")) as server:
        found, said = complained(remote(server, limits={"concurrency": 1}), 3)
    assert all(map(math.isnan, found)) and len(server.seen) == 3
    assert "status 500" in said and "<html>" in said and "3 times" in said


GARBAGE = {
    "no JSON": b"\xff\xfe scores!",
    "no table": [1, 2, 3],
    "no rewards": {"scores": [1, 2, 3]},
    "error": {"error": "out of memory"},
    "too few": {"rewards": [1, 2]},
    "too many": {"rewards": [1, 2, 3, 4]},
    "text": {"rewards": "123"},
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_fails_its_own_images_only(kind: str) -> None:
    """One request of three is answered so: nobody knows which score belongs to which image, so none counts."""

    def behave(number, body):
        return (200, GARBAGE[kind]) if body["prompt"][0] == "p3" else brightness(body)

    with faulty(behave) as server:
        one = remote(server)
        found, said = complained(one, 9)
    assert all(map(math.isnan, found[3:6]))
    assert found[:3] + found[6:] == pytest.approx(expected(9)[:3] + expected(9)[6:], abs=1e-12)
    assert len(server.seen) == 3 and "3 of 9 images" in said
    assert one.failures == {"broken" if kind == "error" else "unreadable": 3}


def test_an_answer_that_would_be_unpacked_is_refused() -> None:
    """A bomb: it is small, and what is in it is not."""

    def behave(number, body):
        return 200, gzip.compress(gzip.compress(b'{"rewards": [1, 2, 3]}' + b" " * 10**6))

    with faulty(behave) as server:
        server.coding = "gzip, gzip"
        found, said = complained(remote(server), 3)
    assert all(map(math.isnan, found)) and "'gzip, gzip', which was not asked for" in said and len(server.seen) == 1


def test_a_token_that_a_server_repeats_is_not_told() -> None:
    with faulty(lambda number, body: (403, {"detail": "not with the token pa55-the-word"})) as server:
        kwargs = {"url": server.url, "token": "pa55-the-word", "limits": QUICK}
        found, said = complained(build_reward("remote", kwargs), 2)
    assert all(map(math.isnan, found)) and "pa55" not in said and "not with the token <redacted>" in said


def test_single_scores_that_are_no_numbers_fail_alone() -> None:
    odd = b'{"rewards": [0.5, NaN, null, "1.0", true, Infinity, [1.0], -2, 1e999, %d]}' % 10**400
    with faulty(lambda number, body: (200, odd)) as server:
        found, said = complained(remote(server, per_request=10), 10)
    assert [i for i, value in enumerate(found) if not math.isnan(value)] == [0, 7] and (found[0], found[7]) == (0.5, -2.0)
    assert "8 of 10 images" in said


def test_a_slow_server_is_waited_for_and_a_hanging_one_is_not() -> None:
    def behave(number, body):
        if "p4" in body["prompt"]:
            server.hang()
        time.sleep(0.05)
        return brightness(body)

    with faulty(behave) as server:
        one = remote(server, per_request=1, limits={"timeout": 0.4, "retries": 1})
        found, said = within(10, lambda: complained(one, 8))
    assert math.isnan(found[4]) and found[:4] + found[5:] == pytest.approx(expected(8)[:4] + expected(8)[5:], abs=1e-12)
    assert "1 of 8 images" in said and "Timeout" in said and "2 times" in said and one.failures == {"late": 1}


def test_an_answer_that_drips_and_a_call_without_end_are_left() -> None:
    """The bytes never stop coming, so that no wait for one of them is long."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=drip, args=(connection,), daemon=True).start()

    def drip(connection: socket.socket) -> None:
        first = connection.recv(1 << 20).startswith(b"GET")
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}" if first else b"HTTP/1.1 200 OK\r\nX-Slow: "
        try:
            connection.sendall(head)
            while not over.wait(0.02):
                connection.sendall(b"z")
        except OSError:
            pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        one = Remote(f"http://127.0.0.1:{listener.getsockname()[1]}", limits={**QUICK, "timeout": 0.3, "deadline": 0.5})
        found, said = within(10, lambda: complained(one, 2))
        assert all(map(math.isnan, found)) and "limits.deadline = 0.5 s" in said
    finally:
        over.set()
        listener.close()


def test_a_server_that_restarts_loses_nothing() -> None:
    """It dies with requests in its hands and comes back at the same address."""
    with restarting(after=2) as servers:
        one = Remote(servers[0].url, per_request=1, limits={**QUICK, "retries": 100})
        assert within(20, lambda: scored(one, 12)) == pytest.approx(expected(12), abs=1e-12)
        assert sum(server.answered for server in servers) == 12


def test_a_dead_server_is_found_at_the_start() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    for name, kwargs in (("remote", {}), ("judge", JUDGE), ("unifiedreward", {"template": JUDGE["template"]})):
        with pytest.raises(InputError, match=rf"{url}.*start it, or correct kwargs\.url"):
            within(10, lambda name=name, kwargs=kwargs: build_reward(name, {"url": url, **kwargs}))
        check_reward_files(name, {"url": url, **kwargs})  # asks nobody


JUDGE = {"model": "m", "template": __file__, "pattern": r"(\d)", "low": 0, "high": 9}


@pytest.mark.parametrize("health", [401, 500])
def test_a_server_that_refuses_is_found_at_the_start(health: int) -> None:
    with faulty(lambda number, body: brightness(body)) as server:
        server.health = health
        with pytest.raises(InputError, match=f"status {health}.*{'token' if health == 401 else 'start it'}"):
            remote(server)


def test_a_run_that_is_asked_to_stop_does_not_wait_for_a_server(monkeypatch) -> None:
    monkeypatch.setattr(client, "GRACE", 0.4)
    with faulty(lambda number, body: server.hang() or brightness(body)) as server, leaving_when(lambda: True):
        one = remote(server)
        with pytest.raises(PartHung, match=server.url):
            within(3, lambda: scored(one, 3))


def test_proxies_of_the_environment_are_not_used(monkeypatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")
    with faulty(lambda number, body: brightness(body)) as server:
        assert scored(remote(server), 2) == pytest.approx(expected(2), abs=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"url": "localhost:80"}, "http://host:port"),
        ({"url": "http://"}, "http://host:port"),
        ({"url": "http://h:99999"}, "http://host:port"),
        ({"url": "http://h/?a=b"}, "http://host:port"),
        ({"url": "http://name:word@h"}, "http://host:port"),
        ({"protocol": "flow-factor"}, "did you mean flow-factory"),
        ({"protocol": "flow-grpo"}, "allow_pickle = true"),
        ({"image": "gif"}, "png, jpeg"),
        ({"per_request": 0}, "from 1 to 1024"),
        ({"limits": {"timeot": 3}}, "did you mean timeout"),
        ({"limits": {"timeout": "3"}}, "must be seconds"),
        ({"limits": {"retries": 1.5}}, "must be a whole number"),
        ({"token": "env:NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE"),
    ],
)
def test_arguments_are_refused_before_anybody_is_asked(kwargs: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_reward_files("remote", {"url": "http://localhost:1", **kwargs})


# ---- UniRL ---------------------------------------------------------------------------------------------------------------


def unirl(number, body):
    results = [{"hps": {"score": float(picture(one["history"][0]["image_b64"]).mean() / 255)}} for one in body["requests"]]
    return 200, {"results": results, "errors": [{} for _ in results]}


def test_unirl_by_its_only_reward() -> None:
    with faulty(unirl) as server:
        server.models = ["hps"]
        one = remote(server, protocol="unirl", image="png")
        found = one(images(4), [Prompt(f"p{i}", {"tag": i}) for i in range(4)]).tolist()
    assert found == pytest.approx(expected(4), abs=1e-12)
    asked = [entry for body in server.seen for entry in body["requests"]]
    assert {(a["history"][0]["text"], a["metadata"]["tag"], *a["required_rewards"]) for a in asked} == {
        (f"p{i}", i, "hps") for i in range(4)
    }


def test_unirl_failures_and_metrics() -> None:
    answer = {"results": [{"hps": {"a": 1, "b": 2}}, {}, {"hps": {"a": None, "b": 4}}], "errors": [{}, {"hps": "no"}, {}]}
    with faulty(lambda number, body: (200, answer)) as server:
        server.models = ["hps", "clip"]
        with pytest.raises(InputError, match="hps, clip"):
            remote(server, protocol="unirl")
        found, _ = complained(remote(server, protocol="unirl", reward="hps/b"), 3)
        assert found[0] == 2 and math.isnan(found[1]) and found[2] == 4
        one = remote(server, protocol="unirl", reward="hps")
        found, said = complained(one, 3)
        assert all(map(math.isnan, found)) and "hps/METRIC" in said


# ---- pickle --------------------------------------------------------------------------------------------------------------


def levels(body: bytes) -> list[float]:
    """What the servers of Flow-GRPO do: their own unpickling, JPEG files."""
    sent = pickle.loads(body)
    return [numpy.array(Image.open(io.BytesIO(file), formats=["jpeg"])).mean() / 255 for file in sent["images"]]


@pytest.mark.parametrize("protocol", ["flow-grpo", "verl-omni"])
@pytest.mark.parametrize("form", ["floats", "scalars", "array"])
def test_pickle_servers(protocol: str, form: str) -> None:
    forms = {
        "floats": lambda x: [float(v) for v in x],
        "scalars": lambda x: [numpy.float32(v) for v in x],
        "array": numpy.array,
    }
    key = "outputs" if protocol == "flow-grpo" else "scores"
    with faulty(lambda number, body: (200, pickle.dumps({key: forms[form](levels(body))}))) as server:
        one = remote(server, protocol=protocol, allow_pickle=True)
        found = one(images(7), [Prompt(f"p{i}", {"tag": i}) for i in range(7)]).tolist()
    assert found == pytest.approx(expected(7), abs=1e-7 if form == "scalars" else 1e-12)
    first = [pickle.loads(body) for body in server.seen]
    assert {len(body["images"]) for body in first} == ({3, 1} if protocol == "flow-grpo" else {1})
    if protocol == "flow-grpo":
        assert sorted(data["tag"] for body in first for data in body["meta_datas"]) == list(range(7))


RAN: list[int] = []


def program(number: int) -> float:
    RAN.append(number)
    return 1.0


class Program:
    def __reduce__(self):
        return program, (1,)


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "copyreg._reconstructor", "numpy.testing.verbose"])
def test_a_pickle_that_names_anything_is_refused_by_name(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    content = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"X\x04\x00\x00\x00true\x85R."
    with pytest.raises(ValueError, match=f"{name}, which is refused"):
        restricted_loads(content)


def test_a_pickled_program_does_not_run() -> None:
    content = pickle.dumps({"scores": [Program()]})
    with faulty(lambda number, body: (200, content)) as server:
        one = remote(server, protocol="flow-grpo", allow_pickle=True)
        found, said = complained(one, 3)
    assert all(map(math.isnan, found)) and not RAN and "program, which is refused" in said
    pickle.loads(content)
    assert RAN.pop() == 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_and_numpy_come_out_of_every_protocol(protocol: int) -> None:
    values = {"a": [1, 2.5, None, True, "ü", b"\xff"], "t": (1,)}
    arrays = [
        numpy.arange(6.0).reshape(2, 3),
        numpy.array([1, -2], ">i2"),
        numpy.float16(0.5),
        numpy.array(7, "u8"),
        numpy.array([]),
    ]
    found = restricted_loads(pickle.dumps({**values, "n": arrays}, protocol))
    assert found == {"a": values["a"], "t": [1], "n": [[[0, 1, 2], [3, 4, 5]], [1, -2], 0.5, 7, []]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        b"garbage",
        pickle.dumps([1.5] * 50)[:-20],
        pickle.dumps(numpy.array(["text"])),
        pickle.dumps(numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3))),
        pickle.dumps(numpy.array([object], dtype=object)),
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo of 2^31 places
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # a bytearray of 2^40
    ],
)
def test_broken_and_wasteful_pickles_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="pickle"):
        within(5, lambda: restricted_loads(content))


def test_a_small_pickle_does_not_become_a_large_value(monkeypatch) -> None:
    monkeypatch.setattr(pickled, "_MOST", 10_000)
    value: list = []
    for _ in range(60):
        value = [value, value]
    with pytest.raises(ValueError, match="more than"):
        within(20, lambda: restricted_loads(pickle.dumps(value)))


def test_json_is_what_is_sent() -> None:
    """Bodies are standard JSON whatever the metadata holds."""
    with faulty(lambda number, body: brightness(body)) as server:
        remote(server)(images(1), [Prompt("p", {"ü": [1, None, "\u2028"]})])
    assert json.dumps(server.seen[0]["kwargs"]["metadata"]) == json.dumps([{"ü": [1, None, "\u2028"]}])
