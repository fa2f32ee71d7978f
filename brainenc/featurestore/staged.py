"""Shards handed over to a place without a real flush: a later session reads them back before they are trusted."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from brainenc.errors import CorruptData
from brainenc.featurestore.places.base import Doubting

if TYPE_CHECKING:
    from brainenc.featurestore.collection import Collection

log = logging.getLogger(__name__)


def look_back(collection: Collection, receipts: Iterable[int], place: Doubting) -> frozenset[int]:
    """Read back the shards that are in doubt; confirm them or drop them.

    Returns:
        What was dropped.
    """
    doubtful = [shard for shard in sorted(receipts) if place.doubtful(collection.shard_name(shard))]
    lost = frozenset(shard for shard in doubtful if not _is_whole(collection, shard))
    if lost:
        log.warning("%d shards of %s did not arrive whole and will be made again", len(lost), collection.key)
        collection.drop(lost)
    place.confirm(collection.shard_name(shard) for shard in doubtful if shard not in lost)
    return lost


def _is_whole(collection: Collection, shard: int) -> bool:
    try:
        return collection.receipt(shard) == collection.inspect(shard)
    except (CorruptData, FileNotFoundError) as error:
        log.warning("%s", error)
        return False
