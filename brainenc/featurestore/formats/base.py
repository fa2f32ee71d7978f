"""What a shard format is: bytes before the data, bytes behind it, and nothing in between.

A shard is ONE contiguous data region, the rows in C order, between a *head* that is known before the first row and a
*tail* that is known after the last. So every format streams rows into place, maps and reads the same way, and adding
a format means framing only. In its tail each shard carries a *note* (see ``schema.Note``) from which its receipt can be
made again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from brainenc.featurestore.dtypes import storage_dtype

ALIGNMENT = 64
"""The data region begins at a multiple of this: Arrow's recommendation, a cache line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSpec:
    """What a format must know of a shard before its first row."""

    rows: int
    row_shape: tuple[int, ...]
    dtype: str
    """Storage dtype by name, see ``dtypes``."""

    @property
    def row_elements(self) -> int:
        """Values in one row."""
        return math.prod(self.row_shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.row_elements * storage_dtype(self.dtype).itemsize

    @property
    def data_bytes(self) -> int:
        """Bytes of the data region."""
        return self.rows * self.row_bytes


class ShardFormat(Protocol):
    """Framing of a shard. Stateless; the same arguments give the same bytes."""

    name: str
    """What collections call it."""
    suffix: str
    """Extension of its files, without a dot."""

    def head(self, spec: ShardSpec) -> bytes:
        """Everything before the data; its length, a multiple of 64, is the data offset."""
        ...

    def tail(self, spec: ShardSpec, note: bytes) -> bytes:
        """Everything behind the data, with the note somewhere inside, byte for byte."""
        ...

    def note(self, tail: bytes) -> bytes:
        """The note from the last bytes of a file (at least those of its tail).

        Raises:
            ValueError: these bytes are not the end of a whole shard of this format.
        """
        ...

    def tail_bytes(self, end: bytes) -> int:
        """How many bytes from the end of the file :meth:`note` wants, told from its last 64 bytes.

        Raises:
            ValueError: not the end of a whole shard of this format.
        """
        ...
