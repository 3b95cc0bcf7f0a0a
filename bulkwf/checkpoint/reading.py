"""Reads a checkpoint, in any process, also while a run writes it."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import orjson

from bulkwf.checkpoint.attempts import Past, read_past
from bulkwf.checkpoint.errors import Damage, explained
from bulkwf.checkpoint.file import connect_reader
from bulkwf.checkpoint.records import Begun, read_batches, read_run, survey
from bulkwf.checkpoint.schema import RunHeader
from bulkwf.checkpoint.sessions import log_is_missing, warn_of_missing_log
from bulkwf.clock import UNKNOWN_BOOT, Boot
from bulkwf.model import Counts, Result, RowOutcome

__all__ = ["Status", "read_boot", "read_results", "read_run_past", "read_status", "results"]

RESULT_PAGE_BATCHES = 50
"""Number of batches read at a time. Few, because a batch may hold the reasons of a thousand invalid rows."""


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
    counts: Counts
    attempts: int
    first_begun_at: float | None
    """When the first batch was begun; None if none was."""
    last_settled_at: float | None
    """When a batch was last settled; None if none was."""
    log_missing: bool
    """The last session did not end cleanly and its log is missing: what it did last may not be counted."""


def read_results(
    path: str | os.PathLike[str],
    *,
    outcome: RowOutcome | None = None,
) -> Iterator[Result]:
    """The result of each row, in the order of the rows. The run may be under way.

    Args:
        path: The checkpoint.
        outcome: Only rows with this outcome: `created`, `existed`, `rejected`, `invalid` or `pending`.
            None gives all rows but the pending ones.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
    """
    if outcome is not None and outcome not in get_args(RowOutcome):
        raise ValueError(f"outcome must be one of {', '.join(get_args(RowOutcome))}, not {outcome!r}")
    return _read_results(Path(path), outcome)


def _read_results(path: Path, outcome: RowOutcome | None) -> Iterator[Result]:
    # The ids of a batch are read only if it has a row with this outcome.
    ids = f"CASE WHEN {outcome} > 0 THEN ids END" if outcome else "ids"
    with explained(path), contextlib.closing(connect_reader(path)) as db:
        if log_is_missing(db, path):
            warn_of_missing_log(path)
        for begun in read_batches(db, ids, RESULT_PAGE_BATCHES):
            if begun.ids is not None:
                yield from results(outcome, begun)


def results(outcome: RowOutcome | None, begun: Begun) -> Iterator[Result]:
    """The results of one batch with this *outcome*; None gives all but the pending ones."""
    shared: dict[str, Any] = {"outcome": "pending"}
    if begun.answer is not None:
        shared = {"outcome": "created", **orjson.loads(begun.answer)}
    odd = orjson.loads(begun.exceptions) if begun.exceptions else {}
    for offset, instance_id in enumerate(begun.instance_ids()):
        entry = odd.get(str(offset))
        if entry is None:
            if instance_id is None:  # a blank line
                continue
            entry = shared
        if entry["outcome"] == outcome or (outcome is None and entry["outcome"] != "pending"):
            invalid = entry["outcome"] == "invalid"
            if not invalid and (instance_id is None or "id" in entry):
                raise Damage(f"row {begun.first_row + offset} has an outcome without having been sent")
            sent = 0 if invalid else begun.attempts
            yield Result(**{"id": instance_id, **entry}, row=begun.first_row + offset, attempts=sent)


def read_status(path: str | os.PathLike[str]) -> Status:
    """What a checkpoint says about its run as a whole. The run may be under way.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
    """
    path = Path(path)
    with explained(path), contextlib.closing(connect_reader(path)) as db:
        if log_missing := log_is_missing(db, path):
            warn_of_missing_log(path)
        db.execute("BEGIN")
        found = survey(db)
        attempts = db.execute("SELECT count(*) FROM attempt WHERE verdict <> 'interrupted'").fetchone()[0]
        return Status(
            header=found.run.header,
            created_at=found.run.created_at,
            finished_at=found.run.finished_at,
            pause_until=found.run.pause_until,
            rows=found.rows,
            batches=found.batches,
            batches_in_doubt=len(found.in_doubt),
            counts=found.counts,
            attempts=attempts,
            first_begun_at=found.first_begun_at,
            last_settled_at=found.last_settled_at,
            log_missing=log_missing,
        )


def read_boot(path: Path) -> Boot:
    """The boot by which the checkpoint at *path* counts the times of its last session."""
    with explained(path), contextlib.closing(connect_reader(path)) as db:
        return read_run(db).boot


def read_run_past(path: Path, since: float, boot: Boot = UNKNOWN_BOOT) -> Past:
    """`attempts.read_past` for the checkpoint at *path*. *since* and all returned times are counted by *boot*."""
    with explained(path), contextlib.closing(connect_reader(path)) as db:
        shift_s = boot.shift_s(read_run(db).boot)
        return read_past(db, since - shift_s).shifted(shift_s)
