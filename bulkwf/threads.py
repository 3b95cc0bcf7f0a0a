"""Calls that may never return, made where nothing waits for their end."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import TypeVar

__all__ = ["in_daemon_thread"]

T = TypeVar("T")


async def in_daemon_thread(function: Callable[[], T]) -> T:
    """Call *function* in a daemon thread of its own, and return what it returns.

    For calls that may hang: a file on a network disk, a token's source. `asyncio.to_thread` would use a thread of the
    loop's pool, for which `asyncio.run` and the interpreter wait before they end, cancelled or not.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()
    context = copy_context()

    def call() -> None:
        try:
            value = context.run(function)
        except BaseException as error:  # noqa: BLE001 - raised again where the result is awaited
            settle(result.set_exception, error)
        else:
            settle(result.set_result, value)

    def settle(how: Callable[..., None], what: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits for the result
            loop.call_soon_threadsafe(lambda: None if result.done() else how(what))

    threading.Thread(target=call, name="bulkwf-call", daemon=True).start()
    return await result
