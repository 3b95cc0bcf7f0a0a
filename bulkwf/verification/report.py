"""The result of a verification. It can still be used after the verification's store is closed."""

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bulkwf.checkpoint.errors import explained as checkpoint_explained
from bulkwf.checkpoint.file import connect_reader, remove
from bulkwf.checkpoint.lock import release
from bulkwf.checkpoint.records import read_batch
from bulkwf.errors import CheckpointError
from bulkwf.model import Finding
from bulkwf.verification.files import acquire_lock, explained, request_log_path
from bulkwf.verification.request_log import remove_unneeded
from bulkwf.verification.store import CONFIRMED

__all__ = ["VerificationReport", "Verified"]

PROBLEMS = """
SELECT row, id, existed, status, absences FROM instance
WHERE status = 'errored' OR (status IS NULL AND absences >= ?) ORDER BY row
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The counts of a verification.

    Attributes:
        instances: Rows whose instances were looked for.
        total: Rows that the checkpoint calls created or existed; more than `instances` if a sample was drawn.
        found: Rows of `instances` that the service holds.
        missing: Rows of `instances` that the service does not hold.
        unknown: Rows of `instances` whose look-ups the service does not answer, although it answers others. 0 until
            all were looked up.
        statuses: Rows found, by the status of their instances as the service names it.
        run_finished: The run is finished.
        complete: All of `instances` were looked up or listed, and none is unknown.
        requests: Requests of this session.
        elapsed_s: Length of this session, in seconds.
        exit_code: Exit code of the command.
    """

    instances: int
    total: int
    found: int
    missing: int
    unknown: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    run_finished: bool
    complete: bool
    requests: int
    elapsed_s: float
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationReport:
    """The result of a verification.

    Attributes:
        counts: Counts of the verification.
        asked_for_all: All instances were looked up or listed: those without an answer are unknown.
        store: The file that holds what was found.
        checkpoint: The checkpoint.
        ended_at: End of the session, in Unix time by the store's clock.
        run_shift_s: Seconds to add to the checkpoint's times, to convert them to the store's clock.
    """

    counts: Verified
    asked_for_all: bool
    store: Path
    checkpoint: Path
    ended_at: float
    run_shift_s: float = 0.0

    def problems(self) -> Iterator[Finding]:
        """The rows whose instances are missing, errored or unknown, in row order. Reads the store and the checkpoint.

        Raises:
            CheckpointError: One of the files can't be read.
        """
        least_absences = 0 if self.asked_for_all else CONFIRMED
        uri = f"{self.store.absolute().as_uri()}?mode=ro"
        with (
            explained(self.store),
            contextlib.closing(sqlite3.connect(uri, uri=True)) as db,
            contextlib.closing(connect_reader(self.checkpoint)) as checkpoint,
        ):
            for row, instance_id, existed, status, absences in db.execute(PROBLEMS, (least_absences,)):
                if status is not None:
                    message = "the instance ended with an error"
                    yield Finding(row=row, id=instance_id, outcome="errored", status=status, message=message)
                elif absences < CONFIRMED:
                    message = "the service does not answer look-ups of this instance; run the same command again"
                    yield Finding(row=row, id=instance_id, outcome="unknown", message=message)
                else:
                    message = self._why_missing(checkpoint, row, existed=existed)
                    yield Finding(row=row, id=instance_id, outcome="missing", message=message)

    def _why_missing(self, checkpoint: sqlite3.Connection, row: int, *, existed: bool) -> str:
        with checkpoint_explained(self.checkpoint):
            begun = read_batch(checkpoint, row)
        message = f"the checkpoint calls it {'existed' if existed else 'created'}, and the service has no such instance"
        expired = self.ended_at > begun.begun_at + self.run_shift_s + begun.retention_s
        if expired or existed:  # an instance that existed is older than the run
            message += "; it may have passed its retention"
        return message

    def discard(self) -> None:
        """Delete the store of a complete verification, and the request log if it no longer limits any request.

        Call it after the report has been delivered. Until then, the same command reports the same again.
        """
        if not self.counts.complete:
            return
        with contextlib.suppress(CheckpointError, OSError):  # another verification has begun, or it is read-only now
            lock = acquire_lock(self.store)
            try:
                remove(self.store)
                remove_unneeded(request_log_path(self.store), self.ended_at)
            finally:
                release(lock)
