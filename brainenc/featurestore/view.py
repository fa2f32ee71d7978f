"""Reading committed rows: slices that copy nothing, batches in any order, by row or by stimulus id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from brainenc.errors import Incomplete, KeyNotFound, MissingRow, UnknownName, UsageError
from brainenc.featurestore import commit
from brainenc.featurestore.buffers import as_buffer
from brainenc.featurestore.collection import Collection
from brainenc.featurestore.documents import Json
from brainenc.featurestore.dtypes import logical_dtype
from brainenc.featurestore.gather import Run, default_threads, in_parallel, runs
from brainenc.featurestore.places.base import Place, ShardCache
from brainenc.featurestore.rows import as_rows, per_shard, present_rows
from brainenc.featurestore.schema import CollectionSpec, Manifest
from brainenc.featurestore.sources import RangedSource, Source, open_source
from brainenc.featurestore.stimuli import StimulusSet

_SMALL_RUN = 32 << 10
"""Rows shorter than this are copied from maps by NumPy: a system call for each would cost more than the bytes."""


class FeatureView:
    """Rows of a collection as of one commit. Pickles as its address, and is safe to use after a fork.

    Made by ``store[key]``. Rows keep the order of the stimulus set, or that given to :meth:`select`.
    """

    def __init__(self, collection: Collection, number: int, manifest: Manifest, source: Source,
                 cache: ShardCache | None, rows: np.ndarray | None = None) -> None:  # fmt: skip
        self._collection, self._number, self._manifest = collection, number, manifest
        self._source, self._cache, self._rows = source, cache, rows
        self._here = present_rows(manifest)
        self._row_bytes = manifest.spec.shard(0).row_bytes

    @classmethod
    def open(cls, place: Place, key: str, *, cache: ShardCache | None = None, number: int | None = None,
             rows: np.ndarray | None = None, verify: bool = False) -> FeatureView:  # fmt: skip
        """Open a collection for reading.

        Args:
            place: where the store lies.
            key: the collection.
            cache: for places that cannot be mapped; None reads those by verified ranges.
            number: a commit; None: the newest.
            rows: those to show, in this order; None: all.
            verify: check every block that is read against its checksum.

        Raises:
            KeyNotFound: there is no such collection.
            CacheTooSmall: the cache could not hold one shard.
        """
        current = commit.latest(place, key) if number is None else _at(place, key, number)
        if current is None:
            raise KeyNotFound(key, place.url)
        collection = Collection(place, key, current.manifest.spec, cache)
        source = open_source(collection, current.manifest, cache, verify)
        return cls(collection, current.number, current.manifest, source, cache, rows)

    @property
    def key(self) -> str:
        """The collection's key."""
        return self._collection.key

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row_shape); rows that are missing or not extracted yet are counted, see :attr:`present`."""
        return (len(self), *self._manifest.spec.row_shape)

    @property
    def dtype(self) -> np.dtype:
        """What reading gives: float16, float32 or ``ml_dtypes.bfloat16``."""
        return logical_dtype(self._manifest.spec.dtype)

    @property
    def ids(self) -> list[str]:
        """Stimulus ids, in the order of rows."""
        ids = self._collection.stimuli.ids
        return list(ids) if self._rows is None else [ids[row] for row in self._rows]

    @property
    def stimuli(self) -> StimulusSet:
        """What is known of each row's image: id, address, size and stamp when it was listed; in the order of rows."""
        stimuli = self._collection.stimuli
        return stimuli if self._rows is None else stimuli.take(self._rows)

    @property
    def present(self) -> np.ndarray:
        """Mask of shape (rows,): True where the row can be read."""
        return (self._here if self._rows is None else self._here[self._rows]).copy()

    @property
    def details(self) -> Json:
        """``n_prefix``, ``grid`` and whatever else was recorded for readers."""
        return self._manifest.spec.details

    @property
    def identity(self) -> Json:
        """What makes these features these features."""
        return self._manifest.spec.identity

    @property
    def spec(self) -> CollectionSpec:
        """What the collection's first manifest fixed."""
        return self._manifest.spec

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return len(self) * self._row_bytes

    def gather(self, indices: npt.ArrayLike, out: Any = None, *, threads: int | None = None) -> Any:
        """Copy rows into one contiguous buffer, in parallel.

        Args:
            indices: rows in the order wanted, repeats and negative ones allowed; or a mask of shape (rows,).
            out: C-contiguous NumPy array, or CPU tensor of torch (pinned ones, too), of shape
                (n, *row_shape) and the view's dtype; None: a new array.
            threads: None: as many as this process has cores, up to eight.

        Returns:
            ``out``, filled.

        Raises:
            IndexError: there is no such row.
            MissingRow: a row was left out when it was extracted.
            Incomplete: a row has not been extracted yet.
            UsageError: ``out`` does not fit.
        """
        rows = self._resolve(indices)
        result = np.empty((len(rows), *self.shape[1:]), self.dtype) if out is None else out
        self._copy(rows, as_buffer(result, (len(rows), *self.shape[1:]), self.dtype), threads or default_threads())
        return result

    def prefetch(self, indices: npt.ArrayLike) -> None:
        """Say which rows will be wanted soon: they are read ahead (fetched, on remote places). Returns at once."""
        for run in runs(self._resolve(indices), self._manifest.spec.rows_per_shard, self._row_bytes):
            self._source.prefetch(run.shard, run.row, run.count)

    def select(self, *, ids: Iterable[str] | None = None, rows: npt.ArrayLike | None = None) -> FeatureView:
        """A view on chosen stimuli, in the order given, sharing files and maps with this one.

        Raises:
            UnknownName: an id that is not here.
            UsageError: not exactly one of the two was given.
        """
        if (ids is None) == (rows is None):
            raise UsageError("select wants either ids or rows.")
        chosen = self._by_id(ids) if ids is not None else self._indices(rows)
        base = chosen if self._rows is None else self._rows[chosen]
        return FeatureView(self._collection, self._number, self._manifest, self._source, self._cache, base)

    def verified(self) -> FeatureView:
        """The same rows, every block checked against its checksum as it is read."""
        source = RangedSource(self._collection, self._manifest)
        return FeatureView(self._collection, self._number, self._manifest, source, self._cache, self._rows)

    def release(self) -> None:
        """Give back maps and open files; arrays already handed out stay valid."""
        self._source.release()

    close = release

    def __len__(self) -> int:
        return self._manifest.spec.n_rows if self._rows is None else len(self._rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        """One row, or an array of rows. Within one shard of a local store nothing is copied, and it is read-only."""
        if isinstance(index, tuple):
            return self._inner(index[0], index[1:])
        if isinstance(index, int | np.integer):
            row: np.ndarray = self._slice(self._resolve([int(index)]))[0]
            return row
        if isinstance(index, slice):
            return self._slice(self._resolve(np.arange(len(self))[index]))
        return np.asarray(self.gather(index))

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def __enter__(self) -> FeatureView:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FeatureView({self.key!r}, {self.shape} {self.dtype}, in {self._collection.place.url})"

    def __reduce__(self) -> tuple[Any, ...]:
        verify = isinstance(self._source, RangedSource)
        return _reopen, (self._collection.place, self.key, self._cache, self._number, self._rows, verify)

    def copy_rows(self, indices: npt.ArrayLike, buffer: np.ndarray, targets: np.ndarray) -> None:
        """Copy rows to chosen rows of a larger buffer: for views made of several."""
        self._copy(self._resolve(indices), buffer, default_threads(), targets)

    def _copy(self, rows: np.ndarray, buffer: np.ndarray, threads: int, targets: np.ndarray | None = None) -> None:
        todo = runs(rows, self._manifest.spec.rows_per_shard, self._row_bytes, targets)
        if len(rows) * self._row_bytes < _SMALL_RUN * len(todo) and self._copy_from_maps(rows, buffer, targets):
            return
        flat = memoryview(buffer.reshape(-1).view(np.uint8))  # type: ignore[arg-type]

        def copy(run: Run) -> None:
            target = flat[run.target * self._row_bytes : (run.target + run.count) * self._row_bytes]
            self._source.read(run.shard, run.row, target)

        in_parallel(copy, todo, threads)

    def _copy_from_maps(self, rows: np.ndarray, buffer: np.ndarray, targets: np.ndarray | None) -> bool:
        shards, local = np.divmod(rows, self._manifest.spec.rows_per_shard)
        for shard in np.unique(shards):
            mapped = self._source.map(int(shard))
            if mapped is None:
                return False
            chosen = np.flatnonzero(shards == shard)
            buffer[chosen if targets is None else targets[chosen]] = mapped[local[chosen]]
        return True

    def _slice(self, rows: np.ndarray) -> np.ndarray:
        """Rows as they lie in one map, if they do; else a copy."""
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            (first, start), (last, _) = (divmod(int(row), self._manifest.spec.rows_per_shard) for row in rows[[0, -1]])
            mapped = self._source.map(first) if first == last else None
            if mapped is not None:
                return mapped[start : start + len(rows)]
        result = np.empty((len(rows), *self.shape[1:]), self.dtype)
        self._copy(rows, result, default_threads())
        return result

    def _inner(self, index: Any, rest: tuple[Any, ...]) -> np.ndarray:
        """``view[rows, tokens ...]``: of each shard only the part that is wanted is copied."""
        if isinstance(index, int | np.integer):
            row: np.ndarray = self[int(index)]
            return np.asarray(row[rest])
        rows = self._resolve(np.arange(len(self))[index])
        parts = [
            self._slice(part)[(slice(None), *rest)] for part in per_shard(rows, self._manifest.spec.rows_per_shard)
        ]
        empty = np.empty((0, *self.shape[1:]), self.dtype)[(slice(None), *rest)]
        return np.concatenate(parts) if parts else empty

    def _indices(self, indices: npt.ArrayLike | None) -> np.ndarray:
        return as_rows(indices, len(self), self.key)

    def _resolve(self, indices: npt.ArrayLike) -> np.ndarray:
        """Rows of the collection, all of which can be read."""
        chosen = self._indices(indices)
        rows = chosen if self._rows is None else self._rows[chosen]
        if not self._here[rows].all():
            self._refuse(int(rows[~self._here[rows]][0]))
        return rows

    def _refuse(self, row: int) -> None:
        stimulus = self._collection.stimuli.ids[row]
        shard = row // self._manifest.spec.rows_per_shard
        if any(entry.shard == shard for entry in self._manifest.shards):
            raise MissingRow(stimulus, self.key)
        raise Incomplete(stimulus, self.key, int(self._here.sum()), len(self._here))

    def _by_id(self, ids: Iterable[str]) -> np.ndarray:
        mine = self._collection.stimuli.row_of
        if self._rows is not None:
            mine = {stimulus: row for row, stimulus in enumerate(self.ids)}
        try:
            return np.array([mine[stimulus] for stimulus in ids], np.int64)
        except KeyError as error:
            first = [*self._collection.stimuli.ids[:3], "..."]
            raise UnknownName("stimulus", str(error.args[0]), first, self.key) from None


def _at(place: Place, key: str, number: int) -> commit.Commit | None:
    """The commit a view was pickled with; the newest where that one was removed since."""
    try:
        return commit.Commit(number, commit.read(place, key, number))
    except FileNotFoundError:
        return commit.latest(place, key)


def _reopen(place: Place, key: str, cache: ShardCache | None, number: int, rows: np.ndarray | None,
            verify: bool) -> FeatureView:  # fmt: skip
    return FeatureView.open(place, key, cache=cache, number=number, rows=rows, verify=verify)
