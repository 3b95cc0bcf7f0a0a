"""Places and waiting: who may send next, and when.

Rules:

1. Whoever posts next waits in one queue, in the order of asking: first attempts and retries alike. Look-ups, which take
   nothing of the instances' window, have a queue of their own: behind a batch that waits for it they would be late, and
   go out together with it, which blurs the moment of its arrival.
2. The head of a queue waits for a place among the requests on the wire, then for every window and for any pause.
   After a pause, and after the end of a window of which the service has said that little is left, one request goes
   alone, as a probe: how much may follow, its answer tells.
3. Who holds a slot waits for nothing but its own answer. A backoff holds no slot.
4. What was written counts, from the moment its body was written. What was never sent gives its places back. The probe
   after a pause counts from its answer: what has been silent is slow to wake, and nothing waits for its place before.
5. The time that always passes between leave and writing is taken off the margin: it would be rate lost. Never more than
   the margin, so that no body is written inside a window even if it is written in no time.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Protocol, Self

from bulkwf.errors import Draining
from bulkwf.model import Fault, Judgement, Reply, RunState, Slot, Verdict
from bulkwf.options import INSTANCE_PERIOD_S, REQUEST_PERIOD_S, RateLimits
from bulkwf.verdicts import HANDLING
from bulkwf.windows import LOWEST_SHARE, Pace, Said, Window, pause_s

__all__ = ["HeldSlot", "Limiter", "WindowLimiter"]

HASTE = 2.0
"""A second's instances are spread over half of it at least. What leaves in one burst arrives as the service finds time,
and the late end of it would meet the first of the next second."""
LOOPBACK_MARGIN_S = 0.007
NETWORK_MARGIN_S = 0.020
BLIND_MARGIN_S = 0.100
"""Where the kernel does not tell what is still in the socket: 128 KB, what macOS gives a socket at first, leave in this
time at 10 Mbit/s."""
WIDEST_MARGIN_S = 0.250
EARLY_S = 0.005
LEADS = 8
"""Of so many requests the quickest from leave to writing counts, and none before: the first ones open connections."""
RECOVERY_S = 10.0
"""A refused rate rises by a tenth of the full rate each time so many seconds pass without a refusal."""
PROBE_WITHIN_S = 300.0
"""A process that starts so soon after the end of a stored pause sends one probe first."""


class HeldSlot(Slot, Protocol):
    """Leave to send one request, held while it is on the wire."""

    waited_for: RunState | None
    """What it waited for last; None if it did not wait."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...

    def unsent(self) -> None:
        """No byte of the request has left."""
        ...


class Limiter(Protocol):
    """Hands out slots to one run, for one target."""

    def slot(self, cost: int) -> HeldSlot:
        """A slot for a request that carries *cost* instances; 0 for a look-up. Entered when it is free."""
        ...

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        ...

    @property
    def on_wire(self) -> int:
        """How many requests hold a slot."""
        ...

    @property
    def waits_for(self) -> RunState | None:
        """What the next request waits for; None if it waits for nothing."""
        ...

    @property
    def bound_by(self) -> str:
        """The same in words; empty if it waits for nothing."""
        ...

    @property
    def paused_until(self) -> float:
        """When the pause ends, in monotonic seconds; in the past if there is none."""
        ...

    @property
    def rate_factor(self) -> float:
        """By what the most reduced rate is multiplied at present: 1.0 if none is reduced."""
        ...

    def vacancies(self, cost: int, within_s: float = 0.0) -> int:
        """How many requests of *cost* instances could go in the next *within_s* seconds, those that wait included."""
        ...

    def feedback(self, judgement: Judgement, reply: Reply | Fault) -> float | None:
        """Take in what an attempt's answer says of the limits. To be called before the first await after it.

        Returns:
            Length of the pause that it orders, in seconds; None if it orders none.
        """
        ...

    def pause(self) -> float:
        """Pause all sending as after a 429 that names no time, 10 to 300 s; returns the length in seconds."""
        ...

    def hold(self, seconds: float) -> None:
        """Send nothing for so long, for another reason than the rate; then one request, a probe, before all others."""
        ...

    def stop(self) -> None:
        """End every wait for a slot with `Draining`, now and from now on."""
        ...

    def watch(self, changed: Callable[[], None]) -> None:
        """Call *changed* whenever `waiting` or `vacancies` has changed for another reason than that time passes."""
        ...


