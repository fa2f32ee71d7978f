"""What is left to do, and whether it fits: pure decisions."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainenc.errors import ExtractionFailed, NoSpace
from brainenc.extract.estimate import plan_of
from brainenc.extract.plan import (
    ExtractPlan,
    Voucher,
    Wanted,
    bytes_at_once,
    check_space,
    choose_rows_per_shard,
    collection_plans,
    outstanding,
    shard_rows,
)  # fmt: skip
from brainenc.extract.prepare import survey
from tests.extract.test_extractor import configured


def wanted(feature="3.q", *, n_rows=100, rows_per_shard=16, micro_batch=8, sealed=(), row_bytes=1000, stimuli="set"):
    return Wanted(
        key=f"{stimuli}/mini/{feature}", stimuli=stimuli, feature=feature, row_shape=(500,), row_bytes=row_bytes,
        n_rows=n_rows, rows_per_shard=rows_per_shard, micro_batch=micro_batch, sealed=frozenset(sealed),
    )  # fmt: skip


@st.composite
def stores(draw):
    """Features of one or two sets in any state of completion, some with shards of other sizes."""
    found = []
    for stimuli in draw(st.sampled_from((("a",), ("a", "b")))):
        n_rows = draw(st.integers(1, 60))
        for feature in draw(st.lists(st.sampled_from(("0.q", "1.k", "2.token", "norm.cls")), min_size=1, unique=True)):
            per_shard = draw(st.sampled_from((1, 4, 7, 64)))
            shards = -(-n_rows // per_shard)
            sealed = draw(st.sets(st.integers(0, shards - 1)))
            found.append(
                wanted(feature, stimuli=stimuli, n_rows=n_rows, rows_per_shard=per_shard, sealed=sealed, micro_batch=1)
            )
    return found


@given(stores())
def test_every_row_that_is_not_sealed_is_scheduled_once_and_no_other(found):
    scheduled = [
        (key, row) for task in outstanding(found) for _, key in task.features for row in range(task.start, task.stop)
    ]
    missing = [
        (w.key, row)
        for w in found
        for shard in range(w.n_shards)
        if shard not in w.sealed
        for row in shard_rows(shard, w.rows_per_shard, w.n_rows)
    ]

    assert sorted(scheduled) == sorted(missing)
    assert sum(w.rows_left for w in found) == len(missing)


@given(stores())
def test_features_with_equal_shards_share_their_passes(found):
    tasks = outstanding(found)

    sizes = {w.key: w.rows_per_shard for w in found}
    passes = [(task.stimuli, sizes[task.features[0][1]], task.shard) for task in tasks]
    assert len(passes) == len(set(passes))
    assert len({task.name for task in tasks}) == len(tasks)


def test_a_pass_computes_only_what_its_shard_lacks_and_knows_who_can_vouch_for_the_images():
    vouchers = [
        Voucher(key="set/other/0.q", stimuli="set", rows_per_shard=4, sealed=frozenset(range(3))),
        Voucher(key="set/mini/9.q", stimuli="set", rows_per_shard=8, sealed=frozenset((2, 3))),
    ]

    first, second = outstanding([wanted("0.q", n_rows=32, sealed=[1]), wanted("1.q", n_rows=32)], vouchers)

    assert first.features == (("0.q", "set/mini/0.q"), ("1.q", "set/mini/1.q"))
    assert first.sibling is None
    assert second.features == (("1.q", "set/mini/1.q"),)
    assert second.sibling == "set/mini/9.q"


@given(st.lists(st.integers(1, 10**8), min_size=1, max_size=4), st.integers(1, 64), st.integers(1, 2**30))
def test_a_shard_holds_whole_micro_batches_and_keeps_to_its_size(row_bytes, micro_batch, shard_bytes):
    rows = choose_rows_per_shard(row_bytes, micro_batch, shard_bytes)

    assert rows % micro_batch == 0
    assert rows == micro_batch or rows * max(row_bytes) <= shard_bytes
    assert rows <= max(512, micro_batch)


def plan(needed: int, free: int | None) -> ExtractPlan:
    return ExtractPlan(
        store="/data/features", collections=collection_plans([wanted(row_bytes=needed // 100)], []), images_left=100,
        disk_needed_bytes=needed, disk_free_bytes=free, actors=1, micro_batch=8, device="cpu",
        seconds_per_image=0.5, startup_s=10.0,
    )  # fmt: skip


def test_what_cannot_fit_is_refused_with_both_sizes_and_the_largest_collection():
    with pytest.raises(NoSpace, match=r"/data/features has 1 GB free, but 2 GB .*set/mini/3\.q 2 GB.*--store"):
        check_space(plan(2 * 10**9, 10**9))


@pytest.mark.parametrize(("needed", "free"), [(10**9, None), (10**9, 2 * 10**9), (0, 5)])
def test_what_fits_passes_and_a_place_that_does_not_say_is_believed(needed, free):
    check_space(plan(needed, free))


def test_a_plan_is_read_by_people_and_by_programs():
    text = "\n".join(plan(10**9, 2 * 10**9).lines())

    assert "set/mini/3.q: 100 rows of 500, 10 MB an image, 1 GB in 7 shards (new)" in text
    assert "disk: 1 GB to write, 2 GB free" in text
    assert "1 min for 100 images (2 images/s)" in text
    assert plan(10**9, None).to_dict()["seconds"] == 60.0


STAGED = {"staging": "/cache", "staging_needed_bytes": 10**9}


def test_shards_on_their_way_to_a_remote_store_need_room_on_the_local_disk():
    small = replace(plan(10**9, None), **STAGED, staging_free_bytes=10**8, store="gs://lab/features")

    with pytest.raises(NoSpace, match=r"/cache has 100 MB free.*gs://lab/features: 1 GB.*BRAINENC_CACHE"):
        check_space(small)
    assert "local disk: 1 GB at a time on the way to the store, 100 MB free at /cache" in small.lines()
    for free in (2 * 10**9, None):
        check_space(replace(small, staging_free_bytes=free))
    assert not any("local disk" in line for line in plan(10**9, None).lines())


def test_the_most_at_once_is_the_largest_task_of_each_actor():
    found = [wanted("0.q", n_rows=40, row_bytes=10), wanted("1.q", n_rows=40, row_bytes=100, sealed=[0])]
    tasks = outstanding(found)

    assert [bytes_at_once(tasks, found, actors) for actors in (1, 2, 9)] == [1760, 2640, 2800]


def test_memory_that_was_measured_and_is_too_small_is_refused_with_the_way_out():
    measured = replace(plan(10**6, 10**12), actors=4, actor_memory_bytes=3 * 10**9, memory_limit_bytes=10**10)

    assert "4 actor(s) take 12 GB" in measured.problem()
    assert "10 GB are the limit" in measured.problem()
    with pytest.raises(ExtractionFailed, match=r"--batch-size.*Nothing was started"):
        check_space(measured)
    for fits in ({"actors": 3}, {"actor_memory_bytes": None}, {"memory_limit_bytes": None}):
        assert replace(measured, **fits).problem() == ""


def test_a_store_says_where_its_room_is_however_it_is_written(tmp_path, miniature, pictures, monkeypatch):
    """A file URL is a folder; what is staged needs room in the cache folder, too."""
    monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "cache"))
    config = configured(f"file://{tmp_path}/s", pictures, miniature, features=("3.q",), actors=2)
    whole = 45 * 65 * 48 * 2

    direct = plan_of(survey(config))
    assert (direct.disk_needed_bytes, direct.staging_needed_bytes) == (whole, 0)
    assert direct.disk_free_bytes > 0

    staged = plan_of(survey(config.with_(stage=True)))
    assert (staged.disk_needed_bytes, staged.staging_needed_bytes) == (whole, 16 * 65 * 48 * 2)
    assert staged.staging == str(tmp_path / "cache")
    assert staged.staging_free_bytes > 0
