"""The reference cases of the published implementation (tests/data/parity), for the tests that compare with them."""

import json
from pathlib import Path

import numpy as np
import torch

from brainenc.datasets import layout
from brainenc.datasets.rois import RoiAtlas, RoiQueries
from brainenc.train import EncoderConfig, build_encoder

PARITY = Path(__file__).parents[1] / "data" / "parity"
CASES = sorted(p.stem for p in PARITY.glob("*.npz"))


class Case:
    """One reference file: a small model, a batch, and what the published code computes from them."""

    def __init__(self, name: str) -> None:
        self.arrays = dict(np.load(PARITY / f"{name}.npz"))
        self.meta = json.loads(str(self.arrays["meta"]))
        self.features = self.tensor("features")
        self.state = {k.removeprefix("state/"): self.tensor(k) for k in self.arrays if k.startswith("state/")}

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def queries(self) -> RoiQueries:
        labels = {
            h: {k.split(".", 1)[1]: a for k, a in self.arrays.items() if k.startswith(f"roi/{h}.")}
            for h in ("lh", "rh")
        }
        names = {c: dict(enumerate(n)) for c, n in self.meta["roi_names"].items()}
        return RoiAtlas(labels, names).queries(self.meta["readout"])

    def model(self):
        config = EncoderConfig(
            encoder=self.meta["encoder"], readout=self.meta["readout"], n_heads=self.meta["nheads"],
            feedforward=self.meta["dim_feedforward"], dropout=0.0,
        )  # fmt: skip
        model = build_encoder(config, self.queries(), channels=self.features.shape[1], grid=tuple(self.meta["grid"]))
        model.load_state_dict(self.state, strict=False)
        return model

    def write_rois(self, folder: Path) -> Path:
        """The ROI masks and mappings, where a subject folder has them."""
        (folder / "roi_masks").mkdir(parents=True)
        for roi_class, names in self.meta["roi_names"].items():
            np.save(folder / layout.mapping_file(roi_class), dict(enumerate(names)), allow_pickle=True)
            for h in ("lh", "rh"):
                np.save(folder / layout.mask_file(h, roi_class, "challenge"), self.arrays[f"roi/{h}.{roi_class}"])
        return folder


def distance(found, expected) -> float:
    """max |difference| / max |expected|."""
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
