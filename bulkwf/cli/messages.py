"""Messages on standard error, written by a thread of their own. Nothing else of bulkwf writes there.

A write to standard error can block without end, if a terminal is stopped (Ctrl-S), or a pipe is full because its reader
hangs. Only this thread is then blocked. Its queue is bounded: the oldest lines are dropped to make room for new ones,
and the number of dropped lines is written in their place.
"""

import io
import logging
import os
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING

from bulkwf.cli.output import wait_writable
from bulkwf.text import printable
from bulkwf.threads import start_daemon

if TYPE_CHECKING:
    from types import TracebackType

    from _typeshed import ReadableBuffer

__all__ = ["THREAD", "finish", "is_terminal", "say", "take_over", "wait_written"]

THREAD = "bulkwf-stderr"
QUEUE_BYTES = 262_144
"""Upper bound of the queue, in bytes. A single message may be longer."""
FINISH_S = 1.0
"""Longest time that the process waits at its end for messages to be written, in seconds."""


class _Queued(io.RawIOBase):
    """A file whose `write` never blocks: it queues the data, and a thread writes it to *descriptor*.

    Args:
        descriptor: Where to write.
        most_bytes: Upper bound of the queue, in bytes. A single message may be longer.
    """

    def __init__(self, descriptor: int, most_bytes: int = QUEUE_BYTES) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._most_bytes = most_bytes
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._writing = False
        self._dropped = 0
        """Dropped lines that are not reported yet."""
        self._in_line = False
        """Whether the last write did not end with a newline."""
        # Its lock is reentrant, because the garbage collector may call `write` during a `write`.
        self._changed = threading.Condition()
        start_daemon(self._run, THREAD)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, given: "ReadableBuffer", /) -> int:
        data = bytes(given)
        with self._changed:
            self._queue.append(data)
            self._queued_bytes += len(data)
            while self._queued_bytes > self._most_bytes and len(self._queue) > 1:
                self._dropped += self._take().count(b"\n")
            self._changed.notify_all()
        return len(data)

    def wait_written(self, timeout_s: float) -> bool:
        """Wait at most *timeout_s* seconds until everything is written; returns whether it is."""
        with self._changed:
            if self._dropped and not self._queue:
                self._queue.append(b"")  # the number of dropped lines
                self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._queue and not self._writing, timeout_s)

    def _take(self) -> bytes:
        data = self._queue.popleft()
        self._queued_bytes -= len(data)
        return data

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue)
                data, dropped = self._take(), self._dropped
                self._writing, self._dropped = True, 0
            try:
                self._write_all(self._note(dropped))
                dropped = 0
                self._write_all(data)
            except OSError:  # a full disk, or no reader: the next message is tried all the same
                with self._changed:
                    self._dropped += dropped + data.count(b"\n")

    def _note(self, dropped: int) -> bytes:
        if not dropped:
            return b""
        lines = "1 line is" if dropped == 1 else f"{dropped:,} lines are"
        text = f"bulkwf: {lines} missing here: standard error could not be written\n"
        return b"\n" * self._in_line + text.encode()

    def _write_all(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                written = os.write(self._descriptor, left)
            except BlockingIOError:
                wait_writable(self._descriptor)
                continue
            if written:
                self._in_line = left[written - 1] != ord("\n")
                left = left[written:]


class _LogLines(logging.Formatter):
    """A log record as lines without control characters."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name that logging gives it
        return printable(super().formatMessage(record))

    def formatException(  # noqa: N802 - the name that logging gives it
        self, ei: "tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]"
    ) -> str:
        return "\n".join(map(printable, super().formatException(ei).splitlines()))


def take_over() -> None:
    """From now on, make a thread do all writes to `sys.stderr`, those of logging included.

    Raises:
        SystemRefused: The thread can't be started.
    """
    encoding = sys.stderr.encoding if sys.stderr else "utf-8"
    # Not buffered: each line, or call of `say`, is one message of the queue.
    sys.stderr = io.TextIOWrapper(_Queued(2), encoding, "backslashreplace", line_buffering=True)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_LogLines())


def say(*lines: str) -> None:
    """Write lines to standard error, together. A character that can't be printed becomes a space."""
    try:
        sys.stderr.write("".join(f"{printable(line)}\n" for line in lines))
        sys.stderr.flush()
    except (OSError, ValueError):  # `take_over` was not called, and the file is full or closed
        return


def is_terminal() -> bool:
    """Whether standard error is a terminal."""
    try:
        return sys.stderr.isatty()
    except ValueError:  # closed
        return False


def wait_written(timeout_s: float = 0.0) -> bool:
    """Wait at most *timeout_s* seconds until the system has taken all messages; returns whether it has."""
    queued = _queued()
    return queued is None or queued.wait_written(timeout_s)


def finish() -> bool:
    """Wait at most `FINISH_S` until the system has taken all messages; returns whether it has."""
    queued = _queued()
    if queued is None or not queued.wait_written(FINISH_S):
        return False
    sys.stderr = sys.__stderr__  # the thread ends with the interpreter, which may print errors after that
    return True


def _queued() -> _Queued | None:
    raw = getattr(sys.stderr, "buffer", None)
    return raw if isinstance(raw, _Queued) else None
