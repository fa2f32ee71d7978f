"""Reads one image by its URI: a local path, a URL, or a row of an HDF5 brick. Worker and driver; thread-safe."""

from __future__ import annotations

import functools
import re
import threading
from typing import Any

import xxhash

from brainenc.errors import DataError

_ROW = re.compile(r"(?P<file>.+)::imgBrick\[(?P<row>\d+)\]")
_hdf5_lock = threading.Lock()  # HDF5 itself is not thread-safe


def is_url(location: str) -> bool:
    """Whether fsspec has to fetch it."""
    return "://" in location


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec file system, path within it). Credentials come from the environment, as every fsspec user has them."""
    import fsspec

    return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]


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
            handle = h5py.File(fs.open(path, "rb"), "r")
        else:
            handle = h5py.File(file, "r")
    except OSError as error:
        raise DataError(f"{file} is no HDF5 file that can be read: {error}.") from error
    if "imgBrick" not in handle:
        raise DataError(f"{file} has no imgBrick, but {', '.join(handle) or 'nothing'}. Is it nsd_stimuli.hdf5?")
    return handle["imgBrick"]


def read_pixels(uri: str) -> Any | None:
    """The (height, width, 3) uint8 array of an HDF5 row; None when the URI is a file."""
    match = _ROW.fullmatch(uri)
    if match is None:
        return None
    with _hdf5_lock:
        return hdf5_dataset(match["file"])[int(match["row"])]


def read_bytes(uri: str) -> bytes:
    """The bytes of an image: the file as it is, or the pixels of an HDF5 row.

    Raises:
        OSError: it cannot be read.
    """
    pixels = read_pixels(uri)
    if pixels is not None:
        return bytes(pixels.tobytes())
    if is_url(uri):
        fs, path = filesystem(uri)
        return bytes(fs.cat_file(path))
    with open(uri, "rb") as file:
        return file.read()


def image_from_pixels(pixels: Any) -> Any:
    """A PIL image of an HDF5 row."""
    from PIL import Image

    return Image.fromarray(pixels)


def content_hash(data: bytes) -> str:
    """xxh3-128 in hex, as kept in receipts."""
    return xxhash.xxh3_128_hexdigest(data)
