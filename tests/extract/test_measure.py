"""What a worker takes is measured, and the batch size that pays is chosen."""

import pytest

from brainenc.errors import ExtractionFailed
from brainenc.extract.estimate import estimate
from brainenc.extract.measure import Trial, choose_trial
from tests.extract.test_extractor import configured


def trials(*figures):
    return [Trial(size=2**n, seconds_per_image=s, peak_bytes=b) for n, (s, b) in enumerate(figures)]


@pytest.mark.parametrize(
    ("figures", "memory", "chosen"),
    [
        ([(1.0, 1), (0.5, 2), (0.3, 4), (0.29, 8)], 100, 4),
        ([(1.0, 1), (0.5, 2), (0.3, 40)], 10, 2),
        ([(1.0, 1), (1.0, 2)], 10, 1),
        ([(1.0, 1)], 10, 1),
    ],
)
def test_the_batch_from_which_doubling_pays_no_more_or_no_longer_fits(figures, memory, chosen):
    assert choose_trial(trials(*figures), memory).size == chosen


def test_no_size_that_fits_is_an_error():
    with pytest.raises(ExtractionFailed, match="Not even one image"):
        choose_trial([], 10)


@pytest.mark.chaos
def test_a_timed_plan_knows_rate_memory_and_leaves_nothing_behind(tmp_path, miniature, pictures):
    plan = estimate(configured(tmp_path / "s", pictures, miniature))

    assert 0 < plan.seconds_per_image < 5
    assert 50 << 20 < plan.actor_memory_bytes < plan.memory_limit_bytes
    assert plan.seconds > plan.startup_s > 1
    assert not (tmp_path / "s").exists()


@pytest.mark.chaos
def test_an_automatic_batch_is_settled_once_and_kept(tmp_path, miniature, pictures):
    from brainenc.extract.prepare import create, survey

    config = configured(tmp_path / "s", pictures, miniature, micro_batch="auto", rows_per_shard=None)
    found = survey(config)
    create(found)
    sizes = {w.micro_batch for w in found.wanted}
    assert sizes <= {2**n for n in range(9)}

    assert {w.micro_batch for w in survey(config).wanted} == sizes
