"""One rank from configuration to outcome: opens the inputs, builds the model, finds where to go on, trains.

Runs in the training thread of a Ray Train worker, or in the calling process when there is no Ray. Knows no Ray.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainenc import allocator, atomic
from brainenc.datasets.algonauts import Subject
from brainenc.datasets.rois import HEMISPHERES, Hemisphere
from brainenc.endurance import Endurance
from brainenc.errors import MemoryRefused
from brainenc.guard.emergency import save_seconds
from brainenc.guard.messages import NullGuard, StepGuard
from brainenc.guard.pytorch import release_gpus
from brainenc.train import checkpoint, finished, saver
from brainenc.train.best import settle
from brainenc.train.checkpoint import Position
from brainenc.train.config import TrainConfig
from brainenc.train.data import Loader, Samples, buffer_bytes
from brainenc.train.fitting import Drill, FitSettings, Floats, Hooks, NoDrill, Outcome
from brainenc.train.inputs import OpenViews, open_samples, provenance, read_split, split_samples
from brainenc.train.loop import Fit
from brainenc.train.model import BrainEncoder, build_encoder
from brainenc.train.order import Order
from brainenc.train.predict import predict_test
from brainenc.train.run_folder import RunFolder, save_array
from brainenc.train.saver import Saver
from brainenc.train.scores import summarise
from brainenc.train.snapshot import StateCopy, copy_bytes
from brainenc.train.step import Stepper, StepSettings, relieve
from brainenc.train.team import Team
from brainenc.train.trackers import open_trackers


class Relief:
    """What the guard may have dropped when memory gets short, from a thread of its own: all of it comes back."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = [
            lambda: relieve(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        ]

    def add(self, call: Callable[[], None]) -> None:
        """Also call this."""
        self._calls.append(call)

    def __call__(self) -> None:
        """Drop everything."""
        for call in tuple(self._calls):
            call()


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What a rank is given besides its configuration."""

    team: Team
    device: torch.device
    open_views: OpenViews
    guard: StepGuard = field(default_factory=NullGuard)
    drill: Drill = field(default_factory=NoDrill)
    on_record: Callable[[Mapping[str, Any]], None] = lambda fields: None
    """Rank 0, beside the run's own records: progress of a run without Ray."""
    on_note: Callable[[str], None] = lambda text: None
    threads: int | None = None
    published: Callable[[Path], None] = lambda path: None
    relief: Relief = field(default_factory=lambda: Relief())


def work(config: TrainConfig, around: Surroundings) -> Outcome:
    """Train as one rank; returns the same outcome on every rank.

    Raises:
        BrainencError: the inputs are not usable, or another rank was lost.
    """
    if around.threads:
        torch.set_num_threads(around.threads)
    folder, team = RunFolder(config.out), around.team
    subject = Subject.open(config.subject_dir)
    samples = open_samples(config, subject, around.open_views)
    train, val = (samples.take(rows) for rows in split_samples(samples, read_split(config, len(samples))))
    model = make_model(config, subject, samples).to(around.device)
    if around.device.type == "cpu" and allocator.pays_for(model.parameters()):
        allocator.keep_freed_memory()
    notes = _Notes(folder, around)

    writer = _make_saver(config, folder, around)
    stepper, start = _start(config, model, writer, around, notes)
    order = Order(n_samples=len(train), batch_size=config.batch_size, seed=config.seed)
    val_order = Order(n_samples=len(val), batch_size=config.batch_size, seed=config.seed, shuffle=False)
    around.guard.reserve(buffer_bytes(train, config.batch_size, team.size), "the loader's buffers")
    kwargs: dict[str, Any] = {"rank": team.rank, "size": team.size, "device": around.device}
    with Loader(train, order, **kwargs) as loader:
        val_loader = Loader(val, val_order, share_buffers=loader, **kwargs)
        around.relief.add(loader.release)
        tracker = _tracker(config, folder, team)
        fit = Fit(
            stepper=stepper, team=team, train=loader, val=val_loader, saver=writer,
            settings=_settings(config, subject, samples, order), position=start, steps_per_epoch=order.steps_per_epoch,
            val_steps=val_order.steps_per_epoch, vertices=subject.n_vertices,
            hooks=Hooks(
                guard=around.guard, drill=around.drill, note=notes,
                record=lambda fields: _record(fields, tracker, around), scored=_Scored(folder, subject, notes),
            ),
        )  # fmt: skip
        try:
            outcome = _run(fit, notes)
        finally:
            if tracker is not None:
                tracker.close()
    return _finish(outcome, config, stepper, writer, subject, around, notes)


