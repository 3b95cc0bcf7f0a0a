"""Plays a plan: sessions of real runs, opened as users open them, over a service that outlives them all."""

import asyncio
import gc
import heapq
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import canary
from fakes import EPOCH, HEADER, RUN_TARGET, TARGET, Machine, VirtualLoop, ids_of

from bulkwf.attempt import Fault, FaultKind, Reply, Request, RequestKind, Slot
from bulkwf.checkpoint import inline, read_status
from bulkwf.emulator import Caller, Limits, Service, parse_script
from bulkwf.emulator.answers import Answer, refusal
from bulkwf.emulator.faults import Facts, decide
from bulkwf.emulator.faults import Fault as Trouble
from bulkwf.errors import BulkwfError, ServiceRefused, TemporaryStop
from bulkwf.limits.limiter import WindowLimiter
from bulkwf.model import Result, Summary
from bulkwf.run import open_run
from simulation.plan import TAKEN, Plan

TIMEOUT_S = 60.0
MOST_SESSIONS = 400
CANCELLATIONS = 4


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
class Sent:
    """One request as the world saw it."""

    number: int
    session: int
    method: str
    ids: tuple[str, ...]
    at: float
    written_at: float | None = None
    created: tuple[str, ...] = ()
    """What really began because of it."""
    withheld: tuple[str, ...] = ()
    """What a fault kept from beginning, without a word."""
    told: Reply | Fault | None = None
    """What the session has heard; None if it heard nothing any more."""
    told_at: float | None = None
    clean: bool = False
    """It was the service's own, whole answer to this request."""
    stale: bool = False
    """It was a late copy of another answer."""
    fresh: bool = False
    """It went over a connection of its own."""


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


