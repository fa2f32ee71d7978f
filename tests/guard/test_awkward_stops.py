"""``MemoryGuard`` stopped at moments that nobody has chosen: what was trained is saved, and not replaced by less."""

import contextlib
import errno
import os
import queue
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from brainenc.errors import NeedsTrust, UsageError
from brainenc.guard import MemoryGuard, banner
from brainenc.guard import pytorch as files
from brainenc.guard.place_in_run import PlaceInRun
from brainenc.guard.saver import Saver
from brainenc.guard.testing import wait_until
from brainenc.guard.watcher import Watcher, WatcherSettings
from tests.guard.test_memory_guard import Script, home, stopped  # noqa: F401


def ask_twice():
    """At once, wherever it is."""
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)


def exit_code(guard, train):
    with pytest.raises(SystemExit) as stop, guard:
        train()
    return stop.value.code


def saved_step(folder, epoch=2):
    return files.load(folder / f"emergency_epoch{epoch}.pth")["step"]


def test_a_wait_for_a_lock_ends_for_a_stop(home):  # noqa: F811
    """As for a prefetching thread that has died."""
    script, waited = Script(home), []
    threading.Timer(0.2, ask_twice).start()
    late = queue.Queue()
    end = threading.Timer(10, late.put, [None])
    end.daemon = True
    end.start()

    def train():
        script.guard.check(0, epoch=2)
        waited.append(late.get())

    code = exit_code(script.guard, train)
    end.cancel()

    assert code == 75
    assert not waited
    assert saved_step(home) == 0


@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_stop_before_the_first_batch_keeps_what_was_saved_earlier(home, monkeypatch, moment):  # noqa: F811
    """A job that is taken away twice, the second time while it is still loading."""
    assert stopped(Script(home), at=50, do=ask_twice) == 75
    before = saved_step(home)
    again, load = Script(home), files.load

    def interrupted(path, *, trust):
        content = load(path, trust=trust)
        ask_twice()
        return content

    def train():
        if moment == "before":
            ask_twice()
        monkeypatch.setattr(files, "load", interrupted)
        again.guard.resume()

    code = exit_code(again.guard, train)
    monkeypatch.undo()

    assert code == 75
    assert saved_step(home) == before > 0
    assert "Nothing was trained since the start" in again.text


def test_a_stop_before_the_first_batch_names_the_file_that_it_came_from(home):  # noqa: F811
    """Not a newer one that was passed over."""
    assert stopped(Script(home), at=50, do=ask_twice) == 75
    (home / "emergency_epoch3.pth").write_bytes(b"damaged")
    again = Script(home)

    def train():
        assert again.guard.resume().path == str(home / "emergency_epoch2.pth")
        ask_twice()

    assert exit_code(again.guard, train) == 75
    assert str(home / "emergency_epoch2.pth") in again.said[-1]


def test_a_stop_in_the_last_batch_lets_the_script_end_and_says_so(home):  # noqa: F811
    script = Script(home)
    with script.guard:
        script.run(3, at=2, do=lambda: os.kill(os.getpid(), signal.SIGTERM))

    assert "asked to stop by SIGTERM, when all was done" in script.text
    assert not list(home.glob("*.pth"))


class Scores:
    """As scripts keep them: arrays beside the model."""

    def __init__(self, **values):
        self.values = values

    def state_dict(self):
        return dict(self.values)

    def load_state_dict(self, state):
        self.values = state


ARRAYS = {
    "vertices": np.linspace(0, 1, 7), "fortran": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "none": np.zeros((0, 3), np.float32), "mask": np.array([True, False]), "names": np.array(["V1", "hV4"]),
    "days": np.array(["2026-01-01"], "M8[D]"),
    "every other": np.arange(10)[::2], "not to be written": np.frombuffer(b"\1\2\3", np.uint8),
}  # fmt: skip


def test_arrays_come_back_as_they_were(home):  # noqa: F811
    first = Script(home, stateful={"scores": Scores(**ARRAYS, nested=[{"r": ARRAYS["vertices"]}])})
    assert stopped(first, at=3, do=ask_twice) == 75
    assert "trust" not in first.text
    assert "cannot be saved" not in first.text

    scores = Scores()
    with Script(home, stateful={"scores": scores}).guard as guard:
        assert guard.resume().path

    for name, array in ARRAYS.items():
        found = scores.values[name]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()
        found.flags["WRITEABLE"] or pytest.fail("it is not the script's own")
    np.testing.assert_array_equal(scores.values["nested"][0]["r"], ARRAYS["vertices"])