def make_model(config: TrainConfig, subject: Subject, samples: Samples) -> BrainEncoder:
    """The encoder with its first weights, which depend on the seed alone."""
    torch.manual_seed(config.seed)
    queries = subject.rois.queries(config.encoder.readout)
    encoder = replace(config.encoder, readout=queries.readout)
    return build_encoder(encoder, queries, channels=samples.layout.channels, grid=samples.layout.grid)


def step_settings(config: TrainConfig) -> StepSettings:
    """How steps of this run are computed."""
    return StepSettings(
        seed=config.seed, weight_decay=config.weight_decay, clip=config.clip,
        bfloat16=config.precision == "bfloat16", compile=config.compile,
    )  # fmt: skip


def _run(fit: Fit, notes: _Notes) -> Outcome:
    try:
        return fit.run()
    except BaseException:
        fit.save_what_is_whole()
        raise


def _start(
    config: TrainConfig, model: BrainEncoder, writer: Saver, around: Surroundings, notes: _Notes
) -> tuple[Stepper, Position]:
    """Allocate, then take the newest state that any rank finds; all ranks begin with the same."""
    team = around.team
    state_bytes = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    around.guard.reserve(state_bytes, "gradients and optimizer state")
    expected = save_seconds(writer.folder.checkpoints, state_bytes) if team.rank == 0 else 0.0
    around.guard.save_takes(team.broadcast(expected, 0))
    share = -(-config.batch_size // team.size)
    stepper = Stepper(model, team, step_settings(config), micro_batch=min(share, config.micro_batch or share))
    found = checkpoint.newest(writer.places(), config.id) if team.local_rank == 0 else checkpoint.NOTHING
    for why in found.skipped:
        notes(f"Passed over: {why}")
    steps = team.exchange(np.array([found.manifest.position.step if found.manifest else -1], dtype=np.float64))[:, 0]
    holder = int(steps.argmax())
    start = Position(step=0, epoch=0)
    if steps[holder] < 0 and team.rank == 0 and writer.folder.metrics_file.exists():  # it has trained before
        none = "No checkpoint or snapshot can be used" if found.skipped else "No checkpoint or snapshot yet"
        notes(f"{none}: beginning again.")
    if steps[holder] >= 0:
        if team.rank == holder and found.folder is not None and found.manifest is not None:
            checkpoint.load_weights(found.folder, model)
            checkpoint.load_optimizer(checkpoint.load_state(found.folder), stepper.optimizer)
            start = found.manifest.position
            notes(f"Going on from {found.folder}: epoch {start.epoch}, step {start.step}.")
            if found.manifest.config.get("micro_batch") != config.micro_batch:  # asked for anew
                start = replace(start, micro_batch=0)
        start = Position(**team.broadcast(asdict(start), holder))
        # The score that later ones are compared with is that of weights which are there: rank 0 looks after them.
        best = settle(writer.folder, config.id, notes) if team.rank == 0 else None
        start = replace(start, best=team.broadcast(best.val_perf if best else None, 0))
        if start.micro_batch:
            stepper.micro_batch = min(stepper.micro_batch, start.micro_batch)
    if team.size > 1:
        team.fill([*model.parameters(), *_optimizer_tensors(stepper)], holder)
    _add_copy(config, stepper, writer, around, notes)
    return stepper, start


def _optimizer_tensors(stepper: Stepper) -> list[torch.Tensor]:
    return [stepper.optimizer.state[p][name] for p in stepper.parameters for name in ("step", "exp_avg", "exp_avg_sq")]


def _add_copy(config: TrainConfig, stepper: Stepper, writer: Saver, around: Surroundings, notes: _Notes) -> None:
    """Memory for a copy of the state, on the one rank of each machine that writes; without it, writing blocks."""
    if around.team.local_rank != 0:
        return
    try:
        around.guard.reserve(copy_bytes(stepper.model, stepper.optimizer), "a copy of the training state")
    except MemoryRefused as refused:
        notes(f"No rolling snapshots, and checkpoints hold training up: {refused}")
    else:
        writer.use(StateCopy(stepper.model, stepper.optimizer))


def _make_saver(config: TrainConfig, folder: RunFolder, around: Surroundings) -> Saver:
    made = Saver(
        folder, snapshots=saver.snapshot_root(folder, config.snapshot_dir), keep=config.keep, published=around.published
    )
    if around.team.rank == 0:
        saver.sweep(made.places())
    return made


def _settings(config: TrainConfig, subject: Subject, samples: Samples, order: Order) -> FitSettings:
    return FitSettings(
        epochs=config.epochs, learning_rate=config.learning_rate, lr_drop=config.lr_drop, lr_gamma=config.lr_gamma,
        log_every=config.log_every, snapshot_every_s=config.snapshot_every_s,
        checkpoint_every_s=config.checkpoint_every_s, config=config.to_public_dict(),
        stop_when_short=config.guard.get("on_critical") == "stop",
        provenance=provenance(config, subject, samples, order.n_samples),
        scheduler={
            "learning_rate": config.learning_rate, "lr_drop": config.lr_drop, "lr_gamma": config.lr_gamma,
            "steps_per_epoch": order.steps_per_epoch,
        },
        random={"seed": config.seed, "derived_from": "blake2b(seed, step, rank, micro-batch)"},
    )  # fmt: skip


def _tracker(config: TrainConfig, folder: RunFolder, team: Team) -> Any:
    if team.rank != 0:
        return None
    return open_trackers(config.trackers, folder.path, run=folder.next_run(), config=config.to_public_dict())


def _record(fields: Mapping[str, Any], tracker: Any, around: Surroundings) -> None:
    if tracker is not None:
        tracker.record(fields)
    around.on_record(fields)


def _finish(
    outcome: Outcome, config: TrainConfig, stepper: Stepper, writer: Saver, subject: Subject, around: Surroundings,
    notes: _Notes,
) -> Outcome:  # fmt: skip
    """After the last epoch: predictions of the best weights by rank 0, the mark, and no snapshots left behind."""
    if outcome.status != "done":
        if outcome.checkpoint:  # the last of this process: its GPU is for others now
            for sentence in release_gpus({"model": stepper.model, "optimizer": stepper.optimizer}):
                notes(sentence)
        return outcome
    if around.team.rank == 0:
        written = predict_test(config, stepper, subject, around.open_views, note=notes) if config.predict else []
        finished.mark(config, outcome.position, predicted=bool(written))
    if around.team.local_rank == 0:
        writer.clean()
    return outcome


@dataclass(frozen=True, slots=True)
class _Scored:
    """Writes down the scores of the best validation so far: ``scores.json`` and r of each vertex. Where that fails no
    older ones stay, which would be taken for those of the weights: `brainenc evaluate` computes them again."""

    folder: RunFolder
    subject: Subject
    note: Callable[[str], None]

    def __call__(self, r_lh: Floats, r_rh: Floats, position: Position) -> None:
        try:
            self._write(r_lh, r_rh, position)
        except OSError as error:
            for file in (self.folder.scores_file, *map(self._vertices, HEMISPHERES)):
                with contextlib.suppress(OSError):  # nor can a checkpoint be written there: the best stays what it was
                    file.unlink()
            self.note(f"The scores of step {position.step} could not be written: {error}. See `brainenc evaluate`.")

    def _vertices(self, hemisphere: Hemisphere) -> Path:
        return self.folder.predictions / f"{hemisphere}_val_corr.npy"

    def _write(self, r_lh: Floats, r_rh: Floats, position: Position) -> None:
        import json

        r: dict[Hemisphere, Floats] = {"lh": r_lh, "rh": r_rh}
        self.folder.predictions.mkdir(exist_ok=True)
        for hemisphere in HEMISPHERES:
            save_array(self._vertices(hemisphere), r[hemisphere].astype(np.float32))
        table = {"epoch": position.epoch, "step": position.step, **summarise(r_lh, r_rh, self.subject)}
        atomic.replace(self.folder.scores_file, json.dumps(table, indent=1).encode() + b"\n")


class _Notes:
    """Lines for a person: into ``RUN/train.log``, and to whoever listens in this process."""

    def __init__(self, folder: RunFolder, around: Surroundings) -> None:
        self._folder, self._around = folder, around
        self._endurance = Endurance("Training")

    def __call__(self, text: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file = self._folder.log_file
        with self._endurance.doing(f"writing to {file}"), open(file, "a") as log:  # a full disk: what is told is lost
            log.write(f"{now} rank {self._around.team.rank} [{os.getpid()}] {text}\n")
        self._around.on_note(text)
