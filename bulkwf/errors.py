"""The errors that end a run, and the exit codes. The class of an error shows who must act.

The failure of a row is a value (`bulkwf.Result`); the failure of a run is one of these exceptions. Each has the exit
code of the command and, if the run had begun, the `Summary` of what is durable.
"""

from typing import ClassVar

from bulkwf.model import Summary

__all__ = [
    "BulkwfError",
    "CheckpointError",
    "ConfigError",
    "Draining",
    "InputError",
    "ServiceRefused",
    "SystemRefused",
    "TemporaryStop",
    "exit_code",
]


class BulkwfError(Exception):
    """Base of all errors that bulkwf raises on purpose.

    Attributes:
        exit_code: Exit code of the command.
        summary: What has become of the rows; None if the run had not begun.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.summary: Summary | None = None


class ConfigError(BulkwfError):
    """An option, an argument or a credential is missing or malformed: the caller must act. Exit code 2."""

    exit_code = 2


class ServiceRefused(BulkwfError):
    """The service refuses the run as a whole: the owner of the account must act. Exit code 3.

    Possible causes: the credential, its permissions, a workflow that does not exist, a redirect, TLS, or more rejected
    rows than the run allows.
    """

    exit_code = 3


class InputError(BulkwfError):
    """The list can't be read to its end, or is not the list that the run began with. Exit code 4."""

    exit_code = 4


class CheckpointError(BulkwfError):
    """The checkpoint is locked, damaged, of another run, or can't be written. Exit code 4."""

    exit_code = 4


class SystemRefused(BulkwfError):
    """The operating system refuses what the run needs: the owner of the machine must act. Exit code 4."""

    exit_code = 4


class TemporaryStop(BulkwfError):
    """The service is failing, or orders a longer pause than `max_outage_s` allows. Exit code 75.

    Run the same command, or make the same call, again later.
    """

    exit_code = 75


def exit_code(*, complete: bool, failed: bool, error: BulkwfError | None = None, signal: int | None = None) -> int:
    """The exit code of a run or a verification.

    Args:
        complete: Every row is settled, or every instance verified.
        failed: Some rows need action: they are rejected, invalid or missing.
        error: What ended the run or verification; None if nothing went wrong.
        signal: Number of the signal that ended it; None if none did.

    Returns:
        The first of these that applies: the error's code; 128 + *signal*, if it is not complete; 75, if it is not
        complete; 1, if rows have failed; 0.
    """
    if error is not None:
        return error.exit_code
    if not complete:
        return TemporaryStop.exit_code if signal is None else 128 + signal
    return 1 if failed else 0


class Draining(Exception):
    """A wait has ended because the run drains: nothing more is to be sent. The engine handles it."""
