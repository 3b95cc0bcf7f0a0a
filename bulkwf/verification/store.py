"""Stores what a verification has found, in a SQLite file beside the checkpoint: `<checkpoint>.verify`.

A file is needed because ten million ids do not fit into memory: it holds a record for each row of the list. A sample
has a file of its own, `<checkpoint>.verify-sample`. All SQL runs in one thread, the executor. Commits do not wait for
the disk: instances whose results are lost in a power failure are looked up again.

The file is built quickly: records are appended in row order, then SQLite sorts all ids once for the index. Updates
change a record in place, and never the index.
"""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import filelock

from bulkwf.batching.ids import ids_are_good
from bulkwf.checkpoint import Executor
from bulkwf.checkpoint.file import connect, make_private, remove
from bulkwf.checkpoint.lock import release
from bulkwf.clock import UNKNOWN_BOOT, Boot
from bulkwf.uncancelled import until_done
from bulkwf.verification.files import acquire_lock, explained, foreign_file, request_log_path, store_path
from bulkwf.verification.request_log import RequestLog
from bulkwf.verification.scope import Scope, wanted

__all__ = ["CONFIRMED", "VerificationStore"]

STALE_AFTER_S = 86_400.0
"""Age at which the store of an interrupted verification is discarded, in seconds: its results are then out of date."""
FORMAT = 3
CONFIRMED = 2
"""Number of look-ups that must find an instance absent before it counts as missing."""
PAGE_IDS = 1_000
APPLICATION_ID = 0x62776B76
"""`bwkv`, in the file's header."""
P = ParamSpec("P")
T = TypeVar("T")
PRAGMAS = {
    "application_id": APPLICATION_ID,
    "user_version": FORMAT,
    "cache_size": -16_384,  # KiB
    "synchronous": "NORMAL",
}

SCHEMA = (
    """
CREATE TABLE verification (
  run TEXT NOT NULL,              -- see `Scope.run`
  sample INTEGER,                 -- size of the sample; NULL: all instances
  begun_at REAL NOT NULL, used_at REAL NOT NULL,
  listing INTEGER NOT NULL DEFAULT TRUE, -- the list is still being read
  cursor TEXT,                    -- of the list's next page; NULL: the first page
  debt INTEGER NOT NULL DEFAULT 0 -- requests for the list less the instances that they found, never below 0
)
""",
    """
CREATE TABLE instance (
  row INTEGER PRIMARY KEY, id TEXT NOT NULL,
  existed INTEGER NOT NULL,       -- the checkpoint calls it existed, not created
  status TEXT,                    -- what the service calls it; NULL: not found yet
  absences INTEGER NOT NULL DEFAULT 0 -- look-ups that found it absent
)
""",
)
INDEX = "CREATE INDEX instance_id ON instance (id)"
UNANSWERED = """
SELECT row, id FROM instance AS one WHERE row > ? AND status IS NULL AND absences = ?
  AND NOT EXISTS (SELECT 1 FROM instance AS earlier WHERE earlier.id = one.id AND earlier.row < one.row)
ORDER BY row LIMIT ?
"""


def _in_thread(
    method: "Callable[Concatenate[VerificationStore, P], T]",
) -> "Callable[Concatenate[VerificationStore, P], Awaitable[T]]":
    """Make a method run in the store's thread, after all earlier calls. The caller awaits its result."""

    def begun(store: "VerificationStore", /, *args: P.args, **more: P.kwargs) -> Awaitable[T]:
        return store.executor(partial(method, store, *args, **more))

    update_wrapper(begun, method)
    return begun


