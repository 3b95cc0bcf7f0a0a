"""Computes the state of a run, and adds up the time in each state. Pure.

A run is in exactly one `RunState` at a time. If it waits for several things, the first one in `RunState` counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, inf

from bulkwf.checkpoint import Interval
from bulkwf.model import RunState

__all__ = ["TIMELINE_S", "Activity", "StateClock", "Timeline", "quantile", "state_at"]

TIMELINE_S = 10.0
"""Minimum length of an interval of the timeline, in seconds."""
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What a run is doing at one instant.

    Attributes:
        paused_until: When the pause ends, in monotonic seconds; in the past if there is none.
        failing: Whether an attempt has failed since a row was last settled.
        limit: The limit that the next request waits for; None if it waits for none.
        committing: Whether a commit is under way.
        reading: Whether the next batch waits for the source.
        on_wire: Whether requests are on the wire, or deliveries wait before they ask the service again.
        rate_factor: The fraction of the rate that is used: 1.0 if no rate is reduced.
    """

    paused_until: float = -inf
    failing: bool = False
    limit: RunState | None = None
    committing: bool = False
    reading: bool = False
    on_wire: bool = False
    rate_factor: float = 1.0


def state_at(now: float, activity: Activity) -> RunState:
    """The state at *now* (in monotonic seconds) of a run that is doing *activity*."""
    if now < activity.paused_until:
        return RunState.PAUSED
    if activity.failing:
        return RunState.OUTAGE
    if activity.limit is not None:
        return activity.limit
    if activity.committing:
        return RunState.DISK
    if activity.reading:
        return RunState.SOURCE
    return RunState.SERVICE if activity.on_wire else RunState.IDLE


class StateClock:
    """Adds up the time that a run is in each state.

    Args:
        now: When the run starts, in monotonic seconds.

    Attributes:
        state: The present state.
        seconds: Time in each state so far, in seconds.
    """

    def __init__(self, now: float) -> None:
        self.state = RunState.IDLE
        self.seconds = dict.fromkeys(RunState, 0.0)
        self._activity = Activity()
        self._since = now

    def update(self, now: float, activity: Activity) -> bool:
        """Add the time until *now* to the present state, then change to the state of *activity*.

        Args:
            now: Monotonic seconds.
            activity: What the run is doing from now on.

        Returns:
            Whether the state has changed.
        """
        before = self.state
        if before is RunState.PAUSED and self._activity.paused_until < now:  # a pause ends without an event
            self._count(self._activity.paused_until)
            self.state = state_at(self._since, self._activity)
        self._count(now)
        self._activity = activity
        self.state = state_at(now, activity)
        return self.state is not before

    def _count(self, until: float) -> None:
        self.seconds[self.state] += until - self._since
        self._since = until


@dataclass(slots=True)
class Timeline:
    """Counts attempts and the time in each state, interval by interval.

    Attributes:
        started_at: When the present interval began, in monotonic seconds.
    """

    started_at: float
    _before: Mapping[RunState, float] = field(default_factory=dict)
    _created: int = 0
    _attempts: int = 0
    _errors: int = 0
    _latencies: list[float] = field(default_factory=list)

    def attempted(self, elapsed_s: float, *, created: int, failed: bool) -> None:
        """Count an attempt that took *elapsed_s* seconds.

        Args:
            elapsed_s: Time from the start of its request to the answer or fault, in seconds.
            created: Instances that it created.
            failed: Whether it counts as an error.
        """
        self._attempts += 1
        self._errors += failed
        self._created += created
        self._latencies.append(elapsed_s)

    def due(self, now: float) -> bool:
        """Whether the present interval has lasted `TIMELINE_S`."""
        return now - self.started_at >= TIMELINE_S

    def cut(self, now: float, seconds: Mapping[RunState, float]) -> Interval:
        """End the present interval and begin the next one; returns the one that ended.

        Args:
            now: Monotonic seconds.
            seconds: Time in each state since the session began, in seconds.
        """
        spent = {state: seconds[state] - self._before.get(state, 0.0) for state in seconds}
        latencies = sorted(self._latencies)
        interval = Interval(
            length_s=now - self.started_at,
            seconds={state: length_s for state, length_s in spent.items() if length_s > 0},
            created=self._created,
            attempts=self._attempts,
            errors=self._errors,
            latency_s=[quantile(latencies, share) for share in QUANTILES] if latencies else (),
        )
        self.started_at, self._before = now, dict(seconds)
        self._created = self._attempts = self._errors = 0
        self._latencies = []
        return interval


def quantile(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank quantile of *ordered*, whose values are in ascending order; *share* is from 0 to 1."""
    return ordered[max(0, ceil(share * len(ordered)) - 1)]
