"""Writes a checkpoint, and returns what earlier sessions have stored in it."""

import contextlib
import os
import sqlite3
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, Literal

import orjson

from bulkwf.attempt import InstanceInfo
from bulkwf.batching.batch_state import BatchState
from bulkwf.checkpoint.attempts import Past, attempt_row, read_past
from bulkwf.checkpoint.commits import Executor, GroupCommit
from bulkwf.checkpoint.connection import Write, WriterConnection
from bulkwf.checkpoint.errors import ELSEWHERE, explained
from bulkwf.checkpoint.file import check, connect, connect_reader, create, prepare
from bulkwf.checkpoint.lock import acquire, release
from bulkwf.checkpoint.place import refuse_place
from bulkwf.checkpoint.reading import results
from bulkwf.checkpoint.records import (
    Begun,
    Survey,
    begun_row,
    read_batch,
    read_batches,
    seal_run,
    settled_row,
    survey,
)
from bulkwf.checkpoint.schema import BEGIN, INTERVAL, NOTE, SETTLE, Attempt, Interval, RunHeader
from bulkwf.checkpoint.sessions import begin_session, log_is_missing, lost_since, refuse_torn, warn_of_lost_log
from bulkwf.clock import UNKNOWN_BOOT, Boot
from bulkwf.model import Batch, Counts

__all__ = ["Checkpoint"]

PAUSE = "UPDATE run SET pause_until = ?"
LIST = "UPDATE run SET input = ?, source = ?"
FINISH = "UPDATE run SET finished_at = ?"


