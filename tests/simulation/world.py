"""Plays a plan: sessions of real runs, opened as users open them, against one service."""

import asyncio
import heapq
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import canary
from fakes import EPOCH, HEADER, RUN_TARGET, TARGET, Machine, call, received

from bulkwf.attempt import Fault, Reply, Request
from bulkwf.checkpoint import inline, read_status
from bulkwf.emulator import Answer, Exchange, Limits, Outgoing, Service, Tampering, Target, parse_script
from bulkwf.emulator.answers import refusal
from bulkwf.emulator.batch import Item
from bulkwf.emulator.faults import NO_ENDING
from bulkwf.emulator.state import Creation
from bulkwf.errors import BulkwfError, ServiceRefused, TemporaryStop
from bulkwf.limits.limiter import WindowLimiter
from bulkwf.model import Summary
from bulkwf.run import open_run
from simulation.network import Network, Sent
from simulation.plan import TAKEN, Plan
from simulation.session import Crash, Session, SimulatedLoop, cancel_all, crash, unwind

MOST_SESSIONS = 1_000
CANCELLATIONS = 4


class SimulatedService(Service):
    """The emulator's service. It records what it creates, and its look-ups lag and fail as the plan says."""

    def __init__(self, plan: Plan, clock: Callable[[], float]) -> None:
        super().__init__(Limits.none(), clock, queued_s=plan.queued_s)
        self.plan = plan
        self.created_ids: dict[str, tuple[str | None, float]] = {}
        """Each instance created: the checksum of its params, and the time."""
        self.created_twice: list[str] = []

    def create(self, target: Target, items: Sequence[Item], tampering: Tampering | None = None) -> Creation:
        """See `Service.create`."""
        if refused := self._refused([item.id for item in items]):
            return Creation(refusal(400, 10002, refused))
        creation = super().create(target, items, tampering)
        for item in creation.created:
            if item.id in self.created_ids:
                self.created_twice.append(item.id)
            self.created_ids[item.id] = (item.crc, self.clock())
        return creation

    def get_instance(self, target: Target, id_: str, *, simple: bool = False) -> Answer:
        """See `Service.get_instance`."""
        plan, now = self.plan, self.clock()
        if now < plan.healthy_from and re.search(plan.unanswered, id_):
            return refusal(500, 10001, "internal error")
        if id_ in self.created_ids and now < self.created_ids[id_][1] + plan.lag_s:
            id_ = "nobody"
        return super().get_instance(target, id_, simple=simple)

    def _refused(self, ids: Sequence[str]) -> str:
        """Why a request with *ids* is refused; empty if it is not."""
        plan = self.plan
        bad = next((id_ for id_ in ids if re.search(plan.bad, id_)), "")
        if not bad and plan.bad_together and plan.bad_together <= {row_of(id_) for id_ in ids}:
            bad = ids[-1]
        if not bad or plan.refusals == "nameless":
            return bad and "the request is refused"
        return f"instance {bad if plan.refusals == 'named' else ids[0]!r} is refused"


