"""How the bad rows of a refused request are found with few requests. Pure.

A refusal says that at least one row of the request is bad, and rarely which one. A `Search` says what to send next:

1. While some rows are suspected to hold a bad one, a part of them is sent. If it is created, the other part must hold
   the bad row, and is split at once.
2. A row is found bad only by requests that hold it alone. Suspicion decides what is sent, never what is rejected: rows
   that are bad only together are all created, and so are those that a failing service refuses at random.
3. After a bad row is found, nothing is known of the rows behind it: as many of them as `BadRowRate` allows are sent in
   one request.
4. A row that a refusal names is sent alone first. If it is created, the names of later refusals are ignored.

Every refusal leaves fewer suspects, and every other answer settles a row, so each row costs at most log2 of the batch's
size plus a few requests.
"""

import re
from collections.abc import Sequence
from functools import cache

__all__ = ["BadRowRate", "Search", "named_row", "split_sizes"]

MEMORY = 0.5
"""Weight that all that came before a bad row has once it is found."""
SEARCH_MEMORY = 0.3
"""The same inside a search: bad rows often stand together, and the rows nearby say most about the next ones."""
NAMED = 1 / 3
"""Weight of a bad row that a refusal named: it takes about a third of the requests, so requests may be larger."""

_WORD = re.compile(r"[A-Za-z0-9_-]+")
_INDEX = re.compile(r"(?:\b(?:instances?|items?|rows?|index|position)\W{0,3}|\[)(\d{1,3})\b", re.IGNORECASE)


class BadRowRate:
    """How many rows a request may hold while bad rows are frequent: about as many as there are for each bad one.

    Most requests that are larger are refused; smaller ones are too many.

    Args:
        most: Upper bound.
        memory: Weight that all that came before a bad row has once it is found.
    """

    def __init__(self, most: int, memory: float = MEMORY) -> None:
        self._most = most
        self._memory = memory
        self._rows = float(most)
        self._found = 1.0

    def within_search(self) -> "BadRowRate":
        """A copy that a search starts from."""
        rate = BadRowRate(self._most, SEARCH_MEMORY)
        rate._rows, rate._found = self._rows, self._found
        return rate

    @property
    def limit(self) -> int:
        """How many rows a request may hold."""
        return max(1, min(self._most, int(self._rows / self._found)))

    def created(self, rows: int) -> None:
        """A request went through."""
        self._rows = min(self._rows + rows, self._most * self._found)

    def found(self, weight: float = 1.0) -> None:
        """A bad row was found, or a refusal had no bad row as its cause."""
        self._rows = self._memory * self._rows + 1
        self._found = self._memory * self._found + weight


class Search:
    """What to send next for the rows of a refused request.

    Args:
        rows: The rows of the request.
        rate: The rate of the run, which learns from this search. The search itself goes by a copy, so that other
            batches do not hide a group of bad rows.
        request_cost: How many instances cost as much as one request.

    Attributes:
        rows: The rows that are not settled, in the order in which they are sent.
        suspects: How many of the first of them are suspected to hold a bad row; 0 if none are.
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

    def next_part(self) -> Sequence[int]:
        """The rows of the next request."""
        if self._named is not None:
            return (self._named,)
        size = self._splits[self.suspects] if self.suspects else len(self.rows)
        return self.rows[: min(size, self._most, self._rate.limit)]

    def created(self, part: Sequence[int]) -> None:
        """Rows that were sent are settled, and none of them is bad."""
        if self._named in part:
            self._named, self._names_are_right = None, False
        if 0 < self.suspects <= len(part):  # no row was the cause of the refusal
            self._note_found(1.0)
        self._remove(part)
        for rate in self._rates:
            rate.created(len(part))

    def found(self, row: int) -> None:
        """A row was refused alone, twice. It explains the last refusal, so nothing is known of the others."""
        self._note_found(NAMED if row == self._named else 1.0)
        self._named = None
        self._remove((row,))
        self.suspects = 0
        self._most = len(self.rows)

    def refused(self, part: Sequence[int], named: int | None = None) -> None:
        """Rows that were sent together are refused; *named* is the row that the refusal names, if it names one."""
        self._to_front(part)
        self.suspects = len(part)
        self._named = named if self._names_are_right else None

    def too_large(self, part: Sequence[int]) -> None:
        """A request with these rows was too large: unlike a bad row, that says nothing of either half of them."""
        self._to_front(part)
        self._most = len(part) // 2

    def _to_front(self, part: Sequence[int]) -> None:
        # An answer may have settled some of the rows that were sent, so *part* need not be the first of the rest.
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
    """How many of n suspects to send first, for each n up to *most*.

    The sizes that take least to find one bad row among n that are equally suspect, where a request costs as much as
    *request_cost* instances, and instances in a request that is created cost nothing: they have to be sent anyway.
    Where requests are scarce, these are halves; where instances are, about a quarter.
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
    """Which row of *part* a refusal's message names, by its id or else by its index in the request; None if none.

    This is a guess: a message may hold words that look like an id, and numbers that are no index.
    """
    words = _WORD.findall(message)
    position_of = {ids[position]: position for position in part}
    for word in words:
        if word in position_of:
            return position_of[word]
    index = _INDEX.search(message)
    return part[int(index[1])] if index and int(index[1]) < len(part) else None
