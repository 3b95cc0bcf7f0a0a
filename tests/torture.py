"""How much a harness does in `make test` and in `make torture`, and what it has counted."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

TORTURE = os.environ.get("BULKWF_TORTURE") == "1"
"""`make torture` runs."""
figures: list[str] = []
"""Figures of single tests, a line each. pytest prints them at the end."""
_T = TypeVar("_T")


def scaled(test: _T, torture: _T) -> _T:
    """The first in `make test`, the second in `make torture`."""
    return torture if TORTURE else test


class Tally(NamedTuple):
    """What the tests of one harness have counted together: a line, with the names of its counts in braces."""

    line: str
    counts: Counter[str]
    maxima: Sequence[str]
    """Names of counts of which the largest is shown, not the sum, where tests ran in several processes."""


_tallies: list[Tally] = []


def tally(line: str, *, maxima: Sequence[str] = (), counts: Counter[str] | None = None) -> Counter[str]:
    """Counts that pytest prints at the end, as *line*; tests in other processes add to them."""
    counts = Counter() if counts is None else counts
    _tallies.append(Tally(line, counts, maxima))
    return counts


def own_figures() -> list:
    """What this process has counted, in a form that can be sent to another one."""
    return [figures, [(line, dict(counts), list(maxima)) for line, counts, maxima in _tallies]]


def add_up(processes: Iterable[list]) -> list[str]:
    """What several processes have counted together, a line each."""
    alone, together = [], {}
    for own, tallies in processes:
        alone += own
        for line, counts, maxima in tallies:
            total = together.setdefault(line, Counter())
            for name, count in counts.items():
                total[name] = max(total[name], count) if name in maxima else total[name] + count
    return alone + [line.format_map(total) for line, total in together.items() if total]