class Checkpoint:
    """The one writer of a checkpoint. Made by `open`; `aclose` leaves one portable file, if the disk has room for it.

    Attributes:
        path: The file; None if it is in memory.
        boot: The boot by which this session must count its times.
        lost_since: Unix time since which rows that no batch holds may have been sent, because a log was lost; None if
            no log was lost.
    """

    def __init__(
        self,
        connection: WriterConnection,
        reader: sqlite3.Connection,
        executor: Executor,
        found: Survey,
        header: RunHeader,
        boot: Boot,
        *,
        lost_since: float | None = None,
    ) -> None:
        self.path = connection.path
        self.boot = boot
        self.lost_since = lost_since
        self._connection = connection
        self._reader = reader
        self._commits = GroupCommit(connection, executor)
        self._found = found
        self._new_list: tuple[str, str] | None = header.input, header.source
        """The list's name and identity, until they are stored with the first new batch."""

    # --- opening and closing --------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: Path | None,
        header: RunHeader,
        *,
        now: float,
        executor: Executor,
        boot: Boot = UNKNOWN_BOOT,
        any_run_key: bool = True,
        new: bool = False,
    ) -> "Checkpoint":
        """Open the checkpoint at *path* for this run, or make it; None keeps it in memory.

        It reads the whole file, which may take seconds. Call it in the executor's thread.

        Args:
            path: The file. Its `-wal`, `-shm` and `.lock` stand beside it while it is open.
            header: The run.
            now: Unix time.
            executor: Where commits run.
            boot: This boot, by the same clock as *now*.
            any_run_key: Accept an existing file with another run key, and use that key instead of the header's.
            new: Move a finished checkpoint aside first.

        Raises:
            CheckpointError: The checkpoint is locked, belongs to another run, is damaged or can't be written.
        """
        if path is None:
            db = connect(":memory:")
            create(db, header, now, boot)
            found = survey(db)
            begin_session(db, None, header.limits, now, boot)
            return cls(WriterConnection(None, db, None, now), db, executor, found, header, boot)
        path = Path(os.path.realpath(path))
        with explained(path), contextlib.ExitStack() as if_it_fails:
            refuse_place(path)
            lock = acquire(path, held="another run is writing this checkpoint", advice=ELSEWHERE)
            if_it_fails.callback(release, lock)
            prepare(path, header, now, boot, new=new)
            before = if_it_fails.enter_context(contextlib.closing(connect_reader(path)))
            found = check(before, path, header, any_run_key=any_run_key)
            log_lost = log_is_missing(before, path)
            if log_lost:
                refuse_torn(before, path)
            db = connect(str(path))
            if_it_fails.callback(db.close)  # before the reader, which does not fold the log
            now -= boot.shift_s(found.run.boot)
            boot = boot.going_on(found.run.boot)
            begin_session(db, path, header.limits, now, boot, in_doubt=found.in_doubt, log_lost=log_lost)
            reader = if_it_fails.enter_context(contextlib.closing(connect_reader(path)))
            since = lost_since(db)
            if log_lost and since is not None:
                warn_of_lost_log(path, since)
            connection = WriterConnection(path, db, lock, now)
            opened = cls(connection, reader, executor, found, header, boot, lost_since=since)
            if_it_fails.pop_all()
            before.close()
            return opened

    async def aclose(self) -> None:
        """Commit what was written, fold the log into the file if possible, close it, and release its lock.

        A cancellation of the caller is raised after that.
        """
        if self._reader is not self._connection.db:
            self._reader.close()
        await self._commits.aclose()

    def end(self, now: float, reason: str | None, exit_code: int | None = None) -> None:
        """Set how the session ends; `aclose` writes it to the file. Only the first call counts.

        Args:
            now: Unix time.
            reason: `finished`, `drained`, `cancelled`, or the class of the error that ended it; None if not known.
            exit_code: Exit code of the command; None if not known.
        """
        self._connection.session_end = self._connection.session_end or (now, reason, exit_code)

    # --- writing --------------------------------------------------------------------------------------------------

    def begin(self, state: BatchState, now: float) -> Awaitable[None]:
        """Make a batch durable before it is sent. Batches must begin in the order of their rows.

        With the first one, the list's name and identity become durable: by then, the rows of earlier sessions have been
        compared with the list.
        """
        writes = [_statement(BEGIN, begun_row(state, now))]
        if self._new_list is not None:
            writes.append(_run_change(LIST, *self._new_list))
            self._new_list = None
        return self._commits.commit(*writes)

    def settle(self, state: BatchState, now: float) -> Awaitable[None]:
        """Make the results of a batch that are known so far durable."""
        return self._commits.commit(_statement(SETTLE, settled_row(state, now)))

    def record(
        self, attempt: Attempt, *, settled: BatchState | None, pause_until: float | None, now: float
    ) -> Awaitable[None]:
        """Make an attempt durable, and in the same commit what it settled and the pause that its answer orders.

        Args:
            attempt: The attempt.
            settled: The batch, if some of its rows have been settled.
            pause_until: End of the pause in Unix time; None if there is none.
            now: Unix time.
        """
        writes = [_statement(NOTE, attempt_row(attempt))]
        if settled is not None:
            writes.append(_statement(SETTLE, settled_row(settled, now)))
        if pause_until is not None:
            writes.append(_run_change(PAUSE, float(pause_until)))
        return self._commits.commit(*writes)

    def note_interval(self, interval: Interval, started_at: float) -> None:
        """Write an interval of the timeline with the next commit; *started_at* in Unix time."""
        states = orjson.dumps({state.value: length_s for state, length_s in interval.seconds.items()}).decode()
        counts = interval.created, interval.attempts, interval.errors
        latencies = interval.latency_s or (None, None, None)
        self._commits.add(_statement(INTERVAL, (started_at, interval.length_s, states, *counts, *latencies)))

    def pause(self, until: float) -> Awaitable[None]:
        """Make durable that nothing may be sent before *until* (Unix time)."""
        return self._commits.commit(_run_change(PAUSE, float(until)))

    def finish(self, now: float) -> Awaitable[None]:
        """Make durable that the list was read to its end with every row settled."""
        return self._commits.commit(_run_change(FINISH, float(now)))

    def flush(self) -> Awaitable[None]:
        """Make all that has been written so far durable."""
        return self._commits.commit()

    @property
    def failed(self) -> bool:
        """Whether a write has failed, or the checkpoint is closed: nothing can be written any more."""
        return self._commits.error is not None

    # --- what earlier sessions left -------------------------------------------------------------------------------

    @property
    def run_key(self) -> str:
        """Prefix of this run's generated ids."""
        return self._found.run.header.run_key

    @property
    def source_before(self) -> str:
        """Identity of the list when earlier sessions began their last batch; in a new checkpoint, of this list."""
        return self._found.run.header.source

    def counts(self) -> Counts:
        """Rows by outcome when the checkpoint was opened."""
        return self._found.counts

    def begun(self) -> Iterator[Begun]:
        """The batches that have been begun, in the order of their rows.

        Raises:
            CheckpointError: One of them is damaged, or missing.
        """
        with explained(self.path):
            yield from read_batches(self._reader)

    def batch_state(self, begun: Begun, region: bytes, row_shape: Literal["instance", "params"]) -> BatchState:
        """The stored state of a begun batch, whose lines have been read again as *region*.

        Raises:
            CheckpointError: Its record is damaged.
        """
        with explained(self.path):
            begun = read_batch(self._reader, begun.first_row)
            sent = [(offset, one) for offset, one in enumerate(begun.instance_ids()) if one is not None]
            batch = Batch(
                first_row=begun.first_row,
                rows=begun.rows,
                region=region,
                ids=[instance_id for _, instance_id in sent],
                offsets=[offset for offset, _ in sent],
                bare=False,
                row_shape=row_shape,
                refused=tuple(results("invalid", begun)),
                retention_s=begun.retention_s,
            )
            answer = None if begun.answer is None else InstanceInfo(**orjson.loads(begun.answer))
            return BatchState.resumed(batch, begun.attempts, answer, begun.exceptions)

    def past(self, since: float) -> Past:
        """See `attempts.read_past`."""
        with explained(self.path):
            return read_past(self._reader, since)


def _statement(sql: str, values: tuple[Any, ...]) -> Write:
    return lambda db: db.execute(sql, values)


def _run_change(sql: str, *values: Any) -> Write:
    """Changes the run's record, and seals it."""

    def change(db: sqlite3.Connection) -> None:
        db.execute(sql, values)
        seal_run(db)

    return change
