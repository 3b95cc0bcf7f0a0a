"""Time that jumps, and a service without a network: what the tests of the asynchronous parts run on.

`run_virtual(coroutine)` runs a coroutine in an event loop whose clock jumps to the next timer as soon as nothing is
left to do: an hour of backoff takes no time, the outcome is the same every time, and a deadlock is found instead of
waited for. `ServiceTransport` plays the emulator's rules on that clock; `ScriptedTransport` answers from a list.
"""

import asyncio
import contextlib
import json
import os
import random
import selectors
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from zlib import crc32

import orjson

from bulkwf.attempt import Fault, FaultKind, InstanceInfo, Judgement, Reply, Request, RequestKind, Slot, Verdict
from bulkwf.batching.batch_state import BatchState
from bulkwf.batching.batcher import Batcher
from bulkwf.batching.ids import IdScheme
from bulkwf.batching.packer import Packer
from bulkwf.checkpoint import Begun, Checkpoint, RunHeader, inline
from bulkwf.checkpoint.records import checksum, seal_run
from bulkwf.clock import Clock
from bulkwf.emulator import Caller, Limits, Service, Target, parse_script
from bulkwf.emulator.answers import Answer, refusal
from bulkwf.emulator.faults import NO_FAULT, Facts, decide
from bulkwf.emulator.faults import Fault as Trouble
from bulkwf.errors import Draining
from bulkwf.limits.limiter import WindowLimiter
from bulkwf.model import Batch, Counts, Result, RowOutcome, Slice
from bulkwf.options import Options, RateLimits
from bulkwf.options import Target as RunTarget
from bulkwf.sources import open_source
from bulkwf.submission.activity import Activity
from bulkwf.submission.client import OutageTracker, ServiceClient
from bulkwf.submission.delivery import BatchDelivery, RunContext
from bulkwf.submission.journal import Journal
from bulkwf.submission.progress import Progress

EPOCH = 1_760_000_000.0
"""The time of day at which virtual time 0 is."""
TARGET = Target("acct", "resize")
RUN_TARGET = RunTarget(base_url="https://api.example/client/v4", account_id="acct", workflow="resize")
UNLIMITED = RateLimits(instances_per_s=None, requests_per_5m=None)


# --- virtual time -------------------------------------------------------------------------------------------------


class DeadlockError(Exception):
    """Nothing is ready, no timer is set: whatever is awaited can never come."""


