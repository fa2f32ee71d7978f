"""Features in from plain NumPy files: one array, the published code's folders, or one file an image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from brainenc.errors import DataError, UsageError
from brainenc.featurestore import layout
from brainenc.featurestore.arrays import (
    ADELI_CLIP,
    ADELI_FEATURES,
    ADELI_SHAPE,
    ADELI_SPLITS,
    IDS_FILE,
    Progress,
    batches,
    open_npy,
)
from brainenc.featurestore.external import ExternalWriter
from brainenc.featurestore.store import FeatureStore
from brainenc.featurestore.view import FeatureView

_NSD_ID = re.compile(r"nsd-?(\d+)")
_SHARD_BYTES = 256 << 20
_PUBLISHED = {ADELI_FEATURES: ("dinov2-base", "11.q"), ADELI_CLIP: ("clip-vit-512", "proj.token")}
"""What the published code's folders hold: backbone and feature, by the name of the folder above the subject's."""


def import_npy(
    store: FeatureStore, key: str, path: Path, *, ids: Sequence[str] | None = None, dtype: str | None = None,
    progress: Progress | None = None,
) -> FeatureView:  # fmt: skip
    """Take the rows of a ``.npy`` file into a collection. The same call goes on where an interrupted one stopped.

    Args:
        store: where to.
        key: the collection to make.
        path: the file; never unpickled.
        ids: stimulus ids in the order of rows; None: those of the stimulus set if the store has it, else of an
            ``ids.txt`` beside, else row numbers.
        dtype: storage dtype; None: the file's own if a store has it, else float32.
        progress: told after each batch.

    Raises:
        DataError: not an array of rows, or not as many as ids.
        ValueNotStorable: a value that the dtype cannot hold.
        ProvenanceMismatch: the key is taken by features made in another way.
    """
    array = open_npy(path)
    names = list(ids) if ids is not None else _known_ids(store, key, path, len(array))
    if len(names) != len(array):
        raise DataError(f"{path} has {len(array)} rows, but there are {len(names)} stimulus ids for them.")
    pieces = (np.asarray(array[a:b]) for a, b in batches(len(array), array[:1].nbytes))
    return _write(store, key, names, array.shape[1:], dtype or _storable(array.dtype), pieces, progress)


def is_adeli(folder: Path) -> bool:
    """Whether :func:`import_adeli` knows this folder."""
    return _adeli_folder(folder) is not None


def import_adeli(
    store: FeatureStore, folder: Path, *, backbone: str | None = None, feature: str | None = None,
    ids: Mapping[str, Sequence[str]] | None = None, dtype: str | None = None, progress: Progress | None = None,
) -> list[FeatureView]:  # fmt: skip
    """Take over ``.../dinov2_q_last/01`` (or its parent with one subject in it) as the subject's two collections.

    ``dinov2_q_last`` and ``clip_vit_512`` say what they hold; folders of other names do not.

    Args:
        store: where to.
        folder: the folder with ``train.npy`` and ``synt.npy``.
        backbone: second part of the keys; None: by the parent folder's name.
        feature: third part of the keys; None: by the parent folder's name.
        ids: split (``"train"``, ``"test"``) -> stimulus ids, in the order of rows.
        dtype: storage dtype; None: the files' own.
        progress: told after each batch.

    Raises:
        DataError: not such a folder, or its files' rows have different shapes.
        UsageError: nothing says of which backbone and feature they are.
    """
    found = _adeli_folder(folder)
    if found is None:
        raise DataError(f"{folder} is no folder such as dinov2_q_last/01 with train.npy (and synt.npy) in it.")
    folder = found
    published = _PUBLISHED.get(folder.parent.name, (None, None))
    backbone, feature = backbone or published[0], feature or published[1]
    if backbone is None or feature is None:
        raise UsageError(
            f"{folder} does not say what its rows are: only {' and '.join(_PUBLISHED)} are known by name, this lies "
            f"in {folder.parent.name!r}. Name both, for example --backbone dinov2-base --feature 11.q."
        )
    files = {split: folder / name for split, name in ADELI_SPLITS.items() if (folder / name).exists()}
    shapes = {path.name: open_npy(path).shape[1:] for path in files.values()}
    if len(set(shapes.values())) > 1:
        sides = ", ".join(f"{name} of {_by(shape)}" for name, shape in shapes.items())
        raise DataError(
            f"{folder} holds rows of different shapes: {sides}. They are not one feature; export both again."
        )
    views = []
    for split, path in files.items():
        key = f"subj{folder.name}-{split}/{backbone}/{feature}"
        names = None if ids is None else ids.get(split)
        views.append(import_npy(store, key, path, ids=names, dtype=dtype, progress=progress))
    return views


def adeli_import_note(views: Sequence[FeatureView]) -> str:
    """What to say of features that are filed as the published code's and have other rows; empty if there are none."""
    published = "/".join(_PUBLISHED[ADELI_FEATURES])
    odd = [view for view in views if view.shape[1:] != ADELI_SHAPE and view.key.endswith(f"/{published}")]
    if not odd:
        return ""
    return (
        f"Note: {odd[0].key} has rows of {_by(odd[0].shape[1:])}; the published code's {ADELI_FEATURES} are "
        f"{_by(ADELI_SHAPE)}, the last block's q of DINOv2-B. If these are of another backbone or layer, import them "
        "into another store with --backbone and --feature."
    )


