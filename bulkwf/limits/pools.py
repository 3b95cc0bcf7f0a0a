"""Pools: what the requests of one workflow, one account or one token share over all runs of a process. Pure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import inf
from threading import RLock
from typing import NamedTuple, Protocol
from weakref import WeakSet

from bulkwf.limits.pause import Pause
from bulkwf.limits.quota import QuotaPacer
from bulkwf.limits.window import RECOVERY_S, Window
from bulkwf.options import INSTANCE_PERIOD_S, REQUEST_PERIOD_S, RateLimits

__all__ = ["Bound", "Lease", "Pool", "Pools", "TokenPool", "User", "Wait", "Waiter"]

ACCOUNT_INSTANCES_PER_S = 300
"""The service's limit for an account, unless the rate of a run is higher: then its account has a higher limit."""
BURST_FACTOR = 2.0
"""The instances of a second are spread over at least half of it. The requests of one burst arrive spread out: the last
ones would arrive together with the first ones of the next second."""
TURN_S = 1.0
"""A waiter that could go and has not gone for this many seconds loses its turn: its event loop is blocked or closed."""


class Bound(Enum):
    """What a request waits for."""

    PAUSE = "a pause"
    PROBE = "the answer to a probe after a pause"
    QUOTA = "what the service has left for this token"
    INSTANCES = "instances/s"
    ACCOUNT = "instances/s of the account"
    REQUESTS = "requests/5 min"
    TURN = "the turn of another run"


class Wait(NamedTuple):
    """A request may not be sent yet.

    Attributes:
        seconds: How long to wait before the next look, at most; infinite if it depends on other requests.
        bound: What it waits for.
    """

    seconds: float
    bound: Bound


class User(Protocol):
    """A run's budget, as a pool sees it.

    Attributes:
        limits: The run's own.
        lead_s: How long its requests take at least from the lease to the end of writing, in seconds.
        closed: The run has ended.
    """

    limits: RateLimits
    lead_s: float
    closed: bool

    def bind(self) -> None:
        """Use the windows that the pools have at present."""
        ...

    def ready_s(self, now: float, cost: int) -> float:
        """Seconds until a request of *cost* instances could go, without regard to the turns of other runs."""
        ...

    def leave(self, waiter: "Waiter") -> None:
        """Take *waiter* out of the lines."""
        ...


@dataclass(slots=True, eq=False)
class Waiter:
    """The head of a limiter's queue, as other runs see it.

    Attributes:
        user: The budget that it asks.
        wake: Makes it ask again. May be called from any thread.
        cost: How many instances its request carries.
        queued: It waits in the lines of its pools.
        ready_at: When another waiter has first found that it could go; None if it could not.
    """

    user: User
    wake: Callable[[], None]
    cost: int = 0
    queued: bool = False
    ready_at: float | None = None

    def lapsed(self, now: float, ready_s: float) -> bool:
        """Whether it has lost its turn; *ready_s*: seconds until it can go."""
        if ready_s > 0 or self.ready_at is None:
            self.ready_at = now if ready_s == 0 else None
        return self.ready_at is not None and now - self.ready_at > TURN_S


@dataclass(slots=True, eq=False)
class Lease:
    """Leave to send one request. It counts until it is given back, or a period after it was written.

    Attributes:
        cost: How many instances the request carries.
        taken_at: When it was granted.
        probe: It is the first request after a pause.
        windows: The windows it counts in, and how much.
        token: The token's pool.
        counted: It counts in the windows from a known moment on.
    """

    cost: int
    taken_at: float
    probe: bool
    windows: Sequence[tuple[Window, int]]
    token: "TokenPool"
    counted: bool = False


class Pool:
    """What the requests of one workflow, account or token share.

    Attributes:
        window: None while no open run sets a limit: then nothing is counted. What was counted before is kept.
        users: The budgets that count in it.
        line: The waiters of these budgets, in the order in which they came; empty while there is only one budget.
        shared: More than one open budget counts in it.
    """

    def __init__(
        self,
        limit: Callable[[Iterable[RateLimits]], int | None],
        period_s: float,
        margin_s: float,
        burst_factor: float = inf,
    ) -> None:
        self.window: Window | None = None
        self._kept: Window | None = None
        """The window while no open run sets a limit."""
        self.users: WeakSet[User] = WeakSet()
        self.line: dict[Waiter, None] = {}
        self.shared = False
        self._limit = limit
        self._period_s = period_s
        self._margin_s = margin_s
        self._burst_factor = burst_factor

    @property
    def open_users(self) -> list[User]:
        """The budgets of runs that have not ended."""
        return [user for user in self.users if not user.closed]

    def add(self, user: User) -> None:
        """*user* counts in it from now on."""
        self.users.add(user)
        self.fit()
        self.lead()

    def remove(self, user: User) -> None:
        """*user* counts in another one from now on."""
        self.users.discard(user)
        self.fit()

    def fit(self) -> None:
        """Adapt the limit to the runs that share it; called when one starts or ends."""
        users = self.open_users
        self.shared = len(users) > 1
        if not users:
            return
        limit = self._limit([user.limits for user in users])
        kept = self.window or self._kept
        if limit is None:
            self.window, self._kept = None, kept
        else:
            self.window = kept or Window(limit, self._period_s, self._margin_s, self._burst_factor)
            self.window.limit, self._kept = limit, None
        for user in users:
            user.bind()

    def lead(self) -> None:
        """Subtract from the margin the time that always passes before one of its requests is written."""
        if self.window is not None:
            self.window.lead_s = min((user.lead_s for user in self.open_users), default=0.0)

    def amount(self, cost: int) -> int:
        """What a request of *cost* instances takes of the window."""
        return cost

    def delays(self, now: float, earlier: Waiter, ready_s: float, cost: int) -> bool:
        """Whether *earlier*, which can go in *ready_s* seconds, could not if a request of *cost* instances went now."""
        if self.window is None:
            return False
        wait_s = self.window.wait_after_s(now, self.amount(earlier.cost), self.amount(cost))
        return wait_s == inf or wait_s > ready_s

    def clear(self, now: float) -> bool:
        """Count abandoned reservations as written; returns whether nothing counts any more."""
        window = self.window or self._kept
        if window is None:
            return True
        window.abandon(now)
        return window.idle(now)


