"""``MemoryGuard`` in a plain script: drills, signals, errors, resume. The watcher and the signals are real."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from brainenc.errors import MemoryRefused, UsageError
from brainenc.guard import MemoryGuard
from brainenc.guard import pytorch as files
from brainenc.guard.nvml import GpuUse
from brainenc.guard.policy import Policy, PolicyConfig
from brainenc.guard.probe import MemoryUse, Reading
from brainenc.guard.testing import wait_until
from brainenc.guard.updating import UpdatingFlag
from brainenc.guard.watcher_process import Lookout

SCRIPT = Path(__file__).with_name("plain_script.py")
ROOT = Path(__file__).parents[2]


class Script:
    """A small training in this process."""

    def __init__(self, folder, **guard):
        torch.manual_seed(0)
        self.said = []
        self.model = torch.nn.Linear(4, 4)
        self.opt = torch.optim.Adam(self.model.parameters())
        options = {"reserve": 0, "policy": PolicyConfig(dwell_s=0.3)} | guard
        self.guard = MemoryGuard(model=self.model, optimizer=self.opt, save_dir=folder, say=self.said.append, **options)

    def step(self):
        self.opt.zero_grad()
        self.model(torch.randn(2, 4)).square().mean().backward()
        self.opt.step()

    def run(self, steps, *, at=None, do=lambda: None, pause=0.01):
        """One epoch; at step ``at`` something happens."""
        for step in range(steps):
            self.guard.check(step, epoch=2)
            if step == at:
                do()
            self.step()
            time.sleep(pause)

    @property
    def text(self):
        return "\n".join(self.said)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Every fallback folder inside the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path / "run"


def decision(level="critical", **changes):
    """What the watcher says, at 95 % unless told otherwise."""
    message = {"kind": "decision", "level": level, "reason": f"memory is {level}", "meter": "ram", "fraction": 0.95}
    message |= {"urgent": False, "held": False, "predicted": False, "drill": False, "at": time.monotonic()}
    return message | changes


def stopped(script, **kwargs):
    with pytest.raises(SystemExit) as stop, script.guard:
        script.run(200, **kwargs)
    return stop.value.code


def test_while_memory_is_short_every_boundary_is_looked_at(home):
    script = Script(home, policy=PolicyConfig(dwell_s=0.0))
    with script.guard as guard:
        guard.check(0, epoch=0)
        for step in (1, 2, 3):
            if step == 1:
                guard._hear(decision("warn"))
            guard.check(step, epoch=0)

    assert script.text.count("memory is getting short") == 3


def test_a_calm_run_ends_by_itself_and_leaves_nothing(home):
    script = Script(home)
    with script.guard:
        pid = script.guard.watcher_pid
        script.run(30, pause=0)

    assert list(home.iterdir()) == []
    assert not Path(f"/proc/{pid}").exists()
    assert "RAM usage: warning at 85%, emergency at 88%" in script.text


def test_a_drill_saves_at_a_boundary_and_exits_75(home):
    script = Script(home)

    code = stopped(script, at=5, do=lambda: script.guard.drill("ram", 0.95))

    content = files.load(home / "emergency_epoch2.pth")
    assert code == 75
    assert content["optimizer_state_dict"]["state"][0]["step"] == content["step"] > 5
    assert "Reason: RAM usage is 95.0%" in script.text
    assert "(a drill)" in script.text
    assert script.said[-1].startswith(("✅", "OK")), "the last lines say how to resume"
    assert "guard.resume()" in script.said[-1]


def test_a_drill_of_a_gpu_works_without_one(home):
    script = Script(home)

    assert stopped(script, at=3, do=lambda: script.guard.drill("gpu0", 0.93)) == 75
    assert "GPU0 usage is 93.0%" in script.text


def test_a_warning_goes_on_and_is_printed_once_a_dwell(home):
    script, relief = Script(home, policy=PolicyConfig(dwell_s=60)), []
    script.guard._relief = (lambda: relief.append(1),)

    with script.guard:
        script.run(60, at=3, do=lambda: script.guard.drill("ram", 0.86))

    assert sum("memory is getting short" in text for text in script.said) == 1
    assert relief == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_exits_75(home, number):
    script = Script(home)

    assert stopped(script, at=4, do=lambda: os.kill(os.getpid(), number)) == 75
    assert files.load(home / "emergency_epoch2.pth")["step"] == 5  # the next boundary, not the tenth


def test_asked_twice_it_saves_where_it_is(home):
    script = Script(home)

    def ask_twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    begin = time.monotonic()
    assert stopped(script, at=4, do=ask_twice) == 75
    assert time.monotonic() - begin < 15
    assert files.load(home / "emergency_epoch2.pth")["step"] == 4


def test_a_boundary_that_does_not_come_is_not_waited_for(home):
    """SIGTERM in a step that would last for ever: saved where it is after two seconds."""
    script = Script(home)

    def hang():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    begin = time.monotonic()
    assert stopped(script, at=4, do=hang) == 75
    assert 1.9 < time.monotonic() - begin < 20


def test_signals_and_hooks_are_given_back(home):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGURG)]
    script = Script(home)
    with script.guard:
        assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGURG)] != before
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGURG)] == before
    assert not script.opt._optimizer_step_pre_hooks
    assert not script.opt._optimizer_step_post_hooks


def test_an_out_of_memory_error_saves_the_last_finished_step(home):
    script = Script(home)

    def fail():
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    assert stopped(script, at=7, do=fail) == 75
    assert files.load(home / "emergency_epoch2.pth")["step"] == 7
    assert "tried to allocate 20 GiB" in script.text


def test_memory_that_ends_inside_an_update_is_never_saved(home):
    """The weights are of no step: some are updated, some are not."""
    script = Script(home)

    def broken(*_):
        raise MemoryError("in the middle")

    code = stopped(script, at=3, do=lambda: script.opt.register_step_pre_hook(broken))

    assert code == 1
    assert list(home.iterdir()) == []
    assert "in the middle of an update" in script.text


def test_other_errors_pass_and_save_nothing(home):
    script = Script(home)

    with pytest.raises(ZeroDivisionError), script.guard:
        script.run(3, at=1, do=lambda: 1 / 0)

    assert list(home.iterdir()) == []


def test_an_error_after_a_request_to_stop_still_saves(home):
    """SIGTERM to every process of a job kills the loader's workers first; then the loader raises."""
    script = Script(home)

    def lose_workers():
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    assert stopped(script, at=6, do=lose_workers) == 75
    assert files.load(home / "emergency_epoch2.pth")["step"] == 6


