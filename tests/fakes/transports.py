"""Transports without a network: one answers from a list, one plays the emulator's rules. Both record the requests."""

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from email.utils import formatdate
from typing import Any
from urllib.parse import unquote

import orjson

from bulkwf.attempt import Fault, FaultKind, Reply, Request, RequestKind, Slot
from bulkwf.emulator import Call, Caller, Exchange, Limits, Outgoing, Service, Target, parse_script
from fakes.replies import fault
from fakes.virtual_time import now, wall


@dataclass
class Leave:
    """A slot without a limiter. `on_written` is called when the body is written."""

    on_written: Callable[..., None] = lambda at=None: None
    lost: bool = False
    timed: bool = True

    def writing(self) -> bool:
        """See `Slot.writing`."""
        return not self.lost

    def written(self, at: float | None = None) -> None:
        """See `Slot.written`."""
        self.on_written(at)


TARGET = Target("acct", "resize")
METHODS = {RequestKind.CREATE: "POST", RequestKind.LOOK_UP: "GET", RequestKind.LIST: "LIST"}


def ids_of(request: Request) -> list[str]:
    """The ids that a request names."""
    if request.kind is RequestKind.CREATE:
        return [item["instance_id"] for item in orjson.loads(request.body or b"[]")]
    return [unquote(request.path.rpartition("/")[2])] if request.kind is RequestKind.LOOK_UP else []


def call(request: Request, token: str) -> Call:
    """A client's request, as the emulator takes it."""
    return Call(request.method, unquote(request.path), Caller(f"Bearer {token}"), request.query, request.body or b"")


def received(outgoing: Outgoing, sent_at: float, received_at: float, credential: int) -> Reply | Fault:
    """What a transport makes of what the emulator sends; of nothing at all ("hang"), after its timeout.

    `sent_at`, `received_at`: Unix time by the clocks of the service and of the client, in seconds.
    """
    if outgoing.answer is None or outgoing.manner == "truncate":
        return fault(message=f"a scripted {outgoing.manner}")
    own_headers = {name.lower(): value for name, value in outgoing.answer.headers.items()}
    return Reply(
        status=outgoing.answer.status,
        headers={"date": formatdate(sent_at, usegmt=True)} | own_headers,
        body=outgoing.answer.body,
        received_at=received_at,
        credential=credential,
    )


@dataclass(slots=True)
class Sent:
    """One request to a transport."""

    at: float
    method: str
    """POST, GET (one instance), or LIST (a GET of a page of instances)."""
    ids: list[str]
    query: Mapping[str, str] | None = None
    """Of a LIST."""
    written_at: float | None = None
    ended_at: float | None = None
    reply: Reply | Fault | None = None
    fresh: bool = False
    """It was sent over a connection of its own."""


class _Recorder:
    """Keeps the requests, and checks that no row is in two requests at the same time."""

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
            return fault(FaultKind.NOT_SENT, "the lease was lost")
        sent = Sent(now(), METHODS[request.kind], ids, query, fresh=request.fresh)
        return await self._record(sent, request, slot.written)

    async def _record(self, sent: Sent, request: Request, written: Callable[[], None]) -> Reply | Fault:
        twice = self.on_wire.intersection(sent.ids)
        assert not twice, f"in two requests at the same time: {sorted(twice)}"
        assert len(set(sent.ids)) == len(sent.ids)
        self.requests.append(sent)
        self.on_wire.update(sent.ids)
        self.most_on_wire = max(self.most_on_wire, len([r for r in self.requests[-64:] if r.ended_at is None]))

        def note() -> None:
            sent.written_at = now()
            written()

        try:
            sent.reply = replace(await self._answer(sent, request, note), elapsed_s=now() - sent.at)
            return sent.reply
        finally:
            sent.ended_at = now()
            self.on_wire.difference_update(sent.ids)

    async def _answer(self, sent: Sent, request: Request, written: Callable[[], None]) -> Reply | Fault:
        raise NotImplementedError


class ScriptedTransport(_Recorder):
    """Answers from a list: replies, faults, or functions of the ids (of a LIST: of the query) that return one.

    `then`: the answer after the end of the list; without it, the end of the list is an error. `looked_up`: the same for
    look-ups alone.
    """

    def __init__(self, *answers, then=None, looked_up=None, latency_s: float = 0.0) -> None:
        super().__init__()
        self.answers = list(answers)
        self.then = then
        self.looked_up = looked_up
        self.latency_s = latency_s

    async def _answer(self, sent, request, written):
        then = self.looked_up if sent.method == "GET" and self.looked_up is not None else self.then
        assert self.answers or then is not None, f"a request too many: {sent}"
        answer = self.answers.pop(0) if self.answers else then
        if callable(answer):
            answer = answer(sent.ids if sent.query is None else sent.query)
        if not (isinstance(answer, Fault) and answer.kind is FaultKind.NOT_SENT):
            written()
        await asyncio.sleep(self.latency_s)
        return answer


class ServiceTransport(_Recorder):
    """The emulator without a network, on the virtual clock.

    A request that has been written is executed, even if its sender is cancelled or gives up meanwhile.

    Args:
        service: The service; it outlives the transport.
        script: A fault script, see `bulkwf.emulator.faults`.
        seed: Fixes the script's chances and the latencies.
        travel_s: Time to write a request, and time on the way in each direction: (lo, hi), in seconds.
        timeout_s: How long the client waits for an answer, in seconds.
        before: Called with the number of each request. A fault that it returns happens before the request is sent.
        tokens: The credentials, in the order of their use.
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
        self.travel_s = travel_s
        self.timeout_s = timeout_s
        self.before = before or (lambda number: None)
        self.tokens = tokens
        self.credential = 0
        self._random = random.Random(seed)
        self.exchange = Exchange(service, parse_script(script), draw=self._random.random, wall=wall)
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

    async def _answer(self, sent, request, written):
        met = self.before(len(self.requests))
        if met is not None:
            await asyncio.sleep(self._travel())
            return met
        await asyncio.sleep(self._travel())
        written()
        serving = asyncio.ensure_future(self._serve(request, self.credential))
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)
        try:
            async with asyncio.timeout(self.timeout_s):  # `wait_for` swallows a cancellation that comes with the reply
                return await asyncio.shield(serving)
        except TimeoutError:
            return fault(message="no answer in time")

    async def _serve(self, request: Request, credential: int) -> Reply | Fault:
        await asyncio.sleep(self._travel())
        arrival = self.exchange.arrive(call(request, self.tokens[credential]))
        await asyncio.sleep(arrival.delay_s)
        outgoing = self.exchange.execute(arrival)
        await asyncio.sleep(outgoing.delay_s + self._travel())
        if outgoing.manner == "hang":
            await asyncio.sleep(self.timeout_s)
        return received(outgoing, wall(), wall(), credential)


def service(limits: Limits | None = None, **more: Any) -> Service:
    """An emulator's service on the virtual clock; without *limits* it has none."""
    return Service(limits or Limits.none(), now, **more)
