"""The process of a command: it reacts to signals and exits, even while a part of it hangs.

Python can't end a thread, and before it exits it waits for the threads of its pools. Such a thread can hang: while it
reads a token file that is a named pipe, looks up a name or uses a disk. Signal handlers, asyncio's included, need the
main thread, which can hang as well. So a separate thread reads the signals, and the process exits without waiting for
other threads.
"""

import asyncio
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NoReturn, TypeVar

from bulkwf.cli import messages
from bulkwf.threads import start_daemon, starting_threads

__all__ = ["caught_signals", "exit_now", "run", "watch_signals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_AFTER_S = 1.5
"""Time from a signal that does not begin a drain to the forced exit, in seconds."""
GRACE_S = 0.2
"""How long an exit waits for threads that are about to end, and a forced exit for its last message, in seconds."""
THREAD = "bulkwf-signals"
T = TypeVar("T")


class _SignalThread:
    """Reads the signals that have a handler, even while the main thread hangs.

    The first signal in a `caught_signals` block is only passed to its receiver. Every other signal also starts the
    countdown to the forced exit.
    """

    def __init__(self) -> None:
        self._received: list[signal.Signals] = []
        self._receive: Callable[[signal.Signals], None] | None = None
        self._draining = False
        self._advice: Sequence[str] = ()
        self._exit_at = math.inf
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        start_daemon(self._run, THREAD, reader)

    def route(self, receive: Callable[[signal.Signals], None] | None, advice: Sequence[str]) -> None:
        """Pass signals to *receive* from now on; None means that there is nothing to drain."""
        self._draining, self._receive, self._advice = False, receive, advice

    def _run(self, reader: int) -> None:
        waiting = select.poll()
        waiting.register(reader, select.POLLIN)
        while True:
            left_s = self._exit_at - time.monotonic()
            if not waiting.poll(None if left_s == math.inf else max(0.0, 1_000 * left_s)):
                self._exit()
            number = os.read(reader, 1)[0]
            if number in SIGNALS:
                self._receive_one(signal.Signals(number))

    def _receive_one(self, number: signal.Signals) -> None:
        self._received.append(number)
        receive, draining = self._receive, self._draining
        if receive is not None:
            self._draining = True
            receive(number)
        if receive is None or draining:
            self._exit_at = min(self._exit_at, time.monotonic() + EXIT_AFTER_S)

    def _exit(self) -> NoReturn:
        reason = "a disk, a name server, the source of the token or an output does not respond"
        try:
            messages.say(
                f"bulkwf: the process is ended after {self._received[-1].name}, because {reason}.", *self._advice
            )
            messages.wait_written(GRACE_S)
        finally:
            os._exit(128 + self._received[0])


@cache
def watch_signals() -> _SignalThread:
    """Start the thread that reads signals. From now on, signals are received even if the main thread hangs.

    Raises:
        SystemRefused: The thread can't be started.
    """
    return _SignalThread()


@contextmanager
def caught_signals(receive: Callable[[signal.Signals], None], advice: Sequence[str] = ()) -> Iterator[None]:
    """Call *receive* with each signal while the block lasts, in the running loop. Ignored signals (nohup) stay ignored.

    A second signal, or any signal after the block, forces the process to exit after `EXIT_AFTER_S`. The exit code is
    then 128 + the number of the first signal. The handlers stay installed after the block, until the process ends.

    Args:
        receive: Drains the work at the first signal, and aborts it at the second.
        advice: Lines of the message of a forced exit: what to do next.
    """
    loop = asyncio.get_running_loop()

    def pass_on(number: signal.Signals) -> None:
        with suppress(RuntimeError):  # the loop is closed: the work has ended
            loop.call_soon_threadsafe(receive, number)

    watch = watch_signals()
    watch.route(pass_on, advice)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle_in_thread)
    try:
        yield
    finally:
        watch.route(None, advice)


def _handle_in_thread(*_: object) -> None:
    """Does nothing. Without a handler, Python would not write the signal's number to the thread's pipe."""


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that is closed without waiting for the threads of its pool."""

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Do nothing. `asyncio.BaseEventLoop.shutdown_default_executor` would start a thread in order to wait."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run *work* as `asyncio.run` does, without its wait for threads.

    Raises:
        SystemRefused: A thread can't be started.
    """
    with starting_threads(), asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work)


def exit_now(code: int) -> NoReturn:
    """Exit with *code*, even if threads or the reader of standard error hang."""
    if not messages.finish():
        os._exit(code)
    deadline = time.monotonic() + GRACE_S
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and thread.name not in (THREAD, messages.THREAD):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                os._exit(code)
    sys.exit(code)
