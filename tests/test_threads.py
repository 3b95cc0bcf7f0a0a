"""Calls in daemon threads: their results, and that nothing waits for the ones that hang."""

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


async def test_a_call_gives_what_the_function_returns_and_sees_the_callers_context():
    VARIABLE.set("here")
    assert await in_daemon_thread(lambda: (VARIABLE.get(), threading.current_thread().daemon)) == ("here", True)


async def test_a_call_raises_what_the_function_raises():
    with pytest.raises(ZeroDivisionError):
        await in_daemon_thread(lambda: 1 / 0)


async def test_a_cancelled_call_whose_function_ends_later_disturbs_nobody():
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


def test_a_call_that_hangs_holds_up_neither_the_loop_nor_the_interpreter():
    ended = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ended\n", "")
