"""What happens in a run, as frozen values, and the protocol of what observes them."""

from dataclasses import dataclass
from typing import Protocol

from bulkwf.attempt import Fault, Judgement, Reply, RequestKind
from bulkwf.model import Counts, RunState, Summary

__all__ = [
    "AttemptFinished",
    "BatchBegun",
    "BatchSettled",
    "Event",
    "Observer",
    "Paused",
    "RateChanged",
    "RunEnded",
    "RunStarted",
    "StateChanged",
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
        bytes: Size of its body.
        waited_s: How long it waited for its slot, in seconds.
        waited_for: What it waited for last; None if it did not wait.
        reply: The answer, or what went wrong.
        judgement: What the answer means.
        pause_s: Length of the pause that the answer orders, in seconds; None if it orders none.
    """

    kind: RequestKind
    first_row: int | None = None
    instances: int
    bytes: int = 0
    waited_s: float = 0.0
    waited_for: RunState | None = None
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """A session begins.

    Attributes:
        workflow: The workflow's name.
        counts: Rows by outcome that earlier sessions have left.
    """

    workflow: str
    counts: Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """Something else holds the run up from now on.

    Attributes:
        state: What.
    """

    state: RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class RateChanged:
    """The rate has been reduced after a refusal, or recovers.

    Attributes:
        factor: By what the limits' rate is multiplied from now on, from 0 to 1.
    """

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """A session has ended.

    Attributes:
        summary: What has become of the rows.
        reason: `finished`, `drained`, `cancelled`, or the name of the error's class.
    """

    summary: Summary
    reason: str


Event = RunStarted | BatchBegun | AttemptFinished | BatchSettled | Paused | RateChanged | StateChanged | RunEnded


class Observer(Protocol):
    """Observes a run. It is called in the event loop: it must not block.

    An exception that it raises is logged once, and never ends the run.
    """

    def __call__(self, event: Event) -> None:
        """Take note of *event*."""
        ...
