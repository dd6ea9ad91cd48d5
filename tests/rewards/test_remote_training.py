"""Training on a reward behind a server: what happens to the server happens to no score, and a run ends as its guards say."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from pathlib import Path

import pytest
from fault_server import brightness, closed_port, faulty, restarting, within

from adagrpo.cli import main
from adagrpo.rewards import client

RECIPE = """base = "tiny"
[train]
iterations = {iterations}
slots = 1
[selection]
candidates = 2
[rollout]
steps = 2
sde_steps = [0]
group_size = 4
[evaluation]
every = 0
final_prompts = 0
[output]
grid_every = 0
checkpoint_every = 50
[guards]
failed_rewards = {{limit = 0.5, action = "stop", patience = 2}}
[[rewards]]
name = "remote"
kwargs = {{url = "{url}", per_request = 1, limits = {{retries = {retries}, timeout = 5.0}}}}
"""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.1)


def trained(folder: Path, url: str, *words: str, retries: int = 2, iterations: int = 2) -> tuple[int, list[dict]]:
    """Exit code and metrics of a run."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.toml").write_text(RECIPE.format(url=url, retries=retries, iterations=iterations), "utf-8")
    code = main(["train", str(folder / "recipe.toml"), "--out", str(folder / "run"), *words])
    file = folder / "run" / "metrics.jsonl"
    return code, [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def told(metrics: list[dict]) -> list[dict]:
    """All but how long it took."""
    return [{key: value for key, value in line.items() if not key.startswith(("perf/", "time"))} for line in metrics]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[list[dict], list[dict]]:
    """Metrics, and the requests that the server got."""
    with faulty(lambda number, body: brightness(body)) as server:
        code, truth = trained(tmp_path_factory.mktemp("undisturbed"), server.url)
    assert code == 0 and len(truth) == 2 and server.answered == len(server.seen)
    return truth, server.seen


def test_a_server_that_restarts_in_the_middle_changes_nothing(tmp_path, undisturbed) -> None:
    """Bit for bit the metrics of an undisturbed run; and no image was scored twice."""
    truth, seen = undisturbed
    half = len(seen) // 2
    with restarting(half) as servers:
        code, metrics = trained(tmp_path / "restarted", servers[0].url, retries=100)
        assert sent(servers[0].seen[:half] + servers[1].seen) == sent(seen) and len(servers[0].seen) > half
    assert code == 0 and told(metrics) == told(truth)


def sent(bodies: list[dict]) -> list[str]:
    """Every image that was sent, and its prompt."""
    pairs = [zip(body["prompt"], body["image"], strict=True) for body in bodies]
    return sorted(prompt + image for pair in pairs for prompt, image in pair)


def test_a_run_stopped_while_its_server_hangs_goes_on_with_another_one(tmp_path, undisturbed, monkeypatch) -> None:
    """The signal ends the wait; resumed with a server elsewhere, the metrics are bit for bit those of an undisturbed run."""
    monkeypatch.setattr(client, "GRACE", 0.4)
    truth, seen = undisturbed

    def behave(number, body):
        if number == len(seen) - 3:  # in the last iteration
            os.kill(os.getpid(), signal.SIGTERM)
        if number >= len(seen) - 3:
            server.hang()
        return brightness(body)

    with faulty(behave) as server:
        code, metrics = within(60, lambda: trained(tmp_path / "run", server.url))
    assert code == 128 + signal.SIGTERM and told(metrics) == told(truth)[: len(metrics)] and len(metrics) < 2
    with faulty(lambda number, body: brightness(body)) as other:
        code, metrics = trained(tmp_path / "run", other.url, "--resume", "auto")
    assert code == 0 and told(metrics) == told(truth)


def test_a_server_that_is_dead_at_the_start_ends_the_run_before_it_begins(tmp_path, capsys) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    code, metrics = within(60, lambda: trained(tmp_path / "dead", url))
    said = capsys.readouterr().err
    assert code == 2 and not metrics
    assert url in said and "start it, or correct kwargs.url" in said and "rewards" in said


@pytest.mark.filterwarnings("ignore:rewards:RuntimeWarning")
def test_a_server_that_stays_dead_stops_the_run_by_its_guard(tmp_path) -> None:
    """Failed images are none that scored 0: the run goes on without them, then stops, and says why."""
    dead = threading.Event()

    def behave(number, body):
        if sum(len(seen["image"]) for seen in server.seen) > 8:
            dead.set()
        return (500, {"detail": "out of memory"}) if dead.is_set() else brightness(body)

    with faulty(behave) as server:
        code, metrics = within(120, lambda: trained(tmp_path / "dies", server.url, retries=0, iterations=20))
    assert code == 3 and 2 <= len(metrics) < 20
    assert [line["advantage/failed"] for line in metrics[-2:]] == [1.0, 1.0]
    assert metrics[-1]["reward/remote/failed"] == 1.0 and metrics[-1]["reward/remote/failed_broken"] > 0
    assert metrics[-1]["reward/train"] is None or math.isnan(metrics[-1]["reward/train"])


@pytest.mark.filterwarnings("ignore:rewards:RuntimeWarning")
def test_a_server_that_fails_now_and_then_is_trained_on(tmp_path) -> None:
    with faulty(lambda number, body: (200, {"rewards": []}) if number % 4 == 2 else brightness(body)) as server:
        code, metrics = trained(tmp_path / "now", server.url)
    assert code == 0 and len(metrics) == 2 and any(0 < line["advantage/failed"] < 0.5 for line in metrics)
    assert all(math.isfinite(line["reward/train"]) for line in metrics)
