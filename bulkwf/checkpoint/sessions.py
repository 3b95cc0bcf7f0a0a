"""The sessions of a checkpoint: one row per process, written so that the main file alone shows an unclean end.

SQLite keeps the newest commits in a log beside the file (`-wal`) until the session ends. A file that was copied or
moved without its log looks whole, but lacks the rows that were begun last. Three rules make the loss visible:

1. A session's row, without an end, is in the main file before its first batch begins.
2. Its end is written with the last commit, and only then is the log folded into the main file.
3. No reader folds a log (see `connect_reader`), so after a kill the log stays beside the file until the next session.

So if a session has no end and there is no log, the log is missing, or another program has folded it; the file does not
show which. A log of 0 bytes does not count: SQLite makes one for each reader. Nor does one without SQLite's header.
"""

import logging
import os
import socket
import sqlite3
import struct
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from bulkwf.checkpoint.attempts import attempt_row
from bulkwf.checkpoint.errors import Damage
from bulkwf.checkpoint.records import checksum, seal_run
from bulkwf.checkpoint.schema import NOTE, Attempt
from bulkwf.clock import Boot
from bulkwf.errors import CheckpointError

__all__ = [
    "begin_session",
    "end_killed",
    "end_session",
    "has_log",
    "log_is_missing",
    "lost_since",
    "refuse_torn",
    "seal_sessions",
    "verify_sessions",
    "warn_of_lost_log",
    "warn_of_missing_log",
]

log = logging.getLogger("bulkwf")

INTERRUPTED = "interrupted"
"""The verdict of an attempt that a session may have begun before it was killed."""
LOG_MAGIC = {b"\x37\x7f\x06\x82": "<", b"\x37\x7f\x06\x83": ">"}
"""The first bytes of SQLite's log, and the byte order of its checksums (SQLite's file format, section 4)."""
UNKNOWN_INSTANCES = 10_000
"""Number of instances that a session with a missing log may have sent last: more than any rate allows in a second."""


def has_log(path: Path) -> bool:
    """Whether the checkpoint has a log that SQLite would read."""
    try:
        with path.with_name(path.name + "-wal").open("rb") as file:
            return _is_log_header(file.read(32))
    except FileNotFoundError:
        return False


def _is_log_header(head: bytes) -> bool:
    """Whether a log begins with *head*: six words and their checksum, in the byte order that the first one gives."""
    if len(head) < 32 or head[:4] not in LOG_MAGIC:
        return False
    words = struct.unpack(LOG_MAGIC[head[:4]] + "6I", head[:24])
    first = second = 0
    for odd, even in zip(words[::2], words[1::2], strict=True):
        first = (first + odd + second) % 2**32
        second = (second + even + first) % 2**32
    return head[24:] == struct.pack(">2I", first, second)


def log_is_missing(db: sqlite3.Connection, path: Path) -> bool:
    """Whether the last session has not ended, and the log that it must have written is not there."""
    # Read twice: a writer that ends in between removes its log.
    return _is_open(db) and not has_log(path) and _is_open(db)


def _is_open(db: sqlite3.Connection) -> bool:
    last = db.execute("SELECT ended_at FROM session ORDER BY id DESC LIMIT 1").fetchone()
    return last is not None and last[0] is None


@cache
def warn_of_missing_log(path: Path) -> None:
    """Warn, once for each path, that the checkpoint may lack what the last session did."""
    log.warning(
        "%s: the last session did not end cleanly and its log (%s-wal) is missing: what it did last may not be shown. "
        "If you have the file and its log together in another place, use those two",
        path,
        path.name,
    )


