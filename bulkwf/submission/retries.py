"""Decides what follows a judgement: wait, probe, or stop the run. Pure: the random number is an argument.

No row is rejected because the service fails. The error that stops a run says what the owner of the run can do.
"""

from dataclasses import dataclass

from bulkwf.attempt import Judgement
from bulkwf.errors import BulkwfError, ServiceRefused
from bulkwf.limits.backoff import backoff_s
from bulkwf.options import RetryPolicy
from bulkwf.service.verdicts import HANDLING

__all__ = ["LOOK_UP_TRIES", "PROBE_AFTER_S", "LookUpTries", "Probe", "Stop", "Wait", "plan", "reject_limit"]

LOOK_UP_TRIES = 3
"""After this many failed look-ups in a row of one instance, its row is sent again."""

PROBE_AFTER_S = (2.0, 8.0, 20.0)
"""Pauses before the probes that follow a refusal of the run, in seconds: three probes over 30 s. A single refusal costs
2 s."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for this many seconds, then send the unsettled instances again."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Probe:
    """Pause all sending, then send one request alone. If all probes are refused too, the run ends with this error."""

    error: BulkwfError


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run with this error."""

    error: BulkwfError


def plan(policy: RetryPolicy, judgement: Judgement, streak: int, draw: float, *, proven: bool) -> Wait | Probe | Stop:
    """Decide what follows a judgement whose verdict requires `Action.BACK_OFF`.

    Args:
        policy: Bounds of the wait.
        judgement: The judgement of the last attempt.
        streak: How many attempts in a row had this verdict; 1 or more.
        draw: A random number from 0 to 1.
        proven: Whether the service has settled something in this session.
    """
    handling = HANDLING[judgement.verdict]
    if streak <= (handling.proven_retries if proven else handling.retries):
        return Wait(max(backoff_s(policy, streak, draw), judgement.retry_after_s or 0.0))
    code = "" if judgement.code is None else f" (code {judgement.code})"
    error = ServiceRefused(f"{handling.failure}: {judgement.message}{code}. {handling.remedy}")
    return Probe(error) if proven and handling.probed else Stop(error)


class LookUpTries:
    """Counts the failed tries of one look-up, or of one page of the list."""

    def __init__(self) -> None:
        self._failed = 0

    def failed(self) -> bool:
        """Count one more failed try. Returns True if the number of tries is a multiple of `LOOK_UP_TRIES`."""
        self._failed += 1
        return self._failed % LOOK_UP_TRIES == 0


def reject_limit(max_rejects: int | None, rows: int) -> int:
    """How many of *rows* may be rejected: the user's number if given, else the larger of 100 and 1 % of the rows."""
    return max_rejects if max_rejects is not None else max(100, rows // 100)
