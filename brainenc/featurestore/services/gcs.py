"""Google Cloud Storage through gcsfs: creation with ``ifGenerationMatch=0``, checksums both ways.

gcsfs's own whole-object calls are not enough: they send no checksum with an upload, check none on a read, cannot mark
an object as ours when the answer to its creation is lost, and hold a part of 50 MiB. Its connection, credentials and
request are used; the requests are made here.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import gcsfs
import google_crc32c
from fsspec.asyn import sync

from brainenc.featurestore.services.base import DamagedRead, ShortRead, Stat, refused
from brainenc.featurestore.services.patience import Patience

_TOKEN = "brainenc-writer"
_PART = 16 * 2**20
_BINARY = "application/octet-stream"

logging.getLogger("gcsfs").addHandler(logging.NullHandler())  # else its retries print tracebacks that are no news


class _Body(io.BytesIO):
    """A request's body that survives being sent: aiohttp closes what it sent, and gcsfs may have to send it again."""

    def close(self) -> None:
        """Left to the garbage collector."""


class _Crc32c:
    """The checksum that GCS compares, as it writes it: base64 of four big-endian bytes."""

    def __init__(self, data: bytes = b"") -> None:
        self._value = int(google_crc32c.value(data))

    def update(self, data: bytes) -> None:
        self._value = int(google_crc32c.extend(self._value, data))

    def text(self) -> str:
        return base64.b64encode(self._value.to_bytes(4, "big")).decode()


