"""Delivers one batch: sends it until every instance in it is settled.

A delivery sends a part, judges the answer, and does what the verdict requires for the unsettled instances: retry, send
them in halves until each bad row is alone, or look up the ids that the answer omitted.

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
"""Up to this many omitted ids are looked up one by one. More of them are sent once more; if they are omitted again, one
is drawn at random and looked up, and its answer applies to all."""
ABSENCES = 3
"""Number of absences after which a row is rejected: look-ups that found no instance while others were created."""
ABSENCE_GAP_S = 10.0
"""Least time between two absences that count, in seconds: a replica that answers look-ups may lag behind."""
UNANSWERED_ROUNDS = 3
"""Number of unanswered look-ups in a row after which the omitted rows of a batch stay pending."""
PROBE_FROM = 10
"""Least number of rows of a refused first batch that is probed before it is split."""


@dataclass(slots=True, kw_only=True)
class RunContext:
    """What the deliveries of one run share.

    Attributes:
        client: Makes the requests.
        journal: Makes results durable, and counts them.
        batcher: Decides how much one request may carry.
        target: The workflow.
        options: Whether existing instances are confirmed, and how many rows may be rejected.
        wall: Unix time in seconds, the later of two clocks: ids must not look younger than they are.
        where: Names a row's place in its file.
        judge: Judges the answers to create requests.
        unknown: Number of instances that stay pending because their look-ups were not answered.
        unanswered: Place and id of the first of them; empty if there is none.
        waits: Number of deliveries that wait until the service shows what it has created.
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
class _Instance:
    """What this session knows of one unsettled instance. Times are in monotonic seconds.

    Attributes:
        maybe_created_at: When an attempt may last have created it: the attempt was in doubt, or omitted the id.
        absences: How many look-ups have found no instance, `ABSENCE_GAP_S` apart, since an attempt was last in doubt.
        absent_at: When the last of these look-ups was answered; minus infinity if there is none.
        refused_alone: The service has refused the row alone before.
    """

    maybe_created_at: float
    absences: int = 0
    absent_at: float = -inf
    refused_alone: bool = False


