"""A sliding window: what may be sent in its period. Pure."""

from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from math import floor, inf

__all__ = [
    "BLIND_MARGIN_S",
    "LOOPBACK_MARGIN_S",
    "LOWEST_RATE_FACTOR",
    "NETWORK_MARGIN_S",
    "RECOVERY_S",
    "SLACK_S",
    "Window",
]

LOOPBACK_MARGIN_S = 0.007
NETWORK_MARGIN_S = 0.020
BLIND_MARGIN_S = 0.100
"""Margin where the kernel does not report what is still in the socket. At 10 Mbit/s, 128 KB leave in this time, the
first size of a socket's buffer on macOS."""

LOWEST_RATE_FACTOR = 1 / 16

WIDEST_MARGIN_S = 0.250

RECOVERY_S = 10.0
"""A reduced rate rises by a tenth of the full rate after each period of this many seconds without a 429."""

SLACK_S = 0.002
"""Timers end late by up to this many seconds. A use that is late by less does not delay those after it."""

SHORTEST_S = 1e-6
"""Shortest wait, in seconds: a shorter one might not advance the clock."""


class Window:
    """At most `limit` of something in any `period_s` seconds.

    Attributes:
        limit: How much.
        period_s: Length of the period, in seconds.
        margin_s: Time kept free after each use, in seconds, for jitter on the way to the service.
        burst_factor: An empty window is filled at this multiple of its rate; at once if infinite. While the rate is
            reduced, it is 1 at most: a burst would be refused where other clients share the rate.
        lead_s: How much of the margin always passes between the leave to send and the end of writing, in seconds.
        rate_factor: Fraction of the rate that is used at present; below 1 after 429s.
    """

    def __init__(self, limit: int, period_s: float, margin_s: float, burst_factor: float = inf) -> None:
        self.limit = limit
        self.period_s = period_s
        self.margin_s = margin_s
        self.burst_factor = burst_factor
        self.lead_s = 0.0
        self.rate_factor = 1.0
        self._least_margin_s = margin_s
        self._steady_since = -inf
        self._used = 0
        self._reserved = 0
        self._next_at = -inf
        self._written: deque[tuple[float, int]] = deque()

    @property
    def span_s(self) -> float:
        """How long a use counts, in seconds. A reduced rate lengthens the period, so that a batch still fits."""
        return self.period_s / self.rate_factor + max(0.0, self.margin_s - self.lead_s)

    def wait_s(self, now: float, cost: int) -> float:
        """Seconds until *cost* fits; infinite while that depends on a reservation that is not yet written.

        A cost above the limit (a batch begun at another rate) fits alone.
        """
        self._expire(now)
        excess = self._used + self._reserved + min(cost, self.limit) - self.limit
        paced_s = self._next_at - now
        if excess <= 0:
            return paced_s if paced_s > SHORTEST_S else 0.0
        for at, used in self._written:
            excess -= used
            if excess <= 0:
                return max(at + self.span_s - now, paced_s, SHORTEST_S)
        return inf

    def wait_after_s(self, now: float, cost: int, first: int) -> float:
        """Seconds until *cost* fits if *first* is sent now."""
        if min(cost, self.limit) + min(first, self.limit) > self.limit:
            return self.span_s
        return max(self.wait_s(now, cost + first), self._paced_at(now, first) - now)

    def capacity(self, now: float, cost: int, within_s: float) -> int:
        """How many uses of *cost* could begin in the next *within_s* seconds, including those that wait now."""
        self._expire(now)
        span_s, gap_s = self.span_s, self._gap_s(cost)
        spans, rest_s = divmod(within_s, span_s)
        freed = sum(used for _, used in takewhile(lambda use: use[0] + span_s <= now + rest_s, self._written))
        free = max(0, self.limit - self._used - self._reserved + freed)
        fitting = free // cost + int(spans) * (self.limit // cost)
        if gap_s == 0:
            return fitting
        paced = floor((now + within_s - max(self._next_at, now - SLACK_S)) / gap_s) + 1
        return max(0, min(fitting, paced))

    def reserve(self, now: float, cost: int) -> None:
        """Reserve *cost* for a request that is about to be sent."""
        self._reserved += cost
        self._next_at = self._paced_at(now, cost)

    def written(self, at: float, cost: int) -> None:
        """A reserved request was written at *at*: its period begins then."""
        self._reserved -= cost
        self.used(at, cost)

    def used(self, at: float, cost: int) -> None:
        """Something was sent at *at* without a reservation: by an earlier process, for example."""
        self._used += cost
        index = len(self._written)
        while index and self._written[index - 1][0] > at:  # a later one may have become known first
            index -= 1
        self._written.insert(index, (at, cost))

    def give_back(self, cost: int) -> None:
        """A reserved request has not been sent."""
        self._reserved -= cost
        self._next_at -= self._gap_s(cost)

    @property
    def uses(self) -> Sequence[tuple[float, int]]:
        """(when, how much) of what counts, the oldest first."""
        return tuple(self._written)

    def abandon(self, now: float) -> None:
        """Count each reservation as written at *now*. Their holders no longer exist, and may have sent the requests."""
        if self._reserved:
            self.written(now, self._reserved)

    def idle(self, now: float) -> bool:
        """Whether nothing counts any more, and no 429 is recent."""
        self._expire(now)
        return not self._written and not self._reserved and now - self._steady_since >= RECOVERY_S

    # --- the rate after a 429 -------------------------------------------------------------------------------------

    def throttled(self, *, reduce: bool) -> None:
        """The service has refused the rate: widen the margin, and if *reduce*, halve the rate, too."""
        self.margin_s = min(WIDEST_MARGIN_S, self.margin_s * 2)
        if reduce or self.rate_factor < 1.0:
            self.rate_factor = max(LOWEST_RATE_FACTOR, self.rate_factor / 2)

    def recover_from(self, at: float) -> None:
        """Let the rate recover from *at* on."""
        self._steady_since = at

    def recover(self, now: float) -> None:
        """A request was accepted: restore a step of the rate if the last step is old enough."""
        if now - self._steady_since >= RECOVERY_S:
            self._steady_since = now
            self.rate_factor = min(1.0, round(self.rate_factor + 0.1, 6))
            self.margin_s = max(self._least_margin_s, self.margin_s / 2)

    def _paced_at(self, now: float, cost: int) -> float:
        """When the next use may begin if one of *cost* begins now."""
        return max(self._next_at, now - SLACK_S) + self._gap_s(cost)

    def _gap_s(self, cost: int) -> float:
        """Seconds from the begin of a use of *cost* to the next one."""
        burst_factor = self.burst_factor if self.rate_factor == 1.0 else min(1.0, self.burst_factor)
        return self.period_s / self.rate_factor * min(1.0, cost / self.limit) / burst_factor

    def _expire(self, now: float) -> None:
        written, oldest = self._written, now - self.span_s
        while written and written[0][0] <= oldest:
            self._used -= written.popleft()[1]
