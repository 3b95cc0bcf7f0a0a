"""A program that submits a list in the background and ends by cancellation, in one of several manners: `MANNERS`.

`python ending.py MANNER SEED BASE_URL FOLDER`; the seed gives the moment, the kind of list, and the sizes of batches.
`resume` takes the same run up and finishes it.
"""

import asyncio
import contextlib
import gzip
import json
import math
import os
import random
import signal
import sys
from functools import partial
from pathlib import Path

from bulkwf import BatchLimits, Options, RateLimits, submit_all, submit_stream

ROWS = 6_000
LONGEST_S = 0.2
"""Longest time until the end, in seconds: usually less than the list takes."""
OPENING_S = 0.15
"""What a run takes to begin, in seconds."""
ACCOUNT, WORKFLOW = "acct", "resize"


class Program:
    """One program: its list, its run, and the moment at which it ends."""

    def __init__(self, seed: int, base_url: str, folder: Path) -> None:
        self.chance = random.Random(seed)
        self._folder = folder
        self._kind = self.chance.choice(("mappings", "async", "plain", "gzip"))
        self._settled = asyncio.Event()
        self._base_url = base_url
        self._options = Options(
            rate=RateLimits(instances_per_s=None, requests_per_5m=None),
            batch=BatchLimits(instances=self.chance.choice((3, 10, 50))),
        )

    async def submit(self) -> str:
        """Run to the end: the number of started rows, and whether the run is complete."""
        summary = await submit_all(self.rows(), on_progress=lambda _: self._settled.set(), **self.call())
        return f"{summary.created + summary.existed} complete={summary.complete}"

    async def stream(self, most: float = math.inf) -> None:
        """Run and read the results as a stream, up to row *most*."""
        async with submit_stream(self.rows(), **self.call()) as results:
            async for result in results:
                self._settled.set()
                if result.row > most:
                    break

    async def moment(self) -> None:
        """Wait until the program is to end: during the opening, or some time after rows have been settled."""
        if self.chance.random() < 0.25:
            for _ in range(self.chance.randrange(60)):
                await asyncio.sleep(0)
        else:
            await self._settled.wait()
            await asyncio.sleep(self.chance.uniform(0.0, LONGEST_S))

    def call(self):
        checkpoint = self._folder / "run.bulkwf"
        return {
            "workflow": WORKFLOW,
            "account_id": ACCOUNT,
            "base_url": self._base_url,
            "api_token": "t" * 20,
            "checkpoint": checkpoint,
            "options": self._options,
        }

    def rows(self):
        rows = ({"params": {"n": number}} for number in range(ROWS))
        if self._kind == "mappings":
            return rows
        if self._kind == "async":
            return _drawn(rows)
        path = self._folder / f"rows.{self._kind}"
        if not path.exists():
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(data, 1) if self._kind == "gzip" else data)
        return path


async def _drawn(rows):
    for number, row in enumerate(rows):
        if number % 500 == 0:
            await asyncio.sleep(0)
        yield row


async def _end_with_main(program):
    """The main function returns, and `asyncio.run` cancels every task."""
    job = asyncio.create_task(program.submit())
    await program.moment()
    return job


async def _end_stream_with_main(program):
    job = asyncio.create_task(program.stream())
    await program.moment()
    return job


async def _cancel_all(program):
    """Every task is cancelled, some more than once, and the program goes on."""
    own = asyncio.current_task()
    job = asyncio.create_task(program.submit())
    await program.moment()
    for _ in range(program.chance.choice((1, 1, 2, 5))):
        for task in asyncio.all_tasks() - {own}:
            task.cancel()
        for _ in range(program.chance.randrange(20)):
            await asyncio.sleep(0)
    await _ended(job)


async def _cancel_again(program, work=None):
    """The caller's task is cancelled several times, some turns of the loop apart."""
    job = asyncio.create_task((work or program.submit)())
    await program.moment()
    for _ in range(program.chance.choice((1, 2, 2, 6))):
        job.cancel()
        for _ in range(program.chance.randrange(2, 41)):
            await asyncio.sleep(0)
    await _ended(job)


async def _cancel_stream(program):
    await _cancel_again(program, program.stream)


async def _leave_stream(program):
    """The reader leaves the stream early, and is cancelled while the run drains."""
    await _cancel_again(program, partial(program.stream, 300))


async def _cancel_opening(program):
    """The caller is cancelled while the checkpoint is being opened."""
    job = asyncio.create_task(program.submit())
    for _ in range(program.chance.randrange(1, 30)):
        await asyncio.sleep(0)
    job.cancel()
    await _ended(job)


async def _time_out(program):
    """A timeout of the caller expires."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(program.chance.uniform(0.0, OPENING_S + LONGEST_S)):
            await program.submit()


async def _interrupt(program):
    """Ctrl-C."""
    asyncio.get_running_loop().call_later(
        program.chance.uniform(0.0, OPENING_S + LONGEST_S), os.kill, os.getpid(), signal.SIGINT
    )
    await program.submit()


async def _ended(job):
    with contextlib.suppress(asyncio.CancelledError):
        await job
    assert job.done()


def _stop_loop(program):
    """The loop is stopped, its generators and threads are shut down, and it is closed. No task is cancelled."""
    loop = asyncio.new_event_loop()
    job = loop.create_task(program.submit())
    loop.run_until_complete(program.moment())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    return job


TIDY = {
    "main returns": _end_with_main,
    "main returns, stream": _end_stream_with_main,
    "all cancelled": _cancel_all,
    "cancelled again": _cancel_again,
    "stream cancelled": _cancel_stream,
    "stream left": _leave_stream,
    "opening cancelled": _cancel_opening,
    "timeout": _time_out,
    "interrupt": _interrupt,
}
"""Manners in which the program prints nothing to stderr."""
ABRUPT = {"loop stopped": _stop_loop}
"""Manners in which asyncio logs that tasks are left pending."""
MANNERS = (*TIDY, *ABRUPT)


def main(manner: str, seed: str, base_url: str, folder: str) -> None:
    """See the docstring of the module."""
    program = Program(int(seed), base_url, Path(folder))
    if manner == "resume":
        sys.stdout.write(asyncio.run(program.submit()))
    elif manner in ABRUPT:
        globals()["left"] = ABRUPT[manner](program)
    else:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(TIDY[manner](program))


if __name__ == "__main__":
    main(*sys.argv[1:])
