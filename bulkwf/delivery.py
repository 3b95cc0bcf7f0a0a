"""One batch, until every instance in it is settled.

Send, judge, and do with what is left what the verdict asks for: wait and send it again (`channel` has the patience),
send it in halves until the bad rows stand alone, or ask whether ids that were left out exist.

Rules:

1. What has been settled is durable before anything else is done for the batch.
2. The same row is never on the wire twice at one time: a batch's parts go one after another.
3. Nothing is sent again once the service may have forgotten the ids.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from bulkwf.channel import Channel
from bulkwf.errors import CheckpointError, ServiceRefused
from bulkwf.ledger import Ledger
from bulkwf.model import Fault, Outcome, Reply, Result, Verdict
from bulkwf.options import Options
from bulkwf.outcome import Judge, existence, judge_lookup, rejection
from bulkwf.payload import compose
from bulkwf.retry import LOOK_UP_FAILURES, LOOK_UP_TRIES, backoff_s, reject_limit

__all__ = ["Courier", "Hooks", "Tally"]

LOOK_UP_AT_MOST = 2
"""Up to so many omitted ids are asked for one by one; more are sent again together, then one speaks for all."""
ABSENCES = 3
"""How many times a row must be asked for and be absent, while others are created, to be called rejected."""
ABSENCE_GAP_S = 10.0
"""Absences count if they are this far apart: a replica that answers look-ups may lag behind the creations."""
UNANSWERED_ROUNDS = 3
"""How many times look-ups of a batch may fail `LOOK_UP_TRIES` times in a row; then its omitted rows stay pending."""
PROBE_FROM = 10
"""A first batch of so many rows that is refused is probed before it is taken apart."""

_DOUBTFUL = frozenset({Verdict.IN_DOUBT, Verdict.CONTRADICTION})


@dataclass(slots=True)
class Tally:
    """What the deliveries of one run know together of its rows.

    Attributes:
        created: Instances created so far, by earlier sessions too.
        rejected: Rows rejected so far.
        pending: Instances begun and not settled.
        rows: Rows begun so far.
        max_bytes: The service has called a request of twice this size too large; None if it has not.
        unknown: Instances that were left pending because their look-ups are never answered.
        unanswered: What is known of the first of them, for people; empty if there is none.
        probing: Held while a refused first batch is probed.
    """

    created: int = 0
    rejected: int = 0
    pending: int = 0
    rows: int = 0
    max_bytes: int | None = None
    unknown: int = 0
    unanswered: str = ""
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def settled(self, outcome: Outcome) -> None:
        """The service has settled something."""
        ends = [result.outcome for _, result in outcome.others]
        self.created += len(outcome.created) + ends.count("created")
        self.rejected += ends.count("rejected")
        self.pending -= len(outcome.created) + len(ends)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What a delivery asks of the engine.

    Attributes:
        settled: Make what an outcome has added to a ledger durable, then count it.
        attempted: Note an attempt: the ledger, the number of instances (0 for a look-up), the reply, the outcome.
        noted: Make the attempts noted so far durable.
    """

    settled: Callable[[Ledger, Outcome], Awaitable[None]]
    attempted: Callable[[Ledger, int, Reply | Fault, Outcome], None]
    noted: Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Courier:
    """Delivers batches to one target.

    Attributes:
        channel: The way there.
        options: Confirmation, limits of rejection.
        hooks: What the engine does for a delivery.
        tally: Shared by all deliveries of the run.
        wall: Unix time in seconds, of two clocks the later: ids must not look younger than they are.
        where: A row's place for people.
        judge: Says what answers mean.
    """

    channel: Channel
    options: Options
    hooks: Hooks
    tally: Tally
    wall: Callable[[], float]
    where: Callable[[int], str]
    judge: Judge = field(default_factory=Judge)

    async def deliver(self, ledger: Ledger, begun_at: float) -> None:
        """Send what is pending in *ledger* until nothing is, but for instances whose look-ups are never answered.

        Args:
            ledger: The batch's account.
            begun_at: When its ids became durable, in Unix time: no instance of it is older.

        Raises:
            ServiceRefused: The service refuses the run as a whole.
            TemporaryStop: The service has been ill for too long.
            CheckpointError: Rows may have been sent so long ago that their ids may be forgotten.
            Draining: The run is to stop.
        """
        delivery = _Delivery(self, ledger, begun_at, self.channel.clock(), self.tally.created)
        pending, most = sorted(ledger.pending), self.options.batch_instances
        for start in range(0, len(pending), most):  # one begun at another rate may be larger than ours
            await delivery.settle(pending[start : start + most])


