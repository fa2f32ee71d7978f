"""Errors survive pickling between processes, carry what to do, and the tree in the docstring is the tree there is."""

import inspect
import pickle
import re

import pytest

from brainenc import errors

EXAMPLES = {
    "UnknownName": ("layer", "12", ("0", "1"), "dinov2-base"),
    "BadImages": ({"a.png": "truncated"}, "Mend or remove them."),
    "KeyNotFound": ("a/b/1.q", "/data/store", ("a/b/0.q",)),
    "ProvenanceMismatch": ("a/b/1.q", {"weights": ("x", "y")}, "Choose another name."),
    "MissingRow": ("nsd-00013", "a/b/1.q"),
    "Incomplete": ("nsd-00013", "a/b/1.q", 3, 10),
    "CacheTooSmall": (100, 50, "gs://lab/features"),
    "MemoryRefused": (100, 50, "a batch"),
}
CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.BrainencError)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_survives_pickling(cls):
    error = cls(*EXAMPLES.get(cls.__name__, ("what happened, and what to do",)))

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is cls
    assert str(copy) == str(error)
    assert copy.__dict__ == error.__dict__


def test_the_drawn_tree_is_the_tree():
    drawn = ["BrainencError", *re.findall(r"[|`]- ([A-Z]\w+) ", errors.__doc__ or "")]

    assert sorted(set(drawn)) == sorted(c.__name__ for c in CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_says_when_it_is_raised(cls):
    assert cls.__doc__


def test_unknown_name_lists_what_there_is():
    assert str(errors.UnknownName("facet", "x", ("q", "k"), "dinov2-base")) == (
        "There is no facet 'x' in dinov2-base. There is: q, k."
    )


def test_unknown_name_asks_whether_a_near_one_was_meant():
    assert "Did you mean 'token'?" in str(errors.UnknownName("facet", "tokn", ("q", "token")))
    assert "Did you mean 'clip'?" in str(errors.UnknownName("backbone", "clipp", ("a hub id",), "", ("clip", "dinov2")))


def test_a_collection_that_is_not_there_says_how_to_make_it():
    said = str(errors.KeyNotFound("a-train/dinov2-base/-1.q", "/data/store", ("a-train/dinov2-base/11.q",)))
    assert "Did you mean 'a-train/dinov2-base/11.q'?" in said
    assert "brainenc extract --store /data/store" in said
    assert "--name dinov2-base --feature=-1.q" in said
    assert "brainenc extract" not in str(errors.KeyNotFound("nothing", "/data/store"))


def test_exit_codes():
    assert errors.UsageError("x").exit_code == 2
    assert errors.DataError("x").exit_code == 1
    assert errors.StoppedSafely("x").exit_code == 75
