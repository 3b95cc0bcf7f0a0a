"""The client of the Workflows API: one attempt in one straight function, and retries.

`ServiceClient.attempt` makes one request of any kind: slot → send → judge → feedback to the limiter → journal → comply.
`with_retries` repeats an attempt while its verdict asks for that: tenacity keeps the loop, `verdicts` and
`retries` decide.

One odd answer ends no run. Once the service has settled something in this session, a refusal of the whole run pauses
all sending, and single probes over fresh connections show whether it stays refused.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from tenacity import AsyncRetrying, retry_if_result

from bulkwf.attempt import Fault, Judgement, Reply, Request, RequestKind, Transport, Verdict
from bulkwf.batching.batch_state import BatchState
from bulkwf.errors import TemporaryStop
from bulkwf.events import AttemptFinished
from bulkwf.limits.slots import Limiter
from bulkwf.options import RetryPolicy
from bulkwf.service.verdicts import HANDLING, Action
from bulkwf.submission.retries import PROBE_AFTER_S, Probe, Stop, Wait, plan
from bulkwf.text import seconds

__all__ = ["AttemptJournal", "OutageTracker", "ServiceClient"]


class AttemptJournal(Protocol):
    """Where attempts are recorded."""

    async def record(self, attempt: AttemptFinished, state: BatchState | None) -> None:
        """Make an attempt durable, with all that it has settled and the pause that it orders.

        Args:
            attempt: What was sent, and what came of it.
            state: The batch that it was for; it takes in what the attempt has settled.
        """
        ...

    async def pause(self, seconds: float) -> None:
        """Make a pause durable that no answer has ordered."""
        ...


@dataclass(slots=True)
class OutageTracker:
    """How long the service has been failing, and which probe comes next.

    Attributes:
        failing_since: When the failures began that no success has followed; None if there are none.
        proven: The service has settled something in this session.
        probes: Pauses in a row for refusals of the whole run; a probe follows each.
        probe_at: When the last of them ends.
    """

    failing_since: float | None = None
    proven: bool = False
    probes: int = 0
    probe_at: float = 0.0

    def success(self) -> None:
        """Something has been settled."""
        self.proven = True
        self.failing_since = None

    def accepted(self, *, settles: bool) -> None:
        """The service accepts requests of this run; *settles*: one of them has settled something."""
        self.proven = self.proven or settles
        self.probes = 0

    def run_refused(self, now: float, sent_at: float, tries: int) -> float | None:
        """The service has refused the run as a whole.

        Args:
            now: Monotonic seconds.
            sent_at: When the refused request was sent.
            tries: How many times in a row this same request has been refused before: others may go through.

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
        """Note a failure; returns for how long the service has been failing, in seconds."""
        if self.failing_since is None:
            self.failing_since = now
        return now - self.failing_since


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceClient:
    """Makes requests to the service under its limits.

    Attributes:
        transport: Sends them.
        limiter: Gives the slots.
        policy: Bounds of backoffs and outages.
        outage: What all requests of the run know together of the service.
        journal: Makes each attempt durable.
        sleep: Sleep for a number of seconds; raises `Draining` as soon as the run drains.
        clock: Monotonic seconds.
        random: A random number from 0 to 1.
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
            kind: What it asks for.
            request: Builds it, once the slot is held.
            judge: What the answer means.
            instances: How many instances it carries: what it costs of the limits.
            state: The batch that it is for.

        Returns:
            The judgement; `RENEWED` in place of `UNAUTHORIZED` where there is another credential.

        Raises:
            TemporaryStop: The service orders a longer pause than the policy allows.
            Draining: The run is to stop.
        """
        asked_at = self.clock()
        async with self.limiter.slot(instances) as slot:
            waited_s = self.clock() - asked_at
            sending = request()
            reply = await self.transport.send(sending, slot)
            judgement = judge(reply)
            if judgement.verdict is Verdict.NOT_SENT:
                slot.unsent()
        pause_s = self._learn(judgement, reply)  # before the first await: nothing may be sent after a 429
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
        """Make attempts until a verdict asks for something else than another attempt; returns its judgement.

        Raises:
            ServiceRefused: The service refuses the run as a whole.
            TemporaryStop: The service has been failing for too long.
            Draining: The run is to stop.
        """
        judgement = await attempt()
        if not HANDLING[judgement.verdict].repeats:
            return judgement
        attempts = _Attempts(self, attempt, judgement)
        # The call form: tenacity's `with attempt:` form swallows a cancellation in the second attempt.
        retrying = AsyncRetrying(
            sleep=self.sleep,
            wait=lambda _: attempts.wait_s,
            retry=retry_if_result(lambda judgement: HANDLING[judgement.verdict].repeats),
        )
        found: Judgement = await retrying(attempts.next)
        return found

    async def pause(self, judgement: Judgement) -> None:
        """Pause all sending though no answer orders it: the service creates nothing.

        Args:
            judgement: What shows that.
        """
        seconds = self.limiter.pause()
        await self.journal.pause(seconds)
        self.refuse_outage(seconds, judgement)

    async def probe(self, refusal: Probe, judgement: Judgement, tries: int) -> None:
        """Pause all sending, then let one request try again over a fresh connection.

        Args:
            refusal: What ends the run if the probes are refused, too.
            judgement: Of the refused attempt.
            tries: How many times in a row the same request has been refused before.
        """
        now = self.clock()
        seconds = self.outage.run_refused(now, now - judgement.elapsed_s, tries)
        if seconds is None:
            raise refusal.error
        self.transport.drop_connections()
        await self.journal.pause(self.limiter.hold(seconds))

    def refuse_outage(self, wait_s: float, judgement: Judgement) -> None:
        """End the run rather than wait longer than the policy allows."""
        longest_s = self.policy.max_outage_s
        failing_s = self.outage.failing_s(self.clock())
        if failing_s + wait_s > longest_s:
            raise TemporaryStop(
                f"the run cannot continue now: {judgement.message}. The next attempt would be made "
                f"{seconds(failing_s + wait_s)} after the first failure, but the longest outage is "
                f"{seconds(longest_s)} (--max-outage)."
            )

    def _learn(self, judgement: Judgement, reply: Reply | Fault) -> float | None:
        """Let limiter, outage tracker and transport learn from an answer; returns the pause that it orders."""
        handling = HANDLING[judgement.verdict]
        pause_s = self.limiter.feedback(judgement, reply)
        if handling.accepted:
            self.outage.accepted(settles=judgement.settles)
        elif pause_s is None and not handling.overload and self.outage.probes:
            # The probe was refused. `with_retries` decides what follows; until then nothing else may be sent.
            self.limiter.hold(PROBE_AFTER_S[min(self.outage.probes, len(PROBE_AFTER_S) - 1)])
        if handling.drop_connections:
            self.transport.drop_connections()
        return pause_s

    async def _comply(self, attempt: AttemptFinished) -> Judgement:
        """Do what the answer asks for, once the attempt is durable."""
        judgement, reply = attempt.judgement, attempt.reply
        if judgement.settles:
            self.outage.success()
        if attempt.pause_s is not None:
            self.refuse_outage(attempt.pause_s, judgement)
        if judgement.verdict is not Verdict.UNAUTHORIZED or not isinstance(reply, Reply):
            return judgement
        if not await self.transport.refresh_credential(reply.credential):
            return judgement
        self.refuse_outage(0.0, judgement)  # a source of ever new tokens, all refused, must come to an end
        return replace(judgement, verdict=Verdict.RENEWED)


class _Attempts:
    """The attempts of `with_retries`, as tenacity sees them: `next` makes one, `wait_s` is the wait that follows it."""

    def __init__(self, client: ServiceClient, attempt: Callable[[], Awaitable[Judgement]], first: Judgement) -> None:
        self._client = client
        self._attempt = attempt
        self._made: Judgement | None = first
        self._streak = 0
        self._verdict = Verdict.DONE
        self._probed = 0
        self.wait_s = 0.0

    async def next(self) -> Judgement:
        """The first attempt's judgement, which is there already; then one request a call."""
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
