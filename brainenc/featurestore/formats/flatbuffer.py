"""Just enough of FlatBuffers to frame an Arrow file: the encoding of tables, vectors and strings, and its reading.

Built from the end to the front, as FlatBuffers wants it: every position here is counted from the END of the buffer, so
that what is put in front later does not move it. (The format: https://flatbuffers.dev/internals)
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

Scalar = tuple[str, int]
"""``struct`` code and value of a field held in the table itself: ``("q", 5)``. Codes: B uint8, h int16, q int64."""


class Builder:
    """Puts pieces in front of one another and remembers where they are."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def table(self, scalars: Mapping[int, Scalar], offsets: Mapping[int, int]) -> int:
        """A table; slot -> scalar, and slot -> position of what it refers to. Returns its position."""
        begin, places = self._size, dict[int, int]()
        for slot, (code, value) in sorted(scalars.items(), key=lambda item: -struct.calcsize(item[1][0])):
            self._align(struct.calcsize(code))
            places[slot] = self._front(struct.pack(f"<{code}", value))
        for slot, target in offsets.items():
            places[slot] = self._reference(target)
        self._align(4)
        table = self._size + 4
        slots = max(places, default=-1) + 1
        entries = [table - places[slot] if slot in places else 0 for slot in range(slots)]
        vtable = struct.pack(f"<{slots + 2}H", 4 + 2 * slots, table - begin, *entries)
        self._front(struct.pack("<i", len(vtable)))  # the table begins with the way back to its vtable
        self._front(vtable)
        return table

    def structs(self, packed: bytes, count: int) -> int:
        """A vector of ``count`` structs, packed by the caller, aligned to 8 bytes."""
        self._align(8, extra=len(packed))
        self._front(packed)
        return self._front(struct.pack("<I", count))

    def text(self, data: bytes) -> int:
        """A string."""
        self._align(4, extra=len(data) + 1)
        self._front(data + b"\0")
        return self._front(struct.pack("<I", len(data)))

    def references(self, targets: Sequence[int]) -> int:
        """A vector of tables or strings."""
        for target in reversed(targets):
            self._reference(target)
        self._align(4)
        return self._front(struct.pack("<I", len(targets)))

    def embed(self, buffer: bytes, position: int) -> int:
        """A whole other buffer (a multiple of 8 bytes); returns where its byte ``position`` (from its start) is."""
        self._align(8, extra=len(buffer))
        return self._front(buffer) - position

    def finish(self, root: int) -> bytes:
        """The buffer: a reference to the root, then everything."""
        self._align(8, extra=4)
        self._reference(root)
        return b"".join(reversed(self._pieces))

    def _front(self, data: bytes) -> int:
        self._pieces.append(data)
        self._size += len(data)
        return self._size

    def _reference(self, target: int) -> int:
        self._align(4)
        return self._front(struct.pack("<I", self._size + 4 - target))

    def _align(self, to: int, extra: int = 0) -> None:
        """Pad so that after ``extra`` more bytes the position is a multiple of ``to``."""
        self._front(b"\0" * (-(self._size + extra) % to))


class Table:
    """Reads one table of a buffer; positions count from the buffer's start."""

    def __init__(self, buffer: bytes, position: int) -> None:
        self.buffer, self.position = buffer, position

    @classmethod
    def root(cls, buffer: bytes) -> Table:
        """The table that a buffer is about."""
        return cls(buffer, int(struct.unpack_from("<I", buffer)[0]))

    def field(self, slot: int) -> int | None:
        """Where a field lies, None if it is not there."""
        vtable = self.position - struct.unpack_from("<i", self.buffer, self.position)[0]
        if 4 + 2 * slot >= struct.unpack_from("<H", self.buffer, vtable)[0]:
            return None
        offset = int(struct.unpack_from("<H", self.buffer, vtable + 4 + 2 * slot)[0])
        return self.position + offset if offset else None

    def follow(self, slot: int) -> int | None:
        """Where the thing that a field refers to lies."""
        place = self.field(slot)
        return None if place is None else place + int(struct.unpack_from("<I", self.buffer, place)[0])

    def text(self, slot: int) -> bytes:
        """A string field."""
        place = self.follow(slot)
        if place is None:
            return b""
        (length,) = struct.unpack_from("<I", self.buffer, place)
        return self.buffer[place + 4 : place + 4 + length]

    def tables(self, slot: int) -> list[Table]:
        """A vector of tables."""
        place = self.follow(slot)
        if place is None:
            return []
        (count,) = struct.unpack_from("<I", self.buffer, place)
        if place + 4 + 4 * count > len(self.buffer):  # a flipped bit could ask for billions
            raise ValueError("a vector reaches beyond its buffer")
        at = [place + 4 + 4 * i for i in range(count)]
        return [Table(self.buffer, p + int(struct.unpack_from("<I", self.buffer, p)[0])) for p in at]
