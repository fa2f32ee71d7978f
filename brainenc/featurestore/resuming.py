"""What receipts are worth when a run goes on: each is read, and the file beside it measured; no rows are read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from brainenc.featurestore.schema import ShardEntry

if TYPE_CHECKING:
    from brainenc.featurestore.collection import Collection

log = logging.getLogger(__name__)
_REMOTE_READERS = 16


def drop_unfit(collection: Collection, receipts: Iterable[int], sizes: Mapping[int, int] | None) -> frozenset[int]:
    """Drop shards whose receipts are worth nothing, so that they are computed again.

    A receipt that is torn, or of another shard, is first made again from its shard, where that is whole.

    Args:
        collection: whose shards they are.
        receipts: shards that have a receipt.
        sizes: shard -> bytes of its file as listed; None where listings are stale, and files are not looked at.

    Returns:
        What was dropped.
    """
    committed = {entry.shard: entry for entry in collection.manifest().shards}
    every = sorted(receipts)
    if collection.place.can.mappable:
        unfit = [shard for shard in every if not _is_fit(collection, shard, committed.get(shard), sizes)]
    else:
        with ThreadPoolExecutor(_REMOTE_READERS, thread_name_prefix="brainenc-receipts") as pool:
            fit = pool.map(lambda shard: _is_fit(collection, shard, committed.get(shard), sizes), every)
            unfit = [shard for shard, is_fit in zip(every, fit, strict=True) if not is_fit]
    if unfit:
        log.warning("%d shards of %s are not what their receipts say and will be made again: %s",
                    len(unfit), collection.key, ", ".join(map(str, unfit[:10])))  # fmt: skip
        collection.drop(unfit)
    return frozenset(unfit)


def _is_fit(collection: Collection, shard: int, entry: ShardEntry | None, sizes: Mapping[int, int] | None) -> bool:
    wanted = None if entry is None else entry.bytes
    if entry is None or collection.place.can.mappable or collection.place.can.readable:
        receipt = collection.receipt_mended(shard)
        if receipt is None:
            return False
        wanted = receipt.bytes
    if sizes is None or sizes.get(shard) == wanted:
        return True
    return collection.place.size(collection.shard_name(shard)) == wanted  # it may have come since the listing
