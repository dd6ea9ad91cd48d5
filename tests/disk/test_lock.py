"""The lock of a folder: one owner, however close in time, whatever path leads there, gone with its process."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import signal
import threading
import time

import pytest

from adagrpo.disk import lock as lock_module
from adagrpo.disk.lock import OwnerLock, holding, is_unused
from adagrpo.disk.owner import read_owner, start_of, this_process
from adagrpo.errors import InputError, RunError
from adagrpo.run.opening import next_free

REFUSALS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL]


def own(folder, **settings) -> OwnerLock:
    return OwnerLock(folder, "train", f"--out {folder}", **settings)


def contents(folder) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that refuses locks."""

    def refuse(number: int = errno.ENOLCK) -> None:
        def flock(handle, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return refuse


@contextlib.contextmanager
def child(work):
    """A forked process that does ``work()``, says so, and sleeps; killed at the end."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(tell, b"+")
            time.sleep(60)
        except BaseException:
            os.write(tell, b"-")
        finally:
            os._exit(0)
    os.close(tell)
    assert os.read(told, 1) == b"+"
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(told)


def test_the_second_is_refused_by_name_and_touches_nothing(tmp_path) -> None:
    folder, link = tmp_path / "a" / "run", tmp_path / "link"
    with holding(own(folder)) as first:
        link.symlink_to(folder)
        (folder / "draft").write_text("half")
        before = contents(tmp_path)
        for path in (folder, link, folder / ".." / "run"):
            with pytest.raises(InputError) as refused:
                own(path, take_over=True).acquire()
            for word in (f"process {os.getpid()}", os.uname().nodename, first.owner.since, str(path), "adagrpo train"):
                assert word in str(refused.value)
        assert contents(tmp_path) == before
        first.require()
    assert contents(tmp_path) == {"a/run/draft": b"half"}
    with holding(own(folder)):
        pass
    (folder / "draft").unlink()
    with holding(own(folder / "new" / "er")):
        pass
    assert not any(folder.iterdir())  # folders made for nothing go again


def test_a_killed_owner_is_no_owner_though_its_forked_child_lives(tmp_path) -> None:
    folder, orphan = tmp_path / "run", tmp_path / "orphan"

    def work() -> None:
        own(folder).acquire()
        pid = os.fork()
        if pid == 0:
            os.close(1)
            time.sleep(60)
            os._exit(0)
        orphan.write_text(str(pid))

    with child(work) as pid:
        with pytest.raises(InputError, match=f"process {pid} "):
            own(folder).acquire()
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        try:
            os.kill(int(orphan.read_text()), 0)  # it lives
            assert is_unused(folder)
            with holding(own(folder)) as now:
                assert read_owner(now.record).pid == os.getpid()
        finally:
            os.kill(int(orphan.read_text()), signal.SIGKILL)


def test_a_forked_child_neither_unlocks_nor_tidies_up(tmp_path) -> None:
    with holding(own(tmp_path)) as mine:
        pid = os.fork()
        if pid == 0:
            mine.release()
            os._exit(0)
        os.waitpid(pid, 0)
        assert mine.owned() and mine.file.exists() and mine.record.exists()
        with pytest.raises(InputError):
            own(tmp_path).acquire()


@pytest.mark.parametrize("locks", [True, False])
def test_of_many_at_the_same_moment_one_gets_the_folder(locks: bool, tmp_path, no_locks) -> None:
    """And each of those who name none gets a folder of its own."""
    if not locks:
        no_locks()
    gate, open_gate = os.pipe()
    told, tell = os.pipe()
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            try:
                os.close(open_gate)
                os.read(gate, 1)  # until all are there
                with contextlib.suppress(InputError):
                    own(tmp_path / "run").acquire()
                    os.write(tell, b"winner\n")
                os.write(tell, f"{next_free(tmp_path, 'run').folder.name}\n".encode())
                time.sleep(60)
            finally:
                os._exit(1)
        children.append(pid)
    os.close(open_gate)
    said = b""
    while said.count(b"run-") < 8:
        said += os.read(told, 4096)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    lines = said.decode().split()
    assert lines.count("winner") == 1
    assert len({line for line in lines if line != "winner"}) == 8


@pytest.mark.parametrize("number", REFUSALS)
def test_without_locks_the_record_is_the_claim(number: int, tmp_path, no_locks) -> None:
    no_locks(number)
    with holding(own(tmp_path)) as mine:
        before = contents(tmp_path)
        assert set(before) == {".owner.json"}
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on "):
            own(tmp_path, take_over=True).acquire()
        assert contents(tmp_path) == before and mine.owned()
    assert contents(tmp_path) == {}


def test_without_locks_a_dead_process_of_this_machine_is_followed(tmp_path, no_locks) -> None:
    no_locks()
    with child(lambda: own(tmp_path).acquire()) as pid, pytest.raises(InputError, match=f"process {pid} "):
        own(tmp_path).acquire()
    with holding(own(tmp_path)) as mine:
        assert read_owner(mine.record).pid == os.getpid()


@pytest.mark.parametrize(
    "elsewhere", [{"boot": "another boot"}, {"host": "far"}, {"namespace": "pid:[1]"}, {"boot": "", "host": "far"}]
)
@pytest.mark.parametrize("locks", [True, False])
def test_an_owner_elsewhere_counts_by_its_heartbeat(elsewhere: dict, locks: bool, tmp_path, no_locks, monkeypatch) -> None:
    """Its process id means nothing here: this machine may well have such a process, or none."""
    other = dataclasses.replace(this_process("train", locked=False), **elsewhere)
    record = tmp_path / ".owner.json"
    record.write_text(other.to_json())
    if not locks:
        no_locks()
    before = contents(tmp_path)
    for take_over in (False, True):
        with pytest.raises(InputError, match="wait until it ends"):
            own(tmp_path, take_over=take_over).acquire()
    assert contents(tmp_path) == before
    long_ago = time.time() - 301
    os.utime(record, (long_ago, long_ago))
    with pytest.raises(InputError, match=r"no sign of life for 5 minutes.*--take-over"):
        own(tmp_path, take_over=False).acquire()
    with pytest.raises(InputError, match=r"no sign of life for 5 minutes.*remove .*\.owner\.json"):  # of other commands
        own(tmp_path).acquire()
    assert contents(tmp_path) == before
    former = own(tmp_path)
    former.owner = other
    former.require()
    with holding(own(tmp_path, take_over=True)) as mine:
        assert mine.owned()
        with pytest.raises(RunError, match=f"taken over by process {os.getpid()}"):
            former.require()
        former.release()
        assert mine.owned()


def test_a_lock_that_was_granted_overrules_the_record_of_a_locked_owner(tmp_path, monkeypatch) -> None:
    """Killed on another host, it left its record; the lock says that it is gone, unless it shows a sign of life."""
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.5)
    other = dataclasses.replace(this_process("train", locked=True), host="far", boot="x")
    record = tmp_path / ".owner.json"
    record.write_text(other.to_json())
    with holding(own(tmp_path)):
        pass
    record.write_text(other.to_json())
    beating = threading.Timer(0.2, os.utime, (record, (time.time() + 5, time.time() + 5)))
    beating.start()
    with pytest.raises(InputError, match=r"in use by process .* on far"):
        own(tmp_path).acquire()
    beating.join()


def test_the_heartbeat_beats(tmp_path, no_locks, monkeypatch) -> None:
    no_locks()
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.01)
    with holding(own(tmp_path)) as mine:
        os.utime(mine.record, (1, 1))
        deadline = time.monotonic() + 20
        while mine.record.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert mine.record.stat().st_mtime > 1


@pytest.mark.parametrize("text", ["", "{", "[]", "null", json.dumps({"pid": 1}), "\udcff"])
@pytest.mark.parametrize("locks", [True, False])
def test_a_damaged_record(text: str, locks: bool, tmp_path, no_locks) -> None:
    (tmp_path / ".owner.json").write_text(text, "utf-8", "surrogateescape")
    if locks:
        own(tmp_path).acquire()
        return
    no_locks()
    with pytest.raises(InputError, match="in use by another process"):
        own(tmp_path).acquire()
    os.utime(tmp_path / ".owner.json", (1, 1))
    own(tmp_path, take_over=True).acquire()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_a_folder_that_cannot_be_written(number: int, tmp_path, monkeypatch) -> None:
    def refuse(*args, **settings):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=os.strerror(number)):
        own(tmp_path / "run").acquire()
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_not_the_recipes_fault(tmp_path, monkeypatch) -> None:
    def full(self, owner):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(OwnerLock, "_draft", full)
    with pytest.raises(RunError, match=r"No space left.*free disk space"):
        own(tmp_path / "run").acquire()
    assert not (tmp_path / "run").exists()


def test_a_lock_on_a_file_that_its_last_owner_removed_is_none(tmp_path, monkeypatch) -> None:
    flock, removals = fcntl.flock, iter(range(2))

    def late(handle: int, operation: int) -> None:
        if next(removals, None) is not None:
            (tmp_path / ".owner.lock").unlink()  # between opening and locking
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with holding(own(tmp_path)) as mine:
        assert mine.file.exists() and next(removals, None) is None
        with pytest.raises(InputError, match="in use by"):
            own(tmp_path).acquire()


def test_a_living_owner_without_a_lock_stands_against_one_that_is_granted(tmp_path) -> None:
    """The same folder may be mounted with locks here and without them there."""
    with child(lambda: time.sleep(0)) as pid:
        other = dataclasses.replace(this_process("train", locked=False), pid=pid, started=start_of(pid))
        (tmp_path / ".owner.json").write_text(other.to_json())
        with pytest.raises(InputError, match=f"in use by process {pid} "):
            own(tmp_path, take_over=True).acquire()
        assert contents(tmp_path) == {".owner.json": other.to_json().encode()}
        reused = dataclasses.replace(other, started="1")  # the number is another process's by now
        (tmp_path / ".owner.json").write_text(reused.to_json())
        with holding(own(tmp_path)):
            pass


def test_a_single_file_is_owned_alone(tmp_path) -> None:
    alone = [own(tmp_path, file="log"), own(tmp_path, file="other"), own(tmp_path)]
    with contextlib.ExitStack() as held:
        for lock in alone:
            held.enter_context(holding(lock))
        with pytest.raises(InputError):
            own(tmp_path, file="log").acquire()
    assert contents(tmp_path) == {}
