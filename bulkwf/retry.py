"""What to do about an outcome: wait, or stop the run. Pure: chance is the argument `draw`.

A row is never given up because the service is ill; a run that can't go on says who must act.
"""

from dataclasses import dataclass

from bulkwf.errors import BulkwfError, ServiceRefused
from bulkwf.model import Outcome, Verdict
from bulkwf.options import RetryPolicy

__all__ = ["PATIENCE", "Stop", "Wait", "backoff_s", "plan", "reject_limit"]


@dataclass(frozen=True, slots=True)
class Wait:
    """Send what is unsettled again after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run with this error."""

    error: BulkwfError


@dataclass(frozen=True, slots=True)
class _Rule:
    retries: float
    """How often in a row the verdict is answered by another attempt."""
    remedy: str = ""
    """What the run's owner is told when that is used up."""


_FOREVER = float("inf")
PATIENCE = {
    Verdict.NOT_SENT: _Rule(_FOREVER),
    Verdict.IN_DOUBT: _Rule(_FOREVER),
    Verdict.CONTRADICTION: _Rule(2, "What answers there is not the Workflows API: check the base URL and any proxy."),
    Verdict.CHALLENGED: _Rule(3, "The request is blocked at the edge: ask for this machine to be let through."),
    Verdict.NO_SUCH_WORKFLOW: _Rule(1, "Check the account id, the workflow's name, and that it is deployed."),
    Verdict.ORIGIN_TLS: _Rule(5, "The service has no secure connection to its own origin: tell its operator."),
    Verdict.FATAL: _Rule(0, "Check the base URL, and that this version of bulkwf fits the service."),
}
"""How often each verdict is met with patience. The verdicts that are not here call for another act than waiting."""


def plan(policy: RetryPolicy, outcome: Outcome, streak: int, draw: float) -> Wait | Stop:
    """What follows an outcome whose verdict is in `PATIENCE`.

    Args:
        policy: How long to wait.
        outcome: Of the last attempt.
        streak: How many attempts in a row have come to this verdict; 1 or more.
        draw: A random number from 0 to 1.
    """
    rule = PATIENCE[outcome.verdict]
    if streak > rule.retries:
        return Stop(ServiceRefused(f"the service refuses the run: {outcome.message}. {rule.remedy}"))
    return Wait(max(backoff_s(policy, streak, draw), outcome.retry_after_s or 0.0))


def backoff_s(policy: RetryPolicy, streak: int, draw: float) -> float:
    """Full jitter: *draw* times `base_s` · 2ⁿ, where n counts the retries from 0, and at most `max_wait_s`."""
    return draw * min(policy.max_wait_s, policy.base_s * 2.0 ** min(streak - 1, 60))


def reject_limit(max_rejects: int | None, rows: int) -> int:
    """How many of *rows* may be rejected before the run stops: the user's number, else 100 and 1 % of the rows."""
    return max_rejects if max_rejects is not None else max(100, rows // 100)
