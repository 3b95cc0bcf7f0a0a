"""The rate windows and the pause: arithmetic on a clock that is an argument. Pure.

A service that counts in sliding windows sees a request when its body arrives. So a place in a window is reserved before
sending, and runs its period from the moment the body has been written; token buckets, which count from the decision to
send, overrun such a window by up to the double.
"""

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from math import floor, inf
from typing import Any, NamedTuple, Self

__all__ = ["Pace", "Said", "Window", "pause_s", "quota_text"]

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


def quota_text(headers: Mapping[str, str]) -> str | None:
    """What an answer's `Ratelimit` header says is left, as it is stored: `r=<requests>;t=<seconds>,…`; None if nothing.

    Args:
        headers: With lower-case names.
    """
    return ",".join(f"r={int(left)};t={int(seconds)}" for left, seconds in _told(headers.get("ratelimit", ""))) or None


def _told(text: str) -> list[tuple[str, str]]:
    return _QUOTA.findall(text)


class Said(NamedTuple):
    """What an answer said is left for the token. Times are in seconds of any clock.

    Attributes:
        heard_at: When the answer came.
        sent_at: When its request went.
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


class Pace:
    """What the service's `Ratelimit` header lets through.

    `r` requests are left in the next `t` seconds, for all tools that share the token. No more go until another answer
    tells. Where it is less than our own limit would let through, they are spread over the time.
    """

    def __init__(self, requests_per_s: float) -> None:
        self._allowed = requests_per_s
        self._sent_at = -inf
        self._heard_at = -inf
        self._left: list[tuple[int, float]] = []
        """Of each of the service's windows: how many requests may still go, and when it ends."""
        self._gap_s = 0.0
        self._valid_until = -inf

    def observe(self, said: Said) -> bool:
        """Take in what an answer says; True if it says that nothing is left.

        Answers overtake each other: one to a request that went before the last word was heard may be the older one of
        the two, so it can tighten the pace, not loosen it.
        """
        quotas = [(int(left), min(int(seconds), LONGEST_QUOTA_S)) for left, seconds in _told(said.text)]
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
            self._sent_at = said.heard_at  # nothing is left from then on, whenever the last request went
        return least == 0

    def restore(self, now: float, words: Iterable[Said], sent: Sequence[float]) -> bool:
        """Take over what was said to an earlier process; True if nothing is left of it.

        Args:
            now: By the clock of the words.
            words: What its last answers said, the oldest first.
            sent: When requests went or may have gone, the oldest first. Those after the word that counts are taken off
                it, although the service may have done that already. May be later than *now*, if a clock was set back.
        """
        for said in words:
            self.observe(said)
        ahead_s = max(0.0, self._heard_at - now)
        later = sum(at > self._heard_at for at in sent)
        self._left = [(left - later, until - ahead_s) for left, until in self._left]
        self._valid_until -= ahead_s
        self._sent_at = min(max([self._sent_at, *sent]), now)
        return any(left <= 0 for left, _ in self._left)

    @property
    def _spent_until(self) -> float:
        """When the last of the windows ends that nothing is left of."""
        return max((until for left, until in self._left if left <= 0), default=-inf)

    @property
    def binds(self) -> bool:
        """Whether what was said holds requests back."""
        return self._gap_s > 0 or any(left <= 0 for left, _ in self._left)

    def expired(self, now: float) -> bool:
        """Whether what holds requests back was said of a window that has ended, and nothing has been said since."""
        return self.binds and now >= self._valid_until

    def forget(self) -> None:
        """Let what was said hold nothing back any more."""
        self._gap_s, self._left = 0.0, []

    def turns(self, now: float, within_s: float) -> float:
        """How many requests may go in the next *within_s* seconds; infinite if only our own limits say."""
        wait_s = self.wait_s(now)
        if wait_s > within_s:
            return 0
        left = min((left for left, until in self._left if until > now + within_s), default=inf)
        if now + within_s >= self._valid_until or not self._gap_s:
            return left
        return min(left, (within_s - wait_s) // self._gap_s + 1)

    def wait_s(self, now: float) -> float:
        """Seconds until the next request may go. What was said of a window ends with that window."""
        return max(0.0, self._spent_until - now, min(self._sent_at + self._gap_s, self._valid_until) - now)

    def sent(self, now: float) -> None:
        """A request goes now."""
        self._sent_at = now
        self._left = [(left - 1, until) for left, until in self._left]

    def unsent(self, at: float) -> None:
        """What was to go at *at* has not gone."""
        if at > self._heard_at:  # the last word takes no account of what came before it
            self._left = [(left + 1, until) for left, until in self._left]

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
