"""The planted truth of a synthetic subject: what each ROI responds to, as pure functions over arrays.

A *region* is one row of ``rois_all`` in one hemisphere: a ROI, or the remainder. It looks at the feature map through
a fixed smooth window of a few tokens at its own location and reads a few latent values out of what it sees there::

    pooled[n, d]  = sum over tokens t of window[t] * features[n, t, d]
    latent[n, k]  = zscore over images( sum over d of (pooled[n, d] - mean[d]) / sd[d] * readout[d, k] )
    signal[n, v]  = zscore over images( sum over the regions holding v, and over k, of latent[n, k] * weight[k, v] )
    response      = ceiling[v] * signal + sqrt(1 - ceiling[v]^2) * standard normal noise

``mean`` and ``sd`` are taken over training images, channel by channel: where features hardly differ between images,
as those of an untrained network do, what differs is what the region sees. ``ceiling`` is then exactly the expected
correlation of signal and response, the best that any model can reach, and its square is the noise ceiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from brainenc.datasets.rois import HEMISPHERES, Bools, Hemisphere, RoiQueries

Floats = npt.NDArray[np.float32]

_TRUNCATE = 2.5
"""Windows end at so many standard deviations: beyond, a Gaussian holds 4 % of its mass, and every token would count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """What one row of ``rois_all`` looks at in one hemisphere."""

    hemisphere: Hemisphere
    name: str
    location: tuple[float, float]
    """Centre of its window as (row, column), fractions of the image's sides. Left hemispheres look right."""
    width: float
    """Standard deviation of its window, a fraction of the image's side."""
    ceiling: float
    """Best reachable correlation of a vertex that has this region only."""
    seed: int
    """Of its readout and weights."""


def plan_regions(queries: RoiQueries, *, ceiling: float, spread: float, width: float, seed: int) -> list[Region]:
    """One region for each row of each hemisphere, left first. Ceilings are spread evenly around ``ceiling``."""
    rng = np.random.default_rng((seed, 3))
    n = len(queries.labels)
    regions = []
    for side, hemisphere in enumerate(HEMISPHERES):
        ceilings = rng.permutation(np.linspace(ceiling - spread, ceiling + spread, n)).clip(0.02, 0.98)
        for name, best in zip(queries.labels, ceilings, strict=True):
            row, column = rng.uniform(0.12, 0.88), rng.uniform(0.5, 0.88)
            place = (round(float(row), 4), round(float(column if side == 0 else 1.0 - column), 4))
            regions.append(
                Region(hemisphere=hemisphere, name=name, location=place, width=width, ceiling=round(float(best), 4),
                       seed=int(rng.integers(2**31)))
            )  # fmt: skip
    return regions


def windows(regions: Sequence[Region], grid: tuple[int, int]) -> Floats:
    """Window of each region over the tokens of a grid (H, W): shape (n_regions, H * W), each row summing to 1."""
    rows, columns = ((np.arange(n) + 0.5) / n for n in grid)
    made = np.empty((len(regions), grid[0] * grid[1]), np.float32)
    for i, region in enumerate(regions):
        distance = np.hypot(rows[:, None] - region.location[0], columns[None, :] - region.location[1]) / region.width
        nearest = distance.min()  # on a coarse grid the location may lie between tokens: one must be inside
        window = np.exp(-0.5 * (distance**2 - nearest**2)) * (distance <= max(_TRUNCATE, nearest))
        made[i] = (window / window.sum()).ravel()
    return made


def pool(features: npt.NDArray[Any], window: Floats) -> Floats:
    """Features (n, H, W, D) through each region's window: shape (n, n_regions, D)."""
    n, height, width, channels = features.shape
    tokens = np.asarray(features, np.float32).reshape(n, height * width, channels)
    return window @ tokens


@dataclass(frozen=True, slots=True)
class Readouts:
    """Each region's linear readout of its pooled features, calibrated on training images."""

    weights: Floats
    """Shape (n_regions, D, K), the division by each channel's standard deviation included."""
    means: Floats
    """Shape (n_regions, D)."""

    @classmethod
    def calibrate(cls, pooled: Floats, regions: Sequence[Region], rank: int) -> Readouts:
        """Draw readouts, and take each channel's mean and standard deviation from ``pooled`` (n, n_regions, D)."""
        channels = pooled.shape[2]
        means, deviations = pooled.mean(axis=0), pooled.std(axis=0)
        drawn = [np.random.default_rng(r.seed).standard_normal((channels, rank)) for r in regions]
        scale = np.divide(1.0, deviations, out=np.zeros_like(deviations), where=deviations > 1e-12)
        return cls((np.stack(drawn) * scale[:, :, None]).astype(np.float32), means)

    def latents(self, pooled: Floats) -> Floats:
        """Shape (n, n_regions, K)."""
        made: Floats = np.einsum("nrd,rdk->nrk", pooled - self.means, self.weights, optimize=True)
        return made


def standardise(latents: Floats, n_train: int) -> Floats:
    """Z-score latents (n, n_regions, K) by their first ``n_train`` rows."""
    train = latents[:n_train]
    scored: Floats = ((latents - train.mean(axis=0)) / np.maximum(train.std(axis=0), 1e-12)).astype(np.float32)
    return scored


def vertex_weights(train: Floats, regions: Sequence[Region], masks: Bools) -> Floats:
    """Weights (n_regions * K, V) that turn flat latents into signals of variance 1 over the training rows.

    Args:
        train: flat latents of this hemisphere's regions, shape (n_train, n_regions * K).
        regions: this hemisphere's, one a row of ``masks``.
        masks: shape (n_regions, V); every vertex is in one region at least.
    """
    rank = train.shape[1] // len(regions)
    n_vertices = masks.shape[1]
    drawn = [np.random.default_rng((r.seed, 1)).standard_normal((rank, n_vertices)) for r in regions]
    weights = np.concatenate([w * mask for w, mask in zip(drawn, masks, strict=True)])
    covariance = np.cov(train, rowvar=False, bias=True, dtype=np.float64).reshape(len(weights), -1)
    variance = np.einsum("iv,iv->v", weights, covariance @ weights)
    scaled: Floats = (weights / np.sqrt(np.maximum(variance, 1e-24))).astype(np.float32)
    return scaled


def vertex_ceilings(regions: Sequence[Region], masks: Bools, *, seed: int) -> Floats:
    """Best reachable correlation of each vertex: the mean of its regions' ceilings, and a little of its own."""
    rng = np.random.default_rng((seed, 4, HEMISPHERES.index(regions[0].hemisphere)))
    mean = np.array([r.ceiling for r in regions]) @ masks / masks.sum(axis=0)
    best: Floats = np.clip(mean + rng.normal(0.0, 0.03, masks.shape[1]), 0.02, 0.98).astype(np.float32)
    return best
