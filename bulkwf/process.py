"""The process of a command: it reacts to signals, and it ends, whatever hangs.

Python can't end a thread, and before it exits it waits for the threads of its pools. Such a thread may hang: in a token
file that is a named pipe, in a name look-up, on a disk. A signal's handler, asyncio's too, needs the main thread, which
may hang as well. So a thread of its own reads the signals, and the process exits without waiting for other threads.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NoReturn, TypeVar

__all__ = ["caught_signals", "leave", "run", "watch_signals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_AFTER_S = 1.5
"""From a signal that does not begin a drain to the forced exit."""
GRACE_S = 0.2
"""How long an exit waits for threads that are about to end."""
T = TypeVar("T")


class _SignalThread:
    """Reads the signals that have a handler, whatever the main thread does.

    The first signal of a block of `caught_signals` goes to that block alone. Every other one also starts the time
    after which the process is ended.
    """

    def __init__(self) -> None:
        self._received: list[signal.Signals] = []
        self._receive: Callable[[signal.Signals], None] | None = None
        self._draining = False
        self._advice = ""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._read, args=(reader,), name="bulkwf-signals", daemon=True)
        self.thread.start()

    def route(self, receive: Callable[[signal.Signals], None] | None, advice: str) -> None:
        """Give signals to *receive* from now on; None: there is nothing to drain."""
        self._draining, self._receive, self._advice = False, receive, advice

    def _read(self, reader: int) -> None:
        while data := os.read(reader, 1):
            if data[0] not in SIGNALS:
                continue
            number = signal.Signals(data[0])
            self._received.append(number)
            receive, draining = self._receive, self._draining
            if receive is not None:
                self._draining = True
                receive(number)
            if receive is None or draining:
                timer = threading.Timer(EXIT_AFTER_S, self._exit)
                timer.daemon = True
                timer.start()

    def _exit(self) -> NoReturn:
        reason = "a disk, a name server, the source of the token or an output does not answer"
        text = f"bulkwf: {self._received[-1].name}: the process was ended: {reason}. {self._advice}\n"
        writing = threading.Thread(target=_write_stderr, args=(text,), daemon=True)  # stderr may hang, too
        writing.start()
        writing.join(GRACE_S)
        os._exit(128 + self._received[0])


@cache
def watch_signals() -> _SignalThread:
    """Start the thread that reads signals: from now on none can be held up by what hangs in the main thread."""
    return _SignalThread()


@contextmanager
def caught_signals(receive: Callable[[signal.Signals], None], advice: str = "") -> Iterator[None]:
    """Call *receive* with each signal while the block lasts, in the running loop. Ignored signals (nohup) stay ignored.

    A second signal, and any that comes after the block, forces the exit after `EXIT_AFTER_S`, with 128 + the number of
    the first signal as the code. The handlers stay in place after the block, until the process ends.

    Args:
        receive: Ends the work in order at the first signal, at once at the second.
        advice: What the user is told to do after a forced exit.
    """
    loop = asyncio.get_running_loop()

    def pass_on(number: signal.Signals) -> None:
        with suppress(RuntimeError):  # the loop is closed: the work has ended
            loop.call_soon_threadsafe(receive, number)

    watch = watch_signals()
    watch.route(pass_on, advice)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _left_to_the_thread)
    try:
        yield
    finally:
        watch.route(None, advice)


def _left_to_the_thread(*_: object) -> None:
    """The handler in the main thread, without which Python would not write the signal's number to the pipe."""


def _write_stderr(text: str) -> None:
    with suppress(OSError):
        os.write(2, text.encode())  # a thread that hangs may hold the lock of sys.stderr


class _HelperThreads(ThreadPoolExecutor):
    """The loop's pool of threads, which is not waited for at the end of the loop."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """See `ThreadPoolExecutor.shutdown`."""
        super().shutdown(wait=False, cancel_futures=True)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Do what `asyncio.run` does, without its wait for threads."""

    async def with_helpers() -> T:
        asyncio.get_running_loop().set_default_executor(_HelperThreads(thread_name_prefix="bulkwf-helper"))
        return await work

    return asyncio.run(with_helpers())


def leave(code: int) -> NoReturn:
    """Exit with *code*, even if threads hang."""
    try:
        sys.stderr.flush()
    except OSError:  # what is left in its buffer would fail Python's own flush, and change the code
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    deadline = time.monotonic() + GRACE_S
    for thread in threading.enumerate():
        if thread not in (threading.main_thread(), watch_signals().thread):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                os._exit(code)
    sys.exit(code)
