"""From an image file's bytes to 8-bit RGB. Every odd kind of file is decided here, once.

| file                       | what becomes of it                                                        |
|----------------------------|---------------------------------------------------------------------------|
| greyscale, 1-bit           | the same grey in all three channels                                       |
| 16-bit greyscale           | scaled, 65535 -> 255, never clipped                                       |
| 16-bit colour              | the high byte of each channel                                             |
| palette                    | its colours                                                               |
| transparency of any kind   | composed over white, as a page would show it                              |
| CMYK, YCbCr                | Pillow's conversion; embedded colour profiles are not applied             |
| EXIF orientation           | turned upright                                                            |
| several frames or pages    | the first                                                                 |
| truncated, damaged, empty  | refused, even when another library has told Pillow to accept them         |
| more than MAX_PIXELS       | refused before a pixel is decoded: a decompression bomb                   |
| 32-bit integer, float, Lab | refused: nothing in the file says which value is white                    |
"""

from __future__ import annotations

import io
import os
import struct

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from brainenc.errors import BadImages

MAX_PIXELS = 89_478_485
"""A quarter of a GiB of RGB, where Pillow begins to warn; larger than what cameras take."""

_BACKGROUND = (255, 255, 255)
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on damaged files.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error)


def open_image(source: bytes | str | os.PathLike[str], *, name: str | None = None) -> Image.Image:
    """Decode an image file.

    Args:
        source: the file's bytes, or its path.
        name: how an error calls it; by default its path.

    Returns:
        An upright image of mode ``RGB``, whole in memory.

    Raises:
        BadImages: it is no image, is damaged, too large, or of a kind that has no RGB meaning; with that one reason.
        OSError: the file could not be read at all.
    """
    data = source if isinstance(source, bytes) else _read(source)
    called = name or ("image" if isinstance(source, bytes) else os.fspath(source))
    try:
        return _decode(data)
    except _Refused as refused:
        raise BadImages({called: str(refused)}) from None
    except UnidentifiedImageError:
        raise BadImages({called: _nothing_we_know(data)}) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImages({called: f"a decompression bomb: {error}"}) from None
    except _DAMAGE as error:
        raise BadImages({called: f"damaged: {error}"}) from error


class _Refused(Exception):
    """Readable, but not something that has RGB pixels for us."""


def _read(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _decode(data: bytes) -> Image.Image:
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    image = Image.open(io.BytesIO(data))
    _check_size(image)
    image.load()
    return _to_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except _DAMAGE:  # damaged metadata around whole pixels: viewers show such a file as it lies
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _Refused(f"{image.width} x {image.height} pixels, more than the {MAX_PIXELS} that are decoded")
    if image.width == 0 or image.height == 0:
        raise _Refused(f"{image.width} x {image.height} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT:
        return _from_sixteen_bit(np.asarray(image).astype(np.uint32))
    if image.mode == "I":
        return _from_integers(np.asarray(image))
    if image.mode == "F":
        raise _Refused("floating-point pixels, and nothing says which value is white; save it as 8 or 16 bit")
    if image.mode == "LAB":
        raise _Refused("Lab colours, which cannot be shown without a colour profile; save it as RGB")
    if image.has_transparency_data:
        return _over_background(image.convert("RGBA"))
    return image.convert("RGB")


def _from_integers(values: np.ndarray) -> Image.Image:
    """Pillow gives some 16-bit greyscale files as 32-bit integers."""
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise _Refused("32-bit integer pixels, and nothing says which value is white; save it as 8 or 16 bit")
    return _from_sixteen_bit(values.astype(np.uint32))


def _from_sixteen_bit(values: np.ndarray) -> Image.Image:
    grey = ((values + 128) // 257).astype(np.uint8)  # rounds v * 255 / 65535
    return Image.fromarray(grey).convert("RGB")


def _over_background(image: Image.Image) -> Image.Image:
    whole = Image.new("RGBA", image.size, (*_BACKGROUND, 255))
    whole.alpha_composite(image)
    return whole.convert("RGB")


def _nothing_we_know(data: bytes) -> str:
    return "an empty file" if not data else "not an image of a kind that Pillow reads"
