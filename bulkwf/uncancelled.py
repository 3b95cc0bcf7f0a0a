"""Waits that no cancellation cuts short, for what must come to its end before something may be closed.

anyio's shield alone does not hold off `task.cancel()`, and `asyncio.run` cancels every task at its end, those of a
library too. So what has to end is a future or a task of its own, which is awaited again until it is done.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import anyio

__all__ = ["in_thread", "uncancelled", "until_done"]

T = TypeVar("T")


async def until_done(future: asyncio.Future[Any], cancelled: Callable[[], object] = lambda: None) -> None:
    """Wait until *future* is done, whatever it ends with; a cancellation that comes meanwhile is raised then.

    Args:
        future: Not cancelled with the caller.
        cancelled: Called at each cancellation of the caller.
    """
    cancellation: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):  # a cancelled scope would cancel the wait at each turn of the loop
        while not future.done():
            try:
                await asyncio.wait((future,))
            except asyncio.CancelledError as error:
                cancellation = error
                cancelled()
    if not future.cancelled():
        future.exception()  # or asyncio would complain of one that nobody asks for
    if cancellation is not None:
        raise cancellation


async def uncancelled(close: Callable[[], Awaitable[None]]) -> None:
    """Close something to its end, whatever is cancelled meanwhile; a cancellation of the caller is raised then.

    Args:
        close: Closes it. Called again where its own task was cancelled, so it must go on from where it was cut off.
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


async def in_thread(function: Callable[..., T], *args: Any, undo: Callable[[T], object] = lambda _: None) -> T:
    """Call *function* in a thread; a cancellation is raised when it has returned, and what it uses may be closed.

    Args:
        function: Called once.
        args: Given to it.
        undo: Given what it has returned if the caller was cancelled meanwhile.
    """
    running = asyncio.get_running_loop().run_in_executor(None, partial(function, *args))
    try:
        await until_done(running)
    except asyncio.CancelledError:
        if not running.cancelled() and running.exception() is None:
            undo(running.result())
        raise
    return running.result()
