"""One batch, until every instance in it is settled.

Send, judge, and do what the verdict asks for with the unsettled instances: retry, send in halves until the bad rows
stand alone, or look up ids that the answer omitted.

Rules:

1. What has been settled is durable before anything else is done for the batch.
2. The same row is never on the wire twice at one time: a batch's parts go one after another.
3. Nothing is sent again once the service may have forgotten the ids.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from bulkwf.attempt import Judgement, Request, RequestKind, Verdict
from bulkwf.batching.batch_state import BatchState
from bulkwf.batching.batcher import Batcher
from bulkwf.batching.body import compose
from bulkwf.errors import CheckpointError, ServiceRefused
from bulkwf.limits.backoff import backoff_s
from bulkwf.options import Options, Target
from bulkwf.service.fast_path import FastJudge
from bulkwf.service.judge import existence, judge_lookup, rejection
from bulkwf.service.requests import create_batch, get_instance
from bulkwf.service.verdicts import HANDLING, Action
from bulkwf.submission.client import ServiceClient
from bulkwf.submission.journal import Journal
from bulkwf.submission.retries import LOOK_UP_TRIES, reject_limit

__all__ = ["BatchDelivery", "RunContext"]

LOOK_UP_AT_MOST = 2
"""Look up at most this many omitted ids each. If more are omitted, send them once more; if they are omitted again, look
up one at random and apply its answer to all."""
ABSENCES = 3
"""Reject a row after this many look-ups have found no instance while other rows were being created."""
ABSENCE_GAP_S = 10.0
"""Absences count if they are this many seconds apart: a replica that answers look-ups may lag behind the creations."""
UNANSWERED_ROUNDS = 3
"""Leave the omitted rows of a batch pending after this many times `LOOK_UP_TRIES` failed look-ups in a row."""
PROBE_FROM = 10
"""A refused first batch of at least this many rows is probed before it is taken apart."""


@dataclass(slots=True, kw_only=True)
class RunContext:
    """What the deliveries of one run share.

    Attributes:
        client: Makes their requests.
        journal: Makes results durable, and counts them.
        batcher: Decides how much one request may carry.
        target: The workflow.
        options: Confirmation, limits of rejection.
        wall: Unix time in seconds, the later of two clocks: ids must not look younger than they are.
        where: A row's place for people.
        judge: Says what answers mean.
        unknown: Instances that were left pending because their look-ups are never answered.
        unanswered: What is known of the first of them, for people; empty if there is none.
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
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True)
class _Absence:
    """What look-ups have found of one omitted instance, since an attempt was last in doubt about it.

    Attributes:
        count: How many of them have found none, `ABSENCE_GAP_S` apart.
        at: When the last of these was, in monotonic seconds.
    """

    count: int = 0
    at: float = -inf


