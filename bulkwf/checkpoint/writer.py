"""The one writer of a checkpoint.

What is written goes through one thread (the executor), which alone touches the connection that writes, its close
included: SQLite must not be closed under a commit. No task stands between a write and its commit, because `asyncio.run`
cancels every task at its end: a commit is a future of the thread, and what it brings about a callback.
"""

import asyncio
import contextlib
import logging
import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import filelock
import orjson

from bulkwf.attempt import InstanceInfo
from bulkwf.batching.batch_state import BatchState
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
from bulkwf.checkpoint.reading import results
from bulkwf.checkpoint.records import Begun, Survey, checksum, past, read_batch, read_batches, seal_run, survey
from bulkwf.checkpoint.schema import BEGIN, INTERVAL, NOTE, SETTLE, Attempt, Interval, Past, RunHeader
from bulkwf.checkpoint.sessions import (
    begin_session,
    end_session,
    log_is_missing,
    lost_since,
    refuse_torn,
    tell_of_lost_log,
)
from bulkwf.clock import UNKNOWN_BOOT, Boot
from bulkwf.errors import CheckpointError
from bulkwf.model import Batch, Counts
from bulkwf.uncancelled import until_done

__all__ = ["Checkpoint", "Executor", "inline"]

log = logging.getLogger("bulkwf")

Executor = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Begins to run a function, in a thread of its own or at once, one after another; what it returns ends with it.

Where tasks may be cancelled that is a future which is no task.
"""
PAUSE = "UPDATE run SET pause_until = ?"
SEAL = ""
"""In the place of a statement: the run's record has changed."""


