"""Sine position features of a grid of tokens, as the published encoder has them (and DETR before it)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from brainenc.errors import UsageError


@lru_cache(maxsize=16)
def sine_position(hidden: int, grid: tuple[int, int], temperature: float = 10000.0) -> Tensor:
    """Position features of a grid, rows first.

    Row and column numbers count from 1, divided by the last one (plus 1e-6), times 2 pi; ``hidden / 2`` features for
    y, then as many for x; within each, sines and cosines alternate, at wavelengths that grow to ``temperature``.

    Args:
        hidden: features per token, a multiple of 4.
        grid: (H, W).
        temperature: the longest wavelength, in 2 pi.

    Returns:
        array of shape (H * W, hidden), float32, on the CPU, shared: do not write to it.

    Raises:
        UsageError: ``hidden`` is not a multiple of 4.
    """
    if hidden % 4:
        raise UsageError(
            f"The sine position needs a hidden width that is a multiple of 4, found {hidden}: "
            "a sine and a cosine each for rows and columns. Choose another hidden width."
        )
    half = hidden // 2
    wavelength = temperature ** (2 * torch.div(torch.arange(half, device="cpu"), 2, rounding_mode="floor") / half)
    y, x = (_alternate(_scaled(n)[:, None] / wavelength) for n in grid)
    h, w = grid
    both = torch.cat([y[:, None, :].expand(h, w, half), x[None, :, :].expand(h, w, half)], dim=-1)
    return both.reshape(h * w, hidden)


def _scaled(n: int) -> Tensor:
    counts = torch.arange(1, n + 1, dtype=torch.float32, device="cpu")
    return counts / (counts[-1] + 1e-6) * (2 * math.pi)


def _alternate(angles: Tensor) -> Tensor:
    return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=-1).flatten(1)
