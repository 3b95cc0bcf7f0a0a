"""The values that users see, and the batches that they become. All are immutable."""

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
