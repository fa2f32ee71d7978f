"""Are the images still those that the store's rows were made of? By stats first, by content where stats differ."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from brainenc.errors import StimuliChanged
from brainenc.featurestore.collection import Collection
from brainenc.featurestore.stimuli import StimulusSet

_THREADS = 8  # reading and hashing wait for disks and networks, not for the processor


def suspects(stored: StimulusSet, found: StimulusSet) -> list[int]:
    """Rows whose file has another size or stamp than when the set was made. Where it lies does not matter.

    Raises:
        StimuliChanged: other ids, or another order of rows.
    """
    if stored.ids != found.ids:
        ids = [StimulusSet.from_ids(s.name, s.ids) for s in (stored, found)]
        raise StimuliChanged(
            f"The images of {stored.name!r} are not those in the store: of {len(stored)} there, {len(found)} here: "
            f"{ids[0].difference(ids[1])}. A stimulus set never changes, because rows are numbered by it: put the "
            "images back, or give the new set a name of its own with --stimuli NAME."
        )
    return stored.touched(found)


def changed_rows(
    rows: Sequence[int],
    stored: StimulusSet,
    found: StimulusSet,
    known_hash: Callable[[int], str | None],
    hash_now: Callable[[str], str],
) -> list[int]:
    """Those of ``rows`` whose image is another one than before.

    A row that no feature was computed of has no hash: there its size decides, for nothing was made of the old bytes.

    Args:
        rows: what to look at.
        stored: the set as it stands in the store.
        found: the set as it was listed now.
        known_hash: row -> content hash kept in a receipt, None where there is none.
        hash_now: URI -> content hash of what lies there now.
    """  # fmt: skip

    def changed(row: int) -> bool:
        before = known_hash(row)
        if before is None:
            known = stored[row].size  # of a set that came with imported features only the ids are known
            return known is not None and known != found[row].size
        return bool(before != hash_now(found[row].uri))

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="hash") as pool:
        return [row for row, is_changed in zip(rows, pool.map(changed, rows), strict=True) if is_changed]


def refuse_changed(rows: Iterable[int], stored: StimulusSet, found: StimulusSet) -> None:
    """Refuse a set in which images were replaced.

    Raises:
        StimuliChanged: naming the first of them.
    """
    rows = list(rows)
    if not rows:
        return
    shown = ", ".join(f"{stored[row].id} ({found[row].uri})" for row in rows[:5])
    raise StimuliChanged(
        f"{len(rows)} image(s) of {stored.name!r} were replaced since features were made of them: {shown}"
        f"{' ...' if len(rows) > 5 else ''}. A stimulus set never changes: put the old files back, or give the new set "
        "a name of its own with --stimuli NAME."
    )


class KnownHashes:
    """Row -> content hash, from the receipts of whichever collection has the row sealed; each receipt is read once.

    Only those that are needed are read, and nothing is mended or removed, so that any worker may ask. Where receipts
    may be torn or absent beside whole shards, the driver calls :meth:`Collection.sealed` first.

    Raises (when called):
        CorruptData: a receipt is torn.
    """

    def __init__(self, collections: Sequence[Collection]) -> None:
        self._collections = tuple(collections)
        self._hashes = functools.lru_cache(maxsize=None)(self._read)

    def __call__(self, row: int) -> str | None:
        for n, collection in enumerate(self._collections):
            shard = row // collection.rows_per_shard
            hashes = self._hashes(n, shard)
            if hashes and hashes[row - shard * collection.rows_per_shard]:
                return hashes[row - shard * collection.rows_per_shard]
        return None

    def _read(self, n: int, shard: int) -> tuple[str, ...]:
        try:
            return tuple(self._collections[n].receipt(shard).content_hashes or ())
        except FileNotFoundError:  # not sealed
            return ()
