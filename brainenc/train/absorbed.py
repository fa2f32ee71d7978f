"""Attention that never projects its tokens, on the CPU: image by image, so that scores stay in the cache.

The same function as the formulas in ``brainenc.train.cross_attention`` (tests compare them); what differs is that the
(queries x tokens) arrays of a batch are never walked through main memory by one elementwise operation after another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from brainenc.train.dropout import Keep
from brainenc.train.products import times_transposed


class AbsorbedAttention(torch.autograd.Function):
    """``moved`` (1 or B, h * Q, D), heads outermost, attends to ``memory`` (B, N, D) -> (B, Q, h * d).

    Args of ``apply``: moved (queries with the key projection moved to them, scaled), memory, position (N, D), value
    weight (h, d, D) and bias (h, d) or two Nones (heads then split the memory), n_heads, dropout, dtype of products.
    """

    @staticmethod
    def forward(
        ctx: Any, moved: Tensor, memory: Tensor, position: Tensor, weight: Tensor | None, bias: Tensor | None,
        n_heads: int, dropout: float, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        n_batch, n_tokens, hidden = memory.shape
        rows, n_queries = moved.shape[1], moved.shape[1] // n_heads
        ctx.n_heads, ctx.dtype, wide = n_heads, dtype, torch.promote_types(dtype, torch.float32)
        ctx.keep = Keep.draw(n_batch, rows * n_tokens, dropout) if dropout else None
        cast = moved.to(dtype)
        attended = memory.new_empty(n_batch, rows, n_tokens, dtype=dtype)
        summed = memory.new_empty(n_batch, rows, hidden, dtype=dtype) if weight is not None else None
        totals = memory.new_ones(n_batch, n_heads, n_queries, 1, dtype=wide)
        out = memory.new_empty(n_batch, n_queries, n_heads, hidden // n_heads, dtype=dtype)
        projection = None if weight is None else weight.to(dtype).transpose(1, 2).contiguous()
        for b in range(n_batch):
            values = memory[b].to(dtype)
            scores = times_transposed(cast[b if len(cast) > 1 else 0], (memory[b] + position).to(dtype))
            weights = attended[b]
            if dtype == wide:
                torch.softmax(scores, dim=-1, out=weights)
            else:  # the sum over tokens needs more digits than the weights
                weights.copy_(torch.softmax(scores, dim=-1, dtype=wide))
            if ctx.keep is not None:
                weights = ctx.keep.kept_of(b, weights)
                totals[b] = weights.view(n_heads, n_queries, -1).sum(dim=-1, keepdim=True, dtype=wide)
            if projection is None or summed is None or bias is None:
                found = torch.bmm(weights.view(n_heads, n_queries, -1), _split(values, n_heads))
            else:
                summed[b] = times_transposed(weights, values.t())
                found = torch.bmm(summed[b].view(n_heads, n_queries, -1), projection)
                found += totals[b] * bias[:, None]
            out[b] = found.transpose(0, 1)
        ctx.save_for_backward(moved, memory, position, weight, bias, attended, summed, totals)
        if ctx.keep is not None:  # the scale of what is kept commutes with everything behind the weights
            out *= ctx.keep.scale
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        moved, memory, position, weight, bias, attended, summed, totals = ctx.saved_tensors
        n_heads, dtype, wide = ctx.n_heads, ctx.dtype, torch.promote_types(ctx.dtype, torch.float32)
        given = grads[0] if ctx.keep is None else grads[0] * ctx.keep.scale
        grad = given.to(dtype).view(*given.shape[:2], n_heads, -1).transpose(1, 2)  # (B, h, Q, d)
        cast, narrow = moved.to(dtype), None if weight is None else weight.to(dtype)
        d_moved = torch.zeros_like(moved)
        d_weight = None if narrow is None else torch.zeros_like(narrow, dtype=wide)
        d_memory = torch.empty_like(memory) if ctx.needs_input_grad[1] else None
        for b in range(len(memory)):
            at, values, part = (b if len(cast) > 1 else 0), memory[b].to(dtype), grad[b]
            seen = (memory[b] + position).to(dtype)
            d_summed = None
            if narrow is None or d_weight is None:
                d_attended = torch.bmm(part, _split(values, n_heads).transpose(1, 2)).flatten(0, 1)
            else:
                d_summed = torch.bmm(part, narrow).flatten(0, 1)
                d_weight += torch.bmm(part.transpose(1, 2), summed[b].view(*part.shape[:2], -1))
                d_attended = times_transposed(d_summed, values)
                if ctx.keep is not None:  # without dropout the weights sum to 1 whatever they are
                    d_attended += torch.einsum("hqd,hd->hq", part.to(wide), bias).reshape(-1, 1)
            if ctx.keep is not None:
                d_attended.mul_(ctx.keep.kept[b].view_as(d_attended))
            d_scores: Tensor = torch._softmax_backward_data(d_attended, attended[b], -1, dtype)
            d_moved[at] += times_transposed(d_scores, seen.t())
            if d_memory is not None:
                d_memory[b] = times_transposed(d_scores.t(), cast[at].t())
                d_memory[b] += _to_values(ctx, b, attended[b], part, d_summed)
        d_bias = None if bias is None else torch.einsum("bhqd,bhqi->hd", grad.to(wide), totals)
        return d_moved, d_memory, None, d_weight, d_bias, None, None, None


def _split(values: Tensor, n_heads: int) -> Tensor:
    """(N, D) -> (h, N, d)."""
    return values.view(len(values), n_heads, -1).transpose(0, 1)


def _to_values(ctx: Any, b: int, weights: Tensor, part: Tensor, d_summed: Tensor | None) -> Tensor:
    """Gradient of the memory as values: (N, D)."""
    if ctx.keep is not None:
        weights = ctx.keep.kept_of(b, weights)
    if d_summed is not None:
        return times_transposed(weights.t(), d_summed.t())
    split = torch.bmm(weights.view(*part.shape[:2], -1).transpose(1, 2), part)  # (h, N, d)
    return split.transpose(0, 1).flatten(1)
