"""Reading a shard back: every byte checked, and the receipt that follows from them.

A receipt is a function of the shard's bytes. So whoever finds a shard without one can write it, and two who do write
the same.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import xxhash

from brainenc.errors import CorruptData
from brainenc.featurestore.checksums import BlockHasher, digest
from brainenc.featurestore.documents import UNREADABLE, canonical
from brainenc.featurestore.formats.base import ShardFormat
from brainenc.featurestore.places.base import Place
from brainenc.featurestore.schema import CollectionSpec, Note, Receipt

_LOCAL_READ, _REMOTE_READ = 1 << 22, 1 << 24
_FRAME_ZERO = b"0" * 32


class Bytes(Protocol):
    """A file as a range of bytes, wherever it lies."""

    where: str
    size: int

    def read(self, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end``; fewer where the file ends before."""
        ...

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        """The same in pieces; each is valid until the next is asked for."""
        ...


class LocalBytes:
    """A local file, read and never mapped: a failing disk is an ``OSError`` then, not a SIGBUS."""

    def __init__(self, path: Path, fd: int, *, from_disk: bool = False) -> None:
        self.where, self._fd = str(path), fd
        self.size = os.fstat(fd).st_size
        if hasattr(os, "posix_fadvise"):
            if from_disk:  # forget the copy in memory, which may be right where the disk is wrong
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read(self, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end``."""
        return b"".join(bytes(piece) for piece in self.pieces(start, end))

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        """The same through one buffer."""
        buffer = memoryview(bytearray(min(_LOCAL_READ, max(end - start, 1))))
        while start < end:
            n = os.preadv(self._fd, [buffer[: min(len(buffer), end - start)]], start)
            if n == 0:
                return
            yield buffer[:n]
            start += n


class PlaceBytes:
    """A file of any place, by ranged reads."""

    def __init__(self, place: Place, name: str, size: int) -> None:
        self.where, self.size = f"{place.url}/{name}", size
        self._place, self._name = place, name

    def read(self, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end``."""
        return self._place.read(self._name, start, end)

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        """The same, one request a piece."""
        for at in range(start, end, _REMOTE_READ):
            yield memoryview(self._place.read(self._name, at, min(at + _REMOTE_READ, end)))


def inspect(file: Bytes, form: ShardFormat, spec: CollectionSpec, shard: int) -> Receipt:
    """Read a whole shard, check every byte against its own note, and say what a receipt says.

    Raises:
        CorruptData: torn, flipped, or not this shard of this collection; the message begins with where.
    """
    noted = _end(file, form)
    note = _note(noted, file.where)
    note.check(spec, shard, file.where)
    shape = spec.shard(shard)
    end = note.data_offset + shape.data_bytes
    if end > file.size:
        raise CorruptData(f"{file.where} is torn: its rows end at byte {end}, it has {file.size}.")
    head, tail = file.read(0, note.data_offset), file.read(end, file.size)
    whole, blocks = xxhash.xxh3_128(head), BlockHasher(note.block_rows * shape.row_bytes)
    for piece in file.pieces(note.data_offset, end):
        whole.update(piece)
        blocks.update(piece)
    whole.update(tail)
    _compare(file.where, note, blocks.digests(), frame_checksum(head, tail, noted, note))
    return Receipt(note=note, bytes=file.size, checksum=whole.hexdigest())


def framed(form: ShardFormat, spec: CollectionSpec, note: Note) -> tuple[bytes, Note]:
    """The tail of a shard whose rows are all written, and its note with the frame's checksum filled in."""
    shape = spec.shard(note.shard)
    blank = canonical(note.to_json())
    tail = form.tail(shape, blank)
    frame = frame_checksum(form.head(shape), tail, blank, note)
    done = canonical(note.to_json()).replace(note.frame.encode(), frame.encode())
    return tail.replace(blank, done), replace(note, frame=frame)


def frame_checksum(head: bytes, tail: bytes, noted: bytes, note: Note) -> str:
    """Checksum of all that is not rows, with the place of this checksum itself zero."""
    blank = noted.replace(note.frame.encode(), _FRAME_ZERO)
    return digest(head + tail.replace(noted, blank))


def own_note(file: Bytes, form: ShardFormat) -> Note:
    """What a shard says of itself, by its tail alone; nothing is checked.

    Raises:
        CorruptData: torn, or no shard.
    """
    return _note(_end(file, form), file.where)


def _end(file: Bytes, form: ShardFormat) -> bytes:
    """The note's bytes."""
    try:
        length = form.tail_bytes(file.read(max(file.size - 64, 0), file.size))
        return form.note(file.read(max(file.size - length, 0), file.size))
    except (*UNREADABLE, struct.error) as error:
        raise CorruptData(f"{file.where} is torn or was changed: {error}.") from error


def _note(data: bytes, where: str) -> Note:
    try:
        return Note.from_json(json.loads(data))
    except UNREADABLE as error:
        raise CorruptData(f"{where} is torn or was changed: its note cannot be read ({error}).") from error


def _compare(where: str, note: Note, blocks: list[str], frame: str) -> None:
    bad = [i for i, (a, b) in enumerate(zip(note.blocks, blocks, strict=False)) if a != b]
    if len(blocks) != len(note.blocks) or bad:
        rows = (
            f"rows {bad[0] * note.block_rows} to {min((bad[-1] + 1) * note.block_rows, note.rows) - 1}"
            if bad
            else "its rows"
        )
        raise CorruptData(f"{where} was changed: {rows} of the shard do not match their checksums.")
    if frame != note.frame:
        raise CorruptData(f"{where} was changed: the bytes around its rows do not match their checksum.")
