"""Text for people."""

import pytest

from bulkwf.text import counted


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "request", "0 requests"),
        (1, "request", "1 request"),
        (2, "request", "2 requests"),
        (10_000, "row", "10,000 rows"),
        (1, "batch", "1 batch"),
        (1_000_000, "batch", "1,000,000 batches"),
    ],
)
def test_a_noun_is_plural_unless_its_number_is_1(number, noun, text):
    assert counted(number, noun) == text
