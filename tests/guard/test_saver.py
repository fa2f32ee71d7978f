"""What a plain script keeps ready for saving, what it learns from a save, and which files it takes for its own."""

import os
import sys
from pathlib import Path

import pytest
import torch

from brainenc.guard import MemoryGuard
from brainenc.guard import pytorch as files
from brainenc.guard.emergency import EmergencyFiles
from brainenc.guard.place_in_run import Boundary
from brainenc.guard.saver import Saver
from tests.guard.test_memory_guard import decision

RESERVE = 256 << 20
ABOUT = 250 << 20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def pages(field):
    """Bytes of this process: 0 mapped, 1 in memory."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * os.sysconf("SC_PAGESIZE")


def saver(folder, reserve=0, **objects):
    return Saver(objects, EmergencyFiles(folder), reserve)


def boundary():
    return Boundary(0, 1, files.capture_rng(), None)


@linux
def test_the_reserve_is_memory_that_is_held(tmp_path):
    """Not an address that nothing stands behind."""
    held, before = saver(tmp_path, RESERVE), pages(1)

    held.hold_reserve()
    assert pages(1) > before + ABOUT

    held.release_reserve()
    assert pages(1) < before + RESERVE - ABOUT


@linux
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_that_are_forked_do_not_keep_the_reserve(tmp_path):
    held = saver(tmp_path, RESERVE)
    held.hold_reserve()
    whole = pages(0)

    pid = os.fork()
    if not pid:
        os._exit(pages(0) > whole - ABOUT)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    held.release_reserve()
    assert pages(0) < whole - ABOUT


@linux
def test_a_guard_that_ends_holds_no_reserve(tmp_path):
    with MemoryGuard(model=torch.nn.Linear(2, 2), save_dir=tmp_path, reserve=RESERVE, say=lambda _: None):
        whole = pages(0)

    assert pages(0) < whole - ABOUT


@linux
def test_after_a_shrink_the_reserve_is_held_again(tmp_path):
    with MemoryGuard(
        model=torch.nn.Linear(2, 2), save_dir=tmp_path, reserve=RESERVE, say=lambda _: None, on_critical="shrink",
        on_shrink=lambda: released.append(pages(0) < whole - ABOUT),
    ) as guard:  # fmt: skip
        whole, released = pages(0), []
        guard.check(0, epoch=0)
        guard._hear(decision(drill=True))
        guard.check(1, epoch=0)

        assert released == [True]
        assert pages(0) > whole - ABOUT


def test_a_save_tells_how_long_the_next_one_will_take(tmp_path):
    learns = saver(tmp_path, model=torch.nn.Linear(2, 2))
    learns.prepare()

    saved = learns.save(boundary, "because", None)

    assert learns.seconds == saved.seconds > 0


def test_files_that_need_trust_are_known_by_who_trusts_them(tmp_path):
    """Of this run, but not written by this process."""
    wrote = saver(tmp_path, odd=Odd())
    path = Path(wrote.save(boundary, "because", None).path)
    other = path.with_name("emergency_epoch7.pth")
    other.write_bytes(path.read_bytes())

    goes_on = saver(tmp_path, odd=Odd())
    goes_on.go_on_from(path, goes_on.read(path, trust=True))
    assert goes_on.is_ours(other)
    assert not saver(tmp_path, odd=Odd()).is_ours(other)


def test_a_file_that_names_no_run_is_taken_for_ones_own(tmp_path):
    """As earlier versions wrote them."""
    path = tmp_path / "emergency_epoch0.pth"
    content = files.payload({"model": torch.nn.Linear(2, 2)}, epoch=0, step=1, rng=files.capture_rng())
    files.write(content, path)
    assert saver(tmp_path).is_ours(path)

    files.write(content | {"run": "another"}, path)
    assert not saver(tmp_path).is_ours(path)


class Odd:
    """Its state has to be pickled."""

    def state_dict(self):
        return {"path": Path("here")}

    def load_state_dict(self, state):
        pass
