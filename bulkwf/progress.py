"""Counts of what is durable, and what follows from them: rate, time left, summary, exit code. Pure."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from bulkwf.model import Outcome, Summary

__all__ = ["Progress", "Totals"]

RATE_WINDOW_S = 30.0


@dataclass(slots=True)
class Totals:
    """Rows by outcome, over all sessions of a run."""

    created: int = 0
    existed: int = 0
    existed_in_doubt: int = 0
    rejected: int = 0
    invalid: int = 0
    pending: int = 0

    @property
    def settled(self) -> int:
        """Rows that have come to an end."""
        return self.created + self.existed + self.rejected + self.invalid

    @property
    def rows(self) -> int:
        """Rows met so far, blank ones not counted."""
        return self.settled + self.pending


@dataclass(slots=True)
class Progress:
    """The account of one session. Only what is durable on disk is counted.

    Attributes:
        started_at: When the session began, on the monotonic clock.
        totals: Over all sessions.
        settled_before: Rows that earlier sessions had settled.
        attempts: Requests of this session.
        paused_s: How long the service has ordered silence in this session.
        reading: Tells how much of the list has been read, from 0 to 1; None if its length is unknown.
    """

    started_at: float
    totals: Totals = field(default_factory=Totals)
    settled_before: int = 0
    attempts: int = 0
    paused_s: float = 0.0
    reading: Callable[[], float | None] = lambda: None
    _marks: deque[tuple[float, int]] = field(default_factory=deque)

    def begun(self, instances: int, invalid: int) -> None:
        """A batch is durable: so many instances are pending, so many rows refused."""
        self.totals.pending += instances
        self.totals.invalid += invalid

    def settled(self, outcome: Outcome, in_doubt: int, now: float) -> None:
        """An outcome is durable; *in_doubt* of its instances existed after an attempt in doubt."""
        totals, settled = self.totals, len(outcome.created) + len(outcome.others)
        totals.created += len(outcome.created)
        for _, result in outcome.others:
            if result.outcome == "existed":
                totals.existed += 1
            elif result.outcome == "rejected":
                totals.rejected += 1
            else:
                totals.created += 1
        totals.existed_in_doubt += in_doubt
        totals.pending -= settled
        self._marks.append((now, totals.settled))
        while len(self._marks) > 2 and self._marks[1][0] < now - RATE_WINDOW_S:
            self._marks.popleft()

    @property
    def read_share(self) -> float | None:
        """How much of the list has been read, from 0 to 1; None if its length is unknown."""
        return self.reading()

    @property
    def settled_now(self) -> int:
        """Rows that this session has settled."""
        return self.totals.settled - self.settled_before

    def rate(self, now: float) -> float:
        """Rows settled a second, over the last half minute."""
        began, base = self._marks[0] if len(self._marks) > 2 else (self.started_at, self.settled_before)
        return max(0, self.totals.settled - base) / max(now - began, 1e-9)

    def left_s(self, now: float) -> float | None:
        """Seconds to the end at the present rate; None while that can't be told."""
        rate, done, share = self.rate(now), self.totals.settled, self.read_share
        if not share or not rate:
            return None
        return max(0.0, self.totals.rows / share - done) / rate

    def summary(self, now: float, *, complete: bool, fail_on_existed: bool) -> Summary:
        """What the run has come to."""
        totals = self.totals
        failed = totals.rejected or totals.invalid
        failed = failed or (fail_on_existed and totals.existed > totals.existed_in_doubt)
        return Summary(
            created=totals.created,
            existed=totals.existed,
            existed_in_doubt=totals.existed_in_doubt,
            rejected=totals.rejected,
            invalid=totals.invalid,
            pending=totals.pending,
            complete=complete,
            attempts=self.attempts,
            elapsed_s=now - self.started_at,
            paused_s=self.paused_s,
            settled=self.settled_now,
            exit_code=75 if not complete else 1 if failed else 0,
        )
