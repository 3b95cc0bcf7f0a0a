"""Writes data to standard output in UTF-8: completely, or with an error. Nothing else of bulkwf writes there."""

import io
import os
import select
import sys
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["OutputError", "ReaderGone", "abandon", "data", "finish", "take_over", "wait_writable", "write_line"]


class OutputError(OSError):
    """Standard output can't be written. The data that was written is incomplete."""


class ReaderGone(OutputError):
    """Nobody reads standard output any more (`| head`)."""


class _Whole(io.RawIOBase):
    """A file whose `write` writes all data that it is given, or raises `OutputError`.

    Python's own raw file may write a part of the data and return the part's size. With PYTHONUNBUFFERED, the text layer
    ignores that size: data is lost if a disk is full, a pipe is non-blocking, or the process is stopped and continued.
    After an error nothing more is written, so that data left in a buffer raises no second error.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self.failed = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, given: "ReadableBuffer", /) -> int:
        left = memoryview(given).cast("B")
        size = len(left)
        try:
            while left and not self.failed:
                try:
                    left = left[os.write(self._descriptor, left) :]
                except BlockingIOError:
                    wait_writable(self._descriptor)
        except OSError as error:
            self._fail(error)
        return size

    def check_close(self) -> None:
        """Raise an error that the system reports only at a close: network file systems do so if a disk is full."""
        try:
            if not self.failed:
                os.close(os.dup(self._descriptor))
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.failed = True
        kind = ReaderGone if isinstance(error, BrokenPipeError) else OutputError
        raise kind(error.errno, error.strerror) from None


def wait_writable(descriptor: int) -> None:
    """Wait until *descriptor*, which is non-blocking, can be written again."""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLOUT)
    waiting.poll()


def take_over() -> None:
    """Replace `sys.stdout` by a file that writes data completely or raises an error."""
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(_Whole(1)), "utf-8", errors="backslashreplace")


def abandon() -> None:
    """Drop the data that is not written yet, and write nothing more."""
    if isinstance(raw := _raw(), _Whole):
        raw.failed = True


def data() -> BinaryIO:
    """The file that a command writes its data to; `finish` completes it."""
    return sys.stdout.buffer


def write_line(text: str) -> None:
    """Write one line of data, at once.

    Raises:
        OutputError: It can't be written.
    """
    data().write(text.encode("utf-8", "backslashreplace") + b"\n")
    finish()


def finish() -> None:
    """Write what is buffered.

    Raises:
        OutputError: It can't be written.
    """
    sys.stdout.flush()
    if isinstance(raw := _raw(), _Whole):
        raw.check_close()


def _raw() -> object:
    return getattr(sys.stdout.buffer, "raw", None)  # another file, or none, if `take_over` was not called
