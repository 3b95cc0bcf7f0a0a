"""What is said at the end, and the command that resumes."""

import os
import shutil
import signal
import sys

from bulkwf.cli.messages import say
from bulkwf.cli.shell import shell_command
from bulkwf.errors import BulkwfError, CheckpointError, InputError, SystemRefused

__all__ = ["resume_command", "say_end"]


def say_end(error: BulkwfError | None, received: signal.Signals | None, *, complete: bool) -> None:
    """Say what has ended the work, and what to do next."""
    if error is not None:
        say(f"bulkwf: {error}")
    if not complete:
        say(f"bulkwf: {_what_next(error, received)}:", f"  {resume_command()}")


def _what_next(error: BulkwfError | None, received: signal.Signals | None) -> str:
    if isinstance(error, InputError | CheckpointError | SystemRefused):
        return "Fix this, then resume with"
    return f"stopped by {received.name}. To continue, run" if error is None and received else "To continue, run"


def resume_command() -> str:
    """The command that continues this one."""
    program = sys.argv[0]
    if program.endswith("__main__.py"):
        words = [sys.executable, "-m", "bulkwf"]
    else:
        found = shutil.which("bulkwf")
        words = ["bulkwf" if found and os.path.realpath(found) == os.path.realpath(program) else program]
    # --new would refuse the unfinished checkpoint that this run leaves.
    return shell_command([*words, *(word for word in sys.argv[1:] if word != "--new")])
