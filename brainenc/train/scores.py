"""How good a run is, as plain numbers: per hemisphere, ROI and stream, against the noise ceiling where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from brainenc.datasets.algonauts import Subject
from brainenc.datasets.rois import HEMISPHERES, Hemisphere
from brainenc.scoring import challenge_score, mean_r, noise_normalised, roi_means, val_perf

Floats = npt.NDArray[np.float64]


def summarise(r_lh: Floats, r_rh: Floats, subject: Subject) -> dict[str, Any]:
    """Scores of one evaluation.

    Args:
        r_lh: correlation of each vertex, shape (V_lh,), NaN where it is undefined.
        r_rh: the same, right.
        subject: whose ROIs and noise ceilings are used.

    Returns:
        ``r_lh, r_rh, val_perf``; per ROI and hemisphere the mean ``r`` (None: no vertex in this subject) and number of
        ``vertices``; with noise ceilings the challenge's ``score`` in percent, in whole and per ROI.
    """
    r: dict[Hemisphere, Floats] = {"lh": r_lh, "rh": r_rh}
    ceilings = {h: subject.noise_ceiling(h) for h in HEMISPHERES}
    found: dict[str, Any] = {
        "r_lh": mean_r(r_lh), "r_rh": mean_r(r_rh), "val_perf": val_perf(r_lh, r_rh),
        "undefined_vertices": {h: int(np.isnan(r[h]).sum()) for h in HEMISPHERES},
        "rois": {h: _per_roi(r[h], ceilings[h], subject, h) for h in HEMISPHERES},
    }  # fmt: skip
    parts = [(r[h], ceiling) for h in HEMISPHERES if (ceiling := ceilings[h]) is not None]
    if len(parts) == len(HEMISPHERES):
        found["score"] = challenge_score(parts)
    return found


def _per_roi(r: Floats, ceiling: Floats | None, subject: Subject, hemisphere: Hemisphere) -> dict[str, dict[str, Any]]:
    masks = subject.rois.masks(hemisphere)
    table: dict[str, dict[str, Any]] = {
        name: {"r": None if np.isnan(mean) else mean, "vertices": int(masks[name].sum())}
        for name, mean in roi_means(r, masks).items()
    }
    if ceiling is not None:
        for name, score in roi_means(noise_normalised(r, ceiling), masks).items():
            table[name]["score"] = None if np.isnan(score) else score
    return table