def test_forked_children_do_not_inherit_the_stop(home):
    """SIGTERM ends a loader worker as ever; Ctrl-C, which goes to the whole group, leaves it to the script."""
    script = Script(home)
    with script.guard:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGINT)
        time.sleep(0.2)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        script.run(3)

    assert not list(home.iterdir())


def test_when_nothing_can_be_saved_it_does_not_pretend(home, monkeypatch):
    script = Script(home)

    def full(content, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write", full)

    assert stopped(script, at=2, do=lambda: script.guard.drill("ram", 0.95)) == 1
    assert script.text.count("No space left on device") == 3
    assert "NOTHING WAS SAVED" in script.text


def test_a_folder_that_cannot_be_written_is_passed_over(home, tmp_path):
    home.write_text("a file where the folder should be")
    script = Script(home, fallback_dirs=[tmp_path / "second"])

    assert stopped(script, at=2, do=lambda: script.guard.drill("ram", 0.95)) == 75
    assert (tmp_path / "second/emergency_epoch2.pth").exists()
    assert "could not save" in script.text


def test_shrink_saves_goes_on_and_stops_when_it_did_not_help(home):
    sizes = [8]
    script = Script(home, on_critical="shrink", on_shrink=lambda: sizes.append(sizes[-1] // 2))

    code = stopped(script, at=3, do=lambda: script.guard.drill("ram", 0.95, seconds=60))

    assert (sizes, code) == ([8, 4], 75)
    assert "Shrunk; going on" in script.text


def test_shrink_that_helps_goes_on_to_the_end(home):
    sizes = [8]
    script = Script(home, on_critical="shrink", on_shrink=lambda: (sizes.append(4), script.guard.drill("ram", 0.2)))

    with script.guard:
        script.run(150, at=3, do=lambda: script.guard.drill("ram", 0.95, seconds=60))

    assert sizes == [8, 4]


def test_shrinking_that_takes_its_time_is_not_broken_off(home):
    """The boundary was due long ago when the batch has been halved at last: that is no reason to stop."""
    sizes = [8]

    def shrink():
        time.sleep(1.0)
        sizes.append(4)
        script.guard.drill("ram", 0.2)

    script = Script(home, on_critical="shrink", on_shrink=shrink)
    with script.guard:
        script.run(100, at=3, do=lambda: script.guard.drill("ram", 0.95, seconds=60))

    assert sizes == [8, 4]


def test_shrink_without_a_way_to_shrink_is_refused(home):
    with pytest.raises(UsageError, match="on_shrink"):
        Script(home, on_critical="shrink")


def test_a_reservation_that_would_not_fit_is_refused(home):
    script = Script(home)

    script.guard.reserve(1 << 20, "a batch")
    with pytest.raises(MemoryRefused, match="all features"):
        script.guard.reserve(1 << 50, "all features")


def test_a_watcher_that_dies_is_started_again(home):
    script = Script(home)
    with script.guard:
        first = script.guard.watcher_pid
        os.kill(first, signal.SIGKILL)
        assert wait_until(lambda: Path(f"/proc/{first}/stat").read_text().split()[2] == "Z")
        script.run(11, pause=0)
        second = script.guard.watcher_pid

        assert second != first
        assert wait_until(lambda: Path(f"/proc/{second}").exists())


def test_the_watcher_ends_with_a_script_that_is_killed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, tmp_path, "--epochs", "1000", "--step-s", "0.05"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        assert wait_until(lambda: (tmp_path / "log.jsonl").exists() and children.read_text().split(), timeout_s=60)
        (watcher,) = map(int, children.read_text().split())
    finally:
        process.kill()
        process.wait()

    assert wait_until(lambda: not Path(f"/proc/{watcher}").exists())


def run_script(folder, *options):
    folder.mkdir(exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(folder / "home"), "TMPDIR": str(folder)}
    return subprocess.run(
        [sys.executable, SCRIPT, folder, *map(str, options)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def final(folder):
    return torch.load(folder / "final.pt", weights_only=True)


@pytest.mark.chaos  # `make test` has the same with the U-Net of examples/
def test_stopped_and_resumed_the_weights_are_bit_equal(tmp_path):
    """With shuffling and dropout; stopped in the middle of the second epoch."""
    assert run_script(tmp_path / "whole").returncode == 0

    first = run_script(tmp_path / "halves", "--drill-at", 27, "--step-s", 0.02)
    assert first.returncode == 75, first.stderr
    second = run_script(tmp_path / "halves")

    log = [json.loads(line) for line in (tmp_path / "halves/log.jsonl").read_text().splitlines()]
    whole, halves = final(tmp_path / "whole"), final(tmp_path / "halves")
    assert second.returncode == 0, second.stderr
    assert log[-1]["resumed"].endswith("emergency_epoch1.pth")
    assert [(r["epoch"], r["step"]) for r in log[:-1]] == [(e, s) for e in range(3) for s in range(20)]
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_outside_the_main_thread_a_thread_listens(tmp_path):
    """No signals there: the drill is heard all the same, by a thread that waits for the watcher."""
    done = run_script(tmp_path, "--from-thread", "--drill-at", 5, "--step-s", 0.02)

    assert done.returncode == 75, done.stderr
    assert (tmp_path / "emergency_epoch0.pth").exists()


def test_in_a_thread_too_short_a_time_interrupts_the_step(home):
    """Urgent in the middle of a step: raised in the training thread, saved on the way out."""
    script, codes = Script(home), []

    def hang():
        decision = {"level": "critical", "reason": "full in 0.1 s", "meter": "ram", "predicted": True, "drill": False}
        script.guard._hear({"kind": "decision", "urgent": True, "at": 0.0, **decision})
        while True:
            time.sleep(0.01)

    def train():
        try:
            with script.guard:
                script.run(10, at=4, do=hang)
        except SystemExit as stop:
            codes.append(stop.code)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(timeout=30)

    assert codes == [75]
    assert files.load(home / "emergency_epoch2.pth")["step"] == 4


def test_a_loop_that_counts_by_itself_is_told_what_it_does_again(home):
    script = Script(home)
    stopped(script, at=5, do=lambda: script.guard.drill("ram", 0.95))
    again = Script(home)

    with again.guard:
        start = again.guard.resume()
        for step in range(start.step + 2):
            again.guard.check(step, epoch=start.epoch)

    told = [text for text in again.said if "begins again from its first batch" in text]
    assert len(told) == 1
    assert f"{start.step} of its batches are trained a second time" in told[0]


def test_a_drill_waits_for_a_watcher_that_is_starting(home):
    script = Script(home)
    with script.guard:
        assert not script.guard._hearing._watcher.spoken
        script.guard.drill("ram", 0.5)
        assert script.guard._hearing._watcher.spoken


@pytest.mark.skipif(sys.platform != "linux", reason="the brake is Linux's")
def test_the_watcher_sees_an_update_while_it_goes_on(home):
    script, seen = Script(home), []
    with script.guard:
        flag = UpdatingFlag(os.dup(script.guard._hearing._watcher._settings.flag.fd))
        script.opt.register_step_pre_hook(lambda *_: seen.append(flag.seen_up))
        script.step()
        seen.append(flag.seen_up)
    os.close(flag.fd)

    assert seen == [True, False]


class Memory:
    """Main memory as a test wants it, for the watcher's look and the guard's."""

    limited = watches_gpus = False

    def __init__(self, fraction):
        self.fraction = fraction

    def free(self):
        self.fraction = 0.5

    def ram(self):
        return MemoryUse(int(self.fraction * 1000), 1000, "test")

    def gauges(self):
        return [None]

    def levels(self, *, host=True):
        return [self.ram()]

    def gpus(self, slack=None):
        return []

    def refresh(self):
        pass

    def read(self, slack=None, *, limits_only=False):
        return Reading(ram=self.ram(), levels=(self.ram(),))

    def close(self):
        pass


def test_relief_that_works_is_enough_for_good(home):
    """The watcher keeps a level for its dwell and says so once a second: that is no new alarm."""
    memory, config = Memory(0.9), PolicyConfig(dwell_s=5.0)
    script = Script(home, policy=config, relief=[memory.free])
    lookout = Lookout(memory, Policy(config), lambda message: script.guard._hear(message), lambda: None)
    with script.guard:
        script.guard._probe.close()
        script.guard._probe = memory
        start = time.monotonic()
        for i in range(80):  # eight seconds, told a little faster
            lookout.look(start + i * 0.1)
            script.guard.check(i, epoch=2)
            script.step()

    assert script.text.count("freeing caches was enough") == 1
    assert list(home.iterdir()) == []


def test_memory_that_is_critical_once_more_after_relief_stops(home):
    memory = Memory(0.9)
    script = Script(home, policy=PolicyConfig(dwell_s=60), relief=[memory.free])
    early = decision()
    said = []

    def run():
        script.guard._probe.close()
        script.guard._probe = memory
        for step, message in enumerate([early, early, decision(at=time.monotonic() + 60)]):
            said.append(message)
            script.guard._hear(message)
            script.guard.check(step, epoch=2)  # the second was said before memory was freed: it is not acted upon

    with pytest.raises(SystemExit) as stop, script.guard:
        run()

    assert (stop.value.code, len(said)) == (75, 3)


@pytest.mark.parametrize("during", ["shrinking", "relief"])
def test_asked_to_stop_while_something_else_is_done_it_still_stops(home, during):
    def ask():
        os.kill(os.getpid(), signal.SIGTERM)
        script.guard.drill("ram", 0.2)

    if during == "shrinking":
        script = Script(home, on_critical="shrink", on_shrink=ask)
        begin = {"at": 3, "do": lambda: script.guard.drill("ram", 0.95, seconds=60)}
    else:
        script = Script(home, relief=[ask])
        begin = {"at": 3, "do": lambda: script.guard._hear(decision())}

    assert stopped(script, **begin) == 75
    assert "asked to stop by SIGTERM" in script.text


def test_a_shrink_that_helped_is_tried_again_another_day(home):
    """Also when memory was fine before the dwell was over, and the watcher has said nothing since."""
    sizes = [8]
    script = Script(home, on_critical="shrink", on_shrink=lambda: sizes.append(sizes[-1] // 2))
    with script.guard:
        for step in range(2):
            script.guard._hear(decision(drill=True))
            script.guard.check(step, epoch=2)
            script.guard._hear(decision("ok", fraction=0.5))
            time.sleep(0.4)

    assert sizes == [8, 4, 2]
    assert "EMERGENCY STOP" not in script.text, "it goes on"


def test_a_warning_of_a_gpu_is_about_the_gpu(home):
    script = Script(home)
    with script.guard:
        script.guard._hear(decision("warn", meter="gpu0", reason="GPU0 usage is 91.0% (14.6GB/16.0GB)"))
        script.guard.check(0, epoch=2)

    assert "memory is getting short: GPU0 usage is 91.0%" in script.text
    assert "short: RAM" not in script.text


@pytest.mark.parametrize(("slack", "ends"), [(800, False), (0, True)])
def test_a_full_gpu_is_looked_at_again_with_what_torch_holds_now(home, monkeypatch, slack, ends):
    monkeypatch.setattr(files, "gpu_slack", lambda objects=None: {"GPU-1": slack})
    script = Script(home)
    script.guard._probe.watch_gpus = lambda uuids: None
    script.guard._probe.gpus = lambda slack=None: [GpuUse("GPU-1", "T4", 950, 1000, (slack or {}).get("GPU-1", 0))]
    code = None
    try:
        with script.guard:
            script.guard._hear(decision(meter="gpu0"))
            script.guard.check(0, epoch=2)
    except SystemExit as stop:
        code = stop.code

    assert code == (75 if ends else None)


def test_saved_on_the_spot_the_scheduler_is_of_the_same_step(home):
    """Memory ends in the middle of an update: saved after it, and after the scheduler's step that belongs to it."""
    script = Script(home)
    schedule = torch.optim.lr_scheduler.StepLR(script.opt, 2)
    guard = MemoryGuard(
        model=script.model, optimizer=script.opt, scheduler=schedule, save_dir=home, reserve=0, say=script.said.append
    )
    updates = []

    def in_update(*_):
        updates.append(1)
        if len(updates) == 4:
            guard._hear(decision(urgent=True))

    script.opt.register_step_pre_hook(in_update)

    def run():
        for step in range(10):
            guard.check(step, epoch=2)
            script.step()
            schedule.step()
            time.sleep(0.5)

    with pytest.raises(SystemExit) as stop, guard:
        run()

    content = files.load(home / "emergency_epoch2.pth")
    assert stop.value.code == 75
    assert (content["step"], content["scheduler_state_dict"]["last_epoch"]) == (4, 4)


def few_epochs(folder, stop_at=None):
    """Shuffled, with noise in every step, an evaluation that draws random numbers, and a scheduler of epochs."""

    def place(*here):
        if here == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    data = torch.utils.data.TensorDataset(torch.randn(16, 4))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    with MemoryGuard(
        model=model, optimizer=opt, scheduler=schedule, save_dir=folder, reserve=0, say=lambda text: None
    ) as guard:
        guard.resume()
        for epoch in guard.epochs(3):
            for step, (x,) in guard.batches(loader):
                opt.zero_grad()
                (model(x) + torch.rand(4)).square().mean().backward()
                opt.step()
                place(epoch, step)
            torch.rand(3)
            place(epoch, "evaluation")
            schedule.step()
    return model.weight.detach()


@pytest.mark.parametrize("stop_at", [(1, 3), (1, "evaluation"), (1, 1)])
def test_stopped_at_the_end_of_an_epoch_the_weights_are_bit_equal(home, tmp_path, stop_at):
    """After the last update, and in the evaluation, which is done again, so that the scheduler is not left behind."""
    whole = few_epochs(tmp_path / "whole")
    with pytest.raises(SystemExit):
        few_epochs(home, stop_at)

    assert torch.equal(few_epochs(home), whole)
