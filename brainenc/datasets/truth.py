"""What a synthetic subject is made of, and ``truth.json``: what was planted and the best that can be reached."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from brainenc import atomic, scoring
from brainenc.datasets import layout
from brainenc.datasets.layout import Split
from brainenc.datasets.planted import Region
from brainenc.datasets.rois import HEMISPHERES, Hemisphere, RoiQueries
from brainenc.errors import UsageError

VERSION = 1
N_NSD = 73_000
"""Images of NSD: the range of ids to draw from."""

_FORMULA = (
    "Each ROI sees the feature map through a Gaussian window at its location (row, column; fractions of the image), "
    "channels z-scored over training images, reads `rank` latent values, and its vertices mix them. Overlapping ROIs "
    "add up. response = ceiling * signal + sqrt(1 - ceiling^2) * noise: ceiling is the best expected correlation."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All that a synthetic subject is a function of, but for the features themselves."""

    n_train: int
    n_test: int
    vertices: tuple[int, int]
    """(V_lh, V_rh)."""
    seed: int = 0
    ceiling: float = 0.7
    """Best reachable correlation, averaged over ROIs."""
    spread: float = 0.15
    """ROIs' ceilings lie evenly in ``ceiling`` plus or minus this."""
    rank: int = 3
    """Latent values that a ROI reads out of its window."""
    width: float = 0.1
    """Standard deviation of a ROI's window, a fraction of the image's side (3.1 tokens of 31)."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """What the features are: backbone, weights hash, layer and facet. Recorded, and compared on a second call."""

    def __post_init__(self) -> None:
        if self.n_train < 2 or self.n_test < 0 or self.n_train + self.n_test > N_NSD:
            raise UsageError(
                f"A subject has 2 training images or more, and NSD has {N_NSD} images in all; "
                f"asked for {self.n_train} to train and {self.n_test} to test."
            )
        if not 0.0 < self.ceiling < 1.0 or self.rank < 1 or not 0.0 < self.width <= 1.0 or self.spread < 0.0:
            raise UsageError(
                "Wanted 0 < ceiling < 1, spread >= 0, rank >= 1 and 0 < width <= 1; got "
                f"{self.ceiling:g}, {self.spread:g}, {self.rank} and {self.width:g}."
            )

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``truth.json``."""
        return asdict(self) | {"vertices": list(self.vertices), "source": dict(self.source)}


@dataclass(frozen=True, slots=True)
class HemisphereOutcome:
    """What came out for one hemisphere, per vertex."""

    best: npt.NDArray[np.float32]
    """Expected correlation of the noiseless signal with the response."""
    realised: Mapping[Split, npt.NDArray[np.float64]]
    """That correlation in the images and noise that were drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """What was planted, and the best that a model can reach."""

    folder: Path
    max_val_perf: float
    """Expected `scoring.val_perf` of the noiseless signal against responses."""
    content: Mapping[str, Any]
    """All of ``truth.json``."""

    @classmethod
    def read(cls, folder: Path) -> Truth | None:
        """The truth of a finished synthetic subject; None where there is no such file."""
        path = folder / layout.TRUTH
        if not path.exists():
            return None
        content = json.loads(path.read_text())
        return cls(folder=folder, max_val_perf=content["max_val_perf"], content=content)

    def difference(self, plan: Plan) -> str:
        """How this subject differs from a plan; empty if it is the plan's."""
        if self.content.get("version") != VERSION:
            return f"version: there {self.content.get('version')!r}, wanted {VERSION}"
        found, wanted = self.content["plan"], json.loads(json.dumps(plan.to_dict()))
        return "; ".join(f"{k}: there {found.get(k)!r}, wanted {v!r}" for k, v in wanted.items() if found.get(k) != v)


def write_truth(
    folder: Path,
    plan: Plan,
    regions: Sequence[Region],
    queries: RoiQueries,
    outcomes: Mapping[Hemisphere, HemisphereOutcome],
    feature_shape: tuple[int, int, int],
) -> Truth:
    """Write ``truth.json``, the last file of a subject. ``feature_shape`` is (H, W, D)."""
    best = {h: outcomes[h].best.astype(np.float64) for h in HEMISPHERES}
    max_val_perf = scoring.val_perf(best["lh"], best["rh"])
    content = {
        "version": VERSION,
        "max_val_perf": max_val_perf,
        "max_r": {h: scoring.mean_r(best[h]) for h in HEMISPHERES},
        "realised": {split: _realised(split, outcomes) for split in ("train", "test")},
        "plan": plan.to_dict(),
        "features": {"grid": list(feature_shape[:2]), "channels": feature_shape[2]},
        "formula": _FORMULA,
        "rois": {h: _rois(h, regions, queries, outcomes[h]) for h in HEMISPHERES},
        "organiser": layout.organiser_dir(Path("..") / folder.name).as_posix(),
    }
    atomic.replace(folder / layout.TRUTH, json.dumps(content, indent=1).encode())
    return Truth(folder=folder, max_val_perf=max_val_perf, content=content)


def _realised(split: Split, outcomes: Mapping[Hemisphere, HemisphereOutcome]) -> dict[str, float]:
    """Mean correlations of the noiseless signal in a split, as a model that knew it all would be scored there."""
    r = {h: outcomes[h].realised[split] for h in HEMISPHERES}
    return {
        "lh": scoring.mean_r(r["lh"]),
        "rh": scoring.mean_r(r["rh"]),
        "val_perf": scoring.val_perf(r["lh"], r["rh"]),
    }


def _rois(
    hemisphere: Hemisphere, regions: Sequence[Region], queries: RoiQueries, outcome: HemisphereOutcome
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    here = [r for r in regions if r.hemisphere == hemisphere]
    for region, mask in zip(here, queries.masks(hemisphere), strict=True):
        some = bool(mask.any())
        found[region.name] = {
            "location": list(region.location),
            "width": region.width,
            "seed": region.seed,
            "n_vertices": int(mask.sum()),
            "ceiling": float(outcome.best[mask].mean()) if some else None,
            "realised": {s: scoring.mean_r(r[mask]) if some else None for s, r in outcome.realised.items()},
        }
    return found
