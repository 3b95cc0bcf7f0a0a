"""Opens, creates and moves a checkpoint's file, and refuses a file that is damaged or belongs to another run."""

import contextlib
import os
import sqlite3
import stat
from dataclasses import asdict
from math import inf
from pathlib import Path

from bulkwf.checkpoint.attempts import read_past
from bulkwf.checkpoint.records import Survey, seal_run, survey
from bulkwf.checkpoint.schema import (
    ANOTHER,
    APPLICATION_ID,
    FORMAT,
    HEADER_FIELDS,
    IDENTITY,
    SCHEMA,
    SESSIONS,
    RunHeader,
)
from bulkwf.checkpoint.sessions import end_killed, has_log, verify_sessions
from bulkwf.clock import Boot
from bulkwf.errors import CheckpointError

__all__ = [
    "check",
    "connect",
    "connect_reader",
    "create",
    "inode",
    "make_private",
    "prepare",
    "remove",
]

BUSY_TIMEOUT_S = 10.0
OLDEST_SQLITE = (3, 31, 0)
"""The first version with `PRAGMA trusted_schema`. All SQL must work there: no RETURNING, no upsert without a target."""


def connect(name: str) -> sqlite3.Connection:
    """A connection that may write, used by one thread at a time."""
    _require_sqlite(sqlite3.sqlite_version_info)
    db = sqlite3.connect(name, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA trusted_schema = OFF")
    # macOS: a plain fsync leaves data in the drive's cache. Elsewhere these two do nothing.
    db.execute("PRAGMA fullfsync = ON")
    db.execute("PRAGMA checkpoint_fullfsync = ON")
    return db


def _require_sqlite(version: tuple[int, int, int]) -> None:
    if version < OLDEST_SQLITE:
        found, needed = (".".join(map(str, one)) for one in (version, OLDEST_SQLITE))
        raise CheckpointError(
            f"this Python's SQLite is {found}, and checkpoints need {needed} or newer. Use a newer Python or system."
        )


def connect_reader(path: Path) -> sqlite3.Connection:
    """A connection that only reads the checkpoint at *path*."""
    _require_sqlite(sqlite3.sqlite_version_info)
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: this is not a regular file. Name the checkpoint's file.")
    refuse_orphan(path)  # SQLite would delete the log of an empty file
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such checkpoint. `bulkwf run` makes one, beside its input.")
    uri = path.resolve().as_uri()
    if has_log(path):
        uri += "?mode=ro"  # otherwise SQLite would fold the log into the file at the end: only the next session may
    elif os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        uri += "?mode=rw"  # the empty log that SQLite makes for a reader is removed with the last connection
    else:
        uri += "?mode=ro&immutable=1"  # no process writes it, and SQLite can make no log there
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        _check_format(db, path)
        db.execute("PRAGMA query_only = ON")
    except BaseException:
        db.close()
        raise
    return db


def is_new(path: Path) -> bool:
    """Whether no checkpoint was ever at *path*: there is no file, or one of 0 bytes."""
    return not path.exists() or path.stat().st_size == 0


def prepare(path: Path, header: RunHeader, now: float, boot: Boot, *, new: bool) -> None:
    """Make the checkpoint at *path* unless it exists.

    Args:
        path: The file; the caller holds its lock.
        header: The run, for a new checkpoint.
        now: Unix time.
        boot: This boot, by the same clock as *now*.
        new: Move a finished checkpoint aside first.
    """
    refuse_orphan(path)
    if new:
        move_aside(path, now)
    if is_new(path):
        create_file(path, header, now, boot)
    make_private(path)


def create(db: sqlite3.Connection, header: RunHeader, now: float, boot: Boot) -> None:
    """Make the tables of a new checkpoint, and store the run's record."""
    names = ", ".join(HEADER_FIELDS)
    places = ", ".join(f":{name}" for name in HEADER_FIELDS)
    db.executescript(
        f"BEGIN IMMEDIATE; {SCHEMA} {SESSIONS} PRAGMA application_id = {APPLICATION_ID}; "
        f"PRAGMA user_version = {FORMAT};"
    )
    db.execute(
        f"INSERT INTO run (created_at, boot_id, booted_at, {names}) "  # noqa: S608 - names of ours
        f"VALUES (:created_at, :boot_id, :booted_at, {places})",
        asdict(header) | {"created_at": float(now), "boot_id": boot.id, "booted_at": boot.at},
    )
    seal_run(db)
    db.execute("COMMIT")


def create_file(path: Path, header: RunHeader, now: float, boot: Boot) -> None:
    """Make a new checkpoint, durably: all of it or nothing.

    The file is made under another name and then renamed. Under its final name, a kill could leave a rollback journal
    beside it, which SQLite would apply to a checkpoint that is put there later.
    """
    new = path.with_name(path.name + "-new")
    remove(new)  # left by a kill
    try:
        make_private(new)
        with contextlib.closing(connect(str(new))) as db:
            db.execute("PRAGMA synchronous = EXTRA")
            create(db, header, now, boot)
            # Not earlier: the run key would be in the log, and the main file alone would lack it.
            mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":  # SQLite gives no reason
            raise CheckpointError(
                f"{path}: SQLite can't keep its write-ahead log there: the disk is failing, or its file system does "
                "not support shared memory. "
                f"Name another place with -c. {ANOTHER}"
            )
        new.rename(path)
    finally:
        with contextlib.suppress(OSError):
            remove(new)
    _sync_folder(path)


def remove(path: Path) -> None:
    """Delete a database and all files that SQLite may have made beside it."""
    for suffix in ("", "-journal", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def check(db: sqlite3.Connection, path: Path, header: RunHeader, *, any_run_key: bool) -> Survey:
    """Refuse a checkpoint that is damaged or another run's, before anything is written to it; returns what it holds."""
    found = survey(db)
    _check_header(found.run.header, path, header, any_run_key=any_run_key)
    read_past(db, inf)
    verify_sessions(db)
    return found


def _check_format(db: sqlite3.Connection, path: Path) -> None:
    application = db.execute("PRAGMA application_id").fetchone()[0]
    if application != APPLICATION_ID:
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise CheckpointError(
                f"{path}: this database is empty. If it is a checkpoint, it was copied or moved without its log "
                f"({path.name}-wal): put the two together again. {ANOTHER}"
            )
        raise CheckpointError(f"{path}: this is not a checkpoint of bulkwf. Name another file.")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > FORMAT:
        raise CheckpointError(
            f"{path}: the checkpoint has format {version}, made by a newer bulkwf; this one knows format {FORMAT}. "
            "Update bulkwf."
        )
    if version < FORMAT:
        raise CheckpointError(
            f"{path}: the checkpoint has format {version}, made by an older bulkwf; this one knows format {FORMAT}. "
            f"Finish the run with the bulkwf that began it. {ANOTHER}"
        )


def _check_header(known: RunHeader, path: Path, given: RunHeader, *, any_run_key: bool) -> None:
    for name in IDENTITY:
        theirs, ours = getattr(known, name), getattr(given, name)
        if theirs != ours and not (name == "run_key" and any_run_key):
            what = name.replace("_", " ")
            raise CheckpointError(
                f"{path}: the checkpoint belongs to another run: its {what} is {theirs!r}, this run's is {ours!r}. "
                f"To continue that run, give the same {what} as then. {ANOTHER}"
            )


def move_aside(path: Path, now: float) -> None:
    """Give a finished checkpoint another name."""
    if is_new(path):
        return
    with contextlib.closing(connect_reader(path)) as reader:
        found = survey(reader)
    finished = found.run.finished_at is not None and not found.in_doubt
    if not finished:
        raise CheckpointError(
            f"{path}: the run in this checkpoint is not finished. --new would forget which rows were started, and rows "
            "without ids of their own would start again. Finish the run first: run without --new."
        )
    with contextlib.closing(connect(str(path))) as db:
        end_killed(db, now)
        # The log must be empty: SQLite would look for it under the file's new name.
        busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    if busy:
        raise CheckpointError(f"{path}: another program is reading the checkpoint. Run again when it has ended.")
    aside = path.with_name(f"{path.name}.{int(now)}")
    while aside.exists():
        aside = aside.with_name(aside.name + "~")
    path.rename(aside)
    for suffix in ("-wal", "-shm"):  # those of an idle reader: the new checkpoint must not share them
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def refuse_orphan(path: Path) -> None:
    """Refuse a path at which there is the log of an interrupted run, but no checkpoint."""
    for suffix in ("-wal", "-journal"):
        log = path.with_name(path.name + suffix)
        if log.exists() and is_new(path):
            raise CheckpointError(
                f"{path}: the checkpoint is gone or empty, but its log is there: a run was cut off, and the file was "
                f"moved, deleted or overwritten. Put it back; or delete {log} to start over. {ANOTHER}"
            )


def make_private(path: Path) -> None:
    """Create the file, for its owner only; refuse an existing file that every user may write."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if path.stat().st_mode & stat.S_IWOTH:
            raise CheckpointError(f"{path}: every user may write this file. Run `chmod 600` on it first.") from None


def _sync_folder(path: Path) -> None:
    """Make the file's name as durable as its content."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inode(path: Path | None) -> tuple[int, int] | None:
    """Identifies the file that *path* names at present; None if there is none."""
    if path is None:
        return None
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