def test_a_state_that_needs_trust_is_told_at_the_start_and_never_begun_again(home, tmp_path):  # noqa: F811
    first = Script(home, stateful={"mine": Scores(best=tmp_path)})
    assert stopped(first, at=3, do=ask_twice) == 75
    assert "The state of 'mine' holds pathlib.PosixPath" in first.text

    again = Script(home, stateful={"mine": Scores()})
    with pytest.raises(NeedsTrust, match="trust=True"), again.guard:
        again.guard.resume()
    with Script(home, stateful={"mine": Scores()}).guard as guard:
        assert guard.resume(trust=True).step > 0
    assert not list(home.glob("*.pth")), "it has ended: set aside"


def test_a_run_sets_aside_its_own_files_alone(home):  # noqa: F811
    assert stopped(Script(home), at=5, do=ask_twice) == 75

    other = Script(home)
    with other.guard:
        other.run(3)
    assert (home / "emergency_epoch2.pth").exists()
    assert "is not of this run, and stays" in other.text

    again = Script(home)
    with again.guard:
        assert again.guard.resume().path
    assert not (home / "emergency_epoch2.pth").exists()


def test_a_run_that_was_stopped_twice_sets_aside_both_files(home):  # noqa: F811
    """In different epochs: each goes on from the last one, and they are one run."""
    for epoch in (2, 3):
        script = Script(home)

        def train(script=script, epoch=epoch):
            script.guard.resume()
            for step in range(10):
                script.guard.check(step, epoch=epoch)
                script.step()
            ask_twice()

        assert exit_code(script.guard, train) == 75
    assert len(list(home.glob("*.pth"))) == 2

    last = Script(home)
    with last.guard:
        assert last.guard.resume().epoch == 3
    assert not list(home.glob("*.pth"))


def test_a_file_of_another_script_is_used_and_told(home, monkeypatch):  # noqa: F811
    monkeypatch.setattr("sys.argv", ["/lab/sweep_a.py"])
    assert stopped(Script(home), at=5, do=ask_twice) == 75
    monkeypatch.setattr("sys.argv", ["/lab/sweep_b.py"])
    again = Script(home)
    with again.guard:
        again.guard.resume()

    assert "was written by sweep_a.py, and this is sweep_b.py" in again.text


def test_nothing_usable_is_told_as_a_new_beginning(home):  # noqa: F811
    home.mkdir()
    (home / "emergency_epoch2.pth").write_bytes(b"torn")
    script = Script(home)
    with script.guard:
        assert script.guard.resume().path == ""

    assert "training starts from the beginning" in script.text
    assert (home / "emergency_epoch2.pth").exists()


class Copies:
    """An average whose state is a copy, for which memory may be short."""

    def __init__(self, failures):
        self.failures, self.short = failures, False

    def state_dict(self):
        if self.short and self.failures:
            self.failures -= 1
            raise MemoryError("under the brake")
        return {"weight": torch.ones(3)}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(("failures", "code"), [(3, 75), (10_000, 1)])
def test_a_state_that_cannot_be_gathered_under_the_brake_is_gathered_without(home, monkeypatch, failures, code):  # noqa: F811
    monkeypatch.setattr("brainenc.guard.saver._UNBRAKED_S", 0.3)
    told, tell = [], Watcher.tell
    monkeypatch.setattr(Watcher, "tell", lambda self, **message: (told.append(message), tell(self, **message)))
    average = Copies(failures)
    script = Script(home, stateful={"average": average})

    def stop():
        average.short = True
        ask_twice()

    assert stopped(script, at=3, do=stop) == code

    assert {"unbrake": 0.3} in told
    assert ("NOTHING WAS SAVED" in script.text) == (code == 1)
    assert ("could not save: the states could not be gathered: MemoryError: under the brake" in script.text) == (
        code == 1
    )


def test_a_write_that_does_not_fit_under_the_brake_is_done_without(home, monkeypatch):  # noqa: F811
    told, tell, write, places = [], Watcher.tell, files.write, []
    monkeypatch.setattr(Watcher, "tell", lambda self, **message: (told.append(message), tell(self, **message)))

    def short(content, path):
        places.append(path)
        if not any("unbrake" in message for message in told):
            raise MemoryError("under the brake")
        return write(content, path)

    monkeypatch.setattr(files, "write", short)

    assert stopped(Script(home), at=3, do=ask_twice) == 75
    assert places[-1] == home / "emergency_epoch2.pth"


def test_what_copies_its_state_is_known_before_memory_is_short():
    model = torch.nn.Linear(10, 10)

    assert files.copied_bytes({"model": model, "average": Copies(0)}) == 3 * 4


