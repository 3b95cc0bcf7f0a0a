"""The instances of one workflow, their descriptions, and the pages of their list. Pure.

Docstrings name the evidence for each rule, as in `state.py`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, NamedTuple

from bulkwf.emulator.batch import Item
from bulkwf.emulator.limits import SlidingWindow

MAX_PER_PAGE = 100
USUAL_PER_PAGE = 25
STATUSES = (
    "queued", "running", "paused", "errored", "terminated", "complete", "waiting", "waitingForPause", "rollingBack",
)  # fmt: skip

_NUMBER = re.compile("[0-9]{1,15}", re.ASCII)
_EPOCH = datetime.fromtimestamp(0, UTC)


class QueryRefusedError(Exception):
    """The query of a list is invalid. The message gives the reason."""


class Record(NamedTuple):
    """What is stored about one instance. Its params are not stored."""

    created_at: float
    expires_at: float
    fails: bool = False


@dataclass(frozen=True, slots=True)
class Query:
    """Which instances to list, and which page of them.

    `cursor`: position of an instance; only instances created before it are listed. `skip`: number of matching instances
    before the page. `since_ms`, `until_ms`: Unix times in milliseconds, both included.
    """

    per_page: int
    cursor: int | None
    skip: int
    status: str | None
    since_ms: float
    until_ms: float


def read_query(query: Mapping[str, str]) -> Query:
    """Read the query of a list. Raises `QueryRefusedError`.

    Documented: `per_page`; `cursor`, or instead `page`, which is deprecated; `status`; `date_start` and `date_end`, ISO
    8601 in UTC. Measured: a page has at most 100 instances, by default 25; an unknown status is refused, and so is a
    start after the end.
    """
    per_page = _number(query, "per_page", USUAL_PER_PAGE)
    page = _number(query, "page", 1)
    if not 1 <= per_page <= MAX_PER_PAGE:
        raise QueryRefusedError(f"per_page is 1 to {MAX_PER_PAGE}")
    if page < 1 or ("page" in query and "cursor" in query):
        raise QueryRefusedError("page counts from 1, and excludes a cursor")
    status = query.get("status")
    if status is not None and status not in STATUSES:
        raise QueryRefusedError(f"status is one of {', '.join(STATUSES)}")
    since_ms, until_ms = _unix_ms(query, "date_start", -math.inf), _unix_ms(query, "date_end", math.inf)
    if since_ms > until_ms:
        raise QueryRefusedError("date_start is after date_end")
    return Query(
        per_page=per_page,
        cursor=_number(query, "cursor", 0) if "cursor" in query else None,
        skip=(page - 1) * per_page,
        status=status,
        since_ms=since_ms,
        until_ms=until_ms,
    )


def _number(query: Mapping[str, str], name: str, usual: int) -> int:
    text = query.get(name)
    if text is None:
        return usual
    if not _NUMBER.fullmatch(text):
        raise QueryRefusedError(f"{name} {text[:40]!r} is not a number")
    return int(text)


def _unix_ms(query: Mapping[str, str], name: str, usual: float) -> float:
    text = query.get(name)
    if text is None:
        return usual
    try:
        if not text.endswith("Z"):
            raise ValueError  # noqa: TRY301 - the same refusal
        return (datetime.fromisoformat(text) - _EPOCH) / timedelta(milliseconds=1)
    except (ValueError, OverflowError):
        raise QueryRefusedError(f"{name} {text[:40]!r} is not an ISO 8601 time in UTC") from None


@dataclass(slots=True)
class Instances:
    """The instances of one workflow.

    `queued_s`: time that an instance is queued before it is complete. `epoch`: Unix time at which the clock was 0.
    """

    workflow_id: str
    version_id: str
    queued_s: float
    epoch: float
    queue: SlidingWindow = field(init=False)
    held: dict[str, Record] = field(default_factory=dict)
    _order: list[str] = field(default_factory=list)
    """Every id ever created, in the order of its first creation. None is removed: cursors are positions in it."""

    def __post_init__(self) -> None:
        self.queue = SlidingWindow(self.queued_s)

    def taken(self, id_: str, now: float) -> bool:
        """Whether an id is taken. Documented: it is free again after the retention of its instance."""
        record = self.held.get(id_)
        return record is not None and record.expires_at > now

    def ids(self, now: float) -> list[str]:
        """The ids that are taken now, in the order of their first creation."""
        return [id_ for id_, record in self.held.items() if record.expires_at > now]

    def begin(self, items: Sequence[Item], now: float, retention_s: float, failing: AbstractSet[str]) -> None:
        """Create the instances. Unknown; our choice: the retention of an id begins with its creation."""
        usual = Record(now, now + retention_s)  # shared, so that a million ids cost little memory
        held = self.held
        for item in items:
            id_, own = item.id, item.retention_s
            if id_ not in held:
                self._order.append(id_)
            if own is None and id_ not in failing:
                held[id_] = usual
            else:
                held[id_] = Record(now, now + (retention_s if own is None else own), id_ in failing)
        self.queue.add(now, len(items))

    def forget(self, id_: str, now: float) -> bool:
        """Delete an instance; False if there is none. Measured: its id is free again."""
        if not self.taken(id_, now):
            return False
        self.held[id_] = self.held[id_]._replace(
            expires_at=-math.inf
        )  # its position is kept, or cursors would skip others
        return True

    def status(self, record: Record, now: float) -> str:
        """The status at *now*. Unknown; our choice: a failing one fails at once, others are queued, then complete."""
        if record.fails:
            return "errored"
        return "complete" if now >= record.created_at + self.queued_s else "queued"

    def counts(self, now: float) -> dict[str, int]:
        """The number of instances by status."""
        counts = dict.fromkeys(STATUSES, 0)
        for record in self.held.values():
            if record.expires_at > now:
                counts[self.status(record, now)] += 1
        return counts

    def describe(self, id_: str, now: float) -> dict[str, Any]:
        """The description of one instance, as a look-up gives it."""
        record = self.held[id_]
        end = self._end(record, now)
        return {
            "status": self.status(record, now),
            "queued": self._iso(record.created_at),
            "start": end,
            "end": end,
            "success": None if end is None else not record.fails,
            "error": {"name": "Error", "message": "asked to fail"} if record.fails else None,
            "output": None,
            "rollback": None,
            "step_count": 0,
            "trigger": {"source": "api"},
            "versionId": self.version_id,
        }

    def _end(self, record: Record, now: float) -> str | None:
        """When an instance started and ended, as ISO 8601; it takes no time to run. None if it has not ended."""
        ended_at = {"complete": record.created_at + self.queued_s, "errored": record.created_at}
        at = ended_at.get(self.status(record, now))
        return None if at is None else self._iso(at)

    def page(self, query: Query, now: float) -> tuple[list[dict[str, Any]], dict[str, int | str]]:
        """A page of the instances, and its `result_info`. Measured: the newest instances come first.

        Documented: `cursor` leads to the next page. Our choice: a cursor is a position, and stays valid; the last page
        has none. The total is given only if the query has no cursor.
        """
        matching = self._matching(query, now)
        page = list(islice(matching, query.skip, query.skip + query.per_page))
        info: dict[str, int | str] = {"count": len(page), "per_page": query.per_page}
        if query.cursor is None:
            info["page"] = query.skip // query.per_page + 1
            info["total_count"] = sum(1 for _ in self._matching(query, now))
        if len(page) == query.per_page and next(matching, None) is not None:
            info["cursor"] = str(page[-1][0])
        return [self._listed(id_, now) for _, id_ in page], info

    def description(self, name: str, now: float) -> dict[str, Any]:
        """The description of the workflow. Documented: the keys. Our choice: class, and creation at the clock's 0."""
        born = self._iso(0.0)
        return {
            "id": self.workflow_id,
            "name": name,
            "class_name": "Emulated",
            "script_name": "emulated",
            "created_on": born,
            "modified_on": born,
            "triggered_on": self._iso(self.held[self._order[-1]].created_at) if self._order else None,
            "instances": self.counts(now),
        }

    def _matching(self, query: Query, now: float) -> Iterator[tuple[int, str]]:
        end = len(self._order) if query.cursor is None else min(query.cursor, len(self._order))
        matches = self._filter(query, now)
        return ((position, self._order[position]) for position in range(end - 1, -1, -1) if matches(position))

    def _filter(self, query: Query, now: float) -> Callable[[int], bool]:
        def matches(position: int) -> bool:
            record = self.held[self._order[position]]
            return (
                record.expires_at > now
                and query.since_ms <= self._ms(record.created_at) <= query.until_ms
                and query.status in (None, self.status(record, now))
            )

        return matches

    def _listed(self, id_: str, now: float) -> dict[str, Any]:
        record = self.held[id_]
        created, end = self._iso(record.created_at), self._end(record, now)
        return {
            "id": id_,
            "status": self.status(record, now),
            "created_on": created,
            "modified_on": end or created,
            "started_on": end,
            "ended_on": end,
            "trigger_source": "api",
            "version_id": self.version_id,
            "workflow_id": self.workflow_id,
        }

    def _ms(self, at: float) -> int:
        """Unix time in milliseconds, the precision of answers and queries."""
        return math.floor((self.epoch + at) * 1000)

    def _iso(self, at: float) -> str:
        text = datetime.fromtimestamp(self._ms(at) / 1000, UTC).isoformat(timespec="milliseconds")
        return text.replace("+00:00", "Z")

    def fragment(self, ids: Sequence[str]) -> str:
        """The JSON array of new instances. Ids need no escaping: their pattern allows no such character."""
        if not ids:
            return "[]"
        tail = f'","status":"queued","version_id":"{self.version_id}","workflow_id":"{self.workflow_id}"}}'
        return '[{"id":"' + (tail + ',{"id":"').join(ids) + tail + "]"
