"""Copying collections between stores, wherever they lie, shard file by shard file.

A copy has the same bytes: shards and receipts are equal, only its commits are its own. Everything that arrives is
checked before it gets its name, and what is there already is passed over, so that the same command goes on where an
interrupted one stopped, and two at once share the work.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from brainenc.errors import CorruptData, KeyNotFound, ProvenanceMismatch
from brainenc.featurestore.collection import Collection
from brainenc.featurestore.download import download
from brainenc.featurestore.schema import ShardEntry
from brainenc.featurestore.space import full_disk_explained
from brainenc.featurestore.store import FeatureStore

Progress = Callable[[int, int, int], None]
"""Called with shards done, shards in all, bytes copied by this call."""

_AT_ONCE = 4
_TRIES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Copied:
    """What a copy did."""

    keys: tuple[str, ...]
    shards: int
    """Copied by this call."""
    shards_there: int
    """In the target already."""
    bytes: int
    """Copied by this call."""
    seconds: float


def select_keys(store: FeatureStore, patterns: Sequence[str]) -> list[str]:
    """Collections by key or by pattern (``subj01-*/*/11.?``); all, if no pattern is given.

    Raises:
        KeyNotFound: a pattern fits none.
    """
    keys = store.keys()
    for pattern in patterns:
        if not any(fnmatchcase(key, pattern) for key in keys):
            raise KeyNotFound(pattern, store.url, keys)
    return [key for key in keys if not patterns or any(fnmatchcase(key, pattern) for pattern in patterns)]


def copy(
    source: FeatureStore, target: FeatureStore, keys: Sequence[str], *, progress: Progress | None = None
) -> Copied:
    """Copy the committed shards of collections, and the stimulus sets that they need.

    Args:
        source: store to read.
        target: store to write; what it has already is kept.
        keys: collections, see :func:`select_keys`.
        progress: told after each shard.

    Raises:
        ProvenanceMismatch: the target has a collection of this key that was made or cut in another way.
        StimuliChanged: the target has other images under this stimulus set's name.
        CorruptData: a shard of the source is not whole; what was copied before stays.
    """
    started = time.monotonic()
    work = _Work(progress)
    for key in keys:
        work.add(*prepare(source, target, key))
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="brainenc-copy") as pool:
        try:
            list(pool.map(work.copy, work.todo))
        finally:
            pool.shutdown(cancel_futures=True)
            for collection in work.targets:
                collection.commit()
    return Copied(
        keys=tuple(keys), shards=work.done, shards_there=work.there, bytes=work.bytes,
        seconds=time.monotonic() - started,
    )  # fmt: skip


class _Work:
    """Shards to copy, and how far it is."""

    def __init__(self, progress: Progress | None) -> None:
        self.todo: list[tuple[Collection, Collection, ShardEntry]] = []
        self.targets: list[Collection] = []
        self.there = self.done = self.bytes = 0
        self._progress, self._lock = progress, threading.Lock()

    def add(self, source: Collection, target: Collection) -> None:
        sealed = target.sealed()
        entries = source.manifest().shards
        self.todo += [(source, target, entry) for entry in entries if entry.shard not in sealed]
        self.there += sum(entry.shard in sealed for entry in entries)
        self.targets.append(target)

    def copy(self, item: tuple[Collection, Collection, ShardEntry]) -> None:
        _copy_shard(*item)
        with self._lock:
            self.done, self.bytes = self.done + 1, self.bytes + item[2].bytes
            if self._progress is not None:
                self._progress(self.there + self.done, self.there + len(self.todo), self.bytes)


def prepare(source: FeatureStore, target: FeatureStore, key: str) -> tuple[Collection, Collection]:
    """Make stimulus set and first manifest of a copy; the collection in both stores.

    Raises:
        ProvenanceMismatch, StimuliChanged: the target has another one of this name.
    """
    original = source.collection(key)
    target.add_stimuli(source.stimuli(original.spec.stimuli))
    copied = Collection.create(target.place, key, original.spec, target.cache)
    if copied.spec.checksum != original.spec.checksum:  # the same features, but the files do not fit together
        sides = {
            name: (getattr(copied.spec, name), getattr(original.spec, name))
            for name in ("rows_per_shard", "format", "allow_64bit")
            if getattr(copied.spec, name) != getattr(original.spec, name)
        }
        raise ProvenanceMismatch(f"{key} in {target.url}", sides, "Copy into another store, or remove this one.")
    return original, copied


def _copy_shard(source: Collection, target: Collection, entry: ShardEntry) -> None:
    partial = target.place.partial(target.shard_name(entry.shard))
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # says that this partial's writer lives
        with full_disk_explained(partial, entry.bytes):
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, entry.bytes)
            _fetch_checked(source, target, entry, partial, fd)
            os.fsync(fd)
        target.take_over(entry.shard, partial)
    finally:
        partial.unlink(missing_ok=True)
        os.close(fd)


def _fetch_checked(source: Collection, target: Collection, entry: ShardEntry, partial: Path, fd: int) -> None:
    name, problem = source.shard_name(entry.shard), "its bytes are whole, but are not those that the manifest names"
    for _ in range(_TRIES):
        download(source.place, name, fd, entry.bytes)
        try:
            if target.check_copy(entry.shard, partial).checksum == entry.checksum:
                return
        except CorruptData as error:
            problem = str(error)
    raise CorruptData(
        f"{source.place.url}/{name} cannot be copied: {problem}, in {_TRIES} tries. Run `brainenc store verify` and "
        "`brainenc store repair` there."
    )