def test_the_brake_leaves_room_for_what_is_copied(home, monkeypatch):  # noqa: F811
    told, tell = [], Watcher.tell
    monkeypatch.setattr(Watcher, "tell", lambda self, **message: (told.append(message), tell(self, **message)))
    script = Script(home, stateful={"average": Copies(0)})
    with script.guard:
        script.run(3)

    assert 3 * 4 in [message.get("largest") for message in told]


class FailsOnce(torch.optim.SGD):
    """Memory ends in the middle of one update."""

    fails = 0

    def step(self, closure=None):
        if self.fails:
            self.fails -= 1
            self.param_groups[0]["params"][0].data += 1  # half of it is done
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return super().step(closure)


@pytest.mark.parametrize("ask", [lambda: os.kill(os.getpid(), signal.SIGTERM), ask_twice], ids=["once", "twice"])
@pytest.mark.parametrize(("failures", "code"), [(1, 75), (10_000, 1)])
def test_after_an_update_that_was_broken_off_a_whole_one_is_waited_for(home, ask, failures, code):  # noqa: F811
    """The script skips the batch, as many do: what it has at that moment is of no step. Not for ever, if it is asked
    twice; once, for the two seconds that any boundary is waited for."""
    model = torch.nn.Linear(2, 2)
    opt = FailsOnce(model.parameters(), lr=0.1)
    passed = []
    guard = MemoryGuard(model=model, optimizer=opt, save_dir=home, say=lambda _: None, reserve=0)

    def train():
        for step in range(1000):
            guard.check(step, epoch=2)
            passed.append(step)
            opt.fails = failures if step == 5 else opt.fails
            model(torch.ones(1, 2)).sum().backward()
            with contextlib.suppress(RuntimeError):
                opt.step()
            if step == 5:
                ask()
            time.sleep(0.01)

    assert exit_code(guard, train) == code
    assert code == 1 or (passed[-1], saved_step(home)) == (5 + failures, 6 + failures)


def test_what_cannot_be_printed_stops_nobody(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        banner.say("text")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def test_the_watcher_does_not_import_what_lies_in_the_working_folder(tmp_path, monkeypatch):
    for name in ("signal", "select", "json", "brainenc"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w'); raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    watcher = Watcher(WatcherSettings())
    try:
        wait_until(lambda: watcher.read() and watcher.spoken)
        assert watcher.alive
    finally:
        watcher.close()
    assert not (tmp_path / "ran").exists()


def test_a_second_guard_in_a_process_is_refused(home):  # noqa: F811
    with Script(home).guard, pytest.raises(UsageError, match="stateful"), Script(home).guard:
        pass
    with Script(home).guard:
        pass


def test_a_guard_that_cannot_start_leaves_nothing_behind(home, monkeypatch):  # noqa: F811
    """Its watcher cannot be started, say: the next one can."""

    def refused(*_, **__):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    script, handlers = Script(home), [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGURG)]
    with monkeypatch.context() as patch:
        patch.setattr(Watcher, "_start", refused)
        with pytest.raises(OSError, match="temporarily"), script.guard:
            pass
    assert not script.opt._optimizer_step_pre_hooks
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGURG)] == handlers
    with Script(home).guard as guard:
        assert guard.watcher_pid


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_python_drops_is_said_again(home):  # noqa: F811
    """Of what a ``__del__`` raises nobody hears."""

    class Ends:
        def __del__(self):
            ask_twice()

    script, steps = Script(home), []

    def train():
        for step in range(20):
            script.guard.check(step, epoch=2)
            steps.append(step)
            script.step()
            if step == 5:
                Ends()

    code = exit_code(script.guard, train)

    assert code == 75
    assert (steps[-1], saved_step(home)) == (5, 6)
    assert script.text.count("Emergency checkpoint saved") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_python_drops_at_the_end_is_no_success(home):  # noqa: F811
    class Ends:
        def __del__(self):
            ask_twice()

    script = Script(home)

    def train():
        script.run(3)
        Ends()

    code = exit_code(script.guard, train)

    assert code == 75
    assert (home / "emergency_epoch2.pth").exists()


def test_what_goes_wrong_after_the_save_does_not_change_the_exit_code(home, capsys):  # noqa: F811
    script = Script(home)

    def train():
        try:
            script.run(200, at=3, do=ask_twice)
        finally:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    code = exit_code(script.guard, train)

    assert code == 75
    assert "pid 7" in capsys.readouterr().err


