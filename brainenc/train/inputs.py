"""From a subject folder and features to numbered samples: matched by stimulus id, checked, and split."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from brainenc.datasets.algonauts import Responses, Subject
from brainenc.errors import DataError, UsageError
from brainenc.featurestore.places import may_be_mapped
from brainenc.featurestore.store import open_store
from brainenc.train.config import TrainConfig
from brainenc.train.data import Samples, View
from brainenc.train.features import FeatureLayout, RowLayout, split_part
from brainenc.train.order import Rows, n_training, permutation, split_indices

Split = Literal["train", "test"]

OpenViews = Callable[[Split], Sequence[View]]
"""Opens the features of a split, one view for each feature of the configuration. Must pickle: workers call it."""

_SHUFFLE_STREAM = 0x5C0FF1E
_SHOWN = 5
_SAMPLED_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class StoredViews:
    """The configured features in the store."""

    config: TrainConfig

    def __call__(self, split: Split) -> Sequence[View]:
        """Open them.

        Raises:
            KeyNotFound: a feature that the store does not have.
            UsageError: the run has no store.
        """
        if self.config.store is None and self.config.source:
            raise UsageError(
                f"{self.config.out} was trained on features that were computed on the way, and has no store to open. "
                "The commands compute them again; in Python, give open_views=brainenc.cli.on_the_fly.views_of_run(RUN)."
            )
        if self.config.store is None:
            raise UsageError(
                f"{self.config.out} names no feature store: `brainenc train` and `brainenc import-checkpoint` take "
                "--store, training also --on-the-fly with --backbone."
            )
        store = open_store(self.config.store)
        return [store[key] for key in keys(self.config, split)]


def keys(config: TrainConfig, split: Split) -> list[str]:
    """Keys of the configured features: ``<stimuli>/<backbone>/<layer>.<facet>``, the stimulus set put before them."""
    given = config.stimuli if split == "train" else config.test_stimuli
    stimuli = given or f"{Path(config.subject_dir).name}-{split}"
    names = [split_part(feature)[0] for feature in config.features]
    return [name if name.count("/") >= 2 else f"{stimuli}/{name}" for name in names]


def open_samples(
    config: TrainConfig,
    subject: Subject,
    open_views: OpenViews,
    split: Split = "train",
    *,
    responses: bool | None = None,
) -> Samples:
    """Number the subject's images and say where each one's features and responses lie.

    Samples are numbered in the order of the images; those whose features are missing in the store are in it, and
    :func:`usable` says which they are. Responses are opened for the training split, or as ``responses`` says.

    Raises:
        UsageError: no features, or features on different grids.
        DataError: images without features, or responses that do not match the images.
    """
    if not config.features:
        raise UsageError("Training needs at least one --feature, such as dinov2-base/11.q.")
    ids = subject.ids(split)
    views = open_views(split)
    wanted = split == "train" if responses is None else responses
    measured = _responses(subject, split) if wanted else None
    layouts = [
        RowLayout.of(name, view.shape[1:], view.details, split_part(name)[1])
        for name, view in zip(config.features, views, strict=True)
    ]
    rows = np.arange(len(ids), dtype=np.int64)
    if config.shuffle_responses and split == "train":
        rows = permutation(len(ids), config.seed, _SHUFFLE_STREAM)
    matched = [_match(ids, view, name, subject, split) for view, name in zip(views, config.features, strict=True)]
    return Samples(
        views=views, feature_rows=matched, responses=measured, response_rows=rows, ids=ids,
        layout=FeatureLayout.of(layouts),
    )  # fmt: skip


def _responses(subject: Subject, split: Split) -> tuple[Responses, Responses]:
    """Of both hemispheres: maps where a map is safe, else files that are read as they are sliced."""
    opened = subject.responses if may_be_mapped(subject.folder) else subject.response_rows
    return opened("lh", split), opened("rh", split)


def _match(ids: Sequence[str], view: View, name: str, subject: Subject, split: Split) -> Rows:
    """The row of each stimulus, by id."""
    rows = {stimulus: row for row, stimulus in enumerate(view.ids)}
    if absent := [i for i in ids if i not in rows]:
        shown = ", ".join(absent[:_SHOWN]) + (" ..." if len(absent) > _SHOWN else "")
        raise DataError(
            f"{len(absent)} of the {len(ids)} {split} images of {subject.folder} have no row in the feature {name!r} "
            f"({len(rows)} rows): {shown}. The features were made from other images, or ids were given in another "
            f"form; wanted ids such as {ids[0]!r}, the store has ids such as {next(iter(rows), '')!r}. Extract again "
            "from this folder, or name the right stimulus set with --stimuli."
        )
    return np.array([rows[i] for i in ids], dtype=np.int64)


def other_images(samples: Samples, subject: Subject, split: Split, features: Sequence[str]) -> str:
    """What to say where images are of another size in bytes than those that features were made of; else empty.

    Only the size: a copy of a subject folder has other modification times. Features of other sources of the same
    images (``nsd_stimuli.hdf5``, another format) tell nothing.
    """
    for name, view, rows in zip(features, samples.views, samples.feature_rows, strict=True):
        stimuli: Any = getattr(view, "stimuli", None)
        if stimuli is None:
            continue
        pairs = zip(subject.images(split), stimuli.take(rows), strict=True)
        known = [(path, s.size) for path, s in pairs if s.size is not None and s.uri.endswith(path.suffix)]
        other = [(path, size, now) for path, size in known if (now := path.stat().st_size) != size]
        if other:
            path, size, now = other[0]
            return (
                f"WARNING: {len(other)} of {len(rows)} {split} images of {subject.folder} are not the files that "
                f"{name} was extracted from, though they have their names: {path.name} has {now} bytes, it had {size}. "
                "If they show something else (renamed, rotated, another subject), features and responses do not belong "
                "together: extract into another store from this folder and train on that."
            )
    return ""


def usable(samples: Samples) -> npt.NDArray[np.bool_]:
    """Mask of the samples whose features are all there."""
    mask = np.ones(len(samples), dtype=bool)
    for view, rows in zip(samples.views, samples.feature_rows, strict=True):
        present: Any = getattr(view, "present", None)
        if present is not None:
            mask &= np.asarray(present)[rows]
    return mask


def split_samples(samples: Samples, indices: Rows) -> tuple[Rows, Rows]:
    """Sample numbers for training and for validation: first ``round(0.9 n)`` of ``indices``, and the rest.

    Samples without features are left out after the split, so that others keep their side.

    Raises:
        DataError: nothing is left on a side.
    """
    here = usable(samples)
    first = n_training(len(indices))
    train, val = (part[here[part]] for part in (indices[:first], indices[first:]))
    if not len(train) or not len(val):
        raise DataError(
            f"{len(samples)} images, {int(here.sum())} of them with features, leave {len(train)} for training and "
            f"{len(val)} for validation. Both need at least one."
        )
    return train, val


def provenance(config: TrainConfig, subject: Subject, samples: Samples, n_train: int) -> dict[str, Any]:
    """What a run is trained on, as plain JSON: kept in every checkpoint, and compared when the run goes on."""
    features = {
        name: {"identity": dict(getattr(view, "identity", {})), "dtype": str(view.dtype), "row": list(view.shape[1:])}
        for name, view in zip(config.features, samples.views, strict=True)
    }
    found = {
        "subject": subject.name, "vertices": list(subject.n_vertices), "samples": len(samples),
        "training_samples": n_train, "features": features, "stimuli": _digest(json.dumps(list(samples.ids)).encode()),
        "responses": [_sampled(array) for array in samples.responses or ()],
    }  # fmt: skip
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _sampled(array: Responses) -> str:
    """Hash of a hemisphere's shape and of rows spread evenly over it: all of a small one, 32 MB of a large one.

    Rows in another order or of another measurement are noticed; a change to single rows may not be.
    """
    n_rows = len(array)
    count = max(2, min(n_rows, _SAMPLED_BYTES // max(1, array[:1].nbytes)))
    rows = np.unique(np.linspace(0, n_rows - 1, count).astype(np.int64))
    return _digest(str(array.shape).encode(), np.ascontiguousarray(array[rows]).data)


def _digest(*parts: bytes | memoryview) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def read_split(config: TrainConfig, n: int) -> Rows:
    """The permutation of a run: from ``--split``, else by its seed.

    Raises:
        DataError: the file holds no permutation of the images.
    """
    if config.split is None:
        return split_indices(n, config.seed)
    try:
        found = np.load(config.split, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"--split {config.split} cannot be read: {error}.") from error
    if found.shape != (n,) or not np.array_equal(np.sort(found), np.arange(n)):
        raise DataError(
            f"--split {config.split} holds an array of shape {found.shape}, wanted each of the numbers 0 to {n - 1} "
            f"once: the {n} training images in random order, those for training first."
        )
    indices: Rows = found.astype(np.int64)
    return indices
