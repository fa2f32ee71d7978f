"""Writing features that were made elsewhere: batches of any size, cut into shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from brainenc.errors import ShardSealed, UsageError
from brainenc.featurestore.collection import Collection
from brainenc.featurestore.writer import ShardWriter


class ExternalWriter:
    """Made by ``FeatureStore.writer``. A context manager: without an error, leaving it commits."""

    def __init__(self, collection: Collection, environment: Mapping[str, Any]) -> None:
        self.collection = collection
        self._environment = environment
        self._sealed = collection.sealed()
        self._row = 0
        self._shard: ShardWriter | None = None

    def append(self, batch: np.ndarray) -> None:
        """The next rows, array of shape (n, *row_shape). Rows that are sealed already are passed over.

        Raises:
            UsageError: more rows than ids, or another shape.
            ValueNotStorable: a value that the dtype cannot hold.
            NoSpace: the disk is full.
        """
        batch = np.asarray(batch)
        if self._row + len(batch) > self.collection.n_rows:
            raise UsageError(f"{self._row + len(batch)} rows came for {self.collection.n_rows} ids.")
        while len(batch):
            rows = self.collection.rows(self._row // self.collection.rows_per_shard)
            part, batch = batch[: rows.stop - self._row], batch[rows.stop - self._row :]
            self._append_to_shard(part, rows)
            self._row += len(part)

    def close(self) -> None:
        """Commit what is sealed. The rows of a shard that is not full are not kept.

        Raises:
            UsageError: rows are lacking; the whole shards before them are committed.
        """
        self._abort()
        self.collection.commit()
        if self._row != self.collection.n_rows:
            raise UsageError(
                f"{self._row} of {self.collection.n_rows} rows came for {self.collection.key}: whole shards are kept, "
                "write again from the first row to complete it."
            )

    def __enter__(self) -> ExternalWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._abort()

    def _append_to_shard(self, part: np.ndarray, rows: range) -> None:
        shard = rows.start // self.collection.rows_per_shard
        if shard in self._sealed:
            return
        if self._shard is None:
            try:
                self._shard = self.collection.shard_writer(shard, environment=self._environment)
            except ShardSealed:  # by another writer, since we looked
                self._sealed |= {shard}
                return
        self._shard.append(part)
        if self._row + len(part) == rows.stop:
            self._shard.seal()
            self._shard = None

    def _abort(self) -> None:
        if self._shard is not None:
            self._shard.abort()
            self._shard = None
