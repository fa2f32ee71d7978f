"""Shards as plain ``.npy`` files (version 1.0, C order), with the note behind the data, where NumPy does not look.

header, padded to a multiple of 64 | rows | note, its length in 8 bytes, "brainenc"
"""

from __future__ import annotations

import io
import struct

import numpy as np

from brainenc.featurestore.dtypes import storage_dtype
from brainenc.featurestore.formats.base import ShardSpec

_MAGIC = b"brainenc"


class NpyFormat:
    """See the module's docstring. bfloat16 appears to others as the uint16 of its bits."""

    name = suffix = "npy"

    def head(self, spec: ShardSpec) -> bytes:
        """The header that ``np.save`` writes."""
        descr = np.lib.format.dtype_to_descr(storage_dtype(spec.dtype))
        buffer = io.BytesIO()
        header = {"descr": descr, "fortran_order": False, "shape": (spec.rows, *spec.row_shape)}
        np.lib.format.write_array_header_1_0(buffer, header)
        return buffer.getvalue()

    def tail(self, spec: ShardSpec, note: bytes) -> bytes:
        """Note, length, magic."""
        return note + struct.pack("<q", len(note)) + _MAGIC

    def tail_bytes(self, end: bytes) -> int:
        """Length of the note and what follows it."""
        if not end.endswith(_MAGIC):
            raise ValueError("no shard of a feature store: the note at its end is missing")
        return int(struct.unpack("<q", end[-16:-8])[0]) + 16

    def note(self, tail: bytes) -> bytes:
        """The bytes before length and magic."""
        return tail[-self.tail_bytes(tail) : -16]
