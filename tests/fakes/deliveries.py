"""Batches, and deliveries of one run without an engine."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from bulkwf.attempt import Verdict
from bulkwf.batching.batch_state import BatchState
from bulkwf.batching.batcher import Batcher
from bulkwf.batching.ids import IdScheme
from bulkwf.batching.packer import Packer
from bulkwf.errors import Draining
from bulkwf.limits.limiter import WindowLimiter
from bulkwf.model import Counts, Slice
from bulkwf.options import Options, RateLimits, Target
from bulkwf.sources import open_source
from bulkwf.submission.activity import Activity
from bulkwf.submission.client import OutageTracker, ServiceClient
from bulkwf.submission.delivery import BatchDelivery, RunContext
from bulkwf.submission.journal import Journal
from bulkwf.submission.progress import Progress
from fakes.virtual_time import clock, wall

RUN_TARGET = Target(base_url="https://api.example/client/v4", account_id="acct", workflow="resize")
UNLIMITED = RateLimits(instances_per_s=None, requests_per_5m=None)


def lines(n: int, first: int = 0, prefix: str = "id-", **more: Any) -> bytes:
    """*n* rows with ids and small params."""
    rows = ({"instance_id": f"{prefix}{i}", "params": {"n": i}, **more} for i in range(first, first + n))
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def make_batch(n: int, first_row: int = 0, data: bytes | None = None, **more: Any):
    """A batch of *n* rows."""
    data = lines(n, first_row, **more) if data is None else data
    packer = Packer(IdScheme("key"), "instance")
    packer.add(Slice(first_row, n, data))
    return packer.pack()


@dataclass
class Desk:
    """Deliveries of one run, and a record of what they write to its checkpoint."""

    transport: Any
    options: Options = field(default_factory=Options)
    limits: RateLimits = UNLIMITED
    seed: int = 0
    events: list[tuple[Any, ...]] = field(default_factory=list)
    sleeps: list[float] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    drained: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        at = clock(self.seed)
        self.draw = at.random
        self.limiter = WindowLimiter(self.limits, clock=at.now, margin_s=0.005)
        self.progress = Progress(at.now())
        self.journal = Journal(self, self.progress, clock=at, activity=self._activity)
        self.client = ServiceClient(
            transport=self.transport,
            limiter=self.limiter,
            policy=self.options.retry,
            outage=OutageTracker(),
            journal=self.journal,
            sleep=self.sleep,
            clock=at.now,
            random=lambda: self.draw(),  # noqa: PLW0108 (a test may replace `draw`)
        )
        self.run = RunContext(
            client=self.client,
            journal=self.journal,
            batcher=Batcher(open_source([]), IdScheme("key"), self.options, linger_s=None),
            target=RUN_TARGET,
            options=self.options,
            wall=wall,
            where=lambda row: f"row {row}",
        )

    async def deliver(self, batch, *, begun_at: float | None = None, state: BatchState | None = None) -> BatchState:
        """Deliver a batch; returns its state."""
        state = state or BatchState(batch)
        counts = self.progress.counts
        settled = Counts(created=len(state.batch.ids) - len(state.pending))
        self.progress.counts = counts + settled + Counts(pending=len(state.pending))
        self.state = state
        await self.delivery(state, begun_at).deliver()
        return state

    def delivery(self, state: BatchState, begun_at: float | None = None) -> BatchDelivery:
        """The delivery of another batch of the run."""
        return BatchDelivery(self.run, state, wall() if begun_at is None else begun_at)

    def stop(self) -> None:
        """Drain."""
        self.drained.set()
        self.limiter.stop()

    async def sleep(self, seconds: float) -> None:
        """Sleep, and record for how long; a drain ends it."""
        if seconds:
            self.sleeps.append(seconds)
        try:
            await asyncio.wait_for(self.drained.wait(), seconds)
        except TimeoutError:
            return
        raise Draining

    # --- as the checkpoint of its journal ---

    async def record(self, attempt, *, settled, pause_until, now) -> None:
        """Record an attempt; a commit takes 3 ms."""
        self.events.append(("attempted", attempt.instances, Verdict(attempt.verdict)))
        if pause_until is not None:
            self.pauses.append(round(pause_until - now, 5))
        await asyncio.sleep(0.003)
        self.events.append(("settled" if settled is not None else "recorded",))

    async def settle(self, state, now) -> None:
        """Record that results without an attempt of their own are stored."""
        await asyncio.sleep(0.003)
        self.events.append(("settled",))

    async def pause(self, until) -> None:
        """Record a pause that no answer has asked for."""
        self.pauses.append(round(until - wall(), 5))

    def note_interval(self, interval, started_at) -> None:
        """The timeline is tested elsewhere."""

    def _activity(self, committing) -> Activity:
        return Activity(paused_until=self.limiter.paused_until)


def outcomes(state: BatchState) -> dict[str, str]:
    """The outcome of each id of a batch, by id."""
    ids = state.batch.ids
    return {
        **dict.fromkeys((ids[i] for i in state.created), "created"),
        **{ids[i]: result.outcome for i, result in state.others.items()},
        **dict.fromkeys((ids[i] for i in state.pending), "pending"),
    }


def count(values: Iterable[str]) -> dict[str, int]:
    """How many of each."""
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts
