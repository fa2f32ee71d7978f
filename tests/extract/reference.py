"""A slow, plain reference for facets: weights by name and formulas written out, nothing of brainenc's own capture."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

_ATTENTION = ("attention", "self_attn", "attn")
_PROJECTION = ("o_proj", "out_proj", "output.dense", "proj")
_BIAS = ("relative_position_bias", "attention.attention.relative_position_bias", "attn.rel_pos_bias")


@dataclass
class Seen:
    """What went into a module, and what came out, in a forward pass of the library alone."""

    given: Any
    gave: Any


def first_of(module, names):
    """The first of these sub-modules that there is, with its name."""
    there = dict(module.named_modules())
    return next(((name, there[name]) for name in names if name in there), (None, None))


def record(model, names, batch_run):
    """Inputs and outputs of modules while ``batch_run`` runs."""
    seen, handles = {}, []

    def hook(name):
        def remember(_module, args, kwargs, output):
            given = args[0] if args else kwargs.get("hidden_states", kwargs.get("query"))
            seen[name] = Seen(given, output[0] if isinstance(output, tuple) else output)

        return remember

    for name in names:
        handles.append(model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True))
    try:
        with torch.no_grad():
            batch_run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def attention_of(model, block):
    """Name of a block's attention module, its output projection, and the name of its position bias, if any."""
    attention, _ = first_of(model.get_submodule(block), _ATTENTION)
    bias, _ = first_of(model.get_submodule(block), _BIAS)
    name = f"{block}.{attention}"
    _, projection = first_of(model.get_submodule(name), _PROJECTION)
    return name, projection, f"{block}.{bias}" if bias else None


def attend(q, k, v, n_heads, bias=None):
    """softmax(q k^T / sqrt(d)) v from rows (B, T, heads*d), heads concatenated again."""
    q, k, v = (heads_of(x, n_heads) for x in (q, k, v))
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def heads_of(x, n_heads):
    """(B, T, heads*d) -> (B, heads, T, d)."""
    return x.unflatten(2, (n_heads, -1)).transpose(1, 2)


def project(attention, x):
    """q, k, v (B, T, D) that the attention module's own input weights make of ``x``: fused, packed or separate."""
    if hasattr(attention, "qkv"):
        return attention.qkv(x).chunk(3, dim=-1)
    if getattr(attention, "in_proj_weight", None) is not None:
        return F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    there = dict(attention.named_modules())
    names = [first_of(attention, (f"{x}_proj", f"attention.{long}")) for x, long in
             (("q", "query"), ("k", "key"), ("v", "value"))]  # fmt: skip
    assert all(name in there for name, _ in names)
    return tuple(linear(x) for _, linear in names)
