"""The lock of a file: one process at a time writes it. The lock file names its holder."""

import contextlib
import os
import socket
import time
from pathlib import Path

import filelock

from bulkwf.checkpoint.errors import DISK_ERRORS
from bulkwf.errors import CheckpointError

__all__ = ["acquire", "release"]


def acquire(path: Path, *, held: str, advice: str) -> filelock.BaseFileLock:
    """Acquire the lock of the file at *path*.

    Args:
        path: The file.
        held: What the error says if another process holds the lock; the holder's name is added.
        advice: What to do if no lock can be made in that folder.

    Raises:
        CheckpointError: Another process holds the lock, or no lock can be made.
    """
    name = str(path) + ".lock"
    lock = filelock.FileLock(name, mode=0o600, thread_local=False, on_acquired=_sign)
    try:
        if not path.parent.is_dir():  # filelock would make it
            raise CheckpointError(f"{path}: there is no folder {path.parent}. Make it, or name another place with -c.")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise CheckpointError(f"{path}: {held}{_holder(name)}. Wait for that to end, or stop it.") from None
    except OSError as error:
        advice = DISK_ERRORS.get(error.errno or 0, advice)
        raise CheckpointError(f"{path}: the file can't be locked ({error.strerror}: {name}). {advice}") from None
    return lock


def release(lock: filelock.BaseFileLock) -> None:
    """Delete the lock file and release the lock. A process that has the file open notices that it was deleted."""
    with contextlib.suppress(OSError):  # an error here must not hide the error that ended the run
        Path(lock.lock_file).unlink()
    with contextlib.suppress(OSError):
        lock.release()


def _sign(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode())


def _holder(name: str) -> str:
    """The holder's signature, in parentheses; empty if there is none. It is written just after the lock is acquired."""
    for _ in range(20):
        time.sleep(0.01)
        try:
            text = Path(name).read_text("utf-8")[:200]
        except (OSError, ValueError):  # the holder has ended, or this is no signature
            return ""
        if text:
            return f" ({text})" if text.isprintable() else ""
    return ""
