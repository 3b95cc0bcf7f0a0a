"""Turns what goes wrong with a checkpoint into an error that says what happened and what to do."""

import contextlib
import errno
import sqlite3
import traceback
from collections.abc import Iterator
from pathlib import Path

from bulkwf.checkpoint.schema import ANOTHER
from bulkwf.errors import CheckpointError
from bulkwf.text import clean

__all__ = ["DISK_ERRORS", "ELSEWHERE", "Damage", "damaged", "explain", "explained"]

ELSEWHERE = f"Its folder must exist and be writable; name another place with -c. {ANOTHER}"
FULL = "Nothing more was sent. Make room on the disk and run the same command again: nothing is lost."
FAILING = (
    "Nothing more was sent. Make room on the disk, or repair it if it fails; then run the same command again: it "
    "continues from what the disk has stored."
)
DISK_ERRORS = {errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EIO: FAILING}
"""What to do about an error of the disk, by its number."""


class Damage(ValueError):
    """A checkpoint holds something that no run has written. The message says what."""


@contextlib.contextmanager
def explained(path: Path | None) -> Iterator[None]:
    """Turn errors of SQLite and of the system, and errors that damaged records cause, into a `CheckpointError`."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise explain(error, path) from None
    except Damage as damage:
        raise damaged(path, str(damage)) from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]  # in case the cause is a bug in the code
        why = f"it holds what no run writes ({type(error).__name__} at {Path(at.filename).name}:{at.lineno})"
        raise damaged(path, why) from None


def damaged(path: Path | None, why: str) -> CheckpointError:
    """The error for a damaged checkpoint. *why* says what is wrong with it."""
    return CheckpointError(f"{path}: the checkpoint is damaged: {why}. Restore it from a copy. {ANOTHER}")


def explain(error: BaseException, path: Path | None) -> CheckpointError:
    """The error for a user: what happened, where, why, and what to do."""
    if isinstance(error, CheckpointError):
        return error
    text = clean(str(error))
    if isinstance(error, OSError):
        advice = DISK_ERRORS.get(error.errno or 0, ELSEWHERE)
    elif "disk is full" in text:
        advice = FULL
    elif "disk I/O" in text:
        advice = FAILING
    elif "malformed" in text or "not a database" in text:
        advice = f"The file is damaged, or no checkpoint. Restore it from a copy. {ANOTHER}"
    elif "readonly" in text or "unable to open" in text:
        advice = f"The file and its folder must be writable; name another place with -c. {ANOTHER}"
    else:
        advice = "Nothing more was sent. Remove the cause and run the same command again: nothing is lost."
    return CheckpointError(f"{path or 'checkpoint in memory'}: the checkpoint can't be used: {text}. {advice}")
