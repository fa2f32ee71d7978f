"""The process beside a worker: looks at memory every 10 to 100 ms, and wakes the worker when something changes.

A thread in the worker would lose: code that holds the interpreter starves it, and a machine that fills at 14 GB/s is
full before it gets its turn. This process shares nothing with the worker but two pipes (JSON lines both ways) and a
signal. It imports the standard library and its neighbours here, nothing else, and ends when the worker does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from brainenc.guard.brake import Brake
from brainenc.guard.glances import Text, glances
from brainenc.guard.messages import Level
from brainenc.guard.nvml import Nvml
from brainenc.guard.policy import (
    RANK,
    Decision,
    Meter,
    Policy,
    PolicyConfig,
    Thresholds,
    Timing,
    sampling_interval,
)
from brainenc.guard.probe import MemoryUse, Probe
from brainenc.guard.updating import UpdatingFlag

Glances = Callable[[float, float, tuple[Text, ...]], list[tuple[float, int]]]
READING_EVERY_S = 1.0
_HOST_AT_LEAST_EVERY_S = 1.0
_HOST_CALM = 0.6
_GPU_EVERY_S = 0.1
_EARLY_S = 0.05
_JUDGED_EVERY_S = 1.0
_STILL = 1 / 1000
"""Of the limit: memory that has not moved by more since it was judged, nor passed a threshold, is judged again only
after a while. At a look every 10 ms, judging costs more than looking. What grows so slowly lasts for a minute."""


class Lookout:
    """One look after another: what the watcher process does between two sleeps. Time is passed in.

    Args:
        probe: what to look at.
        policy: how to judge it.
        send: takes each message to the worker.
        wake: called when the worker must look at its messages now.
        brake: on the worker's growth; None for none.
        updating: whether the worker is overwriting its weights at this moment.
    """

    def __init__(
        self, probe: Probe, policy: Policy, send: Callable[[dict[str, Any]], None], wake: Callable[[], None],
        brake: Brake | None = None, updating: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._probe, self._policy, self._send, self._wake, self._brake = probe, policy, send, wake, brake
        self._updating = updating
        self.timing = Timing()
        self.slack: dict[str, int] = {}
        self._injected: dict[str, tuple[float, float]] = {}
        self._host_at = self._gpu_at = self._reading_at = self._sent_at = float("-inf")
        self._host_fraction = 1.0
        self._gpus: list[Meter] = []
        self._sent: tuple[Level, bool, bool] = ("ok", False, False)
        self._wake_at = float("inf")
        self._judged = Meter("ram", -1, 0)
        self._still = (0, -1)
        self._judge_at = float("-inf")
        self._levels: list[MemoryUse] = []
        self._worst = MemoryUse(0, -1, "")

    def hear(self, message: dict[str, Any], now: float) -> None:
        """Take one message of the worker: ``timing``, ``slack``, ``uuids``, ``inject`` (a drill), ``wake_after``."""
        self._judge_at = float("-inf")
        if "timing" in message:
            self.timing = Timing(**message["timing"])
        if "largest" in message and self._brake is not None:
            self._brake.extra = int(message["largest"])
        if "slack" in message:
            self.slack = message["slack"]
            self._gpu_at = float("-inf")  # what was read before was judged by the old one
        if "uuids" in message:
            self._probe.watch_gpus(message["uuids"])
            self._gpu_at = float("-inf")
        if "inject" in message:
            drill = message["inject"]
            self._injected[drill["meter"]] = (float(drill["fraction"]), now + float(drill["seconds"]))
        if "wake_after" in message:
            self._wake_at = now + float(message["wake_after"])

    def look(self, now: float) -> float:
        """Look once, tell the worker what it must know, and say how long to sleep."""
        ram = self._ram(now)
        if now < self._judge_at and self._is_still(ram):
            self._policy.note("ram", [(now, ram.used)])
            return max(0.0, min(sampling_interval(ram.used, ram.limit), self._judge_at - now))
        decision = self._policy.look(now, self._pretend(now, [ram, *self._gpu_meters(now)]), self.timing)
        if decision.meter in self._injected:  # a drill jumps, which is no growth: it goes by the boundary, as drills do
            decision = replace(decision, urgent=False, rate=0.0, seconds_left=float("inf"))
        elif self._brake is not None and self._brake.adjust(decision, ram, now, updating=self._updating()):
            decision = replace(decision, urgent=True)  # it cannot go on as it is: whoever allocates next fails
        self._tell(decision, now)
        if now >= self._wake_at:
            self._wake_at = float("inf")
            self._send({"kind": "overdue", "at": now})
            self._wake()
        if now >= self._reading_at + READING_EVERY_S - _EARLY_S:  # together with a judgement, not soon after it
            self._reading_at = now
            self._probe.refresh()
            reading = self._probe.read(self.slack, limits_only=True)
            self._send({"kind": "reading", "at": now, "cpu_s": time.process_time(), **reading.to_dict()})
        interval = sampling_interval(ram.used, ram.limit)
        if decision.level == "critical":  # every look is judged: memory that falls and rises again is a new alarm
            self._judge_at = float("-inf")
            return max(0.0, min(interval, self._wake_at - now))
        self._judged, self._still, self._judge_at = ram, self._stays(ram), self._due(now)
        return max(0.0, min(interval, self._judge_at - now))

    def doze(self, nap_s: float, glances: Glances) -> bool:
        """Glance every ``nap_s`` seconds until something moves or the next judgement is due. As little as can be done:
        this is what the watcher costs a training that works near its limit.

        Args:
            nap_s: what :meth:`look` said.
            glances: of ``brainenc.guard.glances``, with an inbox.

        Returns:
            whether it has waited at all; not where every look is judged, nor where there is nothing to glance at.
        """
        texts = self._texts() if self._judge_at > float("-inf") else ()
        if texts:
            self._policy.note("ram", glances(nap_s, self._judge_at, texts))
        return bool(texts)

    def _texts(self) -> tuple[Text, ...]:
        """What to glance at, and within which bounds: the level that was judged, and those that could pass it."""
        low, high = self._still
        texts: list[Text] = []
        for level, gauge in zip(self._levels, self._probe.gauges(), strict=True):
            first = level == self._worst
            if level.source == "host" and not first:
                continue  # it is read again before it can get to its limit
            if gauge is None:
                return ()
            if first:
                texts.insert(0, Text(gauge.fd, low, high, gauge.offset, gauge.fields))
            else:
                same = self._policy.same_level(Meter("ram", level.used, level.limit))[1]
                passing = max(int(low / self._judged.limit * level.limit), level.used + int(_STILL * level.limit))
                texts.append(Text(gauge.fd, 0, min(same, passing), gauge.offset, gauge.fields))
        return tuple(texts)

    def _is_still(self, ram: Meter) -> bool:
        return ram.limit == self._judged.limit and self._still[0] <= ram.used <= self._still[1]

    def _due(self, now: float) -> float:
        """When to judge at the latest, whatever memory does."""
        gpu_at = self._gpu_at + _GPU_EVERY_S if self._probe.watches_gpus else float("inf")
        drill_ends = min((end for _, end in self._injected.values()), default=float("inf"))
        host_at = self._host_at if self._probe.limited else float("inf")
        reading_at = self._reading_at + READING_EVERY_S
        return min(now + _JUDGED_EVERY_S, gpu_at, host_at, reading_at, self._wake_at, drill_ends)

    def _stays(self, ram: Meter) -> tuple[int, int]:
        """Bytes used at which a judgement may be put off."""
        least, most = self._policy.same_level(ram)
        return max(least, ram.used - int(_STILL * ram.limit)), min(most, ram.used + int(_STILL * ram.limit))

    def _ram(self, now: float) -> Meter:
        """The host is read less often while a group's limit is what binds."""
        host = self._reads_host() or now >= self._host_at
        self._levels = self._probe.levels(host=host)
        if host:
            used, limit, _ = self._levels[-1]
            self._host_fraction = self._levels[-1].fraction
            edge = (self._policy.same_level(Meter("ram", used, limit))[1] + 1) / limit
            self._host_at = now + sampling_interval(used, limit, calm_s=_HOST_AT_LEAST_EVERY_S, from_=edge)
        self._worst = max(self._levels, key=lambda level: level.fraction)
        return Meter("ram", self._worst.used, self._worst.limit)

    def _reads_host(self) -> bool:
        return not self._probe.limited or self._host_fraction > _HOST_CALM

    def _gpu_meters(self, now: float) -> list[Meter]:
        if now >= self._gpu_at + _GPU_EVERY_S:
            self._gpu_at = now
            found = self._probe.gpus(self.slack)
            self._gpus = [Meter(f"gpu{i}", max(0, g.used - g.slack), g.limit) for i, g in enumerate(found)]
        return self._gpus

    def _pretend(self, now: float, meters: list[Meter]) -> list[Meter]:
        """Put a drill's figures in the place of the real ones, while it lasts."""
        if not self._injected:
            return meters
        self._injected = {name: drill for name, drill in self._injected.items() if now < drill[1]}
        real = {meter.name: meter for meter in meters}
        for name, (fraction, _) in self._injected.items():
            limit = real[name].limit if name in real else 16_000_000_000  # a drill for a GPU that is not there
            real[name] = Meter(name, int(fraction * limit), limit)
        return list(real.values())

    def _tell(self, decision: Decision, now: float) -> None:
        state = (decision.level, decision.urgent, decision.held)
        worse = RANK[decision.level] > RANK[self._sent[0]] or (decision.urgent and not self._sent[1])
        worse = worse or (decision.level == "critical" and self._sent[2] and not decision.held)  # critical once more
        still = decision.level != "ok" and now - self._sent_at >= READING_EVERY_S
        if state == self._sent and not still:
            return
        self._sent, self._sent_at = state, now
        numbers = {"drill": decision.meter in self._injected, **decision.numbers()}
        self._send({"kind": "decision", "at": now, "level": decision.level, "reason": decision.reason, **numbers})
        if worse or (still and decision.level == "critical"):
            self._wake()


