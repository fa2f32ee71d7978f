"""Starting a run: in this process, or on workers of Ray Train. Driver."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from brainenc.addresses import resolve
from brainenc.errors import BrainencError
from brainenc.guard.messages import EXIT_STOPPED_SAFELY
from brainenc.train import finished, orders, prepare
from brainenc.train.alone import train_alone
from brainenc.train.config import TrainConfig, Workers
from brainenc.train.elsewhere import address_of
from brainenc.train.encoders.base import RIDGE
from brainenc.train.follow import Note, Progress
from brainenc.train.inputs import OpenViews, StoredViews
from brainenc.train.on_ray.fit import train_on_ray
from brainenc.train.published import split_unknown
from brainenc.train.ridge_run import finished_ridge, run_ridge
from brainenc.train.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended."""

    status: str
    """``done``, ``stopped`` or ``failed``."""
    run_folder: str
    epoch: int
    step: int
    val_perf: float | None
    """The best of the run."""
    reason: str = ""
    checkpoint: str = ""
    """The emergency checkpoint, where one was written."""
    save_s: float = 0.0
    """Seconds that it took."""
    error: BrainencError | None = None

    @property
    def exit_code(self) -> int:
        """0 done, 75 stopped safely and resumable, 1 failed."""
        if self.status == "done":
            return 0
        return EXIT_STOPPED_SAFELY if self.status == "stopped" else 1


def train(
    config: TrainConfig, *, open_views: OpenViews | None = None, progress: Progress | None = None,
    note: Note | None = None,
) -> TrainResult:  # fmt: skip
    """Start a new run.

    Args:
        config: what to train; its run folder must not hold a run.
        open_views: what opens the features, for features that are not in a store; must pickle.
        progress: called with each record, in this process.
        note: called with lines for a person.

    Raises:
        BrainencError: the inputs are not usable; nothing was started.
    """
    resolve(config.address, command="train")  # refuse what cannot be joined before anything is made
    folder = RunFolder(config.out)
    note, config = note or _ignore, replace(config, id=secrets.token_hex(8))
    views = open_views or StoredViews(config)
    prepare.check(config, views, note=note)
    folder.create(config)
    prepare.save_split(config, folder)
    return _launch(config, views, progress or _ignore, note)


def resume(
    run_folder: str | Path, changes: Mapping[str, Any] | None = None, *, open_views: OpenViews | None = None,
    progress: Progress | None = None, note: Note | None = None,
) -> TrainResult:  # fmt: skip
    """Go on with a run from its newest checkpoint that verifies.

    Args:
        run_folder: of the run.
        changes: fields of the configuration that are different from here on; see ``CHANGEABLE``.
        open_views: as for :func:`train`.
        progress: as for :func:`train`.
        note: as for :func:`train`.

    Raises:
        UsageError: no run there, a change that would make it another run, fewer epochs than it has trained, or an
            address that cannot be joined; nothing was written.
    """
    folder = RunFolder(Path(run_folder).absolute())
    config = folder.config().resumed_with({**(changes or {}), "out": str(folder.path)})
    resolve(config.address, command="train")
    prepare.refuse_fewer_epochs(config)
    if not folder.split_file.exists():  # ended between the configuration and the split, which follows from it
        prepare.save_split(config, folder)
    asked, config = config, replace(config, split=str(folder.split_file))
    note = note or _ignore
    if warning := split_unknown(folder):
        note(warning)
    views = open_views or StoredViews(config)
    prepare.check(config, views, note=note, drills="drill" in (changes or {}))
    if changes:  # what is refused leaves the run as it was
        folder.update(asked)
    return _launch(config, views, progress or _ignore, note)


def _ignore(_: object) -> None:
    """Where nobody listens."""


def _launch(config: TrainConfig, views: OpenViews, progress: Progress, note: Note) -> TrainResult:
    if config.encoder.encoder == RIDGE:
        return _ridge(config, views, progress, note)
    if (end := finished.find(config)) is not None:
        note(f"{config.out} has finished all of its {config.epochs} epochs. More are asked for by --epochs.")
        return TrainResult(
            status="done", run_folder=config.out, epoch=end.epoch, step=end.step, val_perf=end.best
        )  # fmt: skip
    workers = Workers.parse(config.workers) if config.workers else None
    folder = RunFolder(config.out)
    try:
        with folder.held():
            orders.clear(folder)
            if workers is not None and workers.high == 0:
                outcome = train_alone(config, views, progress, note)
            else:
                outcome = train_on_ray(config, workers, views, progress, note)
    except BrainencError as error:
        return _failed(config, error)
    if (left := prepare.drills_not_happened(config)) and address_of(folder.path) is None:  # else marks lie elsewhere
        note(f"Drills that have not happened by step {outcome.position.step}: {', '.join(left)}.")
    best = outcome.position.best
    return TrainResult(
        status=outcome.status, run_folder=config.out, epoch=outcome.position.epoch, step=outcome.position.step,
        val_perf=best, reason=outcome.reason, checkpoint=outcome.checkpoint, save_s=outcome.save_s, error=outcome.error,
    )  # fmt: skip


def _ridge(config: TrainConfig, views: OpenViews, progress: Progress, note: Note) -> TrainResult:
    """The baseline: one process, no steps."""
    try:
        perf = finished_ridge(config, views)
        if perf is not None:
            note(f"{config.out} is fitted already, on these data. To fit it again, choose another --out.")
        else:
            perf = run_ridge(config, views, progress=progress, note=note)
    except BrainencError as error:
        return _failed(config, error)
    return TrainResult(status="done", run_folder=config.out, epoch=0, step=0, val_perf=perf)


def _failed(config: TrainConfig, error: BrainencError) -> TrainResult:
    last = RunFolder(config.out).pointed("last") or {}
    return TrainResult(
        status="failed", run_folder=config.out, epoch=int(last.get("epoch", 0)), step=int(last.get("step", 0)),
        val_perf=None, reason=str(error), error=error,
    )  # fmt: skip
