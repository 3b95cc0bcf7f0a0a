"""One attempt, as values: the request, its slot, the reply or fault, and the judgement. The transport between them."""

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
    """A complete answer of the service.

    Attributes:
        status: HTTP status.
        headers: With lower-case names.
        body: As it came; never compressed.
        elapsed_s: From the start of the request to the last byte of the answer.
        received_at: When the answer was complete, in seconds of Unix time.
        credential: Which of the credentials seen so far the request carried; see `Transport.refresh_credential`.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    elapsed_s: float = 0.0
    received_at: float = 0.0
    credential: int = 0


class FaultKind(Enum):
    """What is known of a request that got no complete answer."""

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
        kind: What is known of the request.
        message: What happened; never holds a credential or a row's params.
        elapsed_s: From the start of the request to the fault.
    """

    kind: FaultKind
    message: str
    elapsed_s: float = 0.0


class Verdict(Enum):
    """What an attempt's reply means for the instances it left unsettled."""

    DONE = "done"
    NOT_SENT = "not_sent"
    IN_DOUBT = "in_doubt"
    CONTRADICTION = "contradiction"
    """A 2xx that is no answer to this request: in doubt, and the connection is not to be trusted again."""
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
    """The credential was refused, and its source has another one by now."""
    CHALLENGED = "challenged"
    """Blocked at the edge by a page meant for browsers."""
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
    """A look-up failed several times in a row: it says nothing of the instance."""


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """What the service says of an instance it has created."""

    status: str | None = None
    version_id: str | None = None
    workflow_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What one attempt came to. Instances are named by their position in `Batch.ids`.

    `created`, `others` and `unsettled` together are what was sent, always.

    Attributes:
        verdict: Why something is left unsettled; `DONE` if nothing is.
        created: The instances that the service says it created, alike in `answer`.
        answer: What it said of them.
        others: (position, result) of the instances settled in any other way.
        unsettled: The instances that need another attempt.
        code: The service's error code, or the HTTP status.
        message: What the service said, cleaned of control characters and cut to a line's length.
        retry_after_s: The pause that the service ordered, in seconds; None if it ordered none.
        elapsed_s: From the start of the request to its answer or fault; 0 where that is not of interest.
    """

    verdict: Verdict
    created: Sequence[int] = ()
    answer: InstanceInfo | None = None
    others: tuple[tuple[int, Result], ...] = ()
    unsettled: Sequence[int] = ()
    code: int | None = None
    message: str = ""
    retry_after_s: float | None = None
    elapsed_s: float = 0.0

    @property
    def settles(self) -> bool:
        """Whether any instance has been settled."""
        return bool(self.created or self.others)


class Slot(Protocol):
    """The limits' leave to send one request, as a transport sees it."""

    def writing(self) -> bool:
        """Called just before the first byte. False: the leave is lost, and the request must not be sent."""
        ...

    def written(self, at: float | None = None) -> None:
        """The body has left this machine: at *at*, a past moment of the run's monotonic clock, or now."""
        ...


class RequestKind(Enum):
    """What a request asks the service for."""

    CREATE = "create"
    """Create a batch of instances."""
    LOOK_UP = "look_up"
    """One instance."""
    LIST = "list"
    """A page of a workflow's instances."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request to the Workflows API. Built by `bulkwf.service.requests`.

    Attributes:
        kind: What it asks for.
        method: HTTP method.
        path: Percent-encoded path below the base URL, starting with a slash.
        query: Query parameters, not encoded.
        body: JSON; None if the request has none.
        fresh: Send it over a new connection, which nothing else uses: no late copy of another answer can come there.
    """

    kind: RequestKind
    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = field(default=None, repr=False)
    fresh: bool = False


class Transport(Protocol):
    """Sends requests to the service. It never raises for the network: what went wrong is a `Fault`."""

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
        """Ask the credential's source again; True if it gives another one than number *credential*."""
        ...

    def drop_connections(self) -> None:
        """Send no further request over a connection that is open now."""
        ...

    async def aclose(self) -> None:
        """Close every connection."""
        ...
