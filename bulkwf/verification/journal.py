"""Logs a verification's requests, so that later runs and verifications can count them against the limits."""

from collections.abc import Callable

from bulkwf.attempt import Reply, Verdict
from bulkwf.batching.batch_state import BatchState
from bulkwf.events import AttemptFinished
from bulkwf.limits.quota import Said, quota_text
from bulkwf.verification.request_log import RequestLog

__all__ = ["VerificationJournal"]


class VerificationJournal:
    """Logs a verification's requests. See `client.AttemptJournal`.

    Args:
        log: The log.
        wall: Unix time in seconds, by the log's clock.

    Attributes:
        requests: Requests of this session.
        answers: Requests of this session that the service has answered.
        last_error: Why the last request failed; empty once one has succeeded.
    """

    def __init__(self, log: RequestLog, wall: Callable[[], float]) -> None:
        self.requests = 0
        self.answers = 0
        self.last_error = ""
        self._log = log
        self._wall = wall

    def sending(self) -> None:
        """Log a request before it is sent: if the process is then killed, the service may still count the request."""
        self.requests += 1
        self._log.sent(self._wall())

    async def record(self, attempt: AttemptFinished, state: BatchState | None) -> None:
        """See `client.AttemptJournal.record`."""
        assert state is None
        now, reply, judgement = self._wall(), attempt.reply, attempt.judgement
        if isinstance(reply, Reply) and (quota := quota_text(reply.headers)) is not None:
            self._log.said(Said(now, now - reply.elapsed_s, quota))
        if judgement.verdict in (Verdict.DONE, Verdict.ABSENT):
            self.answers += 1
            self.last_error = ""
        else:
            self.last_error = judgement.message
        if attempt.pause_s is not None:
            await self.pause(attempt.pause_s)

    async def pause(self, seconds: float) -> None:
        """See `client.AttemptJournal.pause`."""
        self._log.pause(self._wall() + seconds)
