"""What can end a run, sorted by who must act.

The failure of a row is a value (`bulkwf.Result`); the failure of the run is one of these exceptions. Each carries
the exit code that the command line ends with, and, where a run had begun, the `Summary` of what is durable.
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
    "TemporaryStop",
]


class BulkwfError(Exception):
    """Base of all errors that bulkwf raises on purpose.

    Attributes:
        exit_code: What the command line exits with.
        summary: What had been settled when the run ended, or None if it ended before it began.
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

    Credentials, permission, no such workflow, a redirect, TLS, or more rejected rows than the run allows.
    """

    exit_code = 3


class InputError(BulkwfError):
    """The list can't be read to its end, or is not the one that the checkpoint knows. Exit code 4."""

    exit_code = 4


class CheckpointError(BulkwfError):
    """The checkpoint is locked, damaged, of another run, or can't be written. Exit code 4."""

    exit_code = 4


class TemporaryStop(BulkwfError):
    """The service is ill or has ordered a long pause: nobody must act, run the same thing later. Exit code 75."""

    exit_code = 75


class Draining(Exception):
    """A wait was ended because the run drains: nothing more is to be sent. Never leaves the engine."""