def test_a_child_that_dies_during_the_save_does_not_break_it_off(home, monkeypatch):  # noqa: F811
    """torch's handler raises wherever the main thread is."""

    def raises(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    def disturbed(content, path):
        os.kill(os.getpid(), signal.SIGCHLD)
        return write(content, path)

    write, before = files.write, signal.signal(signal.SIGCHLD, raises)
    monkeypatch.setattr(files, "write", disturbed)
    try:
        assert stopped(Script(home), at=3, do=ask_twice) == 75
        assert signal.getsignal(signal.SIGCHLD) is raises
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert (home / "emergency_epoch2.pth").exists(), "and not in the next place"


class Forever(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(2, 4)


def test_a_loaders_worker_that_was_killed_is_no_reason_to_lose_the_training(home):  # noqa: F811
    (home.parent / "tmp").mkdir()  # for its sockets
    script = Script(home)
    loader = torch.utils.data.DataLoader(Forever(), batch_size=None, num_workers=1, multiprocessing_context="fork")

    def train():
        batches = iter(loader)
        for step in range(10_000):
            script.guard.check(step, epoch=2)
            next(batches)
            script.step()
            if step == 5:
                os.kill(batches._workers[0].pid, signal.SIGKILL)
            time.sleep(0.002)

    code = exit_code(script.guard, train)

    assert code == 75
    assert saved_step(home) > 5
    assert "a loader's worker was killed" in script.text


@pytest.mark.parametrize(
    ("meter", "fraction"), [("rma", 0.95), ("oom", 0.95), ("ram", 95), ("ram", 0), ("gpu0x", 0.95)]
)
def test_a_drill_that_cannot_be_is_refused(home, meter, fraction):  # noqa: F811
    with Script(home).guard as guard, pytest.raises(UsageError, match=r"0\.95"):
        guard.drill(meter, fraction)


def test_a_drill_that_does_nothing_says_so(home):  # noqa: F811
    script = Script(home)
    with script.guard as guard:
        guard.drill("ram", 0.5)

    assert "does nothing: warnings begin at 85%" in script.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"ram": 0.9}, "two fractions"), ({"ram": ("85%", "88%")}, "two fractions"), ({"gpu": (90, 92)}, "0.9, 0.92"),
     ({"on_critical": "shirnk"}, "'shirnk'"), ({"on_critical": "shrink"}, "on_shrink"), ({"batch_size": 0}, "0")],
)  # fmt: skip
def test_arguments_that_do_not_go_together_are_named(arguments, words):
    with pytest.raises(UsageError, match=words):
        MemoryGuard(**arguments)


def test_an_optimizer_that_computes_in_its_update_is_named(home):  # noqa: F811
    model, said = torch.nn.Linear(2, 2), []
    opt = torch.optim.LBFGS(model.parameters())
    with MemoryGuard(model=model, optimizer=opt, save_dir=home, say=said.append):
        pass

    assert "LBFGS computes inside its update" in said[-1]


EXHAUSTED = """
import resource, sys, torch
from brainenc.guard import MemoryGuard

limit, pages = {"data": (resource.RLIMIT_DATA, 5), "address": (resource.RLIMIT_AS, 0)}[sys.argv[2]]
model = torch.nn.Linear(64, 64)
opt = torch.optim.Adam(model.parameters())
kept = []
with MemoryGuard(model=model, optimizer=opt, save_dir=sys.argv[1], brake=False) as guard:
    for epoch in guard.epochs(1):
        for step, x in guard.batches([torch.ones(2, 64)] * 20):
            opt.zero_grad()
            model(x).sum().backward()
            opt.step()
            if step == 7:
                has = int(open("/proc/self/statm").read().split()[pages]) * resource.getpagesize()
                resource.setrlimit(limit, (has + (30 << 20), -1))
                while True:
                    kept += [bytes(5000), bytes(300), bytes(40), bytes(2500)]
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, sets limits of a process")
@pytest.mark.parametrize("limit", ["data", "address"])
def test_the_reserve_is_room_to_save_in(tmp_path, limit):
    """Small objects have filled everything to the last page, under both limits that a process may have."""
    done = subprocess.run(
        [sys.executable, "-c", EXHAUSTED, tmp_path, limit], capture_output=True, text=True, timeout=100, check=False
    )

    assert done.returncode == 75, done.stderr[-3000:]
    assert (tmp_path / "emergency_epoch0.pth").exists()


def test_the_reserve_is_free_before_the_random_states_are_gathered(home, monkeypatch):  # noqa: F811
    """They take some kilobytes, which there may not be."""
    order = []
    for of, name in ((Saver, "release_reserve"), (PlaceInRun, "finished")):
        real = getattr(of, name)
        monkeypatch.setattr(of, name, lambda self, real=real, name=name: (order.append(name), real(self))[1])

    assert stopped(Script(home), at=3, do=ask_twice) == 75

    assert order[:2] == ["release_reserve", "finished"]