def import_images(
    store: FeatureStore, key: str, folder: Path, *, dtype: str | None = None, progress: Progress | None = None
) -> FeatureView:
    """Take over a folder with one ``.npy`` an image, all of one shape, in the order of their paths.

    Ids are ``nsd-%05d`` where the file name has such a number, else the path below the folder without ``.npy``.

    Raises:
        DataError: no such files, or of different shapes.
    """
    paths = sorted(folder.rglob("*.npy"), key=lambda path: path.relative_to(folder).as_posix())
    if not paths:
        raise DataError(f"{folder} has no .npy files in it.")
    first = open_npy(paths[0], rows=False)

    def rows() -> Iterator[np.ndarray]:
        for path in paths:
            row = open_npy(path, rows=False)
            if row.shape != first.shape:
                raise DataError(f"{path} has the shape {row.shape}, but {paths[0]} has {first.shape}.")
            yield np.asarray(row)[None]

    names = [_image_id(path.relative_to(folder)) for path in paths]
    return _write(store, key, names, first.shape, dtype or _storable(first.dtype), rows(), progress)


def _adeli_folder(folder: Path) -> Path | None:
    """The folder named by a subject's number, which may be the only one in ``folder``."""
    named, folder = re.compile(r"\d\d"), folder.absolute()  # "." has no name
    found = [folder, *sorted(path.parent for path in folder.glob("[0-9][0-9]/train.npy"))]
    fitting = [path for path in found if named.fullmatch(path.name) and (path / "train.npy").exists()]
    return fitting[0] if len(fitting) == 1 else None


def _write(
    store: FeatureStore, key: str, ids: Sequence[str], row_shape: tuple[int, ...], dtype: str,
    pieces: Iterator[np.ndarray], progress: Progress | None,
) -> FeatureView:  # fmt: skip
    with _writer(store, key, ids, row_shape, dtype) as writer:
        done = 0
        for batch in pieces:
            writer.append(batch)
            done += len(batch)
            if progress is not None:
                progress(done, len(ids))
    return store[key]


def _writer(
    store: FeatureStore, key: str, ids: Sequence[str], row_shape: tuple[int, ...], dtype: str
) -> ExternalWriter:
    """A writer whose stimulus set may exist already, with more known of each image than its id."""
    _check_width(store, key, row_shape)
    name = layout.parse_key(key).stimuli
    if name not in store.stimuli_names():
        return store.writer(key, ids=ids, row_shape=row_shape, dtype=dtype)
    known = store.stimuli(name).ids
    if known != list(ids):
        differing = next(
            (i for i, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b), min(len(known), len(ids))
        )
        raise DataError(
            f"the stimulus set {name!r} of {store.url} has {len(known)} images and {len(ids)} ids came, which differ "
            f"from row {differing} on. Give the ids in the set's order, or use another name in the key."
        )
    row_bytes = int(np.prod(row_shape)) * (4 if dtype == "float32" else 2)
    collection = store.create_collection(
        key, identity={"source": "made elsewhere"}, row_shape=row_shape, dtype=dtype,
        rows_per_shard=max(1, _SHARD_BYTES // max(row_bytes, 1)),
    )  # fmt: skip
    return ExternalWriter(collection, {})


def _check_width(store: FeatureStore, key: str, row_shape: tuple[int, ...]) -> None:
    """One feature of one backbone has one width, whatever images it was made of."""
    feature = key.partition("/")[2]
    for other in store:
        if other != key and other.partition("/")[2] == feature:
            theirs = store.collection(other).row_shape
            if theirs[-1] != row_shape[-1]:
                raise DataError(
                    f"rows of {_by(row_shape)} came for {key}, but {other} in {store.url} has rows of {_by(theirs)}: "
                    "one feature has one width. Give what this is another backbone or layer name in the key."
                )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _storable(dtype: np.dtype) -> str:
    return dtype.name if dtype.name in ("float16", "float32") else "float32"


def _known_ids(store: FeatureStore, key: str, path: Path, n: int) -> list[str]:
    name = layout.parse_key(key).stimuli
    if name in store.stimuli_names():
        return store.stimuli(name).ids
    for file in (path.parent / IDS_FILE, path.parent.parent / IDS_FILE):  # as the npy layout has it
        if file.exists():
            return file.read_text(encoding="utf-8").splitlines()
    return [f"row-{row:06d}" for row in range(n)]


def _image_id(path: Path) -> str:
    found = _NSD_ID.search(path.stem)
    return f"nsd-{int(found[1]):05d}" if found else path.with_suffix("").as_posix()
