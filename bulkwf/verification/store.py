"""What a verification has found so far: a SQLite file beside the checkpoint, `<checkpoint>.verify`.

It holds an id a line, because ten million of them do not fit into memory. It is written without waiting for the disk:
what a power cut takes is asked for again. At the end only the requests of the last five minutes stay in it, because
they count against the token's limit whoever sends the next one. A sample has a file of its own, `….verify-sample`.
"""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from math import ceil
from pathlib import Path
from typing import Any, Self

import filelock

from bulkwf.batching import ids_are_good
from bulkwf.checkpoint.file import acquire, connect, connect_reader, explained, make_private, release, remove
from bulkwf.checkpoint.reading import Status, read_results
from bulkwf.checkpoint.records import LAST_WORDS, read_batch
from bulkwf.checkpoint.schema import Past
from bulkwf.errors import CheckpointError
from bulkwf.model import UNKNOWN_BOOT, Boot, Finding, Result
from bulkwf.options import REQUEST_PERIOD_S
from bulkwf.windows import Said

__all__ = ["Findings", "Scope", "read_past"]

STALE_AFTER_S = 86_400.0
"""A verification that was cut off longer ago than this begins anew: what it found says too little about today."""
FORMAT = 2
CONFIRMED = 2
"""So often must an instance be asked for and be absent to be called missing."""
PAGE_IDS = 1_000
APPLICATION_ID = 0x62776B76
"""`bwkv`, in the file's header."""
SUFFIXES = (".verify", ".verify-sample")
MOST_A_SECOND = 10_000
"""Whatever a damaged file says of the requests of a second."""
CACHE_KIB = 16_384

