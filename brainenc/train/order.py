"""Which sample is trained on when: a function of seed, epoch and step alone, never of the number of workers.

The bits come from a raw Philox stream, whose output NumPy promises never to change; ``Generator.permutation`` gives no
such promise, and a resumed run must see the same order under a newer NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

_SPLIT_STREAM = 0x5B117
"""Keeps the split's random stream apart from those of the epochs."""


def permutation(n: int, seed: int, stream: int) -> Rows:
    """A permutation of ``range(n)`` that depends on ``seed`` and ``stream`` alone."""
    bits = np.random.Philox(key=np.array([seed & (2**64 - 1), stream], dtype=np.uint64)).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int64)


def split_indices(n: int, seed: int) -> Rows:
    """The permutation that is saved as ``idxs.npy``: its first ``n_training(n)`` entries are for training."""
    return permutation(n, seed, _SPLIT_STREAM)


def n_training(n: int, fraction: float = 0.9) -> int:
    """How many of ``n`` samples are for training: ``round(0.9 * n)``, as published."""
    return round(n * fraction)


def share(batch: Rows, rank: int, world: int) -> Rows:
    """Rank's contiguous part of a global batch; parts differ by at most one sample and may be empty."""
    return batch[rank * len(batch) // world : (rank + 1) * len(batch) // world]


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """The order of ``n_samples`` over all epochs, in global batches; the last short batch of an epoch is kept."""

    n_samples: int
    batch_size: int
    seed: int
    shuffle: bool = True

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one epoch."""
        return -(-self.n_samples // self.batch_size)

    def position(self, step: int) -> tuple[int, int]:
        """Global step (0-based) -> epoch and step within it."""
        return divmod(step, self.steps_per_epoch)

    def epoch(self, epoch: int) -> Rows:
        """Sample numbers of one epoch, in order."""
        if not self.shuffle:
            return np.arange(self.n_samples, dtype=np.int64)
        return permutation(self.n_samples, self.seed, epoch)

    def batches(self, first: int, last: int) -> Iterator[tuple[int, Rows]]:
        """``(global step, sample numbers)`` for the steps from ``first`` to before ``last``."""
        epoch, rows = -1, np.empty(0, np.int64)
        for step in range(first, last):
            now, within = self.position(step)
            if now != epoch:
                epoch, rows = now, self.epoch(now)
            yield step, rows[within * self.batch_size : (within + 1) * self.batch_size]
