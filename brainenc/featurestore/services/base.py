"""What a remote place asks of an object store, and which client speaks to which.

A service works on keys below one root, raises what its client raises, and retries nothing: that is the place's affair.
Reads say so when bytes are missing (:class:`ShortRead`) or wrong (:class:`DamagedRead`), as far as the service tells.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from brainenc.errors import PlaceUnfit
from brainenc.featurestore.services.patience import Patience
from brainenc.redact import redact


class ShortRead(OSError):
    """Fewer bytes came than the object has, with no error from the client."""


class DamagedRead(OSError):
    """The bytes that came are not those that the service has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stat:
    """What a service knows of an object."""

    size: int
    """Bytes."""
    token: str | None
    """Mark of the call that created it, None where the service keeps no marks."""


class ObjectService(Protocol):
    """One root in an object store. ``limit`` is the time limit in seconds; keys are relative to the root."""

    atomic_create: bool
    """`put` and `put_file` refuse to replace, whoever else writes at that moment."""

    def put(self, key: str, data: bytes, token: str, limit: float, *, replace: bool = False) -> None:
        """Create an object, marked with ``token``. Raises ``FileExistsError`` when there is one, unless ``replace``."""
        ...

    def put_file(self, key: str, path: Path, token: str, limit: float, *, replace: bool = False) -> None:
        """The same with a local file's bytes, never held in memory as a whole."""
        ...

    def refuses(self, key: str, data: bytes, limit: float) -> bool:
        """Whether each way of creating refuses to replace ``key``, which holds ``data``: tried with the same bytes, so
        that nothing is lost where it does not."""
        ...

    def get(self, key: str, start: int, end: int | None, limit: float) -> bytes:
        """Bytes ``start`` to ``end``, fewer only where the object ends before."""
        ...

    def stat(self, key: str, limit: float) -> Stat | None:
        """None if there is no such object."""
        ...

    def entries(self, prefix: str, limit: float) -> Iterator[tuple[str, int]]:
        """Key and size of all objects whose keys begin with ``prefix``, in order; a limit for each page."""
        ...

    def folders(self, prefix: str, limit: float) -> list[str]:
        """Names directly below ``prefix`` (``""`` or ending in ``/``) that have something below them."""
        ...

    def delete(self, key: str, limit: float) -> None:
        """Remove an object; absent is fine."""
        ...


def refused(create: Callable[[str], None]) -> bool:
    """Whether a creation, handed a mark of its own, finds that the object exists."""
    try:
        create(secrets.token_hex(16))
    except FileExistsError:
        return True
    return False


_SERVICES = {
    "gs": ("brainenc.featurestore.services.gcs", "GcsService", "gcsfs", "gcs"),
    "gcs": ("brainenc.featurestore.services.gcs", "GcsService", "gcsfs", "gcs"),
    "s3": ("brainenc.featurestore.services.s3", "S3Service", "s3fs", "s3"),
    "s3a": ("brainenc.featurestore.services.s3", "S3Service", "s3fs", "s3"),
}
_GENERIC = ("brainenc.featurestore.services.generic", "FsspecService", "fsspec", "")


def connect(url: str, patience: Patience) -> ObjectService:
    """The service for a URL. Credentials come from the environment, as the client documents it.

    Raises:
        PlaceUnfit: the client is not installed, or there is none for this kind of URL.
    """
    scheme = urlsplit(url).scheme
    module, name, client, extra = _SERVICES.get(scheme, _GENERIC)
    try:
        service: ObjectService = getattr(importlib.import_module(module), name).open(url, patience)
    except ImportError as error:
        advice = f"pip install 'brainenc[{extra}]'" if extra else f"install the fsspec client for {scheme}://"
        raise PlaceUnfit(f"{redact(url)} needs {client}, which cannot be imported ({error}): {advice}.") from error
    except ValueError as error:
        raise PlaceUnfit(f"{redact(url)} cannot be opened: {redact(str(error))}") from None
    return service
