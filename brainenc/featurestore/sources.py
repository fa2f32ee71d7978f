"""Where a view's bytes come from: shard files that can be opened, or verified ranges of remote ones.

Rows are copied with ``preadv``, not from maps: as fast from the page cache (see the decision record 0102), no page
tables, and a failing disk is an ``OSError`` instead of a SIGBUS. Maps serve slices, which copy nothing.
"""

from __future__ import annotations

import functools
import mmap
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import numpy as np

from brainenc.errors import CacheTooSmall, CorruptData
from brainenc.featurestore.checksums import digest
from brainenc.featurestore.collection import Collection
from brainenc.featurestore.dtypes import logical_dtype, storage_dtype
from brainenc.featurestore.gather import fetchers
from brainenc.featurestore.places.base import ShardCache
from brainenc.featurestore.schema import Manifest, ShardEntry

MAP_BUDGET = 1 << 30
"""Bytes mapped at once, after which the longest unused maps go: page tables and resident pages count."""
_OPEN_FILES = 128
_AHEAD_BYTES = 256 << 20
_FETCH_THREADS = 16
_CORRUPT_TRIES = 3
_RECEIPTS = 1024


class Source(Protocol):
    """Bytes of rows. Safe for threads, and for processes forked from one that used it."""

    def read(self, shard: int, row: int, out: memoryview) -> None:
        """Fill ``out`` with rows of a shard, from ``row`` on."""
        ...

    def map(self, shard: int) -> np.ndarray | None:
        """All rows of a shard without a copy; None where that cannot be."""
        ...

    def prefetch(self, shard: int, row: int, count: int) -> None:
        """Rows that will be wanted soon. A hint; returns at once."""
        ...

    def release(self) -> None:
        """Give back maps, files and what was fetched ahead."""
        ...


def open_source(collection: Collection, manifest: Manifest, cache: ShardCache | None, verify: bool) -> Source:
    """How a collection is best read: in place, by whole copies if the cache holds them all, else by verified ranges.

    Raises:
        CacheTooSmall: the cache could not hold one shard.
    """
    if verify:
        return RangedSource(collection, manifest)
    if collection.place.can.mappable or collection.place.can.readable:
        return LocalSource(collection, manifest, None)
    sizes = [entry.bytes for entry in manifest.shards]
    if cache is not None and sizes and cache.budget < max(sizes):
        raise CacheTooSmall(max(sizes), cache.budget, f"{collection.key} in {collection.place.url}")
    if cache is not None and sum(sizes) <= cache.budget:
        return LocalSource(collection, manifest, cache)
    return RangedSource(collection, manifest)


class _ForkAware:
    """State that a forked child must not share: a lock that another thread of the parent may have held."""

    def __init__(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()

    def _mine(self) -> threading.Lock:
        if self._pid != os.getpid():
            self._reset()
            self._pid, self._lock = os.getpid(), threading.Lock()
        return self._lock

    def _reset(self) -> None:
        raise AssertionError("subclasses say what they forget")


class _OpenFile:
    """A file that closes when the last who uses it lets go, so that eviction never pulls it from under a reader."""

    __slots__ = ("fd",)

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class LocalSource(_ForkAware):
    """Shards as local files: in place, or as whole copies in a cache."""

    def __init__(self, collection: Collection, manifest: Manifest, cache: ShardCache | None) -> None:
        super().__init__()
        self._collection, self._cache = collection, cache
        self._entries = {entry.shard: entry for entry in manifest.shards}
        self._row_bytes = manifest.spec.shard(0).row_bytes
        self._reset()

    def read(self, shard: int, row: int, out: memoryview) -> None:
        """Fill ``out`` from the shard's file."""
        file, position = self._file(shard), self._entries[shard].data_offset + row * self._row_bytes
        while len(out):
            n = os.preadv(file.fd, [out[:_LARGEST_READ]], position)
            if n == 0:
                raise self._too_short(shard)
            out, position = out[n:], position + n

    def map(self, shard: int) -> np.ndarray | None:
        """The shard's rows, mapped read-only, of shape (rows, *row_shape)."""
        if self._cache is None and not self._collection.place.can.mappable:
            return None
        with self._mine():
            if shard in self._maps:
                self._maps.move_to_end(shard)
                return self._maps[shard][1]
        file, entry = self._file(shard), self._entries[shard]
        if os.fstat(file.fd).st_size != entry.bytes:  # reading behind the end of a map kills the process
            raise self._too_short(shard)
        mapped = mmap.mmap(file.fd, entry.bytes, access=mmap.ACCESS_READ)
        rows = self._as_rows(mapped, entry)
        with self._mine():
            self._maps[shard] = (mapped, rows)
            self._mapped += entry.bytes
            while self._mapped > MAP_BUDGET and len(self._maps) > 1:
                self._drop(self._maps.popitem(last=False)[1][0])
        return rows

    def prefetch(self, shard: int, row: int, count: int) -> None:
        """Have the kernel read ahead; copies that a cache lacks are fetched."""
        if hasattr(os, "posix_fadvise"):
            fetchers.get(_FETCH_THREADS).submit(self._advise, shard, row, count)

    def release(self) -> None:
        """Drop maps and files. Arrays that the caller still has go on working."""
        with self._mine():
            for mapped, _ in self._maps.values():
                self._drop(mapped)
            self._reset()

    def _advise(self, shard: int, row: int, count: int) -> None:
        start = self._entries[shard].data_offset + row * self._row_bytes
        file = self._file(shard)
        os.posix_fadvise(file.fd, start, count * self._row_bytes, os.POSIX_FADV_WILLNEED)

    def _reset(self) -> None:
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._maps: OrderedDict[int, tuple[mmap.mmap, np.ndarray]] = OrderedDict()
        self._mapped = 0

    def _drop(self, mapped: mmap.mmap) -> None:
        self._mapped -= len(mapped)
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)  # also where the caller still holds a slice: it is read again if used

    def _as_rows(self, mapped: mmap.mmap, entry: ShardEntry) -> np.ndarray:
        spec = self._collection.spec
        shape = (entry.rows, *spec.row_shape)
        flat = np.frombuffer(mapped, storage_dtype(spec.dtype), int(np.prod(shape)), entry.data_offset)
        return flat.view(logical_dtype(spec.dtype)).reshape(shape)

    def _file(self, shard: int) -> _OpenFile:
        with self._mine():
            if shard in self._files:
                self._files.move_to_end(shard)
                return self._files[shard]
        file = self._open(shard)
        with self._mine():
            self._files[shard] = file
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def _open(self, shard: int) -> _OpenFile:
        name = self._collection.shard_name(shard)
        path = self._collection.place.local(name)
        for _ in range(_CORRUPT_TRIES):
            try:
                return _OpenFile(path or self._fetch(shard, name))
            except FileNotFoundError:
                if path is not None:
                    break  # else: evicted between fetch and open, fetch again
        raise CorruptData(
            f"{self._collection.place.url}/{name} is gone, though a manifest counts on it. Run "
            f"`brainenc store repair`, then extract again: only what is lost is computed."
        )

    def _fetch(self, shard: int, name: str) -> Path:
        assert self._cache is not None, "a place without maps and without a cache is read by ranges"
        entry = self._entries[shard]

        def check(path: Path) -> None:
            if self._collection.check_copy(shard, path).checksum != entry.checksum:
                raise CorruptData(f"the copy {path} of {name} is not the shard that the manifest names.")

        return self._cache.fetch(self._collection.place, name, size=entry.bytes, check=check)

    def _too_short(self, shard: int) -> CorruptData:
        name = f"{self._collection.place.url}/{self._collection.shard_name(shard)}"
        return CorruptData(
            f"{name} was cut: {self._entries[shard].bytes} bytes are wanted. Run `brainenc store repair`."
        )


