"""The sliding windows, the quota that the service reports, and the length of a pause. Pure: time is an argument.

A service that counts in sliding windows counts a request when its body arrives. So capacity is reserved before sending,
and is used for one period from the moment the body has been written. Token buckets count from the decision to send, and
overrun such a window by up to the double.
"""

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from math import floor, inf
from typing import Any, NamedTuple, Self

__all__ = ["QuotaPacer", "Said", "Window", "pause_s", "quota_text"]

LOWEST_RATE_FACTOR = 1 / 16
WIDEST_MARGIN_S = 0.250
RECOVERY_S = 10.0
"""A reduced rate rises by a tenth of the full rate after each period of this many seconds without a 429."""
SLACK_S = 0.002
"""Timers end late by up to this many seconds. A use that is late by less does not delay those after it."""
LONGEST_QUOTA_S = 3_600
"""Longest quota period that is believed, in seconds: a longer one would stop the run without a message."""
SHORTEST_S = 1e-6
"""Shortest wait, in seconds: a shorter one might not advance the clock."""
_QUOTA = re.compile(r"\br=([0-9]{1,9})\s*;\s*t=([0-9]{1,9})\b", re.ASCII)


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
        """How many uses of *cost* could begin in the next *within_s* seconds, those that wait now included."""
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
        place = len(self._written)
        while place and self._written[place - 1][0] > at:  # a later one may have become known first
            place -= 1
        self._written.insert(place, (at, cost))

    def give_back(self, cost: int) -> None:
        """A reserved request has not been sent."""
        self._reserved -= cost
        self._next_at -= self._gap_s(cost)

    @property
    def uses(self) -> Sequence[tuple[float, int]]:
        """(when, how much) of what counts, the oldest first."""
        return tuple(self._written)

    def abandon(self, now: float) -> None:
        """Count all that is reserved as written now: those that hold the reservations no longer exist."""
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


def quota_text(headers: Mapping[str, str]) -> str | None:
    """What an answer's `Ratelimit` header says is left, as it is stored: `r=<requests>;t=<seconds>,…`; None if nothing.

    Args:
        headers: With lower-case names.
    """
    return ",".join(f"r={int(left)};t={int(seconds)}" for left, seconds in _parse(headers.get("ratelimit", ""))) or None


def _parse(text: str) -> list[tuple[str, str]]:
    return _QUOTA.findall(text)


class Said(NamedTuple):
    """What an answer says is left for the token. Times are in seconds of any clock.

    Attributes:
        heard_at: When the answer came.
        sent_at: When its request was sent.
        text: The `Ratelimit` header, or what `quota_text` has made of it.
    """

    heard_at: float
    sent_at: float
    text: str

    @classmethod
    def of(cls, heard_at: Any, sent_at: Any, text: Any) -> Self:
        """From columns. Raises `TypeError` or `ValueError` if they hold what no run writes."""
        if not isinstance(text, str):
            raise TypeError("a quota is a text")
        return cls(float(heard_at), float(sent_at), text)