@dataclass(repr=False)  # the run's clock refers to it, and its fields hold the rows
class World:
    """One seed's world."""

    plan: Plan
    folder: Path
    now: float = 0.0
    sent: list[Sent] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    watch: Callable[["World"], None] = lambda world: None
    """Called after each session."""

    def __post_init__(self) -> None:
        plan = self.plan
        self.chance = Random(plan.seed + 1)
        self.service = SimulatedService(plan, lambda: self.now)
        self.created = self.service.created_ids
        self.list = self.folder / "rows.jsonl"
        self.list.write_bytes(b"".join(row.line + b"\n" for row in plan.rows))
        self.file = self.folder / "run-0.bulkwf"
        self.exchange = Exchange(
            self.service, parse_script(plan.script), draw=self.chance.random, wall=lambda: EPOCH + self.now
        )
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self.stale: Reply | None = None
        """The newest reply to a batch on the connections that are open."""
        self.token = 0
        """The newest credential that a session was given; the next session begins with it."""
        self.shared = frozenset(row.id for row in plan.rows if row.kind == "twin")
        """Ids of more than one row."""
        self._loop: SimulatedLoop | None = None
        self.machine = Machine(self.monotonic)
        self.schedule(plan.healthy_from, self._end_faults)
        for row in plan.rows:
            if row.kind == TAKEN:
                body = b'[{"instance_id":"%b","params":{"other":1}}]' % (row.id or "").encode()
                self.service.create(TARGET, self.service.read(body).items)
        self.service.limits = self.service.admission.limits = plan.limits

    # --- time ---

    def schedule(self, delay_s: float, act: Callable[[], None]) -> None:
        """Let something happen later, also if the session has ended by then."""
        event = (self.now + delay_s, next(self._order), act)
        heapq.heappush(self._events, event)
        if self._loop is not None:
            self._arm(event)

    def _arm(self, event: tuple[float, int, Callable[[], None]]) -> None:
        at, _, _ = event
        assert self._loop is not None
        self._loop.call_at(1_000.0 + at, self._happen)

    def _happen(self) -> None:
        self._tick()
        while self._events and self._events[0][0] <= self.now + 1e-9:
            heapq.heappop(self._events)[2]()

    def _tick(self) -> None:
        if self._loop is not None:
            self.now = self._loop.time() - 1_000.0

    def let_pass(self, seconds: float) -> None:
        """Let time pass without a session."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            at, _, act = heapq.heappop(self._events)
            self.now = max(self.now, at)
            act()
        self.now = end

    @property
    def in_session(self) -> bool:
        """Whether a session runs now."""
        return self._loop is not None

    def monotonic(self) -> float:
        """The sessions' clock."""
        self._tick()
        return self.now

    # --- the service ---

    def _end_faults(self) -> None:
        self.service.limits = replace(self.service.limits, max_queued=None)

    def arrive(self, sent: Sent, request: Request, token: int, answered: "asyncio.Future[Reply | Fault]") -> None:
        """A request has reached the service, whether its sender still waits or not."""
        arrival = self.exchange.arrive(call(request, f"{canary.TOKEN}-{token}"))
        tampering = arrival.fault.tampering
        clean = arrival.fault.ending is NO_ENDING and not (tampering.also_named or tampering.repeated)

        def execute() -> None:
            free = {id_ for id_ in sent.ids if not self.service.holds(TARGET, id_)}
            outgoing = self.exchange.execute(arrival)
            if sent.method == "POST" and outgoing.own is not None and outgoing.own.status == 200:
                sent.created = tuple(item.id for item in outgoing.created)
                sent.withheld = tuple(id_ for id_ in sent.ids if id_ in free and id_ not in sent.created)
            if outgoing.manner != "hang":
                self.schedule(outgoing.delay_s + self.travel_s(), lambda: deliver(outgoing))

        def deliver(outgoing: Outgoing) -> None:
            if not answered.done() and answered.get_loop() is self._loop:
                reply = received(outgoing, EPOCH + self.now, self.machine.wall(), token)
                sent.clean = clean and isinstance(reply, Reply) and reply.status == 200
                answered.set_result(reply)

        if arrival.delay_s:
            self.schedule(arrival.delay_s, execute)
        else:
            execute()

    def travel_s(self) -> float:
        """Time on the way in one direction, in seconds."""
        return self.chance.uniform(*self.plan.travel_s)

    # --- sessions ---

    def play(self) -> None:
        """Run sessions until the run is complete."""
        ends = list(self.plan.ends)
        downtimes, steps = list(self.plan.downtimes_s), list(self.plan.clock_steps_s)
        while True:
            end = ends.pop(0) if ends else ("", 0)
            session = self._play_session(*end)
            self.watch(self)
            if session.summary is not None and session.summary.complete:
                return
            if isinstance(session.error, ServiceRefused):  # contradicting answers: a user would check and resume
                assert session.began_at < self.plan.healthy_from, f"stopped without faults: {session.error}"
            elif session.error is not None and not isinstance(session.error, TemporaryStop | Crash):
                return
            assert len(self.sessions) < MOST_SESSIONS, f"not complete after {MOST_SESSIONS} sessions"
            failing = session.error is not None and self.now < self.plan.healthy_from
            self.let_pass(60.0 if failing else downtimes.pop(0) if downtimes else 5.0)
            step_s = steps.pop(0) if steps else 0.0
            if step_s is None:
                self.machine.boot_anew()
            self.machine.set_s = 0.0 if step_s is None else self.machine.set_s + step_s

    def _play_session(self, end: str, turn: int) -> Session:
        session = Session(len(self.sessions), self.now, end)
        self.sessions.append(session)
        loop = self._loop = SimulatedLoop(self.now)
        for event in self._events:
            self._arm(event)
        try:
            session.summary = loop.run_until_complete(self._run(loop, session, end, turn))
        except BulkwfError as error:
            session.error, session.summary = error, error.summary
        except asyncio.CancelledError:
            pass
        except Crash as crash:
            session.error = crash
            self._leave_behind()
        finally:
            loop.at_turn.clear()
            session.turn = loop.turn
            self._tick()
            session.ended_at = self.now
            self._loop = None
            unwind(loop)
        return session

    def _leave_behind(self) -> None:
        """Copy the files of the checkpoint as they are now: the next session finds these."""
        crashed, self.file = self.file, self.folder / f"run-{len(self.sessions)}.bulkwf"
        for suffix in ("", "-wal"):
            if crashed.with_name(crashed.name + suffix).exists():
                shutil.copy(crashed.with_name(crashed.name + suffix), self.file.with_name(self.file.name + suffix))

    async def _run(self, loop: SimulatedLoop, session: Session, end: str, turn: int) -> Summary:
        plan, main = self.plan, asyncio.current_task()
        assert main is not None
        run_key = None if self.file.exists() else HEADER.run_key  # not by chance; a resumed run reads it from the file
        acts = {"cancel": main.cancel, "cancel all": lambda: cancel_all(loop, CANCELLATIONS), "crash": crash}
        if end in acts:  # also while the run opens
            loop.at_turn[loop.turn + turn] = acts[end]
        async with open_run(
            str(self.list),
            target=RUN_TARGET,
            token=dict,
            checkpoint=self.file,
            options=replace(plan.options, run_key=run_key),
            transport=Network(self, session.number),
            limiter=WindowLimiter(plan.options.rate, clock=loop.time),
            clock=self.machine.clock(plan.seed + session.number + 2),
            executor=self._execute,
            emit=session.emit,
        ) as run:
            session.paused_until = (read_status(self.file).pause_until or EPOCH) - EPOCH
            if end in ("drain", "abort"):
                loop.at_turn[loop.turn + turn] = run.drain if end == "drain" else run.abort
            return await run.finish()

    def _execute(self, function: Callable[[], Any]) -> "asyncio.Future[Any]":
        """The checkpoint's thread. Its futures are not tasks: cancelling all tasks does not cancel a commit.

        After a crash it continues on the original files: the next session has the copies.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop or not self.plan.commit_s:
            return inline(function)
        ended = loop.create_future()

        def act() -> None:
            done = inline(function)
            loop.call_later(self.plan.commit_s / 2, end, done)

        def end(done: "asyncio.Future[Any]") -> None:
            error = done.exception()
            ended.set_result(done.result()) if error is None else ended.set_exception(error)

        loop.call_later(self.plan.commit_s / 2, act)
        return ended


def row_of(id_: str) -> int | None:
    """The number of the row with this id; None if the id does not say."""
    found = re.fullmatch(r"id-(\d+)|.*-(\d+)-[0-9a-f]{8}", id_)
    return None if found is None else int(found[1] or found[2])