class Outbox:
    """Messages to the worker. Never blocks: what a full pipe does not take waits; readings are dropped meanwhile."""

    def __init__(self, fd: int, limit: int = 200) -> None:
        self._fd, self._limit = fd, limit
        self._rest = b""
        self._waiting: list[bytes] = []
        with contextlib.suppress(
            OSError, AttributeError
        ):  # on Windows it stays blocking: the worker's thread drains it
            os.set_blocking(fd, False)

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message and write what fits."""
        if message["kind"] == "reading" and self._waiting:
            return
        self._waiting.append(json.dumps(message).encode() + b"\n")
        del self._waiting[: -self._limit]
        self.flush()

    @property
    def empty(self) -> bool:
        """Nothing waits for the worker to read."""
        return not (self._rest or self._waiting)

    def flush(self) -> None:
        """Write what fits; a line that was begun is finished before the next."""
        while self._rest or self._waiting:
            self._rest = self._rest or self._waiting.pop(0)
            try:
                self._rest = self._rest[os.write(self._fd, self._rest) :]
            except BlockingIOError:
                return


def main(settings: dict[str, Any]) -> None:
    """Watch until the worker closes its end or is gone.

    Args:
        settings: ``parent`` pid, ``signal`` number or 0, ``thresholds``, ``policy``, ``uuids``, ``timing``, ``brake``,
            ``flag``: a file that is inherited, of :class:`~brainenc.guard.updating.UpdatingFlag`, or -1.
    """
    parent, number = int(settings["parent"]), int(settings["signal"])
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # a stop is the worker's business; this process ends after it
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    policy = Policy(PolicyConfig(thresholds=Thresholds(**settings["thresholds"]), **settings.get("policy", {})))
    # No disks: asking a network mount that is dead never returns, and there is one thread here.
    probe = Probe(pid=parent, nvml=Nvml(uuids=settings["uuids"]))
    outbox = Outbox(1)
    brake = Brake(parent, policy.config.dwell_s) if settings["brake"] else None
    flag = UpdatingFlag(int(settings["flag"]))
    lookout = Lookout(probe, policy, outbox.send, _waker(parent, number), brake, lambda: flag.seen_up)
    lookout.hear({"timing": settings["timing"]} if "timing" in settings else {}, 0.0)
    outbox.send({"kind": "started", "at": time.monotonic(), "pid": os.getpid()})
    inbox = _inbox(0)
    pause = 0.0
    glance = partial(glances, 0)
    while True:
        messages = inbox(pause)
        if messages is None or _orphaned(parent):
            return
        now = time.monotonic()
        for message in messages:
            lookout.hear(message, now)
        outbox.flush()
        try:
            pause = lookout.look(now)
            if outbox.empty and os.name != "nt" and lookout.doze(pause, glance):
                pause = 0.0
        except BrokenPipeError:  # the worker closed its end between two looks
            return


def _orphaned(parent: int) -> bool:
    """The worker is gone, although a child of it may still hold its end of the pipe. On Windows the interpreter of a
    virtual environment starts another one, whose parent it then is: there the pipe alone tells."""
    return os.name == "posix" and os.getppid() != parent


def _waker(parent: int, number: int) -> Callable[[], None]:
    """Signals the worker's main thread; by a handle on the process, so that no other process ever gets the signal."""
    if not number:
        return lambda: None

    def by_number() -> None:
        _ignore_gone(lambda: os.kill(parent, number))

    if not hasattr(signal, "pidfd_send_signal"):
        return by_number
    try:
        handle = os.pidfd_open(parent)
    except OSError:  # a kernel before 5.3, or a sandbox that does not let it through
        return by_number
    return lambda: _ignore_gone(lambda: signal.pidfd_send_signal(handle, number))


