"""xxh3-128, per block of whole rows and of whole files, as lower-case hexadecimal text."""

from __future__ import annotations

import xxhash

BLOCK_BYTES = 1 << 20
"""A block has as many whole rows as it takes to reach this: 16 bytes of checksum guard at least a mebibyte."""

Buffer = bytes | bytearray | memoryview


def digest(data: Buffer) -> str:
    """xxh3-128 of some bytes."""
    return str(xxhash.xxh3_128_hexdigest(data))


def rows_per_block(row_bytes: int) -> int:
    """Rows in one block: the fewest that reach a mebibyte."""
    return max(1, -(-BLOCK_BYTES // max(row_bytes, 1)))


class BlockHasher:
    """Checksums of consecutive blocks of a stream that comes in pieces of any size."""

    def __init__(self, block_bytes: int) -> None:
        self._block, self._room, self._hash = block_bytes, block_bytes, xxhash.xxh3_128()
        self._done: list[str] = []

    def update(self, data: Buffer) -> None:
        """Take the next piece of the stream."""
        view = memoryview(data).cast("B")
        while len(view):
            part, view = view[: self._room], view[self._room :]
            self._hash.update(part)
            self._room -= len(part)
            if self._room == 0:
                self._finish_block()

    def digests(self) -> list[str]:
        """Checksums of all blocks so far; a last, shorter block counts as one."""
        if self._room < self._block:
            self._finish_block()
        return list(self._done)

    def _finish_block(self) -> None:
        self._done.append(self._hash.hexdigest())
        self._hash, self._room = xxhash.xxh3_128(), self._block
