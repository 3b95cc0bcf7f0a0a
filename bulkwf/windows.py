"""The rate windows and the pause: arithmetic on a clock that is an argument. Pure.

A service that counts in sliding windows sees a request when its body arrives. So a place in a window is reserved before
sending, and runs its period from the moment the body has been written; token buckets, which count from the decision to
send, overrun such a window by up to the double.
"""

import re
from collections import deque
from collections.abc import Mapping
from itertools import takewhile
from math import floor, inf

__all__ = ["Pace", "Window", "pause_s"]

LOWEST_SHARE = 1 / 16
SLACK_S = 0.002
"""Timers end late by so much: a use that is late by less does not put off those behind it."""
LONGEST_QUOTA_S = 3_600
"""A header that speaks of a longer window is taken for this one: it would stop the run without a word."""
SHORTEST_S = 1e-6
"""A shorter wait might not move the clock at all."""
_QUOTA = re.compile(r"\br=([0-9]{1,9})\s*;\s*t=([0-9]{1,9})\b", re.ASCII)


class Window:
    """At most `limit` of something in any `period_s` seconds.

    Attributes:
        limit: How much.
        period_s: In how long.
        margin_s: Kept free behind each use, against jitter on the way to the service.
        haste: An empty window is filled at so many times its rate; at once if infinite. Never faster than its rate
            while that is lowered: whoever shares it would be refused.
        lead_s: How much of the margin passes anyway between the leave to send and the end of writing.
        share: What part of the rate is used at present; below 1 after it has been refused.
    """

    def __init__(self, limit: int, period_s: float, margin_s: float, haste: float = inf) -> None:
        self.limit = limit
        self.period_s = period_s
        self.margin_s = margin_s
        self.haste = haste
        self.lead_s = 0.0
        self.share = 1.0
        self._used = 0
        self._reserved = 0
        self._next_at = -inf
        self._written: deque[tuple[float, int]] = deque()

    @property
    def span_s(self) -> float:
        """How long a use counts: a refused rate is lowered by stretching the period, so that a batch still fits."""
        return self.period_s / self.share + max(0.0, self.margin_s - self.lead_s)

    def wait_s(self, now: float, cost: int) -> float:
        """Seconds until *cost* fits; infinite while that hangs on a reservation not yet written.

        What is larger than the limit (a batch begun at another rate) fits alone.
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

    def turns(self, now: float, cost: int, within_s: float) -> int:
        """How many uses of *cost* could begin in the next *within_s* seconds, whoever waits already included."""
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
        """Take places for something that is about to be sent."""
        self._reserved += cost
        self._next_at = max(self._next_at, now - SLACK_S) + self._gap_s(cost)

    def written(self, at: float, cost: int) -> None:
        """What was reserved was sent at *at*: its period runs from then."""
        self._reserved -= cost
        self.used(at, cost)

    def used(self, at: float, cost: int) -> None:
        """Something was sent at *at* without a reservation: by an earlier process, say."""
        self._used += cost
        place = len(self._written)
        while place and self._written[place - 1][0] > at:  # which may have become known first
            place -= 1
        self._written.insert(place, (at, cost))

    def give_back(self, cost: int) -> None:
        """What was reserved has not been sent."""
        self._reserved -= cost
        self._next_at -= self._gap_s(cost)

    def _gap_s(self, cost: int) -> float:
        """How long after a use of *cost* the next one may go."""
        haste = self.haste if self.share == 1.0 else min(1.0, self.haste)
        return self.period_s / self.share * min(1.0, cost / self.limit) / haste

    def _expire(self, now: float) -> None:
        written, oldest = self._written, now - self.span_s
        while written and written[0][0] <= oldest:
            self._used -= written.popleft()[1]


class Pace:
    """The gap between requests that the service's `Ratelimit` header asks for.

    `r` requests are left in the next `t` seconds, for all tools that share the token. Where that is less than our own
    limit would let through, requests are spread over what is left instead of running into the wall.
    """

    def __init__(self, requests_per_s: float) -> None:
        self._allowed = requests_per_s
        self._sent_at = -inf
        self._gap_s = 0.0
        self._valid_until = -inf

    def observe(self, now: float, headers: Mapping[str, str]) -> bool:
        """Take in an answer's headers; True if they say that nothing is left."""
        told = _QUOTA.findall(headers.get("ratelimit", ""))
        quotas = [(int(left), min(int(seconds), LONGEST_QUOTA_S)) for left, seconds in told]
        if not quotas:
            return False
        self._gap_s = max(self._gap(left, seconds) for left, seconds in quotas)
        self._valid_until = now + max(seconds for _, seconds in quotas)
        if any(left == 0 for left, _ in quotas):
            self._sent_at = now  # nothing is left from now on, whenever the last request went
            return True
        return False

    def turns(self, now: float, within_s: float) -> float:
        """How many requests may go in the next *within_s* seconds; infinite if only our own limits say."""
        wait_s = self.wait_s(now)
        if wait_s > within_s:
            return 0
        return inf if now + within_s >= self._valid_until or not self._gap_s else (within_s - wait_s) // self._gap_s + 1

    def wait_s(self, now: float) -> float:
        """Seconds until the next request may go. What was said of a window ends with that window."""
        return max(0.0, min(self._sent_at + self._gap_s, self._valid_until) - now)

    def sent(self, now: float) -> None:
        """A request goes now."""
        self._sent_at = now

    def _gap(self, left: int, seconds: int) -> float:
        if left == 0:
            return float(seconds)
        return seconds / left if left / max(seconds, 1) < self._allowed else 0.0


def pause_s(refusals: int, ordered_s: float | None) -> float:
    """How long all sending stops after a 429.

    Args:
        refusals: 429s in a row, this one included.
        ordered_s: What `Retry-After` says, which is never shortened; None if it says nothing.
    """
    doubled = 2.0 ** min(refusals - 1, 5)
    if ordered_s is not None:
        return max(ordered_s, doubled)  # an order of 0 s again and again is no leave to hammer
    return min(300.0, 10.0 * doubled)
