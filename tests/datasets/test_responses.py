"""Writing responses: noise of the size that was asked for, fresh in every block of rows."""

import numpy as np
import pytest

from brainenc.datasets.responses import ResponseFiles, write_responses
from brainenc.scoring import pearson


def written(tmp_path, n=700, n_vertices=50, best=0.6):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((n, 4)).astype(np.float32)
    weights = rng.standard_normal((4, n_vertices)).astype(np.float32)
    weights /= np.linalg.norm(weights, axis=0)
    files = ResponseFiles(measured=tmp_path / "a" / "measured.npy", signal=tmp_path / "b" / "signal.npy")
    r = write_responses(files, latents, weights, np.full(n_vertices, best, np.float32), (1, 2))
    return np.load(files.measured), np.load(files.signal), latents @ weights, r


def test_signal_and_noise_have_the_sizes_that_make_the_ceiling(tmp_path):
    measured, signal, clean, r = written(tmp_path)
    np.testing.assert_allclose(signal, 0.6 * clean, atol=1e-5)
    noise = measured - signal
    assert noise.std() == pytest.approx(0.8, abs=0.01)
    assert r.mean() == pytest.approx(0.6, abs=0.02)
    np.testing.assert_allclose(r, pearson(signal, measured), atol=1e-6)
    assert measured.dtype == signal.dtype == np.float32


def test_noise_is_independent_between_rows_blocks_and_vertices(tmp_path):
    measured, signal, _, _ = written(tmp_path)
    noise = measured - signal
    assert abs(np.corrcoef(noise[:200].ravel(), noise[256:456].ravel())[0, 1]) < 0.05
    between = np.corrcoef(noise.T)[np.triu_indices(noise.shape[1], 1)]
    assert np.abs(between).max() < 0.25


def test_no_rows_at_all_is_an_empty_file(tmp_path):
    files = ResponseFiles(measured=tmp_path / "m.npy", signal=tmp_path / "s.npy")
    r = write_responses(
        files, np.zeros((0, 2), np.float32), np.ones((2, 3), np.float32), np.full(3, 0.5, np.float32), (0,)
    )
    assert np.load(files.measured).shape == (0, 3)
    assert np.isnan(r).all()
