"""The one writer of a checkpoint."""

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from operator import index
from pathlib import Path
from typing import Any, Literal

import filelock
import orjson

from bulkwf.checkpoint.file import (
    ELSEWHERE,
    acquire,
    check,
    connect,
    connect_reader,
    create,
    create_file,
    explain,
    explained,
    inode,
    is_new,
    make_private,
    move_aside,
    refuse_orphan,
    release,
)
from bulkwf.checkpoint.place import refuse_place
from bulkwf.checkpoint.reading import PAGE_BATCHES, recent_attempts, results
from bulkwf.checkpoint.schema import (
    BEGIN,
    INTERRUPTED,
    NOTE,
    SETTLE,
    TOTALS,
    Attempt,
    Begun,
    RunHeader,
)
from bulkwf.checkpoint.sessions import (
    begin_session,
    end_session,
    log_is_missing,
    lost_since,
    refuse_torn,
    tell_of_lost_log,
)
from bulkwf.errors import CheckpointError
from bulkwf.ledger import Ledger
from bulkwf.model import Answer, Batch
from bulkwf.progress import Totals

__all__ = ["Checkpoint", "Executor", "inline"]

log = logging.getLogger("bulkwf")

Executor = Callable[[Callable[[], None]], Awaitable[None]]
"""Runs a function to its end, somewhere: in a thread of its own, or at once."""


async def inline(function: Callable[[], None]) -> None:
    """The executor that runs at once: for a checkpoint in memory, and for simulated time."""
    function()