@dataclass(repr=False)  # the program's clock holds on to it, and it knows the rows
class World:
    """One seed's world."""

    plan: Plan
    folder: Path
    now: float = 0.0
    sent: list[Sent] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    created: dict[str, tuple[str | None, float]] = field(default_factory=dict)
    """Each instance that began: the checksum of its params, and when."""
    begun_twice: list[str] = field(default_factory=list)
    watch: Callable[["World"], None] = lambda world: None
    """Called between sessions, when the checkpoint is nobody's."""

    def __post_init__(self) -> None:
        plan = self.plan
        self.chance = Random(plan.seed + 1)
        self.service = Service(Limits.none(), lambda: self.now, queued_s=plan.queued_s)
        self.list = self.folder / "rows.jsonl"
        self.list.write_bytes(b"".join(row.line + b"\n" for row in plan.rows))
        self.file = self.folder / "run-0.bulkwf"
        self._rules = parse_script(plan.script)
        self._fired = [0] * len(self._rules)
        self._numbers = {"": 0, "GET": 0, "POST": 0}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._stale: Reply | None = None
        self.token = 0
        """The newest that a session has been given: the file that it is read from still holds it for the next one."""
        self.shared = frozenset(row.id for row in plan.rows if row.kind == "twin")
        """Ids that stand in several rows."""
        self._loop: SimulatedLoop | None = None
        self.machine = Machine(self.monotonic)
        self.schedule(plan.healthy_from, self._heal)
        items = [row for row in plan.rows if row.kind == TAKEN]
        for row in items:
            body = b'[{"instance_id":"%b","params":{"other":1}}]' % (row.id or "").encode()
            self._note_created(self.service.create(TARGET, self.service.read(body).items).created)
        self.service.limits = self.service.admission.limits = plan.limits

    # --- time ---

    def schedule(self, delay_s: float, act: Callable[[], None]) -> None:
        """Let something happen in the world; a session that dies does not stop it."""
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
        """Time in which no session runs."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            at, _, act = heapq.heappop(self._events)
            self.now = max(self.now, at)
            act()
        self.now = end

    def monotonic(self) -> float:
        """The sessions' clock."""
        self._tick()
        return self.now

    # --- the service ---

    def _heal(self) -> None:
        self.service.limits = replace(self.service.limits, max_queued=None)

    def arrive(self, sent: Sent, body: bytes, token: int, heard: "asyncio.Future[Reply | Fault]") -> None:
        """A request has reached the service, whatever has become of who sent it."""
        service, caller = self.service, Caller(f"Bearer {canary.TOKEN}-{token}")
        reading = service.read(body) if sent.method == "POST" else None
        trouble = self._trouble(sent)
        if trouble.revokes_token:
            service.revoke(caller)
        refused = service.admit(caller, TARGET, reading.attempted if reading else 0, asks=reading is None)

        def act() -> None:
            answer = refused or self._act(sent, reading, trouble)
            headers = service.rate_headers(caller)
            clean = trouble.ending is None and not (trouble.tampering.also_named or trouble.tampering.repeated)
            told = self._tell(answer, headers, token, trouble)
            if told is not None:
                self.schedule(trouble.latency_after_s + self._travel(), lambda: self._deliver(sent, heard, told, clean))

        if trouble.latency_before_s:
            self.schedule(trouble.latency_before_s, act)
        else:
            act()

    def _act(self, sent: Sent, reading: Any, trouble: Trouble) -> Answer:
        if reading is None:
            return self._look_up(sent.ids[0])
        if reading.refusal:
            return reading.refusal
        if trouble.refused_id:
            return refusal(400, 10002, self._reason(trouble.refused_id, sent.ids))
        if self.plan.bad_together and self.plan.bad_together <= {row_of(id_) for id_ in sent.ids}:
            return refusal(400, 10002, self._reason(sent.ids[-1], sent.ids))
        free = {id_ for id_ in sent.ids if not self.service.holds(TARGET, id_)}
        creation = self.service.create(TARGET, reading.items, trouble.tampering)
        sent.created = tuple(item.id for item in creation.created)
        if creation.answer.status == 200:
            sent.withheld = tuple(id_ for id_ in sent.ids if id_ in free and id_ not in sent.created)
        self._note_created(creation.created)
        return creation.answer

    def _reason(self, refused: str, ids: Sequence[str]) -> str:
        """What a refusal says: it names the row, or none, or another one."""
        if self.plan.refusals == "nameless":
            return "the request is refused"
        return f"instance {refused if self.plan.refusals == 'named' else ids[0]!r} is refused"

    def _look_up(self, id_: str) -> Answer:
        plan = self.plan
        if self.now < plan.healthy_from and re.search(plan.unanswered, id_):
            return refusal(500, 10001, "internal error")
        if id_ in self.created and self.now < self.created[id_][1] + plan.lag_s:
            id_ = "nobody"
        return self.service.get_instance(TARGET, id_, simple=True)

    def _note_created(self, items: Any) -> None:
        for item in items:
            if item.id in self.created:
                self.begun_twice.append(item.id)
            self.created[item.id] = (item.crc, self.now)

    def _trouble(self, sent: Sent) -> Trouble:
        method = sent.method
        for name in ("", method):
            self._numbers[name] += 1
        ids = sent.ids if method == "POST" else ()
        facts = Facts(method, self._numbers[""], self._numbers[method], self.now, EPOCH + self.now, ids)
        trouble = decide(self._rules, facts, self._fired, self.chance.random)
        for rule in trouble.rules:
            self._fired[rule] += 1
        return trouble

    def _tell(self, answer: Answer, headers: dict[str, str], token: int, trouble: Trouble) -> Reply | Fault | None:
        """What goes back; None if nothing ever does."""
        ending = trouble.ending
        if ending is not None and ending.reply is not None:
            answer, headers = ending.reply, {}
        elif ending is not None:
            text = f"a scripted {ending.manner}"
            return None if ending.manner == "hang" else Fault(kind=FaultKind.IN_DOUBT, message=text)
        lowered = {name.lower(): value for name, value in {**headers, **answer.headers}.items()}
        return Reply(
            status=answer.status, headers=lowered, body=answer.body, received_at=EPOCH + self.now, credential=token
        )

    def _deliver(self, sent: Sent, heard: "asyncio.Future[Reply | Fault]", told: Reply | Fault, clean: bool) -> None:
        if heard.done() or heard.get_loop() is not self._loop:
            return
        sent.clean = clean and isinstance(told, Reply) and told.status == 200
        heard.set_result(told)

    def _travel(self) -> float:
        return self.chance.uniform(*self.plan.travel_s)

    # --- sessions ---

    def play(self) -> None:
        """Session after session, until the run has come to its end."""
        ends = list(self.plan.ends)
        downtimes, steps = list(self.plan.downtimes_s), list(self.plan.clock_steps_s)
        while True:
            end = ends.pop(0) if ends else ("", 0)
            session = self._play_session(*end)
            self.watch(self)
            if session.summary is not None and session.summary.complete:
                return
            if isinstance(session.error, ServiceRefused):  # answers that contradict themselves: somebody looks after it
                assert session.began_at < self.plan.healthy_from, f"a healthy service was given up: {session.error}"
            elif session.error is not None and not isinstance(session.error, TemporaryStop | Crash):
                return
            assert len(self.sessions) < MOST_SESSIONS, "the run comes to no end"
            ill = session.error is not None and self.now < self.plan.healthy_from
            self.let_pass(60.0 if ill else downtimes.pop(0) if downtimes else 5.0)
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
            _unwind(loop)
        return session

    def _leave_behind(self) -> None:
        """What is on the disk at this moment is all that the next session finds."""
        crashed, self.file = self.file, self.folder / f"run-{len(self.sessions)}.bulkwf"
        for suffix in ("", "-wal"):
            if crashed.with_name(crashed.name + suffix).exists():
                shutil.copy(crashed.with_name(crashed.name + suffix), self.file.with_name(self.file.name + suffix))

    async def _run(self, loop: SimulatedLoop, session: Session, end: str, turn: int) -> Summary:
        plan, main = self.plan, asyncio.current_task()
        assert main is not None
        run_key = None if self.file.exists() else HEADER.run_key  # no chance; a resumed run has it from the file
        acts = {"cancel": main.cancel, "cancel all": lambda: _cancel_all(loop, CANCELLATIONS), "crash": _crash}
        if end in acts:  # while the run is being opened, too
            loop.at_turn[loop.turn + turn] = acts[end]
        async with open_run(
            str(self.list),
            target=RUN_TARGET,
            token=dict,
            checkpoint=self.file,
            options=replace(plan.options, run_key=run_key),
            transport=Network(self, session),
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
        """The checkpoint's thread. Its futures are no tasks: what cancels all tasks does not cancel a commit.

        After a crash it goes on, on the files that the crash has left behind: `_leave_behind` has copied them.
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


class Network:
    """One session's way to the service."""

    def __init__(self, world: World, session: Session) -> None:
        self._world = world
        self._session = session
        self._token = world.token
        self._on_wire: set[str] = set()

    async def send(self, request: Request, slot: Slot) -> Reply | Fault:
        """See `Transport.send`. A run never lists."""
        method = {RequestKind.CREATE: "POST", RequestKind.LOOK_UP: "GET"}[request.kind]
        if not slot.writing():
            return Fault(kind=FaultKind.NOT_SENT, message="the leave to send was lost")
        sent = Sent(
            number=len(self._world.sent),
            session=self._session.number,
            method=method,
            ids=tuple(ids_of(request)),
            at=self._world.monotonic(),
            fresh=request.fresh,
        )
        return await self._request(sent, request.body or b"", slot.written)

    async def _request(self, sent: Sent, body: bytes, written: Callable[[], None]) -> Any:
        world, ids = self._world, sent.ids
        if world._loop is None:
            raise asyncio.CancelledError
        world.sent.append(sent)
        twice = self._on_wire.intersection(ids) - world.shared
        assert not twice, f"on the wire twice at one time: {sorted(twice)}"
        self._on_wire.update(ids)
        try:
            told = await self._exchange(sent, body, written)
            sent.told_at = world.monotonic()
            sent.told = replace(told, elapsed_s=sent.told_at - sent.at)
            return sent.told
        finally:
            self._on_wire.difference_update(ids)

    async def _exchange(self, sent: Sent, body: bytes, written: Callable[[], None]) -> Reply | Fault:
        world, chance = self._world, self._world.chance
        ill = world.now < world.plan.healthy_from
        await asyncio.sleep(world._travel() / 4)
        if ill and chance.random() < world.plan.refused_connections:
            return Fault(kind=FaultKind.NOT_SENT, message="no connection to the service")
        if ill and chance.random() < world.plan.handshakes:
            return Fault(kind=FaultKind.HANDSHAKE, message="the TLS handshake failed")
        sent.written_at = world.monotonic()
        if sent.method == "GET":
            written()
            return await self._converse(sent, body, ill=ill)
        # That a body has left is known when it is acknowledged, or answered; it counts from when it left.
        loop = asyncio.get_running_loop()
        left = partial(written, loop.time())
        acknowledgement = loop.call_later(world._travel() / 4, left)
        try:
            told = await self._converse(sent, body, ill=ill)
            left()
            return told
        finally:
            acknowledgement.cancel()

    async def _converse(self, sent: Sent, body: bytes, *, ill: bool) -> Reply | Fault:
        """What the request comes to, once it is on its way."""
        world, chance = self._world, self._world.chance
        stale = world._stale
        if ill and stale is not None and not sent.fresh and chance.random() < world.plan.stale:
            await asyncio.sleep(world._travel())  # an idle connection hands over a late copy; nobody reads the request
            sent.stale = True
            if stale.status == 200:
                sent.withheld = tuple(id_ for id_ in sent.ids if id_ not in world.created)
            return stale
        heard: asyncio.Future[Reply | Fault] = asyncio.get_running_loop().create_future()
        token = self._token
        world.schedule(world._travel(), lambda: world.arrive(sent, body, token, heard))
        try:
            told = await asyncio.wait_for(heard, TIMEOUT_S)
        except TimeoutError:
            return Fault(kind=FaultKind.IN_DOUBT, message="no answer in time")
        if sent.method == "POST" and isinstance(told, Reply) and not sent.fresh:
            world._stale = told
        return told

    async def refresh_credential(self, credential: int) -> bool:
        """See `Transport.refresh_credential`."""
        if credential == self._token and self._token + 1 < self._world.plan.tokens:
            self._world.token = self._token = self._token + 1
            return True
        return credential != self._token

    def drop_connections(self) -> None:
        """See `Transport.drop_connections`."""
        self._world._stale = None

    async def aclose(self) -> None:
        """See `Transport.aclose`."""


def row_of(id_: str) -> int | None:
    """The number of the row that an id of this world's lists stands in; None if the id does not say."""
    found = re.fullmatch(r"id-(\d+)|.*-(\d+)-[0-9a-f]{8}", id_)
    return None if found is None else int(found[1] or found[2])


def params_crc(params: bytes) -> str | None:
    """The checksum by which the service names params."""
    return f"{zlib.crc32(params):08x}" if params else None


def _cancel_all(loop: SimulatedLoop, times: int) -> None:
    """Cancel every task, as `asyncio.run` does at its end; in all *times* turns in a row, while the session lasts."""
    for task in asyncio.all_tasks(loop):
        task.cancel()
    if times > 1:
        loop.at_turn[loop.turn + 1] = partial(_cancel_all, loop, times - 1)


def _crash() -> None:
    raise Crash


def _unwind(loop: asyncio.AbstractEventLoop) -> None:
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
