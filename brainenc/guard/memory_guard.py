"""``MemoryGuard``: the memory guard for any PyTorch script, without Ray.

    with MemoryGuard(model=model, optimizer=opt, save_dir=".") as guard:
        start = guard.resume()
        for epoch in range(start.epoch, epochs):
            for step, batch in enumerate(loader):
                guard.check(step, epoch=epoch)
                ...

A process beside the script watches memory and wakes the script by a signal. At the next ``check`` the script saves
``emergency_epoch<E>.pth`` and ends with exit code 75; run again, it goes on. When memory would be gone before that, the
last finished step is saved on the spot, by the signal's handler, which also stops whatever was allocating.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

from brainenc.errors import MemoryRefused, UsageError
from brainenc.guard import banner, signals, states
from brainenc.guard import pytorch as files
from brainenc.guard.emergency import EmergencyFiles, Saved, Start, describe
from brainenc.guard.hearing import Hearing
from brainenc.guard.messages import EXIT_STOPPED_SAFELY, Order, OutOfTime
from brainenc.guard.place_in_run import SETTLING_S, PlaceInRun
from brainenc.guard.policy import Meter, PolicyConfig, Thresholds, Timing, free_below
from brainenc.guard.probe import Probe
from brainenc.guard.saver import Saver, script
from brainenc.guard.standing_orders import StandingOrders, is_ram
from brainenc.guard.updating import UpdatingFlag
from brainenc.guard.watcher import DRILL_WAITS_S, WatcherSettings
from brainenc.out_of_memory import is_out_of_memory
from brainenc.units import parse_bytes

T = TypeVar("T")


class MemoryGuard:
    """Watches memory, saves in time, resumes. Runs in the training script; use it as a context manager.

    In the main thread the watcher wakes it by a signal (``SIGURG``); elsewhere, and on Windows, a thread waits for it.

    Args:
        model: module to save; None leaves it out.
        optimizer: its optimizer; no save happens in the middle of its ``step()``.
        scheduler, scaler: saved as well, where given.
        save_dir: where ``emergency_epoch<E>.pth`` goes.
        gpu, ram: fractions at which to warn and to act.
        batch_size: take the thresholds from the presets (4, 6, 8) instead.
        on_critical: ``"stop"``: save and exit with code 75. ``"shrink"``: save, call ``on_shrink``, go on; still
            critical one dwell later means stop.
        on_shrink: called without arguments; makes the script need less (halves its micro-batch). What it changes is
            saved if something in ``stateful`` holds it.
        relief: called before an alarm is acted on: drop what can be made again (prefetched batches, caches).
        every, eval_every: batches between two closer looks.
        reserve: memory held from the start and released for saving.
        brake: when memory would be gone before the next boundary, let further allocations of this process fail
            (``MemoryError``) until it has saved. Linux only.
        fallback_dirs: tried when ``save_dir`` cannot take the file.
        stateful: more objects with ``state_dict`` and ``load_state_dict``, by name.
        policy: hysteresis, dwell and the rest.
        say: where texts go; standard error by default.

    Raises:
        UsageError: arguments that do not go together.
    """

    _in_use: ClassVar[tuple[int, MemoryGuard] | None] = None
    """The guard of a process, which has one memory and one set of signal handlers."""

    def __init__(
        self, *, model: Any = None, optimizer: Any = None, scheduler: Any = None, scaler: Any = None,
        save_dir: str | Path = ".", gpu: tuple[float, float] = (0.90, 0.92), ram: tuple[float, float] = (0.85, 0.88),
        batch_size: int | None = None, on_critical: Literal["stop", "shrink"] = "stop",
        on_shrink: Callable[[], None] | None = None, relief: Sequence[Callable[[], None]] = (), every: int = 10,
        eval_every: int = 15, reserve: int | str = "32MiB", fallback_dirs: Sequence[str | Path] = (),
        stateful: dict[str, Any] | None = None, policy: PolicyConfig | None = None, brake: bool = True,
        say: Callable[[str], None] = banner.say,
    ) -> None:  # fmt: skip
        if on_critical not in ("stop", "shrink"):
            raise UsageError(f"on_critical is {on_critical!r}; there are 'stop' and 'shrink'.")
        if on_critical == "shrink" and on_shrink is None:
            raise UsageError(
                "on_critical='shrink' needs `on_shrink`: a function without arguments that halves the batch."
            )
        gpu_warn, gpu_critical = _pair("gpu", gpu)
        ram_warn, ram_critical = _pair("ram", ram)
        thresholds = Thresholds(
            gpu_warn=gpu_warn, gpu_critical=gpu_critical, ram_warn=ram_warn, ram_critical=ram_critical
        )
        if batch_size is not None:
            thresholds = Thresholds.for_batch_size(batch_size)
        self._config = dataclasses.replace(policy or PolicyConfig(), thresholds=thresholds)
        named = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, **(stateful or {})}
        self._objects = {name: thing for name, thing in named.items() if thing is not None}
        self._files = EmergencyFiles(save_dir, fallback_dirs)
        self._brake = brake
        self._on_critical = on_critical
        self._orders = StandingOrders(on_critical, self._config.dwell_s)
        self._on_shrink, self._relief = on_shrink or (lambda: None), tuple(relief)
        self._every, self._eval_every = max(1, every), max(1, eval_every)
        self._saver = Saver(self._objects, self._files, parse_bytes(reserve))
        self._say, self._marks = say, banner.symbols(getattr(sys.stderr, "encoding", None))
        self._probe = Probe(disks=[self._files.folder])
        self._hearing: Hearing | None = None
        self._undo: list[Callable[[], None]] = []
        self._place = PlaceInRun(settles=bool(self._objects.keys() - {"model", "optimizer"}))
        self._resumed: dict[str, Any] = {}
        self._told_at = self._warned_at = self._relieved_at = self._spared_at = float("-inf")
        self._busy = False
        self._ended: SystemExit | None = None
        """How it has stopped: whatever else goes wrong after that, the process ends so."""

    # ---- what a script calls

    def resume(self, *, trust: bool = False) -> Start:
        """Restore the newest emergency file that verifies, if there is one.

        Args:
            trust: also accept files with pickled objects other than tensors and numbers: only your own.

        Raises:
            NeedsTrust: it holds pickled objects, and is not trusted.
            CheckpointUnusable: it is of another model.
        """
        path, content, passed_over = self._files.newest(lambda p: self._saver.read(p, trust=trust))
        for sentence in passed_over:
            self._say(f"{self._marks.warning}{sentence} It is left where it is and not used.")
        if path is None:
            if passed_over:
                self._say(f"{self._marks.warning}No emergency file can be used: training starts from the beginning.")
            return Start()
        files.restore(content, self._objects, path)
        files.restore_rng(content["rng"])
        self._resumed = {k: content[k] for k in ("step", "rng", "epoch_rng")}
        start = Start(epoch=content["epoch"], step=content["step"], path=str(path))
        self._place.epoch, self._place.step = start.epoch, start.step
        if (writer := self._saver.go_on_from(path, content)) is not None:
            self._say(
                f"{self._marks.warning}{path} was written by {writer}, and this is {script()}: if it is another "
                "training, give each a `save_dir` of its own."
            )
        self._say(f"{self._marks.done}Resumed from {path}: epoch {start.epoch}, after {start.step} of its batches.")
        return start

    def check(self, step: int, *, epoch: int | None = None, training: bool = True) -> None:
        """At the start of every batch: note where the script is, and act on what the watcher has seen.

        Args:
            step: number of the batch that begins; so many of this epoch are finished.
            epoch: counted from 0; None: the one of :meth:`epochs`.
            training: False in evaluation, which moves no weights.

        Raises:
            SystemExit: code 75, when it had to stop and has saved; 1 when nothing could be saved.
        """
        if self._ended is not None:  # raised where Python drops what is raised, as in a `__del__`
            raise self._ended
        if training:
            if step < self._resumed.get("step", 0):
                self._tell_of_repetition()
            self._place.begin(epoch, step)
        if self._orders.attention or step % (self._every if training else self._eval_every) == 0:
            self._look(training)

    def _tell_of_repetition(self) -> None:
        """The loop of a resumed script counts from 0 by itself: allowed, and worth a word."""
        done = self._resumed.pop("step")
        self._say(
            f"{self._marks.warning}Epoch {self._place.epoch} begins again from its first batch: {done} of its batches "
            "are trained a second time. `for epoch in guard.epochs(n)` and `for step, batch in guard.batches(loader)` "
            "go on in the middle of it."
        )

    def epochs(self, n: int) -> Iterator[int]:
        """The epochs that are left of ``n``. Together with :meth:`batches`, a resumed run is bit-equal."""
        for epoch in range(self._place.epoch, n):
            if self._resumed.get("epoch_rng"):
                files.restore_rng(self._resumed["epoch_rng"])  # so that the loader draws the same order again
            self._place.epoch, self._place.epoch_rng = epoch, files.capture_rng()
            yield epoch
            self._place.finish_epoch()

    def batches(self, loader: Iterable[T]) -> Iterator[tuple[int, T]]:
        """``enumerate(loader)`` with a check before each batch, without those that were done before a resume."""
        self._place.finish_epoch(if_ended=True)  # in a loop that does not use `epochs`
        resumed, self._resumed = self._resumed, {}
        done = resumed.get("step", 0)
        rng = resumed["rng"] if resumed.get("epoch_rng") else None
        batches = iter(loader)
        for step in itertools.count():
            if step == done and rng is not None:
                files.restore_rng(rng)
            if step >= done:
                self._place.before_batch(step, closely=self._orders.attention)
            try:
                batch = next(batches)
            except StopIteration:
                break
            if step < done:
                continue
            self.check(step)
            yield step, batch
        if step < done and rng is not None:  # the loader has fewer than it had
            files.restore_rng(rng)
        self._place.end_batches(step)

    def reserve(self, n_bytes: int, what: str) -> None:
        """Ask before a large allocation: one big array is made faster than anybody can watch.

        Raises:
            MemoryRefused: it would not fit below the critical threshold.
        """
        ram = self._probe.ram()
        free = free_below(Meter("ram", ram.used, ram.limit), self._config)
        if n_bytes > free:
            raise MemoryRefused(n_bytes, free, what)

    def drill(self, meter: str, fraction: float, seconds: float = 30.0) -> None:
        """Pretend that a meter (``"ram"``, ``"gpu0"``) reads ``fraction``: a fire drill on a healthy run. Waits until
        there is a watcher to see it. One that lasts longer than a dwell is still critical after a shrink, and stops.

        Raises:
            UsageError: no such meter, or no fraction.
        """
        if not re.fullmatch(r"ram|gpu\d*", meter) or not 0 < fraction <= 1:
            raise UsageError(f"A drill of {meter!r} at {fraction!r}; wanted is one of 'ram', 'gpu0' at, say, 0.95.")
        warns = self._config.thresholds.pair(meter)[0]
        if fraction < warns:
            self._say(f"{self._marks.warning}A drill at {fraction:.0%} does nothing: warnings begin at {warns:.0%}.")
        if self._hearing is not None:
            self._hearing.wait_for_watcher(DRILL_WAITS_S)
            self._hearing.tell(inject={"meter": meter, "fraction": fraction, "seconds": seconds})

    @property
    def watcher_pid(self) -> int:
        """The process beside this one; 0 while there is none."""
        return self._hearing.watcher_pid if self._hearing is not None else 0

    # ---- start and end

    def __enter__(self) -> MemoryGuard:
        if MemoryGuard._in_use is not None and MemoryGuard._in_use[0] == os.getpid():
            raise UsageError(
                "There is a MemoryGuard in this process already. One watches all of it: give it the other models and "
                "optimizers as `stateful={'name': object}`."
            )
        MemoryGuard._in_use = (os.getpid(), self)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def _start(self) -> None:
        self._saver.prepare()
        self._place.after_update, self._place.flag = self._at_once, UpdatingFlag()
        self._undo = self._place.hook(self._objects.values())
        self._hearing = Hearing(self._settings, heard=self._hear, act=self._at_once, stop=self._asked_to_stop)
        self._say(banner.resources(self._probe.read(), files.gpu_allocations()))
        self._say(self._banner())
        for sentence in states.doubts(self._objects):
            self._say(f"{self._marks.warning}{sentence}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with signals.deaf_to_children():
            try:
                self._finish(error)
            finally:
                self.close()

    def _finish(self, error: BaseException | None) -> None:
        """What is to be done at the end, whichever it is."""
        order = self._orders.next
        if self._ended is not None:
            if isinstance(error, Exception):  # a loader's worker that was killed meanwhile, say
                traceback.print_exception(error)
            if not isinstance(error, SystemExit):
                raise self._ended
        elif isinstance(error, OutOfTime) and order is not None:
            self._stop(order)
        elif is_out_of_memory(error):
            self._saver.release_reserve()  # even a traceback takes memory
            traceback.print_exception(error)
            self._stop(Order(kind="stop", reason=f"out of memory: {error}"))
        elif files.is_lost_loader(error):
            traceback.print_exception(error)
            self._stop(Order(kind="stop", reason=f"a loader's worker was killed, as when memory ends: {error}"))
        elif order is not None and isinstance(error, Exception):
            traceback.print_exception(error)  # a stop that reached every process: loader workers went first
            self._stop(order)
        elif error is None:
            if (asked := self._orders.asked) is not None:
                self._say(f"{self._marks.done}{asked.reason}, when all was done: nothing is left to save.")
            for sentence in self._files.retire(self._saver.is_ours):
                self._say(f"{self._marks.warning}{sentence}")

    def close(self) -> None:
        """End the watcher and give back signals, hooks and the reserve."""
        if MemoryGuard._in_use is not None and MemoryGuard._in_use[1] is self:
            MemoryGuard._in_use = None
        hearing, self._hearing = self._hearing, None
        if hearing is not None:
            hearing.close()
        for undo in self._undo:
            undo()
        self._undo = []
        self._place.flag.close()
        self._saver.release_reserve()
        self._probe.close()

    def _settings(self, by_signal: bool) -> WatcherSettings:
        policy = {f.name: getattr(self._config, f.name) for f in dataclasses.fields(self._config)}
        return WatcherSettings(
            thresholds=policy.pop("thresholds"), policy=policy, by_signal=by_signal, timing=self._timing(),
            brake=self._brake, uuids=list(files.gpus_in_use(self._objects).values()), flag=self._place.flag,
        )  # fmt: skip

    def _banner(self) -> str:
        stops = self._on_critical == "stop"
        ending = "frees memory and exits safely (code 75)" if stops else "shrinks the batch and goes on"
        return banner.start(
            self._config.thresholds, every=self._every, eval_every=self._eval_every, marks=self._marks,
            on_emergency=[f"saves {describe(self._objects)} as emergency_epochN.pth in {self._files.folder}", ending],
        )  # fmt: skip

    def _timing(self) -> Timing:
        return Timing(save_s=self._saver.seconds, step_s=self._place.step_s)

    # ---- what it is told, at any moment

    def _hear(self, message: dict[str, Any]) -> None:
        """One message of the watcher."""
        if self._orders.hear(message) and self._hearing is not None:
            self._hearing.tell(wake_after=2 * self._place.step_s + 0.05)  # so long a boundary is waited for

    def _asked_to_stop(self, number: int) -> None:
        """SIGTERM, SIGINT: stop at the next boundary; twice, or no boundary in 2 s: here; three times: at once."""
        self._orders.ask(number)
        if self._hearing is not None:
            self._hearing.tell(wake_after=2.0)
        self._at_once()

    def _at_once(self) -> bool:
        """Act on an urgent order where the script is. In a signal handler this saves and raises; elsewhere, True asks
        to interrupt the training thread, and ``__exit__`` saves."""
        order = self._orders.urgent
        if order is None or self._busy or self._place.updating:
            return False
        if self._place.settling:  # wait for the scheduler's step, where there is somebody to wake us after it
            if self._hearing is not None:
                self._hearing.tell(wake_after=SETTLING_S)
            return False
        if self._hearing is not None and self._hearing.by_signal:
            self._stop(order)
        return True

    # ---- what is done about it, at a boundary

    def _look(self, training: bool) -> None:
        """The closer look at a boundary."""
        if self._hearing is None:
            return
        self._hearing.listen()
        if (now := time.monotonic()) - self._told_at >= 0.5:
            self._told_at = now
            self._tell_watcher(self._hearing)
        orders, order = self._orders, self._orders.next
        if order is None:
            orders.attention = orders.level != "ok"
            if orders.level == "warn":
                self._warn()
            if orders.attention and training:
                self._place.remember_rng()
        elif order is not orders.asked and self._relieved(order):
            orders.drop_alarm()
            self._tell_watcher(self._hearing)
        elif training and (self._place.may_mend or not (order.urgent or self._place.exact)):
            orders.attention = True  # the next boundary from which the numbers go on as they were, or when time is up
        elif order.kind == "shrink":
            self._shrink(order)
        else:
            self._stop(order)

    def _tell_watcher(self, hearing: Hearing) -> None:
        """What it cannot see from outside: GPUs in use, what torch holds there, how long saving takes."""
        slack, largest = files.gpu_slack(self._objects), files.largest_on_gpu(self._objects) + self._saver.copied
        hearing.tell(timing=self._timing()._asdict(), slack=slack, uuids=list(slack), largest=largest)

    def _warn(self) -> None:
        now = time.monotonic()
        if now - self._warned_at < self._config.dwell_s:
            return
        self._warned_at = now
        self._say(banner.warning(self._place.step, f"memory is getting short: {self._orders.reason}", self._marks))
        self._relieve()

    def _relieve(self) -> bool:
        """Free what can be made again, at most once a dwell."""
        now = time.monotonic()
        if now - self._relieved_at < self._config.dwell_s:
            return False
        self._relieved_at = now
        for call in self._relief:
            call()
        files.free_cached()
        return True

    def _relieved(self, order: Order) -> bool:
        """Relief before alarm, then a second look: is memory no longer short? Main memory that is critical once more
        within a dwell is not looked at again: then only stopping helps."""
        if order.urgent or order.numbers["drill"]:
            return False
        again = time.monotonic() - self._spared_at < self._config.dwell_s
        if is_ram(order) and (order.numbers["predicted"] or again):
            return False
        freed = self._relieve()
        if self._is_short(order):
            return False
        now = time.monotonic()
        self._orders.freed(now)
        self._spared_at = now if is_ram(order) else self._spared_at
        if freed:
            self._say(f"{self._marks.done}{order.reason}; freeing caches was enough, going on.")
        return True

    def _is_short(self, order: Order) -> bool:
        """A look at what raised the alarm, as it is now. The watcher goes by what torch held at an earlier boundary."""
        if is_ram(order):
            return self._probe.ram().fraction >= self._config.thresholds.ram_warn
        slack = files.gpu_slack(self._objects)
        self._probe.watch_gpus(list(slack))
        return any(gpu.fraction >= self._config.thresholds.gpu_warn for gpu in self._probe.gpus(slack))

    def _shrink(self, order: Order) -> None:
        self._busy = True  # what is heard meanwhile is about memory before it has shrunk
        saved = self._save()
        self._say(self._block(order, saved, goes_on=True))
        if not saved.path:
            self._end(1)
        self._on_shrink()
        files.free_cached()
        self._orders.shrunk(time.monotonic())
        self._busy = False
        self._saver.hold_reserve()
        self._say(f"{self._marks.done}Shrunk; going on. Still critical after {self._config.dwell_s:g} s means stop.")

    def _stop(self, order: Order) -> NoReturn:
        self._busy = True
        with signals.deaf_to_children():
            self._save_and_end(order)

    def _save_and_end(self, order: Order) -> NoReturn:
        if self._place.updating:  # an error broke the update off: the weights are of no step
            self._say(
                f"{self._marks.failed}{order.reason}, in the middle of an update: its weights are not worth saving."
            )
            self._end(1)
        # Before the first batch, also in the middle of a resume, an earlier file holds more than there is to save.
        kept = [] if self._place.begun else [*self._saver.came_from, *self._files.found()]
        exact, goes_back = self._place.exact, self._place.goes_back
        saved = Saved(path=str(kept[0])) if kept else self._save()
        self._say(self._block(order, saved, kept=bool(kept)))
        files.drop_gradients(self._objects)
        files.free_cached()
        if not saved.path:
            self._end(1)  # the model stays as it is: somebody may yet save it by hand
        if not exact and not kept:
            self._say(
                f"{self._marks.warning}There was no time to wait for the end of the batch: it is repeated with other "
                "random numbers (dropout, augmentation)."
            )
        elif goes_back and not kept and files.has_running_statistics(self._objects):
            self._say(
                f"{self._marks.warning}The batches whose gradients were being gathered are done again, and batch "
                "normalisation counts them twice: its statistics will differ a little from those of an undisturbed run."
            )
        for sentence in files.release_gpus(self._objects):
            self._say(sentence)
        self._say(banner.farewell(saved.path, self._marks, short=order is not self._orders.asked))
        self._end(EXIT_STOPPED_SAFELY)

    def _end(self, code: int) -> NoReturn:
        self._ended = SystemExit(code)
        raise self._ended

    def _save(self) -> Saved:
        """Save the last finished step."""
        hearing, order = self._hearing, self._orders.next
        unbrake = None if hearing is None else lambda seconds: hearing.tell(unbrake=seconds)
        return self._saver.save(self._place.finished, order.reason if order is not None else "", unbrake)

    def _block(self, order: Order, saved: Saved, *, goes_on: bool = False, kept: bool = False) -> str:
        return banner.emergency(
            reason=order.reason, epoch=self._place.epoch, step=self._place.step, saved=saved.path,
            seconds=saved.seconds, n_bytes=saved.n_bytes, failures=saved.failures, marks=self._marks,
            goes_on=goes_on, kept=kept,
        )  # fmt: skip


def _pair(name: str, given: Any) -> tuple[float, float]:
    """Two fractions, as they should be given."""
    try:
        warn, critical = (float(fraction) for fraction in given)
    except (TypeError, ValueError):
        raise UsageError(
            f"{name}={given!r}; wanted are two fractions, of a warning and of an alarm: (0.85, 0.88)."
        ) from None
    if max(warn, critical) > 1:
        raise UsageError(f"{name}={given!r}; wanted are fractions, not percent: ({warn / 100:g}, {critical / 100:g}).")
    return warn, critical
