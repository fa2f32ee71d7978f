"""Where a plain script is: epoch, batch, whether its weights are in the middle of an update, its random numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from brainenc.guard import pytorch as files
from brainenc.guard.updating import UpdatingFlag

SETTLING_S = 0.02
"""So soon after an update whatever belongs to it is done as well."""


class PlaceInRun:
    """Kept up to date by the guard's ``check`` and by hooks on the optimizers. One thread.

    Args:
        settles: more is saved than a model and its optimizer: a scheduler, a scaler, averages. They step right after
            the update, and are of no step until they have.
    """

    def __init__(self, *, settles: bool = False) -> None:
        self._settles = settles
        self._updated_at = float("-inf")
        self._ended = False
        self.epoch = self.step = 0
        self.flag = UpdatingFlag(-1)
        """Up while ``optimizer.step()`` is running: the weights are of no step."""
        self.step_s = 0.5
        self._stepped = False
        self._rng: dict[str, Any] | None = None
        self.epoch_rng: dict[str, Any] | None = None
        self._began = 0.0
        self.after_update: Callable[[], object] = lambda: None

    def begin(self, epoch: int | None, step: int) -> None:
        """Batch ``step`` begins: what came before it is finished."""
        now = time.monotonic()
        if self._began:
            self.step_s += 0.2 * (now - self._began - self.step_s)
        if epoch is not None:
            self.epoch = epoch
        self._began, self.step, self._stepped, self._rng = now, step, False, None
        self._ended = self.flag.up = False

    def end_batches(self, n: int) -> None:
        """All ``n`` batches of the epoch are finished. The epoch is not: evaluation and a scheduler's step may follow,
        which a script that is stopped in them does again, with the random numbers of this moment."""
        self.step, self._stepped, self._ended = n, False, True
        self.remember_rng()

    def finish_epoch(self, *, if_ended: bool = False) -> None:
        """The next batch is the first of the next epoch."""
        if self._ended or not if_ended:
            self.epoch, self.step, self._stepped, self._rng, self.epoch_rng = self.epoch + 1, 0, False, None, None
            self._ended = False

    @property
    def updating(self) -> bool:
        """The weights are of no step."""
        return self.flag.up

    @property
    def settling(self) -> bool:
        """An update has just ended, and what steps after it may not have done so."""
        return self._settles and self._stepped and time.monotonic() - self._updated_at < SETTLING_S

    def remember_rng(self) -> None:
        """Keep the generators' states at this boundary: a batch broken off later is repeated with the same ones."""
        self._rng = files.capture_rng()

    def finished(self) -> tuple[int, int, dict[str, Any]]:
        """Epoch, finished batches, and the random states to go on with, of the last finished step."""
        if self._stepped:
            return self.epoch, self.step + 1, files.capture_rng()
        return self.epoch, self.step, self._rng or files.capture_rng()

    def hook(self, objects: Iterable[Any]) -> list[Callable[[], None]]:
        """Follow the updates of every optimizer among ``objects``; returns what undoes it."""
        undo: list[Callable[[], None]] = []
        for thing in objects:
            if hasattr(thing, "register_step_pre_hook"):
                undo.append(thing.register_step_pre_hook(self._before).remove)
                undo.append(thing.register_step_post_hook(self._after).remove)
        return undo

    def _before(self, *_: Any) -> None:
        self.flag.up = True

    def _after(self, *_: Any) -> None:
        self._updated_at = time.monotonic()
        self.flag.up, self._stepped = False, True
        self.after_update()
