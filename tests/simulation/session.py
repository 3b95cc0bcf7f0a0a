"""One session of a run: the loop that it runs in, how it ended, and how its tasks are cancelled or cut off."""

import asyncio
import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from fakes import VirtualLoop

from bulkwf.model import Result, Summary


class Crash(BaseException):
    """The process is gone."""


class SimulatedLoop(VirtualLoop):
    """Virtual time that begins where the last session's ended, and a turn at which something happens."""

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
    """How one session went."""

    number: int
    began_at: float
    end: str
    turn: int = 0
    summary: Summary | None = None
    error: BaseException | None = None
    ended_at: float = 0.0
    paused_until: float = 0.0
    """What the checkpoint asked for when it began, in virtual seconds."""
    emitted: list[tuple[int, tuple[str, str | None]]] = field(default_factory=list)
    """The results that were handed to the caller: (row, (outcome, id))."""

    async def emit(self, results: Sequence[Result]) -> None:
        """Note results that the run hands to its caller."""
        self.emitted.extend((result.row, (result.outcome, result.id)) for result in results)


def cancel_all(loop: SimulatedLoop, times: int) -> None:
    """Cancel every task, as `asyncio.run` does at its end; in all *times* turns in a row, while the session lasts."""
    for task in asyncio.all_tasks(loop):
        task.cancel()
    if times > 1:
        loop.at_turn[loop.turn + 1] = partial(cancel_all, loop, times - 1)


def crash() -> None:
    raise Crash


def unwind(loop: asyncio.AbstractEventLoop) -> None:
    """Let what is left of a session's tasks end; the world no longer listens."""
    with warnings.catch_warnings():
        # A task that is cancelled before it began complains of the coroutine that anyio has wrapped for it.
        warnings.simplefilter("ignore", RuntimeWarning)
        while tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        del tasks
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        gc.collect(1)
