"""A subject of the Algonauts 2023 challenge: images, responses and ROIs on disk, checked where they are first used."""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from brainenc.datasets import layout
from brainenc.datasets.layout import Split
from brainenc.datasets.mapping import read_mapping
from brainenc.datasets.npy import NpyReader, open_rows, read_header
from brainenc.datasets.rois import HEMISPHERES, ROI_CLASSES, Hemisphere, RoiAtlas, check_hemisphere
from brainenc.errors import DataError, NotASubject, UnknownName

Responses = npt.NDArray[np.float32] | NpyReader
"""(n_images, n_vertices): a map or a copy, or a file that is read as it is sliced."""

_ROWS_PER_SCAN = 256
_SPLITS = ("train", "test")


class Subject:
    """One subject folder. Opening reads names and array headers only; arrays are mapped when asked for.

    Runs anywhere; instances pickle as their folder.

    Args:
        folder: the folder itself; `open` is the front door.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: str | Path) -> Subject:
        """Open a subject folder, or a folder that holds exactly one.

        Raises:
            NotASubject: required parts are missing; the message lists them.
        """
        found = locate(Path(folder).expanduser().absolute())
        if missing := missing_parts(found):
            listing = "; ".join(missing)
            raise NotASubject(
                f"{found} is not an Algonauts 2023 subject folder: {_count(len(missing), 'part')} missing: {listing}. "
                "Give the folder that holds training_split and roi_masks (subj01, for instance); "
                "`brainenc data check` says more, `brainenc data synth` makes one to try."
            )
        return cls(found)

    def __reduce__(self) -> tuple[Any, ...]:
        return Subject, (self.folder,)

    def __repr__(self) -> str:
        return f"Subject({str(self.folder)!r})"

    @property
    def name(self) -> str:
        """The folder's name, ``subj01``."""
        return self.folder.name

    @cached_property
    def n_vertices(self) -> tuple[int, int]:
        """(V_lh, V_rh), from the training responses."""
        lh, rh = (_width(self.folder / layout.responses_file("train", h)) for h in HEMISPHERES)
        return lh, rh

    def images(self, split: Split) -> list[Path]:
        """The split's images, sorted by file name: row i of the responses belongs to image i.

        Raises:
            DataError: the folder is not there, or holds no image.
            UnknownName: no such split.
        """
        _check_split(split)
        folder = self.folder / layout.images_dir(split)
        found = _list_images(folder)
        if not found:
            state = "holds no image" if folder.is_dir() else "does not exist"
            raise DataError(
                f"{folder} {state}. {self.name} has no {split} images; wanted {layout.image_name(split, 1, 13)} ..."
            )
        return found

    def ids(self, split: Split) -> list[str]:
        """``nsd-%05d`` of each image where its name has one, else its path below the image folder.

        Raises:
            DataError: two images have the same id.
            UnknownName: no such split.
        """
        _check_split(split)
        folder = self.folder / layout.images_dir(split)
        ids = [layout.stimulus_id(path, folder) for path in self.images(split)]
        if twice := [i for i, n in Counter(ids).items() if n > 1]:
            raise DataError(f"{folder} has more than one image of {', '.join(twice[:5])}. Every id must be there once.")
        return ids

    def responses(
        self, hemisphere: Hemisphere, split: Split = "train", *, mapped: bool = True
    ) -> npt.NDArray[np.float32]:
        """Responses, read-only, shape (n_images, n_vertices). Test responses are there only for organisers.

        Args:
            hemisphere: ``"lh"`` or ``"rh"``.
            split: ``"train"`` or ``"test"``.
            mapped: memory-map the file. False reads it whole: a choice for a folder on a network mount, where an I/O
                error under a map kills the process; `response_rows` is another, for large ones.

        Raises:
            DataError: not there, not float32, or not one row an image. NaNs are looked for by `require_finite`.
            UnknownName: no such hemisphere or split.
        """
        path = self._responses_path(hemisphere, split)
        array = _map_array(path, ndim=2, mapped=mapped)
        self._check_responses(path, array, split)
        return array

    def response_rows(self, hemisphere: Hemisphere, split: Split = "train") -> Responses:
        """The same for a folder on a network mount, in no more memory than what is sliced: ``rows[[5, 3, 8]]``.

        Each slice is read from the file, so that an I/O error is an `OSError` of whoever slices.

        Raises:
            DataError: as for `responses`.
            UnknownName: no such hemisphere or split.
        """
        path = self._responses_path(hemisphere, split)
        try:
            rows = open_rows(path)
        except (ValueError, EOFError) as error:
            raise _not_whole(path, error) from error
        self._check_responses(path, rows, split)
        return rows

    def _responses_path(self, hemisphere: Hemisphere, split: Split) -> Path:
        check_hemisphere(hemisphere)
        _check_split(split)
        path = self._organisers(layout.responses_file(split, hemisphere))
        if path is None:
            raise DataError(f"{self.folder} has no {split} responses ({layout.responses_file(split, hemisphere)}).")
        return path

    def _check_responses(self, path: Path, array: Responses, split: Split) -> None:
        if array.dtype != np.float32:
            raise DataError(
                f"{path} holds {array.dtype}, wanted float32. "
                "Convert it: np.save(path, np.load(path).astype('float32'))."
            )
        images = self.images(split)
        if len(array) != len(images):
            raise DataError(
                f"{path} has {len(array)} rows, but {images[0].parent} has {len(images)} images. Row i belongs to the "
                "i-th image in sorted order, so that none may be missing on either side; download both again."
            )

    def require_finite(self, hemisphere: Hemisphere, split: Split = "train", *, mapped: bool = True) -> None:
        """Read all responses once, through a map or as `response_rows` does.

        Raises:
            DataError: NaN or infinite values, with the number of rows and vertices that hold them.
        """
        found = self.responses(hemisphere, split) if mapped else self.response_rows(hemisphere, split)
        rows, vertices = not_finite(found)
        if rows:
            raise DataError(_not_finite_text(self.folder / layout.responses_file(split, hemisphere), rows, vertices))

    @cached_property
    def rois(self) -> RoiAtlas:
        """The ROI labels in challenge space.

        Raises:
            DataError: a mask or mapping is unreadable, or does not fit the number of vertices.
        """
        labels = {h: {c: self._mask(h, c) for c in ROI_CLASSES} for h in HEMISPHERES}
        return RoiAtlas(labels, {c: read_mapping(self.folder / layout.mapping_file(c)) for c in ROI_CLASSES})

    def noise_ceiling(self, hemisphere: Hemisphere) -> npt.NDArray[np.float64] | None:
        """The fraction (0 to 1) of each vertex's test variance that can be explained, where somebody has it.

        Raises:
            DataError: its length is not the number of vertices, or it is in percent.
            UnknownName: no such hemisphere.
        """
        check_hemisphere(hemisphere)
        path = self._organisers(layout.noise_ceiling_file(hemisphere))
        if path is None:
            return None
        ceiling = _map_array(path, ndim=1, mapped=False).astype(np.float64)
        self._check_length(path, len(ceiling), hemisphere)
        if np.nanmax(ceiling, initial=0.0) > 1.0:
            raise DataError(
                f"{path} reaches {np.nanmax(ceiling):g}; wanted fractions from 0 to 1. Divide percent by 100."
            )
        return ceiling

    def truth(self) -> dict[str, Any] | None:
        """What was planted (``truth.json``), for a synthetic subject.

        Raises:
            DataError: the file is torn.
        """
        path = self.folder / layout.TRUTH
        if not path.exists():
            return None
        try:
            truth: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise DataError(f"{path} is no whole JSON file: {error}. Make the synthetic subject again.") from error
        return truth

    def _mask(self, hemisphere: Hemisphere, roi_class: str) -> npt.NDArray[Any]:
        path = self.folder / layout.mask_file(hemisphere, roi_class, "challenge")
        mask = _map_array(path, ndim=1, mapped=False)
        self._check_length(path, len(mask), hemisphere)
        if not np.array_equal(mask, mask.astype(np.int64)):
            raise DataError(f"{path} holds values that are no whole numbers; wanted integer labels.")
        return mask.astype(np.int64)

    def _check_length(self, path: Path, found: int, hemisphere: Hemisphere) -> None:
        wanted = self.n_vertices[HEMISPHERES.index(hemisphere)]
        if found != wanted:
            raise DataError(
                f"{path} has {found} entries, but the {hemisphere} responses have {wanted} vertices. "
                "Masks and responses are not of one subject; copy both from the same folder."
            )

    def _organisers(self, name: str) -> Path | None:
        places = (self.folder / name, layout.organiser_dir(self.folder) / name)
        return next((p for p in places if p.exists()), None)


