"""From what a layer gave out to the rows of a feature: views wherever a view will do.

A layer gives tokens (B, T, D), a map (B, C, H, W) or (B, H, W, C), or a vector (B, D); attention gives q, k, v as
(B, heads, T, d). Rows are tokens (T, D) in the model's own order (class token, registers, patches), heads concatenated,
or map positions (H*W, C) row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from brainenc.extract.capture import Heads

MEANING = 1
"""Version of what the facets mean. Raise it when a facet begins to hold other numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """Where things stand among the tokens of a transformer."""

    n_cls: int
    n_registers: int
    n_prefix: int
    """Everything before the patches: class token, registers, and whatever else the model puts there."""


def take(facet: str, output: torch.Tensor, order: Order, aspect: float = 1.0) -> torch.Tensor:
    """One facet of a layer's output.

    Args:
        facet: ``token`` (B, T, D) or (B, D) for a vector; ``cls`` (B, D); ``registers`` (B, R, D); ``pool`` (B, D), the
            mean over the patches or map positions.
        output: what the layer gave out.
        order: how the tokens stand.
        aspect: height / width of the model's input; tells (B, C, H, W) from (B, H, W, C).
    """
    rows = as_rows(output, aspect)
    if facet == "token":
        return rows
    if facet == "cls":
        return rows[:, 0]
    if facet == "registers":
        return rows[:, order.n_cls : order.n_cls + order.n_registers]
    if facet == "pool":
        first = order.n_prefix if output.ndim == 3 else 0
        return rows[:, first:].mean(dim=1)
    raise ValueError(f"no facet {facet!r} in a layer's output")


def as_rows(output: torch.Tensor, aspect: float = 1.0) -> torch.Tensor:
    """Tokens and vectors as they are; maps as (B, H*W, C)."""
    if output.ndim != 4:
        return output
    if channels_last(output.shape, aspect):
        return output.flatten(1, 2)
    return output.flatten(2).transpose(1, 2)


def channels_last(shape: tuple[int, ...], aspect: float) -> bool:
    """Whether a map's shape reads (B, H, W, C): the pair of edges with the input's aspect ratio tells.

    Ties (1 x 1 maps, as many channels as positions) read as (B, C, H, W), which is what most networks have.
    """
    _, a, b, c = shape
    return abs(a / b - aspect) < abs(b / c - aspect)


def map_grid(shape: tuple[int, ...], aspect: float) -> tuple[int, int]:
    """Height and width of a map of this shape."""
    return (shape[1], shape[2]) if channels_last(shape, aspect) else (shape[2], shape[3])


def take_attention(facet: str, heads: Heads) -> torch.Tensor:
    """``q``, ``k``, ``v`` (B, T, heads*d), or ``q_cls`` ... (B, heads*d): the class token's row alone."""
    joined = join_heads(getattr(heads, facet[0]))
    return joined[:, 0] if facet.endswith("_cls") else joined


def join_heads(heads: torch.Tensor) -> torch.Tensor:
    """(B, heads, T, d) -> (B, T, heads*d); a view where the projection laid them out that way."""
    return heads.transpose(1, 2).flatten(2)


def keep(
    rows: torch.Tensor, dtype: torch.dtype | None, *, own: bool = False, into: torch.Tensor | None = None
) -> torch.Tensor:
    """What stays of a view after its layer: itself, or a compact copy.

    Copied when another dtype is wanted, when later modules may write into it (``own``), and when the view would
    keep alive more than twice its size (q of a fused projection, one token of many).

    Args:
        rows: the view.
        dtype: of the result; None leaves it.
        own: a copy of its own in any case.
        into: where to copy it, whatever the rest says; of the same shape.

    Raises:
        ValueError: ``into`` has another shape.
    """
    if into is not None:
        if into.shape != rows.shape:  # copying would repeat what is too small without a word
            raise ValueError(f"rows of {tuple(rows.shape)} do not go into a buffer of {tuple(into.shape)}")
        return into.copy_(rows)
    kept_alive = rows.untyped_storage().nbytes()
    if dtype is None and not own and kept_alive <= 2 * rows.numel() * rows.element_size():
        return rows
    return torch.empty(rows.shape, dtype=dtype or rows.dtype, device=rows.device).copy_(rows)
