"""From readings to ok, warn or critical. Pure: time is passed in, nothing is read, nothing is done.

Two things make a reading critical. The fraction used is at or above the threshold; or, from 70 % on, memory grows so
steadily that what is left would be gone before a checkpoint could be written. A fast leak is thus caught before the
threshold, and a slow one, or one big allocation, is no alarm.

Standard library only: the watcher process imports this.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil
from typing import Any, Literal, NamedTuple

from brainenc.errors import UsageError
from brainenc.guard.messages import Level, OrderKind

RANK: dict[Level, int] = {"ok": 0, "warn": 1, "critical": 2}
_PRESETS = {4: (0.90, 0.92, 0.85, 0.88), 6: (0.88, 0.90, 0.83, 0.86), 8: (0.85, 0.88, 0.80, 0.84)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """Fractions of the limit at which to warn and to act. The defaults are those for a batch of 4."""

    gpu_warn: float = 0.90
    gpu_critical: float = 0.92
    ram_warn: float = 0.85
    ram_critical: float = 0.88

    def __post_init__(self) -> None:
        for kind, warn, critical in (("gpu", *self.pair("gpu")), ("ram", *self.pair("ram"))):
            if not 0 < warn <= critical <= 1:
                raise UsageError(
                    f"The {kind} thresholds are {warn:g} and {critical:g}; "
                    "wanted are two fractions of the limit, the warning first: 0 < warn <= critical <= 1."
                )

    @classmethod
    def for_batch_size(cls, batch_size: int) -> Thresholds:
        """The stricter, the larger the batch, whose activations come and go in one step: presets for 4, 6 and 8."""
        gpu_warn, gpu_critical, ram_warn, ram_critical = _PRESETS[cls.preset(batch_size)]
        return cls(gpu_warn=gpu_warn, gpu_critical=gpu_critical, ram_warn=ram_warn, ram_critical=ram_critical)

    @staticmethod
    def preset(batch_size: int) -> int:
        """Whose row counts: the largest preset that is no larger, or the smallest.

        Raises:
            UsageError: no batch.
        """
        if batch_size < 1:
            raise UsageError(f"A batch holds at least 1 sample, found {batch_size}. There are presets for 4, 6 and 8.")
        return max((size for size in _PRESETS if size <= batch_size), default=min(_PRESETS))

    def pair(self, meter: str) -> tuple[float, float]:
        """Warning and critical fraction of a meter: ``"ram"``, or ``"gpu"`` and anything that begins so."""
        if meter.startswith("gpu"):
            return self.gpu_warn, self.gpu_critical
        return self.ram_warn, self.ram_critical

    def doubts(self) -> list[str]:
        """What is allowed but unwise about them, a sentence each."""
        found = []
        if self.gpu_critical > 0.95:
            found.append(
                f"GPU {self.gpu_critical:.0%} is above 95 %: the next allocation may fail before anything is saved."
            )
        if self.ram_critical > 0.90:
            found.append(
                f"RAM {self.ram_critical:.0%} is above 90 %: the system gets unstable, and the kernel may kill first."
            )
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """How readings become levels."""

    thresholds: Thresholds = field(default_factory=Thresholds)
    hysteresis: float = 0.02
    """A level is left only this far below the threshold by which it was entered."""
    dwell_s: float = 5.0
    """A level lasts at least this long, once entered; relief is tried, and a warning printed, at most once in it."""
    predict_from: float = 0.70
    """Fraction used from which growth alone can be critical."""
    window_s: float = 0.25
    """Growth must have gone on for this long: one big array is no leak."""
    safety: float = 1.5
    """How many times the measured duration of a checkpoint must fit into the time left."""


class Meter(NamedTuple):
    """One thing that can fill up: ``"ram"`` or ``"gpu0"``, bytes used and bytes there are."""

    name: str
    used: int
    limit: int
    source: str = ""
    """Which of several of this name: each group and the host are full at their own limits, and grow by themselves."""

    @property
    def key(self) -> tuple[str, str]:
        """Name and source."""
        return self.name, self.source


class Timing(NamedTuple):
    """What was measured in this run. Seconds."""

    save_s: float = 1.0
    """A checkpoint, from the order to durable."""
    step_s: float = 0.5
    """One step of the loop: so long it may take until the boundary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """A level and the numbers behind it."""

    level: Level
    meter: str
    used: int
    limit: int
    threshold: float
    """Fraction at which this level begins (at ``ok``: where the warning would)."""
    rate: float = 0.0
    """Bytes a second, the least over thirds of the window; 0 when it does not grow all the time."""
    seconds_left: float = float("inf")
    """Until the limit, at that rate."""
    needed_s: float = 0.0
    """What saving at the next boundary takes, with the safety factor."""
    predicted: bool = False
    """Critical by growth, not by threshold."""
    urgent: bool = False
    """The next step boundary would be too late."""
    held: bool = False
    """The reading itself is below this level, which only lasts for its dwell."""

    @property
    def fraction(self) -> float:
        """Used over limit."""
        return self.used / self.limit if self.limit else 0.0

    @property
    def reason(self) -> str:
        """One sentence with the numbers."""
        gigabytes = f"{self.used / 1e9:.2f}GB/{self.limit / 1e9:.1f}GB"
        name = "GPU" + self.meter[3:] if self.meter.startswith("gpu") else self.meter.upper()
        text = f"{name} usage is {self.fraction:.1%} ({gigabytes})"
        if self.predicted:
            return f"{text} and grows by {self.rate / 1e6:.0f} MB/s: full in {self.seconds_left:.2f} s"
        if self.level == "ok":
            return text
        return f"{text}, {'lately ' if self.fraction < self.threshold else ''}at or above {self.threshold:.0%}"

    def numbers(self) -> dict[str, Any]:
        """Everything as plain values, for records."""
        return {
            "meter": self.meter, "used": self.used, "limit": self.limit, "fraction": round(self.fraction, 4),
            "threshold": self.threshold, "rate": round(self.rate), "needed_s": round(self.needed_s, 3),
            "seconds_left": None if self.seconds_left == float("inf") else round(self.seconds_left, 3),
            "predicted": self.predicted, "urgent": self.urgent, "held": self.held,
        }  # fmt: skip