def refuse_torn(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a main file that is inconsistent without its log: it was copied while the log was folded into it."""
    if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise CheckpointError(
            f"{path}: the last session did not end cleanly, its log ({path.name}-wal) is missing, and without it the "
            "file is damaged. Put the log back beside the file, or restore both from a copy."
        )


def begin_session(
    db: sqlite3.Connection,
    path: Path | None,
    limits: str,
    now: float,
    boot: Boot,
    *,
    in_doubt: Sequence[tuple[int, int]] = (),
    log_lost: bool = False,
) -> None:
    """Store in the main file that a process continues the run.

    An attempt is stored for each batch in doubt, because its last request may have been sent without being stored. It
    counts from *now*, so that a process that is killed repeatedly can't exceed the service's limits.

    Args:
        db: The writer's connection.
        path: The checkpoint; None if it is in memory.
        limits: This session's limits, as JSON.
        now: Unix time, counted by *boot*.
        boot: The boot by which this session counts its times.
        in_doubt: (first row, instances) of each batch that is not settled.
        log_lost: The log of the last session is missing.
    """
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("BEGIN IMMEDIATE")
    if log_lost:
        db.execute("UPDATE session SET log_lost = TRUE, crc = NULL WHERE id = (SELECT max(id) FROM session)")
        in_doubt = [*in_doubt, (0, UNKNOWN_INSTANCES)]
    # Shows, before the first request, that the file can be written.
    db.execute("UPDATE run SET limits = ?, boot_id = ?, booted_at = ?, finished_at = NULL", (limits, *boot))
    seal_run(db)
    interrupted = (Attempt(row, now, 0.0, instances, None, INTERRUPTED, None) for row, instances in in_doubt)
    db.executemany(NOTE, map(attempt_row, interrupted))
    db.execute("INSERT INTO session (started_at, pid, host) VALUES (?, ?, ?)", (now, os.getpid(), socket.gethostname()))
    seal_sessions(db)
    db.execute("COMMIT")
    # Not TRUNCATE: the log must never be empty while the session is open.
    if db.execute("PRAGMA wal_checkpoint(FULL)").fetchone()[0]:
        log.warning(
            "%s: another program is reading the checkpoint, so the file does not show yet that a run is under way: "
            "until the run ends, do not copy the file without its log (-wal)",
            path,
        )


def end_session(db: sqlite3.Connection, ended_at: float, reason: str | None, exit_code: int | None) -> None:
    """Store that the session has ended cleanly."""
    where = "id = (SELECT max(id) FROM session)"
    _end_sessions(db, where, ended_at, reason, exit_code)


def end_killed(db: sqlite3.Connection, now: float) -> None:
    """Store that the sessions without an end were killed."""
    _end_sessions(db, "ended_at IS NULL", now, "killed", None)


def _end_sessions(
    db: sqlite3.Connection, where: str, ended_at: float, reason: str | None, exit_code: int | None
) -> None:
    with db:  # commits, or rolls back
        db.execute("BEGIN IMMEDIATE")
        query = f"UPDATE session SET ended_at = ?, reason = ?, exit_code = ?, crc = NULL WHERE {where}"  # noqa: S608
        db.execute(query, (ended_at, reason, exit_code))
        seal_sessions(db)


def seal_sessions(db: sqlite3.Connection) -> None:
    """Seal the sessions that were changed in this transaction: those without a checksum."""
    for *values, _ in db.execute("SELECT * FROM session WHERE crc IS NULL").fetchall():
        db.execute("UPDATE session SET crc = ? WHERE id = ?", (checksum(values), values[0]))


def verify_sessions(db: sqlite3.Connection) -> None:
    """Raises `Damage` unless the record of each session matches its checksum."""
    for number, started_at, *others, crc in db.execute("SELECT * FROM session"):
        if checksum((number, started_at, *others)) != crc:
            raise Damage(f"the record of session {number} does not match its checksum")
        float(started_at)


def lost_since(db: sqlite3.Connection) -> float | None:
    """When the first session whose log was lost began, in Unix time; None if no log was lost.

    Since then, rows that no batch holds may have been sent. A loss no longer matters once the list has been read to its
    end and every row is settled.
    """
    since = db.execute(
        "SELECT min(started_at) FROM session "
        "WHERE log_lost AND id > coalesce((SELECT max(id) FROM session WHERE reason = 'finished'), 0)"
    ).fetchone()[0]
    return None if since is None else float(since)


def warn_of_lost_log(path: Path, since: float) -> None:
    """Warn that the run continues without the log of its last session."""
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
    log.warning(
        "%s: the session that began %s did not end cleanly, and its log (%s-wal) is missing: the file was copied or "
        "moved without it, or another program has folded it into the file. The run continues: rows get the same ids as "
        "before, so rows that were started then come back as existed while the service remembers them. A pause that "
        "the service ordered may be forgotten. If you have the file and its log together in another place, stop, and "
        "continue with those two",
        path,
        began,
        path.name,
    )
