"""From query tokens to vertices, computing only what is kept.

The published readout computes every vertex for every query, masks, and sums over queries: with 25 queries a hemisphere
25 times too much. A linear map commutes with the sum, so vertices that belong to the same set of ROIs are *one* product
of their weights with the sum of those ROIs' tokens. The weights are kept sorted by set, so that each product reads and
writes one contiguous slice; state dicts have the published order of vertices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from brainenc.datasets.rois import Bools, RoiQueries
from brainenc.train.products import times_transposed


@dataclass(frozen=True, slots=True)
class VertexGroup:
    """Vertices, contiguous once sorted, that the same queries predict."""

    start: int
    stop: int
    queries: tuple[int, ...]


def group_vertices(masks: Bools) -> tuple[np.ndarray[Any, np.dtype[np.int64]], list[VertexGroup]]:
    """Sort vertices by the set of queries that predict them.

    Args:
        masks: bool array of shape (Q, V).

    Returns:
        order, array of shape (V,): the sorted place i holds vertex order[i]; and the groups, which cover all places.
    """
    n_vertices = masks.shape[1]
    packed = np.packbits(masks, axis=0)
    order = np.lexsort(packed) if n_vertices else np.zeros(0, dtype=np.int64)
    packed = packed[:, order]
    starts = np.flatnonzero(np.r_[n_vertices > 0, (packed[:, 1:] != packed[:, :-1]).any(axis=0)][:n_vertices])
    stops = [*starts[1:].tolist(), n_vertices]
    groups = [
        VertexGroup(start, stop, tuple(np.flatnonzero(masks[:, order[start]]).tolist()))
        for start, stop in zip(starts.tolist(), stops, strict=False)
    ]
    return order.astype(np.int64), groups


class QueryReadout(nn.Module):
    """Weights and biases of one hemisphere's vertices, initialised as ``nn.Linear`` in the published order."""

    def __init__(self, n_vertices: int, hidden: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(hidden)
        self.weight = nn.Parameter(torch.empty(n_vertices, hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_vertices).uniform_(-bound, bound))


class VertexReadout(QueryReadout):
    """``voxels``: vertex v from token v alone."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, V, D) -> (B, V)."""
        return read_own_rows(tokens, self.weight, self.bias)


def read_own_rows(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Token v times weight row v, plus bias v: (B, n, D), (n, D), (n,) -> (B, n) float32. Nothing of shape n x n."""
    return torch.einsum("bvd,vd->bv", tokens, weight.to(tokens.dtype)).float() + bias


class RoiReadout(QueryReadout):
    """Each vertex sums what the queries whose ROI holds it predict.

    Parameters lie sorted by group (see the module); ``state_dict`` and ``load_state_dict`` translate, so that what is
    in a state dict is a copy in published order, not the parameter itself.

    Args:
        masks: bool array of shape (Q, V).
        hidden: width of the tokens.
    """

    order: Tensor
    inverse: Tensor
    membership: Tensor

    def __init__(self, masks: Bools, hidden: int) -> None:
        super().__init__(masks.shape[1], hidden)
        order, groups = group_vertices(masks)
        self.groups = [g for g in groups if g.queries]
        self.register_buffer("order", torch.from_numpy(order), persistent=False)
        self.register_buffer("inverse", torch.from_numpy(np.argsort(order)), persistent=False)
        membership = torch.zeros(len(self.groups), masks.shape[0])
        for row, group in zip(membership, self.groups, strict=True):
            row[list(group.queries)] = 1
        self.register_buffer("membership", membership, persistent=False)
        self.bounds = [(g.start, g.stop) for g in self.groups]
        self.counts = [float(len(g.queries)) for g in self.groups]
        with torch.no_grad():
            self.weight.copy_(self.weight[self.order].clone())
            self.bias.copy_(self.bias[self.order].clone())

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, Q, D) -> (B, V), vertices in challenge order, float32."""
        with torch.autocast(tokens.device.type, enabled=False):  # bound by reading the weights: a cast would read twice
            sums = torch.einsum("gq,bqd->gbd", self.membership, tokens.float())
            groups = Groups(self.bounds, self.counts, self.order, self.inverse)
            out: Tensor = GroupedLinear.apply(sums, self.weight, self.bias, groups)
            return out

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("weight", "bias"):
            destination[prefix + name] = destination[prefix + name][self.inverse]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.shape == getattr(self, name).shape:  # else torch says what is wrong
                state_dict[prefix + name] = given[self.order.to(given.device)]
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass(frozen=True, slots=True)
class Groups:
    """Which rows of sorted weights belong to each group, how often each row's bias counts, and the order of rows."""

    bounds: Sequence[tuple[int, int]]
    counts: Sequence[float]
    order: Tensor
    inverse: Tensor

    def gaps(self) -> list[tuple[int, int]]:
        """Rows that belong to no group."""
        starts, stops = [a for a, _ in self.bounds], [b for _, b in self.bounds]
        return [(a, b) for a, b in zip([0, *stops], [*starts, len(self.order)], strict=True) if a < b]


class GroupedLinear(torch.autograd.Function):
    """One linear map per group of rows; the gradient of the weights is written once, in place, with no gathers.

    Args of ``apply``: token sums (G, B, D), sorted weights (V, D), sorted biases (V,), groups -> (B, V), unsorted.
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor, weight: Tensor, bias: Tensor, groups: Groups) -> Tensor:
        out = weight.new_empty(weight.shape[0], sums.shape[1])
        for total, count, (a, b) in zip(sums, groups.counts, groups.bounds, strict=True):
            out[a:b] = times_transposed(weight[a:b], total).add_(bias[a:b, None], alpha=count)
        for a, b in groups.gaps():
            out[a:b] = 0
        ctx.save_for_backward(sums, weight)
        ctx.groups = groups
        return out.index_select(0, groups.inverse).t().contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        sums, weight = ctx.saved_tensors
        groups: Groups = ctx.groups
        grad = grads[0].index_select(1, groups.order)
        d_sums, d_weight, d_bias = torch.empty_like(sums), torch.empty_like(weight), grad.sum(dim=0)
        for i, (a, b) in enumerate(groups.bounds):
            part = grad[:, a:b]
            d_sums[i] = times_transposed(part, weight[a:b].t())
            d_weight[a:b] = times_transposed(part.t(), sums[i].t())
            d_bias[a:b] *= groups.counts[i]
        for a, b in groups.gaps():
            d_weight[a:b], d_bias[a:b] = 0, 0
        return d_sums, d_weight, d_bias, None


def build_readout(queries: RoiQueries, hemisphere: str, hidden: int) -> QueryReadout:
    """The readout of one hemisphere: `VertexReadout` for one query a vertex, else `RoiReadout`."""
    masks = queries.masks("lh" if hemisphere == "lh" else "rh")
    return VertexReadout(masks.shape[1], hidden) if queries.per_vertex else RoiReadout(masks, hidden)
