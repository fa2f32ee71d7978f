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
    multiples: Tensor

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
        multiples = torch.zeros(masks.shape[1])
        for (a, b), count in zip(self.bounds, self.counts, strict=True):
            multiples[a:b] = count
        self.register_buffer("multiples", multiples, persistent=False)
        with torch.no_grad():
            self.weight.copy_(self.weight[self.order].clone())
            self.bias.copy_(self.bias[self.order].clone())

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, Q, D) -> (B, V), vertices in challenge order, float32."""
        with torch.autocast(tokens.device.type, enabled=False):  # bound by reading the weights: a cast would read twice
            sums = torch.einsum("gq,bqd->gbd", self.membership, tokens.float())
            groups = Groups(self.bounds, self.counts, self.order, self.inverse, self.multiples)
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
    multiples: Tensor
    """The counts of all rows, shape (V,); 0 for those of no group."""

    def spans(self) -> list[tuple[int, int, int | None]]:
        """All rows in order: from, to, and the number of their group; None for rows that belong to none."""
        starts, stops = [a for a, _ in self.bounds], [b for _, b in self.bounds]
        gaps = zip([0, *stops], [*starts, len(self.order)], strict=True)
        found = [(a, b, None) for a, b in gaps if a < b] + [(a, b, i) for i, (a, b) in enumerate(self.bounds)]
        return sorted(found, key=lambda span: span[0])


class GroupedLinear(torch.autograd.Function):
    """One linear map per group of rows; the gradient of the weights is written once, in place, with no gathers.

    Args of ``apply``: token sums (G, B, D), sorted weights (V, D), sorted biases (V,), groups -> (B, V), unsorted.
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor, weight: Tensor, bias: Tensor, groups: Groups) -> Tensor:
        parts = [
            weight.new_zeros(b - a, sums.shape[1])
            if group is None
            else times_transposed(weight[a:b], sums[group]).add_(bias[a:b, None], alpha=groups.counts[group])
            for a, b, group in groups.spans()
        ]
        out = torch.cat([weight.new_zeros(0, sums.shape[1]), *parts])  # the first: a hemisphere may have no vertex
        ctx.save_for_backward(sums, weight)
        ctx.groups = groups
        return out.index_select(0, groups.inverse).t().contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        sums, weight = ctx.saved_tensors
        groups: Groups = ctx.groups
        grad = grads[0].index_select(1, groups.order)
        products = [times_transposed(grad[:, a:b], weight[a:b].t()) for a, b in groups.bounds]
        d_sums = torch.stack(products) if products else torch.empty_like(sums)
        d_bias = grad.sum(dim=0) * groups.multiples
        return d_sums, _weight_gradient(grad, sums, weight, groups), d_bias, None


def _weight_gradient(grad: Tensor, sums: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """(V, D), sorted. Written in place, or joined where a compiler looks on: to it, writing a slice is making the whole
    anew from what stood there, and the expressions for hundreds of groups would grow into each other."""
    spans = groups.spans()
    if torch.compiler.is_compiling():
        parts = [
            weight.new_zeros(b - a, weight.shape[1])
            if group is None
            else times_transposed(grad[:, a:b].t(), sums[group].t())
            for a, b, group in spans
        ]
        return torch.cat([weight.new_zeros(0, weight.shape[1]), *parts])
    d_weight = torch.empty_like(weight)
    for a, b, group in spans:
        d_weight[a:b] = 0 if group is None else times_transposed(grad[:, a:b].t(), sums[group].t())
    return d_weight


def build_readout(queries: RoiQueries, hemisphere: str, hidden: int) -> QueryReadout:
    """The readout of one hemisphere: `VertexReadout` for one query a vertex, else `RoiReadout`."""
    masks = queries.masks("lh" if hemisphere == "lh" else "rh")
    return VertexReadout(masks.shape[1], hidden) if queries.per_vertex else RoiReadout(masks, hidden)