def _check_split(split: str) -> None:
    if split not in _SPLITS:
        raise UnknownName("split", split, _SPLITS)


def missing_parts(folder: Path) -> list[str]:
    """Names of what a subject needs and this folder lacks. Test images and fsaverage masks are not needed to train."""
    if not folder.is_dir():
        return ["the folder itself"]
    needed = [layout.responses_file("train", h) for h in HEMISPHERES]
    needed += [layout.mask_file(h, c, "challenge") for h in HEMISPHERES for c in ROI_CLASSES]
    needed += [layout.mapping_file(c) for c in ROI_CLASSES]
    missing = _by_folder(folder, [name for name in needed if not (folder / name).is_file()])
    if not _list_images(folder / layout.images_dir("train")):
        missing.insert(0, f"{layout.images_dir('train')}/*.png")
    return missing


def _by_folder(folder: Path, names: list[str]) -> list[str]:
    """Names of files; where a whole folder is absent, its name instead."""
    absent = {n: n.rpartition("/")[0] for n in names if not (folder / n).parent.is_dir()}
    counts = Counter(absent.values())
    whole = [f"{parent} (the folder, with {_count(n, 'file')})" for parent, n in counts.items()]
    return whole + [name for name in names if name not in absent]


def not_finite(array: npt.NDArray[Any] | NpyReader) -> tuple[int, int]:
    """(rows, columns) of a 2-d array that hold a NaN or infinity. Reads blocks of rows, so a map stays a map."""
    rows, columns = 0, np.zeros(array.shape[1], dtype=bool)
    for start in range(0, len(array), _ROWS_PER_SCAN):
        bad = ~np.isfinite(array[start : start + _ROWS_PER_SCAN])
        if bad.any():
            rows += int(bad.any(axis=1).sum())
            columns |= bad.any(axis=0)
    return rows, int(columns.sum())


