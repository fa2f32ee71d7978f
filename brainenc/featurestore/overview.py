"""What there is to say about a collection, as plain values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from brainenc.errors import CorruptData
from brainenc.featurestore import commit
from brainenc.featurestore.collection import Collection
from brainenc.featurestore.documents import Json, canonical
from brainenc.featurestore.store import FeatureStore


def collection_summary(store: FeatureStore, key: str) -> dict[str, Any]:
    """Rows, shape, size, completeness and provenance of a collection.

    Raises:
        KeyNotFound: there is no such collection.
    """
    collection = store.collection(key)
    current = commit.latest(store.place, key)
    assert current is not None  # it was opened from it
    spec, shards = current.manifest.spec, current.manifest.shards
    missing = [row for entry in shards for row in entry.missing]
    return {
        "key": key, "store": store.url, "rows": spec.n_rows,
        "rows_present": sum(entry.rows for entry in shards) - len(missing), "rows_missing": len(missing),
        "row_shape": list(spec.row_shape), "dtype": spec.dtype, "format": spec.format,
        "shards": spec.n_shards, "shards_committed": len(shards), "shards_sealed": len(collection.found()[0]),
        "rows_per_shard": spec.rows_per_shard, "bytes": sum(entry.bytes for entry in shards),
        "commit": current.number, "transaction": current.manifest.transaction, "stimuli": spec.stimuli,
        "identity": spec.identity, "details": spec.details,
    }  # fmt: skip


def environments(collection: Collection, progress: Callable[[int, int], None] | None = None) -> list[Json]:
    """The different environments that the collection's shards were made in, each with how many shards.

    Args:
        collection: whose receipts are read, all of them.
        progress: told how many were read, and how many there are.
    """
    counts: dict[bytes, tuple[Json, int]] = {}
    sealed = sorted(collection.found()[0])
    for done, shard in enumerate(sealed, 1):
        if progress is not None:
            progress(done, len(sealed))
        try:
            environment = collection.receipt(shard).environment
        except (CorruptData, FileNotFoundError):
            continue  # `verify` is who complains
        known = counts.get(canonical(environment), (environment, 0))
        counts[canonical(environment)] = environment, known[1] + 1
    return [{**environment, "shards": n} for environment, n in counts.values()]
