"""Loss and correlation over the validation samples, each rank on its share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from brainenc.scoring import StreamingPearson
from brainenc.train.data import Batch
from brainenc.train.fitting import Floats
from brainenc.train.status import Verdict
from brainenc.train.step import Stepper
from brainenc.train.team import Team

Part = tuple[int, npt.NDArray[Any], npt.NDArray[Any]]
"""Hemisphere (0 left, 1 right), predicted and measured responses of a micro-batch."""


class Validation:
    """The sums of one validation on one rank; memory does not grow with the samples.

    Args:
        vertices: (V_lh, V_rh).
    """

    def __init__(self, vertices: tuple[int, int]) -> None:
        self._scores = tuple(StreamingPearson(n, threads=1) for n in vertices)
        self._loss, self._samples = 0.0, 0

    def add(self, verdict: Verdict, predicted: list[Part]) -> None:
        """A batch that no rank failed in."""
        self._loss += verdict.loss * verdict.samples
        self._samples += verdict.samples
        for side, outs, targets in predicted:
            self._scores[side].update(outs, targets)

    @property
    def loss(self) -> float:
        """Mean over the samples of all ranks."""
        return self._loss / max(1, self._samples)

    def correlations(self, team: Team) -> tuple[Floats, Floats]:
        """r of each vertex over the samples of all ranks, ``(V_lh,)`` and ``(V_rh,)``. Called by all ranks."""
        lh, rh = (_merged(score, team).r() for score in self._scores)
        return lh, rh


def predict_part(stepper: Stepper, batch: Batch) -> tuple[float, list[Part]]:
    """The loss summed over a batch's samples, and what was predicted in each micro-batch."""
    total, found = 0.0, []
    for first in range(0, batch.count, stepper.micro_batch):
        last = min(first + stepper.micro_batch, batch.count)
        loss, outs, targets = stepper.evaluate(*batch.part(first, last))
        total += loss * (last - first)
        for side, (out, target) in enumerate(zip(outs, targets, strict=True)):
            found.append((side, out.cpu().numpy(), target.cpu().numpy()))
    return total, found


def _merged(score: StreamingPearson, team: Team) -> StreamingPearson:
    """Every rank's part, joined in the order of ranks, one at a time so that memory does not grow with them."""
    if team.size == 1:
        return score
    mine = score.state()
    whole = StreamingPearson(score.n_vertices, threads=1)
    for rank in range(team.size):
        part = team.sum_array(mine if rank == team.rank else np.zeros_like(mine))
        whole.merge(StreamingPearson.from_state(part))
    return whole
