"""Turns: which run sends next where several share a pool. Pure.

A waiter stands in the line of each pool that its request counts in. It leaves an earlier waiter of another run the turn
where its own request would delay that one. A waiter that could go and does not go loses its turn.
"""

from bulkwf.limits.pools import TURN_S, Bound, Pool, TokenPool, User, Wait, Waiter

__all__ = ["Turns"]

LOOK_AGAIN_S = 0.005


class Turns:
    """The turns of one run.

    Args:
        run: The run's budget.
        pools: The pools of its workflow, of its account and of its token.

    Attributes:
        shared: Another run uses one of the pools: only then do waiters stand in lines.
    """

    def __init__(self, run: User, pools: tuple[Pool, Pool, TokenPool]) -> None:
        self.shared = any(pool.shared for pool in pools)
        self._run = run
        self._pools = pools

    def wait(self, now: float, waiter: Waiter) -> Wait | None:
        """How long *waiter* leaves other runs' waiters the turn; None if it delays none that came before it."""
        for pool in self._lines(waiter):
            for earlier in tuple(pool.line):
                if earlier is waiter:
                    break
                if earlier.user is self._run:
                    continue
                ready_s = earlier.user.ready_s(now, earlier.cost)
                if not pool.delays(now, earlier, ready_s, waiter.cost):
                    continue
                if not earlier.lapsed(now, ready_s):
                    return Wait(min(max(ready_s, LOOK_AGAIN_S), TURN_S), Bound.TURN)
                earlier.user.leave(earlier)
        return None

    def join(self, waiter: Waiter) -> None:
        """Put *waiter* at the end of the lines that it does not stand in yet."""
        waiter.queued = True
        for pool in self._lines(waiter):
            pool.line.setdefault(waiter)

    def leave(self, waiter: Waiter) -> None:
        """*waiter* does not ask again soon: take it out of the lines."""
        if waiter.queued:
            waiter.queued, waiter.ready_at = False, None
            for pool in self._pools:
                pool.line.pop(waiter, None)
            self.wake_others()

    def leave_all(self) -> None:
        """Take the run's waiters out of the lines."""
        token = self._pools[-1]  # each waiter stands in its line
        for waiter in [waiter for waiter in token.line if waiter.user is self._run]:
            self.leave(waiter)

    def wake_others(self) -> None:
        """Something has changed for the waiters of other runs: let them ask again."""
        if self.shared:
            for waiter in dict.fromkeys(waiter for pool in self._pools for waiter in pool.line):
                if waiter.user is not self._run:
                    waiter.wake()

    def _lines(self, waiter: Waiter) -> tuple[Pool, ...]:
        return self._pools if waiter.cost else self._pools[-1:]
