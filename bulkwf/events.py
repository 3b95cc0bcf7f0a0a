"""What happens in a run, as frozen values, and the protocol of what observes them."""

from dataclasses import dataclass
from typing import Protocol

from bulkwf.model import Fault, Judgement, Reply, RequestKind

__all__ = [
    "AttemptFinished",
    "BatchBegun",
    "BatchSettled",
    "Event",
    "Observer",
    "Paused",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBegun:
    """A batch is durable and can be sent.

    Attributes:
        first_row: Number of its first row.
        instances: How many instances it holds.
        invalid: How many of its rows were refused before sending.
    """

    first_row: int
    instances: int
    invalid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFinished:
    """One request has been answered, or has failed, and its answer is judged.

    Attributes:
        kind: What was asked for.
        first_row: First row of the batch that it was for; None if it was for none.
        instances: How many instances it carried: 0 if it creates nothing.
        waited_s: How long it waited for its slot, in seconds.
        reply: The answer, or what went wrong.
        judgement: What the answer means.
        pause_s: Length of the pause that the answer orders, in seconds; None if it orders none.
    """

    kind: RequestKind
    first_row: int | None = None
    instances: int
    waited_s: float = 0.0
    reply: Reply | Fault
    judgement: Judgement
    pause_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettled:
    """Rows have been settled, and their results are durable.

    Attributes:
        first_row: First row of their batch.
        judgement: Which instances, and how.
    """

    first_row: int
    judgement: Judgement


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """All sending pauses.

    Attributes:
        seconds: From now on.
    """

    seconds: float


Event = BatchBegun | AttemptFinished | BatchSettled | Paused


class Observer(Protocol):
    """Observes a run. It is called in the event loop: it must not block.

    An exception that it raises is logged once, and never ends the run.
    """

    def __call__(self, event: Event) -> None:
        """Take note of *event*."""
        ...
