"""Watching a forward pass: outputs of modules, and the q, k, v that enter a block's attention kernel.

q, k and v are taken where ``softmax(q k^T / sqrt(d)) v`` is about to be computed, so that they are what the block
really attends with, whatever made them: fused or separate projections, query/key norms, rotary positions. Nothing is
computed twice, and the kernel stays the fast one. Hooks and the watch on the kernel live for one forward pass.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Output = Callable[[torch.Tensor], None]
Attention = Callable[["Heads"], None]


@dataclass(frozen=True, slots=True)
class Heads:
    """What entered the attention kernel: q, k, v (B, heads, tokens, d), with q scaled to suit a scale of 1/sqrt(d)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Enough(Exception):
    """Ends a forward pass when everything asked for has been seen. Never leaves this package."""


@dataclass(kw_only=True, slots=True)
class Watch:
    """What to listen to in one forward pass."""

    outputs: Mapping[str, Output] = field(default_factory=dict)
    """Dotted module name -> called with its output at every call."""
    attention: Mapping[str, Attention] = field(default_factory=dict)
    """Dotted name of a block -> called with what enters each attention kernel inside it."""


@contextlib.contextmanager
def watching(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Listen to ``model`` while the block runs; afterwards the model is as it was, whatever happened."""
    modules = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        for name, told in watch.outputs.items():
            stack.callback(modules[name].register_forward_hook(_output_hook(told)).remove)
        if watch.attention:
            inside = stack.enter_context(_watching_kernel(watch.attention))
            for name in watch.attention:
                stack.callback(modules[name].register_forward_pre_hook(_entering(inside, name)).remove)
                stack.callback(modules[name].register_forward_hook(_leaving(inside), always_call=True).remove)
        stack.enter_context(_one_path_for_all())
        yield


def tensor_of(output: Any) -> torch.Tensor | None:
    """The tensor that a module's output is about: itself, the first of a tuple, the last hidden state; else None."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple | list) and output:
        return tensor_of(output[0])
    last = getattr(output, "last_hidden_state", None)
    return last if isinstance(last, torch.Tensor) else None


@dataclass(slots=True)
class _Inside:
    block: str | None = None


def _output_hook(told: Output) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = tensor_of(output)
        if tensor is not None:
            told(tensor)

    return hook


def _entering(inside: _Inside, name: str) -> Callable[[nn.Module, Any], None]:
    def hook(_module: nn.Module, _inputs: Any) -> None:
        inside.block = name

    return hook


def _leaving(inside: _Inside) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        inside.block = None

    return hook


# The kernel is reached through torch.nn.functional by transformers, timm, open_clip and nn.MultiheadAttention alike. A
# TorchFunctionMode would be the tidier way, but it does not see inside F.multi_head_attention_forward. The replacement
# is in place only while somebody watches, and acts only in the threads that do.
_kernel: Callable[..., torch.Tensor] = F.scaled_dot_product_attention
_watchers = threading.local()
_installed = 0
_lock = threading.Lock()


@contextlib.contextmanager
def _watching_kernel(told: Mapping[str, Attention]) -> Iterator[_Inside]:
    global _installed
    inside = _Inside()

    def see(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> None:
        if inside.block is not None:
            told[inside.block](Heads(_unit_scale(query, scale), key, value))

    before = getattr(_watchers, "see", None)
    _watchers.see = see
    with _lock:
        _installed += 1
        F.scaled_dot_product_attention = _watched_kernel
    try:
        yield inside
    finally:
        _watchers.see = before
        with _lock:
            _installed -= 1
            if _installed == 0:
                F.scaled_dot_product_attention = _kernel


def _watched_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    see = getattr(_watchers, "see", None)
    if see is not None:
        see(query, key, value, kwargs.get("scale"))
    output: torch.Tensor = _kernel(query, key, value, *args, **kwargs)
    return output


def _unit_scale(query: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Fold another scale than 1/sqrt(d) into q, so that the formula holds as it is written."""
    usual: float = query.shape[-1] ** -0.5
    if scale is None or abs(scale - usual) <= 1e-6 * usual:
        return query
    return query * (scale / usual)


@contextlib.contextmanager
def _one_path_for_all() -> Iterator[None]:
    """nn.MultiheadAttention without its inference fast path, which hides q, k, v: one path whatever is asked for."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
