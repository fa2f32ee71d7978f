"""From every rank's word to one verdict: pure, so that all combinations can be tried."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainenc.train.status import Trouble, Wish, Word, after_update, decide

words = st.builds(
    Word,
    step=st.just(7),
    trouble=st.sampled_from(Trouble),
    wish=st.sampled_from(Wish),
    micro_batch=st.integers(1, 8),
    snapshot=st.integers(0, 1),
    save=st.integers(0, 1),
    loss=st.floats(0, 100),
    samples=st.integers(0, 16),
    waited=st.floats(0, 1),
)


def verdict(*given_words: Word):
    return decide(np.stack([w.row() for w in given_words]))


@given(st.lists(words, min_size=1, max_size=5))
def test_gradients_are_used_only_if_every_rank_said_yes(given_words: list[Word]):
    found = verdict(*given_words)

    assert found.go == all(w.trouble == Trouble.NONE for w in given_words)
    assert not (found.shrink and found.stop)
    assert found.go or found.shrink or found.stop, "a step that is not used is done again smaller, or is the last"


@given(st.lists(words, min_size=1, max_size=5))
def test_a_rank_that_broke_never_writes_the_checkpoint(given_words: list[Word]):
    found = verdict(*given_words)

    assert all(given_words[rank].trouble != Trouble.BROKEN for rank in found.healthy)
    assert not found.save or found.healthy


@given(st.lists(words, min_size=1, max_size=5), st.randoms())
def test_who_decides_does_not_depend_on_the_order_of_wishes(given_words: list[Word], random):
    """Only rank 0's clock does."""
    first, *rest = given_words
    random.shuffle(rest)
    one, other = verdict(*given_words), verdict(first, *rest)

    assert (one.go, one.save, one.snapshot, one.shrink, one.stop) == (
        other.go, other.save, other.snapshot, other.shrink, other.stop
    )  # fmt: skip


def test_the_loss_is_the_mean_over_all_samples():
    assert verdict(Word(step=1, loss=6.0, samples=2), Word(step=1, loss=3.0, samples=1)).loss == 3.0


def test_clocks_of_other_ranks_are_not_heard():
    found = verdict(Word(step=1), Word(step=1, save=1, snapshot=1))

    assert (found.save, found.snapshot) == (False, False)


def test_an_order_to_shrink_what_cannot_be_halved_is_an_order_to_stop():
    found = verdict(Word(step=1, micro_batch=1), Word(step=1, micro_batch=1, wish=Wish.SHRINK))

    assert (found.go, found.save, found.shrink, found.stop, found.who) == (True, True, False, True, (1,))


def test_memory_that_ran_out_is_survived_by_halving():
    found = verdict(Word(step=1, micro_batch=8), Word(step=1, micro_batch=8, trouble=Trouble.OUT_OF_MEMORY))

    assert (found.go, found.shrink, found.stop, found.who) == (False, True, False, (1,))


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint_the_newest():
    found = verdict(Word(step=1), Word(step=1, trouble=Trouble.NOT_FINITE))

    assert (found.go, found.save, found.stop) == (False, False, True)


def test_ranks_at_different_steps_are_a_bug():
    with pytest.raises(AssertionError, match="different steps"):
        verdict(Word(step=1), Word(step=2))


@given(st.lists(words, min_size=1, max_size=5), st.data())
def test_whoever_failed_in_the_update_saves_nothing_and_ends_the_run(given_words: list[Word], data):
    before = verdict(*given_words)
    failed = data.draw(st.lists(st.booleans(), min_size=len(given_words), max_size=len(given_words)))

    found = after_update(before, failed)

    if not any(failed):
        assert found == before
    else:
        assert (found.stop, found.snapshot, found.shrink, found.trouble) == (True, False, False, Trouble.BROKEN)
        assert not any(failed[rank] for rank in found.healthy)
        assert found.save == bool(found.healthy)
        assert found.wish == before.wish
