"""Commits writes in groups: all writes that are queued during one commit go into the next one, and share its cost.

All commits run in one thread, the executor. A commit is a future of that thread, and what follows it is a callback.
Neither is a task, because `asyncio.run` cancels every task at its end.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from bulkwf.checkpoint.connection import Write, WriterConnection
from bulkwf.checkpoint.errors import explain
from bulkwf.errors import CheckpointError
from bulkwf.uncancelled import until_done

__all__ = ["Executor", "GroupCommit", "inline"]

Executor = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs functions one after another, in a thread of its own or at once. The awaitable ends when the function has ended.

If tasks may be cancelled, the awaitable must be a future that is no task.
"""


def inline(function: Callable[[], Any]) -> Awaitable[Any]:
    """An executor that runs the function at once: for a checkpoint in memory, and for simulated time."""
    done = asyncio.get_running_loop().create_future()
    try:
        done.set_result(function())
    except Exception as error:  # noqa: BLE001 - for the caller, who awaits the future
        done.set_exception(error)
    return done


class GroupCommit:
    """Commits what is written, in the order of the calls.

    Args:
        connection: Used in the executor's thread only.
        executor: Where commits run.

    Attributes:
        error: Why nothing can be written any more; None while writing is possible.
    """

    def __init__(self, connection: WriterConnection, executor: Executor) -> None:
        self.error: CheckpointError | None = None
        self._connection = connection
        self._executor = executor
        self._queue: list[Write] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._busy = False
        """A commit is under way, or about to begin."""
        self._closed: asyncio.Future[None] | None = None

    def add(self, write: Write) -> None:
        """Queue *write* for the next commit, without requesting one."""
        self._queue.append(write)

    def commit(self, *writes: Write) -> Awaitable[None]:
        """Queue *writes* at once; the awaitable ends when they are durable.

        Raises:
            CheckpointError: Nothing can be written any more. The awaitable raises it if these writes fail.
        """
        if self.error is not None:
            raise self.error
        self._queue.extend(writes)
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiters.append(waiter)
        if not self._busy:
            self._busy = True
            loop.call_soon(self._begin, loop, 0)
        return waiter

    async def aclose(self) -> None:
        """Commit what is queued, then close the connection. A cancellation of the caller is raised after that."""
        if self._closed is None:
            self._closed = asyncio.get_running_loop().create_future()
            if not self._busy:
                self._begin_closing(self._closed)
        await until_done(self._closed)

    def _begin(self, loop: asyncio.AbstractEventLoop, queued: int) -> None:
        """Commit the queue; if more than *queued* writes are in it, try again at the next turn of the loop.

        A commit costs as much as twenty rows, so it waits as long as each turn of the loop adds writes.
        """
        if len(self._queue) > queued:
            loop.call_soon(self._begin, loop, len(self._queue))
            return
        writes, self._queue = self._queue, []
        waiters, self._waiters = self._waiters, []
        self._execute(partial(self._connection.commit, writes), partial(self._end, loop, waiters))

    def _end(
        self, loop: asyncio.AbstractEventLoop, waiters: list[asyncio.Future[None]], error: BaseException | None
    ) -> None:
        if error is not None:  # what is queued behind a failed commit fails with it
            self.error = explain(error, self._connection.path)
            waiters += self._waiters
            self._queue, self._waiters = [], []
        for waiter in waiters:
            if waiter.done():  # its task was cancelled
                continue
            if self.error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(self.error)
                waiter.exception()  # otherwise asyncio logs an exception that was never retrieved
        if self._waiters:
            self._begin(loop, 0)
        else:
            self._busy = False
            if self._closed is not None:
                self._begin_closing(self._closed)

    def _begin_closing(self, closed: asyncio.Future[None]) -> None:
        close = partial(self._connection.close, intact=self.error is None)
        self.error = self.error or CheckpointError(f"{self._connection.path}: the checkpoint is closed.")

        def end(error: BaseException | None) -> None:
            try:
                if error is not None:
                    close()  # no thread could be started, so none uses the connection
            finally:
                closed.set_result(None)

        self._execute(close, end)

    def _execute(self, function: Callable[[], None], then: Callable[[BaseException | None], None]) -> None:
        """Run *function* in the thread, then call *then* in the loop with the error of *function*, or None."""
        try:
            running = asyncio.ensure_future(self._executor(function))
        except Exception as error:  # noqa: BLE001 - no thread can be started
            then(error)
        else:
            running.add_done_callback(lambda ended: then(_error_of(ended)))


def _error_of(ended: asyncio.Future[Any]) -> BaseException | None:
    return RuntimeError("the commit was cut off") if ended.cancelled() else ended.exception()