@dataclass(slots=True)
class _Delivery:
    """One batch on its way."""

    courier: Courier
    ledger: Ledger
    begun_at: float
    began_at: float
    """When the delivery began, on the monotonic clock."""
    created_before: int
    """Instances that the run had created when the delivery began, or when ids were last found omitted."""
    absences: dict[int, int] = field(default_factory=dict)
    """How many times each instance has been asked for and was absent, `ABSENCE_GAP_S` apart."""
    absent_at: dict[int, float] = field(default_factory=dict)
    """When the last of those absences was."""
    doubted_at: dict[int, float] = field(default_factory=dict)
    """When an attempt of this session was last in doubt about each instance."""
    unanswered_rounds: int = 0
    """How many times look-ups have failed `LOOK_UP_TRIES` times in a row."""
    refused: set[int] = field(default_factory=set)
    """The instances that have been refused alone."""

    async def settle(self, part: Sequence[int]) -> None:
        """Send *part* until all of it is settled."""
        omitted: frozenset[int] = frozenset()
        attempts = 0
        while part:
            outcome = await self._persist(part)
            part = outcome.unsettled
            if outcome.verdict is Verdict.OMITTED:
                # In a row: one in doubt between them may have created some of what the first left out.
                in_a_row = self.ledger.attempts == attempts + 1
                part = await self._confirm(part, again=in_a_row and omitted.issuperset(part))
                omitted, attempts = frozenset(part), self.ledger.attempts
                if self.unanswered_rounds >= UNANSWERED_ROUNDS:
                    self._leave_unknown(part)
                    part = ()
            elif outcome.verdict in (Verdict.REFUSED, Verdict.TOO_LARGE):
                await self._take_apart(part, outcome)
                part = ()

    # --- attempts -------------------------------------------------------------------------------------------------

    async def _persist(self, part: Sequence[int]) -> Outcome:
        """Send *part* until it is settled, or another act than patience is called for."""

        async def attempt() -> Outcome:
            nonlocal part
            outcome = await self._attempt(part)
            part = outcome.unsettled
            return outcome

        return await self.courier.channel.persist(attempt)

    async def _attempt(self, part: Sequence[int]) -> Outcome:
        """One request, and all that it settles made durable."""
        courier, ledger, channel = self.courier, self.ledger, self.courier.channel
        async with channel.limiter.slot(len(part)) as slot:
            self._refuse_forgotten(part)  # not before: a pause may outlast the service's memory
            # No variable holds the body: error trackers would tell it with what is raised here and below.
            reply = await channel.transport.post(compose(ledger.batch, part), slot.written)
            outcome = courier.judge(ledger.batch, part, reply)
            if outcome.verdict is Verdict.NOT_SENT:
                slot.unsent()
        if outcome.verdict is Verdict.TOO_LARGE:
            size = len(compose(ledger.batch, part))
            courier.tally.max_bytes = min(courier.tally.max_bytes or size, size // 2)
        ledger.attempts += 1
        if outcome.verdict in _DOUBTFUL:
            ledger.in_doubt.update(outcome.unsettled)
            for position in outcome.unsettled:  # an absence from before says nothing of what this attempt has created
                self.doubted_at[position] = channel.clock()
                self.absences.pop(position, None)
                self.absent_at.pop(position, None)
        courier.hooks.attempted(ledger, len(part), reply, outcome)
        return await channel.learn(outcome, reply, self._keep)

    async def _look_up(self, position: int) -> Outcome:
        """Ask for one instance until the service says whether it exists; `UNANSWERED` if it keeps failing to."""
        failures = 0

        async def attempt() -> Outcome:
            nonlocal failures
            outcome = await self._ask(position)
            failed = outcome.verdict in LOOK_UP_FAILURES
            failures += failed
            if not failed or failures < LOOK_UP_TRIES:
                return outcome
            # Sending the row again tells whether it is the service that fails, or this look-up alone.
            self.unanswered_rounds += 1
            return replace(outcome, verdict=Verdict.UNANSWERED)

        return await self.courier.channel.persist(attempt)

    async def _ask(self, position: int) -> Outcome:
        ledger, channel = self.ledger, self.courier.channel
        outcome, reply = await channel.ask(
            lambda written: channel.transport.get(ledger.batch.ids[position], written),
            lambda reply: judge_lookup(ledger.batch, position, reply),
        )
        self.courier.hooks.attempted(ledger, 0, reply, outcome)
        return await channel.learn(outcome, reply, self._keep)

    async def _keep(self, outcome: Outcome) -> None:
        """Make what an attempt has come to durable."""
        if outcome.created or outcome.others:
            await self._settled(outcome)
        elif outcome.verdict is not Verdict.THROTTLED:  # the pause that follows is durable, with all before it
            await self.courier.hooks.noted()  # or a process that dies again and again would forget what it has sent

    async def _settled(self, outcome: Outcome) -> None:
        self.ledger.add(outcome)
        await self.courier.hooks.settled(self.ledger, outcome)
        self.courier.tally.settled(outcome)
        self.courier.channel.health.well()
        rejected = [result for _, result in outcome.others if result.outcome == "rejected"]
        if rejected:
            self._refuse_rejects(rejected[-1])

    def _refuse_rejects(self, last: Result) -> None:
        """End the run once more rows are rejected than it allows."""
        tally = self.courier.tally
        limit = reject_limit(self.courier.options.max_rejects, tally.rows)
        if tally.rejected > limit:
            raise ServiceRefused(
                f"{tally.rejected:,} rows are rejected, more than the {limit:,} allowed; the last one for: "
                f"{last.message} (code {last.code}). Look at `bulkwf results --outcome rejected`; "
                "--max-rejects allows more."
            )

    # --- what a verdict asks for ----------------------------------------------------------------------------------

    def _refuse_forgotten(self, part: Sequence[int]) -> None:
        """Never send an id again once the service may have forgotten it: the row could run twice."""
        ledger = self.ledger
        if self.courier.options.in_doubt == "resend" or ledger.in_doubt.isdisjoint(part):
            return
        age_s = self.courier.wall() - self.begun_at
        if age_s > ledger.batch.retention_s:
            first = ledger.batch.first_row + ledger.batch.offsets[part[0]]
            raise CheckpointError(
                f"{len(part)} rows from row {first} on may have been started {_period(age_s)} ago, longer than the "
                f"service is sure to remember their ids ({_period(ledger.batch.retention_s)}). See whether they run; "
                "--in-doubt resend then sends them again, and those that did start run twice."
            )

    async def _take_apart(self, part: Sequence[int], outcome: Outcome) -> None:
        """Halve a refused part until the bad rows stand alone; all others go through."""
        if len(part) == 1:
            await self._reject_if_again(part[0], outcome)
            return
        if outcome.verdict is Verdict.REFUSED:
            part = await self._probe(part, outcome)
        middle = (len(part) + 1) // 2
        await self.settle(part[:middle])
        await self.settle(part[middle:])

    async def _reject_if_again(self, position: int, outcome: Outcome) -> None:
        """Reject a row that is refused alone, and alone once more over a new connection.

        A refusal names no id: the late copy of another row's, handed over by a connection that was idle, looks alike.
        One that an earlier attempt may have created is asked for first: what runs is not rejected.
        """
        if position in self.refused:
            if position not in self.ledger.in_doubt:
                await self._reject(position, outcome)
                return
            await self._outlast_doubt(position)
            found = await self._look_up(position)
            if found.verdict is Verdict.ABSENT:
                await self._reject(position, outcome)
            elif found.verdict is Verdict.UNANSWERED:
                self._leave_unknown((position,))
            return
        self.refused.add(position)
        self.courier.channel.transport.distrust()
        await self.settle((position,))

    async def _outlast_doubt(self, position: int) -> None:
        """Wait until a look-up must see what an attempt in doubt has created, of this session or an earlier one."""
        channel = self.courier.channel
        doubted_at = self.doubted_at.get(position, self.began_at)
        await channel.sleep(max(0.0, doubted_at + ABSENCE_GAP_S - channel.clock()))

    async def _reject(self, position: int, outcome: Outcome) -> None:
        await self._settled(rejection(self.ledger.batch, position, outcome.code, outcome.message))

    async def _probe(self, part: Sequence[int], outcome: Outcome) -> Sequence[int]:
        """Send a few single rows of a refused first batch: if all are refused alike, it is not the rows' fault."""
        tally = self.courier.tally
        async with tally.probing:  # one batch at a time, or each that is open would sacrifice its own rows
            if len(part) < PROBE_FROM or tally.created or self.courier.options.max_rejects is not None:
                return part
            return await self._probe_alone(part, outcome)

    async def _probe_alone(self, part: Sequence[int], outcome: Outcome) -> Sequence[int]:
        probes = (part[0], part[len(part) // 2], part[-1])
        alike = 0
        for position in probes:
            await self.settle((position,))
            result = self.ledger.others.get(position)
            alike += result is not None and result.outcome == "rejected" and result.code == outcome.code
        if alike == len(probes):
            raise ServiceRefused(
                f"the service refuses the first rows alike: {outcome.message} (code {outcome.code}). {len(probes)} of "
                "them were tried alone; the others stay pending. --max-rejects goes on all the same."
            )
        return [position for position in part if position not in probes]

    # --- ids that the service left out ----------------------------------------------------------------------------

    async def _confirm(self, omitted: Sequence[int], *, again: bool) -> Sequence[int]:
        """Find out about ids that an answer left out; returns those that must be sent again."""
        if not self.courier.options.confirm_existing:
            await self._settled(existence(self.ledger.batch, omitted))
            return ()
        idle = self.courier.tally.created <= self.created_before
        self.created_before = self.courier.tally.created
        if len(omitted) <= LOOK_UP_AT_MOST:
            return [position for position in omitted if await self._is_absent(position, idle=idle)]
        if not again:
            await self._back_off(2)
            return omitted
        asked = omitted[int(self.courier.channel.draw() * len(omitted)) % len(omitted)]
        if not await self._is_absent(asked, idle=idle) and self.ledger.others[asked].outcome == "existed":
            await self._settled(existence(self.ledger.batch, [one for one in omitted if one != asked]))
        return [position for position in omitted if position in self.ledger.pending]

    async def _is_absent(self, position: int, *, idle: bool) -> bool:
        """Ask for one omitted instance; True if it has to be sent again. *idle*: nothing was created meanwhile."""
        outcome = await self._look_up(position)
        if outcome.verdict is Verdict.UNANSWERED:
            return True
        if outcome.verdict is not Verdict.ABSENT:
            return False
        channel = self.courier.channel
        if idle:  # a full queue, say: nothing shows that it is this row's fault
            await channel.pause(replace(outcome, message=self._omission(position)))
            if not (self.courier.options.reject_omitted and self._is_last()):
                return True
        asked_before = position in self.absent_at
        if channel.clock() - self.absent_at.get(position, -inf) >= ABSENCE_GAP_S:
            self.absent_at[position] = channel.clock()
            self.absences[position] = self.absences.get(position, 0) + 1
        if self.absences[position] >= ABSENCES:
            await self._reject(position, replace(outcome, code=None, message=_OMISSION))
            return False
        if asked_before and not idle:
            await channel.sleep(ABSENCE_GAP_S)
        elif not idle:
            await self._back_off(1)
        return True

    def _omission(self, position: int) -> str:
        """Why nothing goes on while *position* stays omitted."""
        advice = ""
        if not self.courier.options.reject_omitted and len(self.ledger.pending) <= LOOK_UP_AT_MOST:
            advice = "; if the row is one of the last two of the list and stays omitted, --reject-omitted gives it up"
        return (
            f"no instance is created any more, and the service leaves {self._name(position)} out of its answers "
            f"without a reason. Its queue may be full{advice}"
        )

    def _leave_unknown(self, part: Sequence[int]) -> None:
        """Leave *part* pending, for the next run: whether the instances exist can't be found out now."""
        tally = self.courier.tally
        tally.unanswered = tally.unanswered or self._name(part[0])
        tally.unknown += len(part)

    def _name(self, position: int) -> str:
        batch = self.ledger.batch
        return f"{self.courier.where(batch.first_row + batch.offsets[position])} (id {batch.ids[position]})"

    async def _back_off(self, times: int) -> None:
        channel = self.courier.channel
        await channel.sleep(backoff_s(channel.policy, times, channel.draw()))

    def _is_last(self) -> bool:
        """Whether nothing else is left whose creation could tell: the last rows of a list must come to an end, too."""
        tally, pending = self.courier.tally, len(self.ledger.pending)
        return bool(tally.created) and pending <= LOOK_UP_AT_MOST and tally.pending <= pending


def _period(seconds: float) -> str:
    return f"{seconds / 86_400:,.1f} days" if seconds >= 172_800 else f"{seconds:,.0f} s"


_OMISSION = "the service leaves the id out of its answers and does not create it, without a reason"
