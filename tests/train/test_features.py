"""Stored rows become one map: prefix dropped, several joined along channels, vectors tiled."""

import pytest
import torch

from brainenc.errors import UsageError
from brainenc.train.features import FeatureLayout, RowLayout, split_part


def rows(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size((2, *shape)).numel())).reshape(2, *shape).half()


def test_a_map_drops_its_prefix_and_keeps_the_grid():
    layout = FeatureLayout.of([RowLayout.of("f", (7, 3), {"n_prefix": 1, "grid": [2, 3]}, None)])
    stored = rows(7, 3)

    found = layout.assemble([stored])

    assert (layout.grid, layout.channels, found.shape) == ((2, 3), 3, (2, 3, 2, 3))
    assert torch.equal(found[1, :, 1, 2], stored[1, 1 + 3 + 2].float())


def test_maps_and_vectors_are_joined_along_channels_and_vectors_tiled():
    layouts = [
        RowLayout.of("map", (5, 3), {"n_prefix": 1, "grid": [2, 2]}, None),
        RowLayout.of("convolution", (4, 2), {"n_prefix": 0, "grid": [2, 2]}, None),
        RowLayout.of("pooled", (6,), {}, None),
        RowLayout.of("cls", (5, 3), {"n_prefix": 1, "grid": [2, 2]}, "cls"),
    ]
    layout = FeatureLayout.of(layouts)
    stored = [rows(5, 3), rows(4, 2), rows(6), rows(5, 3)]

    found = layout.assemble(stored)

    assert found.shape == (2, 3 + 2 + 6 + 3, 2, 2)
    assert torch.equal(found[0, 3:5, 1, 0], stored[1][0, 2].float())
    assert torch.equal(found[1, 5:11, 0, 1], stored[2][1].float())
    assert torch.equal(found[1, 11:, 1, 1], stored[3][1, 0].float())


def test_the_mean_over_the_grid_leaves_the_prefix_out():
    layout = FeatureLayout.of([RowLayout.of("f", (5, 3), {"n_prefix": 1, "grid": [2, 2]}, "mean")])
    stored = rows(5, 3)

    assert torch.allclose(layout.assemble([stored])[0, :, 1, 1], stored[0, 1:].float().mean(0))


def test_a_square_grid_needs_no_details():
    plain, with_cls = RowLayout.of("mine", (49, 8), {}, None), RowLayout.of("mine", (50, 8), {}, None)

    assert (plain.grid, plain.n_prefix) == ((7, 7), 0)
    assert (with_cls.grid, with_cls.n_prefix) == ((7, 7), 1)


def test_different_grids_are_refused_by_name():
    layouts = [RowLayout.of(str(n), (n * n, 3), {"grid": [n, n]}, None) for n in (2, 3)]

    with pytest.raises(UsageError, match=r"2: \(2, 2\); 3: \(3, 3\)"):
        FeatureLayout.of(layouts)


@pytest.mark.parametrize(
    ("shape", "details", "part", "message"),
    [
        ((52, 8), {}, None, "not 0 prefix tokens and a grid of None"),
        ((49, 8), {"grid": [7, 7]}, "cls", "no CLS token"),
        ((3, 7, 7), {}, None, "rows of shape"),
    ],
)
def test_rows_that_make_no_map_are_explained(shape, details, part, message):
    with pytest.raises(UsageError, match=message):
        RowLayout.of("f", shape, details, part)


def test_a_part_follows_a_colon():
    assert split_part("dino/11.q:cls") == ("dino/11.q", "cls")
    assert split_part("dino/11.q") == ("dino/11.q", None)
    with pytest.raises(UsageError, match="'first' is no part"):
        split_part("dino/11.q:first")