class QuotaPacer:
    """Paces requests by the quota that the service's `Ratelimit` header reports.

    `r` requests are left in the next `t` seconds, for all clients that share the token. No more are sent until another
    answer reports a quota. Where that is less than `requests_per_s` would send, they are spread over the time.

    Attributes:
        requests_per_s: The rate that our own limit allows.
    """

    def __init__(self, requests_per_s: float) -> None:
        self.requests_per_s = requests_per_s
        self._sent_at = -inf
        self._heard_at = -inf
        self._left: list[tuple[int, float]] = []
        """For each of the service's windows: how many requests may still be sent, and when it ends."""
        self._gap_s = 0.0
        self._valid_until = -inf

    def observe(self, said: Said) -> bool:
        """Take in what an answer says; True if it says that nothing is left.

        Answers overtake each other. One whose request was sent before the last report was heard may be the older of
        the two, so it can tighten the pace, but not loosen it.
        """
        quotas = [(int(left), min(int(seconds), LONGEST_QUOTA_S)) for left, seconds in _parse(said.text)]
        if not quotas:
            return False
        gap_s, least = max(self._gap(*quota) for quota in quotas), min(left for left, _ in quotas)
        overlapping = said.sent_at < self._heard_at and said.heard_at < self._valid_until
        spent_longer = any(left == 0 and said.heard_at + seconds > self._spent_until for left, seconds in quotas)
        if overlapping and not spent_longer and (gap_s, -least) < (self._gap_s, -min(left for left, _ in self._left)):
            return False
        self._heard_at, self._gap_s = said.heard_at, gap_s
        self._left = [(left, said.heard_at + seconds) for left, seconds in quotas]
        self._valid_until = max(until for _, until in self._left)
        if least == 0:
            self._sent_at = said.heard_at  # nothing is left from then on, whenever the last request was sent
        return least == 0

    def restore(self, now: float, words: Iterable[Said], sent: Sequence[float]) -> bool:
        """Take over what the service has said to an earlier process; True if nothing is left of it.

        Args:
            now: By the clock of the words.
            words: What its last answers said, the oldest first. Those before the last one heard here are ignored.
            sent: When it sent, or may have sent, requests, the oldest first. Those after the word that counts are
                subtracted from it, although the service may have done that already. May be later than *now*, if a
                clock was set back.
        """
        heard_at = self._heard_at
        for said in words:
            if said.heard_at > heard_at:
                self.observe(said)
        ahead_s = max(0.0, self._heard_at - now)
        later = sum(at > self._heard_at for at in sent)
        self._left = [(left - later, until - ahead_s) for left, until in self._left]
        self._valid_until -= ahead_s
        self._sent_at = min(max([self._sent_at, *sent]), now)
        return any(left <= 0 for left, _ in self._left)

    @property
    def _spent_until(self) -> float:
        """End of the last window of which nothing is left."""
        return max((until for left, until in self._left if left <= 0), default=-inf)

    @property
    def binds(self) -> bool:
        """Whether the reported quota delays requests."""
        return self._gap_s > 0 or any(left <= 0 for left, _ in self._left)

    def expired(self, now: float) -> bool:
        """Whether a quota that delays requests was reported for a window that has ended, and none since."""
        return self.binds and now >= self._valid_until

    def idle(self, now: float) -> bool:
        """Whether all windows of the reported quota have ended."""
        return now >= self._valid_until

    def forget(self) -> None:
        """Let the reported quota delay nothing any more."""
        self._gap_s, self._left = 0.0, []

    def capacity(self, now: float, within_s: float) -> float:
        """How many requests may be sent in the next *within_s* seconds; infinite if no reported quota limits them."""
        wait_s = self.wait_s(now)
        if wait_s > within_s:
            return 0
        left = min((left for left, until in self._left if until > now + within_s), default=inf)
        if now + within_s >= self._valid_until or not self._gap_s:
            return left
        return min(left, (within_s - wait_s) // self._gap_s + 1)

    def wait_s(self, now: float) -> float:
        """Seconds until the next request may be sent. A quota ends with the window that it was reported for."""
        if not self._left:
            return 0.0
        return max(0.0, self._spent_until - now, min(self._sent_at + self._gap_s, self._valid_until) - now)

    def sent(self, now: float) -> None:
        """A request is sent now."""
        self._sent_at = now
        if self._left:
            self._left = [(left - 1, until) for left, until in self._left]

    def unsent(self, at: float) -> None:
        """The request that was to be sent at *at* has not been sent."""
        if at > self._heard_at:  # the last report takes no account of what came before it
            self._left = [(left + 1, until) for left, until in self._left]

    def _gap(self, left: int, seconds: int) -> float:
        if left == 0:
            return float(seconds)
        return seconds / left if left / max(seconds, 1) < self.requests_per_s else 0.0


def pause_s(pauses: int, ordered_s: float | None) -> float:
    """Length of a pause of all sending after a 429, in seconds.

    Args:
        pauses: Pauses in a row, this one included.
        ordered_s: What `Retry-After` says, which is never shortened; None if it says nothing.
    """
    doubled = 2.0 ** min(pauses - 1, 5)
    if ordered_s is not None:
        return max(ordered_s, doubled)  # `Retry-After: 0` again and again does not allow a request at once
    return min(300.0, 10.0 * doubled)
