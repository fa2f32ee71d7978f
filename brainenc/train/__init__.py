"""Brain encoders trained from the feature store."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brainenc.train.config import TrainConfig
    from brainenc.train.launch import TrainResult, resume, train
    from brainenc.train.model import BrainEncoder, EncoderConfig, build_encoder
    from brainenc.train.published import load_published

_HOMES = {
    "TrainConfig": "brainenc.train.config",
    "TrainResult": "brainenc.train.launch",
    "resume": "brainenc.train.launch",
    "train": "brainenc.train.launch",
    "BrainEncoder": "brainenc.train.model",
    "EncoderConfig": "brainenc.train.model",
    "build_encoder": "brainenc.train.model",
    "load_published": "brainenc.train.published",
}
"""Public name -> its module, imported when first asked for: torch takes seconds, ``--help`` must not."""

__all__ = [
    "BrainEncoder", "EncoderConfig", "TrainConfig", "TrainResult", "build_encoder", "load_published", "resume", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
