"""Regions of interest: the six label arrays of a subject, and which vertices each query of an encoder answers for.

A *class* (``floc-faces``) labels each vertex with one of its ROIs (``FFA-1``) or with 0, Unknown. Classes overlap: a
vertex may be V1v, PPA and ventral at once. A *readout* chooses the queries of an encoder, in the published order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from brainenc.errors import DataError, UnknownName

Hemisphere = Literal["lh", "rh"]
HEMISPHERES: tuple[Hemisphere, Hemisphere] = ("lh", "rh")
Bools = npt.NDArray[np.bool_]
Labels = npt.NDArray[Any]

ROI_CLASSES: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "prf-visualrois": ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4"),
    "floc-bodies": ("EBA", "FBA-1", "FBA-2", "mTL-bodies"),
    "floc-faces": ("OFA", "FFA-1", "FFA-2", "mTL-faces", "aTL-faces"),
    "floc-places": ("OPA", "PPA", "RSC"),
    "floc-words": ("OWFA", "VWFA-1", "VWFA-2", "mfs-words", "mTL-words"),
    "streams": ("early", "midventral", "midlateral", "midparietal", "ventral", "lateral", "parietal"),
})  # fmt: skip
"""Class -> its ROIs, labelled 1, 2, ... in the label arrays, in the order in which the published code counts them."""

FAMILIES: Mapping[str, str] = MappingProxyType({
    "visuals": "prf-visualrois", "bodies": "floc-bodies", "faces": "floc-faces", "places": "floc-places",
    "words": "floc-words",
})  # fmt: skip
"""Readout -> the one class that it predicts."""

READOUTS = ("voxels", "rois_all", "streams", *FAMILIES, "hemis")
ALIASES: Mapping[str, str] = MappingProxyType({"streams_inc": "streams"})
REMAINDER = "remainder"


def check_hemisphere(hemisphere: str) -> None:
    """Whether this is one of the two names.

    Raises:
        UnknownName: it is not, ``"left"`` for instance.
    """
    if hemisphere not in HEMISPHERES:
        raise UnknownName("hemisphere", hemisphere, HEMISPHERES)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class RoiQueries:
    """The queries of one readout, and the vertices whose predictions each of them gives.

    Where several rows hold a vertex, its prediction is the sum of theirs; where none does, it is 0.
    """

    readout: str
    """One of `READOUTS`; never an alias."""
    labels: tuple[str, ...]
    """Name of each row."""
    lh: Bools
    """Shape (n_rows, V_lh): the vertices that the row's query predicts."""
    rh: Bools
    """Shape (n_rows, V_rh)."""
    lh_scored: Bools
    """Shape (V_lh,): the vertices that loss and scores count. All of them, but for a family of ROIs."""
    rh_scored: Bools
    """Shape (V_rh,)."""
    per_vertex: bool = False
    """``voxels``: one query for each vertex. The rows are then those of ``rois_all``, and serve to report scores."""

    def n_queries(self, hemisphere: Hemisphere) -> int:
        """How many queries an encoder has for this hemisphere."""
        masks = self.masks(hemisphere)
        rows, vertices = masks.shape
        return int(vertices if self.per_vertex else rows)

    def masks(self, hemisphere: Hemisphere) -> Bools:
        """``lh`` or ``rh``.

        Raises:
            UnknownName: neither.
        """
        check_hemisphere(hemisphere)
        return self.lh if hemisphere == "lh" else self.rh

    def scored(self, hemisphere: Hemisphere) -> Bools:
        """``lh_scored`` or ``rh_scored``; raises as `masks` does."""
        check_hemisphere(hemisphere)
        return self.lh_scored if hemisphere == "lh" else self.rh_scored

    @property
    def covers_all(self) -> bool:
        """Whether every vertex is predicted and scored; a challenge submission needs that."""
        return bool(self.lh_scored.all() and self.rh_scored.all())

    def __repr__(self) -> str:
        queries = "one query a vertex" if self.per_vertex else f"{len(self.labels)} queries"
        return f"RoiQueries({self.readout!r}, {queries}, {self.lh.shape[1]} lh and {self.rh.shape[1]} rh vertices)"


