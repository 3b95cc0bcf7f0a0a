"""The files that a verification keeps beside its checkpoint: their names, their lock, their errors."""

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import filelock

from bulkwf.checkpoint.lock import acquire
from bulkwf.errors import CheckpointError

__all__ = ["acquire_lock", "explained", "foreign_file", "request_log_path", "store_path", "store_paths"]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SUFFIXES = (".verify", ".verify-sample")
"""Suffixes of a store's name: for the verification of all instances, and of a sample."""


def store_path(checkpoint: Path, sample: int | None) -> Path:
    """Path of the store for a verification of *checkpoint*. A link to a checkpoint has the same store."""
    return store_paths(checkpoint)[sample is not None]


def store_paths(checkpoint: Path) -> tuple[Path, ...]:
    """Paths of the two stores that *checkpoint* can have: one for a verification of all instances, one for a sample."""
    real = Path(os.path.realpath(checkpoint))
    return tuple(real.with_name(real.name + suffix) for suffix in SUFFIXES)


def request_log_path(store: Path) -> Path:
    """Path of the request log that belongs to *store*."""
    return store.with_name(store.name + "-requests")


def acquire_lock(store: Path) -> filelock.BaseFileLock:
    """Acquire the lock of *store*, which protects its request log, too.

    Raises:
        CheckpointError: Another verification holds it, or the folder can't be written.
    """
    return acquire(store, held="it is being verified already", advice="Verify a copy of the checkpoint elsewhere.")


def foreign_file(path: Path) -> CheckpointError:
    """The error for a file of another program at *path*."""
    return CheckpointError(f"{path}: the verification needs this name, and another file has it. Move that file.")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the system, and errors that damaged values cause, into a `CheckpointError`."""
    try:
        yield
    except (sqlite3.Error, OSError, TypeError, ValueError) as error:
        if (isinstance(error, OSError) and error.errno in NO_ROOM) or "full" in str(error):
            advice = "Make room on the disk and run the same command again: it continues where it was cut off."
        else:
            advice = (
                "Its folder must be writable. If the file is damaged, delete it: the verification then starts over."
            )
        raise CheckpointError(f"{path}: the verification's file can't be used: {error}. {advice}") from None
