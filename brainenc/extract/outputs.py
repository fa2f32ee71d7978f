"""Where a forward pass leaves its features on the host: memory that stays from pass to pass.

Taken from the heap in each pass, features that wait for the end of the pass would lie among the model's own
temporaries, which then no longer fit into the gaps: three times the features' size was measured for each further one.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping

import torch

from brainenc.extract.features import Feature


class OutputBuffers:
    """One block of pages for each feature, as large as the largest pass so far. Worker only; one thread.

    Args:
        dtype: of what is kept.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._kept: dict[Feature, torch.Tensor] = {}

    def take(self, rows: int, row_shapes: Mapping[Feature, tuple[int, ...]]) -> dict[Feature, torch.Tensor]:
        """Feature -> (rows, *row_shape), uninitialised; what was handed out before is overwritten."""
        return {feature: self._buffer(feature, rows, shape) for feature, shape in row_shapes.items()}

    def _buffer(self, feature: Feature, rows: int, shape: tuple[int, ...]) -> torch.Tensor:
        count = rows * math.prod(shape)
        kept = self._kept.get(feature)
        if kept is None or len(kept) < count:
            self._kept.pop(feature, None)  # before the larger one is there
            pages = _pages(count * self._dtype.itemsize)
            kept = self._kept[feature] = torch.frombuffer(pages, dtype=self._dtype)
        return kept[:count].view(rows, *shape)


def _pages(n_bytes: int) -> mmap.mmap:
    """Memory of this process alone. What ``mmap`` gives by itself is shared, and counts as the group's shared memory.

    Raises:
        OSError: ENOMEM.
    """
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, n_bytes)  # Windows, where it is private
