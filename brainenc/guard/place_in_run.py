"""Where a plain script is: epoch, batch, whether its weights are in the middle of an update, its random numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from brainenc.guard import pytorch as files
from brainenc.guard.updating import UpdatingFlag

SETTLING_S = 0.02
"""So soon after an update whatever belongs to it is done as well."""
_LONG_S = 0.05
"""Steps that take longer have their random states kept every time: 0.05 ms, which is a thousandth of them."""
_MENDS_WITHIN = 3
"""So many batches a script that went on after a broken update may take to finish another."""
_MOST_BATCHES = 64
"""So many batches an update may take."""


class Boundary(NamedTuple):
    """A moment to go on from: nothing of what came before it is half done."""

    epoch: int
    step: int
    """Batches of the epoch that are finished."""
    rng: dict[str, Any]
    epoch_rng: dict[str, Any] | None
    """The random states at the start of the epoch, from which its order was drawn."""


class PlaceInRun:
    """Kept up to date by the guard's ``check`` and ``batches``, and by hooks on the optimizers. One thread.

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
        """Up while ``optimizer.step()`` is running: the weights are of no step. It stays up after one that an error
        broke off, until one is finished."""
        self.step_s = 0.5
        self.begun = False
        """A batch of training has begun."""
        self._stepped = False
        self._since = self._takes = 0
        """Batches that have begun since the last update, and how many one has taken at most."""
        self._updates = self._broken_for = 0
        self._counted = self._hooked = False
        self._mark: Boundary | None = None
        self._rng: dict[str, Any] | None = None
        self.epoch_rng: dict[str, Any] | None = None
        self._began = 0.0
        self.after_update: Callable[[], object] = lambda: None

    def before_batch(self, step: int, *, closely: bool) -> None:
        """Batch ``step`` is about to be fetched: what a loader in this process draws for it is drawn again as well.

        Args:
            step: its number.
            closely: something is wrong: keep the random states however short the steps are.
        """
        self._counted = True
        if self._gathers:
            return  # what was gathered is gone when the script ends: it goes on from before that
        if closely or self.step_s >= _LONG_S:
            self._mark = Boundary(self.epoch, step, files.capture_rng(), self.epoch_rng)
        else:
            self._mark = None

    def begin(self, epoch: int | None, step: int) -> None:
        """Batch ``step`` begins: what came before it is finished."""
        now = time.monotonic()
        if self._began:
            self.step_s += 0.2 * (now - self._began - self.step_s)
        if epoch is not None:
            self.epoch = epoch
        self._began, self.step, self._stepped, self._rng = now, step, False, None
        self._ended, self.begun = False, True
        self._since += 1
        self._broken_for = self._broken_for + 1 if self.updating else 0

    def end_batches(self, n: int) -> None:
        """All ``n`` batches of the epoch are finished. The epoch is not: evaluation and a scheduler's step may follow,
        which a script that is stopped in them does again, with the random numbers of this moment."""
        self.step, self._stepped, self._ended = n, False, True
        self._mark = self._mark if self._gathers else None  # the next epoch goes on gathering
        self.remember_rng()

    def finish_epoch(self, *, if_ended: bool = False) -> None:
        """The next batch is the first of the next epoch."""
        if self._ended or not if_ended:
            self.epoch, self.step, self._stepped, self._rng, self.epoch_rng = self.epoch + 1, 0, False, None, None
            self._ended, self._mark = False, self._mark if self._gathers else None

    @property
    def _gathers(self) -> bool:
        """Gradients of earlier batches wait for an update that takes several."""
        # Twice as many as it took: those that an epoch leaves over may wait for the next one.
        most = min(2 * self._takes, _MOST_BATCHES) if self._updates else _MOST_BATCHES * self._hooked
        return 0 < self._since < most

    @property
    def updating(self) -> bool:
        """The weights are of no step."""
        return self.flag.up

    @property
    def may_mend(self) -> bool:
        """An update was broken off, and the script goes on: the next one makes the weights those of a step again."""
        return 0 < self._broken_for <= _MENDS_WITHIN

    @property
    def settling(self) -> bool:
        """An update has just ended, and what steps after it may not have done so."""
        return self._settles and self._stepped and time.monotonic() - self._updated_at < SETTLING_S

    @property
    def exact(self) -> bool:
        """What would be saved now goes on with the same numbers; at one of the next boundaries it will."""
        return not self._counted or self._stepped or self._ended or self._mark is not None

    @property
    def goes_back(self) -> bool:
        """What would be saved now goes on before batches that are finished: their gathered gradients are not kept."""
        return not self._stepped and self._mark is not None and self._mark[:2] != (self.epoch, self.step)

    def remember_rng(self) -> None:
        """Keep the generators' states at this boundary: a batch broken off later is repeated with the same ones."""
        self._rng = files.capture_rng()

    def finished(self) -> Boundary:
        """Where to go on after the last finished step."""
        if self._stepped:
            return Boundary(self.epoch, self.step + 1, files.capture_rng(), self.epoch_rng)
        if self._mark is not None:
            return self._mark
        return Boundary(self.epoch, self.step, self._rng or files.capture_rng(), self.epoch_rng)

    def hook(self, objects: Iterable[Any]) -> list[Callable[[], None]]:
        """Follow the updates of every optimizer among ``objects``; returns what undoes it."""
        undo: list[Callable[[], None]] = []
        for thing in objects:
            if hasattr(thing, "register_step_pre_hook"):
                undo.append(thing.register_step_pre_hook(self._before).remove)
                undo.append(thing.register_step_post_hook(self._after).remove)
        self._hooked = bool(undo)
        return undo

    def _before(self, *_: Any) -> None:
        self.flag.up = True

    def _after(self, *_: Any) -> None:
        self._updated_at = time.monotonic()
        self._takes, self._since = min(max(self._since, self._takes), _MOST_BATCHES), 0
        self._updates += 1
        self.flag.up, self._stepped = False, True
        self.after_update()
