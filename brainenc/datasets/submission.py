"""The challenge's submission: one zip with ``subj01/lh_pred_test.npy`` ... at its root, checked before it is sent.

A submission that the server refuses costs a day and one of few tries, so everything it would trip over is looked for
here: names, shapes, dtype, NaN, an extra folder around the subjects (the usual result of zipping from outside).
"""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, BinaryIO, cast

import numpy as np

from brainenc import atomic
from brainenc.datasets.rois import HEMISPHERES
from brainenc.errors import DataError, NoSpace, UsageError

SUBJECTS = tuple(f"subj{n:02d}" for n in range(1, 9))

_N_TEST = (159, 159, 293, 395, 159, 293, 159, 395)
_V_LH = (19004, 19004, 19004, 19004, 19004, 18978, 19004, 18981)
_V_RH = (20544, 20544, 20544, 20544, 20544, 20220, 20544, 20530)

Shapes = Mapping[str, tuple[int, int]]
"""``lh`` and ``rh`` -> (n_test, n_vertices)."""

CHALLENGE_SHAPES: Mapping[str, Shapes] = MappingProxyType({
    s: {"lh": (n, lh), "rh": (n, rh)} for s, n, lh, rh in zip(SUBJECTS, _N_TEST, _V_LH, _V_RH, strict=True)
})  # fmt: skip
"""What the challenge's eight subjects want."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same predictions give the same bytes
_ROWS = 64


@dataclass(kw_only=True, slots=True)
class SubmissionCheck:
    """What was found in a zip."""

    subjects: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What the server would refuse, or score as nonsense."""
    missing: list[str] = field(default_factory=list)
    """Subjects of the challenge that are not in it; the server wants all eight."""


def prediction_file(hemisphere: str) -> str:
    """``lh_pred_test.npy``."""
    return f"{hemisphere}_pred_test.npy"


