"""Queues and concurrency: which request is sent next, and when.

Rules:

1. Requests that create instances wait in one queue, in the order of asking: first attempts and retries alike. Look-ups,
   which use nothing of the instances' windows, have a queue of their own. Behind a batch that waits for its window they
   would be late. They would also be sent together with it, which makes the time of its arrival less certain.
2. The head of a queue waits for one of the concurrent requests to end, then for the `Budget`: every window, the quota
   and any pause. After a pause, one request is sent alone, as a probe.
3. A request that holds a slot waits for nothing but its own answer. A backoff holds no slot.
4. A request counts from the moment at which its body was written. One that was not sent gives its lease back. The
   probe after a pause counts from its answer: a service that was unreachable may be slow, and nothing else is sent
   before the answer.
5. The time that always passes between lease and writing is subtracted from the margin, as it would reduce the rate. At
   most the whole margin is subtracted, so that no body is written too early even if it is written in no time.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import inf
from typing import Self

from bulkwf.attempt import Fault, Judgement, Reply, Verdict
from bulkwf.errors import Draining
from bulkwf.limits.budget import Budget
from bulkwf.limits.pools import Bound, Lease, Pools, Wait, Waiter
from bulkwf.limits.quota import Said
from bulkwf.limits.window import NETWORK_MARGIN_S
from bulkwf.model import RunState
from bulkwf.options import RateLimits
from bulkwf.service.verdicts import HANDLING

__all__ = ["WindowLimiter"]

STATES = {
    Bound.PAUSE: RunState.PAUSED,
    Bound.PROBE: RunState.PLACES,  # one request at a time
    Bound.QUOTA: RunState.QUOTA,
    Bound.INSTANCES: RunState.INSTANCES,
    Bound.ACCOUNT: RunState.INSTANCES,
    Bound.REQUESTS: RunState.REQUESTS,
    Bound.TURN: RunState.INSTANCES,
}
"""The state of a run whose next request waits for this."""
EARLY_S = 0.005
LEADS = 8
"""The shortest lead of this many requests counts, and none before: the first requests open connections."""


class WindowLimiter:
    """A limiter over a budget: sliding windows, a pause, and an adaptive number of concurrent requests.

    Args:
        limits: What may be sent.
        clock: Monotonic seconds; the running loop's timers must follow it.
        margin_s: Time kept free after each use of a window, in seconds.
        budget: Counts what is sent; None makes one that is shared with no other run.
    """

    def __init__(
        self,
        limits: RateLimits,
        *,
        clock: Callable[[], float],
        margin_s: float = NETWORK_MARGIN_S,
        budget: Budget | None = None,
    ) -> None:
        self.budget = budget or Budget(clock(), limits, margin_s, Pools())
        self.waiting = 0
        self.stopped = False
        self._clock = clock
        self._changed: Callable[[], None] = lambda: None
        self._most_concurrency = limits.concurrency
        self._concurrency = limits.concurrency
        self._waits_for: dict[bool, RunState] = {}
        """What the heads of the queues wait for. Keys: True for the one that posts, False for the one that looks up."""
        self._bound: Bound | None = None
        self._waits = False
        self._post_turn = asyncio.Lock()
        self._look_up_turn = asyncio.Lock()
        self._post_waiter = Waiter(self.budget, self._wake_from_anywhere)
        self._look_up_waiter = Waiter(self.budget, self._wake_from_anywhere)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._heads: dict[asyncio.Future[None], None] = {}  # in the order in which they came
        self._successes = 0
        self._lowered_at = -inf
        self._leads: deque[float] = deque(maxlen=LEADS)

    # --- slots ----------------------------------------------------------------------------------------------------

    def slot(self, cost: int) -> "_WindowSlot":
        """See `Limiter.slot`."""
        return _WindowSlot(self, cost)

    @property
    def on_wire(self) -> int:
        """See `Limiter.on_wire`."""
        return self.budget.on_wire

    @property
    def waits_for(self) -> RunState | None:
        """See `Limiter.waits_for`."""
        return self._waits_for.get(True) or self._waits_for.get(False)

    @property
    def bound_by(self) -> str:
        """See `Limiter.bound_by`."""
        if self._bound is not None:
            return self.budget.describe(self._bound)
        return f"{self._most_concurrency} requests at a time" if self._waits else ""

    @property
    def paused_until(self) -> float:
        """See `Limiter.paused_until`."""
        return self.budget.paused_until

    @property
    def rate_factor(self) -> float:
        """See `Limiter.rate_factor`."""
        return self.budget.rate_factor

    def capacity(self, cost: int, within_s: float = 0.0) -> int:
        """See `Limiter.capacity`."""
        now = self._clock()
        return int(min(self.budget.capacity(now, cost, within_s), self._concurrency - self.on_wire))

    async def take(self, cost: int) -> tuple[Lease, RunState | None]:
        """Wait for the turn, for room among the concurrent requests, and for a lease.

        Returns:
            The lease, and what was waited for last.
        """
        self.waiting += 1
        waited_for = None
        waiter = self._post_waiter if cost else self._look_up_waiter
        try:
            async with self._post_turn if cost else self._look_up_turn:
                try:
                    while not isinstance(lease := self._ask(cost, waiter), Lease):
                        state = RunState.PLACES if self._bound is None else STATES[self._bound]
                        if state is not waited_for:
                            waited_for = self._waits_for[cost > 0] = state
                            self._changed()
                        await self._sleep(lease)
                finally:
                    if waiter.queued:
                        self.budget.leave(waiter)
                return lease, waited_for
        finally:
            if waited_for is not None:
                del self._waits_for[cost > 0]
            self.waiting -= 1
            self._changed()

    def give_back(self, lease: Lease, *, sent: bool) -> None:
        """The request has ended; *sent*: a byte of it may have left this machine."""
        self.budget.end(lease, self._clock(), sent=sent)
        self._wake()
        self._changed()

    def written(self, lease: Lease, at: float | None = None) -> None:
        """The request's body left at *at*, or now: it counts from then on."""
        at = self._clock() if at is None else at
        if lease.cost:  # a look-up has no body, and is known to be written only when its answer begins
            self._leads.append(at - lease.taken_at)
            self.budget.lead(min(self._leads) if len(self._leads) == LEADS else 0.0)
        self.budget.written(lease, at)
        self._wake()

    def stop(self) -> None:
        """See `Limiter.stop`."""
        self.stopped = True
        self._wake()

    def watch(self, changed: Callable[[], None]) -> None:
        """See `Limiter.watch`."""
        self._changed = changed

    def close(self) -> None:
        """See `Limiter.close`."""
        self.stop()
        self.budget.close(self._clock())

    def _ask(self, cost: int, waiter: Waiter) -> Lease | float:
        """A lease, or the longest time to wait before the next call, in seconds."""
        if self.stopped:
            raise Draining
        now = self._clock()
        if self.on_wire >= self._concurrency:
            self._bound, self._waits = None, True
            self.budget.leave(waiter)
            return inf
        answer = self.budget.ask(now, cost, waiter)
        if isinstance(answer, Wait):
            self._bound, self._waits = answer.bound, True
            return answer.seconds
        return answer

    async def _sleep(self, seconds: float) -> None:
        """Sleep until something changes, at most *seconds*. Only the heads of the queues sleep here."""
        loop = self._loop = asyncio.get_running_loop()
        head = loop.create_future()
        self._heads[head] = None
        # A long sleep ends late by some milliseconds, a short one by less: so wake up early, and look again.
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

    def _wake_from_anywhere(self) -> None:
        """Another run has changed something; it may run in another thread, or in a later loop of this one."""
        if self._loop is None:
            return
        if self._loop is _running_loop():
            self._wake()
        else:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._wake)

    # --- feedback -------------------------------------------------------------------------------------------------

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
            self.budget.settled()
        return ordered

    def observe(self, headers: Mapping[str, str], elapsed_s: float = 0.0) -> None:
        """Process what an answer's headers say about the limits; *elapsed_s*: seconds since its request was sent."""
        now = self._clock()
        self.budget.observe(Said(now, now - elapsed_s, headers.get("ratelimit", "")))

    def succeeded(self) -> None:
        """A request was accepted. After a round of successes, one more request may be concurrent."""
        self.budget.accepted(self._clock())
        self._successes += 1
        if self._successes >= self._concurrency:
            self._successes = 0
            self._concurrency = min(self._concurrency + 1, self._most_concurrency)
        self._wake()
        self._changed()

    def overloaded(self) -> None:
        """A request failed, and fewer concurrent requests might help: halve them, once a second at most."""
        now = self._clock()
        if now - self._lowered_at >= 1.0:
            self._lowered_at = now
            self._concurrency = max(1, self._concurrency // 2)
        self._successes = 0

    def throttled(self, ordered_s: float | None) -> float:
        """A request was answered with a 429. See `Budget.throttled`."""
        seconds = self.budget.throttled(self._clock(), ordered_s)
        self._wake()
        return seconds

    def pause(self) -> float:
        """See `Limiter.pause`."""
        seconds = self.budget.pause(self._clock())
        self._wake()
        return seconds

    def hold(self, seconds: float) -> float:
        """See `Limiter.hold`."""
        seconds = self.budget.hold(self._clock(), seconds)
        self._wake()
        return seconds

    def change_token(self, fingerprint: str) -> None:
        """See `Limiter.change_token`."""
        self.budget.change_token(self._clock(), fingerprint)
        self._wake_from_anywhere()

    # --- the past -------------------------------------------------------------------------------------------------

    @property
    def memory_s(self) -> float:
        """For how long a request counts against the limits after it was sent, in seconds."""
        return self.budget.memory_s

    def uncounted_s(self, file: str, *, own: bool) -> float:
        """See `Budget.uncounted_s`."""
        return self.budget.uncounted_s(self._clock(), file, own=own)

    def restore(self, attempts: Sequence[tuple[float, int]], paused_s: float, reports: Sequence[Said] = ()) -> None:
        """See `Budget.restore`."""
        self.budget.restore(self._clock(), attempts, paused_s, reports)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:  # a thread without one
        return None


class _WindowSlot:
    """One request's slot."""

    __slots__ = ("_cost", "_lease", "_limiter", "_sent", "waited_for")
    _lease: Lease

    def __init__(self, limiter: WindowLimiter, cost: int) -> None:
        self._limiter = limiter
        self._cost = cost
        self._sent = True
        self.waited_for: RunState | None = None

    async def __aenter__(self) -> Self:
        self._lease, self.waited_for = await self._limiter.take(self._cost)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._limiter.give_back(self._lease, sent=self._sent)

    @property
    def timed(self) -> bool:
        return bool(self._lease.windows)

    def writing(self) -> bool:
        return not self._limiter.stopped  # a run that drains sends nothing more

    def written(self, at: float | None = None) -> None:
        if self.timed and not self._lease.counted and not self._lease.probe:
            self._limiter.written(self._lease, at)

    def unsent(self) -> None:
        self._sent = False
