"""What the driver looks at before anything is started, so that bad input costs seconds. Knows no Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from brainenc.datasets.algonauts import Subject
from brainenc.datasets.rois import HEMISPHERES
from brainenc.errors import CheckpointUnusable, ProvenanceMismatch, UsageError
from brainenc.featurestore.places import may_be_mapped
from brainenc.train import checkpoint
from brainenc.train.config import TrainConfig, Workers
from brainenc.train.drills import PRETENDED, Planned
from brainenc.train.encoders.base import RIDGE
from brainenc.train.guarding import is_guarded, thresholds
from brainenc.train.inputs import OpenViews, open_samples, other_images, provenance, read_split, split_samples, usable
from brainenc.train.model import check_encoder
from brainenc.train.order import Order
from brainenc.train.published import knows_no_data
from brainenc.train.run_folder import RunFolder, save_array

_LATER_FIELDS = ("stimuli", "responses")
"""Hashes that checkpoints of earlier versions lack: those go on without this check."""


def check(
    config: TrainConfig, open_views: OpenViews, *, note: Callable[[str], None], drills: bool = True
) -> None:  # fmt: skip
    """Open everything that a worker will open.

    Args:
        config: of the run.
        open_views: opens the features.
        note: called with lines for a person.
        drills: also refuse drills that cannot happen.

    Raises:
        NotASubject: no subject folder.
        DataError: images, features and responses do not fit one another, or responses are not finite.
        UsageError: names or combinations that do not exist.
        StoreError: the store or a feature is not there.
    """
    thresholds(config.guard)
    subject = Subject.open(config.subject_dir)
    queries = subject.rois.queries(config.encoder.readout)
    samples = open_samples(config, subject, open_views)
    train, _ = split_samples(samples, read_split(config, len(samples)))
    if drills:
        order = Order(n_samples=len(train), batch_size=config.batch_size, seed=config.seed)
        refuse_idle_drills(config, config.epochs * order.steps_per_epoch)
    if config.encoder.encoder != RIDGE:
        encoder = replace(config.encoder, readout=queries.readout)
        check_encoder(encoder, queries, channels=samples.layout.channels, grid=samples.layout.grid)
    _same_data(config, provenance(config, subject, samples, len(train)))
    if warning := other_images(samples, subject, "train", config.features):
        note(warning)
    for hemisphere in HEMISPHERES:
        subject.require_finite(hemisphere, mapped=may_be_mapped(subject.folder))
    if missing := int((~usable(samples)).sum()):
        note(f"{missing} of {len(samples)} training images have no features in the store and are left out.")
    empty = [
        f"{hemisphere} {label}"
        for hemisphere in HEMISPHERES
        for label, mask in zip(queries.labels, queries.masks(hemisphere), strict=True)
        if not mask.any() and label != "remainder"
    ]
    if empty:
        note(f"ROIs without a vertex in this subject, kept and scored as missing: {', '.join(empty)}.")


def refuse_idle_drills(config: TrainConfig, steps: int) -> None:
    """A drill that cannot happen would pass for one that went well.

    Args:
        config: of the run.
        steps: of the whole run.

    Raises:
        UsageError: one that has not happened yet is past the run's end, of a rank that is not there, or would alarm
            nobody.
    """
    for text in config.drill:
        planned = Planned.parse(text)
        if planned.happened(RunFolder(config.out).drill_marks):
            continue
        if config.encoder.encoder == RIDGE:
            raise UsageError(f"--drill {text}: a ridge run has no steps. Leave it out.")
        if planned.step >= steps:
            raise UsageError(
                f"--drill {text}: the run has {steps} steps, and this would strike after {planned.step}. Choose a step "
                f"below {steps}, for example {replace(planned, step=steps // 2).text}."
            )
        if config.workers is not None:
            refuse_absent_ranks(config, Workers.parse(config.workers))
        if planned.fault in PRETENDED:
            _refuse_without_alarm(config, text, planned)


def refuse_absent_ranks(config: TrainConfig, workers: Workers) -> None:
    """Drills of ranks that there are not.

    Raises:
        UsageError: one that has not happened yet is of such a rank.
    """
    ranks = max(1, workers.high)
    for text in config.drill:
        planned = Planned.parse(text)
        if planned.rank >= ranks and not planned.happened(RunFolder(config.out).drill_marks):
            there = "rank 0 alone" if ranks == 1 else f"ranks 0 to {ranks - 1}"
            raise UsageError(
                f"--drill {text}: with --workers {workers} there is {there}. Write for example "
                f"{replace(planned, rank=ranks - 1).text}, or ask for more --workers."
            )


def _refuse_without_alarm(config: TrainConfig, text: str, planned: Planned) -> None:
    if not is_guarded(config):
        raise UsageError(f"--drill {text} needs the guard, which this run has switched off: leave out --no-guard.")
    critical = thresholds(config.guard).pair(planned.fault)[1]
    if planned.value <= critical:
        raise UsageError(
            f"--drill {text}: the guard acts from {critical:g} on, so that this would alarm nobody. Write a fraction "
            f"above {critical:g} and at most 1, for example {replace(planned, value=(1 + critical) / 2).text}."
        )


def drills_not_happened(config: TrainConfig) -> list[str]:
    """Drills of the run that have left no mark."""
    marks = RunFolder(config.out).drill_marks
    return [text for text in config.drill if not Planned.parse(text).happened(marks)]


def refuse_fewer_epochs(config: TrainConfig) -> None:
    """A run cannot be taken back: its checkpoints hold what the later epochs taught.

    Raises:
        UsageError: the run has trained more epochs than are asked for.
    """
    trained = 0
    for found in checkpoint.list_checkpoints(RunFolder(config.out).checkpoints):
        with suppress(CheckpointUnusable, OSError):
            manifest = checkpoint.read_manifest(found.folder)
            if manifest.config.get("id", "") == config.id:
                trained = max(trained, manifest.position.validated)
    if config.epochs < trained:
        raise UsageError(
            f"{config.out} has trained {trained} epochs, and {config.epochs} are asked for. Leave --epochs out, ask "
            f"for {trained} or more, or start a new run with another --out."
        )


def _same_data(config: TrainConfig, now: Mapping[str, Any]) -> None:
    """A run that goes on must find what it was trained on: another number of samples would be another order."""
    for found in checkpoint.list_checkpoints(RunFolder(config.out).checkpoints):
        with suppress(CheckpointUnusable):
            manifest = checkpoint.read_manifest(found.folder)
            if manifest.config.get("id", "") != config.id:
                continue
            if knows_no_data(manifest):
                continue
            then = manifest.provenance
            compared = [k for k in now if k in then or k not in _LATER_FIELDS]
            if differences := {k: (then.get(k), now[k]) for k in compared if then.get(k) != now[k]}:
                raise ProvenanceMismatch(
                    f"The data of {config.out}",
                    differences,
                    "A run goes on with the data that it began with: bring it back, or choose another --out.",
                )
            return


def save_split(config: TrainConfig, folder: RunFolder) -> None:
    """Write ``idxs.npy``: training and validation images of this run, as the published code keeps them."""
    n = len(Subject.open(config.subject_dir).images("train"))
    save_array(folder.split_file, read_split(config, n))