def inline(function: Callable[[], Any]) -> Awaitable[Any]:
    """The executor that runs at once: for a checkpoint in memory, and for simulated time."""
    done = asyncio.get_running_loop().create_future()
    try:
        done.set_result(function())
    except Exception as error:  # noqa: BLE001 - it belongs to whoever awaits
        done.set_exception(error)
    return done


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
        found: Survey,
        boot: Boot,
        now: float,
    ) -> None:
        self.path = path
        self.boot = boot
        self._found = found
        self._db = db
        self._reader = reader
        self._lock = lock
        self._executor = executor
        self.lost_since = lost_since(db)
        """Rows that no batch holds may have been sent since then (Unix time): a log was lost. None: they were not."""
        self._began_at = now
        self._end: tuple[float, str | None, int | None] | None = None
        self._log = None if path is None else path.with_name(path.name + "-wal")
        self._inodes = inode(path), inode(self._log)
        self._queue: list[tuple[str, Any]] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._busy = False
        """A commit is under way, or about to begin."""
        self._closed: asyncio.Future[None] | None = None
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

        Reads all that it holds, once: to be called where that may take its time, in the thread that is to write.

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
            found = survey(db)
            begin_session(db, None, header, now, boot)
            return cls(None, db, db, None, executor, found, boot, now)
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
                    create_file(path, header, now, boot)
                make_private(path)
                before = if_it_fails.enter_context(contextlib.closing(connect_reader(path)))
                found = check(before, path, header, any_run_key=any_run_key)
                log_lost = log_is_missing(before, path)
                if log_lost:
                    refuse_torn(before, path)
                db = connect(str(path))
                if_it_fails.callback(db.close)  # and after it the reader, which does not fold the log
                now -= boot.shift_s(found.run.boot)
                boot = boot.going_on(found.run.boot)
                begin_session(db, path, header, now, boot, in_doubt=found.in_doubt, log_lost=log_lost)
                reader = if_it_fails.enter_context(contextlib.closing(connect_reader(path)))
                opened = cls(path, db, reader, lock, executor, found, boot, now)
                if log_lost and opened.lost_since is not None:
                    tell_of_lost_log(path, opened.lost_since)
                if_it_fails.pop_all()
                before.close()
                return opened
        except BaseException:
            release(lock)
            raise

    async def aclose(self) -> None:
        """Write the log back into the file where that is possible, close it, and let the next process have it.

        What has been written by then is committed first. A cancellation is raised when all is done.
        """
        if self._closed is None:
            self._closed = asyncio.get_running_loop().create_future()
            if not self._busy:
                self._begin_closing()
        await until_done(self._closed)

    def end(self, now: float, reason: str | None, exit_code: int | None = None) -> None:
        """Say how the session ends: `aclose` writes it down. Only the first call counts.

        Args:
            now: Unix time.
            reason: `finished`, `drained`, `cancelled`, or the class of the error that ended it; None if not known.
            exit_code: Of the command, where it is known.
        """
        self._end = self._end or (now, reason, exit_code)

    def _begin_closing(self) -> None:
        if self._reader is not self._db:
            self._reader.close()  # the loop's own, as its use is
        intact = self._error is None
        self._error = self._error or CheckpointError(f"{self.path}: the checkpoint is closed.")
        self._execute(partial(self._close, intact), partial(self._end_closing, intact))

    def _end_closing(self, intact: bool, error: BaseException | None) -> None:
        assert self._closed is not None
        try:
            if error is not None:
                self._close(intact)  # no thread could be had, so none has the connection
        finally:
            self._closed.set_result(None)

    def _close(self, intact: bool) -> None:
        try:
            with contextlib.suppress(sqlite3.Error):
                self._close_connection(intact)
            self._tell_of_log()
        finally:
            if self._lock is not None:
                release(self._lock)

    def _close_connection(self, intact: bool) -> None:
        """Write the session's end, and fold the log into the file; else leave the log to the next session."""
        ended = False
        if intact:
            with contextlib.suppress(sqlite3.Error):
                end_session(self._db, *(self._end or (self._began_at,)))
                ended = True
        with contextlib.ExitStack() as afterwards:
            # SQLite folds the log when its last connection is closed, unless that is a reader. A log that was deleted
            # is folded all the same: only this connection still has it.
            with contextlib.suppress(sqlite3.Error, OSError, CheckpointError):
                if not ended and self.path is not None and self._inodes == (inode(self.path), inode(self._log)):
                    afterwards.callback(connect_reader(self.path).close)
            afterwards.callback(self._db.close)
            if ended:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _tell_of_log(self) -> None:
        with contextlib.suppress(OSError):
            ours = self.path is not None and self._inodes[0] == inode(self.path)
            if ours and (size := Path(f"{self.path}-wal").stat().st_size):
                why = "as the disk had no room, or somebody reads it: keep the two together until it is used again"
                log.warning("%s: %s bytes of it are in %s-wal still, %s", self.path, f"{size:,}", self.path, why)

    # --- writing --------------------------------------------------------------------------------------------------

    def begin(self, ledger: BatchState, now: float) -> Awaitable[None]:
        """Make a batch durable before it is sent. Batches must begin in the order of their rows."""
        batch = ledger.batch
        ids: Sequence[str | None] = batch.ids
        if len(ids) < batch.rows:
            ids = [None] * batch.rows
            for offset, instance_id in zip(batch.offsets, batch.ids, strict=True):
                ids[offset] = instance_id
        text = orjson.dumps(ids)
        begun = (batch.first_row, float(now), float(batch.retention_s), crc32(text))
        return self._write((BEGIN, (*_columns(ledger, now), *begun[1:], checksum(begun), text.decode())))

    def settle(self, ledger: BatchState, now: float) -> Awaitable[None]:
        """Make what a batch has come to durable."""
        return self._write(_settle(ledger, now))

    def record(
        self, attempt: Attempt, *, settled: BatchState | None, pause_until: float | None, now: float
    ) -> Awaitable[None]:
        """Make an attempt durable, and with it, in one commit, what it has settled and the pause that it orders.

        Args:
            attempt: The attempt.
            settled: The batch, if some of its rows have been settled.
            pause_until: End of the pause in Unix time; None if there is none.
            now: Unix time.
        """
        statements: list[tuple[str, Any]] = [(NOTE, attempt)]
        if settled is not None:
            statements.append(_settle(settled, now))
        if pause_until is not None:
            statements += _change_run(PAUSE, pause_until)
        return self._write(*statements)

    def note_interval(self, interval: Interval, started_at: float) -> None:
        """Write an interval of the timeline with the next commit; *started_at* in Unix time."""
        states = orjson.dumps({state.value: length_s for state, length_s in interval.seconds.items()}).decode()
        counts = interval.created, interval.attempts, interval.errors
        latencies = interval.latency_s or (None, None, None)
        self._queue.append((INTERVAL, (started_at, interval.length_s, states, *counts, *latencies)))

    def pause(self, until: float) -> Awaitable[None]:
        """Remember that nothing may be sent before *until* (Unix time)."""
        return self._write(*_change_run(PAUSE, until))

    def finish(self, now: float) -> Awaitable[None]:
        """Note that the list was read to its end with every row settled."""
        return self._write(*_change_run("UPDATE run SET finished_at = ?", now))

    def flush(self) -> Awaitable[None]:
        """Make all that has been written so far durable."""
        return self._write()

    def _write(self, *statements: tuple[str, Any]) -> Awaitable[None]:
        """Queue *statements* at once, in the order of the calls; the awaitable ends when they are durable."""
        if self._error is not None:
            raise self._error
        self._queue.extend(statements)
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiters.append(waiter)
        if not self._busy:
            self._busy = True
            loop.call_soon(self._begin_commit, loop, 0)
        return waiter

    def _begin_commit(self, loop: asyncio.AbstractEventLoop, queued: int) -> None:
        """Commit what is queued, unless the last turn of the loop has brought more than the *queued* ones.

        A commit costs as much as twenty rows: others may join it while each turn brings some.
        """
        if len(self._queue) > queued:
            loop.call_soon(self._begin_commit, loop, len(self._queue))
            return
        queue, self._queue = self._queue, []
        waiters, self._waiters = self._waiters, []
        self._execute(partial(self._commit, queue), partial(self._end_commit, loop, waiters))

    def _end_commit(
        self, loop: asyncio.AbstractEventLoop, waiters: Sequence[asyncio.Future[None]], error: BaseException | None
    ) -> None:
        if error is not None:
            self._error = explain(error, self.path)
        self._tell(waiters)
        if self._waiters:
            self._begin_commit(loop, 0)
        else:
            self._busy = False
            if self._closed is not None:
                self._begin_closing()

    def _execute(self, function: Callable[[], None], then: Callable[[BaseException | None], None]) -> None:
        """Run *function* in the writing thread, and *then* in the loop, with the error that it ended with."""
        try:
            running = asyncio.ensure_future(self._executor(function))
        except Exception as error:  # noqa: BLE001 - no thread can be had
            then(error)
        else:
            running.add_done_callback(lambda _: then(_error_of(running)))

    def _tell(self, waiters: Sequence[asyncio.Future[None]]) -> None:
        for waiter in waiters:
            if waiter.done():  # whoever waited has been cancelled
                continue
            if self._error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(self._error)
                waiter.exception()  # nobody may be left to ask for it

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
                if statement == SEAL:
                    seal_run(self._db)
                else:
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
        return self._found.run.header.run_key

    @property
    def source_before(self) -> str:
        """What the list was when the last session began; of a new checkpoint, this one's."""
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

    def ledger(self, begun: Begun, region: bytes, row_shape: Literal["instance", "params"]) -> BatchState:
        """The account of a begun batch, whose rows have been read again as *region*.

        Raises:
            CheckpointError: It is damaged.
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
            told = None if begun.answer is None else InstanceInfo(**orjson.loads(begun.answer))
            return BatchState.resumed(batch, begun.attempts, told, begun.exceptions)

    def past(self, since: float) -> Past:
        """See `records.past`."""
        with explained(self.path):
            return past(self._reader, since)


def _settle(state: BatchState, now: float) -> tuple[str, Any]:
    """The statement that stores what a batch has come to."""
    first_row, *others = _columns(state, now)
    return SETTLE, (*others, first_row)


def _change_run(statement: str, value: float) -> tuple[tuple[str, Any], ...]:
    """The statements that change the run's record, and seal it."""
    return (statement, (float(value),)), (SEAL, ())


def _columns(ledger: BatchState, now: float) -> tuple[Any, ...]:
    """A ledger's record as the columns that `SETTLE` writes, `first_row` before them, their checksum behind them."""
    first_row, rows, complete, *others = ledger.record()
    columns = (first_row, rows, float(now) if complete else None, *others)
    return (*columns, checksum(columns))


def _error_of(ended: asyncio.Future[None]) -> BaseException | None:
    return RuntimeError("the commit was cut off") if ended.cancelled() else ended.exception()
