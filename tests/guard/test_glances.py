"""The loop that sleeps and reads, in C and in Python: the same contract."""

import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brainenc.guard import glances as module
from brainenc.guard.glances import Text, glances, in_python, total

NAP_S = 0.01
BIG = 1 << 62
FIELDS = ((b"anon ", 1), (b"shmem ", 1), (b"slab_reclaimable ", -1))
STAT = "anon {}\nfile 77\nanon_thp 5\nshmem 1\nslab_reclaimable 2\n"
USED = 5_000_000_000


@pytest.fixture(params=["in C", "in Python"])
def look(request):
    if request.param == "in C" and module.WHY_NOT_COMPILED:
        pytest.skip(module.WHY_NOT_COMPILED)
    return glances if request.param == "in C" else in_python


@pytest.fixture
def opened(tmp_path):
    fds = []

    def make(content, low=0, high=BIG, *, offset=0, fields=FIELDS):
        path = tmp_path / f"text{len(fds)}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        fds.append(os.open(path, os.O_RDONLY))
        return Text(fds[-1], low, high, offset, fields)

    yield make
    for fd in fds:
        os.close(fd)


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_the_loop_is_in_c_where_it_can_be_built():
    """Where it cannot be, everything works as well, and a mistake in it would never be noticed."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not (shutil.which("cc") and headers.exists() and os.name == "posix" and os.uname().sysname == "Linux"):
        pytest.skip("needs Linux, a C compiler and Python's headers")
    assert module.WHY_NOT_COMPILED == ""


def test_what_stays_is_read_until_the_time_is_up(look, opened, pipe):
    start = time.monotonic()

    seen = look(pipe[0], NAP_S, start + 0.2, (opened(STAT.format(USED), USED + 9, USED + 9, offset=10),))

    assert time.monotonic() >= start + 0.2
    assert 2 <= len(seen) <= 20
    assert {value for _, value in seen} == {USED + 1 - 2 + 10}
    times = [start, *(at for at, _ in seen)]
    assert all(b - a >= NAP_S for a, b in itertools.pairwise(times))
    assert times[-1] < start + 0.2


@pytest.mark.parametrize(("low", "high"), [(0, USED - 2), (USED, BIG)], ids=["above", "below"])
def test_what_leaves_its_band_ends_it_at_once(look, opened, low, high):
    start = time.monotonic()

    assert look(-1, NAP_S, start + 60, (opened(STAT.format(USED), low, high),)) == []

    assert time.monotonic() < start + 30


@pytest.mark.parametrize("band", [(USED - 1, BIG), (0, USED - 1)])
def test_the_edges_belong_to_the_band(look, opened, band):
    assert look(-1, NAP_S, time.monotonic() + 0.1, (opened(STAT.format(USED), *band),))


def test_any_text_ends_it_and_all_are_told(look, opened):
    one, two = opened(STAT.format(USED)), opened(STAT.format(7))
    start = time.monotonic()

    assert {glance[1:] for glance in look(-1, NAP_S, start + 0.1, (two, one))} == {(6, USED - 1)}
    assert look(-1, NAP_S, start + 60, (one, two._replace(high=5))) == []
    assert time.monotonic() < start + 30


def test_the_time_is_kept_although_a_nap_is_longer(look, opened):
    start = time.monotonic()

    assert look(-1, 30.0, start + 0.05, (opened(STAT.format(USED)),)) == []

    assert start + 0.05 <= time.monotonic() < start + 15


def test_a_message_ends_a_long_nap(look, opened, pipe):
    threading.Timer(0.05, os.write, (pipe[1], b"{}\n")).start()
    start = time.monotonic()

    assert look(pipe[0], 20.0, start + 60, (opened(STAT.format(USED)),)) == []

    assert time.monotonic() < start + 15


def test_long_naps_are_spent_at_the_pipe(opened, pipe):
    """Else a message that comes in every second of them would wait for the end of the nap."""
    ticks = iter([0.0, 0.06, 0.12, 0.18, 0.24])

    seen = in_python(pipe[0], 0.06, 0.24, (opened(STAT.format(USED)),), clock=lambda: next(ticks), sleep=pytest.fail)

    assert len(seen) == 3


def test_a_message_that_waits_is_not_kept_waiting(look, opened, pipe):
    os.write(pipe[1], b"{}\n")
    start = time.monotonic()

    assert look(pipe[0], NAP_S, start + 60, (opened(STAT.format(USED)),)) == []

    assert time.monotonic() < start + 30


def test_a_worker_that_is_gone_ends_it(look, opened):
    read, write = os.pipe()
    os.close(write)
    start = time.monotonic()

    assert look(read, NAP_S, start + 60, (opened(STAT.format(USED)),)) == []

    os.close(read)
    assert time.monotonic() < start + 30


def test_an_empty_file_is_an_error(look, opened):
    with pytest.raises(OSError, match="No data"):
        look(-1, NAP_S, time.monotonic() + 1, (opened(""),))


def test_a_file_that_cannot_be_read_is_an_error(look, pipe):
    with pytest.raises(OSError, match="seek"):
        look(-1, NAP_S, time.monotonic() + 1, (Text(pipe[0], 0, BIG, 0, FIELDS),))


def test_a_nap_is_a_time(look, opened):
    with pytest.raises(ValueError, match=r"nap|sleep"):
        look(-1, -1.0, time.monotonic() + 1, (opened(STAT.format(USED)),))


@pytest.mark.skipif(module.WHY_NOT_COMPILED != "", reason=module.WHY_NOT_COMPILED)
def test_what_c_has_no_room_for_is_refused_or_left_to_the_next_call(opened):
    text, until = opened(STAT.format(USED)), time.monotonic() + 60

    assert len(glances(-1, 0.0, until, (text,))) == 128
    with pytest.raises(ValueError, match="17 texts"):
        glances(-1, 0.0, until, (text,) * 17)
    with pytest.raises(ValueError, match="17 numbers"):
        glances(-1, 0.0, until, (text._replace(fields=((b"a ", 1),) * 17),))
    with pytest.raises(ValueError, match="0 texts"):
        glances(-1, 0.0, until, ())
    with pytest.raises(TypeError):
        glances(-1, 0.0, until, ([1],))


@pytest.mark.parametrize(("built", "told"), [(None, "not built"), (b"no library", "cannot be loaded")])
def test_without_the_extension_python_does_it_and_says_why(tmp_path, built, told):
    """A copy of the package as it is where there was no compiler, or where the library is of another machine."""
    shutil.copytree(Path(module.__file__).parents[1], tmp_path / "brainenc", ignore=shutil.ignore_patterns("*.so"))
    if built is not None:
        (tmp_path / "brainenc/guard/_glances.abi3.so").write_bytes(built)
    program = "from brainenc.guard import glances as g; print(g.glances is g.in_python, g.__file__, g.WHY_NOT_COMPILED)"

    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert done.stdout.startswith(f"True {tmp_path}")
    assert told in done.stdout


@pytest.mark.parametrize("contract", [None, module.CONTRACT + 1])
def test_an_extension_of_another_version_is_not_used(contract):
    program = f"""
