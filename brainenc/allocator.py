"""Memory that a step or a pass frees is kept for the next, on the CPU.

glibc gives large blocks back to the kernel as soon as they are freed, and the kernel clears every page before it hands
them out again: 250 MB a training step at real size, an eighth of its time. What is kept this way is at most what the
largest step needed; :func:`give_back` returns it when memory gets short. GPUs have PyTorch's own cache for that.

Only glibc's main arena keeps large blocks; a thread of another arena (of those that Ray calls us in, say) still gets
and returns them one by one. So the processes of a Ray that we start have one arena (``MALLOC_ARENA_MAX=1``), and on a
cluster that somebody else starts it is for them to set.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them, from malloc.h
_NEVER = 2**31 - 1
_KEPT_ANYWAY = 16 << 20
"""Half of the block size up to which glibc raises its own threshold."""
_LARGEST = 1 << 30
"""Blocks above this size are rare and live long (a loader's buffers, a copy of the state): they stay as they were."""


@lru_cache(maxsize=1)
def _glibc() -> Any:
    """The C library, where it is glibc; None elsewhere: other allocators have other ways."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:  # musl
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def pays_for(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether steps of such a model take blocks that glibc returns at once; below that it keeps them by itself."""
    return max((p.numel() * p.element_size() for p in parameters), default=0) > _KEPT_ANYWAY


def keep_freed_memory() -> bool:
    """From here on this process keeps what it frees; False where the allocator is not glibc's."""
    library = _glibc()
    return bool(
        library is not None and library.mallopt(_MMAP_THRESHOLD, _LARGEST) and library.mallopt(_TRIM_THRESHOLD, _NEVER)
    )


def give_back() -> None:
    """Return all memory that is kept and not in use to the system."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)