_LARGEST_READ = 1 << 30  # Linux moves at most 2 GiB in one call


class RangedSource(_ForkAware):
    """Blocks of rows of any place, each checked against the shard's receipt; a bounded number is kept."""

    def __init__(self, collection: Collection, manifest: Manifest) -> None:
        super().__init__()
        self._collection = collection
        self._entries = {entry.shard: entry for entry in manifest.shards}
        self._row_bytes = manifest.spec.shard(0).row_bytes
        self._receipt = functools.lru_cache(_RECEIPTS)(collection.receipt)
        self._reset()

    def read(self, shard: int, row: int, out: memoryview) -> None:
        """Fill ``out`` from checked blocks."""
        per_block = self._receipt(shard).note.block_rows
        while len(out):
            block, skip = divmod(row, per_block)
            data = self._block(shard, block).result()
            part = memoryview(data)[skip * self._row_bytes :][: len(out)]
            out[: len(part)] = part
            out, row = out[len(part) :], row + len(part) // self._row_bytes

    def map(self, shard: int) -> np.ndarray | None:
        """Nothing to map."""
        return None

    def prefetch(self, shard: int, row: int, count: int) -> None:
        """Fetch the blocks of these rows in the background."""
        per_block = self._receipt(shard).note.block_rows
        for block in range(row // per_block, (row + count - 1) // per_block + 1):
            self._block(shard, block)

    def release(self) -> None:
        """Drop the blocks that were kept."""
        with self._mine():
            self._reset()

    def _reset(self) -> None:
        self._blocks: OrderedDict[tuple[int, int], Future[bytes]] = OrderedDict()

    def _block(self, shard: int, block: int) -> Future[bytes]:
        at = (shard, block)
        with self._mine():
            if at in self._blocks and not _failed(self._blocks[at]):
                self._blocks.move_to_end(at)
                return self._blocks[at]
            future = self._blocks[at] = fetchers.get(_FETCH_THREADS).submit(self._fetch, shard, block)
            kept = max(2 * _FETCH_THREADS, _AHEAD_BYTES // self._block_bytes(shard))
            while len(self._blocks) > kept:
                self._blocks.popitem(last=False)
        return future

    def _block_bytes(self, shard: int) -> int:
        return self._receipt(shard).note.block_rows * self._row_bytes

    def _fetch(self, shard: int, block: int) -> bytes:
        receipt, size = self._receipt(shard), self._block_bytes(shard)
        start = receipt.data_offset + block * size
        end = min(start + size, receipt.data_offset + receipt.rows * self._row_bytes)
        name = self._collection.shard_name(shard)
        for _ in range(_CORRUPT_TRIES):
            data = self._collection.place.read(name, start, end)
            if digest(data) == receipt.blocks[block]:
                return data
        raise CorruptData(
            f"{self._collection.place.url}/{name}: bytes {start} to {end} do not match their checksum, in "
            f"{_CORRUPT_TRIES} tries. Run `brainenc store verify` and `brainenc store repair`."
        )


def _failed(future: Future[bytes]) -> bool:
    return future.done() and future.exception() is not None
