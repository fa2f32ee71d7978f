"""Writing made-up responses: signal plus noise, block of rows by block, in one pass and constant memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from brainenc.datasets.npy import NpyRows
from brainenc.scoring import StreamingPearson

Floats = npt.NDArray[np.float32]

_ROWS = 256  # part of the data's meaning: noise is drawn a block at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseFiles:
    """Where one split of one hemisphere goes."""

    measured: Path
    signal: Path
    """The noiseless responses, scaled as they are in the measured ones."""


def write_responses(
    files: ResponseFiles, latents: Floats, weights: Floats, best: Floats, key: tuple[int, ...]
) -> npt.NDArray[Any]:
    """Write ``best * signal + sqrt(1 - best²) * noise`` for each vertex, as float32.

    Args:
        files: where to.
        latents: flat latents of the split, shape (n_images, n_latents).
        weights: shape (n_latents, n_vertices), giving signals of variance 1.
        best: correlation of signal and response to aim at, shape (n_vertices,).
        key: seeds the noise.

    Returns:
        The correlation of signal and response that came out, shape (n_vertices,).
    """
    n, n_vertices = len(latents), weights.shape[1]
    came_out = StreamingPearson(n_vertices)
    rest = np.sqrt(1.0 - np.square(best))
    with NpyRows(files.measured, n, n_vertices) as measured_file, NpyRows(files.signal, n, n_vertices) as signal_file:
        for start in range(0, n, _ROWS):
            signal = (latents[start : start + _ROWS] @ weights) * best
            drawn = np.random.default_rng((*key, start)).standard_normal(signal.shape, dtype=np.float32)
            measured = (signal + rest * drawn).astype(np.float32)
            signal_file.append(signal)
            measured_file.append(measured)
            came_out.update(signal, measured)
    return came_out.r()
