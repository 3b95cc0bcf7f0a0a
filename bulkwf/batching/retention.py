"""How long the service remembers an id. Pure."""

import re
from functools import lru_cache
from operator import attrgetter

import msgspec

from bulkwf.batching.row import Retention

__all__ = ["DEFAULT_RETENTION_S"]

DEFAULT_RETENTION_S = 3 * 86_400.0
"""How long the service remembers an id on the smallest plan, in seconds."""

LONGEST_DURATION = 100
"""Maximum length of a duration, in characters."""

_RETENTION = attrgetter("instance_retention")

_DURATION = re.compile(r"(\d{1,12})\s+(second|minute|hour|day|week|month|year)s?", re.ASCII)

_UNIT_S = {
    "second": 1,
    "minute": 60,
    "hour": 3_600,
    "day": 86_400,
    "week": 604_800,
    "month": 2_592_000,
    "year": 31_536_000,
}


def _seconds(value: int | str) -> float | None:
    if isinstance(value, int):
        return min(value, 10**15) / 1_000 if value > 0 else None  # an integer of any length may not fit a float
    return _duration_s(value) if len(value) <= LONGEST_DURATION else None


@lru_cache(maxsize=256)
def _duration_s(text: str) -> float | None:
    found = _DURATION.fullmatch(text)
    return float(int(found[1]) * _UNIT_S[found[2]]) or None if found else None


def _retention_s(retention: Retention) -> float | None:
    """The shorter of the two retentions, in seconds; None if one is malformed. A missing one has its default."""
    given = [v for v in (retention.success_retention, retention.error_retention) if v is not msgspec.UNSET]
    lengths = [_seconds(value) for value in given]
    if None in lengths:
        return None
    default = [DEFAULT_RETENTION_S] if len(given) < 2 else []
    return min(default + [length for length in lengths if length is not None])
