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
import mmap
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, TypeVar

from brainenc.errors import MemoryRefused, UsageError
from brainenc.guard import banner
from brainenc.guard import pytorch as files
from brainenc.guard.emergency import EmergencyFiles, Saved, Start, describe, disk_speed
from brainenc.guard.hearing import Hearing
from brainenc.guard.messages import EXIT_STOPPED_SAFELY, Level, Order, OrderKind, OutOfTime
from brainenc.guard.place_in_run import PlaceInRun
from brainenc.guard.policy import Meter, PolicyConfig, Thresholds, Timing, free_below
from brainenc.guard.probe import Probe
from brainenc.guard.watcher import WatcherSettings
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
        on_shrink: makes the script need less (halves its micro-batch).
        relief: called before an alarm is acted on: drop what can be made again (prefetched batches, caches).
        every, eval_every: batches between two closer looks.
        reserve: memory held from the start and released for saving.
        brake: when memory would be gone before the next boundary, let further allocations of this process fail
            (``MemoryError``) until it has saved. Linux only.
        fallback_dirs: tried when ``save_dir`` cannot take the file.
        stateful: more objects with ``state_dict`` and ``load_state_dict``, by name.
        policy: hysteresis, dwell and the rest.
        say: where texts go; standard error by default.
    """

    def __init__(
        self, *, model: Any = None, optimizer: Any = None, scheduler: Any = None, scaler: Any = None,
        save_dir: str | Path = ".", gpu: tuple[float, float] = (0.90, 0.92), ram: tuple[float, float] = (0.85, 0.88),
        batch_size: int | None = None, on_critical: Literal["stop", "shrink"] = "stop",
        on_shrink: Callable[[], None] | None = None, relief: Sequence[Callable[[], None]] = (), every: int = 10,
        eval_every: int = 15, reserve: int | str = "32MiB", fallback_dirs: Sequence[str | Path] = (),
        stateful: dict[str, Any] | None = None, policy: PolicyConfig | None = None, brake: bool = True,
        say: Callable[[str], None] = banner.say,
    ) -> None:  # fmt: skip
        if on_critical not in ("stop", "shrink") or (on_critical == "shrink" and on_shrink is None):
            raise UsageError(
                "on_critical is 'stop' or 'shrink', and 'shrink' needs `on_shrink`, which halves the batch."
            )
        thresholds = Thresholds(gpu_warn=gpu[0], gpu_critical=gpu[1], ram_warn=ram[0], ram_critical=ram[1])
        if batch_size is not None:
            thresholds = Thresholds.for_batch_size(batch_size)
        self._config = dataclasses.replace(policy or PolicyConfig(), thresholds=thresholds)
        named = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, **(stateful or {})}
        self._objects = {name: thing for name, thing in named.items() if thing is not None}
        self._files = EmergencyFiles(save_dir, fallback_dirs)
        self._brake = brake
        self._kind: OrderKind = on_critical
        self._on_shrink, self._relief = on_shrink or (lambda: None), tuple(relief)
        self._every, self._eval_every = max(1, every), max(1, eval_every)
        self._reserve_bytes = parse_bytes(reserve)
        self._ballast: mmap.mmap | None = None
        self._say, self._marks = say, banner.symbols(getattr(sys.stderr, "encoding", None))
        self._probe = Probe(disks=[self._files.folder])
        self._hearing: Hearing | None = None
        self._undo: list[Callable[[], None]] = []
        self._place = PlaceInRun()
        self._resumed: dict[str, Any] = {}
        self._save_s = 1.0
        self._attention = False
        self._order: Order | None = None
        self._level: Level = "ok"
        self._told_at = self._warned_at = self._relieved_at = self._shrunk_at = float("-inf")
        self._signals = 0
        self._busy = self._overdue = False
        self._saved: Saved | None = None

    # ---- what a script calls

    def resume(self, *, trust: bool = False) -> Start:
        """Restore the newest emergency file that verifies, if there is one.

        Args:
            trust: also accept files with pickled objects other than tensors and numbers: only your own.

        Raises:
            CheckpointUnusable: it is of another model.
        """
        path, content, passed_over = self._files.newest(lambda p: files.load(p, trust=trust))
        for sentence in passed_over:
            self._say(f"{self._marks.warning}{sentence} It is left where it is and not used.")
        if path is None:
            return Start()
        files.restore(content, self._objects, path)
        files.restore_rng(content["rng"])
        self._resumed = {k: content[k] for k in ("step", "rng", "epoch_rng")}
        start = Start(epoch=content["epoch"], step=content["step"], path=str(path))
        self._place.epoch, self._place.step = start.epoch, start.step
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
        if training:
            if step < self._resumed.get("step", 0):
                self._tell_of_repetition()
            self._place.begin(epoch, step)
        if self._attention or step % (self._every if training else self._eval_every) == 0:
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

    def batches(self, loader: Iterable[T]) -> Iterator[tuple[int, T]]:
        """``enumerate(loader)`` with a check before each batch, without those that were done before a resume."""
        resumed, self._resumed = self._resumed, {}
        done = resumed.get("step", 0)
        for step, batch in enumerate(loader):
            if step < done:
                continue
            if step == done and resumed.get("epoch_rng"):
                files.restore_rng(resumed["rng"])
            self.check(step)
            yield step, batch
        self._place.finish_epoch()

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
        """Pretend that a meter (``"ram"``, ``"gpu0"``) reads ``fraction``: a fire drill on a healthy run."""
        if self._hearing is not None:
            self._hearing.tell(inject={"meter": meter, "fraction": fraction, "seconds": seconds})

    @property
    def watcher_pid(self) -> int:
        """The process beside this one; 0 while there is none."""
        return self._hearing.watcher_pid if self._hearing is not None else 0

    # ---- start and end

    def __enter__(self) -> MemoryGuard:
        self._hold_reserve()
        speed = disk_speed(self._files.folder) or 50e6
        self._save_s = 0.1 + files.payload_bytes(self._objects) * (1 / speed + 1 / 500e6)  # written, hashed, read back
        self._place.after_update = self._at_once
        self._undo = self._place.hook(self._objects.values())
        self._hearing = Hearing(self._settings, heard=self._hear, act=self._at_once, stop=self._asked_to_stop)
        self._say(banner.resources(self._probe.read(), files.gpu_allocations()))
        self._say(self._banner())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, OutOfTime) and self._order is not None:
                self._stop(self._order)
            elif files.is_out_of_memory(error):
                traceback.print_exception(error)
                self._stop(Order(kind="stop", reason=f"out of memory: {error}"))
            elif self._order is not None and isinstance(error, Exception):
                traceback.print_exception(error)  # a stop that reached every process: loader workers went first
                self._stop(self._order)
            elif error is None and self._saved is None:
                self._files.retire()
        finally:
            self.close()

    def close(self) -> None:
        """End the watcher and give back signals, hooks and the reserve."""
        hearing, self._hearing = self._hearing, None
        if hearing is not None:
            hearing.close()
        for undo in self._undo:
            undo()
        self._undo = []
        self._release_reserve()
        self._probe.close()

    def _settings(self, by_signal: bool) -> WatcherSettings:
        policy = {f.name: getattr(self._config, f.name) for f in dataclasses.fields(self._config)}
        return WatcherSettings(
            thresholds=policy.pop("thresholds"), policy=policy, by_signal=by_signal, timing=self._timing(),
            brake=self._brake, uuids=files.gpu_uuids(), disks=[str(self._files.folder)],
        )  # fmt: skip

    def _banner(self) -> str:
        ending = "frees memory and exits safely (code 75)" if self._kind == "stop" else "shrinks the batch and goes on"
        return banner.start(
            self._config.thresholds, every=self._every, eval_every=self._eval_every, marks=self._marks,
            on_emergency=[f"saves {describe(self._objects)} as emergency_epochN.pth in {self._files.folder}", ending],
        )  # fmt: skip

    def _timing(self) -> Timing:
        return Timing(save_s=self._save_s, step_s=self._place.step_s)

    # ---- what it is told, at any moment

    def _hear(self, message: dict[str, Any]) -> None:
        """One message of the watcher."""
        if message["kind"] == "overdue" and self._order is not None:
            self._overdue = True
            self._order = dataclasses.replace(self._order, urgent=True)
        if message["kind"] != "decision":
            return
        self._level = message["level"]
        self._attention = self._attention or self._level != "ok"
        asked_by_person = self._order is not None and not self._order.numbers
        if asked_by_person:
            return
        if self._level != "critical":
            self._order, self._overdue = None, False  # memory went down again before anything was done
            if time.monotonic() - self._shrunk_at >= self._config.dwell_s:
                self._shrunk_at = float("-inf")  # the shrink has helped: another day it may be tried again
            return
        if self._order is None and self._hearing is not None:  # a boundary that does not come in time is not waited for
            self._hearing.tell(wake_after=2 * self._place.step_s + 0.05)
        numbers = {k: v for k, v in message.items() if k not in ("kind", "reason", "level")}
        kind: OrderKind = "stop" if self._shrunk_at > float("-inf") else self._kind
        self._order = Order(
            kind=kind, reason=message["reason"], numbers=numbers, urgent=message["urgent"] or self._overdue
        )

    def _asked_to_stop(self, number: int) -> None:
        """SIGTERM, SIGINT: stop at the next boundary; twice, or no boundary in 2 s: here; three times: at once."""
        self._signals += 1
        if self._signals >= 3:
            raise SystemExit(128 + number)
        name = signal.Signals(number).name
        self._order = Order(kind="stop", reason=f"asked to stop by {name}", urgent=self._signals > 1)
        self._attention = True
        if self._hearing is not None:
            self._hearing.tell(wake_after=2.0)
        self._at_once()

    def _at_once(self) -> bool:
        """Act on an urgent order where the script is. In a signal handler this saves and raises; elsewhere, True asks
        to interrupt the training thread, and ``__exit__`` saves."""
        order = self._order
        if order is None or not order.urgent or self._busy or self._place.updating:
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
            largest = files.largest_on_gpu(self._objects)
            self._hearing.tell(timing=self._timing()._asdict(), slack=files.gpu_slack(), largest=largest)
        order = self._order
        if order is None:
            self._attention = self._level != "ok"
            if self._level == "warn":
                self._warn()
            if self._attention and training:
                self._place.remember_rng()
        elif order.numbers and not order.numbers["drill"] and not order.urgent and self._relieved(order):
            self._order, self._overdue = None, False
        elif order.numbers and time.monotonic() - self._shrunk_at < self._config.dwell_s:
            return  # it has just shrunk: that needs a moment to show
        elif order.kind == "shrink":
            self._shrink(order)
        else:
            self._stop(order)

    def _warn(self) -> None:
        now = time.monotonic()
        if now - self._warned_at < self._config.dwell_s:
            return
        self._warned_at = now
        ram = self._probe.ram()
        text = f"memory is getting short: RAM {ram.fraction:.1%} ({ram.used / 1e9:.2f}GB/{ram.limit / 1e9:.1f}GB)"
        self._say(banner.warning(self._place.step, text, self._marks))
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
        """Relief before alarm, then a second look: is memory no longer short?"""
        if order.numbers["meter"] != "ram" or order.numbers["predicted"] or not self._relieve():
            return False
        if self._probe.ram().fraction >= self._config.thresholds.ram_warn:
            return False
        self._say(f"{self._marks.done}{order.reason}; freeing caches was enough, going on.")
        return True

    def _shrink(self, order: Order) -> None:
        self._busy = True  # what is heard meanwhile is about memory before it has shrunk
        saved = self._save()
        self._say(self._block(order, saved))
        if not saved.path:
            raise SystemExit(1)
        self._on_shrink()
        files.free_cached()
        self._shrunk_at, self._order, self._overdue, self._busy = time.monotonic(), None, False, False
        self._hold_reserve()
        self._say(f"{self._marks.done}Shrunk; going on. Still critical after {self._config.dwell_s:g} s means stop.")

    def _stop(self, order: Order) -> NoReturn:
        self._busy = True
        if self._place.updating:  # an error broke the update off: the weights are of no step
            self._say(
                f"{self._marks.failed}{order.reason}, in the middle of an update: its weights are not worth saving."
            )
            raise SystemExit(1)
        saved = self._saved = self._save()
        self._say(self._block(order, saved))
        files.drop_gradients(self._objects)
        files.free_cached()
        if not saved.path:
            raise SystemExit(1)  # the model stays as it is: somebody may yet save it by hand
        for sentence in files.release_gpus(self._objects):
            self._say(sentence)
        self._say(banner.farewell(saved.path, self._marks))
        raise SystemExit(EXIT_STOPPED_SAFELY)

    def _save(self) -> Saved:
        self._release_reserve()
        epoch, step, rng = self._place.finished()
        content = files.payload(
            self._objects, epoch=epoch, step=step, rng=rng, epoch_rng=self._place.epoch_rng, reason=self._order_reason()
        )
        saved = self._files.save(epoch, lambda path: files.write(content, path))
        if saved.path:
            self._save_s = saved.seconds
        return saved

    def _order_reason(self) -> str:
        return self._order.reason if self._order is not None else ""

    def _block(self, order: Order, saved: Saved) -> str:
        return banner.emergency(
            reason=order.reason, epoch=self._place.epoch, step=self._place.step, saved=saved.path,
            seconds=saved.seconds, n_bytes=saved.n_bytes, failures=saved.failures, marks=self._marks,
        )  # fmt: skip

    def _hold_reserve(self) -> None:
        """Memory of one's own, touched page by page, that goes back to the system at once when it is released."""
        if self._reserve_bytes and self._ballast is None:
            self._ballast = mmap.mmap(-1, self._reserve_bytes)
            for offset in range(0, self._reserve_bytes, mmap.PAGESIZE):
                self._ballast[offset] = 1

    def _release_reserve(self) -> None:
        ballast, self._ballast = self._ballast, None
        if ballast is not None:
            ballast.close()
