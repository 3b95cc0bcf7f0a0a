"""What may be sent, counted over all runs of one process: windows, quota and pauses. Pure: time is an argument.

A request counts in the window of its workflow, of its account and of its token; the quota and the pause after a 429
belong to the token. There is one `Pool` for each of these, and a `Budget` is one run's view of its three pools.

Rules:

1. Runs that share a pool count each other's requests. Where their limits differ, the lowest holds for all.
2. Waiters of different runs take turns. A later one goes first only where that does not delay an earlier one.
3. A 429 pauses all runs of the token, and one probe ends the pause. Another reason pauses one run alone.
4. What an ended run has sent counts on. A pool goes when no run uses it and nothing counts in it.
"""

from collections.abc import Sequence
from math import inf

from bulkwf.limits.pause import Pause, pause_s
from bulkwf.limits.pools import Bound, Lease, Pool, Pools, TokenPool, Wait, Waiter
from bulkwf.limits.quota import Said
from bulkwf.limits.turns import Turns
from bulkwf.limits.window import RECOVERY_S, Window
from bulkwf.options import RateLimits

__all__ = ["Budget"]

PROBE_WITHIN_S = 300.0
"""A process that starts within this many seconds of the end of a stored pause sends one probe first."""


class Budget:
    """What one run may send.

    Args:
        now: Monotonic seconds. All budgets of the same *pools* must use the same clock.
        limits: What the run may send.
        margin_s: Time kept free after each use of a window, in seconds.
        pools: Of the runs that share windows, quota and pauses.
        endpoint: The base URL.
        account: The account's id.
        workflow: The workflow's name.
        token: A fingerprint of the credential, never the credential.

    Attributes:
        limits: The run's own.
        lead_s: How long its requests take at least from the lease to the end of writing, in seconds.
        on_wire: The run's requests that hold a lease.
        closed: The run has ended.
    """

    def __init__(
        self,
        now: float,
        limits: RateLimits,
        margin_s: float,
        pools: Pools,
        *,
        endpoint: str = "",
        account: str = "",
        workflow: str = "",
        token: str = "",
    ) -> None:
        self.limits = limits
        self.lead_s = 0.0
        self.on_wire = 0
        self.closed = False
        self._endpoint = endpoint
        self._all_pools = pools
        self._lock = pools.lock
        self._pause = Pause()
        self._file = ""
        self._post: tuple[tuple[Bound, Window], ...] = ()
        with self._lock:
            pools.drop_idle(now)
            self._lane = pools.lane(endpoint, account, workflow, margin_s)
            self._account = pools.account(endpoint, account, margin_s)
            self._token = pools.token(endpoint, token, TokenPool(margin_s))
            for pool in self._pools:
                pool.add(self)

    def bind(self) -> None:
        """Use the windows that the pools have at present."""
        pools = ((Bound.INSTANCES, self._lane), (Bound.ACCOUNT, self._account))
        self._post = tuple((bound, pool.window) for bound, pool in pools if pool.window is not None)
        self._turns = Turns(self, self._pools)

    # --- leases ---------------------------------------------------------------------------------------------------

    def ask(self, now: float, cost: int, waiter: Waiter) -> Lease | Wait:
        """A lease for a request that carries *cost* instances, or how long to wait before *waiter* asks again."""
        with self._lock:
            wait = self._wait(now, cost)
            if self._turns.shared:
                waiter.cost = cost
                wait = wait or self._turns.wait(now, waiter)
                if wait is not None:
                    self._turns.join(waiter)
            if wait is not None:
                return wait
            self._turns.leave(waiter)
            token = self._token
            token.pacer.sent(now)
            token.on_wire += 1
            self.on_wire += 1
            lease = Lease(cost, now, self.probing, self._uses(cost), token)
            for window, amount in lease.windows:
                window.reserve(now, amount)
            return lease

    def leave(self, waiter: Waiter) -> None:
        """Take *waiter* out of the lines: it does not ask again soon."""
        with self._lock:
            self._turns.leave(waiter)

    def written(self, lease: Lease, at: float) -> None:
        """The request was written at *at*: its period begins then. Called once, and not for a probe."""
        with self._lock:
            self._count(lease, at)
            self._turns.wake_others()

    def end(self, lease: Lease, now: float, *, sent: bool) -> None:
        """The request has ended; *sent*: a byte of it may have left this machine."""
        with self._lock:
            lease.token.on_wire -= 1
            self.on_wire -= 1
            if not sent:
                lease.token.pacer.unsent(lease.taken_at)
            if not lease.counted and sent:
                self._count(lease, now)
            elif not lease.counted:
                for window, amount in lease.windows:
                    window.give_back(amount)
            self._turns.wake_others()

    def lead(self, seconds: float) -> None:
        """Set `lead_s`."""
        if seconds != self.lead_s:
            with self._lock:
                self.lead_s = seconds
                for pool in self._pools:
                    pool.lead()

    def capacity(self, now: float, cost: int, within_s: float) -> float:
        """How many requests of *cost* instances this run could send in *within_s* seconds if no other run sent any."""
        with self._lock:
            if self.paused_until - now > within_s:
                return 0
            fitting = (window.capacity(now, amount, within_s) for window, amount in self._uses(cost))
            return min(self._probe_room(now), self._token.pacer.capacity(now, within_s), *fitting)

    def ready_s(self, now: float, cost: int) -> float:
        """Seconds until a request of *cost* instances could go, without regard to the turns of other runs."""
        wait = self._wait(now, cost)
        return 0.0 if wait is None else wait.seconds

    def describe(self, bound: Bound) -> str:
        """What a request waits for, in words."""
        pools = {Bound.INSTANCES: self._lane, Bound.ACCOUNT: self._account, Bound.REQUESTS: self._token}
        window = pools[bound].window if bound in pools else None
        return bound.value if window is None else f"{window.limit:,} {bound.value}"

    @property
    def _pools(self) -> tuple[Pool, Pool, TokenPool]:
        return self._lane, self._account, self._token

    def _uses(self, cost: int) -> list[tuple[Window, int]]:
        uses = [(window, cost) for _, window in self._post] if cost else []
        if self._token.window is not None:
            uses.append((self._token.window, 1))
        return uses

    def _wait(self, now: float, cost: int) -> Wait | None:
        """What a request waits for longest, without regard to turns; None if it need not wait."""
        if self._probe_room(now) <= 0:
            return Wait(inf, Bound.PROBE)
        seconds, bound = self.paused_until - now, Bound.PAUSE
        if (quota_s := self._token.pacer.wait_s(now)) > seconds:
            seconds, bound = quota_s, Bound.QUOTA
        if cost:
            for kind, window in self._post:
                if (window_s := window.wait_s(now, cost)) > seconds:
                    seconds, bound = window_s, kind
        requests = self._token.window
        if requests is not None and (window_s := requests.wait_s(now, 1)) > seconds:
            seconds, bound = window_s, Bound.REQUESTS
        return Wait(seconds, bound) if seconds > 0 else None

    def _count(self, lease: Lease, at: float) -> None:
        lease.counted = True
        for window, amount in lease.windows:
            window.written(at, amount)

    # --- pauses and the rate --------------------------------------------------------------------------------------

    @property
    def paused_until(self) -> float:
        """When the pause ends; in the past if there is none."""
        return max(self._pause.until, self._token.pause.until)

    @property
    def probing(self) -> bool:
        """Whether the next request is a probe."""
        return self._pause.probing or self._token.pause.probing

    @property
    def rate_factor(self) -> float:
        """The least fraction of its rate that a window is used at."""
        with self._lock:
            return min((window.rate_factor for window, _ in self._uses(1)), default=1.0)

    def _probe_room(self, now: float) -> float:
        """How many requests may be added to those on the wire; infinite while none is a probe.

        After a pause, and after the end of a window whose quota was short, one request goes alone: its answer shows
        how much may follow.
        """
        token = self._token
        if token.pause.probing or token.pacer.expired(now):
            return 1 - token.on_wire
        return 1 - self.on_wire if self._pause.probing else inf

    def observe(self, said: Said) -> None:
        """Take in what an answer says is left for the token."""
        with self._lock:
            self._token.quota_spent = self._token.pacer.observe(said)

    def accepted(self, now: float) -> None:
        """A request was accepted: it may end a probe, and restores a step of a reduced rate."""
        with self._lock:
            if now >= self.paused_until:  # a request that was on the wire when the pause began is no probe
                self._pause.probing = self._token.pause.probing = False
            if self._token.pacer.expired(now):  # the service has answered without reporting a quota
                self._token.pacer.forget()
            for window in self._reducible:
                window.recover(now)
            self._turns.wake_others()

    def settled(self) -> None:
        """Something has been settled: the next pause is the first in a row."""
        with self._lock:
            self._pause.in_a_row = self._token.pause.in_a_row = 0

    def throttled(self, now: float, ordered_s: float | None) -> float:
        """A request was answered with a 429: pause all runs of the token, and widen the margin.

        The pause is enough after a single 429. The rate is halved after another one soon after a pause, or while it is
        reduced, or where the quota is spent: then another client probably shares the limit.

        Returns:
            Seconds until the pause ends.
        """
        with self._lock:
            token, paused_until = self._token, self.paused_until
            seconds = self._pause_length_s(now, token.pause, ordered_s)
            window = token.window if token.quota_spent else self._lane.window
            if now >= paused_until and window is not None:
                window.throttled(reduce=token.quota_spent or now - paused_until < RECOVERY_S)
            token.pause.hold(now + seconds)
            for reducible in self._reducible:
                reducible.recover_from(self.paused_until)
            self._turns.wake_others()
            return self.paused_until - now

    def pause(self, now: float) -> float:
        """Pause this run as after a 429 that names no time; returns the seconds until the pause ends."""
        with self._lock:
            return self.hold(now, self._pause_length_s(now, self._pause, None))

    def hold(self, now: float, seconds: float) -> float:
        """Pause this run; returns the seconds until the pause ends."""
        with self._lock:
            self._pause.hold(now + seconds)
            return self.paused_until - now

    @property
    def _reducible(self) -> list[Window]:
        """The windows whose rate is reduced after a 429. No answer says whether the account's rate was exceeded."""
        return [pool.window for pool in (self._lane, self._token) if pool.window is not None]

    def _pause_length_s(self, now: float, pause: Pause, ordered_s: float | None) -> float:
        """Length of a pause that begins now. 429s of requests that were on the wire together count once."""
        pauses = self._pause.in_a_row + self._token.pause.in_a_row
        if now >= self.paused_until or not pauses:
            pause.in_a_row += 1
            pauses += 1
        elif ordered_s is None:
            return self.paused_until - now
        return pause_s(pauses, ordered_s)

    # --- the past, another token, and the end ---------------------------------------------------------------------

    @property
    def memory_s(self) -> float:
        """For how long a request counts against the limits after it was sent, in seconds."""
        return max((window.span_s for window, _ in self._uses(1)), default=0.0)

    def uncounted_s(self, now: float, file: str, *, own: bool) -> float:
        """Length of the time before *now* whose requests in *file* must be restored, in seconds; infinite for all.

        Earlier requests are counted already: runs of this process have sent or restored them.

        Args:
            now: The present. From now on, all that the file holds is regarded as counted.
            file: Names it.
            own: Until the budget is closed, only this run records requests in it.
        """
        with self._lock:
            known = self._token.known
            counted_until = known.get(file, -inf)
            known[file] = inf if own else max(now, counted_until)
            self._file = file if own else self._file
            return max(0.0, now - counted_until)

    def restore(
        self, now: float, attempts: Sequence[tuple[float, int]], paused_s: float, reports: Sequence[Said] = ()
    ) -> None:
        """Count what earlier processes have sent, and keep to the pause and the quota that they have heard of.

        Args:
            now: The present.
            attempts: (seconds ago, instances) of each request, the oldest first; negative where a clock was set back.
            paused_s: How long the stored pause still lasts; negative if it is over.
            reports: The last quotas that answers reported, in negative seconds from now, the oldest first.
        """
        with self._lock:
            for ago, instances in attempts:
                for window, amount in self._uses(instances):
                    if ago < window.span_s:  # what seems to have been sent later than now counts from now
                        window.used(now - max(0.0, ago), amount)
            if paused_s > 0:  # its reason is not stored, so it holds for all runs
                self._token.pause.hold(now + paused_s)
            elif paused_s > -PROBE_WITHIN_S:
                self._pause.probing = True
            moved = [Said(now + heard_at, now + sent_at, text) for heard_at, sent_at, text in reports]
            self._token.quota_spent = self._token.pacer.restore(now, moved, [now - ago for ago, _ in attempts])
            self._pause.probing = self._pause.probing or self._token.pacer.binds
            self._turns.wake_others()

    def change_token(self, now: float, fingerprint: str) -> None:
        """The run sends with another token of the same user from now on."""
        with self._lock:
            if self.closed:  # the token's source has answered after the end of the run
                return
            old, new = self._token, self._all_pools.token(self._endpoint, fingerprint, self._token)
            if new is old:
                return
            self._turns.leave_all()
            if self._file:
                old.known[self._file], new.known[self._file] = now, inf
            self._token = new
            old.remove(self)
            new.add(self)
            new.absorb(old)

    def close(self, now: float) -> None:
        """The run has ended: its limits do not hold for other runs any more. What it has sent still counts."""
        with self._lock:
            self.closed = True
            if self._file:
                self._token.known[self._file] = now
            self._turns.leave_all()
            for pool in self._pools:
                pool.fit()
            self._turns.wake_others()
