"""How fast a run is and how long it will take, from what the ledger counts. Pure but for the clock it is given."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from brainenc.extract.attempts import LedgerState
from brainenc.extract.config import ExtractProgress

WINDOW_S = 30.0
"""The rate shown is that of the last half minute: start-up fades, a change is seen."""


class Meter:
    """Turns counts into rates. Driver only; one thread.

    Args:
        images_total: images that the run has to compute.
        shards_total: shards that it has to seal, per collection.
        note: said with the first figures.
        clock: seconds, monotonic.
    """

    def __init__(
        self, images_total: int, shards_total: int, *, note: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._images_total, self._shards_total, self._clock = images_total, shards_total, clock
        self._note = note
        self._points: deque[tuple[float, int]] = deque()
        self._deaths = 0

    def read(self, state: LedgerState, shards_sealed: int) -> ExtractProgress:
        """Figures of this moment."""
        now, done = self._clock(), min(state.rows, self._images_total)
        if done:
            self._points.append((now, done))
        while len(self._points) > 2 and now - self._points[0][0] > WINDOW_S:
            self._points.popleft()
        rate = self._rate()
        note, self._note = self._note, ""
        if len(state.deaths) > self._deaths:
            note = f"{len(state.deaths)} worker(s) died and were replaced"
        self._deaths = len(state.deaths)
        limits = [r.limit_bytes for r in state.readings.values() if r.limit_bytes]
        gpus = [r.gpu_fraction for r in state.readings.values() if r.gpu_fraction is not None]
        return ExtractProgress(
            images_done=done, images_total=self._images_total, images_per_s=rate,
            seconds_left=(self._images_total - done) / rate if rate else None,
            shards_sealed=shards_sealed, shards_total=self._shards_total, retries=len(state.deaths),
            memory_bytes=state.used_bytes, memory_limit_bytes=min(limits, default=0),
            gpu_fraction=max(gpus, default=None), note=note,
        )  # fmt: skip

    def _rate(self) -> float:
        if len(self._points) < 2:
            return 0.0
        (t0, n0), (t1, n1) = self._points[0], self._points[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0
