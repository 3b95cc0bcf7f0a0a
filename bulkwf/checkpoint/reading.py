"""Reading a checkpoint, by any process, at any time."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, get_args

import orjson

from bulkwf.checkpoint.file import connect_reader, explained, stored_boot
from bulkwf.checkpoint.schema import HEADER_FIELDS, TOTALS, YEAR_9999, Past, RunHeader
from bulkwf.errors import CheckpointError
from bulkwf.model import UNKNOWN_BOOT, Boot, Result, RowOutcome
from bulkwf.progress import Totals
from bulkwf.windows import Said

__all__ = [
    "LAST_WORDS",
    "PAGE_BATCHES",
    "Status",
    "past",
    "read_boot",
    "read_results",
    "read_run_past",
    "read_status",
    "results",
]

PAGE_BATCHES = 1_000
MOST_RECENT = 100_000
"""The newest attempts, among which recent ones are looked for: far more than any limit lets through."""
LAST_WORDS = 64
"""Of the service on what is left for the token: among so many are those that may have overtaken each other."""
RESULT_PAGE_BATCHES = 50
"""A batch of a thousand invalid rows holds a thousand reasons."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A checkpoint as `bulkwf status` shows it."""

    header: RunHeader
    created_at: float
    finished_at: float | None
    pause_until: float | None
    rows: int
    batches: int
    batches_in_doubt: int
    totals: Totals
    attempts: int
    first_begun_at: float | None
    """When its first batch was begun; None if none was."""
    last_settled_at: float | None
    """When something was last settled; None if nothing was."""


def read_results(
    path: str | os.PathLike[str],
    *,
    outcome: RowOutcome | None = None,
) -> Iterator[Result]:
    """What has become of each row, in the order of the rows. The run may be under way.

    Args:
        path: The checkpoint.
        outcome: Only the rows that came to this: `created`, `existed`, `rejected`, `invalid`, or `pending`.
            None lists all rows but the pending ones.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
    """
    if outcome is not None and outcome not in get_args(RowOutcome):
        raise ValueError(f"outcome must be one of {', '.join(get_args(RowOutcome))}, not {outcome!r}")
    return _read_results(Path(path), outcome)


def _read_results(path: Path, outcome: RowOutcome | None) -> Iterator[Result]:
    # The counts of a batch tell whether it holds such a row at all: the few of ten million are found at once.
    holds = f"{outcome} > 0" if outcome else "TRUE"
    query = (
        f"SELECT first_row, ids, answer, exceptions, attempts FROM batch WHERE {holds} AND first_row > ? "  # noqa: S608
        "ORDER BY first_row LIMIT ?"
    )
    with explained(path), contextlib.closing(connect_reader(path)) as db:
        after = -1
        # Pages, not one long query: an open reader would keep the writer's log from being folded into the file.
        while page := db.execute(query, (after, RESULT_PAGE_BATCHES)).fetchall():
            for batch in page:
                yield from results(outcome, *batch)
            if page[-1][0] <= after:
                raise CheckpointError(
                    f"{path}: the checkpoint is damaged: its rows are out of order. Restore it from a copy."
                )
            after = page[-1][0]


def results(
    outcome: RowOutcome | None,
    first_row: int,
    ids: str,
    answer: str | None,
    exceptions: str | None,
    attempts: int,
) -> Iterator[Result]:
    """The results of one batch, from its columns."""
    shared: dict[str, Any] = {"outcome": "pending"}
    if answer is not None:
        shared = {"outcome": "created", **orjson.loads(answer)}
    odd = orjson.loads(exceptions) if exceptions else {}
    for offset, instance_id in enumerate(orjson.loads(ids)):
        entry = odd.get(str(offset))
        if entry is None:
            if instance_id is None:  # a blank line
                continue
            entry = shared
        if entry["outcome"] == outcome or (outcome is None and entry["outcome"] != "pending"):
            sent = attempts if entry["outcome"] != "invalid" else 0
            yield Result(**{"id": instance_id, **entry}, row=first_row + offset, attempts=sent)


def read_status(path: str | os.PathLike[str]) -> Status:
    """What a checkpoint says of its run as a whole. The run may be under way.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
    """
    path = Path(path)
    with explained(path), contextlib.closing(connect_reader(path)) as db:
        db.execute("BEGIN")
        columns = (*HEADER_FIELDS, "created_at", "finished_at", "pause_until")
        run = db.execute(f"SELECT {', '.join(columns)} FROM run").fetchone()  # noqa: S608 - names of ours
        totals = db.execute(TOTALS).fetchone()
        attempts = db.execute("SELECT count(*) FROM attempt WHERE verdict <> 'interrupted'").fetchone()[0]
        times = db.execute("SELECT min(begun_at), max(settled_at) FROM batch").fetchone()
        known = dict(zip(columns, run, strict=True))
        return Status(
            header=RunHeader(**{name: str(known[name]) for name in HEADER_FIELDS}),
            created_at=_moment(known["created_at"]) or 0.0,
            finished_at=_moment(known["finished_at"]),
            pause_until=_moment(known["pause_until"]),
            rows=int(totals[6]),
            batches=int(totals[7]),
            batches_in_doubt=int(totals[8]),
            totals=Totals(*map(int, totals[:6])),
            attempts=attempts,
            first_begun_at=_moment(times[0]),
            last_settled_at=_moment(times[1]),
        )


def _moment(stored: Any) -> float | None:
    """A Unix time that calendars know."""
    if stored is None:
        return None
    if not 0 <= stored < YEAR_9999:
        raise ValueError("no time of day")
    return float(stored)


def read_boot(path: Path) -> Boot:
    """How the times of the last session are counted in the checkpoint at *path*."""
    with explained(path), contextlib.closing(connect_reader(path)) as db:
        return stored_boot(db)


def past(db: sqlite3.Connection, since: float) -> Past:
    """What a checkpoint knows of the requests after *since* (Unix time), and of what may bind the next one."""
    pause_until = db.execute("SELECT pause_until FROM run").fetchone()[0]
    oldest = db.execute("SELECT coalesce(max(id), 0) FROM attempt").fetchone()[0] - MOST_RECENT
    query = (
        "SELECT started_at + elapsed_s AS at, started_at, quota FROM attempt WHERE quota IS NOT NULL AND id > ? "
        "ORDER BY id DESC LIMIT ?"
    )
    words = sorted(Said.of(*word) for word in db.execute(query, (oldest, LAST_WORDS)))
    since = min([since, *(said.heard_at for said in words)])
    query = "SELECT started_at + elapsed_s AS at, instances FROM attempt WHERE at > ? AND id > ? ORDER BY at"
    attempts = [(float(at), index(instances)) for at, instances in db.execute(query, (since, oldest))]
    return Past(attempts, 0.0 if pause_until is None else float(pause_until), words)


def read_run_past(path: Path, since: float, boot: Boot = UNKNOWN_BOOT) -> Past:
    """What `past` says of the checkpoint at *path*; *since* and the times given are counted by *boot*."""
    with explained(path), contextlib.closing(connect_reader(path)) as db:
        shift_s = boot.shift_s(stored_boot(db))
        return past(db, since - shift_s).shifted(shift_s)
