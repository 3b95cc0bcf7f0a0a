"""A long night: two jobs on one account and one workflow, and all that befalls them until the morning.

Their tokens rotate, the service orders silence, then it is ill; each job is cut off once and goes on upon a machine
whose clock is another. What the jobs report in the morning is held against what the service has seen.
"""

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import orjson
from fakes import EPOCH, RUN_TARGET, TARGET, created, ids_of

from bulkwf.attempt import Fault, FaultKind, Reply, Request, RequestKind, Slot
from bulkwf.checkpoint import inline
from bulkwf.clock import Clock
from bulkwf.emulator import Caller, Limits
from bulkwf.emulator.admission import Admission
from bulkwf.emulator.answers import Answer, refusal
from bulkwf.limits.limiter import WindowLimiter
from bulkwf.model import Summary
from bulkwf.options import Options, RateLimits
from bulkwf.run import open_run

RATE = 50
"""Instances a second of each job: together, what one workflow may have."""
OPTIONS = Options(rate=RateLimits(instances_per_s=RATE, requests_per_5m=500))
LIMITS = Limits(instances_per_s=2 * RATE)
SILENCE_S = 120.0
OUTAGE_S = 240.0
LULL_S = 15.0
"""Nothing settled for longer is told."""
DOWN_S = 60.0
"""Between the end of a job and its next start."""


@dataclass
class Account:
    """The service: the emulator's admission, and a mark for each instance that has begun.

    `ordered` and `ill` are the spans, in virtual seconds, of its silence and of its outage.
    """

    now: Callable[[], float]
    rows: int
    ordered: tuple[float, float]
    ill: tuple[float, float]
    admission: Admission = field(default_factory=lambda: Admission(LIMITS, tokens=["token-0"]))
    token: int = 0
    begun: dict[str, bytearray] = field(default_factory=dict)
    answered_at: dict[str, list[float]] = field(default_factory=dict)
    """When each job heard that a batch has begun."""

    def rotate(self) -> None:
        """A new token is issued, and the one before is refused."""
        self.token += 1
        self.admission.tokens = {f"token-{self.token}"}

    def answer(self, caller: Caller, items: list[dict[str, Any]] | None, asked: str) -> Answer | Reply | Fault:
        """Answer a request that has arrived now: a batch, or a question for one id."""
        now = self.now()
        if self.ill[0] <= now < self.ill[1]:
            if items and now < self.ill[0] + 2:  # it falls ill with the work done
                self._begin(items)
            return Fault(kind=FaultKind.IN_DOUBT, message="the connection broke")
        if self.ordered[0] <= now < self.ordered[1]:
            wait_s = round(self.ordered[1] - now + 0.5)
            return self.admission.throttled("requests", 971, "please wait", wait_s)
        refused = self.admission.admit(caller, TARGET, now, instances=len(items or ()), asks=items is None)
        if refused:
            return refused
        if items is not None:
            return created(self._begin(items))
        job, number = asked.split("-")
        return (
            Answer(200, b'{"success":true,"result":{"status":"running"}}') if self.begun[job][int(number)] else ABSENT
        )

    def _begin(self, items: list[dict[str, Any]]) -> list[str]:
        """Begin what has not; the ids of that."""
        new = []
        for item in items:
            job, text = item["instance_id"].split("-")
            if job not in self.begun:
                self.begun[job] = bytearray(self.rows)
            marks, number = self.begun[job], int(text)
            assert item["params"]["row"] == number, f"{item['instance_id']} has other params"
            if not marks[number]:
                marks[number] = 1
                new.append(item["instance_id"])
        return new


ABSENT = refusal(404, 10400, "instance.not_found")


@dataclass
class Session:
    """One session of a job, by the world's time and in the job's own words."""

    began_at: float
    skew_s: float
    ended_at: float = 0.0
    summary: Summary | None = None


