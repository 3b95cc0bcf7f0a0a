"""Makes batches, attempts and results durable, then counts and announces them.

Rule: nothing is counted, shown or returned to the caller before it is durable.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from bulkwf.attempt import Judgement, Reply, RequestKind, Verdict
from bulkwf.batching.batch_state import BatchState
from bulkwf.checkpoint import Attempt, Checkpoint
from bulkwf.clock import Clock
from bulkwf.events import AttemptFinished, BatchBegun, BatchSettled, Event, Observer, Paused, RateChanged, StateChanged
from bulkwf.limits.quota import quota_text
from bulkwf.model import Batch, Result, RunState
from bulkwf.service.verdicts import HANDLING
from bulkwf.submission.activity import Activity, StateClock, Timeline
from bulkwf.submission.progress import Progress

__all__ = ["Journal", "Observers"]

log = logging.getLogger("bulkwf")


class Journal:
    """Writes what happens in a run to the checkpoint; then counts it, emits results, and calls the observers.

    Args:
        checkpoint: The run's checkpoint.
        progress: The counts of what is durable.
        clock: Time.
        emit: Called with each batch of results once it is durable; None if no caller wants them.
        observe: Called with each event; must not block or raise.
        activity: Given whether a commit is under way, returns what the run is doing.

    Attributes:
        progress: The counts of what is durable.
        last_error: Why the last attempt failed; empty if no attempt has failed since rows were last settled.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        progress: Progress,
        *,
        clock: Clock,
        emit: Callable[[Sequence[Result]], Awaitable[None]] | None = None,
        observe: Callable[[Event], None] = lambda _: None,
        activity: Callable[[bool], Activity] = lambda committing: Activity(committing=committing),
    ) -> None:
        self.progress = progress
        self.last_error = ""
        self._checkpoint = checkpoint
        self._clock = clock
        self._emit = emit
        self._observe = observe
        self._activity = activity
        self._states = StateClock(clock.now())
        self._timeline = Timeline(clock.now())
        self._rate_factor = 1.0
        self._commits = 0
        self._update: asyncio.Handle | None = None
        self._closed = False

    async def begun(self, batch: Batch, durable: Awaitable[None]) -> None:
        """Wait until a new batch is *durable*, then count and announce it."""
        await self._committed(durable)
        self.progress.begun(len(batch.ids), len(batch.refused))
        if batch.refused and self._emit is not None:
            await self._emit(batch.refused)
        self._observe(BatchBegun(first_row=batch.first_row, instances=len(batch.ids), invalid=len(batch.refused)))

    async def record(self, attempt: AttemptFinished, state: BatchState | None) -> None:
        """See `client.AttemptJournal.record`. Attempt, results and pause are one commit."""
        assert state is not None  # every request of a run is for a batch
        judgement, wall = attempt.judgement, self._clock.wall()
        self.progress.attempts += 1
        self._timeline.attempted(
            attempt.reply.elapsed_s, created=len(judgement.created), failed=HANDLING[judgement.verdict].failed
        )
        if judgement.verdict is not Verdict.DONE:
            self.last_error = judgement.message
        if attempt.kind is RequestKind.CREATE:
            state.sent(judgement)
        if judgement.settles:
            state.add(judgement)
        committing = self._checkpoint.record(
            self._stored(attempt),
            settled=state if judgement.settles else None,
            pause_until=None if attempt.pause_s is None else self._pause_until(),
            now=wall,
        )
        await self._committed(committing)
        self._observe(attempt)
        if attempt.pause_s is not None:
            self._observe(Paused(seconds=attempt.pause_s))
        if judgement.settles:
            await self._announce(state, judgement)

    async def settle(self, state: BatchState, judgement: Judgement) -> None:
        """Make results durable that do not follow from one attempt alone, then count and announce them."""
        state.add(judgement)
        await self._committed(self._checkpoint.settle(state, self._clock.wall()))
        await self._announce(state, judgement)

    async def pause(self, seconds: float) -> None:
        """See `client.AttemptJournal.pause`."""
        await self._committed(self._checkpoint.pause(self._pause_until()))
        self._observe(Paused(seconds=seconds))

    def close(self, *, complete: bool) -> Awaitable[None]:
        """Write what the checkpoint still buffers and, if *complete*, that the run is finished.

        Returns:
            An awaitable that ends once all of it is durable. It is written even if nothing awaits this.
        """
        self._closed = True
        if self._update is not None:
            self._update.cancel()
        self._update_now(ends=True)
        return self._checkpoint.finish(self._clock.wall()) if complete else self._checkpoint.flush()

    def update(self) -> None:
        """Update the run's state and timeline soon. To be called whenever what the run is doing may have changed.

        What the run is doing changes about nine times a batch, and most changes last for no longer than one iteration
        of the event loop. So the state is computed once for all changes of an iteration.
        """
        if self._update is None and not self._closed:
            self._update = asyncio.get_running_loop().call_soon(self._update_now)

    def _update_now(self, *, ends: bool = False) -> None:
        """Update the run's state and timeline. *ends*: the session ends now."""
        self._update = None
        now, activity = self._clock.now(), self._activity(self._commits > 0)
        changed = self._states.update(now, activity)
        self.progress.paused_s = self._states.seconds[RunState.PAUSED]
        if ends or self._timeline.due(now):
            started_at = self._clock.wall() - now + self._timeline.started_at
            self._checkpoint.note_interval(self._timeline.cut(now, self._states.seconds), started_at)
        if changed:
            self._observe(StateChanged(state=self._states.state))
        if activity.rate_factor != self._rate_factor:
            self._rate_factor = activity.rate_factor
            self._observe(RateChanged(factor=self._rate_factor))

    async def _committed(self, durable: Awaitable[None]) -> None:
        """Wait for a commit; meanwhile the run counts as committing."""
        self._commits += 1
        self.update()
        try:
            await durable
        finally:
            self._commits -= 1
            self.update()

    async def _announce(self, state: BatchState, judgement: Judgement) -> None:
        """Count results that are durable, emit them, and call the observers."""
        self.last_error = ""
        in_doubt = sum(state.others[position].in_doubt for position, _ in judgement.others)
        self.progress.settled(judgement, in_doubt, self._clock.now())
        if self._emit is not None:
            await self._emit(state.settled(judgement))
        self._observe(BatchSettled(first_row=state.batch.first_row, judgement=judgement))

    def _stored(self, attempt: AttemptFinished) -> Attempt:
        reply, judgement = attempt.reply, attempt.judgement
        assert attempt.first_row is not None
        return Attempt(
            first_row=attempt.first_row,
            started_at=self._clock.wall() - reply.elapsed_s,
            elapsed_s=reply.elapsed_s,
            instances=attempt.instances,
            http_status=reply.status if isinstance(reply, Reply) else None,
            verdict=judgement.verdict.value,
            detail=judgement.message or None,
            kind=attempt.kind.value,
            bytes=attempt.bytes,
            waited_s=attempt.waited_s,
            waited_for=None if attempt.waited_for is None else attempt.waited_for.value,
            quota=quota_text(reply.headers) if isinstance(reply, Reply) else None,
        )

    def _pause_until(self) -> float:
        """When the present pause ends, in Unix time."""
        return self._clock.wall() + self._activity(False).paused_until - self._clock.now()


class Observers:
    """Calls every observer with each event.

    Args:
        observers: The observers, in the order in which they are called.
    """

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self._failed: set[int] = set()

    def __call__(self, event: Event) -> None:
        """Call every observer; the first exception of each is logged, later ones are ignored."""
        for number, observer in enumerate(self._observers):
            try:
                observer(event)
            except Exception:  # observers are the caller's code: their errors do not end the run
                if number not in self._failed:
                    self._failed.add(number)
                    log.exception("an observer of the run failed at %s; its later failures are not logged", event)
