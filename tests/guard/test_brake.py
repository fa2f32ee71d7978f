"""The brake: while there is no time left, a process cannot grow; afterwards it can."""

import os
import resource
import subprocess
import sys

import pytest

from brainenc.guard.brake import Brake, data_bytes, own_limit
from brainenc.guard.policy import Decision, Meter

GB = 1_000_000_000
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA of another process is Linux's")

_CHILD = """
import sys, threading
kept = []
for line in sys.stdin:
    failed = []
    def grow():
        try:
            kept.append(bytes(1) + b"1" * int(line))
        except MemoryError:
            failed.append(1)
    thread = threading.Thread(target=grow)
    thread.start()
    thread.join()
    print("refused" if failed else "given", flush=True)
"""


class Child:
    """A process that allocates when it is asked to, in a thread of its own."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.grow(1)

    def grow(self, megabytes):
        self.process.stdin.write(f"{megabytes * 1_000_000}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@pytest.fixture
def child():
    child = Child()
    yield child
    child.process.stdin.close()
    child.process.wait(timeout=10)
    child.process.stdout.close()


def decision(level, *, urgent=False, fraction=0.9, meter="ram", left=float("inf")):
    return Decision(
        level=level, meter=meter, used=int(fraction * GB), limit=GB, threshold=0.88, urgent=urgent, seconds_left=left
    )


RAM = Meter("ram", int(0.9 * GB), GB)


def test_it_holds_when_time_is_short_and_releases_after_the_danger(child):
    brake = Brake(child.process.pid, hold_s=5)
    assert child.grow(200) == "given"

    assert brake.releases_at == float("inf")
    assert brake.adjust(decision("critical", urgent=True), RAM, now=100)
    assert brake.releases_at == 105
    assert child.grow(200) == "refused"
    assert child.grow(10) == "given"  # saving needs a little

    brake.adjust(decision("ok"), RAM, now=104)  # growth has stopped because of the brake: no reason to release yet
    assert child.grow(200) == "refused"
    brake.adjust(decision("critical"), RAM, now=110)
    assert child.grow(200) == "refused"
    brake.adjust(decision("warn"), RAM, now=111)
    assert not brake.on
    assert child.grow(200) == "given"


@pytest.mark.parametrize(
    ("what", "held"),
    [(decision("critical"), False), (decision("critical", fraction=0.95), True), (decision("warn", urgent=True), False),
     (decision("critical", urgent=True, meter="gpu0"), False)],
)  # fmt: skip
def test_it_holds_only_when_the_machines_memory_is_about_to_be_gone(child, what, held):
    assert Brake(child.process.pid, hold_s=5).adjust(what, RAM, now=0) is held


@pytest.mark.parametrize(("fraction", "left", "held"), [(0.9, 0.5, False), (0.9, 0.05, True), (0.98, 0.5, True)])
def test_an_update_of_the_weights_is_waited_for_while_there_is_time(child, fraction, left, held):
    """An allocation that fails in the middle of it leaves weights of no step."""
    brake = Brake(child.process.pid, hold_s=5)
    short = decision("critical", urgent=True, fraction=fraction, left=left)

    assert brake.adjust(short, RAM, now=0, updating=True) is held
    assert brake.on is held
    assert brake.adjust(short, RAM, now=0.01) is not held  # its end is not waited for twice
    assert brake.on


@pytest.mark.parametrize(("fraction", "left", "held"), [(0.9, 0.5, False), (0.9, 0.05, True), (0.98, 0.5, True)])
def test_an_update_that_begins_right_after_it_was_put_on_gets_its_memory(child, fraction, left, held):
    """Whoever leaks has taken the margin before the update asks for it."""
    brake = Brake(child.process.pid, hold_s=5)
    short = decision("critical", urgent=True, fraction=fraction, left=left)
    assert brake.adjust(short, RAM, now=0)

    brake.adjust(short, RAM, now=0.01, updating=True)
    assert brake.on is held
    assert child.grow(200) == ("refused" if held else "given")

    brake.adjust(short, RAM, now=0.02)
    assert brake.on


def test_the_margin_never_takes_more_than_half_of_what_is_left(child):
    before = data_bytes(child.process.pid)
    Brake(child.process.pid, hold_s=5).adjust(decision("critical", urgent=True), Meter("ram", 960_000_000, GB), now=0)

    soft, _ = resource.prlimit(child.process.pid, resource.RLIMIT_DATA)
    assert soft - before <= 20_000_000


def test_a_process_that_is_gone_is_no_error():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()

    assert not Brake(child.pid, hold_s=5).adjust(decision("critical", urgent=True), RAM, now=0)


def test_ones_own_limit_can_be_put_back():
    before = own_limit()
    try:
        soft = data_bytes(os.getpid()) + GB
        own_limit((soft, before[1]))
        assert own_limit() == (soft, before[1])
    finally:
        own_limit(before)
    assert own_limit() == before
