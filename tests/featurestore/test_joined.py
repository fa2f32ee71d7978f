"""One feature across stimulus sets, by stimulus id."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainenc.errors import Incomplete, KeyNotFound, ProvenanceMismatch, UnknownName
from brainenc.featurestore import StimulusSet, open_store
from tests.featurestore.making import values

FEATURE = "dinov2-mini/3.q"


def add(store, name, ids, rows, *, identity=None, per_shard=4, shards=None):
    store.add_stimuli(StimulusSet.from_ids(name, ids))
    made = store.create_collection(f"{name}/{FEATURE}", identity=identity or {"w": 1}, rows_per_shard=per_shard,
                                   row_shape=rows.shape[1:], dtype="float16")  # fmt: skip
    for shard in range(made.n_shards) if shards is None else shards:
        with made.shard_writer(shard) as writer:
            writer.append(rows[made.rows(shard).start : made.rows(shard).stop])
            writer.seal()
    made.commit()


@pytest.fixture(scope="module", params=[(3,), (20000,)], ids=["short rows", "long rows"])
def joined(request, tmp_path_factory):
    store, rows = open_store(tmp_path_factory.mktemp("store"), create=True), values(30, request.param)
    add(store, "train", [f"s{i}" for i in range(20)], rows[:20])
    add(store, "test", [f"s{i}" for i in range(15, 30)], rows[15:], per_shard=7)
    return store, rows


@given(order=st.lists(st.integers(0, 29), max_size=40))
def test_rows_come_from_wherever_they_are(joined, order):
    store, rows = joined
    view = store.join(FEATURE, stimuli=["train", "test"])
    assert view.ids == [f"s{i}" for i in range(30)]
    np.testing.assert_array_equal(view.gather(order), rows[order] if order else rows[:0])
    chosen = store.join(FEATURE, ids=[f"s{i}" for i in order])
    np.testing.assert_array_equal(np.asarray(chosen), rows[order] if order else rows[:0])


def test_it_reads_like_a_view(joined):
    store, rows = joined
    view = store.join(FEATURE, ids=["s29", "s0", "s17"])
    view.prefetch([0, 2])
    np.testing.assert_array_equal(view[-1], rows[17])
    np.testing.assert_array_equal(view[0:2], rows[[29, 0]])
    np.testing.assert_array_equal(np.stack(list(view)), rows[[29, 0, 17]])
    np.testing.assert_array_equal(view.select(ids=["s17", "s29"])[:], rows[[17, 29]])
    np.testing.assert_array_equal(view.select(rows=[1])[:], rows[[0]])
    out = np.empty((2, *rows.shape[1:]), np.float16)
    assert view.gather([0, 1], out=out) is out
    again = pickle.loads(pickle.dumps(view))
    np.testing.assert_array_equal(again[:], rows[[29, 0, 17]])
    assert view.shape == (3, *rows.shape[1:])
    assert view.present.all()
    view.close()


def test_an_id_that_nobody_has_is_named(joined):
    with pytest.raises(UnknownName, match="s99"):
        joined[0].join(FEATURE, ids=["s1", "s99"])
    with pytest.raises(UnknownName, match="s2"):
        joined[0].join(FEATURE, ids=["s1"]).select(ids=["s2"])


def test_a_feature_that_nobody_has_is_named_with_those_there_are(joined):
    with pytest.raises(KeyNotFound, match=r"4\.q.*train/dinov2-mini/3\.q"):
        joined[0].join("dinov2-mini/4.q")


def test_features_made_in_other_ways_are_not_joined(tmp_path):
    store = open_store(tmp_path, create=True)
    add(store, "train", ["a", "b"], values(2, (3,)), identity={"w": 1})
    add(store, "test", ["c", "d"], values(2, (3,)), identity={"w": 2})
    with pytest.raises(ProvenanceMismatch, match="w: stored 2, wanted 1"):
        store.join(FEATURE)


def test_what_is_not_there_yet_is_said(tmp_path):
    store = open_store(tmp_path, create=True)
    add(store, "train", list("abcdefgh"), values(8, (3,)), shards=[1])
    add(store, "test", ["x"], values(1, (3,)))
    view = store.join(FEATURE)
    assert dict(zip(view.ids, view.present.tolist(), strict=True))["a"] is False
    with pytest.raises(Incomplete):
        view.gather([view.ids.index("a")])
