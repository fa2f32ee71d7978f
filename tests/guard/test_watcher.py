"""The process beside the worker, and the worker's side of it, when one of the two does not answer."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from brainenc.guard import watcher_process
from brainenc.guard.testing import wait_until
from brainenc.guard.updating import UpdatingFlag
from brainenc.guard.watcher import WAKE_SIGNAL, Watcher, WatcherSettings


@pytest.fixture
def watcher():
    watcher = Watcher(WatcherSettings())
    assert wait_until(lambda: any(message["kind"] == "started" for message in watcher.read()))
    yield watcher
    os.kill(watcher.pid, signal.SIGCONT)
    watcher.close()


def test_nobody_waits_for_a_watcher_that_does_not_listen(watcher):
    """Its pipe is full after 64 kB: then what is told it is lost, and the training goes on."""
    os.kill(watcher.pid, signal.SIGSTOP)

    def talk():
        for _ in range(2000):
            watcher.tell(timing={"save_s": 1.0, "step_s": 0.5}, slack={"GPU-1": 1})

    talking = threading.Thread(target=talk, daemon=True)
    talking.start()
    talking.join(timeout=5)
    assert not talking.is_alive()

    os.kill(watcher.pid, signal.SIGCONT)
    time.sleep(0.3)
    watcher.tell(inject={"meter": "ram", "fraction": 0.95, "seconds": 5})
    assert wait_until(lambda: any(message.get("level") == "critical" for message in watcher.read()))


def test_a_watcher_that_is_silent_counts_as_dead_and_is_not_waited_for(watcher, monkeypatch):
    monkeypatch.setattr("brainenc.guard.watcher.SILENT_S", 1.6, raising=False)
    os.kill(watcher.pid, signal.SIGSTOP)
    first = watcher.pid
    watcher.read()
    assert watcher.alive
    time.sleep(1.7)
    watcher.read()
    assert not watcher.alive

    began = time.monotonic()
    watcher.restart()

    assert time.monotonic() - began < 1
    assert watcher.pid != first
    assert wait_until(lambda: any(message["kind"] == "reading" for message in watcher.read()))
    assert watcher.alive


def test_one_that_is_started_again_knows_what_its_forerunner_was_told(watcher, monkeypatch):
    """A drill above all: it would have been for nothing."""
    watcher.tell(wake_after=0.0)
    watcher.tell(inject={"meter": "ram", "fraction": 0.95, "seconds": 60})
    watcher.tell(inject={"meter": "gpu0", "fraction": 0.5, "seconds": 60})
    watcher.tell(timing={"save_s": 1.0, "step_s": 0.25})
    watcher.tell(unbrake=60.0)  # of a save that is long over
    os.kill(watcher.pid, signal.SIGKILL)
    assert wait_until(lambda: watcher.read() is not None and not watcher.alive)
    told, write = [], watcher._write
    monkeypatch.setattr(watcher, "_write", lambda message: (told.append(message), write(message)))
    watcher.restart()
    assert told[0] == {"timing": {"save_s": 1.0, "step_s": 0.25}}
    heard = []
    assert wait_until(lambda: heard.extend(watcher.read()) or any(m["kind"] == "reading" for m in heard))

    (critical,) = [message for message in heard if message.get("level") == "critical"]
    assert (critical["drill"], critical["needed_s"]) == (True, 1.5 * 1.0 + 0.25)
    assert not any(message["kind"] == "overdue" for message in heard)  # that waking is over


linux = pytest.mark.skipif(sys.platform != "linux", reason="the brake is Linux's")


@linux
@pytest.mark.parametrize("memfd", [True, False], ids=["memfd", "built for an older system"])
def test_the_watcher_sees_that_its_worker_updates(monkeypatch, memfd):
    """Through a page that both have mapped, in the next instant."""
    if not memfd:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    flag = UpdatingFlag()
    other = UpdatingFlag(os.dup(flag.fd))
    assert (flag.up, other.seen_up) == (False, False)
    flag.up = True
    assert other.seen_up
    flag.close()
    flag.up = False  # a hook that outlives the guard
    assert not other.seen_up
    os.close(other.fd)


@linux
def test_a_forked_child_decides_nothing_for_its_parent():
    flag = UpdatingFlag()
    flag.up = True
    if (pid := os.fork()) == 0:
        flag.up = False
        os._exit(0)
    os.waitpid(pid, 0)
    assert (flag.up, flag.seen_up) == (True, True)
    flag.close()


@linux
def test_a_flag_that_cannot_be_mapped_costs_the_flag_alone():
    read, write = os.pipe()
    flag = UpdatingFlag(read)
    flag.up = True
    assert flag.up
    os.close(read)
    os.close(write)


def test_one_that_is_still_starting_is_given_time(monkeypatch):
    """Python itself may lie on a slow network mount."""
    monkeypatch.setattr("brainenc.guard.watcher.SILENT_S", 0.0)
    watcher = Watcher(WatcherSettings())
    try:
        assert watcher.alive
    finally:
        watcher.close()


def test_the_watcher_asks_no_disk(watcher):
    """A network mount that is dead never answers, and there is one thread to watch memory."""
    found = []
    assert wait_until(lambda: found.extend(m for m in watcher.read() if m["kind"] == "reading") or found)

    assert found[0]["disks"] == []
    assert not hasattr(WatcherSettings(), "disks")


def test_the_parent_is_asked_for_on_posix_only(monkeypatch):
    """The interpreter of a virtual environment on Windows starts another one, and is its parent."""
    monkeypatch.setattr(watcher_process, "os", SimpleNamespace(name="nt", getppid=lambda: 1))
    assert not watcher_process._orphaned(4711)
    monkeypatch.setattr(watcher_process, "os", SimpleNamespace(name="posix", getppid=lambda: 1))
    assert watcher_process._orphaned(4711)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux")
def test_a_kernel_without_handles_on_processes_is_no_obstacle(monkeypatch):
    woken = []
    before = signal.signal(WAKE_SIGNAL, lambda *_: woken.append(1))

    def unknown(pid):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", unknown)
    try:
        watcher_process._waker(os.getpid(), WAKE_SIGNAL)()
        assert wait_until(lambda: bool(woken))
    finally:
        signal.signal(WAKE_SIGNAL, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which Windows lacks")
def test_a_watcher_ends_although_a_child_of_its_worker_holds_the_pipe():
    program = """
import os, time
from brainenc.guard.watcher import Watcher, WatcherSettings
watcher = Watcher(WatcherSettings())
child = os.fork()
if child == 0:
    time.sleep(60)
print(watcher.pid, child, flush=True)
os._exit(0)
"""
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", program], stdout=subprocess.PIPE, text=True) as worker:
        watcher, child = map(int, worker.stdout.readline().split())
    try:
        deadline = time.monotonic() + 20
        while Path(f"/proc/{watcher}/stat").exists() and _state(watcher) != "Z" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert time.monotonic() < deadline
        assert _state(child) in "SR"  # it held the pipe all the time
    finally:
        os.kill(child, signal.SIGKILL)


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"