SCHEMA = """
CREATE TABLE IF NOT EXISTS verification (
  run TEXT NOT NULL,              -- of which run this is: when it was created, and its run key
  sample INTEGER,                 -- so many instances drawn at random; NULL for all
  begun_at REAL NOT NULL, used_at REAL NOT NULL,
  boot_id TEXT NOT NULL, booted_at REAL NOT NULL, -- see the checkpoint's
  pause_until REAL NOT NULL DEFAULT 0,
  listing INTEGER NOT NULL DEFAULT TRUE, -- whether the list is still being read
  pass INTEGER NOT NULL DEFAULT 1, -- for the how-manieth time
  cursor TEXT,                    -- of the list's next page
  pages INTEGER NOT NULL DEFAULT 0, found_by_list INTEGER NOT NULL DEFAULT 0,
  pass_pages INTEGER NOT NULL DEFAULT 0, pass_found INTEGER NOT NULL DEFAULT 0 -- the same of this reading
);
CREATE TABLE IF NOT EXISTS instance (
  id TEXT NOT NULL, row INTEGER NOT NULL, outcome TEXT NOT NULL,
  status TEXT,                    -- what the service says of it; NULL: nothing yet
  absences INTEGER NOT NULL DEFAULT 0, -- how often it was asked for and was not there
  pass INTEGER NOT NULL DEFAULT 0, -- the last reading of the list that showed it
  PRIMARY KEY (id, row)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sent (
  second INTEGER PRIMARY KEY,     -- rounded up: nothing may be taken for older than it is
  requests INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS said ( -- what the last answers said is left for the token, see the checkpoint's attempts
  id INTEGER PRIMARY KEY, heard_at REAL NOT NULL, sent_at REAL NOT NULL, quota TEXT NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class Scope:
    """What is to be verified.

    Attributes:
        path: The checkpoint.
        status: What it says of its run as a whole.
        sample: So many instances drawn at random; None for all.
    """

    path: Path
    status: Status
    sample: int | None

    @property
    def total(self) -> int:
        """Rows that the checkpoint calls created or existed."""
        return self.status.counts.created + self.status.counts.existed

    @property
    def run(self) -> str:
        """Which run it is."""
        return f"{self.status.created_at!r} {self.status.header.run_key}"


class Findings:
    """The one writer of a verification's file. Made by `open`.

    Attributes:
        wanted: Rows whose instances are looked for.
        found: How many of those rows the service holds.
        missing: How many it does not.
        listing: Whether the list is still worth reading.
        cursor: Of the list's next page; None for the first.
        pages: Pages of the list asked for so far.
        found_by_list: How many rows were found on them.
        pass_pages: The same of this reading of the list.
        pass_found: The same of this reading of the list.
        resumed: An earlier session was cut off, and is continued.
        begun_at: When the first session began, in Unix time.
        boot: How this session's times must be counted.
        spent: The verification has come to its end, and what it found has been told.
    """

    def __init__(
        self, path: Path, checkpoint: Path, db: sqlite3.Connection, lock: filelock.BaseFileLock, boot: Boot
    ) -> None:
        self.path = path
        self._checkpoint = checkpoint
        self._db = db
        self._lock = lock
        self.wanted = self.found = self.missing = 0
        self.pages = self.found_by_list = self.pass_pages = self.pass_found = 0
        self.listing = True
        self.cursor: str | None = None
        self.resumed = False
        self.begun_at = 0.0
        self.boot = boot
        self.spent = False
        self._pass = 1

    @classmethod
    def open(cls, scope: Scope, now: float, draw: Callable[[], float], boot: Boot = UNKNOWN_BOOT) -> Self:
        """Open the file of a verification that was cut off, or make one.

        Args:
            scope: What is to be verified.
            now: Unix time.
            draw: A random number from 0 to 1; draws the sample.
            boot: This boot, by the clock that *now* is of.

        Raises:
            CheckpointError: Another verification holds it, or the folder can't be written.
        """
        path = _beside(scope.path, SUFFIXES[scope.sample is not None])
        lock = acquire(path, held="it is being verified already", advice="Verify a copy of the checkpoint elsewhere.")
        try:
            with _explained(path):
                _refuse_foreign(path)
                make_private(path)
                db = connect(str(path))
                try:
                    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    db.execute(f"PRAGMA user_version = {FORMAT}")
                    db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
                    db.execute("PRAGMA journal_mode = WAL")
                    db.execute("PRAGMA synchronous = NORMAL")
                    findings = cls(path, scope.path, db, lock, boot)
                    findings._prepare(scope, now, draw)
                except BaseException:
                    db.close()
                    raise
                return findings
        except BaseException:
            release(lock)
            raise

    def close(self) -> None:
        """Close the file; once it is of no more use, only what was sent lately stays in it."""
        with contextlib.suppress(sqlite3.Error):
            if self.spent:
                self._forget_all()
            self._db.close()
        release(self._lock)

    def _forget_all(self) -> None:
        db = self._db
        now, pause_until = db.execute("SELECT used_at, pause_until FROM verification").fetchone()
        db.execute("DELETE FROM sent WHERE second <= ?", (now - REQUEST_PERIOD_S,))
        if pause_until <= now and not db.execute("SELECT count(*) FROM sent").fetchone()[0]:
            db.close()
            remove(self.path)
            return
        db.execute("DROP TABLE instance")
        db.execute("UPDATE verification SET run = ''")  # nothing goes on from here
        db.execute("VACUUM")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _prepare(self, scope: Scope, now: float, draw: Callable[[], float]) -> None:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        for statement in SCHEMA.split(";\n"):
            db.execute(statement)
        if (stored := _stored_boot(db)) is not None:
            now -= self.boot.shift_s(stored)
            self.boot = self.boot.going_on(stored)
            db.execute("UPDATE verification SET boot_id = ?, booted_at = ?", self.boot)
        told = db.execute("SELECT run, sample, used_at FROM verification").fetchone()
        self.resumed = (
            told is not None and told[:2] == (scope.run, scope.sample) and abs(now - told[2]) <= STALE_AFTER_S
        )
        if not self.resumed:  # what was sent still counts, and a silence that was ordered still binds
            pause_until = db.execute("SELECT coalesce(max(pause_until), 0) FROM verification").fetchone()[0]
            for statement in ("DELETE FROM verification", "DROP TABLE instance", *SCHEMA.split(";\n")):
                db.execute(statement)
            db.execute(
                "INSERT INTO verification (run, sample, begun_at, used_at, boot_id, booted_at, pause_until) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (scope.run, scope.sample, now, now, *self.boot, pause_until),
            )
        self._want(scope, draw)
        db.execute("COMMIT")
        counts = "SELECT count(*), count(status), total(absences >= ? AND status IS NULL) FROM instance"
        self.wanted, self.found, missing = db.execute(counts, (CONFIRMED,)).fetchone()
        self.missing = int(missing)
        self.begun_at, listing, self._pass, self.cursor, *counters = db.execute(
            "SELECT begun_at, listing, pass, cursor, pages, found_by_list, pass_pages, pass_found FROM verification"
        ).fetchone()
        self.listing = bool(listing)
        self.pages, self.found_by_list, self.pass_pages, self.pass_found = counters

    def _want(self, scope: Scope, draw: Callable[[], float]) -> None:
        """Write down what is to be looked for; of a run that has gone on since, what is new."""
        known = self._db.execute("SELECT count(*) FROM instance").fetchone()[0]
        if self.resumed and (scope.sample is not None or known == scope.total):
            return
        rows = ((result.id, result.row, result.outcome) for result in _wanted(scope, draw))
        self._db.executemany("INSERT OR IGNORE INTO instance (id, row, outcome) VALUES (?, ?, ?)", rows)
        self._db.execute(
            "UPDATE verification SET listing = TRUE, cursor = NULL, pass = pass + 1, pass_pages = 0, pass_found = 0"
        )

    # --- what the service says ------------------------------------------------------------------------------------

    def listed(self, instances: Iterable[tuple[str, str]], cursor: str | None, now: float) -> tuple[int, int]:
        """Take in a page of the list, (id, status) each, and where it goes on.

        Returns:
            How many rows this reading of the list has not shown before, and how many nothing has.
        """
        seen = "UPDATE instance SET pass = ? WHERE id = ? AND pass < ?"
        fresh = new = 0
        with self._writing(now):
            for instance_id, status in instances:
                fresh += self._db.execute(seen, (self._pass, instance_id, self._pass)).rowcount
                new += self._find(instance_id, status)
            self.cursor = cursor
            self.pages += 1
            self.pass_pages += 1
            self.found_by_list += new
            self.pass_found += new
            self._db.execute(
                "UPDATE verification SET cursor = ?, pages = ?, found_by_list = ?, pass_pages = ?, pass_found = ?",
                (cursor, self.pages, self.found_by_list, self.pass_pages, self.pass_found),
            )
        return fresh, new

    def list_again(self, now: float) -> None:
        """The list is read from its start once more."""
        self._pass += 1
        self.cursor = None
        self.pass_pages = self.pass_found = 0
        with self._writing(now):
            self._db.execute(
                "UPDATE verification SET pass = ?, cursor = NULL, pass_pages = 0, pass_found = 0", (self._pass,)
            )

    def end_listing(self, now: float) -> None:
        """The list is read as far as it is worth it."""
        self.listing = False
        with self._writing(now):
            self._db.execute("UPDATE verification SET listing = FALSE")

    def present(self, instance_id: str, status: str, now: float) -> None:
        """The service has the instance."""
        with self._writing(now):
            self._find(instance_id, status)

    def absent(self, instance_id: str, now: float) -> None:
        """The service was asked for the instance, and does not have it."""
        unanswered = "id = ? AND status IS NULL"
        count = f"SELECT count(*) FROM instance WHERE {unanswered} AND absences = ?"  # noqa: S608 - text of ours
        with self._writing(now):
            self._db.execute(f"UPDATE instance SET absences = absences + 1 WHERE {unanswered}", (instance_id,))  # noqa: S608
            self.missing += self._db.execute(count, (instance_id, CONFIRMED)).fetchone()[0]

    def pause(self, until: float, now: float) -> None:
        """Remember that the service has ordered silence until *until* (Unix time)."""
        with self._writing(now):
            self._db.execute("UPDATE verification SET pause_until = max(pause_until, ?)", (until,))

    def said(self, said: Said) -> None:
        """Remember what an answer says is left for the token, in Unix time."""
        with self._writing(said.heard_at):
            self._db.execute("INSERT INTO said (heard_at, sent_at, quota) VALUES (?, ?, ?)", said)
            self._db.execute("DELETE FROM said WHERE id <= (SELECT max(id) FROM said) - ?", (LAST_WORDS,))

    def _find(self, instance_id: str, status: str) -> int:
        query = "UPDATE instance SET status = ? WHERE id = ? AND status IS NULL"
        new = self._db.execute(query, (status, instance_id)).rowcount
        self.found += new
        return new

    def sent(self, now: float) -> None:
        """A request is about to be sent."""
        query = "INSERT INTO sent VALUES (?, 1) ON CONFLICT (second) DO UPDATE SET requests = requests + 1"
        with self._writing(now):
            self._db.execute(query, (ceil(now),))

    @contextlib.contextmanager
    def _writing(self, now: float) -> Iterator[None]:
        """One transaction; half of it is never kept."""
        with _explained(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("UPDATE verification SET used_at = ?", (now,))
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    # --- questions ------------------------------------------------------------------------------------------------

    def unanswered(self, absences: int) -> Iterator[str]:
        """The ids of which nothing is known yet, and that were absent so often."""
        query = "SELECT DISTINCT id FROM instance WHERE status IS NULL AND absences = ? AND id > ? ORDER BY id LIMIT ?"
        after = ""
        while page := [instance_id for (instance_id,) in self._all(query, absences, after, PAGE_IDS)]:
            with _explained(self.path):
                if not ids_are_good(page):
                    raise ValueError("it holds an id that no run writes")
            yield from page
            after = page[-1]

    def any_found(self) -> str | None:
        """The id of an instance that the service is known to hold; None if none is known."""
        found = [
            instance_id for (instance_id,) in self._all("SELECT id FROM instance WHERE status IS NOT NULL LIMIT 1")
        ]
        return found[0] if found and ids_are_good(found) else None

    def statuses(self) -> dict[str, int]:
        """How many rows' instances have which status, the most frequent first."""
        query = "SELECT status, count(*) FROM instance WHERE status IS NOT NULL GROUP BY status ORDER BY 2 DESC, 1"
        return dict(self._all(query))

    def bad(self, now: float, *, asked_for_all: bool) -> Iterator[Finding]:
        """The rows whose instances are missing, errored or unknown, in the order of the rows.

        Args:
            now: Unix time.
            asked_for_all: Every instance was asked for: what nothing is known of is unknown, not left for later.
        """
        query = (
            "SELECT row, id, outcome, status, absences FROM instance "
            "WHERE status = 'errored' OR (status IS NULL AND absences >= ?) ORDER BY row"
        )
        least = 0 if asked_for_all else CONFIRMED
        with _explained(self.path), contextlib.closing(connect_reader(self._checkpoint)) as checkpoint:
            for row, instance_id, outcome, status, absences in self._db.execute(query, (least,)):
                if status is not None:
                    message = "the instance ended with an error"
                    yield Finding(row=row, id=instance_id, outcome="errored", status=status, message=message)
                    continue
                if absences < CONFIRMED:
                    message = (
                        "the service does not answer when it is asked for the instance; run the same command again"
                    )
                    yield Finding(row=row, id=instance_id, outcome="unknown", message=message)
                    continue
                with explained(self._checkpoint):
                    begun = read_batch(checkpoint, row)
                message = f"the checkpoint calls it {outcome}, and the service has no such instance"
                forgotten = now > begun.begun_at + begun.retention_s
                if forgotten or outcome == "existed":  # an `existed` one is older than the run
                    message += "; it may have passed its retention"
                yield Finding(row=row, id=instance_id, outcome="missing", message=message)

    def _all(self, query: str, *values: Any) -> list[Any]:
        with _explained(self.path):
            return self._db.execute(query, values).fetchall()


