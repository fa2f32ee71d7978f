"""How many bytes of tensors are alive at most while something runs, counted and not sampled.

Works on the ``meta`` device too, where tensors have shapes and no memory: what would not fit here can be counted.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts storages that operators return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self._count(x)
        return out

    def forget(self, *tensors: torch.Tensor) -> None:
        """These were there before, and are not counted."""
        for x in tensors:
            self._seen.add(x.untyped_storage())

    def _count(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size
