"""Amazon S3 and what speaks its protocol, through s3fs: creation with ``If-None-Match: *``.

s3fs's whole-object calls cannot mark an object as ours and name no checksum; its connection and credentials are used,
the requests are made here. Bodies carry a CRC32 that the server compares; our own hash of small objects lies in their
metadata, since S3 tells none that every client can check.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import s3fs
import xxhash
from fsspec.asyn import sync

from brainenc.featurestore.services.base import DamagedRead, ShortRead, Stat, refused
from brainenc.featurestore.services.patience import Patience

_TOKEN, _HASH = "brainenc-writer", "brainenc-xxh3"
_PART = 16 * 2**20  # S3 wants at least 5 MiB, and at most 10,000 parts: files up to 160 GB


class S3Service:
    """See :class:`~brainenc.featurestore.services.base.ObjectService`."""

    atomic_create = True

    def __init__(self, fs: Any, bucket: str, root: str) -> None:
        self._fs, self._bucket, self._root = fs, bucket, root

    @classmethod
    def open(cls, url: str, patience: Patience) -> S3Service:
        """Connect; ``AWS_ENDPOINT_URL`` names another server, keys may stand in the URL."""
        parts = urlsplit(url)
        config = {"connect_timeout": patience.connect_s, "read_timeout": patience.silence_s}
        keys = {"key": unquote(parts.username), "secret": unquote(parts.password or "")} if parts.username else {}
        fs = s3fs.S3FileSystem(config_kwargs=config, skip_instance_cache=True, use_listings_cache=False, **keys)
        root = parts.path.strip("/")
        return cls(fs, parts.netloc.rpartition("@")[2], f"{root}/" if root else "")

    def put(self, key: str, data: bytes, token: str, limit: float, *, replace: bool = False) -> None:
        """One request, refused by the server if the object exists or the checksum differs."""
        marks = {_TOKEN: token, _HASH: xxhash.xxh3_128_hexdigest(data)}
        with _conflicts():
            self._call(
                limit, "put_object", key, Body=data, Metadata=marks, ChecksumAlgorithm="CRC32", **_condition(replace)
            )

    def put_file(self, key: str, path: Path, token: str, limit: float, *, replace: bool = False) -> None:
        """Small files at once, larger ones in parts that become an object in the last request."""
        if path.stat().st_size <= _PART:
            return self.put(key, path.read_bytes(), token, limit, replace=replace)
        with open(path, "rb") as file:
            self._put_parts(key, iter(lambda: file.read(_PART), b""), token, limit, replace=replace)
        return None

    def refuses(self, key: str, data: bytes, limit: float) -> bool:
        """By one request and by parts: servers and older clients know the condition of the one and not of the other."""
        return refused(lambda token: self.put(key, data, token, limit)) and refused(
            lambda token: self._put_parts(key, (data,), token, limit, replace=False)
        )

    def _put_parts(self, key: str, pieces: Iterable[bytes], token: str, limit: float, *, replace: bool) -> None:
        begun = self._call(
            limit, "create_multipart_upload", key, Metadata={_TOKEN: token}, ChecksumAlgorithm="CRC32"
        )  # fmt: skip
        upload = {"UploadId": begun["UploadId"]}
        try:
            parts = [self._put_part(key, upload, number, part, limit) for number, part in enumerate(pieces, 1)]
            with _conflicts():
                self._call(
                    limit,
                    "complete_multipart_upload",
                    key,
                    **upload,
                    MultipartUpload={"Parts": parts},
                    **_condition(replace),
                )
        except FileNotFoundError:  # finished, its answer lost, and asked for again by the client: a new one will tell
            raise ShortRead(f"the upload of {key} is no longer known to the service") from None
        except BaseException:
            self._abandon(key, upload, limit)
            raise

    def _put_part(self, key: str, upload: dict[str, str], number: int, part: bytes, limit: float) -> dict[str, Any]:
        done = self._call(limit, "upload_part", key, **upload, PartNumber=number, Body=part, ChecksumAlgorithm="CRC32")
        return {"PartNumber": number, "ETag": done["ETag"]} | {k: done[k] for k in ("ChecksumCRC32",) if done.get(k)}

    def _abandon(self, key: str, upload: dict[str, str], limit: float) -> None:
        """Parts of an upload that never ends cost money until they are removed; failing to is not what failed."""
        try:
            self._call(limit, "abort_multipart_upload", key, **upload)
        except OSError:  # finished, or gone, or no answer: a lifecycle rule of the bucket has to
            return

    def get(self, key: str, start: int, end: int | None, limit: float) -> bytes:
        """Always as a range, because only then does the answer tell the object's length apart from the body's."""
        if end is not None and end <= start:
            return b""
        span = f"bytes={start}-{'' if end is None else end - 1}"
        answer: tuple[bytes, str, Mapping[str, str]]
        try:
            answer = sync(self._fs.loop, self._fetch, key, span, timeout=limit)
        except OSError as error:
            if "InvalidRange" in str(error.__cause__ or error):  # begins at or behind the end
                return b""
            raise
        data, said, marks = answer
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", said)
        if found and len(data) != int(found[2]) - int(found[1]) + 1:
            raise ShortRead(f"{key}: {len(data)} bytes came of {said}")
        whole = found is not None and len(data) == int(found[3])
        if whole and _HASH in marks and xxhash.xxh3_128_hexdigest(data) != marks[_HASH]:
            raise DamagedRead(
                f"{key}: the bytes that came do not have the hash {marks[_HASH]} that was stored with them"
            )
        return data

    async def _fetch(self, key: str, span: str) -> tuple[bytes, str, Mapping[str, str]]:
        answer = await self._fs._call_s3("get_object", Bucket=self._bucket, Key=self._root + key, Range=span)
        try:
            data = await answer["Body"].read()
        finally:
            answer["Body"].close()
        return data, answer.get("ContentRange", ""), answer.get("Metadata", {})

    def stat(self, key: str, limit: float) -> Stat | None:
        """Asks the service, never a listing."""
        try:
            found = self._call(limit, "head_object", key)
        except FileNotFoundError:
            return None
        return Stat(size=int(found["ContentLength"]), token=found.get("Metadata", {}).get(_TOKEN))

    def entries(self, prefix: str, limit: float) -> Iterator[tuple[str, int]]:
        """Page by page."""
        for page in self._pages(limit, Prefix=self._root + prefix):
            for item in page.get("Contents", ()):
                yield item["Key"][len(self._root) :], int(item["Size"])

    def folders(self, prefix: str, limit: float) -> list[str]:
        """By the delimiter of the service, which does not descend."""
        full = self._root + prefix
        pages = self._pages(limit, Prefix=full, Delimiter="/")
        return sorted(
            entry["Prefix"][len(full) :].strip("/") for page in pages for entry in page.get("CommonPrefixes", ())
        )

    def delete(self, key: str, limit: float) -> None:
        """S3 answers the same whether the object was there or not."""
        self._call(limit, "delete_object", key)

    def _pages(self, limit: float, **query: Any) -> Iterator[dict[str, Any]]:
        while True:
            page: dict[str, Any] = sync(
                self._fs.loop, self._fs._call_s3, "list_objects_v2", Bucket=self._bucket, timeout=limit, **query
            )
            yield page
            if not page.get("IsTruncated"):
                return
            query["ContinuationToken"] = page["NextContinuationToken"]

    def _call(self, limit: float, method: str, key: str, **request: Any) -> dict[str, Any]:
        answer: dict[str, Any] = sync(
            self._fs.loop,
            self._fs._call_s3,
            method,
            Bucket=self._bucket,
            Key=self._root + key,
            timeout=limit,
            **request,
        )
        return answer


def _condition(replace: bool) -> dict[str, str]:
    return {} if replace else {"IfNoneMatch": "*"}


class _conflicts:
    """Gives a refused condition one name, whichever way the client tells it."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is not None and "PreconditionFailed" in f"{error} {error.__cause__}":
            raise FileExistsError(str(error)) from None
