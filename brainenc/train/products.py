"""Matrix products on the CPU at its full speed.

PyTorch sends float32 products to MKL, which on some processors runs at half of what oneDNN reaches (AMD Zen 5: 190
against 450 GFLOP/s on two cores); bfloat16 goes to oneDNN anyway. Convolutions and ``torch.compile`` use the same
operator that is called here. Elsewhere (GPUs, other types, builds without oneDNN) these are the ordinary products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _find_onednn() -> Any:
    namespace = torch.ops.mkldnn
    return getattr(namespace, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]


_ONEDNN = _find_onednn()


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` for a of shape (m, k) and b of shape (n, k). Records no gradient."""
    fast = _ONEDNN is not None and a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    if fast and not torch.compiler.is_compiling():  # the compiler chooses products itself
        product: Tensor = _ONEDNN(a, b, None, "none", [], "")
        return product
    return torch.mm(a, b.t())


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear``, obeying autocast: x (..., k), weight (n, k), bias (n,) -> (..., n)."""
    fast = _ONEDNN is not None and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not fast or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat, weight)
        return times_transposed(flat, weight).add_(bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        flat, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        d_x = times_transposed(grad, weight.t()).view(*grads[0].shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return d_x, times_transposed(grad.t(), flat.t()), grad.sum(dim=0)
