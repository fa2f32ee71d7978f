"""A caller's buffer as a NumPy array: NumPy's own, or a CPU tensor of torch, pinned or not, without importing torch."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from brainenc.errors import UsageError


def as_buffer(out: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """``out`` as a writable, C-contiguous array over the same memory.

    Args:
        out: NumPy array, torch CPU tensor, or anything with the buffer protocol.
        shape: that it must have.
        dtype: that it must have.

    Raises:
        UsageError: another shape or dtype, not contiguous, read-only, or on a GPU.
    """
    array = _torch_memory(out) if type(out).__module__.partition(".")[0] == "torch" else np.asarray(out)
    problem = ""
    if array.shape != shape or array.dtype != dtype:
        problem = f"shape {shape} and dtype {dtype} are wanted, {array.shape} and {array.dtype} came"
    elif not array.flags.c_contiguous or not array.flags.writeable:
        problem = "it must be C-contiguous and writable"
    if problem:
        raise UsageError(f"the buffer given as `out` does not fit: {problem}.")
    return array


def _torch_memory(tensor: Any) -> np.ndarray:
    torch = sys.modules["torch"]
    if tensor.device.type != "cpu":
        raise UsageError("the buffer given as `out` is on a GPU: gather into pinned memory and copy from there.")
    if tensor.dtype == torch.bfloat16:  # NumPy has no word for it; the bits are the same
        return np.asarray(tensor.detach().view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
    return np.asarray(tensor.detach().numpy())
