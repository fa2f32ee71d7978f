"""Features out to plain NumPy files, for code that knows no store.

Files get their names when they are whole and flushed; one that is there is compared and left alone. Memory is that of
one batch of rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from brainenc.atomic import make_dirs, partial_name, publish_new, write_new
from brainenc.errors import UsageError
from brainenc.featurestore import layout
from brainenc.featurestore.arrays import (
    ADELI_CLIP,
    ADELI_FEATURES,
    ADELI_SHAPE,
    ADELI_SPLITS,
    CLIP_WIDTH,
    IDS_FILE,
    Progress,
    batches,
    open_npy,
)
from brainenc.featurestore.space import full_disk_explained
from brainenc.featurestore.store import FeatureStore
from brainenc.featurestore.view import FeatureView

_COMPARED_ROWS = 16
_SUBJECT = re.compile(r"subj(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A file that an export made or found."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    there: bool
    """It was there already, with these rows."""


def export_npy(
    view: FeatureView, path: Path, *, dtype: str | None = "float32", progress: Progress | None = None
) -> Exported:
    """Write all rows as one ``.npy`` file in C order.

    Args:
        view: the rows; every one must be there.
        path: the file; its folder is made.
        dtype: what NumPy calls the wanted dtype; None: as stored (bfloat16, which ``.npy`` does not know: float32).
        progress: told after each batch.

    Raises:
        MissingRow, Incomplete: a row cannot be read.
        UsageError: another file is there.
        NoSpace: the disk is full; nothing is left behind.
    """
    wanted = np.dtype(dtype or ("float32" if view.dtype.name == "bfloat16" else view.dtype))
    exported = Exported(path=path, key=view.key, shape=view.shape, dtype=wanted.name, there=path.exists())
    if exported.there:
        _compare(view, path, wanted)
        return exported
    make_dirs(path.parent)
    partial = partial_name(path)
    try:
        with full_disk_explained(partial, view.shape[0] * int(np.prod(view.shape[1:])) * wanted.itemsize):
            _write_npy(view, partial, wanted, progress)
        publish_new(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return exported


def export_adeli(
    store: FeatureStore, key: str, out: Path, *, test_key: str | None = None, clip_key: str | None = None,
    subject: int | None = None, progress: Progress | None = None,
) -> list[Exported]:  # fmt: skip
    """Write the folders that the published code's loader reads.

    Args:
        store: where the features are.
        key: the q features of the training images, e.g. ``subj01-train/dinov2-base/11.q``.
        out: the parent of ``dinov2_q_last``.
        test_key: those of the test images; None: ``-train`` of the stimulus set replaced by ``-test``.
        clip_key: features of width 512 for ``clip_vit_512``; those of the test images by the same rule, or of the
            stimulus set that ``test_key`` names.
        subject: its number; None: from the stimulus set's name.
        progress: told after each batch of each file.

    Raises:
        KeyNotFound: one of the collections is not there.
        UsageError: no subject number in the name, not the shape that the loader wants.
    """
    number = _subject_number(key) if subject is None else subject
    pairs = [(ADELI_FEATURES, "train", key), (ADELI_FEATURES, "test", test_key or _test_key(key))]
    if clip_key is not None:
        clip_test = _test_key(clip_key) if test_key is None else _with_stimuli(clip_key, of=test_key)
        pairs += [(ADELI_CLIP, "train", clip_key), (ADELI_CLIP, "test", clip_test)]
    views = [(folder, split, store[one]) for folder, split, one in pairs]
    for folder, _, view in views:
        _check_adeli(folder, view)
    return [
        export_npy(view, out / folder / f"{number:02d}" / ADELI_SPLITS[split], progress=progress)
        for folder, split, view in views
    ]


def export_folder(
    store: FeatureStore, keys: Sequence[str], out: Path, *, dtype: str | None = None, progress: Progress | None = None
) -> list[Exported]:
    """Write collections in the ``npy`` layout, beside the ids of their rows.

    Raises:
        UsageError: another file is there, of rows or of ids.
    """
    done, ids = [], {}
    for key in keys:
        view = store[key]
        file = out / layout.parse_key(key).stimuli / IDS_FILE
        ids[file] = "".join(f"{one}\n" for one in view.ids).encode()
        _compare_ids(file, ids[file])  # before the work
        done.append(export_npy(view, out / f"{key}.npy", dtype=dtype, progress=progress))
    for file, wanted in ids.items():  # last: who finds it finds all rows that it is for
        with full_disk_explained(file, len(wanted)):
            if not write_new(file, wanted):
                _compare_ids(file, wanted)
    return done


def adeli_note(exported: Sequence[Exported]) -> str:
    """What the user should know about an ``adeli`` export; empty when there is nothing."""
    folders = {one.path.parts[-3] for one in exported}
    notes = []
    if ADELI_CLIP not in folders:
        notes.append(
            f"The old code's default loader opens {ADELI_CLIP}/ as well as {ADELI_FEATURES}/: give --clip KEY, a "
            f"collection of width {CLIP_WIDTH}, to write it too."
        )
    odd = [one for one in exported if one.path.parts[-3] == ADELI_FEATURES and one.shape[1:] != ADELI_SHAPE]
    if odd:
        notes.append(f"Rows have the shape {odd[0].shape[1:]}; the old code was written for {ADELI_SHAPE}.")
    return " ".join(notes)


def _write_npy(view: FeatureView, partial: Path, dtype: np.dtype, progress: Progress | None) -> None:
    with open(partial, "xb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": view.shape}
        np.lib.format.write_array_header_1_0(file, header)
        if hasattr(os, "posix_fallocate"):  # a full disk is found before the work
            size = int(np.prod(view.shape)) * dtype.itemsize
            file.flush()
            os.posix_fallocate(file.fileno(), file.tell(), max(size, 1))
            os.ftruncate(file.fileno(), file.tell() + size)
        row_bytes = int(np.prod(view.shape[1:])) * dtype.itemsize
        for start, stop in batches(len(view), row_bytes):
            rows = np.ascontiguousarray(view.gather(np.arange(start, stop)), dtype)
            file.write(rows.reshape(-1).view(np.uint8).data)
            if progress is not None:
                progress(stop, len(view))
        file.flush()
        os.fsync(file.fileno())


def _compare(view: FeatureView, path: Path, dtype: np.dtype) -> None:
    """A file under the wanted name is kept if it is ours, by its header and rows all over it."""
    array = open_npy(path)
    rows = np.unique(np.linspace(0, max(len(view) - 1, 0), _COMPARED_ROWS).astype(int)) if len(view) else np.arange(0)
    same = array.shape == view.shape and array.dtype == dtype
    if not same or not np.array_equal(array[rows], view.gather(rows).astype(dtype), equal_nan=True):
        raise UsageError(
            f"{path} is there already, with other content ({array.shape} {array.dtype}; wanted {view.shape} {dtype}). "
            "Nothing is overwritten: remove it, or choose another folder."
        )


def _compare_ids(file: Path, wanted: bytes) -> None:
    found = file.read_bytes() if file.exists() else wanted
    if found != wanted:
        raise UsageError(
            f"{file} is there already, with other stimulus ids ({len(found.splitlines())}; wanted "
            f"{len(wanted.splitlines())}), or was cut. Nothing is overwritten: remove it, or choose another folder."
        )


def _subject_number(key: str) -> int:
    found = _SUBJECT.match(layout.parse_key(key).stimuli)
    if found is None:
        raise UsageError(f"{key!r} names no subject such as subj01: say which one the files are for (--subject 1).")
    return int(found[1])


def _test_key(key: str) -> str:
    parts = layout.parse_key(key)
    if not parts.stimuli.endswith("-train"):
        raise UsageError(
            f"{key!r} does not belong to a stimulus set ...-train: name the test images' key (--test KEY)."
        )
    return f"{parts.stimuli.removesuffix('-train')}-test/{parts.backbone}/{parts.layer}.{parts.facet}"


def _with_stimuli(key: str, *, of: str) -> str:
    """The same feature of another collection's images."""
    return str(replace(layout.parse_key(key), stimuli=layout.parse_key(of).stimuli))


def _check_adeli(folder: str, view: FeatureView) -> None:
    facet: str = layout.parse_key(view.key).facet
    shape: tuple[Any, ...] = view.shape[1:]
    if folder == ADELI_FEATURES and facet != "q":
        raise UsageError(f"{folder} holds q features, {view.key} are {facet}: choose a collection such as .../11.q.")
    if folder == ADELI_CLIP and shape[-1:] != (CLIP_WIDTH,):
        raise UsageError(f"{folder} holds features of width {CLIP_WIDTH}, {view.key} has rows of shape {shape}.")
