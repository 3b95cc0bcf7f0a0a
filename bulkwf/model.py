"""The values that flow through a run. All are immutable."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal, NamedTuple, Protocol

__all__ = [
    "UNKNOWN_BOOT",
    "Batch",
    "Boot",
    "Clock",
    "Fault",
    "FaultKind",
    "Finding",
    "Instance",
    "InstanceInfo",
    "Judgement",
    "Reply",
    "Result",
    "RowOutcome",
    "RunState",
    "Slice",
    "Summary",
    "Transport",
    "Verdict",
]

RowOutcome = Literal["created", "existed", "rejected", "invalid", "pending"]
"""How a row ends; `pending` is the one that is not an end."""


class _Absent(Enum):
    """The type of `ABSENT`: for the service, a key that is not there differs from one that is null."""

    ABSENT = "absent"


ABSENT = _Absent.ABSENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One row of a list given as Python values.

    Attributes:
        params: Any JSON value; the workflow's `event.payload`. Left out, the service passes `{}`.
        instance_id: 1 to 100 of the characters `A-Z a-z 0-9 _ -`, not starting with `-`. Left out, one is generated.
        instance_retention: `{"success_retention": …, "error_retention": …}`, each milliseconds or text such as
            `"3 days"`.
        location_hint: Passed on as it is.
    """

    params: Any = ABSENT
    instance_id: str | None = None
    instance_retention: Mapping[str, int | str] | None = None
    location_hint: str | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """Contiguous rows of the list, as the source had them.

    Attributes:
        first_row: Number of the first row, counted from 0 over the whole list.
        rows: Number of rows, blank ones included.
        data: `rows` lines of JSON, each ended by a newline.
        refused: (offset, code, message) of each row that the source could not hand over; its line in `data` is empty.
    """

    first_row: int
    rows: int
    data: bytes
    refused: tuple[tuple[int, str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one row.

    Attributes:
        row: Number of the row, counted from 0 over the whole list.
        id: The instance's id; None if the row is `invalid` and had none that could be read.
        outcome: `created`, `existed`, `rejected`, `invalid`; `pending` only where unsettled rows are asked for.
        status: The workflow instance's status, in the service's own word, when it answered.
        code: The service's error code, or bulkwf's word for why the row is `invalid`.
        message: The reason, for a person.
        attempts: Requests that the row's batch has taken so far; 0 for `invalid`.
        in_doubt: For `existed`: an earlier attempt of this run may have created it.
        version_id: Of the workflow, as the service said it.
        workflow_id: Of the workflow, as the service said it.
    """

    row: int
    id: str | None
    outcome: RowOutcome
    status: str | None = None
    code: int | str | None = None
    message: str | None = None
    attempts: int = 0
    in_doubt: bool = False
    version_id: str | None = None
    workflow_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What is wrong with one row, as a verification found it.

    Attributes:
        row: Number of the row, counted from 0 over the whole list.
        id: The instance's id.
        outcome: `missing`: the checkpoint calls it created or existed, and the service does not have it. `errored`: the
            instance ended with an error. `unknown`: the service does not answer when it is asked for the instance.
        status: The workflow instance's status, in the service's own word; None if it is missing or unknown.
        message: The reason, for a person.
    """

    row: int
    id: str
    outcome: Literal["missing", "errored", "unknown"]
    status: str | None = None
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Rows by outcome. Blank rows are not counted.

    Attributes:
        created: The service has created the instance for this run.
        existed: The service held the instance already.
        existed_in_doubt: How many of `existed` an earlier attempt of this run may have created.
        rejected: The service refuses the row.
        invalid: Refused before sending.
        pending: Begun, and not settled yet.
    """

    created: int = 0
    existed: int = 0
    existed_in_doubt: int = 0
    rejected: int = 0
    invalid: int = 0
    pending: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            created=self.created + other.created,
            existed=self.existed + other.existed,
            existed_in_doubt=self.existed_in_doubt + other.existed_in_doubt,
            rejected=self.rejected + other.rejected,
            invalid=self.invalid + other.invalid,
            pending=self.pending + other.pending,
        )

    @property
    def settled(self) -> int:
        """Rows that are not pending."""
        return self.created + self.existed + self.rejected + self.invalid

    @property
    def rows(self) -> int:
        """Rows that the run has met so far."""
        return self.settled + self.pending


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary(Counts):
    """What has become of a run's rows, over all its sessions.

    Attributes:
        complete: The list was read to its end, and every row is settled.
        attempts: Requests of this session.
        elapsed_s: Length of this session, in seconds.
        paused_s: How long all sending was paused in this session, in seconds.
        settled_now: Rows that this session has settled.
        exit_code: What the command line exits with; see `bulkwf.errors.exit_code`.
    """

    complete: bool = False
    attempts: int = 0
    elapsed_s: float = 0.0
    paused_s: float = 0.0
    settled_now: int = 0
    exit_code: int = 0


class RunState(Enum):
    """What holds a run up. The order is that of precedence."""

    PAUSED = "paused"
    """All sending pauses: the service ordered it, or it creates nothing."""
    OUTAGE = "outage"
    """Attempts are failing, and nothing has been settled since."""
    INSTANCES = "instances"
    """The limit of instances per second."""
    REQUESTS = "requests"
    """The limit of requests per five minutes."""
    QUOTA = "quota"
    """What the service says is left for the token."""
    PLACES = "places"
    """The number of concurrent requests."""
    DISK = "disk"
    """A commit of the checkpoint."""
    SOURCE = "source"
    """The next rows of the list."""
    SERVICE = "service"
    """Answers to requests that are on the wire."""
    IDLE = "idle"
    """None of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows that travel together: the unit of flow.

    Attributes:
        first_row: Number of the first row.
        rows: Number of rows, blank and refused ones included.
        region: The rows as the source had them, one line each.
        ids: The id of each instance to send, in the order of the rows.
        offsets: For each of `ids`, its row's number less `first_row`.
        bare: Every id stands in its row, whose bytes are sent as they are.
        row_shape: Whether a line is a whole `instance` or its `params` alone.
        refused: The rows that were refused before sending, as `invalid` results.
        retention_s: The shortest time for which the service remembers an id of this batch, in seconds.
    """

    first_row: int
    rows: int
    region: bytes = field(repr=False)
    ids: Sequence[str]
    offsets: Sequence[int]
    bare: bool
    row_shape: Literal["instance", "params"]
    refused: tuple[Result, ...]
    retention_s: float


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
    """Something in the request is bad: send it in halves."""
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


class Boot(NamedTuple):
    """One boot of one machine, and how a file counts its time.

    The system's clock can be set at any moment, the boot clock can't. So all times that one boot writes into a file are
    counted on the boot clock: they keep their distance to each other, whatever the system's clock is set to.

    Attributes:
        id: Names the boot. Empty where the system has no name for it: there, times are those of the system's clock.
        at: Unix time at which the boot clock was zero, by the system's clock when this boot first wrote to the file.
    """

    id: str
    at: float

    def shift_s(self, other: "Boot") -> float:
        """What to add to a time that a file counts by *other*, to have it as this one counts; 0 between two boots."""
        return self.at - other.at if self.id and self.id == other.id else 0.0

    def going_on(self, stored: "Boot") -> "Boot":
        """How this boot counts time in a file that *stored* has written last: on as it did, or anew."""
        return stored if self.id and self.id == stored.id else self


UNKNOWN_BOOT = Boot("", 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Time and chance, as arguments.

    Attributes:
        now: Monotonic seconds; the event loop's timers must follow it.
        wall: Unix time in seconds: the system's, or counted on the boot clock (see `counted_by`).
        sleep: Sleep so many seconds of `now`.
        draw: A random number from 0 to 1.
        boot_id: Names this boot; empty where the system has no name for it.
        uptime: Seconds since the boot, suspended ones included; never set. Only where there is a `boot_id`.
        system: The system's Unix time where `wall` is counted on the boot clock; else None.
        shared: `now` is the clock of the process: runs that use it share their limits.
    """

    now: Callable[[], float]
    wall: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]]
    draw: Callable[[], float]
    boot_id: str = ""
    uptime: Callable[[], float] = lambda: 0.0
    system: Callable[[], float] | None = None
    shared: bool = False

    def boot(self) -> Boot:
        """This boot, by what `wall` says now."""
        return Boot(self.boot_id, self.wall() - self.uptime()) if self.boot_id else UNKNOWN_BOOT

    def counted_by(self, boot: Boot) -> "Clock":
        """This clock, its `wall` as a file counts the times of *boot*, which must be this one or unknown."""
        if not boot.id:
            return self
        return replace(self, wall=lambda: boot.at + self.uptime(), system=self.wall)

    def latest(self) -> float:
        """The later of the two Unix times, for what must not look younger than it is.

        The boot clock of a virtual machine stands still while the machine is frozen.
        """
        return self.wall() if self.system is None else max(self.wall(), self.system())


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
    """One request to the Workflows API. Built by `bulkwf.requests`.

    Attributes:
        kind: What it asks for.
        method: HTTP method.
        path: Percent-encoded path below the base URL, starting with a slash.
        query: Query parameters, not encoded.
        body: JSON; None if the request has none.
    """

    kind: RequestKind
    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = field(default=None, repr=False)


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
