"""Makes the requests of one batch: creates and looks up instances, and settles those that other answers imply.

Every call makes what it settles durable before it returns. No id in doubt is sent again once the service may have
forgotten it, unless the options allow that.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from bulkwf.attempt import Judgement, Request, RequestKind, Verdict
from bulkwf.batching.batch_state import BatchState
from bulkwf.batching.batcher import Batcher
from bulkwf.batching.body import compose
from bulkwf.errors import CheckpointError, ServiceRefused, TemporaryStop
from bulkwf.limits.backoff import backoff_s
from bulkwf.options import Options, Target
from bulkwf.service.fast_path import FastJudge
from bulkwf.service.judge import INTERNAL_ERRORS, judge_lookup, rejection
from bulkwf.service.requests import create_batch, get_instance
from bulkwf.service.verdicts import HANDLING, Action
from bulkwf.submission.client import ServiceClient
from bulkwf.submission.journal import Journal
from bulkwf.submission.retries import LookUpTries, reject_limit
from bulkwf.text import counted

__all__ = ["ABSENCE_GAP_S", "BatchRequests", "InstanceNotes", "RunContext", "unknown_rows"]

ABSENCE_GAP_S = 10.0
"""Minimum time between two absences that both count, in seconds: a replica that answers look-ups may lag behind."""


@dataclass(slots=True, kw_only=True)
class RunContext:
    """What the deliveries of one run share.

    Attributes:
        client: Makes the requests.
        journal: Makes results durable, and counts them.
        batcher: Decides how much one request may carry.
        target: The workflow.
        options: The run's options.
        wall: Returns the Unix time in seconds; see `Clock.latest`.
        where: Given a row's number, returns its place in its file, for messages.
        judge: Judges the answers to create requests.
        unknown: Number of instances that stay pending because their look-ups were not answered.
        unanswered: Place and id of the first of these instances, for messages; empty if there is none.
        waits: Number of deliveries that wait before they ask the service again.
        probing: Held while a refused first batch is probed.
    """

    client: ServiceClient
    journal: Journal
    batcher: Batcher
    target: Target
    options: Options
    wall: Callable[[], float]
    where: Callable[[int], str]
    judge: FastJudge = field(default_factory=FastJudge)
    unknown: int = 0
    unanswered: str = ""
    waits: int = 0
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True)
class InstanceNotes:
    """What this session knows of one unsettled instance. Times are in monotonic seconds.

    Attributes:
        maybe_created_at: When the last attempt that may have created it ended: one that neither settled nor refused it.
        absences: Number of look-ups that found no instance since an attempt was last in doubt. A look-up within
            `ABSENCE_GAP_S` after one that counts does not count.
        absent_at: When the last look-up that counts was answered; minus infinity if there is none.
    """

    maybe_created_at: float
    absences: int = 0
    absent_at: float = -inf


class BatchRequests:
    """Makes the requests of one batch.

    Args:
        run: What the deliveries of the run share.
        state: Which instances of the batch are settled.
        begun_at: When the batch's ids became durable, in Unix time: none of its instances is older.

    Attributes:
        unanswered: Number of instances in a row whose look-up has failed `LOOK_UP_TRIES` times.
    """

    def __init__(self, run: RunContext, state: BatchState, begun_at: float) -> None:
        self.unanswered = 0
        self._run = run
        self._client = run.client
        self._state = state
        self._begun_at = begun_at
        self._started_at = run.client.clock()
        self._notes: dict[int, InstanceNotes] = {}

    async def create(self, part: Sequence[int], *, fresh: bool = False) -> Judgement:
        """Send *part*, with retries; returns the last judgement. *fresh*: send each request over a new connection."""

        async def attempt() -> Judgement:
            nonlocal part
            judgement = await self._attempt(part, fresh=fresh)
            part = judgement.unsettled
            return judgement

        return await self._client.with_retries(attempt)

    async def _attempt(self, part: Sequence[int], *, fresh: bool) -> Judgement:
        """Make one attempt to create the instances of *part*."""
        run, batch = self._run, self._state.batch

        def request() -> Request:
            self._refuse_expired(part)  # only now: ids may expire in a pause before the slot
            return create_batch(run.target, compose(batch, part), fresh=fresh)

        judgement = await self._client.attempt(
            RequestKind.CREATE,
            request,
            lambda reply: run.judge(batch, part, reply),
            instances=len(part),
            state=self._state,
        )
        handling = HANDLING[judgement.verdict]
        # Even a 429 may come from a proxy, after the service has acted.
        whole = handling.action is Action.SPLIT and not judgement.refused and judgement.code not in INTERNAL_ERRORS
        for position in judgement.unsettled:
            if not (whole or position in judgement.refused):
                self._maybe_created(position, in_doubt=handling.in_doubt)
        self._refuse_rejects(judgement)
        return judgement

    def _maybe_created(self, position: int, *, in_doubt: bool) -> None:
        """Note that the last attempt may have created an instance."""
        instance = self.notes(position)
        instance.maybe_created_at = self._client.clock()
        if in_doubt:  # earlier absences say nothing about what this attempt has created
            instance.absences, instance.absent_at = 0, -inf

    def notes(self, position: int) -> InstanceNotes:
        """What this session knows of one unsettled instance."""
        # An attempt of an earlier session may have created it just before this session started.
        return self._notes.setdefault(position, InstanceNotes(self._started_at))

    def may_exist(self, position: int) -> bool:
        """Whether some attempt may have created the instance: one that neither settled nor refused it."""
        return position in self._state.in_doubt or position in self._notes

    async def look_up(self, position: int, *, fresh: bool = False) -> Judgement:
        """Look up one instance until an answer says whether it exists; `UNANSWERED` after `LOOK_UP_TRIES` failures.

        Args:
            position: The instance.
            fresh: Send each request over a new connection.
        """
        batch, tries = self._state.batch, LookUpTries()

        async def attempt() -> Judgement:
            judgement = await self._client.attempt(
                RequestKind.LOOK_UP,
                lambda: get_instance(self._run.target, batch.ids[position], fresh=fresh),
                lambda reply: judge_lookup(batch, position, reply),
                state=self._state,
            )
            handling = HANDLING[judgement.verdict]
            if handling.accepted:
                self.unanswered = 0
            if not (handling.lookup_failed and tries.failed()):
                return judgement
            # Sending the row again shows whether the service fails, or only this look-up.
            self.unanswered += 1
            return replace(judgement, verdict=Verdict.UNANSWERED)

        return await self._client.with_retries(attempt)

    async def infer(self, judgement: Judgement) -> None:
        """Settle instances whose results follow from answers about other instances, or from several answers."""
        await self._run.journal.settle(self._state, judgement)
        self._client.outage.success()
        self._refuse_rejects(judgement)

    def _refuse_rejects(self, judgement: Judgement) -> None:
        """Raise `ServiceRefused` if more rows are rejected than the options allow."""
        rejected = [result for _, result in judgement.others if result.outcome == "rejected"]
        if not rejected:
            return
        counts, last = self._run.journal.progress.counts, rejected[-1]
        limit = reject_limit(self._run.options.max_rejects, counts.rows)
        if counts.rejected > limit:
            raise ServiceRefused(
                f"{counts.rejected:,} rows are rejected, more than the {limit:,} allowed; the last one for: "
                f"{last.message} (code {last.code}). Look at `bulkwf results --outcome rejected`; "
                "--max-rejects allows more."
            )

    def _refuse_expired(self, part: Sequence[int]) -> None:
        """Raise `CheckpointError` if the service may have forgotten ids in doubt: a row sent again could run twice."""
        state = self._state
        if self._run.options.in_doubt == "resend" or state.in_doubt.isdisjoint(part):
            return
        age_s = self._run.wall() - self._begun_at
        if age_s > state.batch.retention_s:
            first = state.batch.first_row + state.batch.offsets[part[0]]
            raise CheckpointError(
                f"{counted(len(part), 'row')} from row {first} on may have been started {_period(age_s)} ago. The "
                f"service is sure to remember ids for {_period(state.batch.retention_s)}, so rows that did start would "
                "run twice if they were sent again. Find out from what the workflow has done whether they ran; to send "
                "them again all the same, run with --in-doubt resend."
            )

    async def look_up_before_rejection(self, position: int) -> Judgement:
        """Look up an instance over a new connection, as a refused or omitted row must not be rejected if it exists.

        If an attempt may have created it, the look-up follows at least `ABSENCE_GAP_S` after the last such attempt.
        Otherwise the result is `ABSENT` without a look-up if the options turn look-ups off.
        """
        if self.may_exist(position):
            seen_from = self.notes(position).maybe_created_at + ABSENCE_GAP_S
            await self.wait(max(0.0, seen_from - self._client.clock()))
        elif not self._run.options.confirm_existing:
            return Judgement(verdict=Verdict.ABSENT)
        return await self.look_up(position, fresh=True)

    async def reject(self, position: int, judgement: Judgement) -> None:
        """Settle one instance as `rejected`, for the reason that *judgement* gives."""
        await self.infer(rejection(self._state.batch, position, judgement.code, judgement.message))

    def leave_unknown(self, part: Sequence[int]) -> None:
        """Leave *part* pending for the next session: no look-up shows whether the instances exist."""
        run = self._run
        run.unanswered = run.unanswered or self.name(part[0])
        run.unknown += len(part)
        self.unanswered = 0  # the next rows have look-ups of their own

    def leave_refused(self, position: int) -> None:
        """Leave a refused row pending for the next session: no look-up shows whether its instance exists.

        Raises:
            TemporaryStop: More rows stay pending than the options allow to be rejected.
        """
        run = self._run
        self.leave_unknown((position,))
        if run.unknown > reject_limit(run.options.max_rejects, run.journal.progress.counts.rows):
            raise TemporaryStop(unknown_rows(run.unknown, run.unanswered))

    def name(self, position: int) -> str:
        """Place and id of a row, for messages."""
        batch = self._state.batch
        return f"{self._run.where(batch.first_row + batch.offsets[position])} (id {batch.ids[position]})"

    async def back_off(self, times: int) -> None:
        """Wait for the backoff that follows *times* failures in a row."""
        await self.wait(backoff_s(self._client.policy, times, self._client.random()))

    async def wait(self, seconds: float) -> None:
        """Wait before the service is asked again. Meanwhile the run counts as waiting for the service."""
        run = self._run
        run.waits += 1
        run.journal.update()
        try:
            await self._client.sleep(seconds)
        finally:
            run.waits -= 1
            run.journal.update()


def unknown_rows(rows: int, first: str) -> str:
    """The message that *rows* rows stay pending because their look-ups are not answered; *first* names one of them."""
    those = f"{first} stays" if rows == 1 else f"{counted(rows, 'row')} stay"
    among = "" if rows == 1 else f" ({first} is the first)"
    return (
        f"{those} pending{among}: the service neither creates nor rejects such rows, and does not answer when it is "
        "asked for them. --no-confirm-existing settles them without asking."
    )


def _period(seconds: float) -> str:
    return f"{seconds / 86_400:,.1f} days" if seconds >= 172_800 else f"{seconds:,.0f} s"
