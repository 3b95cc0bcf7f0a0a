"""Stores attempts, and reads those that still limit the next request: by a rate window, a pause or a quota."""

import sqlite3
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from bulkwf.checkpoint.errors import Damage
from bulkwf.checkpoint.records import checksum, read_run
from bulkwf.checkpoint.schema import Attempt
from bulkwf.limits.quota import Said

__all__ = ["LAST_WORDS", "Past", "attempt_row", "read_past"]

PAGE_ATTEMPTS = 10_000
"""Number of attempts read at a time, the newest first. Reading ends after a page whose attempts are all too old."""
LAST_WORDS = 64
"""Number of quota reports that are read: the latest ones. Answers may overtake each other, so one is not enough."""

_COLUMNS = ", ".join(Attempt._fields)


class Past(NamedTuple):
    """Records of earlier sessions, from a file, that still count against the limits. Times: Unix time in seconds."""

    attempts: list[tuple[float, int]]
    """(when, instances) of each request, the oldest first."""
    pause_until: float
    """When the last pause ends; 0 if there was none."""
    words: list[Said]
    """The latest quotas that answers reported, the oldest first. `attempts` has every request since the first one."""

    def joined(self, other: "Past") -> "Past":
        """The union of this and *other*."""
        return Past(
            sorted([*self.attempts, *other.attempts]),
            max(self.pause_until, other.pause_until),
            sorted([*self.words, *other.words]),
        )

    def shifted(self, seconds: float) -> "Past":
        """The same with *seconds* added to all times."""
        return Past(
            [(at + seconds, instances) for at, instances in self.attempts],
            self.pause_until and self.pause_until + seconds,
            [Said(heard_at + seconds, sent_at + seconds, text) for heard_at, sent_at, text in self.words],
        )


def attempt_row(attempt: Attempt) -> tuple[Any, ...]:
    """The parameters of statement `NOTE`: the fields of *attempt* and their checksum."""
    stored = attempt._replace(
        started_at=float(attempt.started_at), elapsed_s=float(attempt.elapsed_s), waited_s=float(attempt.waited_s)
    )
    return (*stored, checksum(stored))


def read_past(db: sqlite3.Connection, since: float) -> Past:
    """Read the requests that ended after *since* (Unix time), the end of the last pause, and the latest quotas.

    Requests that ended after the first of these quotas was reported are included, even if that was before *since*.

    Raises:
        ValueError: A record is damaged.
    """
    words: list[Said] = []
    recent: list[tuple[float, int]] = []
    for number, page in enumerate(_pages(db)):
        ended = [(one.started_at + one.elapsed_s, one) for one in page]
        if number == 0:
            said = (Said(at, one.started_at, one.quota) for at, one in ended if one.quota is not None)
            words = sorted(islice(said, LAST_WORDS))
            since = min([since, *(word.heard_at for word in words)])
        recent += [(at, one.instances) for at, one in ended if at > since]
        if max(at for at, _ in ended) <= since:
            break
    return Past(sorted(recent), read_run(db).pause_until or 0.0, words)


def _pages(db: sqlite3.Connection) -> Iterator[list[Attempt]]:
    """The attempts in pages, the newest first; each one is verified against its checksum."""
    query = f"SELECT id, {_COLUMNS}, crc FROM attempt WHERE id < ? ORDER BY id DESC LIMIT ?"  # noqa: S608 - ours
    before = 2**63 - 1
    while page := db.execute(query, (before, PAGE_ATTEMPTS)).fetchall():
        for number, *values, crc in page:
            if checksum(values) != crc:
                raise Damage(f"the record of attempt {number} does not match its checksum")
        yield msgspec.convert([row[1:-1] for row in page], list[Attempt])
        before = page[-1][0]
