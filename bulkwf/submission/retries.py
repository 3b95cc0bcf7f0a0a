"""What to do about a judgement: wait, probe, or stop the run. Pure: chance is the argument `draw`.

A row is never given up because the service fails; a run that can't go on says who must act.
"""

from dataclasses import dataclass

from bulkwf.attempt import Judgement
from bulkwf.errors import BulkwfError, ServiceRefused
from bulkwf.limits.backoff import backoff_s
from bulkwf.options import RetryPolicy
from bulkwf.service.verdicts import HANDLING

__all__ = ["LOOK_UP_TRIES", "PROBE_AFTER_S", "LookUpTries", "Probe", "Stop", "Wait", "plan", "reject_limit"]

LOOK_UP_TRIES = 3
"""How many look-ups of one instance may fail in a row before the others go first."""

PROBE_AFTER_S = (2.0, 8.0, 20.0)
"""Pauses before the probes that follow a refusal of the run: three probes over 30 s. One odd answer costs 2 s."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Send what is unsettled again after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Probe:
    """Pause all sending, and let one request try again; end the run with this error if the probes are refused too."""

    error: BulkwfError


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run with this error."""

    error: BulkwfError


def plan(policy: RetryPolicy, outcome: Judgement, streak: int, draw: float, *, proven: bool) -> Wait | Probe | Stop:
    """What follows an outcome whose verdict is handled by `Action.BACK_OFF`.

    Args:
        policy: How long to wait.
        outcome: Of the last attempt.
        streak: How many attempts in a row have come to this verdict; 1 or more.
        draw: A random number from 0 to 1.
        proven: The service has settled something in this session.
    """
    handling = HANDLING[outcome.verdict]
    if streak <= (handling.proven_retries if proven else handling.retries):
        return Wait(max(backoff_s(policy, streak, draw), outcome.retry_after_s or 0.0))
    code = "" if outcome.code is None else f" (code {outcome.code})"
    error = ServiceRefused(f"{handling.failure}: {outcome.message}{code}. {handling.remedy}")
    return Probe(error) if proven and handling.probed else Stop(error)


class LookUpTries:
    """Counts the failed tries of one look-up, or of one page of the list."""

    def __init__(self) -> None:
        self._failed = 0

    def failed(self) -> bool:
        """Count one more; True each time `LOOK_UP_TRIES` have failed in a row."""
        self._failed += 1
        return self._failed % LOOK_UP_TRIES == 0


def reject_limit(max_rejects: int | None, rows: int) -> int:
    """How many of *rows* may be rejected before the run stops: the user's number, else 100 and 1 % of the rows."""
    return max_rejects if max_rejects is not None else max(100, rows // 100)