class BatchDelivery:
    """Delivers one batch.

    Args:
        run: What it shares with the run's other deliveries.
        state: What is known of the batch.
        begun_at: When its ids became durable, in Unix time: no instance of it is older.
    """

    def __init__(self, run: RunContext, state: BatchState, begun_at: float) -> None:
        self._run = run
        self._client = run.client
        self._state = state
        self._begun_at = begun_at
        self._started_at = run.client.clock()
        self._created_before = run.journal.progress.counts.created
        """Instances that the run had created when the delivery began, or when ids were last found omitted."""
        self._absences: dict[int, _Absence] = {}
        self._maybe_created_at: dict[int, float] = {}
        """When an attempt of this session may last have created each instance: it was in doubt, or omitted the id."""
        self._unanswered_rounds = 0
        """How many times look-ups have failed `LOOK_UP_TRIES` times in a row."""
        self._refused_alone: set[int] = set()

    async def deliver(self) -> None:
        """Send what is pending until nothing is, but for instances whose look-ups are never answered.

        Raises:
            ServiceRefused: The service refuses the run as a whole.
            TemporaryStop: The service has been failing for too long.
            CheckpointError: Rows may have been sent so long ago that their ids may be forgotten.
            Draining: The run is to stop.
        """
        for part in self._run.batcher.requests(sorted(self._state.pending)):
            await self._settle(part)

    async def _settle(self, part: Sequence[int]) -> None:
        """Send *part* until all of it is settled."""
        state = self._state
        omitted: frozenset[int] = frozenset()
        attempts = 0
        while part:
            judgement = await self._send(part)
            part = judgement.unsettled
            action = HANDLING[judgement.verdict].action
            if action is Action.CONFIRM:
                # In a row: an attempt in doubt between them may have created some of what the first left out.
                in_a_row = state.attempts == attempts + 1
                part = await self._confirm(part, again=in_a_row and omitted.issuperset(part))
                omitted, attempts = frozenset(part), state.attempts
                if self._unanswered_rounds >= UNANSWERED_ROUNDS:
                    self._leave_unknown(part)
                    part = ()
            elif action is Action.SPLIT:
                await self._take_apart(part, judgement)
                part = ()

    # --- attempts -------------------------------------------------------------------------------------------------

    async def _send(self, part: Sequence[int]) -> Judgement:
        """Send *part* with retries."""

        async def attempt() -> Judgement:
            nonlocal part
            judgement = await self._attempt(part)
            part = judgement.unsettled
            return judgement

        return await self._client.with_retries(attempt)

    async def _attempt(self, part: Sequence[int]) -> Judgement:
        """One request for *part*."""
        run, batch = self._run, self._state.batch

        def request() -> Request:
            self._refuse_expired(part)  # not before the slot is held: a pause may outlast the service's memory
            return create_batch(run.target, compose(batch, part))

        judgement = await self._client.attempt(
            RequestKind.CREATE,
            request,
            lambda reply: run.judge(batch, part, reply),
            instances=len(part),
            state=self._state,
        )
        handling = HANDLING[judgement.verdict]
        if handling.in_doubt or handling.action is Action.CONFIRM:
            self._maybe_created_at.update(dict.fromkeys(judgement.unsettled, self._client.clock()))
        if handling.in_doubt:
            for position in judgement.unsettled:  # an earlier absence says nothing of what this attempt has created
                self._absences.pop(position, None)
        self._refuse_rejects(judgement)
        return judgement

    async def _look_up(self, position: int) -> Judgement:
        """Look up one instance until the service says whether it exists; `UNANSWERED` if it keeps failing to."""
        batch = self._state.batch
        failures = 0

        async def attempt() -> Judgement:
            nonlocal failures
            judgement = await self._client.attempt(
                RequestKind.LOOK_UP,
                lambda: get_instance(self._run.target, batch.ids[position]),
                lambda reply: judge_lookup(batch, position, reply),
                state=self._state,
            )
            failed = HANDLING[judgement.verdict].lookup_failed
            failures += failed
            if not failed or failures < LOOK_UP_TRIES:
                return judgement
            # Sending the row again shows whether the service fails, or this look-up alone.
            self._unanswered_rounds += 1
            return replace(judgement, verdict=Verdict.UNANSWERED)

        return await self._client.with_retries(attempt)

    async def _infer(self, judgement: Judgement) -> None:
        """Settle instances by what other answers imply."""
        await self._run.journal.settle(self._state, judgement)
        self._client.outage.success()
        self._refuse_rejects(judgement)

    def _refuse_rejects(self, judgement: Judgement) -> None:
        """End the run once more rows are rejected than it allows."""
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

    # --- what a verdict asks for ----------------------------------------------------------------------------------

    def _refuse_expired(self, part: Sequence[int]) -> None:
        """Never send an id again once the service may have forgotten it: the row could run twice."""
        state = self._state
        if self._run.options.in_doubt == "resend" or state.in_doubt.isdisjoint(part):
            return
        age_s = self._run.wall() - self._begun_at
        if age_s > state.batch.retention_s:
            first = state.batch.first_row + state.batch.offsets[part[0]]
            raise CheckpointError(
                f"{len(part)} rows from row {first} on may have been started {_period(age_s)} ago, longer than the "
                f"service is sure to remember their ids ({_period(state.batch.retention_s)}). See whether they run; "
                "--in-doubt resend then sends them again, and those that did start run twice."
            )

    async def _take_apart(self, part: Sequence[int], judgement: Judgement) -> None:
        """Halve a refused part until the bad rows stand alone; all others go through."""
        if judgement.verdict is Verdict.TOO_LARGE:
            self._run.batcher.learn_max_bytes(len(compose(self._state.batch, part)) // 2)
        if len(part) == 1:
            await self._reject_if_again(part[0], judgement)
            return
        if judgement.verdict is Verdict.BAD_REQUEST:
            part = await self._probe(part, judgement)
        middle = (len(part) + 1) // 2
        await self._settle(part[:middle])
        await self._settle(part[middle:])

    async def _reject_if_again(self, position: int, judgement: Judgement) -> None:
        """Reject a row that is refused alone, and alone once more over a new connection.

        A refusal names no id: the late copy of another row's, read from a connection that was idle, looks alike.
        A row that an earlier attempt may have created is looked up first: an instance that exists is not rejected.
        """
        if position not in self._refused_alone:
            self._refused_alone.add(position)
            self._client.transport.drop_connections()
            await self._settle((position,))
            return
        if position in self._state.in_doubt:
            found = await self._look_up_late(position)
            if found.verdict is Verdict.UNANSWERED:
                self._leave_unknown((position,))
            if found.verdict is not Verdict.ABSENT:
                return
        await self._reject(position, judgement)

    async def _look_up_late(self, position: int) -> Judgement:
        """Look up an instance once a look-up must see what an attempt, of this session or before, may have created."""
        client = self._client
        maybe_created_at = self._maybe_created_at.get(position, self._started_at)
        await client.sleep(max(0.0, maybe_created_at + ABSENCE_GAP_S - client.clock()))
        return await self._look_up(position)

    async def _reject(self, position: int, judgement: Judgement) -> None:
        await self._infer(rejection(self._state.batch, position, judgement.code, judgement.message))

    async def _probe(self, part: Sequence[int], judgement: Judgement) -> Sequence[int]:
        """Send a few single rows of a refused first batch: if all are refused alike, it is not the rows' fault."""
        run = self._run
        async with run.probing:  # one batch at a time, or each open batch would sacrifice rows of its own
            if len(part) < PROBE_FROM or run.journal.progress.counts.created or run.options.max_rejects is not None:
                return part
            return await self._probe_alone(part, judgement)

    async def _probe_alone(self, part: Sequence[int], judgement: Judgement) -> Sequence[int]:
        probes = (part[0], part[len(part) // 2], part[-1])
        alike = 0
        for position in probes:
            await self._settle((position,))
            result = self._state.others.get(position)
            alike += result is not None and result.outcome == "rejected" and result.code == judgement.code
        if alike == len(probes):
            raise ServiceRefused(
                f"the service refuses the first rows alike: {judgement.message} (code {judgement.code}). {len(probes)} "
                "of them were tried alone; the others stay pending. --max-rejects goes on all the same."
            )
        return [position for position in part if position not in probes]

    # --- ids that the service omitted -----------------------------------------------------------------------------

    async def _confirm(self, omitted: Sequence[int], *, again: bool) -> Sequence[int]:
        """Find out about ids that an answer omitted; returns those that must be sent again."""
        state = self._state
        if not self._run.options.confirm_existing:
            await self._infer(existence(state.batch, omitted))
            return ()
        created = self._run.journal.progress.counts.created
        idle, self._created_before = created <= self._created_before, created
        if len(omitted) <= LOOK_UP_AT_MOST:
            return [position for position in omitted if await self._is_absent(position, idle=idle)]
        if not again:
            await self._back_off(2)
            return omitted
        asked = omitted[int(self._client.random() * len(omitted)) % len(omitted)]
        if not await self._is_absent(asked, idle=idle) and state.others[asked].outcome == "existed":
            await self._infer(existence(state.batch, [one for one in omitted if one != asked]))
        return [position for position in omitted if position in state.pending]

    async def _is_absent(self, position: int, *, idle: bool) -> bool:
        """Look up one omitted instance; True if it must be sent again. *idle*: nothing was created meanwhile."""
        judgement = await self._look_up(position)
        if judgement.verdict is Verdict.UNANSWERED:
            return True
        if judgement.verdict is not Verdict.ABSENT:
            return False
        if idle:  # nothing shows that it is this row's fault: the queue may be full
            await self._client.pause(replace(judgement, message=self._omission(position)))
            if not (self._run.options.reject_omitted and self._is_last()):
                return True
        return not await self._reject_if_absent(position, judgement, idle=idle)

    async def _reject_if_absent(self, position: int, judgement: Judgement, *, idle: bool) -> bool:
        """Count an absence, and reject the row if it is one too many; else wait before the row is sent again.

        Returns:
            Whether the row is settled.
        """
        client, first = self._client, position not in self._absences
        absence = self._absences.setdefault(position, _Absence())
        if client.clock() - absence.at >= ABSENCE_GAP_S:
            absence.at = client.clock()
            absence.count += 1
        if absence.count >= ABSENCES:
            # The attempt that omitted the id just now may have created it, and this look-up may have come too early.
            found = await self._look_up_late(position)
            if found.verdict is Verdict.ABSENT:
                await self._reject(position, replace(judgement, code=None, message=_OMISSION))
            return found.verdict is not Verdict.UNANSWERED
        if not idle:
            await (self._back_off(1) if first else client.sleep(ABSENCE_GAP_S))
        return False

    def _omission(self, position: int) -> str:
        """Why nothing goes on while *position* stays omitted."""
        advice = ""
        if not self._run.options.reject_omitted and len(self._state.pending) <= LOOK_UP_AT_MOST:
            advice = "; if the row is one of the last two of the list and stays omitted, --reject-omitted gives it up"
        return (
            f"no instance is created any more, and the service leaves {self._name(position)} out of its answers "
            f"without a reason. Its queue may be full{advice}"
        )

    def _leave_unknown(self, part: Sequence[int]) -> None:
        """Leave *part* pending for the next run: whether the instances exist can't be found out now."""
        run = self._run
        run.unanswered = run.unanswered or self._name(part[0])
        run.unknown += len(part)

    def _name(self, position: int) -> str:
        batch = self._state.batch
        return f"{self._run.where(batch.first_row + batch.offsets[position])} (id {batch.ids[position]})"

    async def _back_off(self, times: int) -> None:
        client = self._client
        await client.sleep(backoff_s(client.policy, times, client.random()))

    def _is_last(self) -> bool:
        """Whether nothing else is left whose creation could tell: the last rows of a list must come to an end, too."""
        counts, pending = self._run.journal.progress.counts, len(self._state.pending)
        return bool(counts.created) and pending <= LOOK_UP_AT_MOST and counts.pending <= pending


def _period(seconds: float) -> str:
    return f"{seconds / 86_400:,.1f} days" if seconds >= 172_800 else f"{seconds:,.0f} s"


_OMISSION = "the service leaves the id out of its answers and does not create it, without a reason"
