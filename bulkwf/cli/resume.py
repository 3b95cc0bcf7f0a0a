"""The last message of a command, and the command that resumes."""

import os
import shutil
import signal
import sys

from bulkwf.cli.messages import say
from bulkwf.cli.shell import shell_command
from bulkwf.errors import BulkwfError, CheckpointError, InputError, ServiceRefused, SystemRefused, TemporaryStop

__all__ = ["resume_command", "say_end"]


def say_end(error: BulkwfError | None, received: signal.Signals | None, *, complete: bool) -> None:
    """Print the error that ended the work, and what to do next."""
    if error is not None:
        say(f"bulkwf: {error}")
    if not complete:
        say(f"bulkwf: {_what_next(error, received)}:", f"  {resume_command()}")


def _what_next(error: BulkwfError | None, received: signal.Signals | None) -> str:
    if isinstance(error, InputError | CheckpointError | ServiceRefused | SystemRefused):
        return "Fix this, then resume with"
    if isinstance(error, TemporaryStop):
        return "To continue later, run"
    return f"stopped by {received.name}. To continue, run" if error is None and received else "To continue, run"


def resume_command() -> str:
    """The command that continues this one."""
    program = sys.argv[0]
    if program.endswith("__main__.py"):
        command = [sys.executable, "-m", "bulkwf"]
    else:
        found = shutil.which("bulkwf")
        command = ["bulkwf" if found and os.path.realpath(found) == os.path.realpath(program) else program]
    # --new would refuse the unfinished checkpoint of this run.
    return shell_command([*command, *(argument for argument in sys.argv[1:] if argument != "--new")])