class WindowLimiter:
    """A limiter for one process: sliding windows, a pause, and as many requests at a time as the service bears.

    Args:
        limits: What may be sent.
        clock: Monotonic seconds; the running loop's timers must follow it.
        margin_s: Kept free behind each use of a window.
    """

    def __init__(
        self,
        limits: RateLimits,
        *,
        clock: Callable[[], float],
        margin_s: float = NETWORK_MARGIN_S,
    ) -> None:
        self._clock = clock
        self._margin_s = margin_s
        self._changed: Callable[[], None] = lambda: None
        self._most_places = limits.concurrency
        self._places = limits.concurrency
        self.on_wire = 0
        self.waiting = 0
        self._waits: dict[bool, RunState] = {}
        """What the heads of the queues wait for: of the one that posts (True), and of the one that looks up."""
        self._names = {
            RunState.PAUSED: "a pause",
            RunState.PLACES: f"{limits.concurrency} requests at a time",
            RunState.QUOTA: "what the service has left for this token",
            RunState.INSTANCES: f"{limits.instances_per_s:,} instances/s" if limits.instances_per_s else "",
            RunState.REQUESTS: f"{limits.requests_per_5m:,} requests/5 min" if limits.requests_per_5m else "",
        }
        self._turn_to_post = asyncio.Lock()
        self._turn_to_ask = asyncio.Lock()
        self._heads: dict[asyncio.Future[None], None] = {}  # in the order in which they came
        self.stopped = False
        self.paused_until = -inf
        self._pauses = 0
        """Pauses in a row without anything being settled."""
        self.probing = False
        self._successes = 0
        self._lowered_at = -inf
        self._refused_at = -inf
        self._instances = _window(limits.instances_per_s, INSTANCE_PERIOD_S, margin_s, HASTE)
        self._requests = _window(limits.requests_per_5m, REQUEST_PERIOD_S, margin_s)
        allowed = inf if limits.requests_per_5m is None else limits.requests_per_5m / REQUEST_PERIOD_S
        self._leads: deque[float] = deque(maxlen=LEADS)
        self._pace = Pace(allowed)
        self._quota_spent = False

    # --- slots ----------------------------------------------------------------------------------------------------

    def slot(self, cost: int) -> "_WindowSlot":
        """See `Limiter.slot`."""
        return _WindowSlot(self, cost)

    def vacancies(self, cost: int, within_s: float = 0.0) -> int:
        """See `Limiter.vacancies`."""
        now = self._clock()
        if self._pause_s(now) > within_s:
            return 0
        turns = [window.turns(now, amount, within_s) for window, amount in self._uses(cost)]
        return int(min([self._free_places(), self._pace.turns(now, within_s), *turns]))

    async def take(self, cost: int) -> tuple[float, RunState | None]:
        """Wait for the turn, a place, the windows and the pause; then take them.

        Returns:
            When, in monotonic seconds, and what was waited for last.
        """
        self.waiting += 1
        waited_for = None
        try:
            async with self._turn_to_post if cost else self._turn_to_ask:
                while (wait := self._wait(cost))[0] > 0:
                    if wait[1] is not waited_for:
                        waited_for = self._waits[cost > 0] = wait[1]
                        self._changed()
                    await self._sleep(wait[0])
                if self.stopped:
                    raise Draining
                now = self._clock()
                self.on_wire += 1
                self._pace.sent(now)
                for window, amount in self._uses(cost):
                    window.reserve(now, amount)
                return now, waited_for
        finally:
            self.waiting -= 1
            if waited_for is not None:
                del self._waits[cost > 0]
            self._changed()

    def give_back(self, cost: int, taken_at: float, *, sent: bool, written: bool) -> None:
        """The request has come to its end."""
        self.on_wire -= 1
        if not sent:
            self._pace.unsent(taken_at)
        if not written:
            for window, amount in self._uses(cost):
                if sent:
                    window.written(self._clock(), amount)
                else:
                    window.give_back(amount)
        self._wake()
        self._changed()

    def written(self, cost: int, taken_at: float, at: float | None = None) -> None:
        """The request's body left at *at*, or now: its places in the windows are taken from then on."""
        at = self._clock() if at is None else at
        if cost:  # a look-up has no body, and is known to be written only when its answer begins
            self._leads.append(at - taken_at)
        for window, amount in self._uses(cost):
            window.lead_s = min(self._leads) if len(self._leads) == LEADS else 0.0
            window.written(at, amount)
        self._wake()

    def stop(self) -> None:
        """See `Limiter.stop`."""
        self.stopped = True
        self._wake()

    def watch(self, changed: Callable[[], None]) -> None:
        """See `Limiter.watch`."""
        self._changed = changed

    def _wait(self, cost: int) -> tuple[float, RunState]:
        """How long a request must wait, and for what."""
        now = self._clock()
        if self.stopped:
            return 0.0, RunState.IDLE
        wait = self._pause_s(now), RunState.PAUSED
        if self._free_places() <= 0:
            wait = inf, RunState.PLACES
        quota_s = self._pace.wait_s(now)
        if quota_s > wait[0]:
            wait = quota_s, RunState.QUOTA
        if self._instances is not None and cost and (instances_s := self._instances.wait_s(now, cost)) > wait[0]:
            wait = instances_s, RunState.INSTANCES
        if self._requests is not None and (requests_s := self._requests.wait_s(now, 1)) > wait[0]:
            wait = requests_s, RunState.REQUESTS
        return wait

    @property
    def waits_for(self) -> RunState | None:
        """See `Limiter.waits_for`."""
        return self._waits.get(True) or self._waits.get(False)

    @property
    def bound_by(self) -> str:
        """See `Limiter.bound_by`."""
        return "" if self.waits_for is None else self._names[self.waits_for]

    @property
    def rate_factor(self) -> float:
        """See `Limiter.rate_factor`."""
        return min((window.share for window in (self._instances, self._requests) if window is not None), default=1.0)

    def _free_places(self) -> int:
        probing = self.probing or self._pace.expired(self._clock())
        return (1 if probing else self._places) - self.on_wire

    def _pause_s(self, now: float) -> float:
        return max(0.0, self.paused_until - now)

    def _uses(self, cost: int) -> list[tuple[Window, int]]:
        uses = [] if self._requests is None else [(self._requests, 1)]
        if self._instances is not None and cost:
            uses.append((self._instances, cost))
        return uses

    async def _sleep(self, seconds: float) -> None:
        """Sleep until something changes, at most so long. Only the heads of the queues sleep here."""
        loop = asyncio.get_running_loop()
        head = loop.create_future()
        self._heads[head] = None
        # A long sleep ends late by some milliseconds, a short one hardly: so wake up early, and look again.
        shorter = seconds - EARLY_S if seconds > 2 * EARLY_S else seconds
        timer = None if seconds == inf else loop.call_later(shorter, self._wake)
        try:
            await head
        finally:
            del self._heads[head]
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        for head in self._heads:
            if not head.done():
                head.set_result(None)

    # --- what the answers teach -----------------------------------------------------------------------------------

    def feedback(self, judgement: Judgement, reply: Reply | Fault) -> float | None:
        """See `Limiter.feedback`."""
        handling = HANDLING[judgement.verdict]
        if isinstance(reply, Reply):
            self.observe(reply.headers, reply.elapsed_s)
        ordered: float | None = None
        if judgement.verdict is Verdict.THROTTLED:
            ordered = self.throttled(judgement.retry_after_s)
        elif handling.overload:
            self.overloaded()
        elif handling.accepted:
            self.succeeded()
        if judgement.settles:
            self._pauses = 0
        return ordered

    def observe(self, headers: Mapping[str, str], elapsed_s: float = 0.0) -> None:
        """Take in what an answer's headers say of the limits; *elapsed_s*: seconds since its request went."""
        now = self._clock()
        self._quota_spent = self._pace.observe(Said(now, now - elapsed_s, headers.get("ratelimit", "")))

    def succeeded(self) -> None:
        """A request was accepted. A round of successes adds a place; time without refusals restores the rate."""
        now = self._clock()
        if now >= self.paused_until:  # one that was on the wire when the pause began is no probe
            self.probing = False
        if self._pace.expired(now):  # the service has answered without saying what is left
            self._pace.forget()
        self._successes += 1
        if self._successes >= self._places:
            self._successes = 0
            self._places = min(self._places + 1, self._most_places)
        if now - self._refused_at >= RECOVERY_S:
            self._refused_at = now
            for window in (self._instances, self._requests):
                if window is not None:
                    window.share = min(1.0, round(window.share + 0.1, 6))
                    window.margin_s = max(self._margin_s, window.margin_s / 2)
        self._wake()
        self._changed()

    def overloaded(self) -> None:
        """A request failed, and fewer requests at a time might help: halve them, once for all that were on the wire."""
        now = self._clock()
        if now - self._lowered_at >= 1.0:
            self._lowered_at = now
            self._places = max(1, self._places // 2)
        self._successes = 0

    def pause(self) -> float:
        """See `Limiter.pause`."""
        seconds = self._pause_length_s(None)
        self.hold(seconds)
        return seconds

    def throttled(self, ordered_s: float | None) -> float:
        """A request was refused for its rate. One probe goes first after the pause, with a wider margin.

        A rate that is refused once is cured by the pause. It is halved if it is refused again soon, or while it is
        lowered, or because the quota is spent: then another job shares it. A lowered rate is spread evenly.
        """
        now, seconds = self._clock(), self._pause_length_s(ordered_s)
        if now >= self.paused_until:
            window = self._requests if self._quota_spent else self._instances
            if window is not None:
                window.margin_s = min(WIDEST_MARGIN_S, window.margin_s * 2)
                if self._quota_spent or window.share < 1.0 or now - self.paused_until < RECOVERY_S:
                    window.share = max(LOWEST_SHARE, window.share / 2)
        self.hold(seconds)
        self._refused_at = self.paused_until
        return seconds

    def _pause_length_s(self, ordered_s: float | None) -> float:
        """Length of a pause that begins now. Requests on the wire that are refused together count once."""
        now = self._clock()
        if now >= self.paused_until or not self._pauses:
            self._pauses += 1
        elif ordered_s is None:
            return self.paused_until - now
        return pause_s(self._pauses, ordered_s)

    def hold(self, seconds: float) -> None:
        """See `Limiter.hold`."""
        self.paused_until = max(self.paused_until, self._clock() + seconds)
        self.probing = True
        self._wake()

    # --- the past -------------------------------------------------------------------------------------------------

    @property
    def memory_s(self) -> float:
        """How long ago something may have been sent and still count."""
        return max((window.span_s for window, _ in self._uses(1)), default=0.0)

    def restore(self, attempts: list[tuple[float, int]], paused_s: float, words: Sequence[Said] = ()) -> None:
        """Take over what an earlier process has sent and was told.

        Args:
            attempts: (seconds ago, instances) of each request, the oldest first; negative where a clock was set back.
            paused_s: How long its pause still lasts; negative if it is over.
            words: What its last answers said is left, in negative seconds from now, the oldest first.
        """
        now = self._clock()
        for ago, instances in attempts:
            for window, amount in self._uses(instances):
                if ago < window.span_s:  # what seems to have gone later than now counts from now: longer, not less
                    window.used(now - max(0.0, ago), amount)
        self.paused_until = now + paused_s
        self.probing = paused_s > -PROBE_WITHIN_S
        moved = [Said(now + heard_at, now + sent_at, text) for heard_at, sent_at, text in words]
        self._quota_spent = self._pace.restore(now, moved, [now - ago for ago, _ in attempts])
        self.probing = self.probing or self._pace.binds


class _WindowSlot:
    """One request's leave."""

    __slots__ = ("_cost", "_limiter", "_probe", "_sent", "_taken_at", "_written", "waited_for")

    def __init__(self, limiter: WindowLimiter, cost: int) -> None:
        self._limiter = limiter
        self._cost = cost
        self._probe = False
        self._sent = True
        self._written = False
        self._taken_at = 0.0
        self.waited_for: RunState | None = None

    async def __aenter__(self) -> Self:
        self._taken_at, self.waited_for = await self._limiter.take(self._cost)
        self._probe = self._limiter.probing
        return self

    async def __aexit__(self, *_: object) -> None:
        self._limiter.give_back(self._cost, self._taken_at, sent=self._sent, written=self._written)

    def writing(self) -> bool:
        return not self._limiter.stopped  # a run that drains sends nothing more

    def written(self, at: float | None = None) -> None:
        if not self._written and not self._probe:
            self._written = True
            self._limiter.written(self._cost, self._taken_at, at)

    def unsent(self) -> None:
        self._sent = False


def _window(limit: int | None, period_s: float, margin_s: float, haste: float = inf) -> Window | None:
    return None if limit is None else Window(limit, period_s, margin_s, haste)
