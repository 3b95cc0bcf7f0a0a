"""The file of a checkpoint: where it may lie, who holds it, whether it is ours."""

import contextlib
import errno
import os
import socket
import sqlite3
import stat
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import filelock

from bulkwf.checkpoint.schema import (
    ANOTHER,
    APPLICATION_ID,
    FORMAT,
    HEADER_FIELDS,
    IDENTITY,
    SCHEMA,
    YEAR_9999,
    RunHeader,
)
from bulkwf.errors import CheckpointError
from bulkwf.model import Boot
from bulkwf.payload import clean

__all__ = [
    "acquire",
    "connect",
    "connect_reader",
    "create",
    "explain",
    "explained",
    "inode",
    "make_private",
    "move_aside",
    "prepare",
    "refuse_network_filesystem",
    "refuse_orphan",
    "release",
    "stored_boot",
]

ELSEWHERE = f"Its folder must exist and be writable; name another place with -c. {ANOTHER}"
FULL = "Nothing more was sent. Make room on the disk and run the same command again: nothing is lost."
FAILING = (
    "Nothing more was sent. Make room on the disk, or mend it where it fails; then run the same command again: it goes "
    "on from what the disk has kept."
)
DISK_TROUBLES = {errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EIO: FAILING}
BUSY_TIMEOUT_S = 10.0
NETWORK_FILESYSTEMS = frozenset(
    {"9p", "afs", "ceph", "cifs", "glusterfs", "lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs"}
)


