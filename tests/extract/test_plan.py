"""What is left to do, and whether it fits: pure decisions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainenc.errors import NoSpace
from brainenc.extract.plan import (
    ExtractPlan,
    Voucher,
    Wanted,
    check_space,
    choose_rows_per_shard,
    collection_plans,
    outstanding,
    shard_rows,
)  # fmt: skip


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
