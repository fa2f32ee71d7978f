"""Shards as Arrow IPC files: one record batch, one column ``features`` of fixed-shape tensors, uncompressed.

PyArrow would hold the whole batch in memory to write it. The layout is fixed by row count, row shape and dtype, so the
messages before the data are written first, the rows are streamed to where they belong, and the footer follows:

    "ARROW1\\0\\0"  schema message  record batch message  | rows | padding, end of stream, footer, "ARROW1"

(https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format). The note is custom metadata of the footer.
"""

from __future__ import annotations

import struct

import pyarrow as pa

from brainenc.featurestore.dtypes import storage_dtype
from brainenc.featurestore.formats.base import ALIGNMENT, ShardSpec
from brainenc.featurestore.formats.flatbuffer import Builder, Table

COLUMN = "features"
_MAGIC, _CONTINUATION = b"ARROW1", b"\xff\xff\xff\xff"
_V5, _RECORD_BATCH = 4, 3
_NOTE = b"brainenc.note"


class ArrowFormat:
    """See the module's docstring."""

    name = suffix = "arrow"

    def head(self, spec: ShardSpec) -> bytes:
        """Magic, schema message and record batch message, padded so that the body begins at a multiple of 64."""
        start = _MAGIC + b"\0\0" + _schema_message(spec)
        message = _batch_message(spec)
        padding = -(len(start) + 8 + len(message)) % ALIGNMENT
        return start + _CONTINUATION + struct.pack("<i", len(message) + padding) + message + b"\0" * padding

    def tail(self, spec: ShardSpec, note: bytes) -> bytes:
        """Padding of the body, end of stream, footer."""
        batch_at = 8 + len(_schema_message(spec))
        block = struct.pack("<qi4xq", batch_at, len(self.head(spec)) - batch_at, _padded(spec.data_bytes))
        footer = _footer(_schema_message(spec)[8:], block, note)
        stream_end = b"\0" * (_padded(spec.data_bytes) - spec.data_bytes) + _CONTINUATION + b"\0\0\0\0"
        return stream_end + footer + struct.pack("<i", len(footer)) + _MAGIC

    def tail_bytes(self, end: bytes) -> int:
        """Length of the footer and what follows it."""
        if not end.endswith(_MAGIC):
            raise ValueError("no Arrow file: the magic at its end is missing")
        return int(struct.unpack("<i", end[-10:-6])[0]) + 10

    def note(self, tail: bytes) -> bytes:
        """The note among the footer's metadata."""
        footer = tail[-self.tail_bytes(tail) : -10]
        try:
            for pair in Table.root(footer).tables(4):
                if pair.text(0) == _NOTE:
                    return pair.text(1)
        except struct.error as error:
            raise ValueError(f"no Arrow file: its footer is broken ({error})") from error
        raise ValueError("an Arrow file, but no shard of a feature store: its footer has no note")


def _schema(spec: ShardSpec) -> pa.Schema:
    values = pa.from_numpy_dtype(storage_dtype(spec.dtype))
    column = pa.field(COLUMN, pa.fixed_shape_tensor(values, spec.row_shape), nullable=False)
    return pa.schema([column], metadata={"brainenc.dtype": spec.dtype})


def _schema_message(spec: ShardSpec) -> bytes:
    return bytes(_schema(spec).serialize())


def _batch_message(spec: ShardSpec) -> bytes:
    """Rows of a fixed-size list without nulls: nodes of lists and values; buffers of two absent masks and values."""
    build = Builder()
    nodes = build.structs(struct.pack("<4q", spec.rows, 0, spec.rows * spec.row_elements, 0), 2)
    buffers = build.structs(struct.pack("<6q", 0, 0, 0, 0, 0, spec.data_bytes), 3)
    batch = build.table({0: ("q", spec.rows)}, {1: nodes, 2: buffers})
    scalars = {0: ("h", _V5), 1: ("B", _RECORD_BATCH), 3: ("q", _padded(spec.data_bytes))}
    return build.finish(build.table(scalars, {2: batch}))


def _footer(schema_message: bytes, block: bytes, note: bytes) -> bytes:
    build = Builder()
    pair = build.table({}, {0: build.text(_NOTE), 1: build.text(note)})
    metadata = build.references([pair])
    blocks = build.structs(block, 1)
    dictionaries = build.structs(b"", 0)
    header = Table.root(schema_message).follow(2)  # the Schema inside the Message: taken over as it is
    assert header is not None
    schema = build.embed(schema_message, header)
    return build.finish(build.table({0: ("h", _V5)}, {1: schema, 2: dictionaries, 3: blocks, 4: metadata}))


def _padded(n: int) -> int:
    return n + -n % ALIGNMENT
