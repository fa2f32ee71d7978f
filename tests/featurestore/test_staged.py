"""Where a flush is no flush: what earlier sessions handed over is read back before it is trusted."""

import numpy as np
import pytest

from brainenc.featurestore.collection import Collection
from brainenc.featurestore.places.base import Capabilities
from brainenc.featurestore.places.local import LocalPlace
from tests.featurestore.making import KEY, fill, make_collection, values


class Drive(LocalPlace):
    """A folder that forgets: what is named in ``lost`` never arrived, what is in ``confirmed`` was seen to."""

    can = Capabilities(atomic_create=True, real_flush=False, shared_locks=False, fresh_listing=False, mappable=True)

    def __init__(self, root):
        super().__init__(root)
        self.confirmed = set()

    def doubtful(self, name):
        return name not in self.confirmed

    def confirm(self, names):
        self.confirmed.update(names)


@pytest.fixture
def later(tmp_path):
    """A collection in a later session than the one that made it."""
    made = make_collection(tmp_path)
    fill(made, values(23))
    made.commit()
    return Collection(Drive(tmp_path), KEY, made.spec)


def test_what_arrived_is_confirmed_and_not_read_again(later, monkeypatch):
    assert later.sealed() == frozenset(range(5))
    assert later.place.confirmed == {later.shard_name(shard) for shard in range(5)}
    monkeypatch.setattr(Collection, "inspect", lambda *_: pytest.fail("read again"))
    assert Collection(later.place, KEY, later.spec).sealed() == frozenset(range(5))


@pytest.mark.parametrize("loss", ["shard gone", "shard cut", "receipt torn"])
def test_what_did_not_arrive_is_dropped_and_made_again(later, loss):
    root = later.place.root
    shard, receipt = root / KEY / "shard-00001.arrow", root / KEY / "shard-00001.json"
    if loss == "shard gone":
        shard.unlink()
    elif loss == "shard cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        receipt.write_bytes(receipt.read_bytes()[:50])
    assert later.sealed() == {0, 2, 3, 4}
    assert [entry.shard for entry in later.manifest().shards] == [0, 2, 3, 4]
    assert later.shard_name(1) not in later.place.confirmed
    fill(later, values(23), shards=[1])
    later.commit()
    np.testing.assert_array_equal(later.view()[:], values(23))


def test_names_are_probed_where_listings_are_stale(later, monkeypatch):
    """A listing that shows nothing hides nothing."""
    monkeypatch.setattr(Drive, "list", lambda *_: iter(()))
    assert later.sealed() == frozenset(range(5))
    assert len(later.manifest().shards) == 5
