"""Real images and a real, small backbone for everything that extracts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from brainenc.extract.miniature import save_miniature


@pytest.fixture(scope="session")
def miniature(tmp_path_factory) -> str:
    """A seeded DINOv2 of four blocks, saved by save_pretrained."""
    return str(save_miniature("dinov2", tmp_path_factory.mktemp("backbones") / "mini"))


def draw_image(number: int, size: int = 112) -> Image.Image:
    """A picture that no other number has: gratings of its own frequency and direction."""
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [np.sin((number % 17 + 2 * c + 1) * (x + y * (number % 5 - 2)) + number) for c in range(3)]
    return Image.fromarray(((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of 45 images; read-only by agreement."""
    return save_images(tmp_path_factory.mktemp("images") / "pictures", 45)


def save_images(folder: Path, count: int, size: int = 112) -> Path:
    """``count`` PNGs in ``folder``, named as the challenge names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        draw_image(number, size).save(folder / f"train-{number + 1:04d}_nsd-{number * 3:05d}.png")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
