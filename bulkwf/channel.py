"""The way to the service with patience: what all requests have in common, whatever they ask for.

`persist` makes one attempt after another until an answer calls for another act than waiting: tenacity keeps the loop,
`retry` the table. `learn` does with each answer what it asks for: it teaches the limiter, keeps pauses that the service
orders, renews a credential that was refused, and ends the run rather than wait longer than the policy allows.

One odd answer ends no run. Once the service has settled something in this session, a refusal of the whole run pauses
all sending, and single probes over fresh connections find out whether it stays refused.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from tenacity import AsyncRetrying, retry_if_result

from bulkwf.errors import TemporaryStop
from bulkwf.limiter import Limiter
from bulkwf.model import Fault, Outcome, Reply, Transport, Verdict
from bulkwf.options import RetryPolicy
from bulkwf.retry import PATIENCE, PROBE_AFTER_S, Probe, Stop, Wait, plan
from bulkwf.windows import pause_s

__all__ = ["Channel", "Health"]

_STRAINED = frozenset({Verdict.NOT_SENT, Verdict.IN_DOUBT, Verdict.HANDSHAKE, Verdict.ORIGIN_TLS})
_ACCEPTED = frozenset({Verdict.DONE, Verdict.OMITTED, Verdict.REFUSED, Verdict.TOO_LARGE, Verdict.ABSENT})
"""The service takes requests with this credential at this address, whatever it says of the instances."""
_AT_ONCE = frozenset({Verdict.THROTTLED, Verdict.RENEWED})
"""Sent again without a wait of their own: the limiter holds the pause, or there is a new credential."""
_PATIENT = _AT_ONCE.union(PATIENCE)


@dataclass(slots=True)
class Health:
    """How the service fares.

    Attributes:
        ill_since: When the failures began that nothing has succeeded since; None if all is well.
        refusals: Pauses in a row.
        paused_until: When the last pause ends.
        proven: The service has done something that it was asked for in this session.
        probes: Pauses in a row for refusals of the whole run; a probe follows each.
        probe_at: When the last of them ends.
    """

    ill_since: float | None = None
    refusals: int = 0
    paused_until: float = 0.0
    proven: bool = False
    probes: int = 0
    probe_at: float = 0.0

    def well(self) -> None:
        """The service has done something that it was asked for."""
        self.proven = True
        self.ill_since = None
        self.refusals = 0

    def accepted(self, *, settles: bool) -> None:
        """The service takes requests of this run; *settles*: it has done what a request asked for."""
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
class Channel:
    """One target's transport, under its limits and with patience.

    Attributes:
        transport: The way there.
        limiter: Hands out the leave to send.
        policy: How long to wait for a service that is ill.
        health: How the service fares, as all requests of the run know it together.
        paused: Note that the service has ordered so many seconds of silence.
        sleep: Sleep so many seconds; raises `Draining` as soon as the run drains.
        clock: Monotonic seconds.
        draw: A random number from 0 to 1.
    """

    transport: Transport
    limiter: Limiter
    policy: RetryPolicy
    health: Health
    paused: Callable[[float], Awaitable[None]]
    sleep: Callable[[float], Awaitable[None]]
    clock: Callable[[], float]
    draw: Callable[[], float]

    async def persist(self, attempt: Callable[[], Awaitable[Outcome]]) -> Outcome:
        """Make attempts until one calls for another act than patience; its outcome.

        Raises:
            ServiceRefused: The service refuses the run as a whole.
            TemporaryStop: The service has been ill for too long.
            Draining: The run is to stop.
        """
        outcome = await attempt()
        if outcome.verdict not in _PATIENT:
            return outcome
        attempts = _Attempts(self, attempt, outcome)
        # The call form: tenacity's `with attempt:` form swallows a cancellation in the second attempt.
        retrying = AsyncRetrying(
            sleep=self.sleep,
            wait=lambda _: attempts.wait_s,
            retry=retry_if_result(lambda outcome: outcome.verdict in _PATIENT),
        )
        found: Outcome = await retrying(attempts.next)
        return found

    async def ask(
        self, send: Callable[[Callable[[], None]], Awaitable[Reply | Fault]], judge: Callable[[Reply | Fault], Outcome]
    ) -> tuple[Outcome, Reply | Fault]:
        """Send one request that creates nothing, when the limits give leave; what it came to, and its answer.

        Args:
            send: Sends it; given what to call once it is written.
            judge: What its answer means.
        """
        async with self.limiter.slot(0) as slot:
            reply = await send(slot.written)
            outcome = judge(reply)
            if outcome.verdict is Verdict.NOT_SENT:
                slot.unsent()
        return outcome, reply

    async def learn(
        self, outcome: Outcome, reply: Reply | Fault, keep: Callable[[Outcome], Awaitable[None]]
    ) -> Outcome:
        """Do what an attempt's answer asks for.

        Args:
            outcome: What the attempt came to.
            reply: Its answer.
            keep: Makes the outcome durable; done before anything is waited for.

        Returns:
            The outcome; `RENEWED` in place of `UNAUTHORIZED` where there is another credential.
        """
        if isinstance(reply, Reply):
            self.limiter.observe(reply.headers)
        if outcome.verdict in _STRAINED:
            self.limiter.overloaded()
        elif outcome.verdict in _ACCEPTED:
            self.limiter.succeeded()
            self.health.accepted(settles=bool(outcome.created or outcome.others))
        elif outcome.verdict is not Verdict.THROTTLED and self.health.probes:
            # The probe was refused. `persist` decides what follows; until then nothing else may be sent.
            self.limiter.hold(PROBE_AFTER_S[min(self.health.probes, len(PROBE_AFTER_S) - 1)])
        if outcome.verdict is Verdict.CONTRADICTION:
            self.transport.distrust()
        # Before anything is waited for: nobody may slip out behind the answer.
        held_s = self._hold(outcome) if outcome.verdict is Verdict.THROTTLED else None
        await keep(outcome)
        if held_s is not None:
            await self._keep_pause(held_s, outcome)
        elif outcome.verdict is Verdict.UNAUTHORIZED and isinstance(reply, Reply):
            return await self._renew(outcome, reply.credential)
        return outcome

    async def pause(self, outcome: Outcome) -> None:
        """Let everything wait: the service creates nothing."""
        seconds = self.health.refused(self.clock(), None)
        self.limiter.hold(seconds)
        await self._keep_pause(seconds, outcome)

    async def probe(self, refusal: Probe, outcome: Outcome, tries: int) -> None:
        """Pause all sending, then let one request try again over a fresh connection.

        Args:
            refusal: What ends the run if the probes are refused, too.
            outcome: Of the refused attempt.
            tries: How many times in a row the same request has been refused before.
        """
        now = self.clock()
        seconds = self.health.run_refused(now, now - outcome.elapsed_s, tries)
        if seconds is None:
            raise refusal.error
        self.transport.distrust()
        self.limiter.hold(seconds)
        await self.paused(seconds)

    def refuse_outage(self, wait_s: float, outcome: Outcome) -> None:
        """End the run rather than wait longer than the policy allows."""
        longest_s = self.policy.max_outage_s
        ill_s = self.health.ill(self.clock())
        if ill_s + wait_s > longest_s:
            raise TemporaryStop(
                f"nothing could be settled for {ill_s:,.0f} s, and the next attempt would wait {wait_s:,.0f} s more, "
                f"which is over the longest outage of {longest_s:,.0f} s (--max-outage): {outcome.message}."
            )

    def _hold(self, outcome: Outcome) -> float:
        """Let nothing be sent for as long as the service has ordered; returns how long."""
        seconds = self.health.refused(self.clock(), outcome.retry_after_s)
        self.limiter.paused(seconds)
        return seconds

    async def _keep_pause(self, seconds: float, outcome: Outcome) -> None:
        """Make a pause durable, with the attempt that led to it."""
        await self.paused(seconds)
        self.refuse_outage(seconds, outcome)

    async def _renew(self, outcome: Outcome, credential: int) -> Outcome:
        """Go on with another credential than the refused one, if there is one."""
        if not await self.transport.renew(credential):
            return outcome
        self.refuse_outage(0.0, outcome)  # a source of ever new tokens, all refused, is no way to go on for ever
        return replace(outcome, verdict=Verdict.RENEWED)


class _Attempts:
    """The attempts at one thing, as tenacity sees them: `next` makes one, `wait_s` is the wait that follows it."""

    def __init__(self, channel: Channel, attempt: Callable[[], Awaitable[Outcome]], first: Outcome) -> None:
        self._channel = channel
        self._attempt = attempt
        self._made: Outcome | None = first
        self._streak = 0
        self._verdict = Verdict.DONE
        self._probed = 0
        self.wait_s = 0.0

    async def next(self) -> Outcome:
        """The first attempt's outcome, which is there already; then one request a call."""
        outcome, self._made = self._made or await self._attempt(), None
        self.wait_s = 0.0
        if outcome.verdict in PATIENCE:
            await self._plan(outcome)
        return outcome

    async def _plan(self, outcome: Outcome) -> None:
        channel = self._channel
        self._streak = self._streak + 1 if outcome.verdict is self._verdict else 1
        self._verdict = outcome.verdict
        step = plan(channel.policy, outcome, self._streak, channel.draw(), proven=channel.health.proven)
        if isinstance(step, Stop):
            raise step.error
        if isinstance(step, Wait):
            self.wait_s = step.seconds
            channel.refuse_outage(step.seconds, outcome)
        else:
            await channel.probe(step, outcome, self._probed)
            self._probed += 1
