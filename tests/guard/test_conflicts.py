"""Who would act first: the guard, Ray, or the kernel?"""

import pytest

from brainenc.guard.conflicts import Surroundings, conflicts
from brainenc.guard.policy import Thresholds

GB = 1_000_000_000


@pytest.mark.parametrize(
    ("around", "part"),
    [
        ({"ray_threshold": 0.85}, "Ray's memory monitor kills workers at 85%"),
        ({"state_bytes": 2 * GB, "limit": 12 * GB}, "less than the training state"),
        ({"object_store": 8 * GB, "limit": 20 * GB}, "object store may grow to 8 GB of 20 GB"),
        ({"object_store": 5 * GB, "shm": GB // 16}, "does not fit into /dev/shm"),
    ],
)
def test_each_conflict_is_explained_with_a_way_out(around, part):
    (sentence,) = conflicts(Thresholds(), Surroundings(**({"limit": 64 * GB} | around)))

    assert part in sentence


def test_a_machine_in_order_has_none():
    around = Surroundings(limit=64 * GB, object_store=8 * GB, shm=32 * GB, state_bytes=GB)

    assert conflicts(Thresholds(), around) == []


def test_without_rays_monitor_only_the_kernel_is_left():
    assert conflicts(Thresholds(), Surroundings(limit=GB, ray_threshold=None, state_bytes=GB)) == []


def test_doubtful_thresholds_are_among_them():
    assert len(conflicts(Thresholds(ram_critical=0.93), Surroundings(limit=64 * GB, ray_threshold=None))) == 1