def _not_finite_text(path: Path, rows: int, vertices: int) -> str:
    return (
        f"{path} holds NaN or infinite responses in {_count(rows, 'row')} "
        f"and {_count(vertices, 'vertex', 'vertices')}. "
        "Training on them would make every weight NaN: leave those vertices or images out, or set them to 0."
    )


def locate(folder: Path) -> Path:
    """The folder itself, or the one subject folder in it if it is none and holds exactly one."""
    if (folder / "training_split").exists() or not folder.is_dir():
        return folder
    inside = [p for p in sorted(folder.iterdir()) if (p / "training_split").is_dir()]
    return inside[0] if len(inside) == 1 else folder


def _list_images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if layout.is_image(p)) if folder.is_dir() else []


def _map_array(path: Path, *, ndim: int, mapped: bool = True) -> npt.NDArray[Any]:
    try:
        if mapped:
            read_header(path)  # says the same of a torn file as readers without a map
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _not_whole(path, error) from error
    if array.ndim != ndim:
        raise DataError(f"{path} holds an array of shape {array.shape}, wanted {ndim} dimension(s).")
    return array


def _width(path: Path) -> int:
    """Columns of a two-dimensional array, from its header."""
    try:
        shape = read_header(path).shape
    except (ValueError, EOFError) as error:
        raise _not_whole(path, error) from error
    if len(shape) != 2:
        raise DataError(f"{path} holds an array of shape {shape}, wanted 2 dimension(s).")
    return shape[1]


def _not_whole(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is no whole NumPy file: {error}. Download or copy it again.")


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"
