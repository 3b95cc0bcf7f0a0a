"""What a run, a verification or a check does when a signal arrives."""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from bulkwf.cli.messages import say
from bulkwf.cli.process import caught_signals
from bulkwf.cli.resume import resume_command

__all__ = ["Signals", "until_signalled"]

T = TypeVar("T")


class Signals:
    """Prints the message *then* and calls *drain* at the first signal; calls *abort* at each later one."""

    def __init__(self, drain: Callable[[int], None], abort: Callable[[], None], then: str) -> None:
        self._drain = drain
        self._abort = abort
        self._then = then
        self.received: signal.Signals | None = None

    def caught(self) -> AbstractContextManager[None]:
        """Receive the process's signals while the block lasts."""
        return caught_signals(self._receive, ("To continue, run:", f"  {resume_command()}"))

    def _receive(self, number: signal.Signals) -> None:
        if self.received is None:
            self.received = number
            say(f"bulkwf: {number.name}: {self._then}")
            self._drain(number)
        else:
            self._abort()


async def until_signalled(work: Coroutine[Any, Any, T]) -> T | signal.Signals:
    """Run *work* until it ends or a signal arrives; returns its result or the signal."""
    task = asyncio.ensure_future(work)
    received: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        received.append(number)
        task.cancel()

    with caught_signals(stop):
        try:
            return await task
        except asyncio.CancelledError:
            if not received:
                raise
            return received[0]
