"""Starts threads. A call that may hang is made in a thread that nothing waits for."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, TypeVar

from bulkwf.errors import SystemRefused

__all__ = ["in_daemon_thread", "start_daemon", "starting_threads"]

T = TypeVar("T")


@contextmanager
def starting_threads() -> Iterator[None]:
    """Raise `SystemRefused` if the block can't start a thread."""
    try:
        yield
    except RuntimeError as error:
        if str(error) != "can't start new thread":
            raise
        raise SystemRefused(
            "the system does not let this process start another thread. Raise its limit of processes (ulimit -u, or "
            "the container's pids limit), and run the same command again: nothing is lost."
        ) from None


def start_daemon(function: Callable[..., object], name: str, *args: Any) -> threading.Thread:
    """Call *function* in a daemon thread, which neither an event loop nor the interpreter waits for at its exit.

    Raises:
        SystemRefused: The thread can't be started.
    """
    thread = threading.Thread(target=function, args=args, name=name, daemon=True)
    with starting_threads():
        thread.start()
    return thread


class _DaemonThreads(Executor):
    """A daemon thread for each call."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """See `Executor.submit`."""
        future: Future[T] = Future()
        start_daemon(self._run, "bulkwf-call", future, fn, args, kwargs)
        return future

    @staticmethod
    def _run(future: Future[T], fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - raised again where the result is awaited
            future.set_exception(error)


_THREADS = _DaemonThreads()


async def in_daemon_thread(function: Callable[[], T], undo: Callable[[T], object] = lambda _: None) -> T:
    """Call *function* in a daemon thread of its own, and return what it returns.

    For calls that may hang: a file on a network disk, a token's source. `asyncio.to_thread` would use a thread of the
    loop's pool. `asyncio.run` and the interpreter wait for such threads, even if the call was cancelled.

    Args:
        function: Called once. It may still run after the caller has been cancelled.
        undo: Called with what *function* returned, if the caller has been cancelled meanwhile.

    Raises:
        SystemRefused: The thread can't be started.
    """
    lock = threading.Lock()
    returned: list[T] = []
    abandoned = False

    def call() -> T:
        value = function()
        with lock:
            if not abandoned:
                returned.append(value)
                return value
        undo(value)
        return value

    try:
        return await asyncio.get_running_loop().run_in_executor(_THREADS, copy_context().run, call)
    except asyncio.CancelledError:
        with lock:
            abandoned = True
        for value in returned:
            undo(value)
        raise
