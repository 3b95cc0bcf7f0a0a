"""Waits that cancellation does not end."""

import asyncio
import threading
from contextlib import AsyncExitStack

import anyio
import pytest

from bulkwf.parts import own_thread
from bulkwf.uncancelled import uncancelled, until_done


async def turns(number=5):
    for _ in range(number):
        await asyncio.sleep(0)


@pytest.mark.parametrize("outcome", ["result", "error", "cancelled"])
async def test_a_cancellation_is_raised_once_the_wait_is_over(outcome):
    future, called = asyncio.get_running_loop().create_future(), []
    waiting = asyncio.ensure_future(until_done(future, lambda: called.append(1)))
    for _ in range(3):
        await turns()
        waiting.cancel()
    await turns()
    assert (waiting.done(), called) == (False, [1, 1, 1])
    if outcome == "cancelled":
        future.cancel()
    elif outcome == "error":
        future.set_exception(ValueError("never retrieved"))
    else:
        future.set_result(None)
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_wait_without_a_cancellation_raises_nothing():
    future = asyncio.get_running_loop().create_future()
    future.set_exception(ValueError)
    await until_done(future)


async def test_a_cancelled_scope_takes_effect_after_the_wait():
    future = asyncio.get_running_loop().create_future()
    with anyio.CancelScope() as scope:
        scope.cancel()
        asyncio.get_running_loop().call_later(0.01, future.set_result, None)
        await until_done(future)
        await asyncio.sleep(0)
        raise AssertionError("the scope is cancelled")
    assert scope.cancelled_caught
    assert future.done()


async def test_a_timeout_of_asyncio_is_raised_after_the_wait():
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.02, future.set_result, None)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.005):
            await until_done(future)
    assert future.done()


async def test_closing_continues_after_its_own_task_was_cancelled():
    steps, go_on = [], asyncio.Event()

    async def close():
        steps.append("begun")
        await go_on.wait()
        steps.append("done")

    own = asyncio.current_task()
    closing = asyncio.ensure_future(uncancelled(close))
    for _ in range(3):
        await turns()
        for task in asyncio.all_tasks() - {own}:
            task.cancel()
    await turns()
    assert steps == ["begun"] * 4
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert steps[-1] == "done"


async def test_errors_and_own_cancellations_of_closing_are_raised():
    async def broken():
        raise ValueError("no")

    async def cancelled():
        raise asyncio.CancelledError

    with pytest.raises(ValueError, match="no"):
        await uncancelled(broken)
    with pytest.raises(asyncio.CancelledError):
        await uncancelled(cancelled)


async def test_cancelling_all_tasks_does_not_cancel_what_a_files_own_thread_runs():
    called, may_end = threading.Event(), threading.Event()

    def commit():
        called.set()
        return may_end.wait(60)

    async with AsyncExitStack() as parts:
        running = asyncio.ensure_future(own_thread(parts, "writer")(commit))
        parts.callback(may_end.set)  # also if an assertion fails
        await turns()
        called.wait(60)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await turns()
        assert not running.done()
        may_end.set()
        assert await running
