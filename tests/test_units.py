"""Sizes and durations survive being written and read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainenc.errors import UsageError
from brainenc.units import format_bytes, format_seconds, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [("64MiB", 2**26), ("1.5GB", 1_500_000_000), ("12", 12), ("4k", 4096), (" 1 TiB ", 2**40), (7, 7), (".5 kB", 500)],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("5min", 300), ("1.5h", 5400), ("250ms", 0.25), (3, 3)])
def test_durations(text, expected):
    assert parse_seconds(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1MB", "12 parsecs", "1e3x", "1.2.3MB"])
def test_nonsense_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match=r"64MiB"):
        parse_bytes(text)
    with pytest.raises(UsageError, match=r"90s"):
        parse_seconds(text)


@given(st.integers(min_value=0, max_value=10**15))
def test_a_printed_size_is_read_back_to_three_digits(n):
    assert parse_bytes(format_bytes(n)) == pytest.approx(n, rel=5e-3)


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.23, "1.2 s"), (59, "59 s"), (61, "1 min"), (3990, "1 h 06 min"), (7200, "2 h 00 min")]
)
def test_durations_read_like_people_write_them(seconds, text):
    assert format_seconds(seconds) == text
