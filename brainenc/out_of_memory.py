"""Which errors mean that memory has ended: Python, torch, its libraries and the system each have words of their own."""

from __future__ import annotations

import errno
import sys

_WORDS = (
    "can't allocate memory",  # torch's allocator on a CPU raises a plain RuntimeError
    "annot allocate memory",  # the system's, passed on
    "not enough memory",
    "out of memory",  # CUDA's driver, outside torch's allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its handle found no room
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether less at a time may help: the host, a device, or the guard has refused memory. Loads no torch."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):  # of a fork or a map
        return error.errno == errno.ENOMEM
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