class BatchDelivery:
    """Delivers one batch.

    Args:
        run: What the deliveries of the run share.
        state: Which instances of the batch are settled.
        begun_at: When the batch's ids became durable, in Unix time: none of its instances is older.
    """

    def __init__(self, run: RunContext, state: BatchState, begun_at: float) -> None:
        self._run = run
        self._client = run.client
        self._state = state
        self._begun_at = begun_at
        self._started_at = run.client.clock()
        self._created_before = run.journal.progress.counts.created
        """Instances that the run had created when the delivery began, or when ids were last found omitted."""
        self._instances: dict[int, _Instance] = {}
        """The instances of which more is known than that they are pending."""
        self._unanswered = 0
        """How many look-ups in a row have failed `LOOK_UP_TRIES` times each."""

    async def deliver(self) -> None:
        """Send what is pending until everything is settled, except instances whose look-ups are not answered.

        Raises:
            ServiceRefused: The service refuses the run as a whole.
            TemporaryStop: The service has been failing for too long.
            CheckpointError: The service may have forgotten the ids of rows that may have been sent.
            Draining: The run stops.
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
                # An attempt in doubt between two omissions may have created some of what the first one omitted.
                in_a_row = state.attempts == attempts + 1
                part = await self._confirm(part, again=in_a_row and omitted.issuperset(part))
                omitted, attempts = frozenset(part), state.attempts
                if self._unanswered >= UNANSWERED_ROUNDS:
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
            self._refuse_expired(part)  # only now: ids may expire in a pause before the slot
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
            for position in judgement.unsettled:
                self._maybe_created(position, in_doubt=handling.in_doubt)
        self._refuse_rejects(judgement)
        return judgement

    def _maybe_created(self, position: int, *, in_doubt: bool) -> None:
        """Note that the last attempt may have created an instance."""
        instance = self._instance(position)
        instance.maybe_created_at = self._client.clock()
        if in_doubt:  # earlier absences say nothing about what this attempt has created
            instance.absences, instance.absent_at = 0, -inf

    def _instance(self, position: int) -> _Instance:
        # An attempt of an earlier session may have created it just before this one started.
        return self._instances.setdefault(position, _Instance(self._started_at))

    async def _look_up(self, position: int) -> Judgement:
        """Look up one instance until the service says if it exists; `UNANSWERED` after `LOOK_UP_TRIES` failures."""
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
            handling = HANDLING[judgement.verdict]
            if handling.accepted:
                self._unanswered = 0
            failures += handling.lookup_failed
            if not handling.lookup_failed or failures < LOOK_UP_TRIES:
                return judgement
            # Sending the row again shows whether the service fails, or only this look-up.
            self._unanswered += 1
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

    # --- what a verdict requires ----------------------------------------------------------------------------------

    def _refuse_expired(self, part: Sequence[int]) -> None:
        """Raise if the service may have forgotten the ids of *part*: a row that is sent again could run twice."""
        state = self._state
        if self._run.options.in_doubt == "resend" or state.in_doubt.isdisjoint(part):
            return
        age_s = self._run.wall() - self._begun_at
        if age_s > state.batch.retention_s:
            first = state.batch.first_row + state.batch.offsets[part[0]]
            raise CheckpointError(
                f"{len(part)} rows from row {first} on may have been started {_period(age_s)} ago, longer than the "
                f"service is sure to remember their ids ({_period(state.batch.retention_s)}). Check whether they run; "
                "--in-doubt resend sends them again, and those that did start run twice."
            )

    async def _take_apart(self, part: Sequence[int], judgement: Judgement) -> None:
        """Halve a refused part until each bad row is alone; all others are created."""
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

        A refusal names no id: a late copy of another row's refusal, read from an idle connection, looks the same.
        A row that an earlier attempt may have created is looked up first: an instance that exists is not rejected.
        """
        instance = self._instance(position)
        if not instance.refused_alone:
            instance.refused_alone = True
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
        """Look up an instance late enough to see what any earlier attempt has created."""
        seen_from = self._instance(position).maybe_created_at + ABSENCE_GAP_S
        await self._wait(max(0.0, seen_from - self._client.clock()))
        return await self._look_up(position)

    async def _reject(self, position: int, judgement: Judgement) -> None:
        await self._infer(rejection(self._state.batch, position, judgement.code, judgement.message))

    async def _probe(self, part: Sequence[int], judgement: Judgement) -> Sequence[int]:
        """Send three single rows of a refused first batch: if all are refused alike, the rows are not the cause."""
        run = self._run
        async with run.probing:  # one batch at a time, or each open batch would have rows rejected
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

    # --- ids that an answer omitted -------------------------------------------------------------------------------

    async def _confirm(self, omitted: Sequence[int], *, again: bool) -> Sequence[int]:
        """Look up ids that an answer omitted; returns those to send again. *again*: omitted twice in a row."""
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
        """Look up one omitted instance; True if it must be sent again. *idle*: nothing was created since."""
        judgement = await self._look_up(position)
        if judgement.verdict is Verdict.UNANSWERED:
            return True
        if judgement.verdict is not Verdict.ABSENT:
            return False
        if idle:  # nothing shows that the row is the cause: the queue may be full
            await self._client.pause(replace(judgement, message=self._omission(position)))
            if not (self._run.options.reject_omitted and self._is_last()):
                return True
        return not await self._reject_if_absent(position, judgement, idle=idle)

    async def _reject_if_absent(self, position: int, judgement: Judgement, *, idle: bool) -> bool:
        """Count an absence, and reject the row after `ABSENCES` of them; else wait before the row is sent again.

        Returns:
            Whether the row is settled.
        """
        instance, now = self._instance(position), self._client.clock()
        first = instance.absent_at == -inf
        if now - instance.absent_at >= ABSENCE_GAP_S:
            instance.absent_at = now
            instance.absences += 1
        if instance.absences >= ABSENCES:
            # The attempt that omitted the id may have created it, and the look-up may have been too early to see it.
            found = await self._look_up_late(position)
            if found.verdict is Verdict.ABSENT:
                await self._reject(position, replace(judgement, code=None, message=_OMISSION))
            return found.verdict is not Verdict.UNANSWERED
        if not idle:
            await (self._back_off(1) if first else self._wait(ABSENCE_GAP_S))
        return False

    def _omission(self, position: int) -> str:
        """Why the run creates nothing while the id at *position* stays omitted."""
        advice = ""
        if not self._run.options.reject_omitted and len(self._state.pending) <= LOOK_UP_AT_MOST:
            advice = "; if the row is one of the last two of the list and stays omitted, --reject-omitted gives it up"
        return (
            f"the service creates no instance any more, and omits {self._name(position)} from its answers without a "
            f"reason. Its queue may be full{advice}"
        )

    def _leave_unknown(self, part: Sequence[int]) -> None:
        """Leave *part* pending for the next run: no look-up shows whether the instances exist."""
        run = self._run
        run.unanswered = run.unanswered or self._name(part[0])
        run.unknown += len(part)

    def _name(self, position: int) -> str:
        batch = self._state.batch
        return f"{self._run.where(batch.first_row + batch.offsets[position])} (id {batch.ids[position]})"

    async def _back_off(self, times: int) -> None:
        await self._wait(backoff_s(self._client.policy, times, self._client.random()))

    async def _wait(self, seconds: float) -> None:
        """Wait until the service shows what it has created: the run waits for the service meanwhile."""
        run = self._run
        run.waits += 1
        run.journal.update()
        try:
            await self._client.sleep(seconds)
        finally:
            run.waits -= 1
            run.journal.update()

    def _is_last(self) -> bool:
        """Whether no other row is left whose creation could show that the service creates instances."""
        counts, pending = self._run.journal.progress.counts, len(self._state.pending)
        return bool(counts.created) and pending <= LOOK_UP_AT_MOST and counts.pending <= pending


def _period(seconds: float) -> str:
    return f"{seconds / 86_400:,.1f} days" if seconds >= 172_800 else f"{seconds:,.0f} s"


_OMISSION = "the service omits the id from its answers and does not create the instance, without a reason"