class GcsService:
    """See :class:`~brainenc.featurestore.services.base.ObjectService`."""

    atomic_create = True

    def __init__(self, fs: Any, bucket: str, root: str) -> None:
        self._fs, self._bucket, self._root = fs, bucket, root

    @classmethod
    def open(cls, url: str, patience: Patience) -> GcsService:
        """Connect; ``STORAGE_EMULATOR_HOST`` names an emulator, which is spoken to without credentials."""
        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
        options: dict[str, Any] = {}
        if emulator:
            options = {"endpoint_url": emulator if "://" in emulator else f"http://{emulator}", "token": "anon"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=patience.connect_s, sock_read=patience.silence_s)
        fs = gcsfs.core.GCSFileSystem(
            requests_timeout=timeout, skip_instance_cache=True, use_listings_cache=False, **options
        )
        bucket, _, root = url.split("://", 1)[1].partition("/")
        return cls(fs, bucket, f"{root.strip('/')}/" if root.strip("/") else "")

    def put(self, key: str, data: bytes, token: str, limit: float, *, replace: bool = False) -> None:
        """One request whose boundary cannot occur in the data by chance, with the checksum that the server compares."""
        meta = self._meta(key, token, _Crc32c(data))
        boundary = secrets.token_hex(16)
        head = f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(meta)}\r\n"
        body = b"".join(
            (
                head.encode(),
                f"--{boundary}\r\nContent-Type: {_BINARY}\r\n\r\n".encode(),
                data,
                f"\r\n--{boundary}--\r\n".encode(),
            )
        )
        self._call(
            limit, "POST", self._upload_url(), uploadType="multipart", **_condition(replace), data=_Body(body),
            headers={"Content-Type": f"multipart/related; boundary={boundary}"},
        )  # fmt: skip

    def put_file(self, key: str, path: Path, token: str, limit: float, *, replace: bool = False) -> None:
        """A resumable upload in parts: a part that fails is asked for and sent again, not the file."""
        size = path.stat().st_size
        if size == 0:
            return self.put(key, b"", token, limit, replace=replace)
        checksum = _Crc32c()
        with open(path, "rb") as file:
            while part := file.read(_PART):
                checksum.update(part)
            location, sent = self._start(key, token, checksum, limit, replace), 0
            while sent < size:
                file.seek(sent)
                before, sent = sent, self._send_part(location, file.read(_PART), sent, size, limit)
                if sent <= before:
                    raise ShortRead(f"{key}: the upload does not advance beyond byte {sent}")
        return None

    def refuses(self, key: str, data: bytes, limit: float) -> bool:
        """By the one request; the service compares the same generation at the end of an upload in parts."""
        return refused(lambda token: self.put(key, data, token, limit))

    def _start(self, key: str, token: str, checksum: _Crc32c, limit: float, replace: bool) -> str:
        """Begin a resumable upload; returns where its parts go."""
        where = f"{self._upload_url()}?name={quote(self._root + key, safe='')}"
        headers, _ = self._call(
            limit, "POST", where, uploadType="resumable", **_condition(replace), json=self._meta(key, token, checksum),
            headers={"X-Upload-Content-Type": _BINARY},
        )  # fmt: skip
        return headers["Location"]

    def _send_part(self, location: str, part: bytes, start: int, size: int, limit: float) -> int:
        """Send one part; returns how many bytes of the file the server has now."""
        span = f"bytes {start}-{start + len(part) - 1}/{size}"
        try:
            headers, answer = self._call(limit, "PUT", location, headers={"Content-Range": span}, data=_Body(part))
        except (FileNotFoundError, gcsfs.retry.HttpError) as error:
            if isinstance(error, gcsfs.retry.HttpError) and str(error.code) != "410":
                raise
            # Finished, its answer lost and forgotten since, or lost altogether: a new upload will tell.
            raise ShortRead(f"the upload of {size} bytes is no longer known to the service") from None
        if answer and b"storage#object" in answer:
            return size
        kept = re.fullmatch(r"bytes=0-(\d+)", headers.get("Range", ""))
        return int(kept[1]) + 1 if kept else 0

    def get(self, key: str, start: int, end: int | None, limit: float) -> bytes:
        """Compare length and, for a whole object, CRC32C with what the server says of it."""
        if end is not None and end <= start:
            return b""
        ranged = start > 0 or end is not None
        span = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if ranged else {}
        try:
            headers, data = self._call(
                limit, "GET", "b/{}/o/{}", self._bucket, self._root + key, alt="media", headers=span
            )
        except gcsfs.retry.HttpError as error:
            if str(error.code) == "416":  # begins at or behind the end
                return b""
            raise
        _check_body(key, data, headers, ranged)
        return bytes(data)

    def stat(self, key: str, limit: float) -> Stat | None:
        """Asks the service, never a listing."""
        try:
            found = self._json(limit, "b/{}/o/{}", self._bucket, self._root + key, fields="size,metadata")
        except FileNotFoundError:
            return None
        return Stat(size=int(found["size"]), token=found.get("metadata", {}).get(_TOKEN))

    def entries(self, prefix: str, limit: float) -> Iterator[tuple[str, int]]:
        """Page by page."""
        for page in self._pages(limit, prefix=self._root + prefix, fields="nextPageToken,items(name,size)"):
            for item in page.get("items", ()):
                yield item["name"][len(self._root) :], int(item["size"])

    def folders(self, prefix: str, limit: float) -> list[str]:
        """By the delimiter of the service, which does not descend."""
        full = self._root + prefix
        pages = self._pages(limit, prefix=full, delimiter="/", fields="nextPageToken,prefixes")
        return sorted(name[len(full) :].strip("/") for page in pages for name in page.get("prefixes", ()))

    def delete(self, key: str, limit: float) -> None:
        """A lost answer looks like an absent object, and is as good."""
        try:
            self._call(limit, "DELETE", "b/{}/o/{}", self._bucket, self._root + key)
        except FileNotFoundError:
            return

    def _pages(self, limit: float, **query: Any) -> Iterator[dict[str, Any]]:
        token: str | None = None
        while True:
            page = self._json(limit, "b/{}/o", self._bucket, pageToken=token, **query)
            yield page
            token = page.get("nextPageToken")
            if token is None:
                return

    def _meta(self, key: str, token: str, checksum: _Crc32c) -> dict[str, Any]:
        return {
            "name": self._root + key,
            "contentType": _BINARY,
            "crc32c": checksum.text(),
            "metadata": {_TOKEN: token},
        }

    def _upload_url(self) -> str:
        return f"{self._fs._location}/upload/storage/v1/b/{quote(self._bucket)}/o"

    def _json(self, limit: float, path: str, *names: str, **query: Any) -> dict[str, Any]:
        _, body = self._call(limit, "GET", path, *names, **query)
        document: dict[str, Any] = json.loads(body)
        return document

    def _call(
        self, limit: float, method: str, path: str, *names: str, **request: Any
    ) -> tuple[Mapping[str, str], bytes]:
        answer: tuple[Mapping[str, str], bytes] = sync(
            self._fs.loop, self._fs._call, method, path, *names, timeout=limit, **request
        )
        return answer


def _condition(replace: bool) -> dict[str, str]:
    return {} if replace else {"ifGenerationMatch": "0"}


def _check_body(key: str, data: bytes, headers: Mapping[str, str], ranged: bool) -> None:
    if ranged:
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(?:\d+|\*)", headers.get("Content-Range", ""))
        want = int(span[2]) - int(span[1]) + 1 if span else None
    else:
        want = int(headers["X-Goog-Stored-Content-Length"]) if "X-Goog-Stored-Content-Length" in headers else None
    if want is not None and len(data) != want:
        raise ShortRead(f"{key}: {len(data)} bytes came of {want}")
    said = re.search(r"crc32c=([A-Za-z0-9+/=]+)", headers.get("X-Goog-Hash", ""))
    if ranged or said is None:
        return
    have = _Crc32c(data).text()
    if have != said[1]:
        raise DamagedRead(f"{key}: the bytes that came have CRC32C {have}, the object {said[1]}")
