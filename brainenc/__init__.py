"""brainenc: a Ray-distributed, out-of-core feature store for brain-encoding research.

The public names are imported on first use, so that ``import brainenc`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["BrainencError", "__version__", "open_store"]

if TYPE_CHECKING:
    from brainenc.errors import BrainencError
    from brainenc.featurestore.store import open_store

_HOMES = {"BrainencError": "brainenc.errors", "open_store": "brainenc.featurestore.store"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'brainenc' has no attribute {name!r}")
