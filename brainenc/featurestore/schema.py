"""What a collection is, what a shard says of itself, receipts and manifests: the content of the store's documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from brainenc.errors import CorruptData, UsageError
from brainenc.featurestore.checksums import digest
from brainenc.featurestore.documents import (
    Json,
    canonical,
    numbers,
    read_document,
    reading,
    texts,
    typed,
    whole_number,
    write_document,
)
from brainenc.featurestore.formats import shard_format
from brainenc.featurestore.formats.base import ShardSpec

_ROWS, _BYTES = 2**31, 2**60  # more than any store has

Raw = bytes  # for the classes that have a field called bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectionSpec:
    """What manifest 1 fixes for good."""

    identity: Json
    """Weights hash, backbone configuration, layer, facet, preprocessing ...: what makes features these features."""
    row_shape: tuple[int, ...]
    dtype: str
    n_rows: int
    stimuli: str
    """Name of the stimulus set whose rows these are."""
    stimuli_checksum: str
    rows_per_shard: int
    format: str
    allow_64bit: bool = False
    """More than 2^31 values in a shard, which not every Arrow reader takes."""
    details: Json = field(default_factory=dict)
    """What readers want to know beside: ``n_prefix``, ``grid`` ... Not compared."""

    def __post_init__(self) -> None:
        """Refuse what no shard could hold."""
        if self.rows_per_shard < 1 or not self.row_shape or min(self.row_shape) < 1:
            raise UsageError(
                f"rows of shape {self.row_shape} in shards of {self.rows_per_shard} rows: all must be positive."
            )
        elements = self.shard(0).rows * self.shard(0).row_elements
        if elements >= 2**31 and not self.allow_64bit:
            raise UsageError(
                f"a shard of {self.shard(0).rows} rows would hold {elements} values, and some readers of Arrow stop "
                "at 2^31: use fewer rows per shard, or allow_64bit=True."
            )

    @property
    def checksum(self) -> str:
        """Of everything that makes shards fit together; carried by every shard of the collection."""
        fields = self.to_json()
        del fields["details"]
        return digest(canonical(fields))

    @property
    def n_shards(self) -> int:
        """Shards when all rows are there."""
        return -(-self.n_rows // self.rows_per_shard)

    def rows(self, shard: int) -> range:
        """The rows that a shard holds, first to last.

        Raises:
            UsageError: there is no such shard.
        """
        if not 0 <= shard < max(self.n_shards, 1):
            raise UsageError(f"there is no shard {shard}: {self.n_rows} rows make {self.n_shards} shards.")
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.n_rows))

    def shard(self, shard: int) -> ShardSpec:
        """What a format must know of a shard."""
        return ShardSpec(rows=len(self.rows(shard)), row_shape=self.row_shape, dtype=self.dtype)

    def to_json(self) -> Json:
        """Plain values."""
        return {
            "identity": self.identity, "row_shape": list(self.row_shape), "dtype": self.dtype, "n_rows": self.n_rows,
            "stimuli": self.stimuli, "stimuli_checksum": self.stimuli_checksum, "format": self.format,
            "rows_per_shard": self.rows_per_shard, "allow_64bit": self.allow_64bit, "details": self.details,
        }  # fmt: skip

    @classmethod
    def from_json(cls, fields: Json) -> CollectionSpec:
        """The inverse of :meth:`to_json`; fields that a later version added are ignored."""
        known = typed(fields, {"identity": dict, "details": dict, "dtype": str, "format": str, "stimuli": str,
                               "stimuli_checksum": str, "allow_64bit": bool})  # fmt: skip
        spec = cls(
            **known, row_shape=numbers(fields["row_shape"], _ROWS), n_rows=whole_number(fields["n_rows"], _ROWS),
            rows_per_shard=whole_number(fields["rows_per_shard"], _BYTES, 1),
        )  # fmt: skip
        shard_format(spec.format)
        whole_number(spec.shard(0).row_bytes * max(spec.n_rows, 1), _BYTES)
        return spec


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What a shard carries in its own tail: what a receipt says, but for what only the whole file tells."""

    collection: str
    """Checksum of the collection's spec."""
    shard: int
    rows: int
    data_offset: int
    block_rows: int
    """Rows that one block checksum covers."""
    blocks: tuple[str, ...]
    missing: tuple[int, ...] = ()
    """Rows (of the collection) that were left out on purpose; their bytes are zero."""
    content_hashes: tuple[str, ...] | None = None
    """Of the image bytes that were decoded, one a row, by the caller."""
    environment: Json = field(default_factory=dict)
    """Library versions, device, batch size: recorded, never compared."""
    frame: str = "0" * 32
    """Checksum of head and tail with this field zero."""

    def check(self, spec: CollectionSpec, shard: int, where: str) -> None:
        """Whether this is the note of this shard of this collection.

        Raises:
            CorruptData: of another one, or it speaks of rows that the shard has not.
        """
        if (self.collection, self.shard) != (spec.checksum, shard):
            raise CorruptData(f"{where} is not shard {shard} of this collection, but shard {self.shard} of "
                              f"{'this' if self.collection == spec.checksum else 'another'} one.")  # fmt: skip
        rows = spec.rows(shard)
        if self.rows != len(rows) or not all(row in rows for row in self.missing):
            raise CorruptData(f"{where} speaks of rows that shard {shard} has not: it has {rows.start} to {rows.stop}.")

    def to_json(self) -> Json:
        """Plain values."""
        hashes = None if self.content_hashes is None else list(self.content_hashes)
        return {
            "collection": self.collection, "shard": self.shard, "rows": self.rows, "data_offset": self.data_offset,
            "block_rows": self.block_rows, "blocks": list(self.blocks), "missing": list(self.missing),
            "content_hashes": hashes, "environment": self.environment, "frame": self.frame,
        }  # fmt: skip

    @classmethod
    def from_json(cls, fields: Json) -> Note:
        """The inverse of :meth:`to_json`."""
        hashes = fields["content_hashes"]
        known = typed(fields, {"collection": str, "environment": dict, "frame": str})
        if len(known["frame"]) != 32:
            raise ValueError("the checksum of its frame is none")
        return cls(
            **known, shard=whole_number(fields["shard"], _ROWS), rows=whole_number(fields["rows"], _ROWS),
            data_offset=whole_number(fields["data_offset"], _BYTES),
            block_rows=whole_number(fields["block_rows"], _BYTES, 1), blocks=texts(fields["blocks"]),
            missing=numbers(fields["missing"], _ROWS), content_hashes=None if hashes is None else texts(hashes),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """One sealed shard: what has a receipt is never computed again. A function of the shard file's bytes alone."""

    note: Note
    bytes: int
    """Size of the file."""
    checksum: str
    """xxh3-128 of the file, as ``xxhsum -H2`` prints it."""

    @property
    def shard(self) -> int:
        """Its number."""
        return self.note.shard

    @property
    def rows(self) -> int:
        """How many rows it has, missing ones included."""
        return self.note.rows

    @property
    def data_offset(self) -> int:
        """Where in the file the rows begin."""
        return self.note.data_offset

    @property
    def blocks(self) -> tuple[str, ...]:
        """Checksums of blocks of ``note.block_rows`` rows."""
        return self.note.blocks

    @property
    def missing(self) -> tuple[int, ...]:
        """Rows of the collection that were left out on purpose."""
        return self.note.missing

    @property
    def content_hashes(self) -> tuple[str, ...] | None:
        """Of the image bytes, one a row."""
        return self.note.content_hashes

    @property
    def environment(self) -> Json:
        """What it was made with."""
        return self.note.environment

    def to_bytes(self) -> Raw:
        """The receipt file."""
        return write_document("receipt", {**self.note.to_json(), "bytes": self.bytes, "file": self.checksum})

    @classmethod
    def from_bytes(cls, data: Raw, where: str) -> Receipt:
        """Read a receipt file.

        Raises:
            CorruptData: torn or flipped.
        """
        fields = read_document("receipt", data, where)
        with reading("receipt", where):
            checksum = typed(fields, {"file": str})["file"]
            return cls(note=Note.from_json(fields), bytes=whole_number(fields["bytes"], _BYTES), checksum=checksum)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """A shard as its manifest knows it: enough to map and to verify it without its receipt."""

    shard: int
    rows: int
    bytes: int
    data_offset: int
    checksum: str
    missing: tuple[int, ...] = ()

    @classmethod
    def of(cls, receipt: Receipt) -> ShardEntry:
        """What a manifest keeps of a receipt."""
        return cls(shard=receipt.shard, rows=receipt.rows, bytes=receipt.bytes, data_offset=receipt.data_offset,
                   checksum=receipt.checksum, missing=receipt.missing)  # fmt: skip

    def to_json(self) -> list[Any]:
        """Values in the order of the fields: ten thousand shards are read at every open."""
        return [self.shard, self.rows, self.bytes, self.data_offset, self.checksum, list(self.missing)]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> ShardEntry:
        """The inverse of :meth:`to_json`."""
        *counts, checksum, missing = values
        shard, rows, size, offset = numbers(counts, _BYTES)
        if type(checksum) is not str:
            raise ValueError(f"{checksum!r:.60} is no checksum")
        return cls(shard=shard, rows=rows, bytes=size, data_offset=offset, checksum=checksum,
                   missing=numbers(missing, _ROWS))  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A commit: the collection as readers see it. Its number is in its name, not in its bytes."""

    spec: CollectionSpec
    shards: tuple[ShardEntry, ...] = ()
    """In order of their numbers."""

    @property
    def transaction(self) -> str:
        """Follows from the content, so that the same commit made twice is one commit."""
        return digest(canonical(self._fields()))

    def _fields(self) -> Json:
        return {**self.spec.to_json(), "shards": [entry.to_json() for entry in self.shards]}

    def to_bytes(self) -> Raw:
        """The manifest file."""
        return write_document("manifest", {**self._fields(), "transaction": self.transaction})

    @classmethod
    def from_bytes(cls, data: Raw, where: str) -> Manifest:
        """Read a manifest file.

        Raises:
            CorruptData: torn or flipped.
        """
        fields = read_document("manifest", data, where)
        with reading("manifest", where):
            shards = tuple(ShardEntry.from_json(values) for values in fields["shards"])
            manifest = cls(spec=CollectionSpec.from_json(fields), shards=shards)
            manifest._check(where)
        return manifest

    def _check(self, where: str) -> None:
        """Each shard once and in order, with the rows that it must have."""
        before, row_bytes = -1, self.spec.shard(0).row_bytes
        for entry in self.shards:
            if not before < entry.shard < self.spec.n_shards:
                raise CorruptData(f"{where} names shard {entry.shard} after shard {before}, of {self.spec.n_shards}.")
            rows, data = self.spec.rows(entry.shard), entry.data_offset + entry.rows * row_bytes
            fits = data <= entry.bytes and all(row in rows for row in entry.missing)
            if entry.rows != len(rows) or not fits:
                raise CorruptData(f"{where} says of shard {entry.shard} what cannot be: {entry}.")
            before = entry.shard


def differences(stored: CollectionSpec, wanted: CollectionSpec) -> dict[str, tuple[Any, Any]]:
    """Field -> (stored, wanted) of all that must be equal for two specs to mean the same features.

    Shard size, format and details are the first creator's choice, and everybody takes them from manifest 1.
    """
    sides = []
    for spec in (stored, wanted):
        flat = dict(_flatten("", spec.identity))
        sides.append({**flat, "row_shape": spec.row_shape, "dtype": spec.dtype, "rows": spec.n_rows,
                      "stimuli": spec.stimuli_checksum})  # fmt: skip
    a, b = sides
    return {name: (a.get(name), b.get(name)) for name in sorted({*a, *b}) if a.get(name) != b.get(name)}


def _flatten(prefix: str, value: Mapping[str, Any]) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, item in value.items():
        flat += _flatten(f"{prefix}{name}.", item) if isinstance(item, Mapping) else [(prefix + name, item)]
    return flat
