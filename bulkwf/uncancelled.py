"""Waits that cancellation does not end, for what must be done before something may be closed.

anyio's shield does not keep off `task.cancel()`, and `asyncio.run` cancels every task at its end, also those of
libraries. So what must be done is a future or a task of its own, and is awaited again after each cancellation.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

__all__ = ["uncancelled", "until_done"]


async def until_done(future: asyncio.Future[Any], cancelled: Callable[[], object] = lambda: None) -> None:
    """Wait until *future* is done, also with an error; then raise a cancellation that came meanwhile.

    Args:
        future: What to wait for. It is not cancelled with the caller.
        cancelled: Called at each cancellation of the caller.

    Raises:
        asyncio.CancelledError: The caller was cancelled.
    """
    cancellation: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):  # else a cancelled scope would cancel the wait at each turn of the loop
        while not future.done():
            try:
                await asyncio.wait((future,))
            except asyncio.CancelledError as error:
                cancellation = error
                cancelled()
    if not future.cancelled():
        future.exception()  # else asyncio logs an exception that was never retrieved
    if cancellation is not None:
        raise cancellation


async def uncancelled(close: Callable[[], Awaitable[None]]) -> None:
    """Run *close* to its end, whatever is cancelled meanwhile; then raise a cancellation of the caller.

    Args:
        close: Closes something. It is called again if its own task was cancelled, and must then continue.

    Raises:
        asyncio.CancelledError: The caller was cancelled.
    """
    cancellation: asyncio.CancelledError | None = None
    while True:
        closing = asyncio.ensure_future(_run(close))
        try:
            await until_done(closing)
        except asyncio.CancelledError as error:
            cancellation = error
        if not (closing.cancelled() and closing.cancelling()):
            break
    if cancellation is not None:
        raise cancellation
    closing.result()


async def _run(close: Callable[[], Awaitable[None]]) -> None:
    await close()
