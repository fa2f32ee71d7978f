"""Is this a usable subject folder? Everything that is wrong with it at once, instead of one error after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from brainenc.datasets import layout
from brainenc.datasets.algonauts import Responses, Subject, locate, missing_parts
from brainenc.datasets.layout import Split
from brainenc.datasets.rois import HEMISPHERES, ROI_CLASSES, Hemisphere
from brainenc.errors import DataError

_SPLITS: tuple[Split, Split] = ("train", "test")
_ROWS = 256


@dataclass(kw_only=True, slots=True)
class SubjectCheck:
    """What `check` found."""

    folder: str
    problems: list[str] = field(default_factory=list)
    """What keeps the subject from being used; empty if it is usable."""
    notes: list[str] = field(default_factory=list)
    """What is unusual or missing, but not needed to train."""
    n_train: int = 0
    n_test: int = 0
    n_vertices: tuple[int, int] = (0, 0)
    n_rois: int = 0
    """ROIs with a vertex in one hemisphere at least."""
    synthetic: bool = False

    @property
    def usable(self) -> bool:
        """No problem was found."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"usable": self.usable, **asdict(self), "n_vertices": list(self.n_vertices)}


def check(folder: str | Path, *, mapped: bool = True) -> SubjectCheck:
    """Look at every part of a subject folder, reading all responses once. What is wrong is told, never raised.

    Args:
        folder: the subject's, or one that holds exactly one.
        mapped: memory-map the responses; False reads them as `Subject.response_rows` does.
    """
    found = locate(Path(folder).expanduser().absolute())
    result = SubjectCheck(folder=str(found))
    missing = missing_parts(found)
    result.problems += [f"missing: {name}" for name in missing]
    if not found.is_dir():
        return result
    subject = Subject(found)
    result.n_train, result.n_test = (len(_images(subject, split)) for split in _SPLITS)
    result.synthetic = (found / layout.TRUTH).exists()
    responses = partial(_look_at_responses, mapped=mapped)
    for look in (_look_at_images, responses, _look_at_rois, _look_at_the_rest):
        result.problems = list(dict.fromkeys([*result.problems, *look(subject, result)]))
    return result


def _images(subject: Subject, split: Split) -> list[Path]:
    try:
        return subject.images(split)
    except DataError:
        return []


def _told(*calls: Callable[[], object]) -> Iterator[str]:
    """The complaints of calls that raise `DataError` where something is wrong."""
    for call in calls:
        try:
            call()
        except FileNotFoundError:  # reported as missing already
            continue
        except DataError as error:
            yield str(error)


def _look_at_images(subject: Subject, result: SubjectCheck) -> Iterator[str]:
    """Ids, formats and sizes, from the files' headers."""
    odd: list[str] = []
    for split in _SPLITS:
        images = _images(subject, split)
        if images:
            yield from _told(lambda split=split: subject.ids(split))  # type: ignore[misc]
        for path in images:
            try:
                with Image.open(path) as image:
                    if (image.size, image.mode) != ((layout.IMAGE_SIZE, layout.IMAGE_SIZE), "RGB"):
                        odd.append(f"{path.name} ({image.width} x {image.height}, {image.mode})")
            except OSError as error:
                yield f"{path} cannot be read: {error}"
    if odd:
        result.notes.append(f"{len(odd)} images are not 425 x 425 RGB: {', '.join(odd[:3])}{' ...' if odd[3:] else ''}")
    if result.n_train and not result.n_test:
        result.notes.append(f"no test images in {layout.images_dir('test')}: nothing can be predicted for a submission")


def _look_at_responses(subject: Subject, result: SubjectCheck, *, mapped: bool) -> Iterator[str]:
    for hemisphere in HEMISPHERES:
        try:
            responses = subject.responses(hemisphere) if mapped else subject.response_rows(hemisphere)
        except DataError as error:
            if (subject.folder / layout.responses_file("train", hemisphere)).exists():
                yield str(error)
            continue
        constant = _constant(responses)
        if constant:
            result.notes.append(f"{constant} vertices of {hemisphere} respond the same to every image: they score 0")
        yield from _told(lambda h=hemisphere: subject.require_finite(h, mapped=mapped))  # type: ignore[misc]


def _constant(responses: Responses) -> int:
    """Vertices whose responses are all equal."""
    same, first = np.ones(responses.shape[1], dtype=bool), responses[0]
    for start in range(0, len(responses), _ROWS):
        same &= (responses[start : start + _ROWS] == first).all(axis=0)
    return int(same.sum())


def _look_at_rois(subject: Subject, result: SubjectCheck) -> Iterator[str]:
    needed = [layout.mapping_file(c) for c in ROI_CLASSES]
    needed += [layout.responses_file("train", h) for h in HEMISPHERES]
    needed += [layout.mask_file(h, c, "challenge") for h in HEMISPHERES for c in ROI_CLASSES]
    if not all((subject.folder / name).exists() for name in needed):
        return  # reported as missing
    problems = list(_told(lambda: subject.n_vertices, lambda: subject.rois))
    if not problems:
        result.n_vertices = subject.n_vertices
        masks: list[tuple[Hemisphere, dict[str, Any]]] = [(h, subject.rois.masks(h)) for h in HEMISPHERES]
        names = [name for name in masks[0][1] if any(m[name].any() for _, m in masks)]
        result.n_rois = len([n for n in names if n != "remainder"])
        empty = [f"{h} {name}" for h, m in masks for name, mask in m.items() if not mask.any() and name != "remainder"]
        if empty:
            result.notes.append(f"ROIs without a vertex, scored as missing: {', '.join(empty)}")
    yield from problems


def _look_at_the_rest(subject: Subject, result: SubjectCheck) -> Iterator[str]:
    """What training does not need: fsaverage masks and noise ceilings."""
    classes = (layout.ALL_VERTICES, *ROI_CLASSES)
    names = [layout.mask_file(h, c, "fsaverage") for h in HEMISPHERES for c in classes]
    absent = [name for name in names if not (subject.folder / name).exists()]
    if absent:
        result.notes.append(f"{len(absent)} fsaverage masks are missing ({absent[0]} ...): no maps on the surface")
    yield from _told(subject.truth)
    if result.n_vertices != (0, 0):
        yield from _told(*(lambda h=h: subject.noise_ceiling(h) for h in HEMISPHERES))
