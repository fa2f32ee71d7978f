"""The loop between full looks, in C and in Python: the same contract."""

import itertools
import os
import time

import pytest

from brainenc.guard.glances import COMPILED, glances, in_python

NAP_S = 0.01


@pytest.fixture(params=["in C", "in Python"])
def look(request):
    if request.param == "in C" and not COMPILED:
        pytest.skip("there was no compiler when brainenc was installed")
    return glances if request.param == "in C" else in_python


class Number:
    """A file with a number, as the kernel's are: written anew, read from the start."""

    def __init__(self, path, value):
        self._path = path
        self.write(value)
        self.fd = os.open(path, os.O_RDONLY)

    def write(self, value):
        with open(self._path, "r+b" if self._path.exists() else "wb") as file:
            file.write(b"%d\n" % value)
            file.truncate()


@pytest.fixture
def number(tmp_path):
    number = Number(tmp_path / "memory.current", 5_000_000_000)
    yield number
    os.close(number.fd)


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_a_number_that_stays_is_read_until_the_time_is_up(look, number, pipe):
    start = time.monotonic()

    seen = look(pipe[0], NAP_S, number.fd, start + 0.2, 4_999_999_999, 5_000_000_001)

    assert time.monotonic() >= start + 0.2
    assert 2 <= len(seen) <= 20
    assert {value for _, value in seen} == {5_000_000_000}
    times = [start, *(at for at, _ in seen)]
    assert all(b - a >= NAP_S for a, b in itertools.pairwise(times))
    assert times[-1] < start + 0.2


@pytest.mark.parametrize(("low", "high"), [(0, 4_999_999_999), (5_000_000_001, 1 << 62)], ids=["above", "below"])
def test_a_number_outside_its_band_ends_it_at_once(look, number, low, high):
    start = time.monotonic()

    assert look(-1, NAP_S, number.fd, start + 60, low, high) == []

    assert time.monotonic() < start + 30


@pytest.mark.parametrize("band", [(5_000_000_000, 1 << 62), (0, 5_000_000_000)])
def test_the_edges_belong_to_the_band(look, number, band):
    assert look(-1, NAP_S, number.fd, time.monotonic() + 0.1, *band)


def test_a_message_that_waits_is_not_kept_waiting(look, number, pipe):
    os.write(pipe[1], b"{}\n")
    start = time.monotonic()

    assert look(pipe[0], NAP_S, number.fd, start + 60, 0, 1 << 62) == []

    assert time.monotonic() < start + 30


def test_a_worker_that_is_gone_ends_it(look, number):
    read, write = os.pipe()
    os.close(write)
    start = time.monotonic()

    assert look(read, NAP_S, number.fd, start + 60, 0, 1 << 62) == []

    os.close(read)
    assert time.monotonic() < start + 30


def test_a_file_without_a_number_is_an_error(look, tmp_path):
    (tmp_path / "empty").write_bytes(b"\n")
    fd = os.open(tmp_path / "empty", os.O_RDONLY)

    with pytest.raises(ValueError, match=r"number|invalid literal"):
        look(-1, NAP_S, fd, time.monotonic() + 1, 0, 1)

    os.close(fd)


def test_a_file_that_cannot_be_read_is_an_error(look, pipe):
    with pytest.raises(OSError, match=r"seek|Bad file"):
        look(-1, NAP_S, pipe[0], time.monotonic() + 1, 0, 1)


@pytest.mark.skipif(not COMPILED, reason="there was no compiler when brainenc was installed")
def test_one_call_in_c_ends_when_its_room_is_full(number):
    assert len(glances(-1, 0.0, number.fd, time.monotonic() + 60, 0, 1 << 62)) == 64
