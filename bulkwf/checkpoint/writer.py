"""The one writer of a checkpoint."""

import asyncio
import contextlib
import logging
import os
import sqlite3
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
    connect,
    connect_reader,
    create,
    explain,
    explained,
    inode,
    make_private,
    move_aside,
    prepare,
    refuse_network_filesystem,
    refuse_orphan,
    release,
)
from bulkwf.checkpoint.reading import PAGE_BATCHES, past, results
from bulkwf.checkpoint.schema import (
    BEGIN,
    INTERRUPTED,
    NOTE,
    SETTLE,
    TOTALS,
    Attempt,
    Begun,
    Past,
    RunHeader,
)
from bulkwf.errors import CheckpointError
from bulkwf.ledger import Ledger
from bulkwf.model import UNKNOWN_BOOT, Answer, Batch, Boot
from bulkwf.progress import Totals

__all__ = ["Checkpoint", "Executor", "inline"]

log = logging.getLogger("bulkwf")

Executor = Callable[[Callable[[], None]], Awaitable[None]]
"""Runs a function to its end, somewhere: in a thread of its own, or at once."""


async def inline(function: Callable[[], None]) -> None:
    """The executor that runs at once: for a checkpoint in memory, and for simulated time."""
    function()


class Checkpoint:
    """The one writer of a checkpoint. Made by `open`; `aclose` leaves one portable file behind, if there is room.

    Attributes:
        path: The file; None if it is in memory.
        boot: How this session's times must be counted.
    """

    def __init__(
        self,
        path: Path | None,
        db: sqlite3.Connection,
        reader: sqlite3.Connection,
        lock: filelock.BaseFileLock | None,
        executor: Executor,
        boot: Boot,
    ) -> None:
        self.path = path
        self.boot = boot
        self._db = db
        self._reader = reader
        self._lock = lock
        self._executor = executor
        self._inode = inode(path)
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
        boot: Boot = UNKNOWN_BOOT,
        any_run_key: bool = True,
        new: bool = False,
    ) -> "Checkpoint":
        """Open the checkpoint at *path* for this run, or make it; None keeps it in memory.

        Args:
            path: The file. Its `-wal`, `-shm` and `.lock` stand beside it while it is open.
            header: What it belongs to.
            now: Unix time.
            executor: Where commits run.
            boot: This boot, by the clock that *now* is of.
            any_run_key: The header's run key is for a new file only; an old one keeps its own.
            new: Move a finished checkpoint aside first.

        Raises:
            CheckpointError: It is locked, of another run, damaged, or can't be written.
        """
        if path is None:
            db = connect(":memory:")
            create(db, header, now, boot)
            return cls(None, db, db, None, executor, boot)
        path = Path(os.path.realpath(path))
        refuse_network_filesystem(path)
        lock = acquire(
            path,
            held="another run is writing this checkpoint",
            advice=ELSEWHERE,
        )
        try:
            with explained(path), contextlib.ExitStack() as if_it_fails:
                if new:
                    move_aside(path, now)
                refuse_orphan(path)
                make_private(path)
                db = connect(str(path))
                if_it_fails.callback(db.close)
                boot = prepare(db, path, header, now, boot, any_run_key=any_run_key)
                reader = connect_reader(path)
                if_it_fails.callback(reader.close)
                opened = cls(path, db, reader, lock, executor, boot)
                if_it_fails.pop_all()
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

    def _close(self) -> None:
        try:
            with contextlib.suppress(sqlite3.Error), contextlib.closing(self._db):
                self._reader.close()
                if self._error is None:
                    self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._tell_of_log()
        finally:
            if self._lock is not None:
                release(self._lock)

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
        if self._inode != inode(self.path):
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

    def past(self, since: float) -> Past:
        """See `reading.past`."""
        with explained(self.path):
            return past(self._reader, since)


def _columns(ledger: Ledger, now: float) -> tuple[Any, ...]:
    """A ledger's record as the first columns that `BEGIN` names."""
    first_row, rows, complete, *others = ledger.record()
    return (first_row, rows, now if complete else None, *others)
