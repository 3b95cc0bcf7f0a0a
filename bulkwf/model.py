"""The values that users see, and the batches into which rows are grouped. All are immutable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

__all__ = [
    "ABSENT",
    "Batch",
    "Counts",
    "Finding",
    "Instance",
    "Result",
    "RowOutcome",
    "RunState",
    "Slice",
    "Summary",
]

RowOutcome = Literal["created", "existed", "rejected", "invalid", "pending"]
"""What has become of a row; `pending` is not settled yet."""


class _Absent(Enum):
    """The type of `ABSENT`. To the service, a missing key differs from one that is null."""

    ABSENT = "absent"


ABSENT = _Absent.ABSENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One row of a list given as Python values.

    Attributes:
        params: Any JSON value; the workflow's `event.payload`. If it is left out, the service passes `{}`.
        instance_id: 1 to 100 of the characters `A-Z a-z 0-9 _ -`, not starting with `-`. None: an id is generated.
        instance_retention: `{"success_retention": …, "error_retention": …}`, each a number of milliseconds, or text
            such as `"3 days"`. None: the service's default.
        location_hint: Passed to the service unchanged. None: no hint.
    """

    params: Any = ABSENT
    instance_id: str | None = None
    instance_retention: Mapping[str, int | str] | None = None
    location_hint: str | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive rows of the list, as the source had them.

    Attributes:
        first_row: Number of the first row, counted from 0 over the whole list.
        rows: Number of rows, blank ones included.
        data: `rows` lines of JSON, each ended by a newline.
        refused: (offset, code, message) of each row that the source refused; its line in `data` is empty.
    """

    first_row: int
    rows: int
    data: bytes
    refused: tuple[tuple[int, str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What has become of one row.

    Attributes:
        row: Number of the row, counted from 0 over the whole list.
        id: Id of the instance; None if the row is `invalid` and no id could be read.
        outcome: `created`, `existed`, `rejected` or `invalid`; `pending` only where unsettled rows are asked for.
        status: Status of the instance in the service's answer, such as `queued`; None if the answer names none.
        code: The service's error code, or bulkwf's code for why the row is `invalid`; None if there is none.
        message: The reason, for people; None if there is none.
        attempts: Requests that the row's batch has taken so far; 0 for `invalid`.
        in_doubt: For `existed`: an earlier attempt of this run may have created it.
        version_id: Id of the workflow's version in the service's answer; None if the answer names none.
        workflow_id: Id of the workflow in the service's answer; None if the answer names none.
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
        id: Id of the instance.
        outcome: `missing`: the checkpoint calls the row created or existed, and the service has no such instance.
            `errored`: the instance ended with an error. `unknown`: no look-up of the instance was answered.
        status: Status of the instance in the service's answer, such as `errored`; None if it is missing or unknown.
        message: The reason, for people.
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
        created: Rows whose instance the service has created for this run.
        existed: Rows whose instance the service held already.
        existed_in_doubt: Those of `existed` that an earlier attempt of this run may have created.
        rejected: Rows that the service refuses.
        invalid: Rows that bulkwf refuses before sending.
        pending: Rows that are begun and not settled yet.
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
        """Rows that the run has begun so far, settled or pending."""
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
    """What a run waits for. Where it waits for several of these at once, the first one is its state."""

    PAUSED = "paused"
    """The end of a pause of all sending: the service ordered it, or the service creates nothing."""
    OUTAGE = "outage"
    """The end of an outage: attempts have failed since a row was last settled."""
    INSTANCES = "instances"
    """The limit of instances per second."""
    REQUESTS = "requests"
    """The limit of requests per five minutes."""
    QUOTA = "quota"
    """The token's quota, as the service's answers state it."""
    PLACES = "places"
    """The limit of concurrent requests."""
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
    """Rows that are sent together, in one request.

    Attributes:
        first_row: Number of the first row.
        rows: Number of rows, blank and refused ones included.
        region: The rows as the source had them, one line each.
        ids: The id of each instance to send, in the order of the rows.
        offsets: For each of `ids`, the number of its row minus `first_row`.
        bare: Whether every row holds its own id, so that the rows' bytes are sent unchanged.
        row_shape: Whether a line is a whole `instance` or its `params` alone.
        refused: Results of the `invalid` rows.
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
