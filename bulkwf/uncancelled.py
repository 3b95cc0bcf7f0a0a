"""Waits that a cancellation does not end, for work that must be finished before something is closed.

anyio's shield does not stop `task.cancel()`, and `asyncio.run` cancels every task at its end, including those of
libraries. So the work is a future or a task of its own, and is awaited again after each cancellation.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

__all__ = ["uncancelled", "until_done"]


async def until_done(future: asyncio.Future[Any], cancelled: Callable[[], object] = lambda: None) -> None:
    """Wait until *future* is done, even if the caller is cancelled meanwhile.

    Args:
        future: What to wait for. It is not cancelled with the caller.
        cancelled: Called at each cancellation of the caller.

    Raises:
        asyncio.CancelledError: The caller was cancelled. Raised once *future* is done.
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
    """Run *close* to its end, even if the caller, or the task that runs it, is cancelled meanwhile.

    Args:
        close: Closes something. It is called again if its own task was cancelled, and must then continue.

    Raises:
        asyncio.CancelledError: The caller was cancelled. Raised once *close* has ended.
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
