"""What to do about an outcome: wait, probe, or stop the run. Pure: chance is the argument `draw`.

A row is never given up because the service fails; a run that can't go on says who must act.
"""

from dataclasses import dataclass

from bulkwf.errors import BulkwfError, ServiceRefused
from bulkwf.model import Outcome, Verdict
from bulkwf.options import RetryPolicy

__all__ = [
    "LOOK_UP_FAILURES",
    "LOOK_UP_TRIES",
    "PATIENCE",
    "PROBE_AFTER_S",
    "Probe",
    "Stop",
    "Wait",
    "backoff_s",
    "plan",
    "reject_limit",
]

LOOK_UP_TRIES = 3
"""How many look-ups of one instance may fail in a row before the others go first."""
LOOK_UP_FAILURES = frozenset(
    {
        Verdict.IN_DOUBT,
        Verdict.CONTRADICTION,
        Verdict.UNAUTHORIZED,
        Verdict.CHALLENGED,
        Verdict.NO_SUCH_WORKFLOW,
        Verdict.WRONG_ADDRESS,
        Verdict.ORIGIN_TLS,
    }
)
"""Verdicts on a look-up that was answered, if at all, without a word of the instance."""

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


@dataclass(frozen=True, slots=True)
class _Rule:
    retries: float
    """How many times in a row the verdict is answered by another attempt, before the service has settled anything."""
    proven_retries: float
    """The same, once it has settled something in this session: address and credential are right then."""
    remedy: str = ""
    """What the run's owner is told when that is used up."""
    probed: bool = True
    """Whether probes follow then, if the service has settled something in this session."""
    what: str = "the run"
    """What the service refuses."""


_FOREVER = float("inf")
PATIENCE = {
    Verdict.NOT_SENT: _Rule(_FOREVER, _FOREVER),
    Verdict.IN_DOUBT: _Rule(_FOREVER, _FOREVER),
    Verdict.HANDSHAKE: _Rule(
        3, _FOREVER, "Check that the base URL's port speaks TLS, and that no proxy or firewall on the way breaks it."
    ),
    Verdict.CONTRADICTION: _Rule(
        2, 2, "What answers there is not the Workflows API: check the base URL and any proxy."
    ),
    Verdict.CHALLENGED: _Rule(3, 3, "The request is blocked at the edge: ask for this machine to be let through."),
    Verdict.UNAUTHORIZED: _Rule(
        0,
        0,
        "The token needs the permission 'Workers Scripts Write' on this account (to verify, 'Read'); no row was "
        "rejected for this.",
        what="the credential",
    ),
    Verdict.NO_SUCH_WORKFLOW: _Rule(1, 0, "Check the account id, the workflow's name, and that it is deployed."),
    Verdict.WRONG_ADDRESS: _Rule(0, 0, "Check the base URL, and that this version of bulkwf fits the service."),
    Verdict.ORIGIN_TLS: _Rule(5, 5, "The service has no secure connection to its own origin: tell its operator."),
    Verdict.FATAL: _Rule(0, 0, "Check the base URL, the proxy and the certificate authorities.", probed=False),
}
"""How many retries each verdict gets. The verdicts that are not here call for another act than waiting."""


def plan(policy: RetryPolicy, outcome: Outcome, streak: int, draw: float, *, proven: bool) -> Wait | Probe | Stop:
    """What follows an outcome whose verdict is in `PATIENCE`.

    Args:
        policy: How long to wait.
        outcome: Of the last attempt.
        streak: How many attempts in a row have come to this verdict; 1 or more.
        draw: A random number from 0 to 1.
        proven: The service has settled something in this session.
    """
    rule = PATIENCE[outcome.verdict]
    if streak <= (rule.proven_retries if proven else rule.retries):
        return Wait(max(backoff_s(policy, streak, draw), outcome.retry_after_s or 0.0))
    code = "" if outcome.code is None else f" (code {outcome.code})"
    error = ServiceRefused(f"the service refuses {rule.what}: {outcome.message}{code}. {rule.remedy}")
    return Probe(error) if proven and rule.probed else Stop(error)


def backoff_s(policy: RetryPolicy, streak: int, draw: float) -> float:
    """Full jitter: *draw* times `base_s` · 2ⁿ, where n counts the retries from 0, and at most `max_wait_s`."""
    return draw * min(policy.max_wait_s, policy.base_s * 2.0 ** min(streak - 1, 60))


def reject_limit(max_rejects: int | None, rows: int) -> int:
    """How many of *rows* may be rejected before the run stops: the user's number, else 100 and 1 % of the rows."""
    return max_rejects if max_rejects is not None else max(100, rows // 100)
