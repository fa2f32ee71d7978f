"""Images that are no longer those that features were made of."""

from brainenc.extract.changes import changed_rows, suspects
from brainenc.featurestore.stimuli import Stimulus, StimulusSet


def test_a_set_of_which_only_ids_are_known_is_no_changed_set():
    """Features imported from files bring ids alone; extracting another feature of the same images goes on from them."""
    stored = StimulusSet.from_ids("s", ["a", "b"])
    found = StimulusSet("s", [Stimulus("a", "/x/a.png", 10, "1"), Stimulus("b", "/x/b.png", 11, "2")])
    rows = suspects(stored, found)
    assert rows == [0, 1]
    assert changed_rows(rows, stored, found, lambda row: None, lambda uri: "hash") == []


def test_without_a_hash_a_files_size_decides():
    stored = StimulusSet("s", [Stimulus("a", "/x/a.png", 10, "1"), Stimulus("b", "/x/b.png", 11, "2")])
    found = StimulusSet("s", [Stimulus("a", "/y/a.png", 10, "9"), Stimulus("b", "/y/b.png", 12, "9")])
    assert changed_rows([0, 1], stored, found, lambda row: None, lambda uri: "hash") == [1]


def test_with_a_hash_the_content_decides():
    stored = StimulusSet("s", [Stimulus("a", "/x/a.png", 10, "1"), Stimulus("b", "/x/b.png", 11, "2")])
    found = StimulusSet("s", [Stimulus("a", "/y/a.png", 99, "9"), Stimulus("b", "/y/b.png", 11, "9")])
    hashes = {"/y/a.png": "same", "/y/b.png": "other"}
    assert changed_rows([0, 1], stored, found, lambda row: "same", hashes.__getitem__) == [1]
