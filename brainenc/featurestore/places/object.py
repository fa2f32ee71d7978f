"""A store in an object store: whole objects up, created only if absent; whole objects or ranges down."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from brainenc.errors import PlaceUnfit
from brainenc.featurestore.places.base import Capabilities, Entry, check_name
from brainenc.featurestore.places.scratch import Scratch
from brainenc.featurestore.services.base import ObjectService, Stat, connect
from brainenc.featurestore.services.patience import Patience
from brainenc.redact import redact

_COMPARED = 8 * 2**20
_Names = list[str]  # inside the class `list` is the method


class ObjectPlace:
    """Any fsspec URL as a :class:`~brainenc.featurestore.places.base.Place`; driver and workers, any thread.

    Creation is conditional at the service. When the answer to it is lost, the client's retry is refused by our own
    object; a mark in the object's metadata, or its bytes where there are no marks, tells whose it is.

    Args:
        url: address, credentials and all. Only pickling carries it on; ``url`` of the object is without them.
        patience: time limits.
        service: what to speak through; by default what the URL says, connected at the first call.
    """

    def __init__(self, url: str, *, patience: Patience | None = None, service: ObjectService | None = None) -> None:
        self._address = url.rstrip("/")
        self.url = redact(self._address)
        self._patience = patience or Patience()
        self._service, self._pid = service, os.getpid()
        self._given = service is not None
        self._lock = threading.Lock()
        self._proven = False
        self._scratch = Scratch(self.url)
        self.can = Capabilities(
            atomic_create=self._connected().atomic_create, real_flush=True, shared_locks=False, fresh_listing=True,
            mappable=False,
        )  # fmt: skip

    @classmethod
    def open(cls, url: str, *, create: bool = False) -> ObjectPlace:
        """Open an address. Folders need no making in an object store; the bucket must be there.

        Raises:
            PlaceUnfit: no client for this kind of URL, or one without conditional creation is to be written to.
        """
        place = cls(url)
        if create:
            place._check_writable()
        return place

    def __reduce__(self) -> tuple[Any, ...]:
        if self._given:
            raise TypeError("a place with a service handed to it does not pickle")
        return ObjectPlace, (self._address,)

    def __repr__(self) -> str:
        return f"ObjectPlace({self.url!r})"

    # ---- reading

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """See :meth:`~brainenc.featurestore.places.base.Place.read`. Whole objects are compared with their checksum."""
        service = self._connected()
        expected = (end - start) if end is not None else 0
        what = f"Reading {self._at(name)}"
        try:
            return self._patience.call(
                what, lambda limit: service.get(check_name(name), start, end, limit), n_bytes=expected
            )
        except FileNotFoundError:
            raise FileNotFoundError(f"{self._at(name)} does not exist.") from None

    def size(self, name: str) -> int | None:
        """See :meth:`~brainenc.featurestore.places.base.Place.size`."""
        found = self._stat(name)
        return None if found is None else found.size

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See :meth:`~brainenc.featurestore.places.base.Place.list`. Names that no store has are left out."""
        service = self._connected()
        keys = self._patience.call(f"Listing {self._at(prefix)}", lambda limit: [*service.entries(prefix, limit)])
        for key, size in keys:
            if _is_name(key):
                yield Entry(name=key, size=size)

    def folders(self, prefix: str = "") -> _Names:
        """See :meth:`~brainenc.featurestore.places.base.Place.folders`."""
        service = self._connected()
        found = self._patience.call(f"Listing {self._at(prefix)}", lambda limit: service.folders(prefix, limit))
        return [name for name in found if _is_name(name)]

    def local(self, name: str) -> None:
        """Never: objects are staged in the cache or read by ranges."""
        check_name(name)

    # ---- writing

    def create(self, name: str, data: bytes) -> bool:
        """See :meth:`~brainenc.featurestore.places.base.Place.create`."""
        self._check_writable()
        service, token = self._connected(), secrets.token_hex(16)
        what = f"Creating {self._at(name)}"
        try:
            self._patience.call(
                what, lambda limit: service.put(check_name(name), data, token, limit), n_bytes=len(data)
            )
        except FileExistsError:
            return self._holds(name, data)
        self._prove(name, data)
        return True

    def publish(self, partial: Path, name: str) -> bool:
        """See :meth:`~brainenc.featurestore.places.base.Place.publish`."""
        self._check_writable()
        service, token, tries = self._connected(), secrets.token_hex(16), [0]

        def upload(limit: float) -> None:
            tries[0] += 1
            service.put_file(check_name(name), partial, token, limit)

        try:
            self._patience.call(f"Uploading {self._at(name)}", upload, n_bytes=partial.stat().st_size)
        except FileExistsError:
            if not self._ours(name, partial, token, maybe=tries[0] > 1):
                return False
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Create an object or replace the one that is there. Nothing in a store is ever replaced; run folders are."""
        service = self._connected()
        self._patience.call(
            f"Writing {self._at(name)}",
            lambda limit: service.put(check_name(name), data, secrets.token_hex(16), limit, replace=True),
            n_bytes=len(data),
        )

    def replace_file(self, name: str, path: Path) -> None:
        """The same with a local file's bytes; the file stays."""
        service = self._connected()
        self._patience.call(
            f"Uploading {self._at(name)}",
            lambda limit: service.put_file(check_name(name), path, secrets.token_hex(16), limit, replace=True),
            n_bytes=path.stat().st_size,
        )

    def partial(self, name: str) -> Path:
        """See :meth:`~brainenc.featurestore.places.base.Place.partial`: on local disk, in the cache folder."""
        return self._scratch.partial(check_name(name))

    def partials(self, prefix: str = "") -> Iterator[Path]:
        """See :meth:`~brainenc.featurestore.places.base.Place.partials`: those on this machine."""
        return self._scratch.partials(prefix)

    def delete(self, name: str) -> None:
        """See :meth:`~brainenc.featurestore.places.base.Place.delete`."""
        service = self._connected()
        self._patience.call(f"Removing {self._at(name)}", lambda limit: service.delete(check_name(name), limit))

    # ---- inside

    def _connected(self) -> ObjectService:
        """The service of this process: a connection does not survive a fork."""
        if self._pid != os.getpid() and not self._given:  # the lock, too: another thread may have held it at the fork
            self._lock, self._service, self._pid = threading.Lock(), None, os.getpid()
        with self._lock:
            if self._service is None:
                with self._patience.noticed(f"Connecting to {self.url}"):
                    self._service = connect(self._address, self._patience)
            return self._service

    def _stat(self, name: str) -> Stat | None:
        service = self._connected()
        return self._patience.call(f"Looking at {self._at(name)}", lambda limit: service.stat(check_name(name), limit))

    def _holds(self, name: str, data: bytes) -> bool:
        """Whether the object that refused ours has the same bytes: then it is ours, or as good."""
        try:
            return self.size(name) == len(data) and self.read(name) == data
        except FileNotFoundError:  # deleted in between: nobody's now
            return False

    def _ours(self, name: str, partial: Path, token: str, *, maybe: bool) -> bool:
        """Whether the object that refused ours came from a try of this call, whose answer was lost."""
        found = self._stat(name)
        if found is None or found.size != partial.stat().st_size:
            return False
        if found.token is not None:
            return found.token == token
        return maybe and self._same_bytes(name, partial, found.size)

    def _same_bytes(self, name: str, partial: Path, size: int) -> bool:
        with open(partial, "rb") as file:
            return all(
                self.read(name, start, min(start + _COMPARED, size)) == file.read(_COMPARED)
                for start in range(0, size, _COMPARED)
            )

    def _prove(self, name: str, data: bytes) -> None:
        """Once: the same creation again must be refused. A server that ignores conditions would lose rows later.

        It does no harm where it is not refused, because the bytes are the same.
        """
        if self._proven:
            return
        service = self._connected()
        if not self._patience.call(f"Probing {self.url}", lambda limit: service.refuses(name, data, limit)):
            raise PlaceUnfit(
                f"{self.url} ignores the condition 'only if absent': an object was created twice. Two writers would "
                "overwrite each other there. Use a service that honours ifGenerationMatch (GCS) or If-None-Match (S3, "
                "uploads in parts included), through an s3fs and a botocore that are new enough to send it."
            )
        self._proven = True

    def _check_writable(self) -> None:
        if not self.can.atomic_create:
            raise PlaceUnfit(
                f"{self.url} can be read but not written: its client knows no creation that fails if the object "
                "exists. Write to a folder, gs:// or s3://, and copy the files from there."
            )

    def _at(self, name: str) -> str:
        return f"{self.url}/{name}".rstrip("/")


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except ValueError:
        return False
    return True
