"""The order of samples depends on seed, epoch and step, and on nothing else."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from brainenc.train.order import Order, n_training, permutation, share, split_indices

sizes = st.integers(1, 200)


@given(n=sizes, seed=st.integers(0, 2**63), stream=st.integers(0, 1000))
def test_a_permutation_holds_every_number_once(n: int, seed: int, stream: int):
    assert sorted(permutation(n, seed, stream)) == list(range(n))


def test_the_order_never_changes_between_versions():
    """Literal numbers: a resumed run under another NumPy must see the same samples."""
    assert permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(8, 7, 3).tolist() == [2, 5, 7, 3, 0, 6, 4, 1]
    assert split_indices(8, 0).tolist() == [0, 7, 5, 3, 2, 6, 1, 4]


@given(n=sizes, batch=st.integers(1, 40), world=st.integers(1, 9), seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_ranks_together_see_each_sample_of_an_epoch_once(n: int, batch: int, world: int, seed: int, epoch: int):
    """Whatever the number of workers, the last short batch and empty shares included."""
    order = Order(n_samples=n, batch_size=batch, seed=seed)
    first = epoch * order.steps_per_epoch

    batches = list(order.batches(first, first + order.steps_per_epoch))
    shares = [[share(rows, rank, world) for rank in range(world)] for _, rows in batches]

    assert all(np.array_equal(np.concatenate(parts), rows) for parts, (_, rows) in zip(shares, batches, strict=True))
    assert all(max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in shares)
    assert sorted(np.concatenate([rows for _, rows in batches])) == list(range(n))
    assert [len(rows) for _, rows in batches[:-1]] == [batch] * (len(batches) - 1)


@given(n=sizes, batch=st.integers(1, 40), start=st.integers(0, 30))
def test_starting_in_the_middle_gives_the_rest_of_the_same_order(n: int, batch: int, start: int):
    order = Order(n_samples=n, batch_size=batch, seed=5)
    whole = list(order.batches(0, 40))

    rest = list(order.batches(start, 40))

    assert [step for step, _ in rest] == list(range(start, 40))
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(whole[start:], rest, strict=True))


def test_epochs_and_seeds_give_different_orders():
    order = Order(n_samples=50, batch_size=16, seed=0)

    assert not np.array_equal(order.epoch(0), order.epoch(1))
    assert not np.array_equal(order.epoch(0), Order(n_samples=50, batch_size=16, seed=1).epoch(0))
    assert not np.array_equal(split_indices(50, 0), order.epoch(0))


def test_unshuffled_is_row_order():
    order = Order(n_samples=5, batch_size=2, seed=0, shuffle=False)

    assert [rows.tolist() for _, rows in order.batches(0, 3)] == [[0, 1], [2, 3], [4]]


def test_nine_tenths_are_for_training():
    assert [n_training(n) for n in (10, 9841, 8779, 1)] == [9, 8857, 7901, 1]
