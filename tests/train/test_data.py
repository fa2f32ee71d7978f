"""Batches come in order, ahead of the step, out of maps, and cost no memory that grows."""

import threading
import time

import numpy as np
import pytest
import torch

from brainenc.errors import MissingRow
from brainenc.train.data import AHEAD, Loader, Samples
from brainenc.train.features import FeatureLayout, RowLayout
from brainenc.train.order import Order


class MemoryView:
    """A feature in memory."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.shape, self.dtype = rows, rows.shape, rows.dtype
        self.ids, self.details = [f"s{i}" for i in range(len(rows))], {}
        self.wanted, self.released = [], 0

    def gather(self, indices, out=None):
        out[...] = self.rows[indices]
        return out

    def prefetch(self, indices):
        self.wanted.append(list(indices))

    def release(self):
        self.released += 1


def make(n: int = 23, *, dtype="float16") -> Samples:
    view = MemoryView(np.arange(n * 5 * 3).reshape(n, 5, 3).astype(dtype))
    layout = RowLayout(name="f", row_shape=(5, 3), n_prefix=1, grid=(2, 2), part="map")
    lh, rh = (np.arange(n * v).reshape(n, v).astype(np.float32) for v in (4, 6))
    rows = np.arange(n)[::-1].copy()
    return Samples(
        views=[view], feature_rows=[rows], responses=(lh, rh), response_rows=rows, ids=[f"s{i}" for i in rows],
        layout=FeatureLayout.of([layout]),
    )  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_rank_gets_its_share_of_every_batch(size: int):
    samples, order = make(), Order(n_samples=23, batch_size=4, seed=3)
    seen = []
    for rank in range(size):
        with Loader(samples, order, rank=rank, size=size) as loader:
            for batch in loader.run(0, 12):
                features, lh, rh = (t.clone() for t in batch.part(0, batch.count))
                seen += [(batch.step, name, f, a, b) for name, f, a, b in zip(batch.ids, features, lh, rh, strict=True)]

    wanted = {(step, samples.ids[i]) for step, rows in order.batches(0, 12) for i in rows}
    assert {(step, name) for step, name, *_ in seen} == wanted
    assert len(seen) == len(wanted)
    for _, name, features, lh, rh in seen:
        row = int(name[1:])
        assert torch.equal(lh, torch.from_numpy(samples.responses[0][row]))
        assert torch.equal(rh, torch.from_numpy(samples.responses[1][row]))
        tokens = torch.from_numpy(samples.views[0].rows[row, 1:].astype(np.float32))
        assert torch.equal(features, tokens.reshape(2, 2, 3).permute(2, 0, 1))


def test_batches_are_gathered_ahead_but_no_further_than_buffers_reach():
    samples = make(40)
    with Loader(samples, Order(n_samples=40, batch_size=4, seed=0)) as loader:
        batches = loader.run(0, 10)
        next(batches)
        deadline = time.monotonic() + 5
        while len(samples.views[0].wanted) < AHEAD + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)

        assert len(samples.views[0].wanted) == AHEAD + 1


def test_the_next_batch_is_announced_before_it_is_read():
    samples, order = make(16), Order(n_samples=16, batch_size=4, seed=0)
    with Loader(samples, order) as loader:
        list(loader.run(0, 4))

    rows = [samples.feature_rows[0][r].tolist() for _, r in order.batches(0, 4)]
    assert samples.views[0].wanted == [*rows[1:], []]


def test_an_error_of_the_thread_is_raised_where_the_batch_is_used():
    samples = make()

    def fail(indices, out=None):
        raise MissingRow("s3", "the feature")

    samples.views[0].gather = fail
    with Loader(samples, Order(n_samples=23, batch_size=4, seed=0)) as loader, pytest.raises(MissingRow):
        next(loader.run(0, 5))


def test_stopping_in_the_middle_ends_the_thread_and_the_loader_can_begin_elsewhere():
    before = threading.active_count()
    samples, order = make(), Order(n_samples=23, batch_size=4, seed=0)
    with Loader(samples, order) as loader:
        batches = loader.run(0, 100)
        next(batches)
        batches.close()
        assert threading.active_count() == before

        assert [b.step for b in loader.run(7, 9)] == [7, 8]
    assert threading.active_count() == before


def test_maps_are_released_at_a_budget_and_not_after_every_batch(monkeypatch):
    samples = make(40)
    monkeypatch.setattr("brainenc.train.data.MAP_BUDGET", 1500)
    with Loader(samples, Order(n_samples=40, batch_size=4, seed=0)) as loader:
        list(loader.run(0, 10))

    assert 1 <= samples.views[0].released <= 3


def test_two_loaders_share_one_set_of_buffers():
    samples, order = make(), Order(n_samples=23, batch_size=4, seed=0)
    with Loader(samples, order) as first:
        second = Loader(samples, order, share_buffers=first)

        a = [b.part(0, b.count)[1].sum().item() for b in first.run(0, 3)]
        assert [b.part(0, b.count)[1].sum().item() for b in second.run(0, 3)] == a