def connect(name: str) -> sqlite3.Connection:
    """A connection that may write, used by one thread at a time."""
    db = sqlite3.connect(name, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA trusted_schema = OFF")
    return db


def connect_reader(path: Path) -> sqlite3.Connection:
    """A connection that only reads the checkpoint at *path*."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint. `bulkwf run` makes one, beside its input.")
    uri = path.resolve().as_uri()
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        uri += "?mode=rw"  # whoever closes a file last tidies up its log, which a reader for reading alone can't
    elif path.with_name(path.name + "-wal").exists():
        uri += "?mode=ro"
    else:
        uri += "?mode=ro&immutable=1"  # nobody writes it, and no log can be laid beside it
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        _check_format(db, path)
        db.execute("PRAGMA query_only = ON")
    except BaseException:
        db.close()
        raise
    return db


def create(db: sqlite3.Connection, header: RunHeader, now: float, boot: Boot) -> None:
    """Make the tables of a new checkpoint."""
    names = ", ".join(HEADER_FIELDS)
    places = ", ".join(f":{name}" for name in HEADER_FIELDS)
    db.executescript(
        f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT};"
    )
    db.execute(
        f"INSERT INTO run (created_at, boot_id, booted_at, {names}) "  # noqa: S608 - names of ours
        f"VALUES (:created_at, :boot_id, :booted_at, {places})",
        asdict(header) | {"created_at": now, "boot_id": boot.id, "booted_at": boot.at},
    )
    db.execute("COMMIT")


def prepare(
    db: sqlite3.Connection, path: Path, header: RunHeader, now: float, boot: Boot, *, any_run_key: bool
) -> Boot:
    """Make the checkpoint ready to be written by this run, or say why it can't be; returns how it counts time."""
    empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if not empty:  # before anything is written: what is damaged, or another program's, stays as it is
        _check_format(db, path)
        _check_header(db, path, header, any_run_key=any_run_key)
        boot = boot.going_on(stored_boot(db))
        for table in ("batch", "attempt"):
            db.execute(f"SELECT total(first_row) FROM {table}").fetchone()  # noqa: S608 - names of ours
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    if empty:
        create(db, header, now, boot)
        _sync_folder(path)
        return boot
    # Proves, before the first request, that the file can be written.
    db.execute(
        "UPDATE run SET input = ?, limits = ?, boot_id = ?, booted_at = ?, finished_at = NULL",
        (header.input, header.limits, *boot),
    )
    return boot


def stored_boot(db: sqlite3.Connection) -> Boot:
    """The last boot that has written to a checkpoint."""
    boot_id, at = db.execute("SELECT boot_id, booted_at FROM run").fetchone()
    if not abs(at) < YEAR_9999:
        raise ValueError("no time of day")
    return Boot(str(boot_id), float(at))


def _check_format(db: sqlite3.Connection, path: Path) -> None:
    application = db.execute("PRAGMA application_id").fetchone()[0]
    if application != APPLICATION_ID:
        raise CheckpointError(f"{path}: this is no checkpoint of bulkwf. Name another file.")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > FORMAT:
        raise CheckpointError(
            f"{path}: the checkpoint has format {version}, made by a newer bulkwf; this one reads up to {FORMAT}. "
            "Update bulkwf."
        )


def _check_header(db: sqlite3.Connection, path: Path, header: RunHeader, *, any_run_key: bool) -> None:
    for name in IDENTITY:
        known = db.execute(f"SELECT {name} FROM run").fetchone()[0]  # noqa: S608 - names of ours
        given = getattr(header, name)
        if given != known and not (name == "run_key" and any_run_key):
            what = name.replace("_", " ")
            raise CheckpointError(
                f"{path}: the checkpoint belongs to another run: its {what} is {known!r}, this run's is {given!r}. "
                f"Run with what it was made for. {ANOTHER}"
            )


def move_aside(path: Path, now: float) -> None:
    """Give a finished checkpoint another name."""
    if not path.exists():
        return
    db = connect(str(path))
    with contextlib.closing(db):
        _check_format(db, path)
        finished = db.execute(
            "SELECT finished_at IS NOT NULL AND NOT EXISTS (SELECT 1 FROM batch WHERE settled_at IS NULL) FROM run"
        ).fetchone()[0]
        # The log goes into the file first, or a reader that holds it would keep it under the old name.
        busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    if not finished:
        raise CheckpointError(
            f"{path}: the run in this checkpoint is not finished, and --new would forget which rows are started. "
            "Finish it by running without --new. Rows without ids of their own would start again."
        )
    if busy:
        raise CheckpointError(f"{path}: another program is reading the checkpoint. Run again when it is done.")
    aside = path.with_name(f"{path.name}.{int(now)}")
    while aside.exists():
        aside = aside.with_name(aside.name + "~")
    path.rename(aside)


def refuse_orphan(path: Path) -> None:
    """Refuse to begin anew where the log of a run that was cut off still lies, but its checkpoint does not."""
    log = path.with_name(path.name + "-wal")
    if log.exists() and not path.exists():
        raise CheckpointError(
            f"{path}: the checkpoint is gone, but its log is there: a run was cut off, and the file moved or deleted. "
            f"Put it back; or delete {log} to start over. {ANOTHER}"
        )


def make_private(path: Path) -> None:
    """Make the file for its owner's eyes alone; refuse one that others may write."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if path.stat().st_mode & stat.S_IWOTH:
            raise CheckpointError(f"{path}: every user may write this file. Run `chmod 600` on it first.") from None


def acquire(path: Path, *, held: str, advice: str) -> filelock.BaseFileLock:
    """Hold the lock of the file at *path*.

    Args:
        path: The file.
        held: What to say if another process holds it; who that is, is added.
        advice: What to do where no lock can be laid.
    """
    name = str(path) + ".lock"
    lock = filelock.FileLock(name, mode=0o600, thread_local=False, on_acquired=_sign)
    try:
        if not path.parent.is_dir():  # filelock would make it
            raise CheckpointError(f"{path}: there is no folder {path.parent}. Make it, or name another place with -c.")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        holder = _holder(name)
        raise CheckpointError(f"{path}: {held}{holder}. Wait for that to end, or stop it.") from None
    except OSError as error:
        advice = DISK_TROUBLES.get(error.errno or 0, advice)
        raise CheckpointError(f"{path}: the file can't be locked ({error.strerror}: {name}). {advice}") from None
    return lock


def release(lock: filelock.BaseFileLock) -> None:
    """Let the next process have the checkpoint. Whoever has the old lock file open notices that it is gone."""
    with contextlib.suppress(OSError):  # it may not hide what has ended the run
        Path(lock.lock_file).unlink()
    with contextlib.suppress(OSError):
        lock.release()


def _sign(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode())


def _holder(name: str) -> str:
    """Who holds the lock. For a moment after it was taken nobody has signed it, or one who was killed."""
    for _ in range(20):
        time.sleep(0.01)
        try:
            text = Path(name).read_text("utf-8")[:200]
        except (OSError, ValueError):  # it has ended meanwhile, or this is nobody's signature
            return ""
        if text:
            return f" ({text})" if text.isprintable() else ""
    return ""


def refuse_network_filesystem(path: Path) -> None:
    """Refuse a place where SQLite's log can't work: it needs locks, and memory that all its readers share."""
    kind = _filesystem(path.parent)
    if kind in NETWORK_FILESYSTEMS or kind.startswith("fuse"):
        raise CheckpointError(
            f"{path}: this folder is on a network file system ({kind}), where a checkpoint can't be kept safe. "
            "Name a place on a local disk with -c."
        )


def _filesystem(folder: Path) -> str:
    """Type of the file system that holds *folder*, as the kernel calls it; empty where it does not say."""
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return ""
    best, kind = -1, ""
    for line in lines:
        fields = line.split(" ")
        point = Path(fields[4].replace("\\040", " "))
        if (folder == point or point in folder.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[fields.index("-") + 1]
    return kind


def _sync_folder(path: Path) -> None:
    """Make the file's name as durable as its content."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inode(path: Path | None) -> tuple[int, int] | None:
    """Which file *path* names at present; None if there is none."""
    if path is None:
        return None
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def explained(path: Path | None) -> Iterator[None]:
    """Turn what SQLite and the system say, and what stored nonsense leads to, into a `CheckpointError`."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise explain(error, path) from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]  # in case it is the code that is wrong
        why = f"it holds what no run writes ({type(error).__name__} at {Path(at.filename).name}:{at.lineno})"
        raise CheckpointError(f"{path}: the checkpoint is damaged: {why}. Restore it from a copy. {ANOTHER}") from None


def explain(error: Exception, path: Path | None) -> CheckpointError:
    """The error that a user is told: what, where, why, and what to do."""
    if isinstance(error, CheckpointError):
        return error
    text = clean(str(error))
    if isinstance(error, OSError):
        advice = DISK_TROUBLES.get(error.errno or 0, ELSEWHERE)
    elif "disk is full" in text:
        advice = FULL
    elif "disk I/O" in text:
        advice = FAILING
    elif "malformed" in text or "not a database" in text:
        advice = f"The file is damaged, or no checkpoint. Restore it from a copy. {ANOTHER}"
    elif "readonly" in text or "unable to open" in text:
        advice = f"The file and its folder must be writable; name another place with -c. {ANOTHER}"
    else:
        advice = "Nothing more was sent. Run the same command again once that is mended: nothing is lost."
    return CheckpointError(f"{path or 'checkpoint in memory'}: the checkpoint can't be used: {text}. {advice}")