import importlib, sys, types
from brainenc import guard
from brainenc.guard import glances
other = types.ModuleType("brainenc.guard._glances")
other.glances = None
if {contract}: other.CONTRACT = {contract}
guard._glances = sys.modules["brainenc.guard._glances"] = other
glances = importlib.reload(glances)
assert glances.glances is glances.in_python
print(glances.WHY_NOT_COMPILED)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert "install it again" in done.stdout


NAMES = st.sampled_from([b"anon ", b"shmem ", b"sock ", b"kernel ", b"MemAvailable:", b"anon_thp "])
LINES = st.lists(st.tuples(NAMES, st.sampled_from([b"", b"   "]), st.integers(0, 1 << 45)), unique_by=lambda x: x[0])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    lines=LINES, fields=st.lists(st.tuples(NAMES, st.sampled_from([1, -1, -1024])), unique_by=lambda x: x[0]),
    unit=st.sampled_from([b"", b" kB"]), ended=st.booleans(), offset=st.integers(-(1 << 50), 1 << 50),
)  # fmt: skip
def test_c_and_python_add_the_same_numbers(tmp_path, lines, fields, unit, ended, offset):
    content = b"\n".join(name + space + b"%d" % value + unit for name, space, value in lines) + b"\n" * ended
    wanted = sum(weight * value for name, weight in fields for n, _, value in lines if n == name)
    assert total(content, tuple(fields)) == wanted
    path = tmp_path / "text"
    path.write_bytes(content or b"\n")
    fd = os.open(path, os.O_RDONLY)
    text = Text(fd, -(1 << 62), BIG, offset, tuple(fields))
    ticks = iter(range(5))

    in_py = in_python(-1, 1, 4, (text, text), sleep=lambda s: None, clock=lambda: next(ticks))
    in_c = [] if module.WHY_NOT_COMPILED else glances(-1, 0.0, time.monotonic() + 60, (text, text))

    os.close(fd)
    assert [glance[1:] for glance in in_py] == [(wanted + offset,) * 2] * 3
    assert [glance[1:] for glance in in_c] == [(wanted + offset,) * 2] * (0 if module.WHY_NOT_COMPILED else 128)
