"""One batch, until every instance in it is settled.

Send, judge, and do with what is left what the verdict asks for: wait and send it again (tenacity keeps the loop,
`retry` the table), send it in halves until the bad rows stand alone, or ask whether ids that were left out exist.

Rules:

1. What has been settled is durable before anything else is done for the batch.
2. The same row is never on the wire twice at one time: a batch's parts go one after another.
3. Nothing is sent again once the service may have forgotten the ids.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from tenacity import AsyncRetrying, retry_if_result

from bulkwf.errors import CheckpointError, ServiceRefused, TemporaryStop
from bulkwf.ledger import Ledger
from bulkwf.limiter import Limiter
from bulkwf.model import Fault, Outcome, Reply, Result, Transport, Verdict
from bulkwf.options import Options
from bulkwf.outcome import existence, judge, judge_lookup, rejection
from bulkwf.payload import compose
from bulkwf.retry import PATIENCE, Stop, backoff_s, plan, reject_limit
from bulkwf.windows import pause_s

__all__ = ["Courier", "Health", "Hooks"]

LOOK_UP_AT_MOST = 2
"""Up to so many omitted ids are asked for one by one; more are sent again together, then one speaks for all."""
ABSENCES = 3
"""So often must a row be asked for and be absent, while others are created, to be called rejected."""
PROBE_FROM = 10
"""A first batch of so many rows that is refused is probed before it is taken apart."""

_DOUBTFUL = frozenset({Verdict.IN_DOUBT, Verdict.CONTRADICTION})
_STRAINED = frozenset({Verdict.NOT_SENT, Verdict.IN_DOUBT, Verdict.ORIGIN_TLS})
_AT_ONCE = frozenset({Verdict.THROTTLED, Verdict.UNAUTHORIZED})
"""Sent again without a wait of their own: the limiter holds the pause, or there is a new credential."""
_PATIENT = _AT_ONCE.union(PATIENCE)


@dataclass(slots=True)
class Health:
    """What the deliveries of one run know together of the service.

    Attributes:
        created: Instances created so far, by earlier sessions too.
        rejected: Rows rejected so far.
        pending: Instances begun and not settled.
        rows: Rows begun so far.
        ill_since: When the failures began that nothing has been settled since; None if all is well.
        refusals: Pauses in a row.
        paused_until: When the last pause ends.
        max_bytes: The service has called a request of twice this size too large; None if it has not.
        probing: Held while a refused first batch is probed.
    """

    created: int = 0
    rejected: int = 0
    pending: int = 0
    rows: int = 0
    ill_since: float | None = None
    refusals: int = 0
    paused_until: float = 0.0
    max_bytes: int | None = None
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def well(self, outcome: Outcome) -> None:
        """The service has settled something."""
        ends = [result.outcome for _, result in outcome.others]
        self.created += len(outcome.created) + ends.count("created")
        self.rejected += ends.count("rejected")
        self.pending -= len(outcome.created) + len(ends)
        self.ill_since = None
        self.refusals = 0

    def ill(self, now: float) -> float:
        """The service has failed; for how long it has been doing so."""
        if self.ill_since is None:
            self.ill_since = now
        return now - self.ill_since

    def refused(self, now: float, ordered_s: float | None) -> float:
        """The service has refused a request for its rate; how long to pause. Requests on the wire count once."""
        if now >= self.paused_until:
            self.refusals += 1
        elif ordered_s is None:
            return self.paused_until - now
        seconds = pause_s(self.refusals, ordered_s)
        self.paused_until = max(self.paused_until, now + seconds)
        return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What a delivery asks of the engine.

    Attributes:
        settled: Make what an outcome has added to a ledger durable, then count it.
        attempted: Note an attempt: the ledger, the number of instances (0 for a look-up), the reply, the outcome.
        noted: Make the attempts noted so far durable.
        paused: Note that the service has ordered so many seconds of silence.
        sleep: Sleep so many seconds; raises `Draining` as soon as the run drains.
    """

    settled: Callable[[Ledger, Outcome], Awaitable[None]]
    attempted: Callable[[Ledger, int, Reply | Fault, Outcome], None]
    noted: Callable[[], Awaitable[None]]
    paused: Callable[[float], Awaitable[None]]
    sleep: Callable[[float], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Courier:
    """Delivers batches to one target.

    Attributes:
        transport: The way there.
        limiter: Hands out the leave to send.
        options: Patience, confirmation, limits of rejection.
        hooks: What the engine does for a delivery.
        health: Shared by all deliveries of the run.
        clock: Monotonic seconds.
        wall: Unix time in seconds.
        draw: A random number from 0 to 1.
    """

    transport: Transport
    limiter: Limiter
    options: Options
    hooks: Hooks
    health: Health
    clock: Callable[[], float]
    wall: Callable[[], float]
    draw: Callable[[], float]

    async def deliver(self, ledger: Ledger, begun_at: float) -> None:
        """Send what is pending in *ledger* until nothing is.

        Args:
            ledger: The batch's account.
            begun_at: When its ids became durable, in Unix time: no instance of it is older.

        Raises:
            ServiceRefused: The service refuses the run as a whole.
            TemporaryStop: The service has been ill for too long.
            CheckpointError: Rows may have been sent so long ago that their ids may be forgotten.
            Draining: The run is to stop.
        """
        delivery = _Delivery(self, ledger, begun_at, self.health.created)
        pending, most = sorted(ledger.pending), self.options.batch_instances
        for start in range(0, len(pending), most):  # begun at a higher rate, a batch may be too large for this one
            await delivery.settle(pending[start : start + most])


@dataclass(slots=True)
class _Delivery:
    """One batch on its way."""

    courier: Courier
    ledger: Ledger
    begun_at: float
    created_before: int
    """Instances that the run had created when the delivery began, or when ids were last found omitted."""
    absences: dict[int, int] = field(default_factory=dict)
    """How often each instance has been asked for and was absent."""

    async def settle(self, part: Sequence[int]) -> None:
        """Send *part* until all of it is settled."""
        omitted: frozenset[int] = frozenset()
        while part:
            outcome = await self._persist(part)
            part = outcome.unsettled
            if outcome.verdict is Verdict.OMITTED:
                part = await self._confirm(part, again=omitted.issuperset(part))
                omitted = frozenset(part)
            elif outcome.verdict in (Verdict.REFUSED, Verdict.TOO_LARGE):
                await self._take_apart(part, outcome)
                part = ()

    # --- attempts -------------------------------------------------------------------------------------------------

    async def _persist(self, part: Sequence[int]) -> Outcome:
        """Send *part* until it is settled, or another act than patience is called for."""
        outcome = await self._attempt(part)
        if outcome.verdict in _PATIENT:
            outcome = await self._patiently(_Attempts(self, self._attempt, outcome))
        return outcome

    async def _patiently(self, attempts: "_Attempts") -> Outcome:
        # The call form: tenacity's `with attempt:` form swallows a cancellation in the second attempt.
        retrying = AsyncRetrying(
            sleep=self.courier.hooks.sleep,
            wait=lambda _: attempts.wait_s,
            retry=retry_if_result(lambda outcome: outcome.verdict in _PATIENT),
        )
        found: Outcome = await retrying(attempts.next)
        return found

    async def _attempt(self, part: Sequence[int]) -> Outcome:
        """One request, and all that it settles made durable."""
        courier, ledger = self.courier, self.ledger
        body = compose(ledger.batch, part)  # before the slot: time between the two is rate lost
        async with courier.limiter.slot(len(part)) as slot:
            self._refuse_forgotten(part)  # not before: a pause may outlast the service's memory
            reply = await courier.transport.post(body, slot.written)
            outcome = judge(ledger.batch, part, reply)
            if outcome.verdict is Verdict.NOT_SENT:
                slot.unsent()
        if outcome.verdict is Verdict.TOO_LARGE:
            courier.health.max_bytes = min(courier.health.max_bytes or len(body), len(body) // 2)
        ledger.attempts += 1
        if outcome.verdict in _DOUBTFUL:
            ledger.in_doubt.update(outcome.unsettled)
        return await self._take_in(outcome, reply, len(part))

    async def _look_up(self, position: int) -> Outcome:
        """Ask for one instance until the service says whether it exists."""
        outcome = await self._ask((position,))
        if outcome.verdict in _PATIENT:
            outcome = await self._patiently(_Attempts(self, self._ask, outcome))
        return outcome

    async def _ask(self, part: Sequence[int]) -> Outcome:
        courier, ledger, position = self.courier, self.ledger, part[0]
        async with courier.limiter.slot(0) as slot:
            reply = await courier.transport.get(ledger.batch.ids[position], slot.written)
            outcome = judge_lookup(ledger.batch, position, reply)
            if outcome.verdict is Verdict.NOT_SENT:
                slot.unsent()
        return await self._take_in(outcome, reply, 0)

    async def _take_in(self, outcome: Outcome, reply: Reply | Fault, instances: int) -> Outcome:
        """Tell everyone concerned what an attempt has come to."""
        courier, ledger = self.courier, self.ledger
        if isinstance(reply, Reply):
            courier.limiter.observe(reply.headers)
        courier.hooks.attempted(ledger, instances, reply, outcome)
        if outcome.verdict in _STRAINED:
            courier.limiter.overloaded()
        elif outcome.verdict is not Verdict.THROTTLED:
            courier.limiter.succeeded()
        if outcome.verdict is Verdict.CONTRADICTION:
            courier.transport.distrust()
        # Before anything is waited for: nobody may slip out behind the answer.
        held_s = self._hold(outcome) if outcome.verdict is Verdict.THROTTLED else None
        if outcome.created or outcome.others:
            await self._settled(outcome)
        elif held_s is None:
            await courier.hooks.noted()  # or a process that dies again and again would forget what it has sent
        if held_s is not None:
            await self._keep_pause(held_s, outcome)
        elif outcome.verdict is Verdict.UNAUTHORIZED:
            await self._renew(outcome, reply)
        return outcome

    async def _settled(self, outcome: Outcome) -> None:
        self.ledger.add(outcome)
        await self.courier.hooks.settled(self.ledger, outcome)
        self.courier.health.well(outcome)
        rejected = [result for _, result in outcome.others if result.outcome == "rejected"]
        if rejected:
            self._refuse_rejects(rejected[-1])

    def _refuse_rejects(self, last: Result) -> None:
        """End the run once more rows are rejected than it allows."""
        health = self.courier.health
        limit = reject_limit(self.courier.options.max_rejects, health.rows)
        if health.rejected > limit:
            raise ServiceRefused(
                f"{health.rejected:,} rows are rejected, more than the {limit:,} allowed; the last one for: "
                f"{last.message} (code {last.code}). Look at `bulkwf results --outcome rejected`; "
                "--max-rejects allows more."
            )

    # --- what a verdict asks for ----------------------------------------------------------------------------------

    async def _pause(self, outcome: Outcome) -> None:
        """The service creates nothing: everything waits, as after a refusal for the rate."""
        await self._keep_pause(self._hold(outcome), outcome)

    def _hold(self, outcome: Outcome) -> float:
        """Let nothing be sent for as long as the service has ordered; returns how long."""
        seconds = self.courier.health.refused(self.courier.clock(), outcome.retry_after_s)
        self.courier.limiter.paused(seconds)
        return seconds

    async def _keep_pause(self, seconds: float, outcome: Outcome) -> None:
        """Make a pause durable, with the attempt that led to it."""
        await self.courier.hooks.paused(seconds)
        self.refuse_outage(seconds, outcome)

    async def _renew(self, outcome: Outcome, reply: Reply | Fault) -> None:
        """Go on with another credential than the refused one, if there is one."""
        if not isinstance(reply, Reply) or not await self.courier.transport.renew(reply.credential):
            raise ServiceRefused(
                f"the service refuses the credential: {outcome.message} (code {outcome.code}). The token needs the "
                "permission 'Workers Scripts Write' on this account; no row was rejected for this."
            )
        self.refuse_outage(0.0, outcome)  # a source of ever new tokens, all refused, is no way to go on for ever

    def refuse_outage(self, wait_s: float, outcome: Outcome) -> None:
        """End the run rather than wait longer than the policy allows."""
        longest_s = self.courier.options.retry.max_outage_s
        ill_s = self.courier.health.ill(self.courier.clock())
        if ill_s + wait_s > longest_s:
            raise TemporaryStop(
                f"nothing could be settled for {ill_s:,.0f} s, and the next attempt would wait {wait_s:,.0f} s more, "
                f"which is over the longest outage of {longest_s:,.0f} s (--max-outage): {outcome.message}."
            )

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
            await self._reject(part[0], outcome)
            return
        if outcome.verdict is Verdict.REFUSED:
            part = await self._probe(part, outcome)
        middle = (len(part) + 1) // 2
        await self.settle(part[:middle])
        await self.settle(part[middle:])

    async def _reject(self, position: int, outcome: Outcome) -> None:
        await self._settled(rejection(self.ledger.batch, position, outcome.code, outcome.message))

    async def _probe(self, part: Sequence[int], outcome: Outcome) -> Sequence[int]:
        """Send a few single rows of a refused first batch: if all are refused alike, it is not the rows' fault."""
        health = self.courier.health
        async with health.probing:  # one batch at a time, or each that is open would sacrifice its own rows
            if len(part) < PROBE_FROM or health.created or self.courier.options.max_rejects is not None:
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
        idle = self.courier.health.created <= self.created_before
        self.created_before = self.courier.health.created
        if len(omitted) <= LOOK_UP_AT_MOST:
            return [position for position in omitted if await self._is_absent(position, idle=idle)]
        if not again:
            await self.courier.hooks.sleep(backoff_s(self.courier.options.retry, 2, self.courier.draw()))
            return omitted
        asked = omitted[int(self.courier.draw() * len(omitted)) % len(omitted)]
        if not await self._is_absent(asked, idle=idle) and self.ledger.others[asked].outcome == "existed":
            await self._settled(existence(self.ledger.batch, [one for one in omitted if one != asked]))
        return [position for position in omitted if position in self.ledger.pending]

    async def _is_absent(self, position: int, *, idle: bool) -> bool:
        """Ask for one omitted instance; True if it has to be sent again. *idle*: nothing was created meanwhile."""
        outcome = await self._look_up(position)
        if outcome.verdict is not Verdict.ABSENT:
            return False
        if idle:  # a full queue, say: it is not this row's fault, unless it is one of the last of all
            await self._pause(replace(outcome, retry_after_s=None, message=_OMISSION))
            if not self._is_last():
                return True
        times = self.absences[position] = self.absences.get(position, 0) + 1
        if times >= ABSENCES:
            await self._reject(position, replace(outcome, code=None, message=_OMISSION))
            return False
        if not idle:
            await self.courier.hooks.sleep(backoff_s(self.courier.options.retry, times, self.courier.draw()))
        return True

    def _is_last(self) -> bool:
        """Whether nothing else is left whose creation could tell: the last rows of a list must come to an end, too."""
        health, pending = self.courier.health, len(self.ledger.pending)
        return bool(health.created) and pending <= LOOK_UP_AT_MOST and health.pending <= pending


def _period(seconds: float) -> str:
    return f"{seconds / 86_400:,.1f} days" if seconds >= 172_800 else f"{seconds:,.0f} s"


_OMISSION = "the service leaves the id out of its answers and does not create it, without a reason"


class _Attempts:
    """The attempts at one part, as tenacity sees them: `next` makes one, `wait_s` is the wait that follows it."""

    def __init__(
        self, delivery: _Delivery, send: Callable[[Sequence[int]], Awaitable[Outcome]], first: Outcome
    ) -> None:
        self._delivery = delivery
        self._send = send
        self._made: Outcome | None = first
        self._part = first.unsettled
        self._streak = 0
        self._verdict = Verdict.DONE
        self.wait_s = 0.0

    async def next(self) -> Outcome:
        """The first attempt's outcome, which is there already; then one request a call."""
        outcome, self._made = self._made or await self._send(self._part), None
        self._part = outcome.unsettled
        self.wait_s = 0.0
        if outcome.verdict in PATIENCE:
            self._plan(outcome)
        return outcome

    def _plan(self, outcome: Outcome) -> None:
        self._streak = self._streak + 1 if outcome.verdict is self._verdict else 1
        self._verdict = outcome.verdict
        courier = self._delivery.courier
        step = plan(courier.options.retry, outcome, self._streak, courier.draw())
        if isinstance(step, Stop):
            raise step.error
        self.wait_s = step.seconds
        self._delivery.refuse_outage(step.seconds, outcome)
