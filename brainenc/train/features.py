"""Rows of one or several stored features -> one map ``(B, D, H, W)``, as encoders want it.

Axes: B samples, T tokens of a stored row (prefix tokens such as CLS first), D channels, H x W the grid of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from brainenc.errors import UsageError

Part = Literal["map", "cls", "mean"]
PARTS: tuple[Part, ...] = ("map", "cls", "mean")
"""What of a stored row is used: its grid tokens, its first token, or the mean of its grid tokens."""


def split_part(feature: str) -> tuple[str, Part | None]:
    """``"dinov2-base/11.q:cls"`` -> ``("dinov2-base/11.q", "cls")``; None: no suffix, the natural part."""
    name, colon, part = feature.rpartition(":")
    if not colon or "/" in part:
        return feature, None
    for known in PARTS:
        if part == known:
            return name, known
    raise UsageError(f"{feature!r}: {part!r} is no part of a feature. There is: {', '.join(PARTS)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLayout:
    """How a stored row of one feature is laid out, and what of it is used."""

    name: str
    row_shape: tuple[int, ...]
    n_prefix: int
    grid: tuple[int, int] | None
    """Of its tokens; None for a pooled feature, which has no place."""
    part: Part

    @property
    def channels(self) -> int:
        """D."""
        return self.row_shape[-1]

    @classmethod
    def of(cls, name: str, row_shape: Sequence[int], details: Mapping[str, Any], part: Part | None) -> RowLayout:
        """Read a collection's details (``n_prefix``, ``grid``).

        Raises:
            UsageError: the row is neither a map of tokens nor one vector, or has no such part.
        """
        shape = tuple(int(n) for n in row_shape)
        n_prefix, size = _grid(shape, details)
        if len(shape) not in (1, 2):
            raise UsageError(f"{name} has rows of shape {shape}; training takes (tokens, channels) or (channels,).")
        pooled = len(shape) == 1 or shape[0] == 1
        if not pooled and (size is None or shape[0] != n_prefix + size[0] * size[1]):
            raise UsageError(
                f"{name} has {shape[0]} tokens a row, which are not {n_prefix} prefix tokens and a grid of {size}: "
                "its details do not say where the tokens lie. Extract it again, or write it with `grid` in its details."
            )
        if part == "cls" and not pooled and n_prefix == 0:
            raise UsageError(
                f"{name} has no CLS token: its rows are a map of {size} tokens. Use :mean instead of :cls."
            )
        chosen = "cls" if pooled else part or "map"
        return cls(name=name, row_shape=shape, n_prefix=n_prefix, grid=None if pooled else size, part=chosen)

    def used(self, rows: torch.Tensor) -> torch.Tensor:
        """The used part, ``(B, H * W, D)`` for a map and ``(B, 1, D)`` for a vector, float32."""
        if rows.ndim == 2:
            return rows.float().unsqueeze(1)
        if self.grid is None or self.part == "cls":
            return rows[:, :1].float()
        tokens = rows[:, self.n_prefix :].float()
        return tokens.mean(1, keepdim=True) if self.part == "mean" else tokens


def _grid(shape: tuple[int, ...], details: Mapping[str, Any]) -> tuple[int, tuple[int, int] | None]:
    """Prefix tokens and grid; of features made elsewhere, which may not say: a square, alone or with one CLS token."""
    if grid := details.get("grid"):
        return int(details.get("n_prefix") or 0), (int(grid[0]), int(grid[1]))
    if len(shape) == 2:
        given = details.get("n_prefix")
        for n_prefix in (0, 1) if given is None else (int(given),):
            side = round(max(0, shape[0] - n_prefix) ** 0.5)
            if side and side * side + n_prefix == shape[0]:
                return n_prefix, (side, side)
    return int(details.get("n_prefix") or 0), None


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureLayout:
    """How several features become one map: concatenated along channels, vectors tiled over the grid."""

    rows: tuple[RowLayout, ...]
    grid: tuple[int, int]

    @property
    def channels(self) -> int:
        """D of the map."""
        return sum(row.channels for row in self.rows)

    @classmethod
    def of(cls, rows: Sequence[RowLayout]) -> FeatureLayout:
        """Join layouts.

        Raises:
            UsageError: the maps have different grids.
        """
        maps = [row for row in rows if row.grid is not None and row.part == "map"]
        grids = {row.grid for row in maps}
        if len(grids) > 1:
            found = "; ".join(f"{row.name}: {row.grid}" for row in maps)
            raise UsageError(
                f"Features on different grids cannot be concatenated: {found}. Train on one of them at a time."
            )
        # Vectors alone are tiled over the grid of the rows that they come from, as published; else there is one place.
        known = [row.grid for row in (maps or rows) if row.grid is not None]
        return cls(rows=tuple(rows), grid=known[0] if known else (1, 1))

    def assemble(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Stored rows of each feature ``(B, T, D_i)`` or ``(B, D_i)``, any float dtype -> ``(B, D, H, W)`` float32.

        The result is a view of token-major memory, so that an encoder that flattens it to tokens copies nothing.
        """
        n_tokens = self.grid[0] * self.grid[1]
        parts = [layout.used(r) for layout, r in zip(self.rows, rows, strict=True)]
        if len(parts) > 1:
            tokens = torch.cat([p.expand(-1, n_tokens, -1) for p in parts], dim=-1)
        else:
            tokens = parts[0].expand(-1, n_tokens, -1)
        return tokens.reshape(len(tokens), *self.grid, tokens.shape[-1]).permute(0, 3, 1, 2)
