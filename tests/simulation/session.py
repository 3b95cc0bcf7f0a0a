"""One session of a run: its event loop, its record, and the ways in which it is ended."""

import asyncio
import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from fakes import VirtualLoop

from bulkwf.model import Result, Summary


class Crash(BaseException):
    """The process was killed."""


class SimulatedLoop(VirtualLoop):
    """A virtual loop that continues the time of the last session's. `at_turn`: what to call at which turn."""

    def __init__(self, begin_s: float) -> None:
        super().__init__(limit_s=1e9)
        self._now += begin_s
        self._limit += begin_s
        VirtualLoop.latest = self._now
        self.turn = 0
        self.at_turn: dict[int, Callable[[], None]] = {}

    def _run_once(self):
        self.turn += 1
        act = self.at_turn.pop(self.turn, None)
        if act is not None:
            act()
        super()._run_once()


@dataclass
class Session:
    """The record of one session."""

    number: int
    began_at: float
    end: str
    turn: int = 0
    summary: Summary | None = None
    error: BaseException | None = None
    ended_at: float = 0.0
    paused_until: float = 0.0
    """End of the pause in the checkpoint when the session began, in virtual seconds."""
    emitted: list[tuple[int, tuple[str, str | None]]] = field(default_factory=list)
    """The results given to the caller: (row, (outcome, id))."""

    async def emit(self, results: Sequence[Result]) -> None:
        """Record results that the run gives to its caller."""
        self.emitted.extend((result.row, (result.outcome, result.id)) for result in results)


def cancel_all(loop: SimulatedLoop, times: int) -> None:
    """Cancel every task, as `asyncio.run` does at its end, in *times* turns in a row."""
    for task in asyncio.all_tasks(loop):
        task.cancel()
    if times > 1:
        loop.at_turn[loop.turn + 1] = partial(cancel_all, loop, times - 1)


def crash() -> None:
    """End the session as a kill does."""
    raise Crash


def unwind(loop: SimulatedLoop) -> None:
    """End the remaining tasks of a session. What they send no longer arrives."""
    with warnings.catch_warnings():
        # A task that is cancelled before it starts leaves a coroutine of anyio's that was never awaited.
        warnings.simplefilter("ignore", RuntimeWarning)
        cancel_all(loop, 1)
        # A session that crashes in the turn in which it ends has left a call of `stop` behind: it ends this turn.
        loop.call_soon(loop.stop)
        loop.run_forever()
        while tasks := asyncio.all_tasks(loop):
            cancel_all(loop, 1)
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        del tasks
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        gc.collect(1)
