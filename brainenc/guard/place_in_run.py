"""Where a plain script is: epoch, batch, whether its weights are in the middle of an update, its random numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from brainenc.guard import pytorch as files


class PlaceInRun:
    """Kept up to date by the guard's ``check`` and by hooks on the optimizers. One thread."""

    def __init__(self) -> None:
        self.epoch = self.step = 0
        self.updating = False
        """``optimizer.step()`` is running: the weights are of no step."""
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
        self._began, self.step, self._stepped, self.updating, self._rng = now, step, False, False, None

    def finish_epoch(self) -> None:
        """The next batch is the first of the next epoch."""
        self.epoch, self.step, self._stepped, self._rng, self.epoch_rng = self.epoch + 1, 0, False, None, None

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
        self.updating = True

    def _after(self, *_: Any) -> None:
        self.updating, self._stepped = False, True
        self.after_update()