@dataclass
class Job:
    """One of the two jobs: its list, its checkpoint, its way to the service, and its sessions so far."""

    name: str
    folder: Path
    account: Account
    seed: int
    sessions: list[Session] = field(default_factory=list)
    credential: int = 0

    def __post_init__(self) -> None:
        self.chance = Random(self.seed)
        self.rows, self.file = self.folder / f"{self.name}.jsonl", self.folder / f"{self.name}.bulkwf"
        with self.rows.open("wb") as file:
            for number in range(self.account.rows):
                file.write(b'{"instance_id":"%b-%d","params":{"row":%d}}\n' % (self.name.encode(), number, number))

    # --- its transport ---

    async def send(self, request: Request, slot: Slot) -> Reply | Fault:
        """See `Transport.send`."""
        if request.kind is RequestKind.CREATE:
            return await self._exchange(orjson.loads(request.body), "", slot.written)
        (asked,) = ids_of(request)
        return await self._exchange(None, asked, slot.written)

    async def _exchange(self, items: Any, asked: str, written: Callable[[], None]) -> Reply | Fault:
        account, credential, chance = self.account, self.credential, self.chance
        began = account.now()
        await asyncio.sleep(0.001)
        written()
        await asyncio.sleep(chance.uniform(0.040, 0.045))
        told = account.answer(Caller(f"Bearer token-{credential}"), items, asked)
        headers = account.admission.rate_headers(Caller(f"Bearer token-{credential}"), account.now())
        await asyncio.sleep(chance.uniform(0.05, 0.4))
        elapsed_s = account.now() - began
        if isinstance(told, Fault):
            return Fault(kind=told.kind, message=told.message, elapsed_s=elapsed_s)
        if told.status == 200 and items is not None:
            account.answered_at.setdefault(self.name, []).append(account.now())
        lowered = {name.lower(): value for name, value in {**headers, **told.headers}.items()}
        return Reply(
            status=told.status,
            headers=lowered,
            body=told.body,
            elapsed_s=elapsed_s,
            received_at=self.wall(),
            credential=credential,
        )

    async def refresh_credential(self, credential: int) -> bool:
        """See `Transport.refresh_credential`."""
        self.credential = self.account.token
        return self.credential != credential

    def drop_connections(self) -> None:
        """See `Transport.drop_connections`."""

    async def aclose(self) -> None:
        """See `Transport.aclose`."""

    # --- its sessions ---

    def wall(self) -> float:
        """The time of day by the clock of the machine that it runs on."""
        return EPOCH + self.account.now() + self.sessions[-1].skew_s

    async def play(self, cut_at: float, skew_s: float) -> None:
        """Run, be cut off at *cut_at*, and run to the end upon another machine."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + cut_at):
                await self._run(0.0)
        await asyncio.sleep(DOWN_S)
        await self._run(skew_s)

    async def _run(self, skew_s: float) -> None:
        account = self.account
        session = Session(account.now(), skew_s)
        self.sessions.append(session)
        loop = asyncio.get_running_loop()
        clock = Clock(
            now=lambda: loop.time() - session.began_at, wall=self.wall, sleep=asyncio.sleep, random=self.chance.random
        )
        opening = open_run(
            str(self.rows),
            target=RUN_TARGET,
            token=dict,
            checkpoint=self.file,
            options=OPTIONS,
            transport=self,
            limiter=WindowLimiter(OPTIONS.rate, clock=clock.now),
            clock=clock,
            executor=inline,
        )
        async with opening as run:
            try:
                await run.finish()
            finally:
                session.ended_at = account.now()
                session.summary = run.summary or run.progress.summary(
                    clock.now(), complete=False, fail_on_existed=OPTIONS.fail_on_existed
                )


async def play_night(rows: int, folder: Path) -> tuple[Account, list[Job]]:
    """Two jobs of so many rows each."""
    loop = asyncio.get_running_loop()
    began, long_s = loop.time(), rows / RATE
    silent, ill = 0.4 * long_s, 0.6 * long_s
    account = Account(
        lambda: loop.time() - began, rows, ordered=(silent, silent + SILENCE_S), ill=(ill, ill + OUTAGE_S)
    )
    jobs = [Job(name, folder, account, seed) for seed, name in enumerate(("a", "b"))]
    for turn in range(1, 14):
        loop.call_at(began + turn / 14 * long_s, account.rotate)
    async with asyncio.TaskGroup() as group:
        group.create_task(jobs[0].play(0.2 * long_s, skew_s=7 * 60.0))
        group.create_task(jobs[1].play(0.9 * long_s, skew_s=-8 * 60.0))
    return account, jobs


# --- the report ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """A time in which a job settled nothing, in virtual seconds, and why."""

    why: str
    began_at: float
    ended_at: float

    @property
    def long_s(self) -> float:
        """Its length."""
        return self.ended_at - self.began_at


def spans(job: Job) -> list[Span]:
    """What the job's checkpoint tells of the times in which nothing was settled."""
    with contextlib.closing(sqlite3.connect(job.file)) as db:
        query = "SELECT started_at, elapsed_s, verdict FROM attempt WHERE verdict <> 'interrupted' ORDER BY id"
        attempts = db.execute(query).fetchall()
    told: list[Span] = []
    met: set[str] = set()
    last = 0.0
    for number, session in enumerate(job.sessions):
        assert session.summary is not None
        share, attempts = attempts[: session.summary.attempts], attempts[session.summary.attempts :]
        for started_at, elapsed_s, verdict in share:
            at = started_at + elapsed_s - EPOCH - session.skew_s
            if verdict != "done":
                met.add(verdict)
                continue
            if at - last > LULL_S:
                stopped = number > 0 and last < session.began_at
                told.append(Span("stopped" if stopped else "/".join(sorted(met)) or "held back", last, at))
            last = at
            met.clear()
    assert not attempts, "attempts that no session has counted"
    return told


def lulls(times: list[float]) -> list[tuple[float, float]]:
    """Where a list of moments has gaps."""
    return [(a, b) for a, b in pairwise([0.0, *times]) if b - a > LULL_S]


def report(job: Job) -> str:
    """The morning's line for a job."""
    whole = job.sessions[-1].ended_at
    lost = spans(job)
    parts = [f"{timedelta(seconds=round(whole - sum(one.long_s for one in lost)))} of sending"]
    parts += [f"{timedelta(seconds=round(one.long_s))} {one.why}" for one in lost]
    return f"job {job.name}: {timedelta(seconds=round(whole))} = {' + '.join(parts)}"
