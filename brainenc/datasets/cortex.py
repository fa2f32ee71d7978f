"""A made-up cortex: ROI labels that overlap across classes as real ones do, and their place on fsaverage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from brainenc.datasets import layout, npy
from brainenc.datasets.mapping import write_mapping
from brainenc.datasets.rois import HEMISPHERES, ROI_CLASSES, Hemisphere, RoiAtlas
from brainenc.errors import UsageError

Ints = npt.NDArray[np.int32]

EMPTY_ROI = "aTL-faces"
"""No vertex has it, as in several of the challenge's subjects."""

_REACH: Mapping[str, float] = MappingProxyType({
    "prf-visualrois": 0.14, "floc-bodies": 0.13, "floc-faces": 0.11, "floc-places": 0.14, "floc-words": 0.11,
    "streams": 0.3,
})  # fmt: skip
"""How far a ROI extends from its centre, on a sheet of side 1: ROIs of a class tile, those of two classes overlap."""


def made_up_atlas(vertices: tuple[int, int], seed: int) -> RoiAtlas:
    """Labels of all six classes for (V_lh, V_rh) vertices; every ROI but `EMPTY_ROI` has a vertex where V allows.

    Raises:
        UsageError: more vertices than fsaverage has, or none.
    """
    if not all(0 < v <= layout.N_FSAVERAGE for v in vertices):
        raise UsageError(f"A hemisphere has 1 to {layout.N_FSAVERAGE} vertices (fsaverage's); asked for {vertices}.")
    rng = np.random.default_rng((seed, 1))
    return RoiAtlas({h: _labels(n, rng) for h, n in zip(HEMISPHERES, vertices, strict=True)})


def write_atlas(folder: Path, atlas: RoiAtlas, seed: int) -> None:
    """Write ``roi_masks``: labels in challenge and fsaverage space, the all-vertices masks and the mappings."""
    rng = np.random.default_rng((seed, 2))
    (folder / "roi_masks").mkdir(parents=True, exist_ok=True)
    for hemisphere, n in zip(HEMISPHERES, atlas.n_vertices, strict=True):
        where = np.sort(rng.choice(layout.N_FSAVERAGE, n, replace=False))
        _write_fsaverage(folder, hemisphere, layout.ALL_VERTICES, where, np.ones(n, np.int32))
        for roi_class in ROI_CLASSES:
            labels = atlas.labels[hemisphere][roi_class].astype(np.int32)
            npy.save(folder / layout.mask_file(hemisphere, roi_class, "challenge"), labels)
            _write_fsaverage(folder, hemisphere, roi_class, where, labels)
    for roi_class in ROI_CLASSES:
        write_mapping(folder / layout.mapping_file(roi_class), atlas.names[roi_class])


def _write_fsaverage(
    folder: Path, hemisphere: Hemisphere, name: str, where: npt.NDArray[np.int64], values: Ints
) -> None:
    whole = np.zeros(layout.N_FSAVERAGE, np.int32)
    whole[where] = values
    npy.save(folder / layout.mask_file(hemisphere, name, "fsaverage"), whole)


def _labels(n: int, rng: np.random.Generator) -> dict[str, Ints]:
    sheet = rng.random((n, 2))
    return {c: _tile(sheet, rois, _REACH[c], rng) for c, rois in ROI_CLASSES.items()}


def _tile(sheet: npt.NDArray[np.float64], rois: tuple[str, ...], reach: float, rng: np.random.Generator) -> Ints:
    """Label each vertex of the sheet (n, 2) with the nearest ROI centre within reach, counting from 1; else 0."""
    centres = _spread_points(len(rois), rng)
    distance = np.linalg.norm(sheet[:, None] - centres, axis=2)
    labels = np.where(distance.min(axis=1) < reach, distance.argmin(axis=1) + 1, 0).astype(np.int32)
    for label, name in enumerate(rois, 1):
        if name == EMPTY_ROI:
            labels[labels == label] = 0
        elif not (labels == label).any():  # few vertices: the nearest one that no ROI of the class holds, if any
            free = np.flatnonzero(labels == 0)
            labels[free[distance[free, label - 1].argsort()[:1]]] = label
    return labels


def _spread_points(n: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """n points of the unit square, each the farthest from those before it among a handful of candidates."""
    points = [rng.uniform(0.1, 0.9, 2)]
    while len(points) < n:
        candidates = rng.uniform(0.1, 0.9, (16, 2))
        gaps = np.linalg.norm(candidates[:, None] - np.array(points), axis=2).min(axis=1)
        points.append(candidates[gaps.argmax()])
    return np.array(points)