class TokenPool(Pool):
    """What the requests of one token share.

    Attributes:
        pacer: What the service says is left.
        quota_spent: Its last answer said that nothing is left.
        pause: Ordered by a 429.
        on_wire: Requests that hold a lease.
        known: Files of which the requests up to a moment are counted, and that moment.
        absorbed: Pools of earlier tokens whose requests are counted here, too.
    """

    def __init__(self, margin_s: float) -> None:
        super().__init__(_request_limit, REQUEST_PERIOD_S, margin_s)
        self.pacer = QuotaPacer(inf)
        self.quota_spent = False
        self.pause = Pause()
        self.on_wire = 0
        self.known: dict[str, float] = {}
        self.absorbed: list[TokenPool] = []

    def fit(self) -> None:
        """See `Pool.fit`."""
        super().fit()
        self.pacer.requests_per_s = inf if self.window is None else self.window.limit / REQUEST_PERIOD_S

    def amount(self, cost: int) -> int:  # noqa: ARG002 - each request is one
        """See `Pool.amount`."""
        return 1

    def delays(self, now: float, earlier: Waiter, ready_s: float, cost: int) -> bool:
        """See `Pool.delays`."""
        if self.pacer.binds and self.pacer.wait_s(now) >= ready_s:
            return True
        return super().delays(now, earlier, ready_s, cost)

    def absorb(self, other: "TokenPool") -> None:
        """Also count what was sent with an earlier token of the same user, and keep to its pause."""
        if other in self.absorbed:
            return
        self.absorbed.append(other)
        if self.window is not None and other.window is not None:
            for at, amount in other.window.uses:
                self.window.used(at, amount)
        if other.pause.probing:
            self.pause.hold(other.pause.until)

    def clear(self, now: float) -> bool:
        """See `Pool.clear`."""
        self.on_wire = 0
        idle = now - self.pause.until >= RECOVERY_S and self.pacer.idle(now)
        return super().clear(now) and idle


class Pools:
    """The pools of one process.

    Attributes:
        lock: Guards all of them: limiters in several threads may use them.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self._pools: dict[tuple[str, ...], Pool] = {}

    def lane(self, endpoint: str, account: str, workflow: str, margin_s: float) -> Pool:
        """The pool of a workflow."""
        new = Pool(_lane_limit, INSTANCE_PERIOD_S, margin_s, BURST_FACTOR)
        return self._pools.setdefault(("lane", endpoint, account, workflow), new)

    def account(self, endpoint: str, account: str, margin_s: float) -> Pool:
        """The pool of an account."""
        new = Pool(_account_limit, INSTANCE_PERIOD_S, margin_s, BURST_FACTOR)
        return self._pools.setdefault(("account", endpoint, account), new)

    def token(self, endpoint: str, fingerprint: str, new: TokenPool) -> TokenPool:
        """The pool of a token; *new* if there is none yet."""
        pool = self._pools.setdefault(("token", endpoint, fingerprint), new)
        assert isinstance(pool, TokenPool)
        return pool

    def drop_idle(self, now: float) -> None:
        """Drop the pools that no run uses and in which nothing counts any more."""
        for key, pool in list(self._pools.items()):
            if not pool.users and pool.clear(now):
                del self._pools[key]


def _lane_limit(limits: Iterable[RateLimits]) -> int | None:
    return min((one.instances_per_s for one in limits if one.instances_per_s is not None), default=None)


def _request_limit(limits: Iterable[RateLimits]) -> int | None:
    return min((one.requests_per_5m for one in limits if one.requests_per_5m is not None), default=None)


def _account_limit(limits: Iterable[RateLimits]) -> int | None:
    most = ACCOUNT_INSTANCES_PER_S
    for one in limits:
        if one.instances_per_s is None:
            return None
        most = max(most, one.instances_per_s)
    return most
