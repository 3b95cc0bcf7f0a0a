"""The service's limits, and the sliding windows that enforce them. Pure: `now` is an argument."""

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal, Self

REQUEST_WINDOW_S = 300.0
BLOCK_S = 300.0
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of the service. `None` means no limit."""

    instances_per_s: float | None = 100
    """New instances in any second, for one workflow. Documented; each instance of a batch counts."""

    account_instances_per_s: float | None = 300
    """New instances in any second, for one account. Documented."""

    requests_per_5m: int | None = 1200
    """Requests in any five minutes, for one token. Documented."""

    max_queued: int | None = None
    """Queued instances of one workflow. Documented: 100,000 or 2,000,000. Unknown: what happens above the limit."""

    when_full: Literal["omit", "refuse"] = "omit"
    """What a full queue does: omit instances from the answer without an error, or refuse the batch (429). Unknown."""

    retention_s: float = 3 * DAY_S
    """How long an id stays taken, in seconds. Documented: 3 days on the free plan, 30 days on the paid one."""

    max_params_bytes: int = 1 << 20
    """Maximum size of the params of one instance, in bytes. Documented: 1 MiB."""

    max_body_bytes: int = 32 << 20
    """Maximum size of the body of one request, in bytes. Unknown; our choice: that of the local engine."""

    @classmethod
    def none(cls) -> Self:
        """Limits without rates and without a maximum of queued instances. Sizes and retention keep their defaults."""
        return cls(instances_per_s=None, account_instances_per_s=None, requests_per_5m=None)


class SlidingWindow:
    """Counts the arrivals in the half-open interval (now - length_s, now]."""

    __slots__ = ("_arrivals", "_total", "length_s")

    def __init__(self, length_s: float) -> None:
        self.length_s = length_s
        self._arrivals: deque[tuple[float, int]] = deque()
        self._total = 0

    def count(self, now: float) -> int:
        """Number of arrivals in the window at `now`. Older arrivals are removed."""
        arrivals = self._arrivals
        horizon = now - self.length_s
        while arrivals and arrivals[0][0] <= horizon:
            self._total -= arrivals.popleft()[1]
        return self._total

    def add(self, now: float, n: int) -> int:
        """Add `n` arrivals at `now`; returns the number in the window."""
        self._arrivals.append((now, n))
        self._total += n
        return self.count(now)

    def room_in_s(self, now: float, n: int, limit: float) -> float:
        """Time until `n` more arrivals fit under `limit`, in seconds; the window's length if they never will."""
        excess = self.count(now) + n - limit
        wait_s = 0.0
        for arrived_at, arrived in self._arrivals:
            if excess <= 0:
                break
            excess -= arrived
            wait_s = arrived_at + self.length_s - now
        return wait_s if excess <= 0 else self.length_s

    def oldest_leaves_in_s(self, now: float) -> float:
        """Time until the oldest arrival leaves the window, in seconds; the window's length if the window is empty."""
        self.count(now)
        return self._arrivals[0][0] + self.length_s - now if self._arrivals else self.length_s


class RequestLimit:
    """The requests of one token. Documented: exceeding the limit blocks every call of the token for five minutes."""

    __slots__ = ("_blocked_until", "_limit", "_window")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._window = SlidingWindow(REQUEST_WINDOW_S)
        self._blocked_until = -math.inf

    def admit(self, now: float) -> float:
        """Count a request and return 0.0; if it is refused, return how much longer the block lasts, in seconds.

        Unknown; our choice: a refused request is not counted, and does not make the block longer.
        """
        if now < self._blocked_until:
            return self._blocked_until - now
        if self._window.count(now) >= self._limit:
            self._blocked_until = now + BLOCK_S
            return BLOCK_S
        self._window.add(now, 1)
        return 0.0

    def headers(self, now: float) -> dict[str, str]:
        """The rate limit headers. Documented: r requests are left, t seconds remain until the reset.

        Unknown; our choice: t is the time until the oldest request leaves the window, or the block ends.
        """
        if now < self._blocked_until:
            left, reset_s = 0, self._blocked_until - now
        else:
            left, reset_s = self._limit - self._window.count(now), self._window.oldest_leaves_in_s(now)
        return {
            "Ratelimit": f'"default";r={left};t={math.ceil(reset_s)}',
            "Ratelimit-Policy": f'"default";q={self._limit};w={REQUEST_WINDOW_S:.0f}',
        }
