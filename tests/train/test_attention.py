"""Attention maps: per ROI, as arrays, and on images."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from brainenc.cli.main import cli
from brainenc.datasets.rois import ROI_CLASSES, RoiAtlas
from brainenc.errors import UnknownName, UsageError
from brainenc.train import EncoderConfig, build_encoder
from brainenc.train.attention import covered_box, maps_of_run, overlay, roi_attention
from brainenc.train.evaluate import open_run
from brainenc.train.launch import train

GRID = (3, 4)


@pytest.fixture
def atlas():
    """Two faces ROIs on the left, one on the right."""
    labels = {h: {c: np.zeros(10, dtype=int) for c in ROI_CLASSES} for h in ("lh", "rh")}
    labels["lh"]["floc-faces"][:6] = [1, 1, 1, 2, 2, 2]
    labels["rh"]["floc-faces"][:2] = 3
    return RoiAtlas(labels)


def build(atlas, encoder, readout):
    torch.manual_seed(0)
    config = EncoderConfig(encoder=encoder, readout=readout, n_heads=2, feedforward=8)
    return build_encoder(config, atlas.queries(readout), channels=16, grid=GRID)


@pytest.mark.parametrize("encoder", ["transformer", "custom_transformer", "spatial_feature"])
@pytest.mark.parametrize("readout", ["faces", "rois_all", "hemis", "voxels"])
def test_each_roi_of_the_subject_has_a_map(encoder, readout, atlas):
    """ROIs without a vertex have none; each map is a distribution over the grid."""
    left, right = roi_attention(build(atlas, encoder, readout), torch.randn(2, 16, *GRID))

    expected = {
        "faces": (("OFA", "FFA-1"), ("FFA-2",)),
        "hemis": (("hemisphere",), ("hemisphere",)),
    }.get(readout, (("OFA", "FFA-1", "remainder"), ("FFA-2", "remainder")))
    assert (left.labels, right.labels) == expected
    for roi in (left, right):
        assert roi.maps.shape == (2, len(roi.labels), *GRID)
        np.testing.assert_allclose(roi.maps.sum(axis=(2, 3)), 1, rtol=1e-5)


def test_maps_are_the_queries_attention_in_order(atlas):
    """The second ROI's map is its query's row, unfolded row by row; right queries follow the left ones."""
    model, x = build(atlas, "transformer", "rois_all"), torch.randn(2, 16, *GRID)
    rows = model.attention(x)
    left, right = roi_attention(model, x)
    at = model.queries.labels.index("FFA-1")

    np.testing.assert_allclose(left.maps[:, 1].reshape(2, -1), rows[:, at], rtol=1e-6)
    at = len(model.queries.labels) + model.queries.labels.index("FFA-2")
    np.testing.assert_allclose(right.maps[:, 0].reshape(2, -1), rows[:, at], rtol=1e-6)


def test_a_roi_of_vertices_is_their_mean(atlas, monkeypatch):
    """``voxels``: piece by piece, the mean over the ROI's vertices."""
    monkeypatch.setattr("brainenc.train.encoders.base.PIECE", 4)
    model, x = build(atlas, "transformer", "voxels"), torch.randn(2, 16, *GRID)
    rows = model.attention(x)

    left, right = roi_attention(model, x)

    np.testing.assert_allclose(left.maps[:, 1].reshape(2, -1), rows[:, 3:6].mean(dim=1), rtol=1e-5)
    np.testing.assert_allclose(right.maps[:, 0].reshape(2, -1), rows[:, 10:12].mean(dim=1), rtol=1e-5)


def test_linear_is_refused(atlas):
    """It has no queries."""
    with pytest.raises(UsageError, match="no queries"):
        roi_attention(build(atlas, "linear", "hemis"), torch.randn(1, 16, *GRID))


@pytest.mark.parametrize(
    ("preprocessing", "box"),
    [
        (None, (0, 0, 425, 425)),
        ({"policy": "resize", "size": [224, 224]}, (0, 0, 425, 425)),
        ({"policy": "pad", "size": None, "multiple": 14}, (0, 0, 434, 434)),
        ({"policy": "pad", "size": [850, 850], "multiple": 14}, (0, 0, 427, 427)),
        ({"policy": "crop", "size": [224, 224], "shortest": 256}, (26.5625, 26.5625, 398.4375, 398.4375)),
    ],
)
def test_the_grid_covers_what_the_backbone_saw(preprocessing, box):
    """Padding reaches beyond an NSD image of 425 pixels, a crop stays inside."""
    assert covered_box((425, 425), preprocessing) == pytest.approx(box)


def test_overlays_light_up_the_place_that_is_looked_at():
    """One bright cell changes its own part of the image, and leaves the rest as it was."""
    image = Image.new("RGB", (60, 40), (10, 20, 30))
    attention = np.zeros((4, 6), np.float32)
    attention[1, 4] = 1.0

    shown = np.asarray(overlay(image, attention))

    assert shown.shape == (40, 60, 3)
    assert shown[15, 45].sum() > 300
    assert (shown[30:, :20] == (10, 20, 30)).all()


def test_overlays_leave_the_padding_outside():
    """With a grid that reaches beyond the image, the last column lies mostly outside of it."""
    image = Image.new("RGB", (30, 30), (0, 0, 0))
    attention = np.zeros((4, 4), np.float32)
    attention[0, 3] = 1.0

    inside = np.asarray(overlay(image, attention)).sum()
    beyond = np.asarray(overlay(image, attention, (0, 0, 40, 40))).sum()

    assert beyond < 0.2 * inside


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    config = small.config(tmp_path_factory.mktemp("attention") / "run", epochs=1)
    assert train(config).status == "done"
    return config.out


def test_maps_of_a_run_are_arrays_and_pictures(run, tmp_path):
    """One array a hemisphere with its axes named, one picture for each image and ROI."""
    opened = open_run(run)

    files = list(maps_of_run(opened, "test", ["nsd-00045", "nsd-00047"], tmp_path))

    axes = json.loads((tmp_path / "attention.json").read_text())
    array = np.load(tmp_path / "lh_attention.npy")
    assert axes["images"] == ["nsd-00045", "nsd-00047"]
    assert array.shape == (2, len(axes["lh"]), 4, 4)
    np.testing.assert_allclose(array.sum(axis=(2, 3)), 1, rtol=1e-4)
    pictures = [f for f in files if f.suffix == ".png"]
    assert len(pictures) == 2 * (len(axes["lh"]) + len(axes["rh"]))
    with Image.open(tmp_path / f"nsd-00047_rh_{axes['rh'][0]}.png") as picture:
        assert picture.size == (4, 4)


def test_an_image_that_is_not_there_is_refused(run, tmp_path):
    """With some that are."""
    with pytest.raises(UnknownName, match="nsd-00045"):
        list(maps_of_run(open_run(run), "test", ["nsd-00001"], tmp_path))


def test_the_command_writes_into_the_run(run):
    """Without options: the first images, into RUN/attention."""
    shown = CliRunner().invoke(cli, ["attention", run, "--count", "1", "--json"])

    assert shown.exit_code == 0, shown.output
    files = json.loads(shown.stdout.splitlines()[-1])
    assert any(f.endswith("attention/lh_attention.npy") for f in files)
