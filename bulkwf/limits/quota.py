"""What the service says is left for the token, and pacing by it. Pure."""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Any, NamedTuple, Self

__all__ = ["QuotaPacer", "Said", "quota_text"]

LONGEST_QUOTA_S = 3_600
"""Longest period of a reported quota, in seconds. A longer one is cut: it would stop the run without a message."""

_QUOTA = re.compile(r"\br=([0-9]{1,9})\s*;\s*t=([0-9]{1,9})\b", re.ASCII)


def quota_text(headers: Mapping[str, str]) -> str | None:
    """The quota that an answer's `Ratelimit` header reports, as it is stored: `r=<requests>;t=<seconds>,…`; else None.

    Args:
        headers: With lower-case names.
    """
    return ",".join(f"r={int(left)};t={int(seconds)}" for left, seconds in _parse(headers.get("ratelimit", ""))) or None


def _parse(text: str) -> list[tuple[str, str]]:
    return _QUOTA.findall(text)


class Said(NamedTuple):
    """The quota of a token that an answer reports. Times are in seconds of any clock.

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
        """From the columns of a file. Raises `TypeError` or `ValueError` for values that no run writes."""
        if not isinstance(text, str):
            raise TypeError("a quota is a text")
        return cls(float(heard_at), float(sent_at), text)


class QuotaPacer:
    """Spaces requests by the quota that the service's `Ratelimit` header reports.

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
        """Process the quota that an answer reports; True if nothing is left of it.

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

    def restore(self, now: float, reports: Iterable[Said], sent: Sequence[float]) -> bool:
        """Restore the quotas that an earlier process has heard of; True if nothing is left.

        Args:
            now: By the clock of the reports.
            reports: Its last quotas, the oldest first. Those before the last one heard here are ignored.
            sent: When it sent, or may have sent, requests, the oldest first. Those after the report that counts are
                subtracted from it, although the service may have done that already. May be later than *now*, if a
                clock was set back.
        """
        heard_at = self._heard_at
        for said in reports:
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
        """Discard the reported quota."""
        self._gap_s, self._left, self._valid_until = 0.0, [], -inf

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
