"""Counts what is durable, and computes rate, time left and summary from the counts. Pure."""

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from bulkwf.attempt import Judgement
from bulkwf.errors import BulkwfError, exit_code
from bulkwf.model import Counts, Summary

__all__ = ["Progress"]

RATE_WINDOW_S = 30.0
"""Time over which `Progress.rate` is measured, in seconds."""


@dataclass(slots=True)
class Progress:
    """Counts one session. Only what is durable is counted.

    Attributes:
        started_at: When the session began, in monotonic seconds.
        counts: Rows by outcome, over all sessions.
        settled_before: Rows that earlier sessions had settled.
        attempts: Requests of this session.
        paused_s: How long all sending was paused in this session, in seconds.
        reading: Returns how much of the list has been read, from 0 to 1; None if its length is unknown.
    """

    started_at: float
    counts: Counts = field(default_factory=Counts)
    settled_before: int = 0
    attempts: int = 0
    paused_s: float = 0.0
    reading: Callable[[], float | None] = lambda: None
    _marks: deque[tuple[float, int]] = field(default_factory=deque)

    def begun(self, instances: int, invalid: int) -> None:
        """Count a new batch: *instances* of its rows are pending, *invalid* of them invalid."""
        self.counts += Counts(pending=instances, invalid=invalid)

    def settled(self, judgement: Judgement, in_doubt: int, now: float) -> None:
        """Count the results of a judgement.

        Args:
            judgement: Holds the results, which are durable.
            in_doubt: Number of its `existed` instances that an attempt in doubt may have created.
            now: Monotonic seconds.
        """
        outcomes = [result.outcome for _, result in judgement.others]
        existed, rejected = outcomes.count("existed"), outcomes.count("rejected")
        self.counts += Counts(
            created=len(judgement.created) + len(outcomes) - existed - rejected,
            existed=existed,
            existed_in_doubt=in_doubt,
            rejected=rejected,
            pending=-len(judgement.created) - len(outcomes),
        )
        self._marks.append((now, self.counts.settled))
        while len(self._marks) > 2 and self._marks[1][0] < now - RATE_WINDOW_S:
            self._marks.popleft()

    @property
    def read_share(self) -> float | None:
        """How much of the list has been read, from 0 to 1; None if its length is unknown."""
        return self.reading()

    @property
    def settled_now(self) -> int:
        """Rows that this session has settled."""
        return self.counts.settled - self.settled_before

    def rate(self, now: float) -> float:
        """Rows settled per second, over the last `RATE_WINDOW_S`."""
        began, base = self._marks[0] if len(self._marks) > 2 else (self.started_at, self.settled_before)
        return max(0, self.counts.settled - base) / max(now - began, 1e-9)

    def left_s(self, now: float) -> float | None:
        """Seconds until the whole list is settled at the present rate; None while that is unknown."""
        rate, done, share = self.rate(now), self.counts.settled, self.read_share
        if not share or not rate:
            return None
        return max(0.0, self.counts.rows / share - done) / rate

    def summary(
        self,
        now: float,
        *,
        complete: bool,
        fail_on_existed: bool,
        error: BulkwfError | None = None,
        signal: int | None = None,
    ) -> Summary:
        """The summary of the session.

        Args:
            now: Monotonic seconds.
            complete: Whether the list was read to its end and every row is settled.
            fail_on_existed: Whether a row whose instance existed before the run counts as failed.
            error: What ended the run; None if no error did.
            signal: Number of the signal that ended it; None if none did.
        """
        counts = self.counts
        failed = counts.rejected or counts.invalid
        failed = failed or (fail_on_existed and counts.existed > counts.existed_in_doubt)
        return Summary(
            **asdict(counts),
            complete=complete,
            attempts=self.attempts,
            elapsed_s=now - self.started_at,
            paused_s=self.paused_s,
            settled_now=self.settled_now,
            exit_code=exit_code(complete=complete, failed=bool(failed), error=error, signal=signal),
        )
