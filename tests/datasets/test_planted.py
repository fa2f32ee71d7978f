"""The parts of the planted truth, each against a slow or independent calculation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainenc.datasets import planted
from brainenc.datasets.cortex import made_up_atlas
from brainenc.datasets.planted import Region


def region(row, column, width=0.1):
    return Region(hemisphere="lh", name="x", location=(row, column), width=width, ceiling=0.5, seed=7)


@settings(deadline=None)
@given(
    row=st.floats(0.12, 0.88), column=st.floats(0.12, 0.88), height=st.integers(1, 31), across=st.integers(1, 31),
    width=st.floats(0.01, 0.3),
)  # fmt: skip
def test_windows_sum_to_one_on_any_grid(row, column, height, across, width):
    window = planted.windows([region(row, column, width)], (height, across))
    assert window.shape == (1, height * across)
    assert window.sum() == pytest.approx(1, abs=1e-5)
    assert (window >= 0).all()


def test_a_window_is_centred_on_its_location_and_as_wide_as_it_says():
    """Row before column, from the top left; moments taken from the window itself."""
    window = planted.windows([region(0.3, 0.6, 0.08)], (31, 31)).reshape(31, 31).astype(np.float64)
    at = (np.arange(31) + 0.5) / 31
    rows, columns = window.sum(axis=1), window.sum(axis=0)
    assert (rows * at).sum() == pytest.approx(0.3, abs=0.01)
    assert (columns * at).sum() == pytest.approx(0.6, abs=0.01)
    spread = np.sqrt((rows * (at - 0.3) ** 2).sum())
    assert 0.85 * 0.08 < spread < 1.02 * 0.08  # a little less than a whole Gaussian: its tails are cut


def test_left_hemispheres_look_right_and_right_ones_left():
    queries = made_up_atlas((50, 50), 0).queries("rois_all")
    regions = planted.plan_regions(queries, ceiling=0.7, spread=0.1, width=0.1, seed=0)
    assert len(regions) == 50
    assert all((r.location[1] >= 0.5) == (r.hemisphere == "lh") for r in regions)
    assert len({r.location for r in regions}) == 50
    ceilings = [r.ceiling for r in regions if r.hemisphere == "lh"]
    assert np.mean(ceilings) == pytest.approx(0.7, abs=1e-3)
    assert (min(ceilings), max(ceilings)) == (pytest.approx(0.6), pytest.approx(0.8))


def test_pooling_is_the_weighted_mean_of_tokens():
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((3, 4, 5, 2)).astype(np.float32)
    window = planted.windows([region(0.4, 0.5), region(0.8, 0.2)], (4, 5))
    slow = [[(maps[n] * w.reshape(4, 5, 1)).sum(axis=(0, 1)) for w in window] for n in range(3)]
    np.testing.assert_allclose(planted.pool(maps, window), slow, atol=1e-6)


def test_readouts_see_z_scored_channels():
    """A channel of another unit and offset gives the same latents."""
    rng = np.random.default_rng(1)
    pooled = rng.standard_normal((200, 2, 5)).astype(np.float32)
    scaled = (pooled * np.array([1, 10, 0.1, 3, 1]) + np.array([0, 50, -2, 1, 9])).astype(np.float32)
    regions = [region(0.3, 0.6), region(0.6, 0.7)]
    plain = planted.Readouts.calibrate(pooled, regions, rank=3).latents(pooled)
    other = planted.Readouts.calibrate(scaled, regions, rank=3).latents(scaled)
    np.testing.assert_allclose(plain, other, atol=2e-3)


def test_a_channel_that_never_changes_is_left_out():
    pooled = np.random.default_rng(2).standard_normal((50, 1, 4)).astype(np.float32)
    pooled[:, :, 2] = 3.0
    readouts = planted.Readouts.calibrate(pooled, [region(0.5, 0.6)], rank=2)
    assert np.isfinite(readouts.weights).all()
    assert not readouts.weights[0, 2].any()


def test_signals_have_variance_one_over_training_images():
    rng = np.random.default_rng(3)
    latents = planted.standardise(rng.standard_normal((300, 4, 3)).astype(np.float32) * 5 + 2, 250)
    train = latents[:250].reshape(250, -1)
    masks = rng.random((4, 40)) < 0.5
    masks[0, ~masks.any(axis=0)] = True
    regions = [region(0.5, 0.6) for _ in range(4)]
    signal = train @ planted.vertex_weights(train, regions, masks)
    np.testing.assert_allclose(signal.std(axis=0), 1, atol=1e-4)
    np.testing.assert_allclose(signal.mean(axis=0), 0, atol=1e-4)
