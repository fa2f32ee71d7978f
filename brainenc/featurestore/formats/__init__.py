"""Shard formats by name."""

from __future__ import annotations

from brainenc.errors import UnknownName
from brainenc.featurestore.formats.arrow import ArrowFormat
from brainenc.featurestore.formats.base import ShardFormat, ShardSpec
from brainenc.featurestore.formats.npy import NpyFormat

__all__ = ["FORMATS", "ShardFormat", "ShardSpec", "shard_format"]

FORMATS: dict[str, ShardFormat] = {"arrow": ArrowFormat(), "npy": NpyFormat()}


def shard_format(name: str) -> ShardFormat:
    """The format of this name.

    Raises:
        UnknownName: there is no such format.
    """
    if name not in FORMATS:
        raise UnknownName("shard format", name, tuple(FORMATS))
    return FORMATS[name]