class RoiAtlas:
    """The ROI arrays of one subject in challenge space.

    Args:
        labels: hemisphere -> class -> integer array of shape (n_vertices,), as ``roi_masks/*_challenge_space.npy``.
        names: class -> {0: 'Unknown', 1: first ROI, ...}, as ``roi_masks/mapping_*.npy``; the standard ones when None.

    Raises:
        DataError: a class is missing, its array does not fit its hemisphere, or it holds a label without a name.
    """

    def __init__(
        self, labels: Mapping[Hemisphere, Mapping[str, Labels]], names: Mapping[str, Mapping[int, str]] | None = None
    ) -> None:
        standard = {c: dict(enumerate(("Unknown", *rois))) for c, rois in ROI_CLASSES.items()}
        self.names: dict[str, dict[int, str]] = standard if names is None else {c: dict(m) for c, m in names.items()}
        self.labels: dict[Hemisphere, dict[str, Labels]] = {h: dict(labels[h]) for h in HEMISPHERES}
        for hemisphere in HEMISPHERES:
            self._check(hemisphere)

    def _check(self, hemisphere: Hemisphere) -> None:
        arrays = self.labels[hemisphere]
        if missing := [c for c in ROI_CLASSES if c not in arrays or c not in self.names]:
            raise DataError(f"ROI classes without labels or names in {hemisphere}: {', '.join(missing)}.")
        lengths = {c: len(a) for c, a in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"ROI masks of {hemisphere} differ in length: {lengths}. All must have one entry a vertex.")
        for roi_class, array in arrays.items():
            unknown = sorted(set(np.unique(array).tolist()) - set(self.names[roi_class]))
            if unknown:
                raise DataError(
                    f"{hemisphere}.{roi_class} holds the labels {unknown}, which its mapping does not name "
                    f"({self.names[roi_class]}). Mask and mapping are not of one subject or version."
                )

    @property
    def n_vertices(self) -> tuple[int, int]:
        """(V_lh, V_rh)."""
        lh, rh = (len(next(iter(self.labels[h].values()))) for h in HEMISPHERES)
        return lh, rh

    def rois(self, roi_class: str) -> dict[int, str]:
        """Label -> ROI name of one class, Unknown left out, in the order of the mapping."""
        return {label: name for label, name in self.names[roi_class].items() if label != 0}

    def masks(self, hemisphere: Hemisphere) -> dict[str, Bools]:
        """ROI -> bool array of shape (n_vertices,), all classes in published order, and last ``remainder``.

        The remainder is what no class but ``streams`` holds. ROIs that are empty in this subject are there, all False.

        Raises:
            UnknownName: no such hemisphere.
        """
        check_hemisphere(hemisphere)
        found = {name: mask for c in ROI_CLASSES for name, mask in self._class_masks(hemisphere, c).items()}
        found[REMAINDER] = self._outside(hemisphere, _QUERIED)
        return found

    def queries(self, readout: str) -> RoiQueries:
        """The queries of a readout.

        - ``rois_all``: the 24 ROIs of the five classes but ``streams``, and the remainder: vertices in none of them.
        - ``streams`` (``streams_inc``): seven streams, and the vertices in none of them.
        - ``visuals bodies faces places words``: the ROIs of one class and a remainder query. Loss and scores count the
          class's vertices only and all others are predicted as 0, so that the remainder's row is empty.
        - ``hemis``: one query for all vertices of a hemisphere. ``voxels``: one query for each vertex.

        Raises:
            UnknownName: no such readout.
        """
        readout = ALIASES.get(readout, readout)
        if readout not in READOUTS:
            raise UnknownName("readout", readout, (*READOUTS, *ALIASES))
        rows = {h: self._rows(h, readout) for h in HEMISPHERES}
        stacked = {h: np.stack(list(rows[h].values())) for h in HEMISPHERES}
        scored: dict[Hemisphere, Bools] = {h: np.logical_or.reduce(stacked[h]) for h in HEMISPHERES}
        return RoiQueries(
            readout=readout, labels=tuple(rows["lh"]), lh=stacked["lh"], rh=stacked["rh"],
            lh_scored=scored["lh"], rh_scored=scored["rh"], per_vertex=readout == "voxels",
        )  # fmt: skip

    def _rows(self, hemisphere: Hemisphere, readout: str) -> dict[str, Bools]:
        n = len(self.labels[hemisphere]["streams"])
        if readout == "hemis":
            return {"hemisphere": np.ones(n, dtype=bool)}
        if readout in FAMILIES:
            return self._class_masks(hemisphere, FAMILIES[readout]) | {REMAINDER: np.zeros(n, dtype=bool)}
        classes = ("streams",) if readout == "streams" else _QUERIED
        rows = {name: mask for c in classes for name, mask in self._class_masks(hemisphere, c).items()}
        return rows | {REMAINDER: self._outside(hemisphere, classes)}

    def _class_masks(self, hemisphere: Hemisphere, roi_class: str) -> dict[str, Bools]:
        array = self.labels[hemisphere][roi_class]
        return {name: array == label for label, name in self.rois(roi_class).items()}

    def _outside(self, hemisphere: Hemisphere, classes: tuple[str, ...]) -> Bools:
        masks = [m for c in classes for m in self._class_masks(hemisphere, c).values()]
        outside: Bools = ~np.logical_or.reduce(masks)
        return outside


_QUERIED = tuple(c for c in ROI_CLASSES if c != "streams")
"""The classes behind ``rois_all``: streams cover the same cortex once more, and the published code leaves them out."""
