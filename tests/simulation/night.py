"""A long night: two jobs on one account and one workflow.

Their tokens rotate, the service asks for a pause, then it has an outage. Each job is interrupted once and resumes on a
machine with another clock. What the jobs report is compared with what the service has recorded.
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
"""Instances a second of each job; both together reach the limit of the workflow."""
OPTIONS = Options(rate=RateLimits(instances_per_s=RATE, requests_per_5m=500))
LIMITS = Limits(instances_per_s=2 * RATE)
PAUSE_S = 120.0
OUTAGE_S = 240.0
GAP_S = 15.0
"""Longer times in which nothing is settled are reported, in seconds."""
DOWN_S = 60.0
"""Time between the end of a job and its next start, in seconds."""


@dataclass
class Account:
    """The service: the emulator's admission, and a mark for each instance created.

    `pausing`, `failing`: when it asks for a pause, and when it has an outage, in virtual seconds.
    """

    now: Callable[[], float]
    rows: int
    pausing: tuple[float, float]
    failing: tuple[float, float]
    admission: Admission = field(default_factory=lambda: Admission(LIMITS, tokens=["token-0"]))
    token: int = 0
    created: dict[str, bytearray] = field(default_factory=dict)
    answered_at: dict[str, list[float]] = field(default_factory=dict)
    """When each job received an answer that a batch was created."""

    def rotate(self) -> None:
        """Issue a new token, and refuse the one before."""
        self.token += 1
        self.admission.tokens = {f"token-{self.token}"}

    def answer(self, caller: Caller, items: list[dict[str, Any]] | None, asked: str) -> Answer | Reply | Fault:
        """Answer a request that arrives now: a batch, or a look-up of one id."""
        now = self.now()
        if self.failing[0] <= now < self.failing[1]:
            if items and now < self.failing[0] + 2:  # the outage begins with answers lost after the execution
                self._create(items)
            return Fault(kind=FaultKind.IN_DOUBT, message="the connection broke")
        if self.pausing[0] <= now < self.pausing[1]:
            wait_s = round(self.pausing[1] - now + 0.5)
            return self.admission.throttled("requests", 971, "please wait", wait_s)
        refused = self.admission.admit(caller, TARGET, now, instances=len(items or ()), asks=items is None)
        if refused:
            return refused
        if items is not None:
            return created(self._create(items))
        job, number = asked.split("-")
        return (
            Answer(200, b'{"success":true,"result":{"status":"running"}}') if self.created[job][int(number)] else ABSENT
        )

    def _create(self, items: list[dict[str, Any]]) -> list[str]:
        """Create the instances whose ids are free; returns these ids."""
        new = []
        for item in items:
            job, text = item["instance_id"].split("-")
            if job not in self.created:
                self.created[job] = bytearray(self.rows)
            marks, number = self.created[job], int(text)
            assert item["params"]["row"] == number, f"{item['instance_id']} has other params"
            if not marks[number]:
                marks[number] = 1
                new.append(item["instance_id"])
        return new


ABSENT = refusal(404, 10400, "instance.not_found")


@dataclass
class Session:
    """One session of a job: its times by the service's clock, and its summary."""

    began_at: float
    skew_s: float
    ended_at: float = 0.0
    summary: Summary | None = None


@dataclass
class Job:
    """One of the two jobs: its list, its checkpoint, its transport, and its sessions so far."""

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
        answer = account.answer(Caller(f"Bearer token-{credential}"), items, asked)
        headers = account.admission.rate_headers(Caller(f"Bearer token-{credential}"), account.now())
        await asyncio.sleep(chance.uniform(0.05, 0.4))
        elapsed_s = account.now() - began
        if isinstance(answer, Fault):
            return Fault(kind=answer.kind, message=answer.message, elapsed_s=elapsed_s)
        if answer.status == 200 and items is not None:
            account.answered_at.setdefault(self.name, []).append(account.now())
        lowered = {name.lower(): value for name, value in {**headers, **answer.headers}.items()}
        return Reply(
            status=answer.status,
            headers=lowered,
            body=answer.body,
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
        """Unix time by the clock of its machine."""
        return EPOCH + self.account.now() + self.sessions[-1].skew_s

    async def play(self, cut_at: float, skew_s: float) -> None:
        """Run, be interrupted at *cut_at*, and run to the end on another machine."""
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
    """Play two jobs of *rows* rows each."""
    loop = asyncio.get_running_loop()
    began, long_s = loop.time(), rows / RATE
    pause_at, outage_at = 0.4 * long_s, 0.6 * long_s
    account = Account(
        lambda: loop.time() - began,
        rows,
        pausing=(pause_at, pause_at + PAUSE_S),
        failing=(outage_at, outage_at + OUTAGE_S),
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
    """A time in which a job settled nothing, in virtual seconds, and the reason."""

    why: str
    began_at: float
    ended_at: float

    @property
    def long_s(self) -> float:
        """Length in seconds."""
        return self.ended_at - self.began_at


def spans(job: Job) -> list[Span]:
    """The times in which nothing was settled, from the job's checkpoint."""
    with contextlib.closing(sqlite3.connect(job.file)) as db:
        query = "SELECT started_at, elapsed_s, verdict FROM attempt WHERE verdict <> 'interrupted' ORDER BY id"
        attempts = db.execute(query).fetchall()
    found: list[Span] = []
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
            if at - last > GAP_S:
                stopped = number > 0 and last < session.began_at
                found.append(Span("stopped" if stopped else "/".join(sorted(met)) or "held back", last, at))
            last = at
            met.clear()
    assert not attempts, "attempts that no session counts"
    return found


def gaps(times: list[float]) -> list[tuple[float, float]]:
    """The gaps of more than `GAP_S` in a list of times."""
    return [(a, b) for a, b in pairwise([0.0, *times]) if b - a > GAP_S]


def report(job: Job) -> str:
    """One line about a job."""
    whole = job.sessions[-1].ended_at
    lost = spans(job)
    parts = [f"{timedelta(seconds=round(whole - sum(one.long_s for one in lost)))} of sending"]
    parts += [f"{timedelta(seconds=round(one.long_s))} {one.why}" for one in lost]
    return f"job {job.name}: {timedelta(seconds=round(whole))} = {' + '.join(parts)}"