def _ignore_gone(call: Callable[[], None]) -> None:
    with contextlib.suppress(ProcessLookupError):
        call()


def _inbox(fd: int) -> Callable[[float], list[dict[str, Any]] | None]:
    """Sleeps up to so many seconds and returns what the worker said meanwhile; None once it is gone."""
    if os.name == "nt":
        return _inbox_by_thread(fd)
    rest = b""

    def wait(pause: float) -> list[dict[str, Any]] | None:
        nonlocal rest
        if not select.select([fd], [], [], pause)[0]:
            return []
        data = os.read(fd, 65536)
        if not data:
            return None
        *lines, rest = (rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    return wait


def _inbox_by_thread(fd: int) -> Callable[[float], list[dict[str, Any]] | None]:
    """The same where pipes cannot be selected on."""
    import queue
    import threading

    messages: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def drain() -> None:
        with os.fdopen(fd, "rb", closefd=False) as lines:
            for line in lines:
                messages.put(json.loads(line))
        messages.put(None)

    threading.Thread(target=drain, daemon=True).start()

    def wait(pause: float) -> list[dict[str, Any]] | None:
        try:
            message = messages.get(timeout=pause or 0.001)
        except queue.Empty:
            return []
        return None if message is None else [message]

    return wait


def read_lines(buffer: bytes) -> tuple[Iterator[dict[str, Any]], bytes]:
    """Whole messages in ``buffer``, and the rest that has no end yet."""
    *lines, rest = buffer.split(b"\n")
    return (json.loads(line) for line in lines), rest
