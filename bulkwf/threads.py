"""Calls that may never return, made where nothing waits for their end."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextvars import copy_context
from typing import Any, TypeVar

__all__ = ["in_daemon_thread"]

T = TypeVar("T")


class _DaemonThreads(Executor):
    """A daemon thread for each call: neither a loop nor the interpreter waits for one before it ends."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """See `Executor.submit`."""
        future: Future[T] = Future()
        call = (future, fn, args, kwargs)
        threading.Thread(target=self._run, args=call, name="bulkwf-call", daemon=True).start()
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
    loop's pool, for which `asyncio.run` and the interpreter wait before they end, cancelled or not.

    Args:
        function: Called once. It may still run when the caller has been cancelled.
        undo: Given what it has returned if the caller was cancelled meanwhile.
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
