"""One attempt as values (request, reply or fault, judgement), and the protocols `Slot` and `Transport`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from bulkwf.model import Result

__all__ = [
    "Fault",
    "FaultKind",
    "InstanceInfo",
    "Judgement",
    "Reply",
    "Request",
    "RequestKind",
    "Slot",
    "Transport",
    "Verdict",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A complete answer from the service.

    Attributes:
        status: HTTP status.
        headers: The answer's headers; their names are in lower case.
        body: The answer's bytes, as received. Requests ask for no compression.
        elapsed_s: Time from the start of the request to the last byte of the answer, in seconds.
        received_at: When the answer was complete, in Unix time.
        credential: Number of the credential that the request carried; see `Transport.refresh_credential`.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    elapsed_s: float = 0.0
    received_at: float = 0.0
    credential: int = 0


class FaultKind(Enum):
    """What is known about a request without a complete answer."""

    NOT_SENT = "not_sent"
    """No byte of it reached the service."""
    IN_DOUBT = "in_doubt"
    """The service may have acted on it."""
    HANDSHAKE = "handshake"
    """No byte of it reached the service: the TLS handshake failed, for another reason than the certificate."""
    FATAL = "fatal"
    """No byte of it reached the service, and none will: the certificate, the proxy or the address is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """No complete answer.

    Attributes:
        kind: What is known about the request.
        message: What happened; never holds a credential or a row's params.
        elapsed_s: Time from the start of the request to the fault, in seconds.
    """

    kind: FaultKind
    message: str
    elapsed_s: float = 0.0


class Verdict(Enum):
    """What an attempt's reply or fault means for the instances that it left unsettled."""

    DONE = "done"
    NOT_SENT = "not_sent"
    IN_DOUBT = "in_doubt"
    CONTRADICTION = "contradiction"
    """A 2xx that does not answer this request: in doubt, and its connection is not used again."""
    OMITTED = "omitted"
    """A complete answer without some of the ids sent."""
    BAD_REQUEST = "bad_request"
    """Something in the request is bad: send it in smaller parts."""
    TOO_LARGE = "too_large"
    THROTTLED = "throttled"
    HANDSHAKE = "handshake"
    """The TLS handshake failed, for another reason than the certificate."""
    UNAUTHORIZED = "unauthorized"
    RENEWED = "renewed"
    """The credential was refused, and its source gives another one now."""
    CHALLENGED = "challenged"
    """Blocked at the service's edge, with a challenge page for browsers."""
    NO_SUCH_WORKFLOW = "no_such_workflow"
    WRONG_ADDRESS = "wrong_address"
    """A redirect, or a status with which the API answers no request of ours (405, 415, 501)."""
    ORIGIN_TLS = "origin_tls"
    """The service's edge has no secure connection to its own origin (525, 526)."""
    FATAL = "fatal"
    """The certificate, the proxy or the address is wrong: no later attempt can succeed."""
    ABSENT = "absent"
    """A look-up found no such instance."""
    UNANSWERED = "unanswered"
    """A look-up failed several times in a row: nothing is known about the instance."""


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """What the service says about an instance that it has created."""

    status: str | None = None
    version_id: str | None = None
    workflow_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What one attempt means. Instances are given by their positions in `Batch.ids`.

    Each instance of the request is in exactly one of `created`, `others` and `unsettled`.

    Attributes:
        verdict: Why instances are left unsettled; `DONE` if none are.
        created: The instances that the service says it created.
        answer: What the service said about each of `created`; None if there are none.
        others: (position, result) of each instance that is settled with another result.
        unsettled: The instances that need another attempt.
        refused: Those of `unsettled` that a complete answer refuses one by one.
        code: The service's error code, or the HTTP status; None if there is neither.
        message: What the service said or what went wrong, as one printable line.
        retry_after_s: The pause that the service ordered, in seconds; None if it ordered none.
        elapsed_s: Time from the start of the request to its answer or fault, in seconds; 0 if it was not measured.
    """

    verdict: Verdict
    created: Sequence[int] = ()
    answer: InstanceInfo | None = None
    others: tuple[tuple[int, Result], ...] = ()
    unsettled: Sequence[int] = ()
    refused: Sequence[int] = ()
    code: int | None = None
    message: str = ""
    retry_after_s: float | None = None
    elapsed_s: float = 0.0

    @property
    def settles(self) -> bool:
        """Whether the attempt has settled an instance."""
        return bool(self.created or self.others)


class Slot(Protocol):
    """The limiter's permission to send one request, as the transport sees it."""

    @property
    def timed(self) -> bool:
        """Whether it matters when the body leaves. If not, no limit counts the request, and `written` has no effect."""
        ...

    def writing(self) -> bool:
        """Call this just before the first byte is sent. False: the permission is lost, and nothing may be sent."""
        ...

    def written(self, at: float | None = None) -> None:
        """Call this once the body has left this machine.

        Args:
            at: When it left, in seconds of the run's monotonic clock; None means now.
        """
        ...


class RequestKind(Enum):
    """What a request asks the service for."""

    CREATE = "create"
    """Create a batch of instances."""
    LOOK_UP = "look_up"
    """Look up one instance."""
    LIST = "list"
    """List one page of a workflow's instances."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request to the Workflows API. Built by `bulkwf.service.requests`.

    Attributes:
        kind: What it asks for.
        method: HTTP method.
        path: Percent-encoded path below the base URL, starting with a slash.
        query: Query parameters, not encoded.
        body: JSON; None if the request has none.
        fresh: Send it over a new connection that nothing else uses, so that no late copy of another answer can come.
    """

    kind: RequestKind
    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = field(default=None, repr=False)
    fresh: bool = False


class Transport(Protocol):
    """Sends requests to the service. It never raises for network errors: it returns a `Fault`."""

    async def send(self, request: Request, slot: Slot) -> Reply | Fault:
        """Send one request and read its answer.

        Args:
            request: What to send.
            slot: `writing` is called just before the first byte; if it returns False, nothing is sent and a
                `NOT_SENT` fault is returned. `written` is called once the body has left this machine, at the latest
                when the answer begins.
        """
        ...

    async def refresh_credential(self, credential: int) -> bool:
        """Ask the source of credentials again; True if it gives a credential other than number *credential*."""
        ...

    def drop_connections(self) -> None:
        """Use no connection that is open now for further requests."""
        ...

    async def aclose(self) -> None:
        """Close every connection."""
        ...
