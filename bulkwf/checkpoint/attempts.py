"""What the attempts of earlier sessions still bind: the limits' windows, the pause, the quota of the token."""

import sqlite3
from operator import index
from typing import NamedTuple

from bulkwf.checkpoint.records import read_run
from bulkwf.limits.quota import Said

__all__ = ["LAST_WORDS", "Past", "read_past"]

PAGE_ATTEMPTS = 10_000
"""If this many attempts in a row are too old, all earlier ones are."""
LAST_WORDS = 64
"""How many answers with a quota are read, the last ones. Answers may overtake each other, so one is not enough."""


class Past(NamedTuple):
    """What a file says of earlier sessions' requests, as far as it may still bind. Times are in Unix seconds."""

    attempts: list[tuple[float, int]]
    """(when, instances) of each request, the oldest first."""
    pause_until: float
    """When the last pause ends; 0 if there was none."""
    words: list[Said]
    """What the last answers said is left for the token, the oldest first; `attempts` go back as far, or further."""

    def joined(self, other: "Past") -> "Past":
        """This and *other*."""
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


def read_past(db: sqlite3.Connection, since: float) -> Past:
    """What a checkpoint says of the requests after *since* (Unix time), and of what may bind the next one.

    Raises:
        ValueError: A record is damaged.
    """
    query = (
        "SELECT started_at + elapsed_s, started_at, quota FROM attempt "
        "WHERE quota IS NOT NULL AND id > (SELECT max(id) FROM attempt) - ? ORDER BY id DESC LIMIT ?"
    )
    words = sorted(Said.of(*word) for word in db.execute(query, (PAGE_ATTEMPTS, LAST_WORDS)))
    since = min([since, *(said.heard_at for said in words)])
    return Past(_recent(db, since), read_run(db).pause_until or 0.0, words)


def _recent(db: sqlite3.Connection, since: float) -> list[tuple[float, int]]:
    """(Unix time, instances) of the attempts after *since*, the oldest first; read from the newest one backwards."""
    query = "SELECT id, started_at + elapsed_s, instances FROM attempt WHERE id < ? ORDER BY id DESC LIMIT ?"
    recent: list[tuple[float, int]] = []
    before, go_on = 2**63 - 1, True
    while go_on and (page := db.execute(query, (before, PAGE_ATTEMPTS)).fetchall()):
        before = page[-1][0]
        found = [(float(at), index(instances)) for _, at, instances in page]
        recent += [one for one in found if one[0] > since]
        go_on = max(found)[0] > since
    return sorted(recent)
