"""The run: source → batches → checkpoint → deliveries → checkpoint → progress.

Rules:

1. Batches begin in the order of the rows. A batch is begun only when it can be sent soon: at most `AHEAD` more than
   could go by the time that it is durable, so that a kill leaves few in doubt, and commits cost little of the rate.
2. At most two batches for each place on the wire are open, those in backoff and those waiting to be settled included:
   a slow service or a slow disk holds up the reading of the list, and memory stays flat.
3. One stop value ends the run. The first reason wins: waits for slots and backoffs end at once, answers in flight are
   read until the deadline, and what they settle is kept.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import groupby

import anyio

from bulkwf.attempt import Transport
from bulkwf.batching.batch_state import BatchState
from bulkwf.batching.batcher import Batcher
from bulkwf.batching.ids import IdScheme, has_its_ids
from bulkwf.checkpoint import ANOTHER, Begun, Checkpoint, damaged
from bulkwf.clock import Clock
from bulkwf.errors import BulkwfError, Draining, InputError, TemporaryStop
from bulkwf.events import Observer, RateChanged, RunEnded, RunStarted
from bulkwf.limits.slots import Limiter
from bulkwf.model import Batch, Result, Summary
from bulkwf.options import Options, Target
from bulkwf.sources import Source
from bulkwf.submission.activity import Activity
from bulkwf.submission.client import OutageTracker, ServiceClient
from bulkwf.submission.delivery import BatchDelivery, RunContext
from bulkwf.submission.journal import Journal, Observers
from bulkwf.submission.progress import Progress

__all__ = ["Engine"]

AHEAD = 2
"""Batches that may be begun beside those that could go by the time they are durable."""

_Work = tuple[BatchState, float, Awaitable[None] | None]
"""A batch to be seen through, since when its ids are durable, and what ends when they are."""


class Engine:
    """Runs one list through to one target.

    Args:
        target: The workflow.
        source: The list, at its beginning.
        checkpoint: What is known of it, and where results go.
        transport: The way to the target.
        limiter: The target's limits.
        scheme: How rows get ids.
        options: Everything else.
        progress: Counts what is durable.
        clock: Time and chance.
        source_change: How the list's files differ from those of the last session, in words; empty if they do not.
        emit: Given each batch of results once it is durable; None if nobody asks for them.
        observers: Given each event of the run.
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
        self._outage = OutageTracker()
        client = ServiceClient(
            transport=transport,
            limiter=limiter,
            policy=options.retry,
            outage=self._outage,
            journal=self._journal,
            sleep=self._sleep,
            clock=clock.now,
            random=clock.draw,
        )
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
        self._carriers = 0
        self._open = 0
        self._beginning = 0
        self._reading = False
        self._rate_factor = limiter.rate_factor
        self._commit_s = 0.0
        """How long batches take to become durable: the longest of late."""
        self._most_open = 2 * options.rate.concurrency
        self._room = asyncio.Event()
        self._whole = anyio.CancelScope()
        self._feeding = anyio.CancelScope()
        self._sleeping: dict[anyio.CancelScope, None] = {}  # in the order in which they began
        limiter.watch(self._limits_changed)

    @property
    def last_error(self) -> str:
        """What the last attempt failed for, while nothing has been settled since; empty otherwise."""
        return self._journal.last_error

    @property
    def bound_by(self) -> str:
        """What the next request waits for, in words."""
        return self._limiter.bound_by

    # --- the run --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until every row is settled or the run is stopped.

        What stopped the run is in `error`; with `drained` and no error it was `drain`. `summary` says what has become
        of the rows.
        """
        ended = False
        self._observe(RunStarted(workflow=self._target.workflow, counts=self.progress.counts))
        self._journal.update()
        with self._whole:
            async with anyio.create_task_group() as carriers:
                with self._feeding:
                    ended = await self._feed(carriers)
                for _ in range(self._carriers):
                    self._work.put_nowait(None)
        if self._context.unknown and not self.drained:
            self.error = self.error or self._unknown()
        cut = self._whole.cancelled_caught  # batches on their way to the disk may be known to nobody
        complete = ended and not cut and self.error is None and not self.progress.counts.pending
        await self._close(complete=complete)

    def drain(self, error: Exception | None = None, signal: int | None = None) -> None:
        """Stop: send nothing more, read the answers in flight, keep what they settle. The first reason wins.

        Args:
            error: What ends the run.
            signal: Number of the signal that ends it.
        """
        if self.drained:
            return
        self.drained, self.error, self._signal = True, error, signal
        self._whole.deadline = self._clock.now() + self._options.drain_timeout_s
        self._feeding.cancel()
        self._limiter.stop()
        for scope in self._sleeping:
            scope.cancel()

    def abort(self) -> None:
        """Stop at once; requests in flight stay in doubt."""
        self.drain()
        self._whole.cancel()

    async def _feed(self, carriers: anyio.abc.TaskGroup) -> bool:
        """Begin every batch of the list, the ones of earlier sessions first; True at the end of the list."""
        try:
            await self._resume(carriers)
            while (batch := await self._read_batch()) is not None:
                await self._have_room(len(batch.ids))
                self._start(carriers, BatchState(batch))
        except Exception as error:  # noqa: BLE001 - a bug, or the caller's own code: the run ends in order all the same
            self.drain(error)
            return False
        return True

    async def _read_batch(self) -> Batch | None:
        """The next batch, counting how long the source takes for it."""
        self._reading = True
        self._journal.update()
        try:
            return await self._batcher.next()
        finally:
            self._reading = False
            self._journal.update()

    async def _have_room(self, instances: int) -> None:
        """Wait until one more batch may be begun."""
        while (
            self._open >= self._most_open
            or self._beginning + self._limiter.waiting >= AHEAD + self._limiter.capacity(instances, self._commit_s)
        ):  # fmt: skip
            self._room.clear()
            await self._room.wait()

    # --- a batch's life -------------------------------------------------------------------------------------------

    def _start(self, carriers: anyio.abc.TaskGroup, ledger: BatchState) -> None:
        wall = self._clock.wall()
        if self._checkpoint.lost_since is not None:  # an earlier session may have sent these rows
            wall = min(wall, self._checkpoint.lost_since)
            ledger.in_doubt.update(ledger.pending)
        begun = self._checkpoint.begin(ledger, wall)
        self._beginning += 1
        self._hand_over(carriers, (ledger, wall, begun))

    def _hand_over(self, carriers: anyio.abc.TaskGroup, work: _Work) -> None:
        """Let a carrier see a batch through: one that is idle, or a new one."""
        self._open += 1
        self._work.put_nowait(work)
        if self._open > self._carriers:
            self._carriers += 1
            carriers.start_soon(self._carry_all)

    async def _carry_all(self) -> None:
        # A task for each batch would cost more than all that the engine does for it.
        while (work := await self._work.get()) is not None:
            await self._carry(*work)
            del work  # or its rows would stay until there are others

    async def _carry(self, ledger: BatchState, begun_at: float, begun: Awaitable[None] | None) -> None:
        """See a batch through; *begun* ends when a new one is durable."""
        try:
            if begun is not None:
                await self._count(ledger.batch, begun)
            if ledger.pending:
                await BatchDelivery(self._context, ledger, begun_at).deliver()
        except Draining:
            pass
        except Exception as error:  # noqa: BLE001 - a bug, or the caller's own code: the run ends in order all the same
            self.drain(error)
        finally:
            self._open -= 1
            self._room.set()

    async def _count(self, batch: Batch, begun: Awaitable[None]) -> None:
        """Count a new batch, once it is durable."""
        since = self._clock.now()

        async def durable() -> None:
            try:
                await begun
            finally:
                self._beginning -= 1
            self._commit_s = max(0.9 * self._commit_s, self._clock.now() - since)

        await self._journal.begun(batch, durable())

    async def _sleep(self, seconds: float) -> None:
        if self.drained:
            raise Draining
        with anyio.CancelScope() as scope:
            self._sleeping[scope] = None
            try:
                await self._clock.sleep(seconds)
            finally:
                del self._sleeping[scope]
        if scope.cancelled_caught:
            raise Draining

    async def _close(self, *, complete: bool) -> None:
        """Store what only waits for another write, whether the run is finished, and how the session ends."""
        try:
            await self._journal.close(complete=complete)
        except BulkwfError as failed:
            self.error = self.error or failed
        error = self.error
        complete = complete and error is None
        stopped = type(error).__name__ if error is not None else "drained"
        reason = "finished" if complete else stopped
        self.summary = self.progress.summary(
            self._clock.now(),
            complete=complete,
            fail_on_existed=self._options.fail_on_existed,
            error=error if isinstance(error, BulkwfError) else None,
            signal=self._signal,
        )
        known = error is None or isinstance(error, BulkwfError)
        self._checkpoint.end(self._clock.wall(), reason, self.summary.exit_code if known else None)
        self._observe(RunEnded(summary=self.summary, reason=reason))

    def _activity(self, committing: bool) -> Activity:
        """What the run is doing."""
        limiter = self._limiter
        return Activity(
            paused_until=limiter.paused_until,
            failing=self._outage.failing_since is not None,
            limit=limiter.waits_for,
            committing=committing,
            reading=self._reading,
            on_wire=limiter.on_wire > 0 or self._context.waits > 0,
        )

    def _limits_changed(self) -> None:
        self._room.set()
        self._journal.update()
        if self._limiter.rate_factor != self._rate_factor:
            self._rate_factor = self._limiter.rate_factor
            self._observe(RateChanged(factor=self._rate_factor))

    def _unknown(self) -> TemporaryStop:
        unknown, first = self._context.unknown, self._context.unanswered
        rows = f"{first} stays" if unknown == 1 else f"{unknown:,} rows stay"
        among = "" if unknown == 1 else f" ({first} is the first)"
        return TemporaryStop(
            f"{rows} pending{among}: the service leaves such ids out of its answers, and does not answer when it is "
            "asked for them. All other rows are done."
        )

    # --- resuming -------------------------------------------------------------------------------------------------

    async def _resume(self, carriers: anyio.abc.TaskGroup) -> None:
        """Read again what earlier sessions have begun: compare it, and take up the batches in doubt."""
        for settled, batches in groupby(self._checkpoint.begun(), lambda begun: begun.settled and begun.whole):
            if settled:
                if (differing := await self._source.skip(batches)) is not None:
                    begun, ended = differing
                    raise self._differs(begun, ended=ended)
            else:
                for begun in batches:
                    await self._take_up(carriers, begun)

    async def _take_up(self, carriers: anyio.abc.TaskGroup, begun: Begun) -> None:
        piece = await self._source.take_rows(begun.rows)
        if piece.rows < begun.rows:
            raise self._differs(begun, ended=True)
        ledger = self._checkpoint.ledger(begun, piece.data, self._options.row_shape)
        if ledger.fingerprint() != (begun.size, begun.digest):
            raise self._differs(begun, ended=False)
        if not begun.settled:
            if not has_its_ids(ledger.batch, self._scheme, ledger.refused()):
                raise damaged(
                    self._checkpoint.path, f"the rows from row {begun.first_row} on do not have the ids that it holds"
                )
            await self._have_room(len(ledger.pending))
            self._hand_over(carriers, (ledger, begun.begun_at, None))

    def _differs(self, begun: Begun, *, ended: bool) -> InputError:
        if ended:
            sentences = (
                f"the list ends before row {begun.first_row + begun.rows}, which the checkpoint says was begun.",
                self._source_change,
                "Give the whole list that the run began with.",
                ANOTHER,
            )
            return InputError(" ".join(filter(None, sentences)))
        first, last = self._source.where(begun.first_row), self._source.where(begun.first_row + begun.rows - 1)
        sentences = (
            f"the list is not the one that the run began with: something between {first} and {last} has changed since.",
            self._source_change,
            "Give the list as it was (rows may be added at its end).",
            ANOTHER,
        )
        return InputError(" ".join(filter(None, sentences)))
