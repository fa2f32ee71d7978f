"""Natural images without a download: crops, flips and blends of the photographs inside scikit-image's package.

Random noise would not do: features of noise hardly differ between images, and every model would look equally bad.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from brainenc.datasets.layout import IMAGE_SIZE
from brainenc.errors import DataError

_NAMES = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
    "motorcycle_right.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
"""Those of skimage/data that are photographs and lie in its wheel; drawings, test patterns and scans are left out."""

_MOST_SIDE = 800  # larger photographs are shrunk once: crops are shown at 425 pixels anyway


@lru_cache(maxsize=1)
def photographs() -> tuple[Image.Image, ...]:
    """The photographs as RGB images, always in the same order.

    Raises:
        DataError: scikit-image is not installed, or its package holds none of them.
    """
    folder = _package_folder()
    found = [folder / name for name in _NAMES if (folder / name).is_file()]
    if not found:
        raise DataError(
            f"{folder} holds none of scikit-image's photographs ({', '.join(_NAMES[:3])} ...). Reinstall it."
        )
    return tuple(_load(path) for path in found)


def picture(seed: int, number: int) -> Image.Image:
    """One image of 425 x 425 RGB, a function of its two arguments: a crop of a photograph, or two crops blended."""
    rng = np.random.default_rng((seed, number))
    first = _crop(rng)
    if rng.random() < 0.5:
        return first
    return Image.blend(first, _crop(rng), float(rng.uniform(0.25, 0.5)))


def write_pictures(paths: Sequence[Path], *, seed: int, numbers: Sequence[int], threads: int = 2) -> None:
    """Write `picture(seed, number)` as PNG to each path."""
    photographs()  # before the threads: a missing package is one error, not one each

    def write(path: Path, number: int) -> None:
        picture(seed, number).save(path, format="PNG", compress_level=1)  # four times faster than 6, a tenth larger

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, paths, numbers))


def _crop(rng: np.random.Generator) -> Image.Image:
    source = photographs()[rng.integers(len(photographs()))]
    side = int(min(source.size) * rng.uniform(0.4, 1.0))
    left = int(rng.integers(source.width - side + 1))
    top = int(rng.integers(source.height - side + 1))
    made = source.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        made = ImageOps.mirror(made)
    return ImageOps.flip(made) if rng.random() < 0.25 else made


def _load(path: Path) -> Image.Image:
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    rgb.thumbnail((_MOST_SIDE, _MOST_SIDE), Image.Resampling.BILINEAR)
    return rgb


def _package_folder() -> Path:
    spec = importlib.util.find_spec("skimage")  # found, not imported: only the files are wanted
    if spec is None or spec.origin is None:
        raise DataError("Synthetic subjects need the photographs of scikit-image: install it with brainenc[demo].")
    return Path(spec.origin).parent / "data"
