"""Attention of few queries to many tokens, in whichever of two equal forms is cheaper.

Per head, the score of query q and token m is ``q . (Wk (m + p) + bk)``. As published, keys and values are projected
first. Equally, ``(Wk^T q) . (m + p)``: the projection moves to the query, ``bk`` adds the same to every token and
drops out of the softmax; and ``sum_n a_n (Wv m_n + bv) = Wv (sum_n a_n m_n) + bv sum_n a_n``. The second form never
projects the N tokens. It costs about ``Q * h * D`` per token where the first costs ``(D + Q) * D``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from brainenc.train.absorbed import AbsorbedAttention


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear map of width D: weight (D, D), bias (D,)."""

    weight: Tensor
    bias: Tensor


def absorb_is_cheaper(n_queries: int, n_heads: int, hidden: int) -> bool:
    """Whether moving the key and value projections to the queries takes fewer operations."""
    return n_queries * n_heads <= hidden + n_queries


def attend(
    query: Tensor, memory: Tensor, position: Tensor, *, keys: Projection, values: Projection | None, n_heads: int,
    dropout: float,
) -> Tensor:  # fmt: skip
    """Attend with projected queries to a map.

    Args:
        query: array of shape (B or 1, Q, D), projected, not yet scaled by ``1 / sqrt(d)``.
        memory: array of shape (B, N, D): the values, and with ``position`` the keys.
        position: array of shape (N, D).
        keys: their projection.
        values: theirs; None: the memory itself is split over heads.
        n_heads: heads.
        dropout: probability for each attention weight, 0 outside of training.

    Returns:
        array of shape (B, Q, D), heads concatenated, before the output projection.
    """
    absorb = absorb_is_cheaper(query.shape[1], n_heads, query.shape[2])
    if absorb and memory.device.type == "cpu" and not torch.compiler.is_compiling():
        return _absorbed_on_cpu(query, memory, position, keys, values, n_heads, dropout)
    weights = F.dropout(_scores(query, memory, position, keys, n_heads).softmax(dim=-1), dropout)
    if values is not None and absorb:
        return _absorbed_values(weights, memory, values)
    projected = memory if values is None else F.linear(memory, values.weight, values.bias)
    return torch.einsum("bhqn,bnhd->bqhd", weights.to(projected.dtype), _heads(projected, n_heads)).flatten(2)


def attention_weights(query: Tensor, memory: Tensor, position: Tensor, *, keys: Projection, n_heads: int) -> Tensor:
    """The weights of `attend`, averaged over heads: array of shape (B, Q, N)."""
    return _scores(query, memory, position, keys, n_heads).softmax(dim=-1).mean(dim=1)


def _absorbed_on_cpu(
    query: Tensor, memory: Tensor, position: Tensor, keys: Projection, values: Projection | None, n_heads: int,
    dropout: float,
) -> Tensor:  # fmt: skip
    weight, bias = (None, None) if values is None else (values.weight, values.bias)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else memory.dtype
    moved = _move(query, keys, n_heads).flatten(1, 2)
    with torch.autocast("cpu", enabled=False):
        out: Tensor = AbsorbedAttention.apply(
            moved, memory, position.to(memory.dtype),
            None if weight is None else weight.view(n_heads, -1, weight.shape[1]),
            None if bias is None else bias.view(n_heads, -1), n_heads, dropout, dtype,
        )  # fmt: skip
    return out


def _move(query: Tensor, keys: Projection, n_heads: int) -> Tensor:
    """The key projection moved to the queries, scaled: (B or 1, h, Q, D)."""
    scaled = query * (query.shape[2] // n_heads) ** -0.5
    weight = keys.weight.view(n_heads, -1, keys.weight.shape[1]).to(query.dtype)
    return torch.einsum("bqhd,hde->bhqe", _heads(scaled, n_heads), weight)


def _scores(query: Tensor, memory: Tensor, position: Tensor, keys: Projection, n_heads: int) -> Tensor:
    """(B, h, Q, N), float32 at least."""
    seen = memory + position.to(memory.dtype)
    if absorb_is_cheaper(query.shape[1], n_heads, query.shape[2]):
        moved = _move(query, keys, n_heads)
        scores = torch.matmul(moved.flatten(1, 2), seen.to(moved.dtype).transpose(1, 2))
        return _wide(scores.view(len(seen), n_heads, -1, seen.shape[1]))
    key = F.linear(seen, keys.weight, keys.bias)
    split = _heads((query * (query.shape[2] // n_heads) ** -0.5).to(key.dtype).expand(len(memory), -1, -1), n_heads)
    return _wide(torch.einsum("bqhd,bnhd->bhqn", split, _heads(key, n_heads)))


def _absorbed_values(weights: Tensor, memory: Tensor, values: Projection) -> Tensor:
    n_heads, n_queries = weights.shape[1:3]
    summed = torch.matmul(weights.flatten(1, 2).to(memory.dtype), memory).view(len(memory), n_heads, n_queries, -1)
    weight = values.weight.view(n_heads, -1, values.weight.shape[1])
    out = torch.einsum("bhqe,hde->bqhd", summed, weight.to(summed.dtype))
    total = weights.sum(dim=-1).transpose(1, 2)[..., None]  # 1 but for dropout
    return (out + (total * values.bias.view(n_heads, -1)).to(out.dtype)).flatten(2)


def _heads(x: Tensor, n_heads: int) -> Tensor:
    return x.reshape(*x.shape[:-1], n_heads, -1)


def _wide(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