def read_past(checkpoint: Path, since: float, boot: Boot = UNKNOWN_BOOT) -> Past:
    """What verifications of *checkpoint* know of the requests after *since*, and of what may bind the next one.

    Args:
        checkpoint: The checkpoint's file.
        since: Unix time.
        boot: Counts *since* and the times given.
    """
    past = Past([], 0.0, [])
    for suffix in SUFFIXES:
        path = _beside(checkpoint, suffix)
        if not path.is_file():
            continue
        with contextlib.suppress(sqlite3.Error, TypeError, ValueError), contextlib.closing(connect(str(path))) as db:
            shift_s = boot.shift_s(_stored_boot(db) or UNKNOWN_BOOT)
            past = past.joined(_past(db, since - shift_s).shifted(shift_s))
    return past


def _past(db: sqlite3.Connection, since: float) -> Past:
    pause_until = db.execute("SELECT pause_until FROM verification").fetchone()[0]
    words = sorted(Said.of(*word) for word in db.execute("SELECT heard_at, sent_at, quota FROM said"))
    since = min([since, *(said.heard_at for said in words)])
    seconds = db.execute("SELECT second, requests FROM sent WHERE second >= ?", (since,)).fetchall()
    sent = [(at, 0) for at, requests in seconds for _ in range(min(requests, MOST_A_SECOND))]
    return Past(sent, float(pause_until), words)


