"""What each verdict implies, in one table. Pure.

`HANDLING` has one row for each verdict. Delivery, verification, the limiter and the retry plan read it; nothing else
says what a verdict implies. `table()` is the same table for the documentation.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from math import inf
from types import MappingProxyType

from bulkwf.attempt import Verdict

__all__ = ["HANDLING", "Action", "Handling", "table"]


class Action(Enum):
    """What to do next with the instances that an attempt left unsettled."""

    NONE = "nothing"
    BACK_OFF = "back off and retry"
    RETRY = "retry at once"
    """Without a backoff: the limiter pauses all sending, or there is a new credential."""
    CONFIRM = "look up the omitted ids"
    SPLIT = "send in smaller parts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Handling:
    """What a verdict implies.

    Attributes:
        action: What follows for the unsettled instances.
        in_doubt: The service may have created the unsettled instances.
        overload: Fewer concurrent requests might help.
        accepted: The service accepts the credential and the address, whatever it says about the instances.
        drop_connections: No further request goes over a connection that is open now.
        lookup_failed: If the request was a look-up, the verdict says nothing about the instance.
        retries: For `BACK_OFF`: how many attempts in a row with this verdict are retried while nothing has been
            settled in this session.
        proven_retries: The same once something has been settled: then the address and the credential are right.
        probed: Once something has been settled, the run ends only if probes are refused too.
        failure: What the error says when the retries are used up, before the message of the last attempt.
        remedy: What the owner of the run can do then.
    """

    action: Action = Action.NONE
    in_doubt: bool = False
    overload: bool = False
    accepted: bool = False
    drop_connections: bool = False
    lookup_failed: bool = False
    retries: float = 0
    proven_retries: float = 0
    probed: bool = True
    failure: str = "the service refuses the run"
    remedy: str = ""

    @property
    def failed(self) -> bool:
        """Whether the attempt is an error: it was not accepted."""
        return not self.accepted

    @property
    def repeats(self) -> bool:
        """Whether the same request is sent again."""
        return self.action in (Action.BACK_OFF, Action.RETRY)


HANDLING: Mapping[Verdict, Handling] = MappingProxyType(
    {
        Verdict.DONE: Handling(accepted=True),
        Verdict.NOT_SENT: Handling(action=Action.BACK_OFF, overload=True, retries=inf, proven_retries=inf),
        Verdict.IN_DOUBT: Handling(
            action=Action.BACK_OFF, in_doubt=True, overload=True, lookup_failed=True, retries=inf, proven_retries=inf
        ),
        Verdict.HANDSHAKE: Handling(
            action=Action.BACK_OFF,
            overload=True,
            retries=3,
            proven_retries=inf,
            failure="no secure connection can be made",
            remedy="Check that the base URL's port speaks TLS, and that no proxy or firewall on the way breaks it.",
        ),
        Verdict.CONTRADICTION: Handling(
            action=Action.BACK_OFF,
            in_doubt=True,
            drop_connections=True,
            lookup_failed=True,
            retries=2,
            proven_retries=2,
            remedy="What answers there is not the Workflows API: check the base URL and any proxy.",
        ),
        Verdict.OMITTED: Handling(action=Action.CONFIRM, accepted=True),
        Verdict.BAD_REQUEST: Handling(action=Action.SPLIT, accepted=True),
        Verdict.TOO_LARGE: Handling(action=Action.SPLIT, accepted=True),
        Verdict.THROTTLED: Handling(action=Action.RETRY),
        Verdict.UNAUTHORIZED: Handling(
            action=Action.BACK_OFF,
            lookup_failed=True,
            failure="the service refuses the credential",
            remedy="The token needs the permission 'Workers Scripts Write' on this account (to verify, 'Read'); "
            "no row was rejected for this.",
        ),
        Verdict.RENEWED: Handling(action=Action.RETRY),
        Verdict.CHALLENGED: Handling(
            action=Action.BACK_OFF,
            lookup_failed=True,
            retries=3,
            proven_retries=3,
            remedy="The request is blocked at the edge: ask its operator to allow this machine.",
        ),
        Verdict.NO_SUCH_WORKFLOW: Handling(
            action=Action.BACK_OFF,
            lookup_failed=True,
            retries=1,
            remedy="Check the account id, the workflow's name, and that it is deployed.",
        ),
        Verdict.WRONG_ADDRESS: Handling(
            action=Action.BACK_OFF,
            lookup_failed=True,
            remedy="Check the base URL, and that this version of bulkwf fits the service.",
        ),
        Verdict.ORIGIN_TLS: Handling(
            action=Action.BACK_OFF,
            overload=True,
            lookup_failed=True,
            retries=5,
            proven_retries=5,
            remedy="The service has no secure connection to its own origin: report it to its operator.",
        ),
        Verdict.FATAL: Handling(
            action=Action.BACK_OFF,
            probed=False,
            failure="no connection can be made",
            remedy="Check the base URL, the proxy and the certificate authorities.",
        ),
        Verdict.ABSENT: Handling(accepted=True),
        Verdict.UNANSWERED: Handling(),
    }
)
"""One row for each verdict."""


def table() -> Iterator[str]:
    """`HANDLING` as the lines of a Markdown table."""
    yield "| verdict | then | retries, before and after anything is settled | flags |"
    yield "|---|---|---|---|"
    for verdict, handling in HANDLING.items():
        retries = ""
        if handling.action is Action.BACK_OFF:
            retries = f"{_count(handling.retries)}, {_count(handling.proven_retries)}"
        flags = [
            name.replace("_", " ")
            for name in ("in_doubt", "overload", "accepted", "drop_connections", "lookup_failed")
            if getattr(handling, name)
        ]
        yield f"| `{verdict.value}` | {handling.action.value} | {retries} | {', '.join(flags)} |"


def _count(retries: float) -> str:
    return "no limit" if retries == inf else f"{retries:.0f}"
