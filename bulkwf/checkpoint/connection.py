"""The connection that writes a checkpoint. Once it is made, only one thread uses it; the same thread closes it.

The connection must not be closed during a commit. The file and its log must stay where they are: otherwise they can be
separated.
"""

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path

import filelock

from bulkwf.checkpoint.file import connect_reader, inode
from bulkwf.checkpoint.lock import release
from bulkwf.checkpoint.sessions import end_session
from bulkwf.errors import CheckpointError

__all__ = ["Write", "WriterConnection"]

log = logging.getLogger("bulkwf")

Write = Callable[[sqlite3.Connection], object]
"""Executes statements inside a transaction."""


class WriterConnection:
    """Commits to a checkpoint, and closes it.

    Args:
        path: The file; None if it is in memory.
        db: The connection.
        lock: The file's lock; None if it is in memory.
        now: When the session began, in Unix time.

    Attributes:
        path: The file; None if it is in memory.
        db: The connection.
        session_end: How the session ends: Unix time, reason and exit code; None until this is known.
    """

    def __init__(
        self, path: Path | None, db: sqlite3.Connection, lock: filelock.BaseFileLock | None, now: float
    ) -> None:
        self.path = path
        self.session_end: tuple[float, str | None, int | None] | None = None
        self._began_at = now
        self.db = db
        self._lock = lock
        self._log = None if path is None else path.with_name(path.name + "-wal")
        self._inode, self._log_inode = inode(path), inode(self._log)

    def commit(self, writes: Iterable[Write]) -> None:
        """Make all *writes* durable, in one transaction.

        Raises:
            CheckpointError: The file or its log is no longer where it was.
            sqlite3.Error: The disk is full, or fails.
        """
        self._require_files()
        self.db.execute("BEGIN IMMEDIATE")
        try:
            for write in writes:
                write(self.db)
            self.db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("ROLLBACK")
            raise

    def close(self, *, intact: bool) -> None:
        """Write the session's end and the log into the file if possible, close the connection, and release the lock.

        Args:
            intact: All commits have succeeded.
        """
        try:
            with contextlib.suppress(sqlite3.Error):
                self._close(intact)
            self._warn_of_log()
        finally:
            if self._lock is not None:
                release(self._lock)

    def _require_files(self) -> None:
        if self._inode != inode(self.path):
            raise CheckpointError(
                f"{self.path}: the checkpoint was moved, replaced or deleted while the run was writing it. Put it "
                "back and run the same command again; without it, generated ids are lost, and rows may run twice."
            )
        if self._log_inode != inode(self._log):
            raise CheckpointError(
                f"{self.path}: the checkpoint's log ({self._log}) was moved, replaced or deleted while the run was "
                "writing it. Nothing more was sent. Run the same command again, and leave the two files together."
            )

    def _close(self, intact: bool) -> None:
        """Close the connection. If the session's end can't be written, the log is kept for the next session."""
        ended = False
        if intact:
            with contextlib.suppress(sqlite3.Error):
                end_session(self.db, *(self.session_end or (self._began_at, None, None)))
                ended = True
        with contextlib.ExitStack() as afterwards:
            # SQLite folds the log into the file when the last connection is closed, unless that connection only reads:
            # so a reader is closed last. A deleted log is folded nevertheless: only this connection still has it.
            with contextlib.suppress(sqlite3.Error, OSError, CheckpointError):
                in_place = (self._inode, self._log_inode) == (inode(self.path), inode(self._log))
                if not ended and self.path is not None and in_place:
                    afterwards.callback(connect_reader(self.path).close)
            afterwards.callback(self.db.close)
            if ended:
                self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _warn_of_log(self) -> None:
        with contextlib.suppress(OSError):
            if self._log is not None and self._inode == inode(self.path) and (size := self._log.stat().st_size):
                log.warning(
                    "%s: %s bytes of it are still in %s, because the disk has no room or another program reads the "
                    "checkpoint: keep the two files together until the checkpoint is used again",
                    self.path,
                    f"{size:,}",
                    self._log,
                )