class Growth(NamedTuple):
    """Bytes a second that a meter grows."""

    steady: float = 0.0
    """The least over the thirds of the window: what goes on."""
    latest: float = 0.0
    """Over the last third: what happens now, a large allocation included."""


class Trend:
    """How steadily one meter grows: its readings of the last ``window_s`` seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, readings: Iterable[tuple[float, int]]) -> None:
        """Keep readings, forget those that are too old (one older than the window stays, as its left edge)."""
        self._seen.extend(readings)
        while len(self._seen) > 2 and self._seen[1][0] <= self._seen[-1][0] - self._window_s:
            self._seen.popleft()

    def growth(self) -> Growth:
        """How fast it grows; zeros while the window is not full.

        A single large allocation fills one third of the window, a leak all three.
        """
        if len(self._seen) < 4:
            return Growth()
        start, end = self._seen[0], self._seen[-1]
        span = end[0] - start[0]
        if span < self._window_s:
            return Growth()
        edges = (start, self._at(start[0] + span / 3), self._at(start[0] + span * 2 / 3), end)
        rates = [(b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else 0.0 for a, b in pairwise(edges)]
        return Growth(max(0.0, min(rates)), max(0.0, rates[-1]))

    def _at(self, moment: float) -> tuple[float, int]:
        """The reading nearest to a moment between the first and the last."""
        after = bisect_left(self._seen, moment, 1, len(self._seen) - 1, key=_when)
        before, behind = self._seen[after - 1], self._seen[after]
        return before if moment - before[0] <= behind[0] - moment else behind


def _when(seen: tuple[float, int]) -> float:
    return seen[0]


def classify(meter: Meter, growth: Growth, timing: Timing, config: PolicyConfig, previous: Level = "ok") -> Decision:
    """Judge one meter.

    Args:
        meter: what it reads.
        growth: how fast it grows.
        timing: how long a checkpoint and a step take.
        config: thresholds and the rest.
        previous: its level so far; it is left only ``hysteresis`` below its threshold.
    """
    warn, critical = config.thresholds.pair(meter.name)
    fraction = meter.used / meter.limit if meter.limit else 0.0
    needed = config.safety * timing.save_s + timing.step_s
    by_level = fraction >= critical - (config.hysteresis if previous == "critical" else 0.0)
    predicted = not by_level and fraction >= config.predict_from and _left(meter, growth.steady) < needed
    level: Level = "ok"
    if by_level or predicted:
        level = "critical"
    elif fraction >= warn - (config.hysteresis if previous != "ok" else 0.0):
        level = "warn"
    rate = growth.latest if by_level else growth.steady
    left = _left(meter, rate)
    # A GPU that is full raises an error that can be caught, and what grows in a step are activations: it can wait.
    waits = meter.name.startswith("gpu")
    return Decision(
        level=level, meter=meter.name, used=meter.used, limit=meter.limit, rate=rate, seconds_left=left,
        threshold=critical if by_level else config.predict_from if predicted else warn, needed_s=needed,
        predicted=predicted, urgent=level == "critical" and not waits and left < timing.save_s + timing.step_s,
    )  # fmt: skip


def _left(meter: Meter, rate: float) -> float:
    return (meter.limit - meter.used) / rate if rate > 0 else float("inf")


class Policy:
    """Levels over time: trends, hysteresis and dwell of every meter. Deterministic in what it is told.

    Args:
        config: thresholds and the rest.
    """

    def __init__(self, config: PolicyConfig | None = None) -> None:
        self.config = config or PolicyConfig()
        self._trends: dict[tuple[str, str], Trend] = {}
        self._levels: dict[tuple[str, str], tuple[Level, float]] = {}

    def look(self, now: float, meters: Iterable[Meter], timing: Timing) -> Decision:
        """The worst decision over all meters, at ``now`` (seconds of any monotonic clock)."""
        worst = max((self._one(now, meter, timing) for meter in meters), key=_badness, default=None)
        return worst or Decision(level="ok", meter="ram", used=0, limit=0, threshold=self.config.thresholds.ram_warn)

    def note(self, meter: Meter, readings: Iterable[tuple[float, int]]) -> None:
        """Readings of a meter that are not judged, so that growth is known as well as if all were.

        Args:
            meter: which.
            readings: when, and how many bytes were used.
        """
        if (trend := self._trends.get(meter.key)) is not None:
            trend.add(readings)

    def same_level(self, meter: Meter) -> tuple[int, int]:
        """The least and the most bytes used between which this meter passes no threshold, and leaves none either."""
        config = self.config
        fractions = [t - h for t in config.thresholds.pair(meter.name) for h in (0.0, config.hysteresis)]
        edges = [fraction * meter.limit for fraction in (*fractions, config.predict_from)]
        least = max((ceil(edge) for edge in edges if edge <= meter.used), default=0)
        return least, min((ceil(edge) - 1 for edge in edges if edge > meter.used), default=meter.limit)

    def _one(self, now: float, meter: Meter, timing: Timing) -> Decision:
        trend = self._trends.setdefault(meter.key, Trend(self.config.window_s))
        trend.add([(now, meter.used)])
        before, since = self._levels.get(meter.key, ("ok", now))
        decision = classify(meter, trend.growth(), timing, self.config, before)
        if RANK[decision.level] < RANK[before] and now - since < self.config.dwell_s:
            return _held(decision, before, self.config.thresholds)
        if decision.level != before and not decision.predicted:  # growth that stops is forgotten at once: there is time
            self._levels[meter.key] = (decision.level, now)
        return decision


def _held(decision: Decision, level: Level, thresholds: Thresholds) -> Decision:
    """The same numbers at the level that has not lasted long enough to be left."""
    warn, critical = thresholds.pair(decision.meter)
    return replace(decision, level=level, threshold=critical if level == "critical" else warn, held=True)


class Escalation:
    """What to do about critical memory: shrink; still critical one dwell later means stop. A shrink that has helped is
    forgotten: if memory gets short again one day, shrinking is tried again. One thread at a time.

    Args:
        first: what is done first.
        dwell_s: so long a shrink may take to show.
    """

    def __init__(self, first: Literal["stop", "shrink"], dwell_s: float) -> None:
        self._first, self._dwell_s = first, dwell_s
        self._shrunk_at = float("-inf")
        self._helped = False

    def shrunk(self, now: float) -> None:
        """It was just done."""
        self._shrunk_at, self._helped = now, False

    def calm(self) -> None:
        """Memory is not critical, or no longer."""
        self._helped = True

    def critical(self, now: float) -> OrderKind | None:
        """Memory is critical: what to do; None: it has just shrunk, wait."""
        helped, self._helped = self._helped, False
        if self._first == "stop" or self._shrunk_at == float("-inf"):
            return self._first
        if now - self._shrunk_at < self._dwell_s:
            return None
        if not helped:
            return "stop"
        self._shrunk_at = float("-inf")
        return "shrink"


def _badness(decision: Decision) -> tuple[int, bool, float]:
    return RANK[decision.level], decision.urgent, decision.fraction


TENSE_S = 0.01
"""Between two looks from 70 % on."""
TENSE_FROM = 0.70
FASTEST = 14e9
"""Bytes a second at which a machine was seen to fill."""


def sampling_interval(
    used: int, limit: int, *, calm_s: float = 0.1, tense_s: float = TENSE_S, from_: float = TENSE_FROM
) -> float:
    """Seconds until the next look: ``tense_s`` from 70 % on, else as long as the way there takes at memory's own speed.

    A machine fills at up to 14 GB/s (measured), that is 1.4 GB between two calm looks: with a small limit, looking
    every 100 ms would see 50 % and then nothing more.
    """
    room = from_ * limit - used
    return min(calm_s, max(tense_s, room / FASTEST)) if room > 0 else tense_s


def free_below(meter: Meter, config: PolicyConfig) -> int:
    """Bytes that may still be allocated without reaching the critical threshold."""
    return max(0, int(config.thresholds.pair(meter.name)[1] * meter.limit) - meter.used)
