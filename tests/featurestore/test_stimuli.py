"""Stimulus sets: columns that behave like the list of stimuli that they are."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainenc.errors import DataError
from brainenc.featurestore import Stimulus, StimulusSet
from brainenc.featurestore.checksums import digest
from brainenc.featurestore.documents import canonical

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
stimuli = st.builds(Stimulus, texts, texts, st.none() | st.integers(0, 2**62), st.none() | texts)
lists = st.lists(stimuli, max_size=6, unique_by=lambda stimulus: stimulus.id)


@given(rows=lists)
def test_it_is_the_list_that_it_was_made_of(rows):
    made = StimulusSet("s", iter(rows))
    assert list(made) == rows
    assert [made[row] for row in range(-len(rows), len(rows))] == rows + rows
    assert made[1:4] == tuple(rows[1:4])
    assert made[::-2] == tuple(rows[::-2])
    assert made.ids == [stimulus.id for stimulus in rows]
    assert made.row_of == {stimulus.id: row for row, stimulus in enumerate(rows)}
    with pytest.raises(IndexError):
        made[len(rows)]


@given(rows=lists)
def test_its_checksum_is_the_one_of_the_format_page(rows):
    table = [[s.id, s.uri, s.size, s.stamp] for s in rows]
    assert StimulusSet("s", rows).checksum == digest(canonical({"stimuli": table}))


@given(rows=lists)
def test_it_comes_back_from_its_file_and_from_a_pickle(rows):
    made = StimulusSet("s", rows)
    assert StimulusSet.from_arrow(made.to_arrow(), "there") == made
    assert pickle.loads(pickle.dumps(made)) == made


def test_more_stimuli_than_are_looked_at_at_once():
    rows = [Stimulus(f"id {row}", "é" * (row % 40000 == 0), row or None, "") for row in range(40_001)]
    made = StimulusSet("s", rows)
    assert list(made) == rows
    assert made.checksum == digest(canonical({"stimuli": [[s.id, s.uri, s.size, s.stamp] for s in rows]}))
    assert StimulusSet.from_arrow(made.to_arrow(), "there").checksum == made.checksum


@given(mine=lists, theirs=lists)
def test_the_difference_names_what_is_gone_new_and_changed(mine, theirs):
    a, b = {s.id: s for s in mine}, {s.id: s for s in theirs}
    said = StimulusSet("s", mine).difference(StimulusSet("s", theirs))
    counts = {
        "gone": len(a.keys() - b.keys()), "new": len(b.keys() - a.keys()),
        "changed": sum(a[i] != b[i] for i in a.keys() & b.keys()),
    }  # fmt: skip
    for word, count in counts.items():
        assert (f"{count} {word} (" in said) == (count > 0)
    reordered = a.keys() == b.keys() and list(a) != list(b)
    assert ("the order of rows differs" in said) == reordered
    assert (said == "") == (mine == theirs)


def test_touched_are_rows_of_another_size_or_stamp_wherever_they_lie():
    before = [Stimulus("a", "x", 1, "1"), Stimulus("b", "x", None, "1"), Stimulus("c", "x", 1, None), Stimulus("d")]
    after = [Stimulus("a", "y", 1, "1"), Stimulus("b", "x", 2, "1"), Stimulus("c", "x", 1, "3"), Stimulus("d")]
    assert StimulusSet("s", before).touched(StimulusSet("s", after)) == [1, 2]


def test_an_id_that_comes_twice_and_one_that_is_no_text_are_refused():
    with pytest.raises(DataError, match="has the id 'b' twice"):
        StimulusSet.from_ids("s", ["a", "b", "c", "b"])
    with pytest.raises(DataError, match="no UTF-8 text"):
        StimulusSet.from_ids("s", ["a", "b\udcff"])
