"""Reads one image by its URI: a local path, a URL, or a row of an HDF5 brick. Worker and driver; thread-safe.

What passes by itself (a server that is busy, a mount that hangs) is tried again for a while, and then told as
:class:`~brainenc.errors.TransferFailed`. That says nothing about the image, other than an absent file does.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import unquote

import xxhash

from brainenc.errors import BadImages, DataError
from brainenc.featurestore.services.patience import Patience
from brainenc.redact import redact

_ROW = re.compile(r"(?P<file>.+)::imgBrick\[(?P<row>\d+)\]")
_KEYS_AS_OPTIONS = ("s3", "s3a")  # clients that do not take them from a URL by themselves
_hdf5_lock = threading.Lock()  # HDF5 itself is not thread-safe
REMOTE = Patience()
"""With URLs."""
LOCAL = Patience(deadline_s=20.0)
"""With local paths: of a mount like Google Drive's, errors pass as those of its service do."""
T = TypeVar("T")


def is_url(location: str) -> bool:
    """Whether fsspec has to fetch it."""
    return "://" in location


def absolute(location: str) -> str:
    """For processes that start in another folder, as a cluster's workers do: a local path in full, a URL as it is."""
    return location if is_url(location) else os.path.abspath(location)


def absolute_backbone(name: str) -> str:
    """The same of a backbone, where it, or what stands behind a preset's ``@``, is a folder here."""
    preset, at, folder = name.rpartition("@")
    return f"{preset}{at}{os.path.abspath(folder)}" if os.path.isdir(folder) else name


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec file system, path within it). Credentials come from the environment or the URL, as for stores."""
    import fsspec

    keys: dict[str, str] = {}
    scheme, user, rest = _parts(url)
    if user and scheme in _KEYS_AS_OPTIONS:
        name, _, secret = user.partition(":")
        keys, url = {"key": unquote(name), "secret": unquote(secret)}, f"{scheme}://{rest}"
    return fsspec.core.url_to_fs(url, **keys)  # type: ignore[no-any-return]


def url_beside(url: str, path: str) -> str:
    """The URL of a path that the file system of another URL has listed, with the keys of that."""
    if "://" in path:  # as HTTP lists them
        return path
    scheme, user, _ = _parts(url)
    front = f"{user}@" if user and scheme in _KEYS_AS_OPTIONS else ""
    return path if scheme == "file" else f"{scheme}://{front}{path.lstrip('/')}"


def _parts(url: str) -> tuple[str, str, str]:
    """(scheme, user information, the rest); keys of objects may hold what elsewhere begins a query or a fragment."""
    scheme, _, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    user, _, place = place.rpartition("@")
    return scheme, user, f"{place}{slash}{path}"


def hdf5_uri(file: str, row: int) -> str:
    """URI of one row of ``imgBrick``."""
    return f"{file}::imgBrick[{row}]"


@functools.lru_cache(maxsize=4)
def hdf5_dataset(file: str) -> Any:
    """``imgBrick`` of an HDF5 file, kept open. h5py is an extra that only this needs.

    Raises:
        DataError: h5py is missing, or the file has no ``imgBrick``.
    """
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"Reading {file} needs h5py: pip install 'brainenc[nsd]'.") from error
    try:
        if is_url(file):
            fs, path = filesystem(file)
            handle = h5py.File(REMOTE.call(f"Opening {redact(file)}", lambda limit: fs.open(path, "rb")), "r")
        else:
            handle = h5py.File(file, "r")
    except OSError as error:
        raise DataError(f"{file} is no HDF5 file that can be read: {error}.") from (None if is_url(file) else error)
    if "imgBrick" not in handle:
        raise DataError(f"{file} has no imgBrick, but {', '.join(handle) or 'nothing'}. Is it nsd_stimuli.hdf5?")
    return handle["imgBrick"]


def read_pixels(uri: str) -> Any | None:
    """The (height, width, 3) uint8 array of an HDF5 row; None when the URI is a file.

    Raises:
        BadImages: the row is there, and damaged.
        FileNotFoundError: the brick has no such row.
        DataError: the file is no brick, or cannot be opened.
        TransferFailed: it could not be read in all tries.
    """
    match = _ROW.fullmatch(uri)
    if match is None:
        return None
    file, row = match["file"], int(match["row"])
    with _hdf5_lock:
        brick = hdf5_dataset(file)
        if row >= len(brick):
            raise FileNotFoundError(f"{file} has {len(brick)} images, so none in row {row}.")
        return _patiently(uri, lambda limit: _row(brick, row, uri))


def read_bytes(uri: str) -> bytes:
    """The bytes of an image: the file as it is, or the pixels of an HDF5 row.

    Raises:
        FileNotFoundError: there is no such file.
        TransferFailed: it could not be read in all tries, which says nothing about the image.
        BadImages, DataError: as :func:`read_pixels`.
    """
    pixels = read_pixels(uri)
    if pixels is not None:
        return bytes(pixels.tobytes())
    return _patiently(uri, lambda limit: _file(uri, limit))


def _patiently(uri: str, read: Callable[[float], T]) -> T:
    patience = REMOTE if is_url(uri) else LOCAL
    if not is_url(uri):
        try:
            return read(patience.limit())  # nearly always: what watches over tries costs a thread for each image
        except FileNotFoundError:
            raise
        except OSError:
            pass  # tried again, and told if that does not help
    return patience.call(f"Reading {redact(uri)}", read)


def _file(uri: str, limit: float) -> bytes:
    try:
        if is_url(uri):
            return _fetch(uri, limit)
        with open(uri, "rb") as file:
            return file.read()
    except (IsADirectoryError, NotADirectoryError) as error:  # answers, too: another try gives the same
        raise FileNotFoundError(f"{redact(uri)} is no file: {redact(str(error))}") from None
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"no memory to read {redact(uri)}") from None
        raise


def _fetch(uri: str, limit: float) -> bytes:
    """Where the client can be interrupted, no longer than the limit: a server that hangs must not hold a worker."""
    from fsspec.asyn import AsyncFileSystem, sync

    fs, path = filesystem(uri)
    if isinstance(fs, AsyncFileSystem):
        return bytes(sync(fs.loop, fs._cat_file, path, timeout=limit))
    return bytes(fs.cat_file(path))


def _row(brick: Any, row: int, uri: str) -> Any:
    try:
        return brick[row]
    except OSError as error:
        if "filter returned failure" in str(error):  # its bytes came, and do not decompress or have another checksum
            raise BadImages({uri: f"damaged: {error}"}) from None
        raise


def image_from_pixels(pixels: Any) -> Any:
    """A PIL image of an HDF5 row."""
    from PIL import Image

    return Image.fromarray(pixels)


def content_hash(data: bytes) -> str:
    """xxh3-128 in hex, as kept in receipts."""
    return xxhash.xxh3_128_hexdigest(data)
