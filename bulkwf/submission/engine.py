"""The run: source → batches → checkpoint → deliveries → checkpoint → progress.

Rules:

1. Batches begin in the order of the rows. A batch begins only when it can be sent soon: the batches that wait for a
   commit or a slot are at most `AHEAD` more than the limits will admit by the time that the new batch is durable. So a
   kill leaves few batches in doubt, and waiting for commits reduces the rate little.
2. At most two batches for each concurrent request are open, including batches in backoff and batches that wait for a
   commit. So a slow service or a slow disk stops the reading of the list, and memory does not grow.
3. The first reason to stop ends the run. Waits for slots and backoffs end at once. Answers in flight are read until the
   deadline, and what they settle is kept.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import groupby

import anyio

from bulkwf.attempt import Transport
from bulkwf.batching.batch_state import BatchState
from bulkwf.batching.batcher import Batcher
from bulkwf.batching.ids import IdScheme, has_its_ids
from bulkwf.checkpoint import ANOTHER, Begun, Checkpoint, damaged
from bulkwf.clock import Clock
from bulkwf.errors import BulkwfError, Draining, InputError, TemporaryStop
from bulkwf.events import Observer, RunEnded, RunStarted
from bulkwf.limits.slots import Limiter
from bulkwf.model import Batch, Result, Summary
from bulkwf.options import Options, Target
from bulkwf.sources import Source
from bulkwf.submission.activity import Activity
from bulkwf.submission.batch_requests import unknown_rows
from bulkwf.submission.client import open_client
from bulkwf.submission.delivery import BatchDelivery, RunContext
from bulkwf.submission.journal import Journal, Observers
from bulkwf.submission.progress import Progress

__all__ = ["Engine"]

AHEAD = 2
"""How many more batches may wait for a commit or a slot than the limits admit by the time that a new one is durable."""

_Work = tuple[BatchState, float, Awaitable[None] | None]
"""(state of a batch to deliver, when the batch began in Unix time, commit of its ids to wait for). The commit is None
if the ids are durable already."""


class Engine:
    """Runs one session: submits a list to one target.

    Args:
        target: The workflow.
        source: The list, at its beginning.
        checkpoint: Holds what earlier sessions stored, and stores the results of this one.
        transport: Sends requests to the target.
        limiter: The target's limits.
        scheme: How rows get ids.
        options: All other settings.
        progress: Counts what is durable.
        clock: Time and random numbers.
        source_change: How the list's files differ from those of the last session, as sentences; empty if they do not.
        emit: Called with each batch of results once it is durable; None if no caller wants them.
        observers: Called with each event of the run.

    Attributes:
        progress: Counts what is durable.
        summary: What has become of the rows; None until the run has ended.
        error: The error that ended the run; None if it was finished, drained or cancelled.
        drained: Whether the run is draining: it sends nothing more.
    """

    def __init__(
        self,
        target: Target,
        source: Source,
        checkpoint: Checkpoint,
        transport: Transport,
        limiter: Limiter,
        *,
        scheme: IdScheme,
        options: Options,
        progress: Progress,
        clock: Clock,
        source_change: str = "",
        emit: Callable[[Sequence[Result]], Awaitable[None]] | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.progress = progress
        self.summary: Summary | None = None
        self.error: Exception | None = None
        self.drained = False
        self._signal: int | None = None
        self._target = target
        self._source = source
        self._source_change = source_change
        self._checkpoint = checkpoint
        self._limiter = limiter
        self._scheme = scheme
        self._options = options
        self._clock = clock
        self._observe = Observers(observers)
        self._journal = Journal(
            checkpoint, progress, clock=clock, emit=emit, observe=self._observe, activity=self._activity
        )
        client = open_client(transport, limiter, self._journal, options.retry, clock, sleep=self._sleep)
        self._outage = client.outage
        self._batcher = Batcher(source, scheme, options, linger_s=options.batch.linger_s)
        self._context = RunContext(
            client=client,
            batcher=self._batcher,
            journal=self._journal,
            target=target,
            options=options,
            wall=clock.latest,
            where=source.where,
        )
        self._work: asyncio.Queue[_Work | None] = asyncio.Queue()
        self._workers = 0
        """Number of tasks that deliver batches."""
        self._open = 0
        """Number of batches that are begun and not settled."""
        self._most_open = 2 * options.rate.concurrency
        self._not_durable = 0
        """Number of open batches whose ids are not durable yet."""
        self._commit_s = 0.0
        """The longest time that a recent batch has taken to become durable, in seconds."""
        self._reading = False
        """Whether the next batch waits for the source."""
        self._room = asyncio.Event()
        """Set when there may be room for one more batch."""
        self._run_scope = anyio.CancelScope()
        self._feed_scope = anyio.CancelScope()
        self._sleep_scopes: dict[anyio.CancelScope, None] = {}  # in the order in which they began
        limiter.watch(self._limits_changed)

    @property
    def last_error(self) -> str:
        """Why the last attempt failed; empty if no attempt has failed since rows were last settled."""
        return self._journal.last_error

    @property
    def bound_by(self) -> str:
        """What the next request waits for, in words."""
        return self._limiter.bound_by

    # --- the run --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until every row is settled or the run is stopped.

        Afterwards `summary` says what has become of the rows, and `error` holds the error that ended the run; also if
        the caller was cancelled.
        """
        self._observe(RunStarted(workflow=self._target.workflow, counts=self.progress.counts))
        self._journal.update()
        try:
            complete = await self._submit()
            await self._close(complete=complete)
        except asyncio.CancelledError:
            with suppress(BulkwfError):
                self._journal.close(complete=False)  # the checkpoint's own close awaits it
            self._end(complete=False)
            raise

    async def _submit(self) -> bool:
        """Submit the list; True if it was read to its end and every row is settled."""
        ended = False
        with self._run_scope:
            async with anyio.create_task_group() as workers:
                with self._feed_scope:
                    ended = await self._feed(workers)
                for _ in range(self._workers):
                    self._work.put_nowait(None)
        if self._context.unknown and not self.drained:
            left = unknown_rows(self._context.unknown, self._context.unanswered)
            self.error = self.error or TemporaryStop(f"{left} All other rows are done.")
        cut = self._run_scope.cancelled_caught  # batches whose commit was under way are not counted
        return ended and not cut and self.error is None and not self.progress.counts.pending

    def drain(self, error: Exception | None = None, signal: int | None = None) -> None:
        """Send nothing more, read the answers in flight, keep what they settle. Only the first call counts.

        Args:
            error: What ends the run; None if the caller or a signal asks for the drain.
            signal: Number of the signal; None if there is none.
        """
        if self.drained:
            return
        self.drained, self.error, self._signal = True, error, signal
        self._run_scope.deadline = self._clock.now() + self._options.drain_timeout_s
        self._feed_scope.cancel()
        self._limiter.stop()
        for scope in self._sleep_scopes:
            scope.cancel()

    def abort(self) -> None:
        """Stop at once; requests in flight stay in doubt."""
        self.drain()
        self._run_scope.cancel()

    async def _feed(self, workers: anyio.abc.TaskGroup) -> bool:
        """Resume the batches of earlier sessions, then begin the batches that follow; True at the end of the list."""
        try:
            await self._resume(workers)
            while (batch := await self._read_batch()) is not None:
                await self._wait_for_room(len(batch.ids))
                self._begin(workers, BatchState(batch))
        except Exception as error:  # noqa: BLE001 - a bug, or the caller's own code: drain all the same
            self.drain(error)
            return False
        return True

    async def _read_batch(self) -> Batch | None:
        """The next batch; None at the end of the list."""
        self._reading = True
        self._journal.update()
        try:
            return await self._batcher.next()
        finally:
            self._reading = False
            self._journal.update()

    async def _wait_for_room(self, instances: int) -> None:
        """Wait until one more batch may begin; see rules 1 and 2."""
        while (
            self._open >= self._most_open
            or self._not_durable + self._limiter.waiting >= AHEAD + self._limiter.capacity(instances, self._commit_s)
        ):  # fmt: skip
            self._room.clear()
            await self._room.wait()

    # --- batches --------------------------------------------------------------------------------------------------

    def _begin(self, workers: anyio.abc.TaskGroup, state: BatchState) -> None:
        wall = self._clock.wall()
        if self._checkpoint.lost_since is not None:  # an earlier session may have sent these rows
            wall = min(wall, self._checkpoint.lost_since)
            state.in_doubt.update(state.pending)
        begun = self._checkpoint.begin(state, wall)
        self._not_durable += 1
        self._enqueue(workers, (state, wall, begun))

    def _enqueue(self, workers: anyio.abc.TaskGroup, work: _Work) -> None:
        """Have an idle worker deliver a batch, or a new worker if none is idle."""
        self._open += 1
        self._work.put_nowait(work)
        if self._open > self._workers:
            self._workers += 1
            workers.start_soon(self._work_loop)

    async def _work_loop(self) -> None:
        # A task for each batch would cost more CPU than all else that the engine does for it.
        while (work := await self._work.get()) is not None:
            await self._deliver(*work)
            del work  # else a settled batch would stay in memory until the next one

    async def _deliver(self, state: BatchState, begun_at: float, begun: Awaitable[None] | None) -> None:
        try:
            if begun is not None:
                await self._count(state.batch, begun)
            if state.pending:
                await BatchDelivery(self._context, state, begun_at).deliver()
        except Draining:
            pass
        except Exception as error:  # noqa: BLE001 - a bug, or the caller's own code: drain all the same
            self.drain(error)
        finally:
            self._open -= 1
            self._room.set()

    async def _count(self, batch: Batch, begun: Awaitable[None]) -> None:
        """Count a new batch once it is durable, and measure how long that takes."""
        since = self._clock.now()

        async def durable() -> None:
            try:
                await begun
            finally:
                self._not_durable -= 1
            self._commit_s = max(0.9 * self._commit_s, self._clock.now() - since)

        await self._journal.begun(batch, durable())

    async def _sleep(self, seconds: float) -> None:
        """Sleep; raise `Draining` as soon as the run drains."""
        if self.drained:
            raise Draining
        with anyio.CancelScope() as scope:
            self._sleep_scopes[scope] = None
            try:
                await self._clock.sleep(seconds)
            finally:
                del self._sleep_scopes[scope]
        if scope.cancelled_caught:
            raise Draining

    async def _close(self, *, complete: bool) -> None:
        """Write what the checkpoint still buffers, and whether the run is finished; then end the session."""
        try:
            await self._journal.close(complete=complete)
        except BulkwfError as error:
            self.error = self.error or error
        self._end(complete=complete and self.error is None)

    def _end(self, *, complete: bool) -> None:
        """Store how the session ends, and announce it."""
        error = self.error
        known = error if isinstance(error, BulkwfError) else None
        if complete:
            reason = "finished"
        elif error is not None:
            reason = type(error).__name__
        else:
            reason = "drained" if self.drained else "cancelled"
        self.summary = self.progress.summary(
            self._clock.now(),
            complete=complete,
            fail_on_existed=self._options.fail_on_existed,
            error=known,
            signal=self._signal,
        )
        exit_code = self.summary.exit_code if error is known and reason != "cancelled" else None
        self._checkpoint.end(self._clock.wall(), reason, exit_code)
        self._observe(RunEnded(summary=self.summary, reason=reason))

    def _activity(self, committing: bool) -> Activity:
        """What the run is doing now; *committing*: a commit is under way."""
        limiter = self._limiter
        return Activity(
            paused_until=limiter.paused_until,
            failing=self._outage.failing_since is not None,
            limit=limiter.waits_for,
            committing=committing,
            reading=self._reading,
            on_wire=limiter.on_wire > 0 or self._context.waits > 0,
            rate_factor=limiter.rate_factor,
        )

    def _limits_changed(self) -> None:
        self._room.set()
        self._journal.update()

    # --- resuming -------------------------------------------------------------------------------------------------

    async def _resume(self, workers: anyio.abc.TaskGroup) -> None:
        """Read the rows of earlier sessions, check that they have not changed, and resume unsettled batches."""
        for settled, batches in groupby(self._checkpoint.begun(), lambda begun: begun.settled and begun.whole):
            if settled:
                if (differing := await self._source.skip(batches)) is not None:
                    begun, ended = differing
                    raise self._differs(begun, ended=ended)
            else:
                for begun in batches:
                    await self._resume_batch(workers, begun)

    async def _resume_batch(self, workers: anyio.abc.TaskGroup, begun: Begun) -> None:
        """Check that the rows of one batch have not changed, and deliver what is left of it."""
        piece = await self._source.take_rows(begun.rows)
        if piece.rows < begun.rows:
            raise self._differs(begun, ended=True)
        state = self._checkpoint.batch_state(begun, piece.data, self._options.row_shape)
        if state.fingerprint() != (begun.size, begun.digest):
            raise self._differs(begun, ended=False)
        if not begun.settled:
            if not has_its_ids(state.batch, self._scheme, state.refused()):
                raise damaged(
                    self._checkpoint.path, f"the rows from row {begun.first_row} on do not have the ids that it holds"
                )
            await self._wait_for_room(len(state.pending))
            self._enqueue(workers, (state, begun.begun_at, None))

    def _differs(self, begun: Begun, *, ended: bool) -> InputError:
        """The error for a list whose rows differ from the batch *begun*. *ended*: the list ends inside the batch."""
        end = begun.first_row + begun.rows
        if ended:
            fault = f"the list ends before row {end}, and the run has begun rows up to there."
            advice = "Give the whole list that the run began with."
        else:
            first, last = self._source.where(begun.first_row), self._source.where(end - 1)
            fault = f"this is not the list that the run began with: something between {first} and {last} has changed."
            advice = "Give the list as it was (rows may be added at its end)."
        return InputError(" ".join(filter(None, (fault, self._source_change, advice, ANOTHER))))
