"""Text for people."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkwf.text import clean, counted, seconds


def steers(text):
    """Whether a character could move a terminal's cursor or break a line."""
    return any(unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} for c in text)


@given(st.text(max_size=400), st.integers(2, 200))
def test_clean_text_is_one_printable_line_of_limited_length(text, length):
    found = clean(text, length)

    assert len(found) <= length
    assert not steers(found)
    assert found == found.strip()


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "request", "0 requests"),
        (0, "row", "0 rows"),
        (1, "request", "1 request"),
        (2, "request", "2 requests"),
        (2, "batch", "2 batches"),
        (2_000, "request", "2,000 requests"),
        (10_000, "row", "10,000 rows"),
        (1, "batch", "1 batch"),
        (1_000_000, "batch", "1,000,000 batches"),
    ],
)
def test_a_noun_is_plural_unless_its_number_is_1(number, noun, text):
    assert counted(number, noun) == text


@pytest.mark.parametrize(
    "hidden",
    [
        "\x1b",
        "\r",
        "\n",
        "\0",
        "\x9b",
        "\u200b",
        "\u2028",
        "\u2029",
        "\u202e",
        "\u2066",
        "\u061c",
        "\xad",
        "\ufeff",
        "\U000e0041",
    ],
)
def test_clean_text_has_no_control_or_invisible_characters(hidden):
    assert clean(f"a{hidden}{hidden}b") == "a b"


@pytest.mark.parametrize(
    ("length_s", "text"),
    [(1, "1 s"), (1.01, "1.1 s"), (1.1, "1.1 s"), (0.0, "0 s"), (1_800.0, "1,800 s"), (1_800.1, "1,801 s")],
)
def test_a_time_over_a_limit_does_not_read_like_the_limit(length_s, text):
    assert seconds(length_s) == text


def test_long_text_ends_in_an_ellipsis_and_ordinary_text_stays_as_it_is():
    assert clean("x" * 400) == "x" * 299 + "…"
    assert clean("Größe: 5 µm, “ok” 🙂") == "Größe: 5 µm, “ok” 🙂"
