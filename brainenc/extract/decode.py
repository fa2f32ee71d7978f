"""Decodes images ahead of the model, in order and never further than asked. Worker only; threads inside."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from brainenc.extract.donors import Donation


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """One image, ready for the model, or why it is not."""

    row: int
    uri: str
    pixels: torch.Tensor | None
    """(3, H, W) float32."""
    content_hash: str
    """Of the bytes that were decoded; empty when they could not even be read."""
    problem: str = ""
    donation: Donation | None = None
    """The store has this image's rows already; there are no pixels then."""


class DecodeAhead:
    """A pool of threads that keeps a bounded number of images decoded beyond the consumer.

    Args:
        threads: size of the pool.
    """

    def __init__(self, *, threads: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode")

    def images(
        self, decode: Callable[[int, str], Decoded], rows: Sequence[int], uris: Sequence[str], *, ahead: int
    ) -> Generator[Decoded]:
        """Decode in order. Leaving the iterator early cancels what has not begun.

        Args:
            decode: (row, uri) -> :class:`Decoded`; called in the pool's threads; returns problems of the image, raises
                what is none: no memory (then they go on one by one), a place that does not answer.
            rows: row of each image.
            uris: where each lies.
            ahead: images that may be decoded, or in decoding, before they are asked for.
        """
        todo = iter(zip(rows, uris, strict=True))
        waiting: deque[tuple[tuple[int, str], Future[Decoded]]] = deque()

        def fill() -> None:
            for item in islice(todo, max(0, ahead - len(waiting))):
                waiting.append((item, self._pool.submit(decode, *item)))

        ahead = max(1, ahead)
        fill()
        try:
            while waiting:
                item, future = waiting.popleft()
                try:
                    image = future.result()
                except MemoryError:  # those decoded ahead are in the way: go on one by one
                    ahead = 1
                    image = decode(*item)
                fill()
                yield image
        finally:
            for _, future in waiting:
                future.cancel()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def batches(images: Iterable[Decoded], size: int) -> Iterator[list[Decoded]]:
    """Groups of ``size``, the last one short."""
    rest = iter(images)
    while batch := list(islice(rest, size)):
        yield batch
