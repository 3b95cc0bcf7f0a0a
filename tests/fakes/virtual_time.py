"""An event loop whose clock jumps to the next timer as soon as nothing is left to do.

An hour of backoff takes no time, the result is the same every time, and a deadlock is an error instead of a wait.
"""

import asyncio
import random
import selectors
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bulkwf.clock import Clock

EPOCH = 1_760_000_000.0
"""Unix time at virtual time 0."""


class DeadlockError(Exception):
    """Nothing is ready and no timer is set, or the time limit has passed: the loop would never end."""


class _Selector(selectors.SelectSelector):
    """Never waits: asks the loop to move its clock instead."""

    jump: Callable[[float | None], None]

    def select(self, timeout=None):
        if timeout == 0:  # callbacks are ready: descriptors can wait until there are none
            return []
        ready = super().select(0)
        if not ready:
            self.jump(timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` jumps to the next timer. Work for threads is done at once, in the loop."""

    latest = 1_000.0

    def __init__(self, limit_s: float = 1e7) -> None:
        selector = _Selector()
        super().__init__(selector)
        selector.jump = self._jump
        self._now = VirtualLoop.latest = 1_000.0
        self._limit = self._now + limit_s
        self._turns = 0

    def time(self):
        return self._now

    def run_in_executor(self, executor, func, *args):
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 (it is raised where the future is awaited)
            done.set_exception(error)
        return done

    def _jump(self, timeout):
        if timeout is None or not self._scheduled:
            raise DeadlockError(f"nothing is ready and no timer is set, at {self._now - 1_000:,.3f} s")
        self._now = VirtualLoop.latest = max(self._now, self._scheduled[0]._when)
        self._turns = 0
        if self._now > self._limit:
            raise DeadlockError(f"still running at {self._now - 1_000:,.0f} s")

    def _run_once(self):
        self._turns += 1
        if self._turns > 200_000:
            raise DeadlockError("200,000 turns of the loop without a step of its clock")
        super()._run_once()


def run_virtual(coroutine, *, limit_s: float = 1e7):
    """Run a coroutine to its end in virtual time."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(limit_s)) as runner:
        try:
            return runner.run(coroutine)
        except DeadlockError:
            for task in asyncio.all_tasks(runner.get_loop()):
                task.cancel()
            raise


def now() -> float:
    """Virtual seconds since the loop began; after its end, those at its end."""
    return VirtualLoop.latest - 1_000.0


def wall() -> float:
    """Virtual Unix time."""
    return EPOCH + now()


def clock(seed: int = 0) -> Clock:
    """The virtual clock, as the engine takes it."""
    drawn = random.Random(seed).random
    return Clock(now=asyncio.get_running_loop().time, wall=wall, sleep=asyncio.sleep, random=drawn)


@dataclass
class Machine:
    """A machine whose clock can be set, and that can be rebooted.

    `now`: virtual seconds. `set_s`: its clock minus the service's, in seconds.
    """

    now: Callable[[], float] = now
    set_s: float = 0.0
    boots: int = 1
    booted_at: float = -1_000.0

    def wall(self) -> float:
        """Unix time by its clock."""
        return EPOCH + self.now() + self.set_s

    def uptime(self) -> float:
        """Seconds since the boot."""
        return self.now() - self.booted_at

    def boot_anew(self) -> None:
        """Reboot it."""
        self.boots += 1
        self.booted_at = self.now()

    def clock(self, seed: int = 0) -> Clock:
        """Its clock as the engine takes it."""
        return replace(clock(seed), wall=self.wall, boot_id=f"boot-{self.boots}", uptime=self.uptime)


def windows(events: Sequence[tuple[float, int]], period_s: float) -> int:
    """The largest sum of (time, amount) in any window [t, t + period), by brute force."""
    worst = 0
    for i, (start, _) in enumerate(events):
        held = 0
        for at, amount in events[i:]:
            if at >= start + period_s:
                break
            held += amount
        worst = max(worst, held)
    return worst
