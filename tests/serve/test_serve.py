"""A reward behind `adagrpo serve`: the scores it gives beside the trainer, batched across requests, within limits."""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
import uvicorn
from fault_server import within
from PIL import Image

from adagrpo.cli import main
from adagrpo.errors import InputError
from adagrpo.prompts.prompt import Prompt, data_of
from adagrpo.rewards import build_reward, client
from adagrpo.rewards.pictures import decoded, encoded
from adagrpo.rewards.remote import Remote
from adagrpo.serve.app import Service
from adagrpo.serve.batching import Batcher
from adagrpo.serve.command import _entry, _listening
from adagrpo.serve.wire import Bounds
from adagrpo.version import VERSION


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.05)


def images(count: int, height: int = 8, width: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


class Recording:
    """Mean level plus the length of the prompt and the number it carries; sizes of its calls are kept.

    A prompt can ask for a failure, or for no score.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls: list[int] = []
        self.seconds, self.free = seconds, threading.Event()
        self.free.set()

    def __call__(self, images, prompts):
        assert images.dtype == torch.float32 and float(images.max()) <= 1
        self.free.wait(20)
        time.sleep(self.seconds)
        self.calls.append(len(images))
        if any("poison" in prompt for prompt in prompts):
            raise RuntimeError("cannot read this")
        extra = [float("nan") if "none" in p else len(p) + data_of(p).get("tag", 0) for p in prompts]
        return images.double().mean((1, 2, 3)) + torch.tensor(extra, dtype=torch.float64)


def truth(pictures: torch.Tensor, prompts) -> list[float]:
    return [
        float(x.float().div(255).double().mean()) + len(p) + data_of(p).get("tag", 0)
        for x, p in zip(pictures, prompts, strict=True)
    ]


@contextlib.contextmanager
def serving(
    reward, token: str = "", bounds: Bounds | None = None, rows: int = 16, wait: float = 0.02, most: int = 256
) -> Iterator[str]:
    batcher = Batcher(reward, "r", torch.device("cpu"), rows, wait, most)
    app = Service(batcher, "r", token, bounds or Bounds()).app()
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=5))
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        batcher.close(10)


def asked(url: str, path: str = "/compute", token: str = "", **body):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.post(url + path, json=body, headers=headers, trust_env=False, timeout=20)


def files(pictures: torch.Tensor) -> list[str]:
    return [base64.b64encode(encoded(picture, "png")).decode() for picture in pictures]


def test_scores_are_those_of_the_reward_itself_over_both_protocols() -> None:
    pictures, prompts = images(21), [Prompt("p" * i, {"tag": 100 * i} if i % 3 else {}) for i in range(21)]
    with serving(Recording()) as url:
        for protocol in ("flow-factory", "unirl"):
            found = Remote(url, protocol, image="png", per_request=4)(pictures, prompts)
            assert found.tolist() == pytest.approx(truth(pictures, prompts), abs=1e-9)


def test_images_of_several_requests_go_through_the_reward_together() -> None:
    """Twelve requests of two images arrive while a first one is being scored."""
    reward = Recording()
    reward.free.clear()
    with serving(reward, rows=8) as url, ThreadPoolExecutor(13) as pool:
        first = pool.submit(asked, url, prompt=["x"], image=files(images(1)))
        while httpx.get(f"{url}/health").json()["queue"] == 0:
            time.sleep(0.01)
        time.sleep(0.1)
        others = [pool.submit(asked, url, prompt=["a", "bb"], image=files(images(2 + i)[:2])) for i in range(12)]
        while httpx.get(f"{url}/health").json()["queue"] < 25:
            time.sleep(0.01)
        reward.free.set()
        assert first.result().status_code == 200
        for i, other in enumerate(others):
            assert other.result().json()["rewards"] == pytest.approx(truth(images(2 + i)[:2], ["a", "bb"]), abs=1e-9)
    assert reward.calls == [1, 8, 8, 8]


def test_images_of_different_sizes_are_never_mixed_and_a_lone_one_does_not_wait_long() -> None:
    reward = Recording()
    with serving(reward) as url:
        pictures = [images(1)[0], images(1, 8, 16)[0], images(2)[1], images(1, 8, 16)[0]]
        body = asked(url, prompt=["p"] * 4, image=[files(p[None])[0] for p in pictures]).json()
    assert body["rewards"] == pytest.approx([truth(p[None], ["p"])[0] for p in pictures], abs=1e-9)
    assert sorted(reward.calls) == [2, 2]


def test_a_failure_takes_no_other_image_with_it_and_is_never_a_score() -> None:
    prompts = ["a", "poison", "none", "b", "c"]
    with serving(Recording()) as url:
        answer = asked(url, prompt=prompts, image=files(images(5)))
        turns = [{"text": text, "image_b64": file} for text, file in zip(prompts, files(images(5)), strict=True)]
        unirl = asked(url, "/score", requests=[{"history": [turn], "required_rewards": ["r", "other"]} for turn in turns])
        with pytest.warns(RuntimeWarning, match="2 of 5 images"):
            found = Remote(url, limits={"retries": 0})(images(5), prompts).tolist()
    body = answer.json()
    assert answer.status_code == 200 and "NaN" not in answer.text
    assert [value is None for value in body["rewards"]] == [False, True, True, False, False]
    assert "cannot read this" in body["errors"][1] and body["errors"][0] is None
    assert [sorted(result) for result in unirl.json()["results"]] == [["r"], [], [], ["r"], ["r"]]
    assert [sorted(error) for error in unirl.json()["errors"]] == [
        ["other"],
        ["other", "r"],
        ["other", "r"],
        ["other"],
        ["other"],
    ]
    assert [value != value for value in found] == [False, True, True, False, False]


def test_rewards_of_the_host_get_bytes() -> None:
    class Host:
        host = True

        def __call__(self, images, prompts):
            assert images.dtype == torch.uint8
            return images[:, 0, 0, 0].double()

    with serving(Host()) as url:
        remote = Remote(url)
        assert remote(images(9), ["p"] * 9).tolist() == images(9)[:, 0, 0, 0].tolist()
    assert remote.provenance == {"image": "png", "server_name": "r", "server_version": VERSION}


def one() -> dict:
    return {"prompt": ["p"], "image": files(images(1))}


def deep() -> str:
    """A PNG file of 16 bits a value."""
    file = io.BytesIO()
    Image.new("I;16", (4, 4), 4000).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def small() -> Iterator[str]:
    """A server that takes little."""
    with serving(Recording(), bounds=Bounds(30_000, 4, 64)) as url:
        yield url


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"image": ["!!!"]}, 422, "image 0"),
        ({"image": [base64.b64encode(b"GIF89a").decode()]}, 422, "not a PNG or JPEG"),
        ({"image": [files(images(1))[0][:60]]}, 422, "image 0"),
        ({"image": [deep()]}, 422, "mode I;16: more than 8 bits a value"),
        ({"image": [3]}, 422, "not text in base64"),
        ({"image": None}, 422, "image is None, not a list"),
        ({"image": files(images(1, 8, 80))}, 422, "80 x 8 pixels; at most 64"),
        ({"image": files(images(5)), "prompt": ["p"] * 5}, 422, "5 images; send 1 to 4"),
        ({"image": [], "prompt": []}, 422, "0 images"),
        ({"prompt": ["p", "q"]}, 422, "2 prompts, 1 images"),
        ({"prompt": [None]}, 422, "prompt 0 is None"),
        ({"prompt": ["p" * 20_001]}, 422, "longer than 20000"),
        ({"prompt": ["a\x00"]}, 422, "control character"),
        ({"kwargs": {"metadata": ["x"]}}, 422, "metadata 0"),
        ({"video": [["x"]]}, 422, "videos"),
        ({"padding": "x" * 40_000}, 413, "more than 30000 bytes"),
    ],
)
def test_requests_are_checked(small: str, change: dict, status: int, said: str) -> None:
    answer = asked(small, **{**one(), **change})
    assert answer.status_code == status and said in answer.json()["detail"]


def test_what_is_no_request_is_refused(small: str) -> None:
    post = lambda content, **headers: httpx.post(f"{small}/compute", content=content, headers=headers)  # noqa: E731
    assert post(b"{}").status_code == 415
    assert post(b"{", **{"content-type": "application/json"}).status_code == 422
    assert post(b"[" * 9_000, **{"content-type": "application/json"}).status_code == 422
    streamed = httpx.post(f"{small}/compute", content=iter([b"x" * 9_000] * 9), headers={"content-type": "application/json"})
    assert streamed.status_code == 413
    assert httpx.get(f"{small}/compute").status_code == 405
    assert httpx.get(f"{small}/docs").status_code == 404
    assert asked(small, **one()).status_code == 200


def test_the_token_is_wanted_for_everything() -> None:
    with serving(Recording(), token="the token") as url:
        for path in ("/health", "/rewards"):
            assert httpx.get(url + path).status_code == 401
            assert httpx.get(url + path, headers={"Authorization": "Bearer the token"}).status_code == 200
        for token in ("", "wrong", "the token2"):
            assert asked(url, token=token, **one()).status_code == 401
        assert Remote(url, token="the token")(images(2), ["p", "q"]).isfinite().all()
        with pytest.raises(InputError, match=r"status 401.*token"):
            Remote(url, token="wrong")


def test_too_many_images_are_told_to_come_again_and_none_is_lost() -> None:
    reward = Recording(0.02)
    with serving(reward, rows=4, most=8) as url:
        pictures = images(40)
        found = Remote(url, per_request=4, limits={"concurrency": 10, "retries": 200})(pictures, ["p"] * 40)
        reward.free.clear()
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(asked, url, prompt=["p"] * 4, image=files(images(4))) for _ in range(3)]
            while httpx.get(f"{url}/health").json()["queue"] < 8:
                time.sleep(0.01)
            busy = asked(url, prompt=["p"] * 4, image=files(images(4)))
            reward.free.set()
            assert {w.result().status_code for w in waiting} <= {200, 503}
    assert found.tolist() == pytest.approx(truth(pictures, ["p"] * 40), abs=1e-9)
    assert busy.status_code == 503 and busy.headers["Retry-After"] == "1"


def test_only_so_much_is_read_at_one_time(monkeypatch) -> None:
    """The first request never ends; the next one does not fit beside it."""
    monkeypatch.setattr("adagrpo.serve.app.MOST_READ", 1)
    with serving(Recording(), bounds=Bounds(5_000)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as endless:
            head = "POST /compute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 4900\r\n\r\n{"
            endless.sendall(head.encode())
            while (busy := asked(url, **one())).status_code != 503:
                time.sleep(0.01)
        while (answer := asked(url, **one())).status_code == 503:
            time.sleep(0.01)
    assert busy.headers["Retry-After"] == "1" and answer.status_code == 200


def test_a_request_whose_sender_is_gone_does_not_keep_its_place(monkeypatch) -> None:
    """It never ends, and nobody closes its connection."""
    monkeypatch.setattr("adagrpo.serve.app.MOST_READ", 1)
    monkeypatch.setattr("adagrpo.serve.app.ARRIVAL", 0.2)
    with serving(Recording(), bounds=Bounds(5_000)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as silent:
            head = "POST /compute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 4900\r\n\r\n{"
            silent.sendall(head.encode())
            answer = b""
            while more := silent.recv(4096):
                answer += more
        assert answer.startswith(b"HTTP/1.1 408 ") and b"no whole request within 0.2 s" in answer
        assert asked(url, **one()).status_code == 200


def test_images_that_unpack_to_too_much_are_refused_before_the_rest_is_unpacked(monkeypatch) -> None:
    unpacked = []
    monkeypatch.setattr("adagrpo.serve.wire.decoded", lambda *given: unpacked.append(1) or decoded(*given))
    with serving(Recording(), bounds=Bounds(pixels=150)) as url:
        answer = asked(url, prompt=["p"] * 9, image=files(images(9)))
        assert asked(url, prompt=["p"] * 2, image=files(images(2))).status_code == 200
    assert answer.status_code == 422 and "more than 150 pixels in 3 of 9 images" in answer.json()["detail"]
    assert len(unpacked) == 3 + 2


def test_work_that_nobody_waits_for_is_dropped(monkeypatch) -> None:
    monkeypatch.setattr("adagrpo.serve.app._LOOK", 0.05)
    reward = Recording()
    reward.free.clear()
    with serving(reward, rows=1) as url:
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/compute", json=one(), timeout=0.2)
        time.sleep(0.2)
        reward.free.set()
        assert asked(url, **one()).status_code == 200
    assert len(reward.calls) == 2  # the one that was in its hands, and the last


# ---- the command -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["brightnes"], "unknown reward"),
        (["brightness", "--host", "0.0.0.0"], "ask for a token"),
        (["brightness", "--token", "word"], "env:VARIABLE"),
        (["brightness", "--token", "env:NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE"),
        (["brightness", "--port", "70000"], "at most 65535"),
        (["brightness", "--kwargs.x", "1"], "does not take kwargs x"),
        (["brightness", "--strange", "1"], "unrecognized arguments: --strange"),
        (["brightness", "--recipe", "tiny"], r"not one of its rewards: 0 \(tiny\)"),
        (["brightness", "--dtype", "bf16"], "no weights"),
        (["brightness", "--host", "192.0.2.1", "--token", "env:HOME"], "name an"),
    ],
)
def test_the_command_refuses_what_it_cannot_serve(words: list[str], said: str, capsys) -> None:
    with _listening("127.0.0.1", 0) as taken:  # so that nothing is served whatever happens
        assert main(["serve", "--port", str(taken.getsockname()[1]), *words]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_an_entry_of_a_recipe_is_served_with_its_keys(tmp_path) -> None:
    (tmp_path / "r.toml").write_text(
        'base = "tiny"\n[[rewards]]\nname = "brightness"\n[[rewards]]\nname = "clip"\ndtype = "bf16"\nrows = 7\n'
        'kwargs = {path = "here", architecture = {heads = 2, patch = 4}}\n'
    )
    for named in ("clip", "1"):
        args = argparse.Namespace(reward=named, recipe=str(tmp_path / "r.toml"))
        entry = _entry(args, ["--kwargs.path", "there", "--kwargs.architecture.heads", "3"])
        assert (entry.name, entry.dtype, entry.rows) == ("clip", "bf16", 7)
        assert entry.kwargs == {"path": "there", "architecture": {"heads": 3, "patch": 4}}


def test_a_port_that_is_taken_is_found_before_the_reward_is_loaded(capsys) -> None:
    with _listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", f"{__name__}:Recording", "--port", str(port), "--kwargs.seconds", "1"]) == 2
        said = capsys.readouterr().err
    assert f"--port {port}: Address already in use" in said and said.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_accepted_requests_finish_and_refuses_new_ones(number: signal.Signals, tmp_path) -> None:
    """The whole command, in a process of its own, over a user's reward that takes half a second."""
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "class Slow:\n"
        "    def __init__(self, factor): self.factor = factor\n"
        "    def __call__(self, images, prompts):\n"
        "        time.sleep(0.7)\n"
        "        return images.float().mean((1, 2, 3)) * self.factor\n"
    )
    words = ["serve", "slow:Slow", "--kwargs.factor", "2", "--port", "0", "--rows", "1", "--token", "env:WORD"]
    code = "import sys; from adagrpo.cli import main; sys.exit(main())"
    environment = {**os.environ, "WORD": "a word of six", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with ThreadPoolExecutor(3) as pool:
            pictures = images(3)
            waiting = [pool.submit(asked, url, token="a word of six", prompt=["p"], image=files(p[None])) for p in pictures]
            while httpx.get(f"{url}/health", headers={"Authorization": "Bearer a word of six"}).json()["queue"] < 3:
                time.sleep(0.02)
            process.send_signal(number)
            time.sleep(0.4)
            process.send_signal(number)  # changes nothing
            with pytest.raises(httpx.TransportError):
                asked(url, token="a word of six", prompt=["p"], image=files(images(1)))
            found = [w.result().json()["rewards"][0] for w in waiting]
        assert found == pytest.approx([float(p.double().mean()) / 255 * 2 for p in pictures], abs=1e-6)
        out, err = within(20, lambda: process.communicate(timeout=20))
    finally:
        process.kill()
    assert process.returncode == 128 + number and "3 images scored" in out and "Traceback" not in err


def test_a_served_reward_is_the_built_in_one() -> None:
    """`tiny` from PNG files is `tiny` from the same bytes."""
    reward = build_reward("tiny", {})
    pictures, prompts = images(6, 32, 32), ["a red circle", "a blue square"] * 3
    with serving(reward) as url:
        found = Remote(url)(pictures, prompts)
    assert torch.equal(found, reward(pictures.float() / 255, prompts).double())
