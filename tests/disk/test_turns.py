"""Work that one rank of a machine does for all: real processes, one of which may be killed."""

import fcntl
import multiprocessing
import os
import signal
import time
from pathlib import Path

from adagrpo.disk import turns
from adagrpo.disk.turns import in_turn, once


def made(folder: Path, seconds: float, fails: bool) -> str:
    """Takes a while, and leaves a line for every time it is called."""
    with (folder / "log").open("a") as log:
        log.write(f"{os.getpid()}\n")
    time.sleep(seconds)
    if fails:
        raise ConnectionError("no such host")
    return f"made by {os.getpid()}"


def rank(folder: Path, seconds: float, fails: bool, connection) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    try:
        connection.send(once(folder / "turns", "a download", lambda: made(folder, seconds, fails)))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


class Two:
    """Two ranks that do the same work at the same time."""

    def __init__(self, folder: Path, seconds: float = 0.3, fails: bool = False) -> None:
        context = multiprocessing.get_context("fork")
        self.pipes = [context.Pipe(duplex=False) for _ in range(2)]
        self.processes = [context.Process(target=rank, args=(folder, seconds, fails, send)) for _, send in self.pipes]
        for process in self.processes:
            process.start()

    def told(self) -> list[str]:
        found = [receive.recv() if receive.poll(30) else "nothing" for receive, _ in self.pipes]
        for process in self.processes:
            process.join(30)
        return found


def lines(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "log").read_text().splitlines()] if (folder / "log").exists() else []


def test_one_of_two_ranks_does_it(tmp_path: Path) -> None:
    one, other = Two(tmp_path).told()
    assert one == other == f"made by {lines(tmp_path)[0]}" and len(lines(tmp_path)) == 1


def test_what_failed_is_not_tried_again_by_the_other(tmp_path: Path) -> None:
    found = Two(tmp_path, fails=True).told()
    told = "ConnectionError: no such host"
    assert sorted(found) == [told, f"RuntimeError: another rank of this machine tried: {told}"]
    assert len(lines(tmp_path)) == 1


def test_where_one_is_killed_the_other_does_it(tmp_path: Path) -> None:
    two = Two(tmp_path, seconds=2.0)
    deadline = time.monotonic() + 30
    while not lines(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    (first,) = lines(tmp_path)
    os.kill(first, signal.SIGKILL)
    alive = next(i for i, process in enumerate(two.processes) if process.pid != first)
    receive = two.pipes[alive][0]
    assert receive.poll(30) and receive.recv() == f"made by {two.processes[alive].pid}"
    for process in two.processes:
        process.join(30)
    assert lines(tmp_path) == [first, two.processes[alive].pid]


def test_alone_nothing_is_locked_or_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert once(tmp_path / "turns", "work", lambda: "one") == "one" and once(tmp_path / "turns", "work", lambda: "two") == "two"
    with in_turn(tmp_path / "turns", "work"):
        assert not (tmp_path / "turns").exists()


def test_other_work_and_another_start_are_done_anew(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert once(tmp_path, "work", lambda: "one") == once(tmp_path, "work", lambda: "two") == "one"
    assert once(tmp_path, "other work", lambda: "two") == "two"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert once(tmp_path, "work", lambda: "three") == "three"


def test_without_locks_or_a_folder_to_write_every_rank_does_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (tmp_path / "file").write_text("")
    assert once(tmp_path / "file", "work", lambda: "one") == "one"  # no folder can be made there

    def refuse(handle: int, how: int) -> None:
        raise OSError(next(iter(turns.UNSUPPORTED)), "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert once(tmp_path, "work", lambda: "one") == "one" and once(tmp_path, "work", lambda: "two") == "two"


def test_what_old_starts_left_goes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for name, age in (("old.json", 8), ("old.lock", 8), ("new.json", 6), ("old.bin", 8)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (then := time.time() - age * 86400, then))
    once(tmp_path, "work", lambda: "one")
    assert {path.name for path in tmp_path.iterdir()} & {"old.json", "old.lock", "new.json", "old.bin"} == {
        "new.json",
        "old.bin",
    }


def holder(folder: Path, inside, leave) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    with in_turn(folder, "work"):
        inside.send("in")
        leave.poll(30)


def test_turns_are_taken_one_at_a_time(tmp_path: Path) -> None:
    """A second process waits as long as the first is inside."""
    context = multiprocessing.get_context("fork")
    pipes = [(context.Pipe(duplex=False), context.Pipe(duplex=False)) for _ in range(2)]
    for (inside, says), (hears, leave) in pipes:
        process = context.Process(target=holder, args=(tmp_path, says, hears), daemon=True)
        process.start()
        if inside is pipes[0][0][0]:
            assert inside.poll(30)
        else:
            assert not inside.poll(0.5)
            pipes[0][1][1].send("leave")
            assert inside.poll(30)
            leave.send("leave")


def download(folder: Path, connection) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    os.environ["HF_HUB_CACHE"] = str(folder / "hub")
    import huggingface_hub
    import huggingface_hub.constants

    from adagrpo.rewards.weights import find_file

    def fetched(repository: str, name: str) -> str:
        made(folder, 0.3, False)
        return f"{folder}/{repository}/{name}"

    huggingface_hub.hf_hub_download = fetched
    huggingface_hub.try_to_load_from_cache = lambda *args, **keywords: None
    huggingface_hub.constants.HF_HUB_CACHE = str(folder / "hub")
    connection.send(str(find_file("owner/name", "weights.safetensors", "rewards.0")))


def test_a_file_of_the_hub_is_fetched_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    for _, send in pipes:
        context.Process(target=download, args=(tmp_path, send), daemon=True).start()
    found = [receive.recv() if receive.poll(60) else "nothing" for receive, _ in pipes]
    assert found == [f"{tmp_path}/owner/name/weights.safetensors"] * 2 and len(lines(tmp_path)) == 1
