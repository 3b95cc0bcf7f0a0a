"""How much a harness does: its share of `make test`, or all of it in `make torture`."""

import os
from typing import TypeVar

TORTURE = os.environ.get("BULKWF_TORTURE") == "1"
"""`make torture` runs."""
figures: list[str] = []
"""What harnesses have counted, a line each; they stand at the end of what pytest prints."""
_T = TypeVar("_T")


def scaled(test: _T, torture: _T) -> _T:
    """The first in `make test`, the second in `make torture`."""
    return torture if TORTURE else test
