"""Calls in daemon threads: their results, and that nothing waits for a call that hangs."""

import asyncio
import contextvars
import subprocess
import sys
import threading

import pytest

from bulkwf.threads import in_daemon_thread

VARIABLE = contextvars.ContextVar("variable")

HANGING = """
import asyncio, threading
from bulkwf.threads import in_daemon_thread

async def main():
    call = asyncio.ensure_future(in_daemon_thread(threading.Event().wait))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait((call,))

asyncio.run(main())
print("ended")
"""


async def test_a_call_returns_the_result_and_has_the_callers_context():
    VARIABLE.set("here")
    assert await in_daemon_thread(lambda: (VARIABLE.get(), threading.current_thread().daemon)) == ("here", True)


async def test_a_call_raises_what_the_function_raises():
    with pytest.raises(ZeroDivisionError):
        await in_daemon_thread(lambda: 1 / 0)


async def test_the_late_end_of_a_cancelled_call_has_no_effect():
    begun, goes_on, ended = threading.Event(), threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def work():
        begun.set()
        goes_on.wait(60)
        loop.call_soon_threadsafe(ended.set)
        raise LookupError

    call = asyncio.ensure_future(in_daemon_thread(work))
    await asyncio.to_thread(begun.wait, 60)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    goes_on.set()
    await ended.wait()


def test_a_hanging_call_delays_neither_loop_nor_interpreter():
    ended = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ended\n", "")


@pytest.mark.parametrize("fails", [False, True])
async def test_what_a_cancelled_call_returns_is_undone_in_its_thread(fails):
    begun, go_on, undone = threading.Event(), threading.Event(), []

    def work():
        begun.set()
        go_on.wait(10)
        if fails:
            raise ValueError
        return 7

    working = asyncio.ensure_future(in_daemon_thread(work, undo=undone.append))
    await asyncio.to_thread(begun.wait, 10)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert undone == []
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "bulkwf-call":
            await asyncio.to_thread(thread.join, 10)
    assert undone == ([] if fails else [7])


async def test_what_a_call_returns_in_the_turn_of_its_cancellation_is_undone():
    returned, undone = threading.Event(), []

    def work():
        returned.set()
        return 7

    working = asyncio.ensure_future(in_daemon_thread(work, undo=undone.append))
    await asyncio.sleep(0)
    returned.wait(10)  # in the loop: nothing is delivered before the cancellation
    for thread in threading.enumerate():
        if thread.name == "bulkwf-call":
            thread.join(10)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert undone == [7]