def _stored_boot(db: sqlite3.Connection) -> Boot | None:
    """The last boot that has written to the file; None if it is new."""
    stored = db.execute("SELECT boot_id, booted_at FROM verification").fetchone()
    return None if stored is None else Boot(str(stored[0]), float(stored[1]))


def _beside(checkpoint: Path, suffix: str) -> Path:
    real = Path(os.path.realpath(checkpoint))
    return real.with_name(real.name + suffix)


def _refuse_foreign(path: Path) -> None:
    """Refuse to write over a file of that name that is no verification's; clear one of another format away."""
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
        raise CheckpointError(f"{path}: what is found would be kept there, but another file has that name. Move it.")
    if version != FORMAT:
        remove(path)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what SQLite and the system say into a `CheckpointError`."""
    try:
        yield
    except (sqlite3.Error, OSError, TypeError, ValueError) as error:  # the latter for what no column of ours can hold
        if "full" in str(error):
            advice = "Make room on the disk and run the same command again: it goes on where it was."
        else:
            advice = "Its folder must be writable. If the file is damaged, delete it: only what was found is lost."
        raise CheckpointError(f"{path}: what is found can't be kept: {error}. {advice}") from None


def _wanted(scope: Scope, draw: Callable[[], float]) -> Iterator[Result]:
    """The results whose instances are to be looked for."""
    found = chain(read_results(scope.path, outcome="created"), read_results(scope.path, outcome="existed"))
    if scope.sample is None:
        yield from found
        return
    if scope.sample < 1:
        raise CheckpointError("a sample has at least one instance.")
    chosen = sorted(_draw(min(scope.sample, scope.total), scope.total, draw))
    after = 0
    for position in chosen:  # a run under way may have more by now, never fewer
        yield from islice(found, position - after, position - after + 1)
        after = position + 1


def _draw(number: int, total: int, draw: Callable[[], float]) -> set[int]:
    """So many different positions of *total* ones."""
    # Floyd's way: each set of that size is as likely as any other, and nothing is drawn twice.
    chosen: set[int] = set()
    for top in range(total - number, total):
        position = min(top, int(draw() * (top + 1)))
        chosen.add(top if position in chosen else position)
    return chosen
