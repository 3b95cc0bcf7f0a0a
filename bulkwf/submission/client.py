"""The client of the Workflows API: makes attempts, and repeats them.

`ServiceClient.attempt` makes one request of any kind: slot → send → judge → feedback to the limiter → journal → comply.
`with_retries` repeats an attempt as long as its verdict requires it: `verdicts` and `retries` decide, tenacity loops.

A single unexpected answer does not end the run. Once the service has settled something in this session, a refusal of
the whole run pauses all sending. Then single probes over fresh connections show whether the service still refuses it.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from tenacity import AsyncRetrying, retry_if_result

from bulkwf.attempt import Fault, Judgement, Reply, Request, RequestKind, Transport, Verdict
from bulkwf.batching.batch_state import BatchState
from bulkwf.clock import Clock
from bulkwf.errors import TemporaryStop
from bulkwf.events import AttemptFinished
from bulkwf.limits.slots import Limiter
from bulkwf.options import RetryPolicy
from bulkwf.service.verdicts import HANDLING, Action
from bulkwf.submission.retries import PROBE_AFTER_S, Probe, Stop, Wait, plan
from bulkwf.text import seconds

__all__ = ["AttemptJournal", "OutageTracker", "ServiceClient", "open_client"]


class AttemptJournal(Protocol):
    """Where attempts are recorded."""

    async def record(self, attempt: AttemptFinished, state: BatchState | None) -> None:
        """Make an attempt durable, with all that it has settled and the pause that it orders.

        Args:
            attempt: The request and its judgement.
            state: State of the batch that the request was for; what the attempt settled is added to it. None: no batch.
        """
        ...

    async def pause(self, seconds: float) -> None:
        """Make durable a pause that no answer ordered. It lasts *seconds* from now on."""
        ...


@dataclass(slots=True)
class OutageTracker:
    """How long the service has been failing, and which probe comes next.

    Attributes:
        failing_since: When the present outage began, in monotonic seconds; None if there is none.
        proven: Whether the service has settled something in this session.
        probes: Number of pauses in a row, each caused by a refusal of the whole run and followed by a probe.
        probe_at: When the last of these pauses ends, in monotonic seconds.
    """

    failing_since: float | None = None
    proven: bool = False
    probes: int = 0
    probe_at: float = 0.0

    def success(self) -> None:
        """Note that something has been settled."""
        self.proven = True
        self.failing_since = None

    def accepted(self, *, settles: bool) -> None:
        """Note that the service has accepted a request of this run. *settles*: whether its answer settles something."""
        self.proven = self.proven or settles
        self.probes = 0

    def run_refused(self, now: float, sent_at: float, tries: int) -> float | None:
        """Note that the service has refused the run as a whole, and plan the next probe.

        Args:
            now: Monotonic seconds.
            sent_at: When the refused request was sent, in monotonic seconds.
            tries: How many times in a row this request was refused before. Others may have been accepted in between.

        Returns:
            Seconds to pause before the next probe; None if enough probes have been refused.
        """
        if sent_at < self.probe_at:  # it was on the wire when the pause began
            return max(0.0, self.probe_at - now)
        tries = max(tries, self.probes)
        if tries >= len(PROBE_AFTER_S):
            return None
        self.probes = tries + 1
        self.probe_at = now + PROBE_AFTER_S[tries]
        return PROBE_AFTER_S[tries]

    def failing_s(self, now: float) -> float:
        """Note a failure; returns how long the present outage has lasted, in seconds."""
        if self.failing_since is None:
            self.failing_since = now
        return now - self.failing_since


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceClient:
    """Makes requests to the service under its limits.

    Attributes:
        transport: Sends requests.
        limiter: Gives the slots.
        policy: Bounds of backoffs and outages.
        outage: How long the service has been failing, over all requests of the session.
        journal: Makes each attempt durable.
        sleep: Sleeps for a number of seconds; raises `Draining` as soon as the run drains.
        clock: Returns monotonic seconds.
        random: Returns a random number from 0 to 1.
    """

    transport: Transport
    limiter: Limiter
    policy: RetryPolicy
    outage: OutageTracker
    journal: AttemptJournal
    sleep: Callable[[float], Awaitable[None]]
    clock: Callable[[], float]
    random: Callable[[], float]

    async def attempt(
        self,
        kind: RequestKind,
        request: Callable[[], Request],
        judge: Callable[[Reply | Fault], Judgement],
        *,
        instances: int = 0,
        state: BatchState | None = None,
    ) -> Judgement:
        """Make one request, judge its answer, and make durable what it has settled.

        Args:
            kind: What the request asks for.
            request: Builds the request, once the slot is held.
            judge: Says what the answer means.
            instances: Number of instances in the request, which count against the limits.
            state: State of the batch that the request is for; None if it is for no batch.

        Returns:
            The judgement. Its verdict is `RENEWED` instead of `UNAUTHORIZED` if there is another credential.

        Raises:
            TemporaryStop: The service orders a longer pause than the policy allows.
            Draining: The run is draining.
        """
        asked_at = self.clock()
        async with self.limiter.slot(instances) as slot:
            waited_s = self.clock() - asked_at
            sending = request()
            reply = await self.transport.send(sending, slot)
            judgement = judge(reply)
            if judgement.verdict is Verdict.NOT_SENT:
                slot.unsent()
        pause_s = self._learn(judgement, reply)  # before the first await, so that nothing is sent after a 429
        finished = AttemptFinished(
            kind=kind,
            first_row=None if state is None else state.batch.first_row,
            instances=instances,
            bytes=len(sending.body or b""),
            waited_s=waited_s,
            waited_for=slot.waited_for,
            reply=reply,
            judgement=judgement,
            pause_s=pause_s,
        )
        await self.journal.record(finished, state)
        return await self._comply(finished)

    async def with_retries(self, attempt: Callable[[], Awaitable[Judgement]]) -> Judgement:
        """Make attempts until a verdict does not require another one; returns the last judgement.

        Args:
            attempt: Makes one attempt.

        Raises:
            ServiceRefused: The service refuses the run as a whole.
            TemporaryStop: The outage is longer than the policy allows.
            Draining: The run is draining.
        """
        judgement = await attempt()
        if not HANDLING[judgement.verdict].repeats:
            return judgement
        attempts = _Attempts(self, attempt, judgement)
        # Not tenacity's `with attempt:` form, which swallows a cancellation in the second attempt.
        retrying = AsyncRetrying(
            sleep=self.sleep,
            wait=lambda _: attempts.wait_s,
            retry=retry_if_result(lambda judgement: HANDLING[judgement.verdict].repeats),
        )
        found: Judgement = await retrying(attempts.next)
        return found

    async def pause(self, judgement: Judgement) -> None:
        """Pause all sending because the service creates nothing. No answer has ordered this pause.

        Args:
            judgement: The judgement that shows that the service creates nothing.

        Raises:
            TemporaryStop: The outage is longer than the policy allows.
        """
        seconds = self.limiter.pause()
        await self.journal.pause(seconds)
        self.refuse_outage(seconds, judgement)

    async def probe(self, refusal: Probe, judgement: Judgement, tries: int) -> None:
        """Pause all sending. After the pause, the limiter first admits a single request, over a fresh connection.

        Args:
            refusal: Holds the error that ends the run once enough probes are refused.
            judgement: The judgement of the refused attempt.
            tries: How many times in a row the same request was refused before.

        Raises:
            BulkwfError: Enough probes have been refused.
        """
        now = self.clock()
        seconds = self.outage.run_refused(now, now - judgement.elapsed_s, tries)
        if seconds is None:
            raise refusal.error
        self.transport.drop_connections()
        await self.journal.pause(self.limiter.hold(seconds))

    def refuse_outage(self, wait_s: float, judgement: Judgement) -> None:
        """Raise `TemporaryStop` if a wait of *wait_s* seconds makes the outage longer than the policy allows."""
        longest_s = self.policy.max_outage_s
        failing_s = self.outage.failing_s(self.clock())
        if failing_s + wait_s > longest_s:
            raise TemporaryStop(
                f"the run cannot continue now: {judgement.message}. The next attempt would be made "
                f"{seconds(failing_s + wait_s)} after the first failure, but the run waits at most "
                f"{seconds(longest_s)} (--max-outage)."
            )

    def _learn(self, judgement: Judgement, reply: Reply | Fault) -> float | None:
        """Update limiter, outage tracker and transport from an answer; returns the pause that it orders, in seconds."""
        handling = HANDLING[judgement.verdict]
        pause_s = self.limiter.feedback(judgement, reply)
        if handling.accepted:
            self.outage.accepted(settles=judgement.settles)
        elif pause_s is None and not handling.overload and self.outage.probes:
            # A probe was refused. Nothing else may be sent until `with_retries` has decided what follows.
            self.limiter.hold(PROBE_AFTER_S[min(self.outage.probes, len(PROBE_AFTER_S) - 1)])
        if handling.drop_connections:
            self.transport.drop_connections()
        return pause_s

    async def _comply(self, attempt: AttemptFinished) -> Judgement:
        """After an attempt is durable, check how long the outage lasts, and renew a credential that was refused."""
        judgement, reply = attempt.judgement, attempt.reply
        if judgement.settles:
            self.outage.success()
        if attempt.pause_s is not None:
            self.refuse_outage(attempt.pause_s, judgement)
        if judgement.verdict is not Verdict.UNAUTHORIZED or not isinstance(reply, Reply):
            return judgement
        if not await self.transport.refresh_credential(reply.credential):
            return judgement
        self.refuse_outage(0.0, judgement)  # else the run would never end if each new token is refused
        return replace(judgement, verdict=Verdict.RENEWED)


def open_client(
    transport: Transport,
    limiter: Limiter,
    journal: AttemptJournal,
    policy: RetryPolicy,
    clock: Clock,
    *,
    sleep: Callable[[float], Awaitable[None]] | None = None,
) -> ServiceClient:
    """Make the client of a new session.

    Args:
        transport: Sends requests.
        limiter: Gives the slots.
        journal: Makes each attempt durable.
        policy: Bounds of backoffs and outages.
        clock: Time and random numbers.
        sleep: See `ServiceClient`. None takes the clock's, for a session that is never drained.
    """
    return ServiceClient(
        transport=transport,
        limiter=limiter,
        policy=policy,
        outage=OutageTracker(),
        journal=journal,
        sleep=sleep or clock.sleep,
        clock=clock.now,
        random=clock.random,
    )


class _Attempts:
    """The attempts of `with_retries`, for tenacity: `next` makes one, `wait_s` is the wait after it in seconds."""

    def __init__(self, client: ServiceClient, attempt: Callable[[], Awaitable[Judgement]], first: Judgement) -> None:
        self._client = client
        self._attempt = attempt
        self._made: Judgement | None = first
        self._streak = 0
        self._verdict = Verdict.DONE
        self._probed = 0
        self.wait_s = 0.0

    async def next(self) -> Judgement:
        """The first call returns the judgement of the attempt already made; each later call makes another attempt."""
        judgement, self._made = self._made or await self._attempt(), None
        self.wait_s = 0.0
        if HANDLING[judgement.verdict].action is Action.BACK_OFF:
            await self._plan(judgement)
        return judgement

    async def _plan(self, judgement: Judgement) -> None:
        client = self._client
        self._streak = self._streak + 1 if judgement.verdict is self._verdict else 1
        self._verdict = judgement.verdict
        step = plan(client.policy, judgement, self._streak, client.random(), proven=client.outage.proven)
        if isinstance(step, Stop):
            raise step.error
        if isinstance(step, Wait):
            self.wait_s = step.seconds
            client.refuse_outage(step.seconds, judgement)
        else:
            await client.probe(step, judgement, self._probed)
            self._probed += 1
