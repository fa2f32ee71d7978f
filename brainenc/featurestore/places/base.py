"""What a store needs of the place it lies in: a handful of calls, and an honest word about what they are worth.

A *place* is a folder, a mounted drive or an object store. Everything above this module speaks to it through
:class:`Place` alone, and asks :class:`Capabilities` before it relies on anything. Nothing in a store is ever
overwritten, so that a place needs no replace, no append and no rename of what others may see.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from brainenc.errors import UsageError

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What a place can do, probed or known at open; what it cannot do is refused or worked around, never hoped for."""

    atomic_create: bool
    """Of two writers that create the same name exactly one is told that it won."""
    real_flush: bool
    """What `create` and `publish` have returned for survives a power cut; False: it is handed over, not confirmed."""
    shared_locks: bool
    """`flock` is seen by everybody who may write here, so that an unlocked partial belongs to a dead writer."""
    fresh_listing: bool
    """A listing shows what others created a moment ago; False: names must be probed one by one."""
    mappable: bool
    """Files may be memory-mapped in place. Never true of a mount: an I/O error under a map is a SIGBUS."""
    readable: bool = False
    """Files that may not be mapped can be read in place all the same, so that a cache of copies gains nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One file or object of a listing."""

    name: str
    """Its name in the store, a POSIX path."""
    size: int
    """Its bytes."""


class Place(Protocol):
    """Where a store lies. Names are POSIX paths relative to the store's root (see :func:`check_name`).

    Every method may be called from several threads. A place pickles as its address and opens anew elsewhere.
    Failures other than those named are :class:`~brainenc.errors.TransferFailed` (remote) or plain ``OSError`` (local).
    """

    url: str
    """The address, without credentials: safe in messages, manifests and logs."""
    can: Capabilities

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes ``start`` to ``end`` of a file; never fewer than asked for, unless the file ends before.

        Raises:
            FileNotFoundError: there is no such file.
            TransferFailed: it could not be read in all tries.
        """
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is none. Probes the name itself, not a listing."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Create a small file; durable on return (as far as ``can.real_flush`` goes).

        Returns:
            True if the file holds ``data`` now, whoever wrote it (a lost answer is settled by comparing bytes);
            False if other bytes are there already.
        """
        ...

    def publish(self, partial: Path, name: str) -> bool:
        """Give a finished, flushed local file its public name, never overwriting; durable on return.

        ``partial`` came from :meth:`partial`. It is gone afterwards if True is returned, else left to the caller.

        Returns:
            True if ``name`` now has these bytes through this call (or a lost answer to it), False if it was taken.
        """
        ...

    def partial(self, name: str) -> Path:
        """A private local path to write the bytes of ``name`` to before publishing: on the same file system where
        publishing is a link. Its folder exists. The writer opens it exclusively and holds ``flock`` on it."""
        ...

    def partials(self, prefix: str = "") -> Iterator[Path]:
        """Partials of all writers, dead or alive, whose final names would begin with ``prefix``."""
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every file whose name begins with ``prefix`` (any text, as on object stores: ``a/b/c/manifest-`` lists the
        manifests of ``a/b/c`` without looking at its shards), in order of names; no partials."""
        ...

    def folders(self, prefix: str = "") -> Sequence[str]:
        """Names of the folders directly below ``prefix``, sorted, without descending into them."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file; absent is fine. Never truncates: whoever has it mapped goes on reading."""
        ...

    def local(self, name: str) -> Path | None:
        """Where the file can be memory-mapped (``can.mappable``) or read (``can.readable``); None: neither."""
        ...


@runtime_checkable
class Doubting(Protocol):
    """A place without a real flush, that remembers what has been seen to arrive."""

    def doubtful(self, name: str) -> bool:
        """Whether an earlier session handed this file over, and nobody has read it back since."""
        ...

    def confirm(self, names: Iterable[str]) -> None:
        """These were read back, whole and right."""
        ...


@runtime_checkable
class Refreshing(Protocol):
    """A place that may remember of a folder what was there a minute ago."""

    def refresh(self, folder: str) -> None:
        """Have the next look into this folder ask the server. As good as it can be done: no error if it cannot."""
        ...


class ShardCache(Protocol):
    """Whole files of places that cannot be mapped, verified, in a bounded local folder (``featurestore/cache.py``)."""

    budget: int
    """Bytes that all copies together may take."""

    def fetch(self, place: Place, name: str, *, size: int, check: Callable[[Path], None]) -> Path:
        """A local copy of ``name`` that ``check`` has accepted.

        The copy may be evicted (unlinked) any time later: open or map it at once, fetch again when it is gone.

        Args:
            place: where the file lies.
            name: its name there.
            size: its bytes.
            check: raises :class:`~brainenc.errors.CorruptData` when the copy's bytes are wrong; the copy is then
                dropped and fetched anew, a few times.

        Raises:
            CacheTooSmall: ``size`` is above the budget.
            CorruptData: wrong in all tries.
            TransferFailed: it could not be fetched.
            NoSpace: the local disk is full.
        """
        ...


def check_name(name: str) -> str:
    """Return ``name`` if it is a plain relative POSIX path, so that nothing is read or written outside the store.

    Raises:
        UsageError: empty, absolute, with ``..``, a hidden part or a character that not every place has.
    """
    if not name or not all(_PART.fullmatch(part) for part in name.split("/")):
        raise UsageError(
            f"{name!r} is not a name inside a store: its parts, separated by '/', begin with a letter, digit or '_' "
            "and hold letters, digits and . _ + = - only."
        )
    return name