class _Selector(selectors.SelectSelector):
    """Never waits; asks the loop to move its clock instead."""

    jump: Callable[[float | None], None]

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready and timeout != 0:
            self.jump(timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` jumps to the next timer. Threads' work is done at once, in the loop."""

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
        except Exception as error:  # noqa: BLE001 (it belongs to whoever awaits)
            done.set_exception(error)
        return done

    def _jump(self, timeout):
        if timeout is None or not self._scheduled:
            raise DeadlockError(f"nothing can ever happen again, at {self._now - 1_000:,.3f} s")
        self._now = VirtualLoop.latest = max(self._now, self._scheduled[0]._when)
        self._turns = 0
        if self._now > self._limit:
            raise DeadlockError("this would go on for ever")

    def _run_once(self):
        self._turns += 1
        if self._turns > 200_000:
            raise DeadlockError("the loop turns and turns, and time stands still")
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
    """Virtual seconds since the loop began; after its end, those that it had."""
    return VirtualLoop.latest - 1_000.0


def wall() -> float:
    """Virtual Unix time."""
    return EPOCH + now()


def clock(seed: int = 0) -> Clock:
    """The virtual clock as the engine takes it."""
    draw = random.Random(seed).random
    return Clock(now=asyncio.get_running_loop().time, wall=wall, sleep=asyncio.sleep, draw=draw)


@dataclass
class Machine:
    """A machine whose clock can be set to another time, and that can be booted anew.

    `now`: virtual seconds. `set_s`: how far its clock is ahead of the service's.
    """

    now: Callable[[], float] = now
    set_s: float = 0.0
    boots: int = 1
    booted_at: float = -1_000.0

    def wall(self) -> float:
        """Unix time by its clock."""
        return EPOCH + self.now() + self.set_s

    def uptime(self) -> float:
        """Seconds since it was booted."""
        return self.now() - self.booted_at

    def boot_anew(self) -> None:
        """Switch it off and on again."""
        self.boots += 1
        self.booted_at = self.now()

    def clock(self, seed: int = 0) -> Clock:
        """Its clock as the engine takes it."""
        return replace(clock(seed), wall=self.wall, boot_id=f"boot-{self.boots}", uptime=self.uptime)


# --- replies ------------------------------------------------------------------------------------------------------


def reply(status: int, body: Any = b"", credential: int = 0, **headers: str) -> Reply:
    """An answer with this status; a body that is not bytes is written as JSON."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Reply(status=status, headers=named, body=raw, received_at=wall(), credential=credential)


def envelope(result: Any, *errors: tuple[int, str]) -> dict[str, Any]:
    """The API's envelope."""
    listed = [{"code": code, "message": message} for code, message in errors]
    return {"success": not errors, "errors": listed, "messages": [], "result": result}


def created(ids: Iterable[str], status: str = "queued") -> Reply:
    """The answer that all of *ids* are created."""
    shared = {"status": status, "version_id": "v1", "workflow_id": "w1"}
    return reply(200, envelope([{"id": one, **shared} for one in ids]))


def found(ids: Iterable[str] = ()) -> Reply:
    """The answer to a look-up: it exists."""
    return reply(200, envelope({"status": "running"}))


def absent(ids: Iterable[str] = ()) -> Reply:
    """The answer to a look-up: there is no such instance."""
    return reply(404, envelope(None, (10400, "instance.not_found")))


def error(status: int, code: int = 10001, message: str = "it went wrong", **more: Any) -> Reply:
    """An answer that says no."""
    return reply(status, envelope(None, (code, message)), **more)


def fault(kind: FaultKind = FaultKind.IN_DOUBT, message: str = "the connection broke") -> Fault:
    """No answer."""
    return Fault(kind=kind, message=message)


@dataclass
class Leave:
    """A slot outside of any limiter. `on_written` is called when the body is written."""

    on_written: Callable[..., None] = lambda at=None: None
    lost: bool = False

    def writing(self) -> bool:
        """See `Slot.writing`."""
        return not self.lost

    def written(self, at: float | None = None) -> None:
        """See `Slot.written`."""
        self.on_written(at)


# --- transports ---------------------------------------------------------------------------------------------------


METHODS = {RequestKind.CREATE: "POST", RequestKind.LOOK_UP: "GET", RequestKind.LIST: "LIST"}


def ids_of(request: Request) -> list[str]:
    """The ids that a request names."""
    if request.kind is RequestKind.CREATE:
        return [item["instance_id"] for item in orjson.loads(request.body or b"[]")]
    return [unquote(request.path.rpartition("/")[2])] if request.kind is RequestKind.LOOK_UP else []


@dataclass(slots=True)
class Sent:
    """One request that a transport was given."""

    at: float
    method: str
    """POST, GET of one instance, or LIST: a GET of a page of them."""
    ids: list[str]
    query: Mapping[str, str] | None = None
    """Of a LIST."""
    written_at: float | None = None
    ended_at: float | None = None
    reply: Reply | Fault | None = None
    fresh: bool = False
    """Over a connection of its own."""


class _Recorder:
    """What both transports keep: the requests, and the rule that no row is on the wire twice at one time."""

    def __init__(self) -> None:
        self.requests: list[Sent] = []
        self.on_wire: set[str] = set()
        self.most_on_wire = 0
        self.dropped = 0
        self.refreshes: list[int] = []
        self.closed = False

    @property
    def posts(self) -> list[list[str]]:
        return [request.ids for request in self.requests if request.method == "POST"]

    @property
    def gets(self) -> list[str]:
        return [request.ids[0] for request in self.requests if request.method == "GET"]

    @property
    def queries(self) -> list[Mapping[str, str]]:
        return [request.query for request in self.requests if request.query is not None]

    def drop_connections(self) -> None:
        self.dropped += 1

    async def refresh_credential(self, credential: int) -> bool:
        self.refreshes.append(credential)
        return False

    async def aclose(self) -> None:
        self.closed = True

    async def send(self, request: Request, slot: Slot) -> Reply | Fault:
        ids, query = ids_of(request), request.query if request.kind is RequestKind.LIST else None
        if not slot.writing():
            return fault(FaultKind.NOT_SENT, "the leave to send was lost")
        sent = Sent(now(), METHODS[request.kind], ids, query, fresh=request.fresh)
        return await self._record(sent, request.body or b"", slot.written)

    async def _record(self, request: Sent, body: bytes, written: Callable[[], None]) -> Reply | Fault:
        twice = self.on_wire.intersection(request.ids)
        assert not twice, f"on the wire twice at one time: {sorted(twice)}"
        assert len(set(request.ids)) == len(request.ids)
        self.requests.append(request)
        self.on_wire.update(request.ids)
        self.most_on_wire = max(self.most_on_wire, len([r for r in self.requests[-64:] if r.ended_at is None]))

        def note() -> None:
            request.written_at = now()
            written()

        try:
            request.reply = replace(await self._answer(request, body, note), elapsed_s=now() - request.at)
            return request.reply
        finally:
            request.ended_at = now()
            self.on_wire.difference_update(request.ids)

    async def _answer(self, request: Sent, body: bytes, written: Callable[[], None]) -> Reply | Fault:
        raise NotImplementedError


class ScriptedTransport(_Recorder):
    """Answers from a list: replies, faults, or functions of the ids (of a LIST: of the query) that give one.

    The end of the list is an error.

    `then`: answers whatever the list does not.
    """

    def __init__(self, *answers, then=None, latency_s: float = 0.0) -> None:
        super().__init__()
        self.answers = list(answers)
        self.then = then
        self.latency_s = latency_s

    async def _answer(self, request, body, written):
        assert self.answers or self.then is not None, f"a request too many: {request}"
        answer = self.answers.pop(0) if self.answers else self.then
        if callable(answer):
            answer = answer(request.ids if request.query is None else request.query)
        if not (isinstance(answer, Fault) and answer.kind is FaultKind.NOT_SENT):
            written()
        await asyncio.sleep(self.latency_s)
        return answer


class ServiceTransport(_Recorder):
    """The emulator's service, reached without a network, on the virtual clock.

    A request that has been written arrives and is acted on, whatever becomes of who sent it: cancelled, timed out.

    Args:
        service: The service; it outlives the transport.
        script: A fault script, see `bulkwf.emulator.faults`; all of it but `twice`.
        seed: Fixes the script's chances and the latencies.
        travel_s: How long a request takes to be written, and then each way: (lo, hi).
        timeout_s: After so long the client hears no more.
        before: Given the number of each request; what it returns, if anything, is the fault met before sending.
        tokens: The credentials, one after another.
    """

    def __init__(
        self,
        service: Service,
        *,
        script=(),
        seed=0,
        travel_s=(0.001, 0.05),
        timeout_s=60.0,
        before=None,
        tokens=("t0",),
    ) -> None:
        super().__init__()
        self.service = service
        self.rules = parse_script(script)
        self.fired = [0] * len(self.rules)
        self.travel_s = travel_s
        self.timeout_s = timeout_s
        self.before = before or (lambda number: None)
        self.tokens = tokens
        self.credential = 0
        self._random = random.Random(seed)
        self._number = {"": 0, "GET": 0, "POST": 0}
        self._started_at = service.clock()
        self._serving: set[asyncio.Task[Any]] = set()

    async def refresh_credential(self, credential: int) -> bool:
        self.refreshes.append(credential)
        if credential != self.credential:
            return True
        if self.credential + 1 >= len(self.tokens):
            return False
        self.credential += 1
        return True

    def _travel(self) -> float:
        return self._random.uniform(*self.travel_s)

    async def _answer(self, request, body, written):
        met = self.before(len(self.requests))
        if met is not None:
            await asyncio.sleep(self._travel())
            return met
        await asyncio.sleep(self._travel())
        written()
        serving = asyncio.ensure_future(self._serve(request, body, self.credential))
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)
        try:
            async with asyncio.timeout(self.timeout_s):  # `wait_for` swallows a cancellation that comes with the answer
                return await asyncio.shield(serving)
        except TimeoutError:
            return fault(message="no answer in time")

    async def _serve(self, request: Sent, body: bytes, credential: int) -> Reply | Fault:
        await asyncio.sleep(self._travel())
        service, caller = self.service, Caller(f"Bearer {self.tokens[credential]}")
        reading = service.read(body) if request.method == "POST" else None
        trouble = self._trouble(request)
        if trouble.revokes_token:
            service.revoke(caller)
        attempted = reading.attempted if reading else 0
        answer = service.admit(caller, TARGET, attempted, asks=request.method != "POST")
        await asyncio.sleep(trouble.latency_before_s)
        answer = answer or self._act(request, reading, trouble)
        headers = service.rate_headers(caller)
        await asyncio.sleep(trouble.latency_after_s + self._travel())
        ending = trouble.ending
        if ending is None:
            return self._reply(answer, headers, credential)
        if ending.reply is not None:
            return self._reply(ending.reply, {}, credential)
        if ending.manner == "hang":
            await asyncio.sleep(self.timeout_s)
        return fault(message=f"a scripted {ending.manner}")

    def _act(self, request: Sent, reading: Any, trouble: Trouble) -> Answer:
        if request.query is not None:
            return self._page(request.query)
        if reading is None:
            return self._look_up(request.ids[0])
        if reading.refusal:
            return reading.refusal
        if trouble.refused_id:
            return refusal(400, 10002, f"instance {trouble.refused_id!r} is refused")
        return self.service.create(TARGET, reading.items, trouble.tampering).answer

    def _look_up(self, instance_id: str) -> Answer:
        return self.service.get_instance(TARGET, instance_id, simple=True)

    def _page(self, query: Mapping[str, str]) -> Answer:
        return self.service.list_instances(TARGET, query)

    def _trouble(self, request: Sent) -> Trouble:
        method = "GET" if request.method == "LIST" else request.method
        for name in ("", method):
            self._number[name] += 1
        if not self.rules:
            return NO_FAULT
        elapsed_s = self.service.clock() - self._started_at
        ids = request.ids if method == "POST" else ()
        facts = Facts(method, self._number[""], self._number[method], elapsed_s, wall(), ids)
        trouble = decide(self.rules, facts, self.fired, self._random.random)
        for rule in trouble.rules:
            self.fired[rule] += 1
        return trouble

    def _reply(self, answer: Answer, headers, credential: int) -> Reply:
        lowered = {name.lower(): value for name, value in {**headers, **answer.headers}.items()}
        return Reply(status=answer.status, headers=lowered, body=answer.body, received_at=wall(), credential=credential)


def memory_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory, where there is such a thing: for tests that are not about the disk."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)


def service(limits: Limits | None = None, **more: Any) -> Service:
    """An emulator's service on the virtual clock, without limits unless told."""
    return Service(limits or Limits.none(), now, **more)


# --- batches and deliveries ---------------------------------------------------------------------------------------


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
    """Deliveries of one run, and a note of all that they ask of its journal."""

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
        self.draw = at.draw
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
            random=lambda: self.draw(),  # noqa: PLW0108 (a test may put another draw in its place)
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
        """Deliver a batch, and return what is known of it."""
        state = state or BatchState(batch)
        counts = self.progress.counts
        settled = Counts(created=len(state.batch.ids) - len(state.pending))
        self.progress.counts = counts + settled + Counts(pending=len(state.pending))
        self.state = state
        await self.delivery(state, begun_at).deliver()
        return state

    def delivery(self, state: BatchState, begun_at: float | None = None) -> BatchDelivery:
        """A delivery of one more batch of the run."""
        return BatchDelivery(self.run, state, wall() if begun_at is None else begun_at)

    def stop(self) -> None:
        """Drain."""
        self.drained.set()
        self.limiter.stop()

    async def sleep(self, seconds: float) -> None:
        """Sleep, and note for how long; a drain ends it."""
        if seconds:
            self.sleeps.append(seconds)
        try:
            await asyncio.wait_for(self.drained.wait(), seconds)
        except TimeoutError:
            return
        raise Draining

    # --- the checkpoint of its journal ---

    async def record(self, attempt, *, settled, pause_until, now) -> None:
        """Note an attempt; a commit takes its time."""
        self.events.append(("attempted", attempt.instances, Verdict(attempt.verdict)))
        if pause_until is not None:
            self.pauses.append(round(pause_until - now, 5))
        await asyncio.sleep(0.003)
        self.events.append(("settled" if settled is not None else "recorded",))

    async def settle(self, state, now) -> None:
        """Note that results without an attempt of their own are stored."""
        await asyncio.sleep(0.003)
        self.events.append(("settled",))

    async def pause(self, until) -> None:
        """Note a pause that no answer has ordered."""
        self.pauses.append(round(until - wall(), 5))

    def note_interval(self, interval, started_at) -> None:
        """The timeline is tested elsewhere."""

    def _activity(self, committing) -> Activity:
        return Activity(paused_until=self.limiter.paused_until)


# --- runs that have been ------------------------------------------------------------------------------------------

HEADER = RunHeader(
    base_url="https://api.example/client/v4",
    account_id=TARGET.account,
    workflow=TARGET.workflow,
    run_key="key",
    id_scheme="generated",
    row_shape="instance",
    input="rows.jsonl",
    limits="{}",
)


async def write_run(
    path: Path,
    rows: int,
    *,
    others: Mapping[int, RowOutcome] | None = None,
    in_doubt: bool = False,
    data: bytes | None = None,
    finished: bool = True,
    at: float | None = None,
    header: RunHeader = HEADER,
) -> None:
    """So many more rows, in batches of 100, in the checkpoint of a run: created, but for the rows in `others`.

    `in_doubt`: earlier attempts may have created them. `data`: the rows themselves, of one batch.
    """
    at = wall() if at is None else at
    others = others or {}
    checkpoint = Checkpoint.open(path, header, now=at, executor=inline)
    try:
        first = sum(begun.rows for begun in checkpoint.begun())
        for start in range(first, first + rows, 100):
            ledger = BatchState(make_batch(min(100, first + rows - start), first_row=start, data=data))
            await checkpoint.begin(ledger, at)
            ledger.attempts += 1
            ledger.in_doubt = set(ledger.pending) if in_doubt else set()
            ledger.add(_settling(ledger.batch, others))
            await checkpoint.settle(ledger, at)
        if finished:
            await checkpoint.finish(at)
    finally:
        await checkpoint.aclose()


def reseal(path: Path) -> None:
    """Make the checksums of a checkpoint fit what it holds, as somebody who makes a file up would."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        fields = Begun._fields
        for found in db.execute(f"SELECT rowid, {', '.join(fields)} FROM batch").fetchall():
            rowid, values = found[0], dict(zip(fields, found[1:], strict=True))
            values["ids_crc"] = crc32(str(values["ids"]).encode("utf-8", "surrogatepass"))
            begun = [values[name] for name in ("first_row", "begun_at", "retention_s", "ids_crc")]
            settled = [values[name] for name in fields[: fields.index("settled_crc")]]
            crcs = (checksum(settled), values["ids_crc"], checksum(begun))
            db.execute(f"UPDATE batch SET settled_crc = ?, ids_crc = ?, begun_crc = ? WHERE rowid = {rowid}", crcs)
        seal_run(db)


def _settling(batch: Batch, others: Mapping[int, RowOutcome]) -> Judgement:
    rows = {position: batch.first_row + offset for position, offset in enumerate(batch.offsets)}
    told = [
        (position, Result(row=row, id=batch.ids[position], outcome=others[row]))
        for position, row in rows.items()
        if others.get(row, "pending") != "pending"
    ]
    return Judgement(
        verdict=Verdict.DONE,
        created=[position for position, row in rows.items() if row not in others],
        others=told,
        answer=InstanceInfo("queued", "v1", "w1"),
    )


def outcomes(ledger: BatchState) -> dict[str, str]:
    """What each id of a batch has come to."""
    ids = ledger.batch.ids
    return {
        **dict.fromkeys((ids[i] for i in ledger.created), "created"),
        **{ids[i]: result.outcome for i, result in ledger.others.items()},
        **dict.fromkeys((ids[i] for i in ledger.pending), "pending"),
    }


def count(values: Iterable[str]) -> dict[str, int]:
    """How many of each."""
    told: dict[str, int] = {}
    for value in values:
        told[value] = told.get(value, 0) + 1
    return told


def windows(events: Sequence[tuple[float, int]], period_s: float) -> int:
    """The most that any sliding window [t, t + period) has held of (time, amount): brute force."""
    worst = 0
    for i, (start, _) in enumerate(events):
        held = 0
        for at, amount in events[i:]:
            if at >= start + period_s:
                break
            held += amount
        worst = max(worst, held)
    return worst
