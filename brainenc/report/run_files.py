"""A run folder as a report reads it: configuration, records and scores; nothing of the code that wrote them."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from brainenc import records
from brainenc.datasets.algonauts import Subject
from brainenc.datasets.rois import HEMISPHERES, Hemisphere
from brainenc.errors import DataError, UsageError

Floats = npt.NDArray[np.float64]
PARTS = ("val", "test", "train")


class RunFiles:
    """``RUN``, read only.

    Args:
        path: the run folder.

    Raises:
        UsageError: there is no run there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        if not (self.path / "config.yaml").is_file():
            raise UsageError(
                f"{self.path} is no run folder: it has no config.yaml. Give what `brainenc train --out` was given."
            )

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.yaml``."""
        found = yaml.safe_load((self.path / "config.yaml").read_text())
        return found if isinstance(found, dict) else {}

    @cached_property
    def readout(self) -> str:
        """The readout that was trained; ``rois_all`` where the configuration does not say."""
        encoder = self.config.get("encoder")
        return str(encoder.get("readout", "rois_all")) if isinstance(encoder, dict) else "rois_all"

    def subject(self) -> Subject:
        """The subject it was trained on.

        Raises:
            NotASubject: its folder is gone.
            DataError: the configuration names none.
        """
        folder = self.config.get("subject_dir")
        if not folder:
            raise DataError(f"{self.path / 'config.yaml'} names no subject_dir.")
        return Subject.open(str(folder))

    def scores(self, part: str = "val") -> dict[str, Any] | None:
        """What the last evaluation of a split found, None if there was none."""
        path = self.path / ("scores.json" if part == "val" else f"scores_{part}.json")
        try:
            found = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def correlations(self, hemisphere: Hemisphere, part: str = "val") -> Floats | None:
        """r of each vertex, shape (n_vertices,), where it was kept."""
        path = self.path / "predictions" / f"{hemisphere}_{part}_corr.npy"
        return np.load(path, allow_pickle=False).astype(np.float64) if path.is_file() else None

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Records of steps and epochs as if the run had never been interrupted."""
        path = self.path / "metrics.jsonl"
        lines = [line for line in records.read(path) if "split" in line] if path.is_file() else []
        return list(records.standing(lines))

    @cached_property
    def guard(self) -> list[dict[str, Any]]:
        """Everything in ``guard.jsonl``."""
        path = self.path / "guard.jsonl"
        return list(records.read(path)) if path.is_file() else []

    def attention(self) -> dict[str, Floats]:
        """ "lh V1v" -> mean attention over the images, shape (rows, columns), where `brainenc attention` was run."""
        folder = self.path / "attention"
        try:
            axes = json.loads((folder / "attention.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        found: dict[str, Floats] = {}
        for hemisphere in HEMISPHERES:
            maps = np.load(folder / f"{hemisphere}_attention.npy", allow_pickle=False).mean(axis=0, dtype=np.float64)
            found |= {f"{hemisphere} {label}": m for label, m in zip(axes[hemisphere], maps, strict=True)}
        return found

    @cached_property
    def ensemble(self) -> dict[str, Any] | None:
        """``ensemble.json`` of a folder that combines other runs."""
        try:
            found = json.loads((self.path / "ensemble.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None


def best_correlations(subject: Subject) -> dict[Hemisphere, Floats] | None:
    """The best correlation that each vertex allows, ``sqrt(NC)``, where the noise ceilings are at hand."""
    found = {h: subject.noise_ceiling(h) for h in HEMISPHERES}
    ceilings = {h: nc for h, nc in found.items() if nc is not None}
    return {h: np.sqrt(nc) for h, nc in ceilings.items()} if len(ceilings) == len(HEMISPHERES) else None
