"""ROI masks and the queries of each readout."""

import json

import numpy as np
import pytest

from brainenc.datasets.rois import HEMISPHERES, ROI_CLASSES, RoiAtlas
from brainenc.errors import DataError, UnknownName

PARITY = [
    "custom_transformer-rois_all", "linear", "spatial_feature-rois_all", "transformer-rois_all", "transformer-voxels",
]  # fmt: skip


def parity_atlas(data_dir, case):
    arrays = np.load(data_dir / "parity" / f"{case}.npz")
    names = json.loads(str(arrays["meta"]))["roi_names"]
    labels = {h: {c: arrays[f"roi/{h}.{c}"] for c in ROI_CLASSES} for h in HEMISPHERES}
    return RoiAtlas(labels, {c: dict(enumerate(n)) for c, n in names.items()}), arrays


def small_atlas(n=40, seed=0):
    rng = np.random.default_rng(seed)
    return RoiAtlas({h: {c: rng.integers(0, len(r) + 1, n) for c, r in ROI_CLASSES.items()} for h in HEMISPHERES})


@pytest.mark.parametrize("case", PARITY)
@pytest.mark.parametrize("readout", ["rois_all", "voxels"])
def test_masks_equal_the_published_ones(data_dir, case, readout):
    atlas, arrays = parity_atlas(data_dir, case)
    queries = atlas.queries(readout)
    for hemisphere in HEMISPHERES:
        np.testing.assert_array_equal(queries.masks(hemisphere), arrays[f"expected/{hemisphere}_masks"].astype(bool))
        assert queries.scored(hemisphere).all()


def test_number_of_queries_is_the_published_one(data_dir):
    for case in ("transformer-rois_all", "transformer-voxels"):
        atlas, arrays = parity_atlas(data_dir, case)
        meta = json.loads(str(arrays["meta"]))
        queries = atlas.queries(meta["readout"])
        assert sum(queries.n_queries(h) for h in HEMISPHERES) == meta["num_queries"]


def test_streams_are_seven_labels_and_a_remainder_that_cover_every_vertex_once():
    queries = small_atlas().queries("streams_inc")
    assert queries.readout == "streams"
    assert queries.labels == (*ROI_CLASSES["streams"], "remainder")
    for hemisphere in HEMISPHERES:
        assert (queries.masks(hemisphere).sum(axis=0) == 1).all()
    assert queries.covers_all


@pytest.mark.parametrize(
    ("readout", "roi_class"), [("visuals", "prf-visualrois"), ("bodies", "floc-bodies"), ("faces", "floc-faces"),
                               ("places", "floc-places"), ("words", "floc-words")],
)  # fmt: skip
def test_a_family_predicts_and_scores_its_own_vertices_only(readout, roi_class):
    atlas = small_atlas()
    queries = atlas.queries(readout)
    assert queries.labels == (*ROI_CLASSES[roi_class], "remainder")
    for hemisphere in HEMISPHERES:
        inside = atlas.labels[hemisphere][roi_class] > 0
        np.testing.assert_array_equal(queries.scored(hemisphere), inside)
        np.testing.assert_array_equal(queries.masks(hemisphere).any(axis=0), inside)
    assert not queries.covers_all


def test_hemis_is_one_query_for_everything_and_voxels_one_for_each_vertex():
    atlas = small_atlas(n=40)
    assert atlas.queries("hemis").lh.shape == (1, 40)
    assert atlas.queries("hemis").lh.all()
    assert atlas.queries("voxels").n_queries("lh") == 40


def test_an_empty_roi_is_kept_in_its_place():
    atlas = small_atlas()
    atlas.labels["lh"]["floc-faces"][atlas.labels["lh"]["floc-faces"] == 4] = 0
    queries = atlas.queries("rois_all")
    row = queries.labels.index("mTL-faces")
    assert not queries.lh[row].any()
    assert not atlas.masks("lh")["mTL-faces"].any()
    assert queries.lh.shape[0] == 25


def test_masks_name_every_roi_and_the_remainder_once():
    masks = small_atlas().masks("rh")
    assert list(masks) == [*(r for rois in ROI_CLASSES.values() for r in rois), "remainder"]


def test_an_unknown_readout_names_those_there_are():
    with pytest.raises(UnknownName, match=r"rois_all.*streams_inc"):
        small_atlas().queries("roi")


def test_a_label_that_the_mapping_does_not_name_is_refused():
    labels = {h: {c: np.zeros(5, int) for c in ROI_CLASSES} for h in HEMISPHERES}
    labels["rh"]["floc-places"][2] = 9
    with pytest.raises(DataError, match=r"rh\.floc-places holds the labels \[9\]"):
        RoiAtlas(labels)


def test_masks_of_different_lengths_are_refused():
    labels = {h: {c: np.zeros(5, int) for c in ROI_CLASSES} for h in HEMISPHERES}
    labels["lh"]["streams"] = np.zeros(6, int)
    with pytest.raises(DataError, match="differ in length"):
        RoiAtlas(labels)


def test_what_is_no_hemisphere_is_told_those_there_are():
    atlas = small_atlas()
    for ask in (atlas.masks, atlas.queries("streams").masks, atlas.queries("streams").scored):
        with pytest.raises(UnknownName, match=r"no hemisphere 'left'.* lh, rh"):
            ask("left")


def test_queries_show_what_they_are_and_not_their_masks():
    assert repr(small_atlas().queries("rois_all")).startswith("RoiQueries('rois_all', 25 queries, ")
    assert "one query a vertex" in repr(small_atlas().queries("voxels"))