def write_submission(out: Path, folders: Mapping[str, Path], shapes: Mapping[str, Shapes]) -> SubmissionCheck:
    """Write the zip and check what was written. A faulty one is not left behind.

    Args:
        out: the zip's path; replaced in one step if it exists.
        folders: subject -> folder with its ``lh_pred_test.npy`` and ``rh_pred_test.npy``.
        shapes: subject -> the shapes wanted.

    Raises:
        UsageError: no subject, or one whose name is not subj01 to subj08.
        DataError: predictions that the server would refuse; the message lists all faults.
    """
    if not folders or (strangers := sorted(set(folders) - set(SUBJECTS))):
        found = ", ".join(strangers) if folders else "none"
        raise UsageError(f"A submission holds predictions of {SUBJECTS[0]} to {SUBJECTS[-1]}; found {found}.")
    for subject, folder in folders.items():
        if absent := [n for n in map(prediction_file, HEMISPHERES) if not (folder / n).is_file()]:
            raise DataError(f"{folder} has no {' and no '.join(absent)} for {subject}. Run `brainenc predict` first.")
    out = out.expanduser().absolute()
    atomic.make_dirs(out.parent)
    partial = atomic.partial_name(out)
    try:
        _write(partial, folders)
        check = check_submission(partial, shapes)
        if check.problems:
            raise DataError(f"{out} was not written: {'; '.join(check.problems)}.")
        os.replace(partial, out)
        atomic.fsync_dir(out.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoSpace(f"No room for {out} ({error.strerror}). Make room or choose another --out.") from error
    finally:
        partial.unlink(missing_ok=True)
    return check


def check_submission(path: Path, shapes: Mapping[str, Shapes] = CHALLENGE_SHAPES) -> SubmissionCheck:
    """Look at every array in a zip, a few rows at a time.

    Args:
        path: the zip.
        shapes: subject -> the shapes wanted; subjects without an entry are held against the challenge's own.

    Raises:
        DataError: the file is no zip.
    """
    check = SubmissionCheck()
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
            check.problems += _misplaced(names)
            for subject in SUBJECTS:
                wanted = dict(shapes.get(subject, CHALLENGE_SHAPES[subject]))
                check.problems += _look_at(archive, subject, wanted, names, check)
    except (zipfile.BadZipFile, FileNotFoundError) as error:
        raise DataError(f"{path} is no zip that can be read: {error}.") from error
    if not check.subjects:
        check.problems.append(
            "it holds no subject's predictions (wanted subj01/lh_pred_test.npy and so on at its root)"
        )
    check.missing = [s for s in SUBJECTS if s not in check.subjects]
    return check


def _write(path: Path, folders: Mapping[str, Path]) -> None:
    with open(path, "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for subject in sorted(folders):
                for name in map(prediction_file, HEMISPHERES):
                    entry = zipfile.ZipInfo(f"{subject}/{name}", _EPOCH)
                    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                    entry.file_size = (folders[subject] / name).stat().st_size  # more than 2 GiB needs to be known
                    with open(folders[subject] / name, "rb") as source, archive.open(entry, "w") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
        file.flush()
        os.fsync(file.fileno())


def _misplaced(names: list[str]) -> Iterator[str]:
    wanted = {prediction_file(h) for h in HEMISPHERES}
    deep = [n for n in names if PurePosixPath(n).name in wanted and len(PurePosixPath(n).parts) != 2]
    if deep:
        yield f"{deep[0]} is not at the zip's root: wanted subj01/{PurePosixPath(deep[0]).name}, no folder around it"
    known = {f"{s}/{n}" for s in SUBJECTS for n in wanted}
    odd = [n for n in names if n not in known and n not in deep]
    if odd:
        yield f"it holds files that do not belong: {', '.join(odd[:5])}"


def _look_at(
    archive: zipfile.ZipFile, subject: str, wanted: dict[str, tuple[int, int]], names: list[str], check: SubmissionCheck
) -> Iterator[str]:
    present = {h: f"{subject}/{prediction_file(h)}" in names for h in HEMISPHERES}
    if not any(present.values()):
        return
    check.subjects.append(subject)
    for hemisphere in HEMISPHERES:
        name = f"{subject}/{prediction_file(hemisphere)}"
        if not present[hemisphere]:
            yield f"{name} is missing"
            continue
        try:
            with archive.open(name) as file:
                yield from _look_at_array(cast("BinaryIO", file), name, wanted[hemisphere])
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            yield f"{name} is no whole NumPy file: {error}"


def _look_at_array(file: BinaryIO, name: str, wanted: tuple[int, int]) -> Iterator[str]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype != np.dtype("<f4"):
        yield f"{name} holds {dtype}, wanted float32"
    if shape != wanted:
        yield f"{name} has the shape {shape}, wanted {wanted} (test images, vertices)"
    if dtype.kind != "f" or len(shape) != 2 or fortran:
        if fortran:
            yield f"{name} is stored column by column, wanted row by row (np.ascontiguousarray)"
        return
    yield from _look_at_values(file, name, shape, dtype)


def _look_at_values(file: BinaryIO, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[str]:
    """Count bad values, a few rows at a time: the largest zips do not fit in the memory of a free notebook."""
    row_bytes = shape[1] * dtype.itemsize
    bad_rows, bad_columns = 0, np.zeros(shape[1], dtype=bool)
    for start in range(0, shape[0], _ROWS):
        n = min(_ROWS, shape[0] - start)
        data = file.read(n * row_bytes)
        if len(data) != n * row_bytes:
            yield f"{name} ends after {start + len(data) // max(row_bytes, 1)} of {shape[0]} rows"
            return
        bad = ~np.isfinite(np.frombuffer(data, dtype).reshape(n, -1))
        bad_rows += int(bad.any(axis=1).sum())
        bad_columns |= bad.any(axis=0)
    if bad_rows:
        yield f"{name} has NaN or infinite values in {bad_rows} rows and {int(bad_columns.sum())} vertices"
