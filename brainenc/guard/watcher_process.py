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
from brainenc.guard.glances import MOST_TEXTS, Glance, Text, glances
from brainenc.guard.messages import Level
from brainenc.guard.nvml import Nvml
from brainenc.guard.policy import (
    FASTEST,
    RANK,
    TENSE_FROM,
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

Glances = Callable[[float, float, tuple[Text, ...]], list[Glance]]
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
        self._judge_at = self._unbraked_until = float("-inf")
        self._levels: list[MemoryUse] = []
        self._bands: list[tuple[int, int]] = []

    def hear(self, message: dict[str, Any], now: float) -> None:
        """Take one message of the worker: ``timing``, ``slack``, ``uuids``, ``inject`` (a drill), ``wake_after``,
        ``unbrake`` (it needs memory to save, and takes so many seconds at most)."""
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
        if "unbrake" in message and self._brake is not None:
            self._brake.release()
            self._unbraked_until = now + float(message["unbrake"])

    def look(self, now: float) -> float:
        """Look once, tell the worker what it must know, and say how long to sleep."""
        tells = now >= self._reading_at + READING_EVERY_S - _EARLY_S  # together with a judgement, not soon after it
        if tells:
            self._probe.refresh()
        rams = self._rams(now)
        if now < self._judge_at and not tells and self._are_still(rams):  # `tells`: limits may have changed
            for ram in rams:
                self._policy.note(ram, [(now, ram.used)])
            return max(0.0, min(self._nap_s(), self._judge_at - now))
        decision = self._policy.look(now, self._pretend(now, [*rams, *self._gpu_meters(now)]), self.timing)
        ram = Meter("ram", decision.used, decision.limit)
        if decision.meter in self._injected:  # a drill jumps, which is no growth: it goes by the boundary, as drills do
            decision = replace(decision, urgent=False, rate=0.0, seconds_left=float("inf"))
        elif (
            self._brake is not None
            and now >= self._unbraked_until
            and self._brake.adjust(decision, ram, now, updating=self._updating())
        ):
            decision = replace(decision, urgent=True)  # it cannot go on as it is: whoever allocates next fails
        self._tell(decision, now)
        if now >= self._wake_at:
            self._wake_at = float("inf")
            self._send({"kind": "overdue", "at": now})
            self._wake()
        if tells:
            self._reading_at = now
            reading = self._probe.read(self.slack, limits_only=True)
            self._send({"kind": "reading", "at": now, "cpu_s": time.process_time(), **reading.to_dict()})
        nap_s = self._nap_s()
        if decision.level == "critical":  # every look is judged: memory that falls and rises again is a new alarm
            self._judge_at = float("-inf")
            return max(0.0, min(nap_s, self._wake_at - now))
        self._bands = [self._band(level, nap_s) for level in self._levels]
        self._judge_at = self._due(now)
        return max(0.0, min(nap_s, self._judge_at - now))

    def doze(self, nap_s: float, glances: Glances) -> bool:
        """Glance every ``nap_s`` seconds until something moves or the next judgement is due. As little as can be done:
        this is what the watcher costs a training that works near its limit.

        Args:
            nap_s: what :meth:`look` said.
            glances: of ``brainenc.guard.glances``, with an inbox.

        Returns:
            whether it has waited at all; not where every look is judged, nor where there is nothing to glance at.
        """
        watched = self._watched() if self._judge_at > float("-inf") else []
        if watched:
            seen = glances(nap_s, self._judge_at, tuple(text for _, text in watched))
            for i, (level, _) in enumerate(watched, 1):
                self._policy.note(_meter(level), [(glance[0], int(glance[i])) for glance in seen])
        return bool(watched)

    def _watched(self) -> list[tuple[MemoryUse, Text]]:
        """What to glance at, and within which bounds."""
        watched: list[tuple[MemoryUse, Text]] = []
        for level, gauge, (low, high) in zip(self._levels, self._probe.gauges(), self._bands, strict=True):
            if level.source == "host" and not self._reads_host():
                continue  # it is read again before it can get to its limit
            if gauge is None or len(watched) == MOST_TEXTS:
                return []
            watched.append((level, gauge.within(low, high)))
        return watched

    def _are_still(self, rams: list[Meter]) -> bool:
        return all(low <= ram.used <= high for ram, (low, high) in zip(rams, self._bands, strict=True))

    def _band(self, level: MemoryUse, nap_s: float) -> tuple[int, int]:
        """Bytes used at which a judgement may be put off: no threshold is passed, nothing grows that could be
        predicted, and ``nap_s`` stays short enough."""
        least, most = self._policy.same_level(_meter(level))
        still = int(_STILL * level.limit)
        calm_from = min(TENSE_FROM, self._policy.config.predict_from) * level.limit
        if level.used < calm_from:
            return least, min(most, max(level.used + still, int(calm_from - FASTEST * nap_s)))
        return max(least, level.used - still), min(most, level.used + still)

    def _due(self, now: float) -> float:
        """When to judge at the latest, whatever memory does."""
        gpu_at = self._gpu_at + _GPU_EVERY_S if self._probe.watches_gpus else float("inf")
        drill_ends = min((end for _, end in self._injected.values()), default=float("inf"))
        host_at = float("inf") if self._reads_host() else self._host_at
        reading_at = self._reading_at + READING_EVERY_S
        brake_at = self._brake.releases_at if self._brake is not None else float("inf")
        times = (gpu_at, host_at, reading_at, self._wake_at, drill_ends, brake_at if brake_at > now else float("inf"))
        return min(now + _JUDGED_EVERY_S, *times)

    def _rams(self, now: float) -> list[Meter]:
        """Every level's. The host is read less often while it is far from its limit and a group has one."""
        host = self._reads_host() or now >= self._host_at
        self._levels = self._probe.levels(host=host)
        if host:
            used, limit, _ = self._levels[-1]
            self._host_fraction = self._levels[-1].fraction
            edge = (self._policy.same_level(Meter("ram", used, limit))[1] + 1) / limit
            self._host_at = now + sampling_interval(used, limit, calm_s=_HOST_AT_LEAST_EVERY_S, from_=edge)
        return [_meter(level) for level in self._levels]

    def _reads_host(self) -> bool:
        return not self._probe.limited or self._host_fraction > _HOST_CALM

    def _nap_s(self) -> float:
        """As the level needs it that could be full first."""
        levels = self._levels if self._reads_host() else self._levels[:-1]
        return min(sampling_interval(level.used, level.limit) for level in levels)

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
        for name, (fraction, _) in self._injected.items():
            real = [meter for meter in meters if meter.name == name]
            # A drill for a GPU that is not there has a limit all the same.
            fullest = max(real, key=lambda meter: meter.used / meter.limit, default=Meter(name, 0, 16_000_000_000))
            meters = [meter for meter in meters if meter is not fullest]
            meters.append(fullest._replace(used=int(fraction * fullest.limit)))
        return meters

    def _tell(self, decision: Decision, now: float) -> None:
        state = (decision.level, decision.urgent, decision.held)
        worse = RANK[decision.level] > RANK[self._sent[0]] or (decision.urgent and not self._sent[1])
        worse = worse or (decision.level == "critical" and self._sent[2] and not decision.held)  # critical once more
        still = decision.level != "ok" and now - self._sent_at >= READING_EVERY_S
        if state == self._sent and not still:
            return
        self._sent, self._sent_at = state, now
        drill = decision.meter in self._injected
        reason = f"{decision.reason} (a drill)" if drill else decision.reason
        numbers = {"drill": drill, **decision.numbers()}
        self._send({"kind": "decision", "at": now, "level": decision.level, "reason": reason, **numbers})
        if worse or (still and decision.level == "critical"):
            self._wake()


def _meter(level: MemoryUse) -> Meter:
    return Meter("ram", level.used, level.limit, level.source)


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
