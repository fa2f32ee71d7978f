"""A small synthetic subject, made once, and copied where a test wants to break it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from brainenc.datasets.algonauts import Subject
from brainenc.datasets.synthetic import synthesize

GRID = (8, 8)
SIZES = {"n_train": 96, "n_test": 24, "vertices": (120, 140), "seed": 3}


def local_colours(paths):
    """Features of images without a network: mean and contrast of each colour in 8 x 8 cells, shape (n, 8, 8, 6)."""
    maps = []
    for path in paths:
        with Image.open(path) as image:
            small = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR), np.float32) / 255
        cells = small.reshape(8, 8, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(8, 8, 64, 3)
        maps.append(np.concatenate([cells.mean(axis=2), cells.std(axis=2)], axis=-1))
    return np.stack(maps)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """(Subject, Truth) of the small subject. Tests must not change its files."""
    folder = tmp_path_factory.mktemp("data") / "subj01"
    truth = synthesize(folder, features=local_colours, **SIZES)
    return Subject.open(folder), truth


@pytest.fixture
def broken(made, tmp_path) -> Path:
    """A copy of the small subject's folder that a test may break."""
    return Path(shutil.copytree(made[0].folder, tmp_path / "subj01"))
