"""A small subject with stored features that training learns from in seconds."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from brainenc.datasets import layout
from brainenc.datasets.rois import ROI_CLASSES
from brainenc.featurestore.store import open_store
from brainenc.train.config import TrainConfig
from brainenc.train.encoders.base import EncoderConfig

GRID, WIDTH, VERTICES = (4, 4), 16, (30, 26)


@dataclass(frozen=True)
class Small:
    """Where the small subject and its features lie."""

    subject_dir: Path
    store: Path

    def config(self, out: Path, *, dropout: float = 0.1, **fields) -> TrainConfig:
        """A configuration that trains on it."""
        encoder = {"hidden": 16, "n_heads": 2, "feedforward": 32, "dropout": dropout} | fields.pop("encoder", {})
        given = {
            "subject_dir": str(self.subject_dir), "store": str(self.store), "features": ("tiny/1.q",), "out": str(out),
            "encoder": EncoderConfig(**encoder), "epochs": 2, "batch_size": 8, "workers": "0", "threads": 1,
        }  # fmt: skip
        return TrainConfig(**given | fields)


def make_subject(folder: Path, rng: np.random.Generator, features: np.ndarray, n_test: int) -> None:
    """Responses of V vertices, each a readout of the mean of some tokens, and noise."""
    n_train = len(features) - n_test
    for split, first, count in (("train", 0, n_train), ("test", n_train, n_test)):
        images = folder / layout.images_dir(split)
        images.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4), (i, i, i)).save(images / layout.image_name(split, i + 1, first + i))
    (folder / "roi_masks").mkdir()
    for hemisphere, n_vertices in zip(("lh", "rh"), VERTICES, strict=True):
        signal = features[:n_train, 1:].mean(1) @ rng.normal(size=(WIDTH, n_vertices))
        responses = signal / signal.std(0) + 0.3 * rng.normal(size=signal.shape)
        file = folder / layout.responses_file("train", hemisphere)
        file.parent.mkdir(exist_ok=True)
        np.save(file, responses.astype(np.float32))
        for roi_class, rois in ROI_CLASSES.items():
            labels = rng.integers(0, len(rois) + 1, n_vertices)
            np.save(folder / layout.mask_file(hemisphere, roi_class, "challenge"), labels)
    for roi_class, rois in ROI_CLASSES.items():
        names = np.array(dict(enumerate(("Unknown", *rois))), dtype=object)
        np.save(folder / layout.mapping_file(roi_class), names, allow_pickle=True)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """45 training and 5 test images, 30 and 26 vertices, features of 1 + 4 x 4 tokens of 16."""
    root = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 1 + GRID[0] * GRID[1], WIDTH)).astype(np.float16)
    make_subject(root / "subj01", rng, features, n_test=5)
    store = open_store(root / "store", create=True)
    details = {"n_prefix": 1, "grid": list(GRID)}
    for split, rows in (("train", slice(0, 45)), ("test", slice(45, 50))):
        ids = [f"nsd-{i:05d}" for i in range(50)[rows]]
        for name, part in (("1.q", features[rows]), ("2.token", 2 * features[rows])):
            with store.writer(
                f"subj01-{split}/tiny/{name}", ids=ids, row_shape=part.shape[1:], details=details, rows_per_shard=16
            ) as writer:
                writer.append(part)
    return Small(root / "subj01", root / "store")
