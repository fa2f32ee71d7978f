"""Any sequence of what writers, drivers, tidiers and accidents do, against a model in memory."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from brainenc.featurestore import open_store
from brainenc.featurestore.recovery import debris, gc, repair, verify
from tests.featurestore.making import KEY, fill, make_collection, values

N, SHAPE = 14, (5,)
ROWS = values(N, SHAPE)


class StoreMachine(RuleBasedStateMachine):
    """The model: which shards are sealed, committed, damaged, and damaged so that their size tells."""

    @initialize(per_shard=st.integers(1, 6), form=st.sampled_from(["arrow", "npy"]))
    def create(self, per_shard, form):
        self.folder = Path(tempfile.mkdtemp(prefix="machine-"))
        self.collection = make_collection(self.folder, N, row_shape=SHAPE, rows_per_shard=per_shard, format=form)
        self.sealed, self.committed, self.damaged, self.shortened = set(), set(), set(), set()

    def teardown(self):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def path(self, shard):
        return self.folder / self.collection.shard_name(shard)

    def pick(self, data, shards):
        return data.draw(st.sampled_from(sorted(shards)))

    @rule(data=st.data())
    def seal(self, data):
        free = set(range(self.collection.n_shards)) - self.sealed
        if free:
            shard = self.pick(data, free)
            fill(self.collection, ROWS, shards=[shard])
            self.sealed.add(shard)

    @rule(data=st.data(), rows=st.integers(0, 3))
    def begin_and_die(self, data, rows):
        free = set(range(self.collection.n_shards)) - self.sealed
        if free:
            shard = self.pick(data, free)
            writer = self.collection.shard_writer(shard)
            mine = ROWS[self.collection.rows(shard).start : self.collection.rows(shard).stop]
            writer.append(mine[:rows])
            copy = writer._path.with_name(f".{self.path(shard).name}.0123456789ab.partial")
            copy.write_bytes(writer._path.read_bytes())
            writer.abort()

    @rule()
    def commit(self):
        self.collection.commit()
        self.committed |= self.sealed

    @rule()
    def reopen(self):
        self.collection = open_store(self.folder).collection(KEY)

    @precondition(lambda self: getattr(self, "sealed", set()) - self.damaged)
    @rule(data=st.data())
    def lose_a_receipt(self, data):
        """As a death between shard and receipt does: it is adopted again, and what has lost its file is dropped."""
        shard = self.pick(data, self.sealed - self.damaged)
        self.path(shard).with_suffix(".json").unlink()
        self.sealed, self.committed = self.sealed - self.shortened, self.committed - self.shortened
        self.damaged, self.shortened = self.damaged - self.shortened, set()
        assert self.collection.sealed() == self.sealed

    @precondition(lambda self: getattr(self, "sealed", set()) - self.damaged)
    @rule(data=st.data(), how=st.sampled_from(["flip", "cut", "remove"]), where=st.floats(0, 1, exclude_max=True))
    def damage(self, data, how, where):
        shard = self.pick(data, self.sealed - self.damaged)
        raw = bytearray(self.path(shard).read_bytes())
        position = int(where * len(raw))
        if how == "remove":
            self.path(shard).unlink()
        else:
            raw[position] ^= 1
            self.path(shard).write_bytes(raw if how == "flip" else raw[:position])
        self.damaged.add(shard)
        self.shortened |= set() if how == "flip" else {shard}

    @rule()
    def repair(self):
        store = open_store(self.folder)
        findings = verify(store).findings
        assert {f.shard for f in findings} == self.damaged | (self.sealed - self.committed)
        assert repair(store, findings) == []
        self.sealed -= self.damaged
        self.committed = set(self.sealed)
        self.damaged, self.shortened = set(), set()

    @rule()
    def tidy(self):
        store = open_store(self.folder)
        gc(store, list(debris(store, just_opened_s=0)))
        assert not list(self.folder.rglob("*.partial"))

    @invariant()
    def readers_see_what_was_committed(self):
        if not hasattr(self, "folder"):
            return
        assert self.collection.found()[0] == self.sealed
        view = open_store(self.folder)[KEY]
        rows = [row for shard in self.committed for row in self.collection.rows(shard)]
        assert sorted(np.flatnonzero(view.present)) == sorted(rows)
        good = [row for shard in self.committed - self.damaged for row in self.collection.rows(shard)]
        np.testing.assert_array_equal(view.verified().gather(good), ROWS[good] if good else ROWS[:0])
        np.testing.assert_array_equal(view.gather(good), ROWS[good] if good else ROWS[:0])


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)
