"""Finds the bad rows of a refused request with few requests. Pure.

A refusal says that at least one row of the request is bad, and rarely which one. A `Search` says what to send next:

1. While a group of rows is suspected to hold a bad row, a part of the group is sent. If it is created, the other part
   must hold the bad row, and is split in turn without being sent whole.
2. A row is found bad only by requests that hold it alone. Suspicion decides what is sent, never what is rejected: rows
   that are bad only together are all created.
3. After a bad row is found, nothing is known about the rows behind it. They are sent in requests as large as
   `BadRowRate` allows.
4. A row that a refusal names is sent alone first. If it is created, the names of later refusals are ignored.

Every refusal leaves fewer suspects, and every other answer settles a row. So a bad row costs about log2(size of the
batch) requests, plus a few.
"""

import re
from collections.abc import Sequence
from functools import cache

__all__ = ["BadRowRate", "Search", "named_row", "split_sizes"]

MEMORY = 0.5
"""Factor by which the counts of `BadRowRate` are reduced each time that a bad row is found."""
SEARCH_MEMORY = 0.3
"""The same inside a search. It is lower: bad rows often stand together, so the last rows predict the next ones best."""
NAMED = 1 / 3
"""How much a bad row counts that a refusal named. It is less than 1, as finding such a row takes about a third of the
requests: the next requests may be larger."""
PASSED = 2
"""After a request that was too large, requests of half the size come first. After this many, the size doubles."""

_WORD = re.compile(r"[A-Za-z0-9_-]+")
_INDEX = re.compile(r"(?:\b(?:instances?|items?|rows?|index|position)\W{0,3}|\[)(\d{1,3})\b", re.IGNORECASE)


class BadRowRate:
    """How many rows a request may hold while bad rows are frequent: about the number of rows per bad row.

    Most larger requests would be refused; smaller ones would be too many.

    Args:
        most: Maximum number of rows in a request.
        memory: Factor by which the counts so far are reduced each time that a bad row is found.
    """

    def __init__(self, most: int, memory: float = MEMORY) -> None:
        self._most = most
        self._memory = memory
        self._rows = float(most)
        self._found = 1.0

    def within_search(self) -> "BadRowRate":
        """A copy for one search, with the factor `SEARCH_MEMORY`."""
        rate = BadRowRate(self._most, SEARCH_MEMORY)
        rate._rows, rate._found = self._rows, self._found
        return rate

    @property
    def limit(self) -> int:
        """How many rows a request may hold."""
        return max(1, min(self._most, int(self._rows / self._found)))

    def created(self, rows: int) -> None:
        """Count *rows* rows that were created in one request."""
        self._rows = min(self._rows + rows, self._most * self._found)

    def found(self, weight: float = 1.0) -> None:
        """Count a bad row, or a refusal that no bad row has caused. *weight*: how much it counts."""
        self._rows = self._memory * self._rows + 1
        self._found = self._memory * self._found + weight


class Search:
    """What to send next for the rows of a refused request.

    Args:
        rows: The rows of the request.
        rate: The rate of the run, which is updated by this search. The search itself uses a copy, so that the rows of
            other batches do not hide a group of bad rows in this one.
        request_cost: How many instances cost as much as one request.

    Attributes:
        rows: The rows that are not settled, in the order in which they are sent.
        suspects: Size of the group at the front of `rows` that is suspected to hold a bad row; 0 if there is none.
    """

    def __init__(self, rows: Sequence[int], rate: BadRowRate, request_cost: float) -> None:
        self.rows = list(rows)
        self.suspects = 0
        self._rate = rate.within_search()
        self._rates = (rate, self._rate)
        self._splits = split_sizes(request_cost)
        self._named: int | None = None
        self._names_are_right = True
        self._most = len(self.rows)
        self._passed = 0
        """How many requests of `_most` rows in a row were not too large."""

    def next_part(self) -> Sequence[int]:
        """The rows of the next request."""
        if self._named is not None:
            return (self._named,)
        size = self._splits[self.suspects] if self.suspects else len(self.rows)
        return self.rows[: min(size, self._most, self._rate.limit)]

    def created(self, part: Sequence[int]) -> None:
        """Note that the rows of *part* were sent and are settled, and that none of them is bad."""
        if self._named in part:
            self._named, self._names_are_right = None, False
        if 0 < self.suspects <= len(part):  # no row was the cause of the refusal
            self._note_found(1.0)
        self._remove(part)
        if len(part) == self._most:
            self._passed += 1
            if self._passed == PASSED:  # the large row may be settled: try larger requests again
                self._most, self._passed = 2 * self._most, 0
        for rate in self._rates:
            rate.created(len(part))

    def found(self, row: int) -> None:
        """Note that *row* is bad. It explains the last refusal, so nothing is known about the other suspects."""
        self._note_found(NAMED if row == self._named else 1.0)
        self._named = None
        self._remove((row,))
        self.suspects = 0
        self._most = len(self.rows)

    def refused(self, part: Sequence[int], named: int | None = None) -> None:
        """Note that the rows of *part*, sent together, were refused. *named*: the row that the service names."""
        self._to_front(part)
        self.suspects = len(part)
        self._named = named if self._names_are_right else None

    def too_large(self, part: Sequence[int]) -> None:
        """Note that a request with the rows of *part* was too large. Unlike a refusal, this makes no row suspect."""
        self._to_front(part)
        self._most, self._passed = len(part) // 2, 0

    def _to_front(self, part: Sequence[int]) -> None:
        # An answer may have settled some of the rows that were sent, so *part* need not be at the front already.
        others = set(part)
        self.rows = [*part, *(row for row in self.rows if row not in others)]

    def _remove(self, part: Sequence[int]) -> None:
        settled = set(part)
        self.rows = [row for row in self.rows if row not in settled]
        self.suspects = max(0, self.suspects - len(settled))

    def _note_found(self, weight: float) -> None:
        for rate in self._rates:
            rate.found(weight)


@cache
def split_sizes(request_cost: float, most: int = 100) -> Sequence[int]:
    """For each n up to *most*: how many of n suspects to send first, so that finding the bad row costs least.

    One of the n rows is bad, each with the same probability. A request costs as much as *request_cost* instances.
    Instances in a request that is created cost nothing, as they have to be sent anyway. The sizes are about n / 2 where
    requests are scarce, and about n / 4 where instances are scarce.
    """
    sizes, costs = [1, 1], [0.0, 0.0]
    for n in range(2, most + 1):
        cost, size = min(
            (request_cost + (size * (size + costs[size]) + (n - size) * costs[n - size]) / n, size)
            for size in range(1, n // 2 + 1)
        )
        sizes.append(size)
        costs.append(cost)
    return sizes


def named_row(message: str, part: Sequence[int], ids: Sequence[str]) -> int | None:
    """The row of *part* that a refusal's message names, by id or else by index in the request; None if it names none.

    This is a guess: a message may hold words that look like an id, and numbers that are no index.
    """
    words = _WORD.findall(message)
    position_of = {ids[position]: position for position in part}
    for word in words:
        if word in position_of:
            return position_of[word]
    index = _INDEX.search(message)
    return part[int(index[1])] if index and int(index[1]) < len(part) else None
