"""Correlations against SciPy, and the field's formulas against numbers worked out by hand."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr

from brainenc import scoring
from brainenc.scoring import StreamingPearson


def correlated(n, n_vertices, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal((n, n_vertices))
    other = rng.uniform(-1, 1, n_vertices) * signal + rng.standard_normal((n, n_vertices))
    return signal.astype(dtype), other.astype(dtype)


def by_scipy(a, b):
    return np.array([pearsonr(a[:, i].astype(np.float64), b[:, i].astype(np.float64))[0] for i in range(a.shape[1])])


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(3, 700), n_vertices=st.integers(1, 40), seed=st.integers(0, 99),
    scale=st.sampled_from([1e-4, 1.0, 300.0]), offset=st.sampled_from([0.0, -5.0, 100.0]),
    dtype=st.sampled_from([np.float32, np.float64]),
)  # fmt: skip
def test_equals_scipy(n, n_vertices, seed, scale, offset, dtype):
    a, b = correlated(n, n_vertices, seed)
    a = (a * scale + offset * scale).astype(dtype)
    np.testing.assert_allclose(scoring.pearson(a, b), by_scipy(a, b), atol=1e-6)


def test_equals_scipy_over_many_columns_and_threads():
    a, b = correlated(300, 5000, 0)
    r = scoring.pearson(a, b, threads=4)
    np.testing.assert_allclose(r[::50], by_scipy(a[:, ::50], b[:, ::50]), atol=1e-6)
    np.testing.assert_array_equal(r, scoring.pearson(a, b, threads=1))


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=6), seed=st.integers(0, 9))
def test_batches_of_any_size_give_what_one_pass_gives(cuts, seed):
    a, b = correlated(300, 7, seed)
    stream = StreamingPearson(7)
    edges = sorted({0, 300, *cuts})
    for start, stop in pairwise(edges):
        stream.update(a[start:stop], b[start:stop])
    stream.update(a[:0], b[:0])
    np.testing.assert_allclose(stream.r(), scoring.pearson(a, b), atol=1e-6)


def test_parts_of_several_processes_are_merged():
    a, b = correlated(500, 11, 4)
    parts = []
    for rows in (slice(0, 90), slice(90, 90), slice(90, 500)):
        part = StreamingPearson(11)
        part.update(a[rows], b[rows])
        parts.append(StreamingPearson.from_state(part.state()))
    whole = StreamingPearson(11)
    for part in parts:
        whole.merge(part)
    assert whole.n == 500
    np.testing.assert_allclose(whole.r(), by_scipy(a, b), atol=1e-6)


def test_a_drift_larger_than_the_signal_costs_no_digits():
    """Sums of squares without centring would lose all seven digits of float32 here."""
    a, b = correlated(2000, 5, 1)
    drift = np.linspace(0, 1000, 2000, dtype=np.float32)[:, None]
    a, b = a + drift, b - drift
    np.testing.assert_allclose(scoring.pearson(a, b), by_scipy(a, b), atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6])
def test_a_constant_vertex_is_nan_whatever_its_value(value):
    a, b = correlated(400, 4, 0)
    a[:, 1] = value
    b[:, 2] = value
    stream = StreamingPearson(4)
    for start in range(0, 400, 37):
        stream.update(a[start : start + 37], b[start : start + 37])
    assert np.isnan(stream.r()).tolist() == [False, True, True, False]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_spoils_its_own_vertex_only(bad):
    a, b = correlated(300, 5, 2)
    clean = scoring.pearson(a, b)
    a[170, 3] = bad
    r = scoring.pearson(a, b)
    assert np.isnan(r[3])
    np.testing.assert_array_equal(np.delete(r, 3), np.delete(clean, 3))


def test_perfect_agreement_is_exactly_within_bounds():
    a, _ = correlated(500, 50, 3)
    assert scoring.pearson(a, a).max() <= 1.0
    np.testing.assert_allclose(scoring.pearson(a, -2 * a), -1.0, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"predictions have \(3, 4\), measurements \(3, 5\)"):
        StreamingPearson(5).update(np.zeros((3, 4)), np.zeros((3, 5)))
    with pytest.raises(ValueError, match="merge"):
        StreamingPearson(5).merge(StreamingPearson(4))


def test_float16_is_accumulated_in_more():
    a, b = correlated(3000, 3, 5)
    a, b = a.astype(np.float16), b.astype(np.float16)
    np.testing.assert_allclose(scoring.pearson(a, b), by_scipy(a, b), atol=1e-6)


def test_val_perf_counts_nan_as_zero_and_hemispheres_alike():
    assert scoring.val_perf(np.array([0.5, np.nan]), np.array([0.1, 0.2, 0.3, 0.4])) == pytest.approx((0.25 + 0.25) / 2)
    assert np.isnan(scoring.mean_r(np.array([])))


def test_noise_ceiling_by_hand():
    """ncsnr 1, ten images: two shown once, three twice, five three times: mean 1/k is (2 + 1.5 + 5/3) / 10."""
    found = scoring.noise_ceiling(np.array([0.0, 1.0]), 2, 3, 5)
    np.testing.assert_allclose(found, [0.0, 1 / (1 + (2 + 1.5 + 5 / 3) / 10)])
    np.testing.assert_allclose(scoring.nsd_noise_ceiling(np.array([1.0]), 3), [75.0])
    np.testing.assert_allclose(
        scoring.noise_ceiling(np.array([0.7]), 0, 0, 9) * 100, scoring.nsd_noise_ceiling(np.array([0.7]))
    )
    with pytest.raises(ValueError, match="at least one test image"):
        scoring.noise_ceiling(np.array([1.0]), 0, 0, 0)


def test_challenge_score_by_hand():
    """r² / NC in percent; negative r and NaN score 0, more than the ceiling 100, a ceiling of 0 is 1e-14."""
    r = np.array([0.5, -0.5, 0.9, 0.1, 0.0, np.nan])
    ceiling = np.array([0.5, 0.5, 0.5, 0.0, 0.0, 0.5])
    np.testing.assert_allclose(scoring.noise_normalised(r, ceiling), [50, 0, 100, 100, 0, 0])
    whole = scoring.challenge_score([(r, ceiling), (np.array([0.5, 0.5]), np.array([1.0, 1.0]))])
    assert whole == pytest.approx((250 + 50) / 8)  # over vertices, not over hemispheres


def test_ceilings_in_percent_are_refused():
    with pytest.raises(ValueError, match="divided by 100"):
        scoring.noise_normalised(np.array([0.5]), np.array([36.0]))
    with pytest.raises(ValueError, match="do not go together"):
        scoring.noise_normalised(np.array([0.5]), np.array([0.3, 0.4]))


def test_a_roi_without_vertices_is_nan():
    values = np.array([1.0, 2.0, np.nan])
    masks = {"a": np.array([True, True, False]), "b": np.zeros(3, bool), "c": np.array([False, True, True])}
    found = scoring.roi_means(values, masks)
    assert (found["a"], found["c"]) == (1.5, 1.0)
    assert np.isnan(found["b"])


@pytest.mark.parametrize("row", [0, 250, 999])
def test_one_wild_value_costs_no_digits_elsewhere(row):
    """The rows that the sums are taken about may be outliers themselves."""
    a, b = correlated(1000, 6, 8)
    a[row] += 3000
    b[row] -= 50
    np.testing.assert_allclose(scoring.pearson(a, b), by_scipy(a, b), atol=1e-6)