class Checkpoint:
    """The one writer of a checkpoint. Made by `open`; `aclose` leaves one portable file behind, if there is room."""

    def __init__(
        self,
        path: Path | None,
        db: sqlite3.Connection,
        reader: sqlite3.Connection,
        lock: filelock.BaseFileLock | None,
        executor: Executor,
    ) -> None:
        self.path = path
        self._db = db
        self._reader = reader
        self._lock = lock
        self._executor = executor
        self.lost_since = lost_since(db)
        """Rows that no batch holds may have been sent since then (Unix time): a log was lost. None: they were not."""
        self._end: tuple[float, str | None, int | None] | None = None
        self._log = None if path is None else path.with_name(path.name + "-wal")
        self._inodes = inode(path), inode(self._log)
        self._queue: list[tuple[str, Any]] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._writer: asyncio.Future[None] | None = None
        self._error: CheckpointError | None = None

    # --- opening and closing --------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: Path | None,
        header: RunHeader,
        *,
        now: float,
        executor: Executor,
        any_run_key: bool = True,
        new: bool = False,
    ) -> "Checkpoint":
        """Open the checkpoint at *path* for this run, or make it; None keeps it in memory.

        Args:
            path: The file. Its `-wal`, `-shm` and `.lock` stand beside it while it is open.
            header: What it belongs to.
            now: Unix time.
            executor: Where commits run.
            any_run_key: The header's run key is for a new file only; an old one keeps its own.
            new: Move a finished checkpoint aside first.

        Raises:
            CheckpointError: It is locked, of another run, damaged, or can't be written.
        """
        if path is None:
            db = connect(":memory:")
            create(db, header, now)
            begin_session(db, None, header, now, log_lost=False)
            return cls(None, db, db, None, executor)
        path = Path(os.path.realpath(path))
        with explained(path):
            refuse_place(path)
        lock = acquire(
            path,
            held="another run is writing this checkpoint",
            advice=ELSEWHERE,
        )
        try:
            with explained(path), contextlib.ExitStack() as if_it_fails:
                refuse_orphan(path)
                if new:
                    move_aside(path, now)
                if is_new(path):
                    create_file(path, header, now)
                make_private(path)
                before = if_it_fails.enter_context(contextlib.closing(connect_reader(path)))
                check(before, path, header, any_run_key=any_run_key)
                log_lost = log_is_missing(before, path)
                if log_lost:
                    refuse_torn(before, path)
                db = connect(str(path))
                if_it_fails.callback(db.close)  # and after it the reader, which does not fold the log
                begin_session(db, path, header, now, log_lost=log_lost)
                reader = if_it_fails.enter_context(contextlib.closing(connect_reader(path)))
                opened = cls(path, db, reader, lock, executor)
                if log_lost and opened.lost_since is not None:
                    tell_of_lost_log(path, opened.lost_since)
                if_it_fails.pop_all()
                before.close()
                return opened
        except BaseException:
            release(lock)
            raise

    async def aclose(self) -> None:
        """Write the log back into the file where that is possible, close it, and let the next process have it."""
        try:
            if self._writer is not None:
                await asyncio.wait((self._writer,))
        finally:
            self._close()

    def end(self, now: float, reason: str, exit_code: int | None = None) -> None:
        """Say how the session ends: `aclose` writes it down.

        Args:
            now: Unix time.
            reason: `finished`, `drained`, or the class of the error that ended it.
            exit_code: Of the command, where it is known.
        """
        self._end = now, reason, exit_code

    def _close(self) -> None:
        try:
            with contextlib.suppress(sqlite3.Error):
                self._close_connections()
            self._tell_of_log()
        finally:
            if self._lock is not None:
                release(self._lock)

    def _close_connections(self) -> None:
        """Write the session's end, and fold the log into the file; else leave the log to the next session."""
        ended = False
        if self._error is None:
            with contextlib.suppress(sqlite3.Error):
                end_session(self._db, *(self._end or (time.time(),)))
                ended = True
        if not ended and self._inodes == (inode(self.path), inode(self._log)):
            self._db.close()
            self._reader.close()  # the last to be closed, which does not fold the log
            return
        with contextlib.closing(self._db):  # SQLite folds a log that was deleted, too: this connection has it open
            self._reader.close()
            if ended:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _tell_of_log(self) -> None:
        with contextlib.suppress(OSError):
            if self.path is not None and (size := Path(f"{self.path}-wal").stat().st_size):
                why = "as the disk had no room, or somebody reads it: keep the two together until it is used again"
                log.warning("%s: %s bytes of it are in %s-wal still, %s", self.path, f"{size:,}", self.path, why)

    # --- writing --------------------------------------------------------------------------------------------------

    def begin(self, ledger: Ledger, now: float) -> Awaitable[None]:
        """Make a batch durable before it is sent. Batches must begin in the order of their rows."""
        batch = ledger.batch
        ids: Sequence[str | None] = batch.ids
        if len(ids) < batch.rows:
            ids = [None] * batch.rows
            for offset, instance_id in zip(batch.offsets, batch.ids, strict=True):
                ids[offset] = instance_id
        row = (*_columns(ledger, now), now, batch.retention_s, orjson.dumps(ids).decode())
        return self._write((BEGIN, row))

    def settle(self, ledger: Ledger, now: float) -> Awaitable[None]:
        """Make what a batch has come to durable."""
        first_row, *others = _columns(ledger, now)
        return self._write((SETTLE, (*others, first_row)))

    def note(self, attempt: Attempt) -> None:
        """Write an attempt down with the next commit."""
        self._queue.append((NOTE, attempt))

    def pause(self, until: float) -> Awaitable[None]:
        """Remember that the service has ordered silence until *until* (Unix time)."""
        return self._write(("UPDATE run SET pause_until = :until", {"until": until}))

    def finish(self, now: float) -> Awaitable[None]:
        """Note that the list was read to its end with every row settled."""
        return self._write(("UPDATE run SET finished_at = :now", {"now": now}))

    def flush(self) -> Awaitable[None]:
        """Make what `note` has left waiting durable."""
        return self._write()

    def _write(self, *statements: tuple[str, Any]) -> Awaitable[None]:
        """Queue *statements* at once, in the order of the calls; the awaitable ends when they are durable."""
        if self._error is not None:
            raise self._error
        self._queue.extend(statements)
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        if self._writer is None:
            self._writer = asyncio.ensure_future(self._commit_all())
        return waiter

    async def _commit_all(self) -> None:
        try:
            while self._waiters:
                await self._have_company()
                queue, self._queue = self._queue, []
                waiters, self._waiters = self._waiters, []
                try:
                    await self._executor(partial(self._commit, queue))
                except Exception as error:  # noqa: BLE001 - whatever it is, nobody may wait for it for ever
                    self._error = explain(error, self.path)
                self._tell(waiters)
        finally:
            self._writer = None

    async def _have_company(self) -> None:
        """Let others join the commit, which costs as much as twenty rows, while each turn of the loop brings some."""
        queued = 0
        while queued < len(self._queue):
            queued = len(self._queue)
            await asyncio.sleep(0)

    def _tell(self, waiters: Sequence[asyncio.Future[None]]) -> None:
        for waiter in waiters:
            if waiter.done():  # whoever waited has been cancelled
                continue
            if self._error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(self._error)

    def _commit(self, queue: Sequence[tuple[str, Any]]) -> None:
        if self._error is not None:
            raise self._error
        if self._inodes[1] != inode(self._log) and self._inodes[0] == inode(self.path):
            raise CheckpointError(
                f"{self.path}: the checkpoint's log ({self._log}) was moved, replaced or deleted while the run was "
                "writing it. Nothing more was sent. Run the same command again, and leave the two files together."
            )
        if self._inodes[0] != inode(self.path):
            raise CheckpointError(
                f"{self.path}: the checkpoint was moved, replaced or deleted while the run was writing it. Put it "
                "back and run the same command again; without it, generated ids are lost, and rows may run twice."
            )
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for statement, row in queue:
                self._db.execute(statement, row)
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    @property
    def failed(self) -> bool:
        """Whether a write has failed: nothing can be written any more."""
        return self._error is not None

    # --- what earlier sessions left -------------------------------------------------------------------------------

    @property
    def run_key(self) -> str:
        """What this run's generated ids begin with."""
        return str(self._ask("SELECT run_key FROM run")[0][0])

    @property
    def pause_until(self) -> float | None:
        """Until when the service has ordered silence (Unix time)."""
        until = self._ask("SELECT pause_until FROM run")[0][0]
        with explained(self.path):
            return None if until is None else float(until)

    def totals(self) -> Totals:
        """Rows by outcome so far."""
        with explained(self.path):
            return Totals(*map(int, self._ask(TOTALS)[0][:6]))

    def _ask(self, query: str, *values: Any) -> list[Any]:
        with explained(self.path):
            return self._reader.execute(query, values).fetchall()

    def begun(self) -> Iterator[Begun]:
        """The batches that have been begun, in the order of their rows.

        Raises:
            CheckpointError: There is a gap between them.
        """
        after, expected = -1, 0
        query = (
            "SELECT first_row, rows, begun_at, settled_at IS NOT NULL, size, digest, rejected + invalid = 0 FROM batch "
            "WHERE first_row > ? ORDER BY first_row LIMIT ?"
        )
        while page := self._ask(query, after, PAGE_BATCHES):
            with explained(self.path):
                batches = [Begun.of(*row) for row in page]
            for begun in batches:
                if begun.first_row != expected:
                    missing = f"rows {expected} to {begun.first_row - 1} are missing"
                    raise CheckpointError(
                        f"{self.path}: the checkpoint is damaged: {missing}. "
                        "Restore it from a copy; without one, start over with --run-key or ids of your own."
                    )
                expected = begun.first_row + begun.rows
                yield begun
            after = batches[-1].first_row

    def ledger(self, begun: Begun, region: bytes, row_shape: Literal["instance", "params"]) -> Ledger:
        """The account of a begun batch, whose rows have been read again as *region*."""
        with explained(self.path):
            query = "SELECT ids, answer, exceptions, attempts, retention_s FROM batch WHERE first_row = ?"
            ids, answer, exceptions, attempts, retention_s = self._ask(query, begun.first_row)[0]
            sent = [
                (offset, instance_id) for offset, instance_id in enumerate(orjson.loads(ids)) if instance_id is not None
            ]
            batch = Batch(
                first_row=begun.first_row,
                rows=begun.rows,
                region=region,
                ids=[instance_id for _, instance_id in sent],
                offsets=[offset for offset, _ in sent],
                bare=False,
                row_shape=row_shape,
                refused=tuple(results("invalid", begun.first_row, ids, answer, exceptions, attempts)),
                retention_s=float(retention_s),
            )
            told = None if answer is None else Answer(**orjson.loads(answer))
            return Ledger.resumed(batch, index(attempts), told, exceptions)

    def interrupted(self, now: float) -> None:
        """Write down an attempt for each batch in doubt: its last one may have been sent and never noted.

        Counted from *now*, so that a process that dies again and again can't overrun the service's windows.
        """
        with explained(self.path):
            self._commit([(INTERRUPTED, {"now": now})])

    def recent_attempts(self, since: float) -> list[tuple[float, int]]:
        """See `reading.recent_attempts`."""
        with explained(self.path):
            return recent_attempts(self._reader, since)


def _columns(ledger: Ledger, now: float) -> tuple[Any, ...]:
    """A ledger's record as the first columns that `BEGIN` names."""
    first_row, rows, complete, *others = ledger.record()
    return (first_row, rows, now if complete else None, *others)
