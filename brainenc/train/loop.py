"""The training loop of one rank: steps, validation, checkpoints, and the ways to end. Knows no Ray and no cluster.

Every rank runs this same code and does the same number of exchanges, whatever happens to one of them: what went wrong
or was ordered travels in the status word, and all ranks draw the same verdict from the same words.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np

from brainenc.errors import BrainencError, TrainingFailed
from brainenc.guard.messages import Order, OutOfTime
from brainenc.out_of_memory import is_out_of_memory
from brainenc.scoring import mean_r, val_perf
from brainenc.train.checkpoint import Contents, Position
from brainenc.train.data import Batch, Loader
from brainenc.train.fitting import FitSettings, Hooks, Outcome, Status
from brainenc.train.saver import Saver
from brainenc.train.schedule import Clock, learning_rate
from brainenc.train.status import Trouble, Verdict, Wish, Word, after_update, decide
from brainenc.train.step import Stepper
from brainenc.train.team import RankLost, Team
from brainenc.train.troubles import as_error, ids, told
from brainenc.train.validation import Part, Validation, predict_part

_NOBODY = "no rank's weights are whole"

_UNSAVED_BORNE = 2
"""Checkpoints that may fail before the run is ended for it."""


class Fit:
    """Trains and validates.

    Args:
        stepper: model, optimizer and step.
        team: the ranks.
        train: loader of the training samples.
        val: loader of the validation samples.
        saver: writes this rank's state.
        settings: see there.
        position: where to begin.
        hooks: see there.
        steps_per_epoch: of the training order.
        val_steps: global batches of a validation.
        vertices: (V_lh, V_rh).
    """

    def __init__(
        self, *, stepper: Stepper, team: Team, train: Loader, val: Loader, saver: Saver, settings: FitSettings,
        position: Position, steps_per_epoch: int, val_steps: int, vertices: tuple[int, int], hooks: Hooks | None = None,
    ) -> None:  # fmt: skip
        self.position = position
        self._stepper, self._team, self._train, self._val, self._saver = stepper, team, train, val, saver
        self._settings, self._hooks = settings, hooks or Hooks()
        self._steps_per_epoch, self._val_steps, self._vertices = steps_per_epoch, val_steps, vertices
        self._snapshots = Clock(every_s=settings.snapshot_every_s, longest_s=25.0)
        self._checkpoints = Clock(every_s=settings.checkpoint_every_s)
        self._failure = ""
        """What went wrong here since the last exchange."""
        self._broken = False
        """The update failed here: the position is that of the step before, and this rank saves nothing more."""
        self._short = False
        """It failed because memory ended, as it does under the guard's brake: that is a reason to stop, no defect."""
        self._unsaved = 0
        self._torn = False
        self._order: Order | None = None
        self._on_the_spot = ""

    # ------------------------------------------------------------------ epochs

    def run(self) -> Outcome:
        """Train to the end, or to the first reason to stop."""
        for clock in (self._snapshots, self._checkpoints):
            clock.start(self._hooks.clock())
        for epoch in range(self.position.validated, self._settings.epochs):
            ended = self._train_epoch(epoch) or self._validate(epoch)
            if ended is not None:
                return ended
        return self._done()

    def _done(self) -> Outcome:
        """All epochs are trained and validated; the run is done if its last checkpoint is durable."""
        self._saver.wait()
        error = self._saver.failure()
        unsaved = next((text for text in self._team.exchange_text(told(error) if error else "") if text), "")
        if not unsaved:
            return Outcome(status="done", position=self.position)
        return Outcome(
            status="failed", position=self.position, reason=unsaved,
            error=TrainingFailed(f"Training ended, but its last checkpoint could not be written: {unsaved}"),
        )  # fmt: skip

    def _train_epoch(self, epoch: int) -> Outcome | None:
        first, last = self.position.step, (epoch + 1) * self._steps_per_epoch
        batches = self._train.run(first, last)
        try:
            for _ in range(first, last):
                if (ended := self._step(batches, epoch)) is not None:
                    return ended
        finally:
            batches.close()  # type: ignore[attr-defined]
        return None

    # ------------------------------------------------------------------ one step

    def _step(self, batches: Iterator[Batch], epoch: int) -> Outcome | None:
        """One optimizer step, tried again with half the micro-batch as often as memory wants it."""
        batch: Batch | None = None
        began = time.perf_counter()
        while True:
            word = self._word()
            try:
                if not self._broken:  # it would be thrown away, and might fail again: the first failure is to be heard
                    if batch is None:
                        batch = next(batches)
                        word = replace(word, waited=self._train.waited)
                    word = self._local(word, batch)
            except OutOfTime as stop:
                word = self._out_of_time(word, stop)
            except Exception as error:
                word = self._local_failure(word, error)
            verdict = decide(self._team.exchange(self._with_wishes(word).row()))
            if verdict.go:
                ended = self._go(verdict, epoch, began, batch)
                return ended if ended is not None else self._after(self._updated(verdict))
            if (ended := self._after(verdict)) is not None:
                return ended

    def _local(self, word: Word, batch: Batch) -> Word:
        """This rank's forward and backward."""
        self._hooks.drill.at(step=self.position.step, rank=self._team.rank)
        with self._hooks.guard.computing():
            loss = self._stepper.local(batch, self.position.step)
        word = replace(word, loss=loss, samples=batch.count)
        return word if math.isfinite(loss) else self._not_finite(word, loss, batch)

    def _word(self) -> Word:
        if not self._broken and self._unsaved <= _UNSAVED_BORNE:
            self._failure = ""
        self._hear_saver()
        now = self._hooks.clock()
        first = self._team.rank == 0 and not self._saver.busy
        return Word(
            step=self.position.step,
            trouble=self._standing_trouble(),
            wish=Wish.STOP if self._short else Wish.NONE,
            micro_batch=self._stepper.micro_batch,
            snapshot=int(first and self._saver.can_snapshot and self._snapshots.due(now)),
            save=int(first and self._checkpoints.due(now)),
        )

    def _standing_trouble(self) -> Trouble:
        if self._broken:
            return Trouble.BROKEN
        if self._unsaved > _UNSAVED_BORNE:
            return Trouble.ERROR
        return Trouble.NONE

    def _hear_saver(self) -> None:
        """Whether writing in the background goes well."""
        if (error := self._saver.failure()) is not None:
            self._not_saved(error)
        elif self._saver.succeeded():
            self._unsaved = 0
        if (seconds := self._saver.took()) is not None:
            self._hooks.guard.save_takes(seconds)

    def _not_saved(self, error: Exception) -> None:
        """One failure is borne, because disks of others come back; then the run ends while it still can be saved.

        The best so far is again one that is there: later scores must not be compared with weights that were not saved.
        """
        self._unsaved += 1
        self.position = replace(self.position, best=self._saver.recorded(self._settings.config.get("id", "")))
        self._hooks.note(f"A checkpoint could not be written at step {self.position.step}: {told(error)}")
        if self._unsaved > _UNSAVED_BORNE:
            self._failure = f"checkpoints could not be written {self._unsaved} times: {told(error)}"

    def _with_wishes(self, word: Word) -> Word:
        """Ask the guard, as late as possible before the exchange."""
        self._order = self._hooks.guard.pending() or self._order
        order = self._order
        if order is None:
            return word
        if order.urgent and not self._on_the_spot and not self._broken:
            self._save_on_the_spot(order.reason)
        return replace(word, wish=max(word.wish, Wish[order.kind.upper()]))

    def _go(self, verdict: Verdict, epoch: int, began: float, batch: Batch | None) -> Outcome | None:
        """Gradients and weights. What fails here is told at the next exchange: the others have gone on already."""
        rate = learning_rate(
            self._settings.learning_rate, epoch, drop=self._settings.lr_drop, gamma=self._settings.lr_gamma
        )
        try:
            norm = self._stepper.update(rate, self._updating)
        except RankLost:
            raise
        except Exception as error:
            self._broken, self._short, self._failure = True, is_out_of_memory(error), told(error)
            return None
        if not math.isfinite(norm):
            self._failure = f"the gradient of step {self.position.step} has the norm {norm}{ids(batch)}"
            return self._end(replace(verdict, trouble=Trouble.NOT_FINITE, go=False, save=False))
        self.position = replace(self.position, step=self.position.step + 1, epoch=epoch, val_perf=None)
        self._hooks.guard.beat(epoch=epoch, step=self.position.step)
        if self._team.rank == 0 and self.position.step % self._settings.log_every == 0:
            took = max(time.perf_counter() - began, 1e-9)
            self._hooks.record({
                "epoch": epoch, "step": self.position.step, "split": "train", "loss": verdict.loss, "lr": rate,
                "grad_norm": norm, "samples_per_s": verdict.samples / took, "step_s": took,
                "data_wait_share": min(1.0, verdict.waited / took), "micro_batch": self._stepper.micro_batch,
                "steps": self._steps_per_epoch * self._settings.epochs,
            })  # fmt: skip
        return None

    def _updated(self, verdict: Verdict) -> Verdict:
        """Where something is to be saved, first hear whose update ended; other steps hear it with the next word."""
        if not (verdict.save or verdict.snapshot):
            return verdict
        words = self._team.exchange(np.array([self._broken, self._short], dtype=np.float64)).astype(bool)
        return after_update(verdict, words[:, 0].tolist(), short=bool(words[:, 1].any()))

    # ------------------------------------------------------------------ trouble on this rank

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """While weights are overwritten; when that does not end well they stay marked as torn."""
        self._torn = True
        with self._hooks.guard.updating():
            yield
        self._torn = False

    def _not_finite(self, word: Word, loss: float, batch: Batch) -> Word:
        self._failure = f"the loss of step {self.position.step} is {loss}{ids(batch)}"
        return replace(word, trouble=max(word.trouble, Trouble.NOT_FINITE), loss=0.0)

    def _local_failure(self, word: Word, error: Exception) -> Word:
        """Void gradients, whole weights. The traceback is cut loose: its frames hold the tensors that did not fit."""
        short = is_out_of_memory(error)
        self._failure = told(error)
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        if short:
            self._stepper.relieve()
            if self._settings.stop_when_short:
                word = replace(word, wish=Wish.STOP)
        trouble = Trouble.OUT_OF_MEMORY if short else Trouble.ERROR
        return replace(word, trouble=max(word.trouble, trouble))

    def _out_of_time(self, word: Word, stop: OutOfTime) -> Word:
        """The guard saw memory run out before the step would end: save first, then tell the others."""
        traceback.clear_frames(stop.__traceback__)
        stop.__traceback__ = None
        self._stepper.relieve()
        self._order = stop.order or self._hooks.guard.pending() or self._order
        self._failure = self._order.reason if self._order else str(stop)
        if not self._on_the_spot and not self._broken:
            self._save_on_the_spot(self._failure)
        wish = Wish[self._order.kind.upper()] if self._order else Wish.STOP
        return replace(word, trouble=max(word.trouble, Trouble.OUT_OF_MEMORY), wish=max(word.wish, wish))

    def _save_on_the_spot(self, reason: str) -> None:
        """Save the last finished step without waiting for anybody."""
        try:
            self._on_the_spot = str(self._saver.emergency(self._contents(), reason))
        except Exception as error:  # a MemoryError, too: the other ranks must still hear of it
            self._hooks.note(told(error))
            self._hooks.guard.saved(path="", step=self.position.step, epoch=self.position.epoch, error=told(error))
        else:
            self._hooks.guard.saved(path=self._on_the_spot, step=self.position.step, epoch=self.position.epoch)

    # ------------------------------------------------------------------ after the verdict

    def _after(self, verdict: Verdict) -> Outcome | None:
        """Snapshots, checkpoints, shrinking, stopping: the same on all ranks."""
        if verdict.snapshot and not verdict.stop:
            self._take_snapshot()
        if verdict.stop:
            return self._end(verdict)
        if verdict.wish:
            self._emergency(verdict, self._reason(verdict))
            self._order, self._on_the_spot = None, ""
        elif verdict.save:
            self._checkpoint()
        if verdict.shrink:
            self._shrink(verdict)
        return None

    def _take_snapshot(self) -> None:
        cost = 0.0
        if self._team.local_rank == 0 and self._saver.can_snapshot and not self._saver.busy:
            cost = self._saver.snapshot(self._contents())
        self._snapshots.done(self._hooks.clock(), cost)

    def _checkpoint(self, *, best: bool = False) -> None:
        if self._team.rank == 0:
            try:
                self._saver.checkpoint(self._contents(), best=best)
            except (OSError, BrainencError) as error:
                self._not_saved(error)
            else:
                self._unsaved = self._unsaved if self._saver.can_snapshot else 0
        now = self._hooks.clock()
        self._checkpoints.done(now, 0.0)
        self._snapshots.done(now, 0.0)

    def _shrink(self, verdict: Verdict) -> None:
        self._stepper.shrink()
        self.position = replace(self.position, micro_batch=self._stepper.micro_batch)
        why = "ran out of memory" if verdict.trouble else "was asked to use less memory"
        if self._team.rank == 0:
            self._hooks.note(
                f"Rank {', '.join(map(str, verdict.who))} {why} at step {self.position.step}: micro-batches of "
                f"{self._stepper.micro_batch} from here on, accumulated to the same batch."
            )

    def _emergency(self, verdict: Verdict, reason: str, at: Position | None = None) -> tuple[str, str]:
        """Have the first rank that can write a whole copy; all ranks hear where it lies, or why there is none.

        Args:
            verdict: with the ranks whose weights count.
            reason: goes into the checkpoint.
            at: the position of those ranks, where this one is not among them.
        """
        answer = ""
        if not verdict.healthy:  # what was saved on the spot is of this very step: its update began after it
            answer = next((text for text in self._team.exchange_text(self._on_the_spot) if text), f"!{_NOBODY}")
        for writer in verdict.healthy:
            mine = ""
            if self._team.rank == writer:
                try:
                    mine = str(self._saver.emergency(self._contents(), reason))
                except Exception as error:  # a MemoryError, too: the other ranks wait for this word
                    mine = f"!{told(error)}"
            answer = self._team.exchange_text(mine)[writer]
            if not answer.startswith("!"):
                break
        path, why = ("", answer[1:]) if answer.startswith("!") else (answer, "")
        at = at or self.position
        self._hooks.guard.saved(path=path, step=at.step, epoch=at.epoch, error=why)
        return path, why

    def _reason(self, verdict: Verdict) -> str:
        mine = self._order.reason if self._order else ""
        told = self._team.exchange_text(mine)
        return next((text for text in told if text), verdict.wish.name.lower())

    def _end(self, verdict: Verdict) -> Outcome:
        """Stop here, at the same step on all ranks."""
        what = next((text for text in self._team.exchange_text(self._failure) if text), "") if verdict.trouble else ""
        path, unsaved = "", ""
        reason = what or self._reason(verdict)
        position = self._last_finished(verdict)
        began = time.perf_counter()
        if verdict.save or verdict.wish == Wish.STOP or verdict.trouble == Trouble.BROKEN:
            path, unsaved = self._emergency(verdict, reason, position)
        took = time.perf_counter() - began
        self._settle()
        error: BrainencError | None = None
        if verdict.trouble and (verdict.wish != Wish.STOP or unsaved):
            error = as_error(verdict, what, position, unsaved)
        elif unsaved:
            error = TrainingFailed(f"Stopped at step {position.step} ({reason}), but nothing was saved: {unsaved}")
        status: Status = "failed" if error else "stopped"
        return Outcome(
            status=status,
            position=position,
            reason=reason,
            checkpoint=path or self._on_the_spot,
            save_s=took,
            error=error,
        )

    def _last_finished(self, verdict: Verdict) -> Position:
        """The position of the ranks whose weights count: those whose update failed are a step behind them."""
        if verdict.trouble != Trouble.BROKEN or not verdict.healthy:
            return self.position
        return Position(**self._team.broadcast(asdict(self.position), verdict.healthy[0]))

    def save_what_is_whole(self) -> None:
        """Another rank is gone, or this one is going: save the last finished step, if this rank's copy counts.

        Called outside any update, so that the weights are those between two steps.
        """
        if self._broken or self._torn or self.position.step == 0:
            return
        try:
            self._saver.emergency(self._contents(), "another rank was lost")
        except Exception as error:
            self._hooks.note(f"Nothing was saved when another rank was lost: {error}")

    def _settle(self) -> None:
        """A write in hand may fail now without harm: the emergency checkpoint is newer."""
        self._saver.wait()
        if (error := self._saver.failure()) is not None:
            self._hooks.note(f"A checkpoint in the background failed: {told(error)}")

    def _contents(self) -> Contents:
        position = replace(self.position, micro_batch=self._stepper.micro_batch)
        return Contents(
            position=position, weights=self._stepper.model.state_dict,
            optimizer=self._stepper.optimizer.state_dict(), config=self._settings.config,
            provenance=self._settings.provenance, scheduler=self._settings.scheduler, random=self._settings.random,
        )  # fmt: skip

    # ------------------------------------------------------------------ validation

    def _validate(self, epoch: int) -> Outcome | None:
        """Loss and correlation on the validation samples, each rank on its share; then a checkpoint."""
        sums = Validation(self._vertices)
        batches = self._val.run(0, self._val_steps)
        try:
            for _ in range(self._val_steps):
                if (ended := self._validation_step(batches, sums)) is not None:
                    return ended
        finally:
            batches.close()  # type: ignore[attr-defined]
        self._finish_validation(epoch, sums)
        return None

    def _validation_step(self, batches: Iterator[Batch], sums: Validation) -> Outcome | None:
        batch: Batch | None = None
        while True:
            word = self._word()
            predicted: list[Part] = []
            try:
                if not self._broken:
                    if batch is None:
                        batch = next(batches)
                    with self._hooks.guard.computing():
                        total, predicted = predict_part(self._stepper, batch)
                    word = replace(word, loss=total, samples=batch.count)
            except OutOfTime as stop:
                word = self._out_of_time(word, stop)
            except Exception as error:
                word = self._local_failure(word, error)
            verdict = decide(self._team.exchange(self._with_wishes(replace(word, snapshot=0, save=0)).row()))
            if verdict.go:
                sums.add(verdict, predicted)
            if (ended := self._after(verdict)) is not None or verdict.go:
                return ended

    def _finish_validation(self, epoch: int, sums: Validation) -> None:
        r_lh, r_rh = sums.correlations(self._team)
        perf = val_perf(r_lh, r_rh)
        best = self.position.best is None or perf > self.position.best
        self.position = replace(
            self.position, validated=epoch + 1, val_perf=perf, best=perf if best else self.position.best
        )
        if self._team.rank == 0:
            self._hooks.record({
                "epoch": epoch, "step": self.position.step, "split": "val", "loss": sums.loss, "r_lh": mean_r(r_lh),
                "r_rh": mean_r(r_rh), "val_perf": perf, "best": best,
            })  # fmt: skip
            if best:
                self._hooks.scored(r_lh, r_rh, self.position)
        self._checkpoint(best=best)
        self._team.exchange_text("")  # rank 0 may have had to wait for a slow disk: longer than a word may take
