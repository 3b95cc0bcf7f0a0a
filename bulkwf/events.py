"""The events of a run, as frozen values, and the protocol of their observers.

`RunStarted` is a session's first event and `RunEnded` its last one; a killed process has no last event. An event
about a batch or an attempt is announced once what it says is durable.
"""

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
        first_row: Number of its first row, counted from 0 over the whole list.
        instances: Number of its instances.
        invalid: Number of its rows that are `invalid`, and so are not sent.
    """

    first_row: int
    instances: int
    invalid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFinished:
    """One request has been answered or has failed, and the attempt is durable.

    Attributes:
        kind: What the request asked for.
        first_row: Number of the first row of its batch; None if it was for no batch.
        instances: Number of instances that it was to create; 0 for a look-up.
        bytes: Size of its body, in bytes.
        waited_s: How long it waited for its slot, in seconds.
        waited_for: What it waited for last; None if it did not wait.
        reply: The answer, or why there is none.
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
    """Rows of a batch have been settled, and their results are durable.

    Attributes:
        first_row: Number of the batch's first row.
        judgement: Which of the batch's instances are settled, and how.
    """

    first_row: int
    judgement: Judgement


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """All sending pauses.

    Attributes:
        seconds: Length of the pause, from now on.
    """

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """A session begins.

    Attributes:
        workflow: Name of the workflow.
        counts: Rows by outcome, as earlier sessions left them.
    """

    workflow: str
    counts: Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """The run waits for something else from now on.

    Attributes:
        state: What the run waits for.
    """

    state: RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class RateChanged:
    """The rate has been reduced after a 429, or recovers.

    Attributes:
        factor: Share of the rate in `RateLimits` that is used from now on: over 0, at most 1.
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
    """A function that a run calls with each event.

    It is called in the event loop, so it must not block. If it raises an exception, the run goes on; only the first
    exception of each observer is logged.
    """

    def __call__(self, event: Event) -> None:
        """Take note of *event*."""
        ...
