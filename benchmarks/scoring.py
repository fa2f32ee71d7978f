"""Evaluation: 1,000 images x 39,548 vertices against a loop of `scipy.stats.pearsonr`."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
from scipy.stats import pearsonr

from benchmarks.figures import Figure
from brainenc.scoring import StreamingPearson, pearson

TITLE = "Evaluation"
NOTES = "The SciPy loop is timed on every 20th vertex, interleaved with ours, and scaled to all of them."

N_IMAGES, N_VERTICES = 1_000, 39_548
_EVERY = 20
_ROUNDS = 5


def run() -> list[Figure]:
    """Measure."""
    predicted, measured = _data()
    columns = range(0, N_VERTICES, _EVERY)
    ours, theirs = [], []
    for rounds in range(_ROUNDS):
        start = time.perf_counter()
        r = pearson(predicted, measured)
        ours.append(time.perf_counter() - start)
        part = columns[rounds::_ROUNDS]
        start = time.perf_counter()
        reference = np.array([pearsonr(predicted[:, i], measured[:, i])[0] for i in part])
        theirs.append((time.perf_counter() - start) / len(part) * N_VERTICES)
        difference = float(np.abs(r[list(part)] - reference).max())
    fast, slow = min(ours), min(theirs)  # others on the machine only ever add time
    exact = _exact(predicted[:, ::_EVERY], measured[:, ::_EVERY])
    worst = max(difference, float(np.abs(r[::_EVERY] - exact).max()))
    return [
        Figure(name="1,000 images x 39,548 vertices against a loop of scipy.stats.pearsonr", value=slow / fast,
               target=100, reference=f"SciPy {slow:.2f} s, ours {fast * 1000:.0f} ms"),
        Figure(name="largest difference of r from SciPy and from float64 sums", value=worst, unit="", target=1e-6,
               at_most=True),
        Figure(name="memory of streaming over batches of 16 images", value=_memory(predicted, measured) / 1e6,
               unit="MB", target=16, at_most=True, note="whatever the number of images"),
    ]  # fmt: skip


def _data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    measured = rng.standard_normal((N_IMAGES, N_VERTICES), dtype=np.float32)
    predicted = 0.4 * measured + rng.standard_normal((N_IMAGES, N_VERTICES), dtype=np.float32) + 3
    return predicted.astype(np.float32), measured


def _exact(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x.astype(np.float64) - x.mean(axis=0, dtype=np.float64) for x in (a, b))
    return (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))


def _memory(predicted: np.ndarray, measured: np.ndarray) -> int:
    """Peak bytes beyond the arrays that are there already."""
    tracemalloc.start()
    stream = StreamingPearson(N_VERTICES)
    for i in range(0, N_IMAGES, 16):
        stream.update(predicted[i : i + 16], measured[i : i + 16])
    stream.r()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