class VerificationStore:
    """The one writer of a store. Made by `open`. Only the executor's thread changes it.

    Attributes:
        path: The file.
        executor: Where all SQL runs.
        requests: The log of the verification's requests.
        wanted: Rows whose instances are looked for.
        found: Rows whose instances the service holds.
        missing: Rows whose instances the service does not hold.
        listing: Whether the list is still being read.
        cursor: Cursor of the list's next page; None for the first page.
        debt: Number of requests for the list minus number of instances that they found, never below 0.
        resumed: An earlier session was interrupted, and this one continues it.
        begun_at: When the first session began, in Unix time.
    """

    def __init__(
        self,
        path: Path,
        db: sqlite3.Connection,
        requests: RequestLog,
        lock: filelock.BaseFileLock,
        executor: Executor,
        *,
        resumed: bool,
    ) -> None:
        self.path = path
        self.requests = requests
        self.resumed = resumed
        self.wanted = self.found = self.missing = 0
        self.listing = True
        self.cursor: str | None = None
        self.debt = 0
        self.begun_at = 0.0
        self._db = db
        self._lock = lock
        self.executor = executor
        self._closed: asyncio.Future[None] | None = None

    @property
    def boot(self) -> Boot:
        """The boot by which this session must count its times."""
        return self.requests.boot

    @property
    def answered(self) -> int:
        """Rows for which it is known whether the service holds their instances."""
        return self.found + self.missing

    # --- opening and closing --------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls, scope: Scope, now: float, random: Callable[[], float], executor: Executor, boot: Boot = UNKNOWN_BOOT
    ) -> Self:
        """Open the store of an interrupted verification, or make one. Call it in the executor's thread.

        Args:
            scope: What is to be verified.
            now: Unix time.
            random: Returns a random number from 0 to 1, to draw the sample.
            executor: Where all SQL runs.
            boot: This boot, by the same clock as *now*.

        Raises:
            CheckpointError: Another verification holds it, or the folder can't be written.
        """
        path = store_path(scope.path, scope.sample)
        with contextlib.ExitStack() as if_it_fails:
            lock = acquire_lock(path)
            if_it_fails.callback(release, lock)
            with explained(path):
                _refuse_foreign(path)
                requests = RequestLog.open(request_log_path(path), now, boot)
                if_it_fails.callback(requests.close)
                now -= boot.shift_s(requests.boot)
                resumed = _continues(path, scope, now)
                if not resumed:
                    remove(path)
                make_private(path)
                db = connect(str(path))
                if_it_fails.callback(db.close)
                opened = cls(path, db, requests, lock, executor, resumed=resumed)
                opened._prepare(scope, now, random)
            if_it_fails.pop_all()
            return opened

    async def aclose(self) -> None:
        """Close the files and release the lock after all earlier calls. Then raise a cancellation of the caller."""
        if self._closed is None:
            self._closed = asyncio.ensure_future(self.executor(self._close))
        await until_done(self._closed)

    def _close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        self.requests.close()
        release(self._lock)

    def _prepare(self, scope: Scope, now: float, random: Callable[[], float]) -> None:
        db = self._db
        for name, value in PRAGMAS.items():
            db.execute(f"PRAGMA {name} = {value}")
        db.execute("BEGIN IMMEDIATE")
        if not self.resumed:
            for statement in SCHEMA:
                db.execute(statement)
            query = "INSERT INTO verification (run, sample, begun_at, used_at) VALUES (?, ?, ?, ?)"
            db.execute(query, (scope.run, scope.sample, now, now))
        self._add_rows(scope, random)
        db.execute("COMMIT")
        db.execute("PRAGMA journal_mode = WAL")  # not before: a new file would be written twice
        counts = "SELECT count(*), count(status), count(CASE WHEN absences >= ? AND status IS NULL THEN 1 END)"
        self.wanted, self.found, self.missing = db.execute(f"{counts} FROM instance", (CONFIRMED,)).fetchone()
        row = db.execute("SELECT begun_at, listing, cursor, debt FROM verification").fetchone()
        self.begun_at, listing, self.cursor, self.debt = row
        self.listing = bool(listing)

    def _add_rows(self, scope: Scope, random: Callable[[], float]) -> None:
        """Store the rows to look for. If the run has continued since an earlier session, add its new rows."""
        known = self._db.execute("SELECT count(*) FROM instance").fetchone()[0]
        if self.resumed and (scope.sample is not None or known == scope.total):
            return
        rows = ((result.row, result.id, result.outcome == "existed") for result in wanted(scope, random))
        # Sorting all ids at once costs less than finding the place of each.
        self._db.execute("DROP INDEX IF EXISTS instance_id")
        self._db.executemany("INSERT OR IGNORE INTO instance (row, id, existed) VALUES (?, ?, ?)", rows)
        self._db.execute(INDEX)
        # The list may show instances that were absent: earlier absences do not count any more.
        self._db.execute("UPDATE instance SET absences = 0 WHERE status IS NULL")
        self._db.execute("UPDATE verification SET listing = TRUE, cursor = NULL, debt = 0")

    # --- writing --------------------------------------------------------------------------------------------------

    @_in_thread
    def listed(self, instances: Sequence[tuple[str, str]], cursor: str | None, requests: int, now: float) -> None:
        """Store a page of the list.

        Args:
            instances: (id, status) of each instance on it.
            cursor: Cursor of the next page; None for the first page.
            requests: Number of requests that the page took.
            now: Unix time.
        """
        with self._writing(now):
            found = sum(self._find(instance_id, status) for instance_id, status in instances)
            debt = max(0, self.debt + requests - found)
            self._db.execute("UPDATE verification SET cursor = ?, debt = ?", (cursor, debt))
        self.cursor, self.debt = cursor, debt
        self.found += found

    @_in_thread
    def end_listing(self, now: float) -> None:
        """Store that no more pages of the list will be read."""
        with self._writing(now):
            self._db.execute("UPDATE verification SET listing = FALSE")
        self.listing = False

    @_in_thread
    def present(self, instance_id: str, status: str, now: float) -> None:
        """Store that a look-up has found the instance."""
        with self._writing(now):
            found = self._find(instance_id, status)
        self.found += found

    @_in_thread
    def absent(self, instance_id: str, now: float) -> None:
        """Store that a look-up has not found the instance."""
        add = "UPDATE instance SET absences = absences + 1 WHERE id = ? AND status IS NULL"
        count = "SELECT count(*) FROM instance WHERE id = ? AND status IS NULL AND absences = ?"
        with self._writing(now):
            self._db.execute(add, (instance_id,))
            missing = self._db.execute(count, (instance_id, CONFIRMED)).fetchone()[0]
        self.missing += missing

    def _find(self, instance_id: str, status: str) -> int:
        """Store an instance's status; returns the number of rows that had none before."""
        query = "UPDATE instance SET status = ? WHERE id = ? AND status IS NULL"
        return self._db.execute(query, (status, instance_id)).rowcount

    @contextlib.contextmanager
    def _writing(self, now: float) -> Iterator[None]:
        """Make the block one transaction, which also stores *now* as the time of the last use."""
        with explained(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("UPDATE verification SET used_at = ?", (now,))
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    # --- reading --------------------------------------------------------------------------------------------------

    async def unanswered(self, absences: int) -> AsyncGenerator[str, None]:
        """The ids that were not found yet and that exactly *absences* look-ups found absent. Each id comes once."""
        after = -1
        while page := await self._all(UNANSWERED, after, absences, PAGE_IDS):
            with explained(self.path):
                if not ids_are_good([instance_id for _, instance_id in page]):
                    raise ValueError("it holds an id that no run writes")
            for after, instance_id in page:  # noqa: B007 - where the next page begins
                yield instance_id

    async def any_id(self, *, found: bool) -> str | None:
        """The id of any one instance, preferably one that the service is known to hold; None if there is none.

        Args:
            found: Return only the id of an instance that the service is known to hold.
        """
        rows = await self._all("SELECT id FROM instance WHERE status IS NOT NULL LIMIT 1")
        if not (rows or found):
            rows = await self._all("SELECT id FROM instance LIMIT 1")
        return rows[0][0] if rows and ids_are_good([rows[0][0]]) else None

    async def statuses(self) -> dict[str, int]:
        """Rows by the status of their instances, the most frequent first."""
        query = "SELECT status, count(*) FROM instance WHERE status IS NOT NULL GROUP BY status ORDER BY 2 DESC, 1"
        return dict(await self._all(query))

    @_in_thread
    def _all(self, query: str, *values: Any) -> list[Any]:
        with explained(self.path):
            return self._db.execute(query, values).fetchall()


def _continues(path: Path, scope: Scope, now: float) -> bool:
    """Whether the store at *path* is recent and belongs to the same verification."""
    if not path.exists() or not path.stat().st_size:
        return False
    with contextlib.closing(connect(str(path))) as db:
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:  # interrupted while it was made
            return False
        run, sample, used_at = db.execute("SELECT run, sample, used_at FROM verification").fetchone()
    return (run, sample) == (scope.run, scope.sample) and abs(now - used_at) <= STALE_AFTER_S


def _refuse_foreign(path: Path) -> None:
    """Refuse to overwrite another program's file; delete a store of another format."""
    if not path.exists() or not path.stat().st_size:
        return
    try:
        with contextlib.closing(connect(str(path))) as db:
            application, version = (
                db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            )
    except sqlite3.DatabaseError:
        application = version = 0
    if application != APPLICATION_ID:
        raise foreign_file(path)
    if version != FORMAT:
        remove(path)
