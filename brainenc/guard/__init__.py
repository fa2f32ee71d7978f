"""The memory guard: probe, policy, watcher, coordinator, emergency checkpoint.

    from brainenc.guard import MemoryGuard, take_reading

``MemoryGuard`` guards any PyTorch script without Ray; ``take_reading()`` says what is used and what may be. The public
names are imported on first use: the watcher process imports this package, and has 30 MB to live in.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["MemoryGuard", "Order", "StepGuard", "Thresholds", "take_reading"]

if TYPE_CHECKING:
    from brainenc.guard.memory_guard import MemoryGuard
    from brainenc.guard.messages import Order, StepGuard
    from brainenc.guard.policy import Thresholds
    from brainenc.guard.probe import take_reading

_HOMES = {
    "MemoryGuard": "brainenc.guard.memory_guard",
    "Order": "brainenc.guard.messages",
    "StepGuard": "brainenc.guard.messages",
    "Thresholds": "brainenc.guard.policy",
    "take_reading": "brainenc.guard.probe",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'brainenc.guard' has no attribute {name!r}")
