"""The emulator on a socket: aiohttp.web over the service's rules and the scripted faults.

A request has arrived when its body has been read completely: at that moment it is counted, against the limits and
for the fault script. What it creates is created, and logged, in one step without an await.
"""

import asyncio
import math
import random
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aiohttp import web

from bulkwf.emulator import answers
from bulkwf.emulator.admission import Caller, Target
from bulkwf.emulator.answers import Answer, refusal
from bulkwf.emulator.faults import NO_FAULT, Ending, Facts, Fault, Rule, decide, parse_script
from bulkwf.emulator.log import CreationLog
from bulkwf.emulator.state import Reading, Service

FaultScript = str | bytes | Sequence[Rule | Mapping[str, object]]

_PREFIX = "/client/v4"
_PATH = re.compile(
    _PREFIX + r"/accounts/(?P<account>[^/]+)/workflows/(?P<workflow>[^/]+)"
    r"(?P<below>/instances(?:/batch/delete|/(?P<id>[^/]+))?)?"
)
_Kind = Literal["create", "create_one", "list", "get", "counts", "delete", "delete_batch"]
_POSTS: Mapping[str, _Kind] = {
    "/instances": "create_one",
    "/instances/batch": "create",
    "/instances/batch/delete": "delete_batch",
}
_OF_AN_INSTANCE: Mapping[str, _Kind] = {"GET": "get", "DELETE": "delete"}
_STOP_TIMEOUT_S = 1.0
_SECOND_ANSWER_AFTER_S = 0.02
_NO_BATCH = Reading((), 0)


@dataclass(frozen=True, slots=True)
class _Place:
    """What a request is about."""

    kind: _Kind
    target: Target
    id: str = ""


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A request that has arrived, and what was decided about it at that moment."""

    number: int
    caller: Caller
    place: _Place | None
    query: Mapping[str, str]
    body: bytes
    reading: Reading
    fault: Fault
    refusal: Answer | None


class _GoneError(ConnectionError):
    """There is nobody to answer any more."""


class Emulator:
    """A running emulator; `emulate` makes one."""

    def __init__(self, service: Service, rules: Sequence[Rule], seed: int, log: CreationLog | None) -> None:
        self.service = service
        self.base_url = ""
        """What a client is given in place of https://api.cloudflare.com/client/v4."""
        self.fired = [0] * len(rules)
        """How often each rule of the fault script has applied."""

        self._rules = rules
        self._draw = random.Random(seed).random  # noqa: S311 (chance is to be repeatable, not secret)
        self._log = log
        self._started_at = service.clock()
        self._numbers: dict[str, int] = {"": 0}
        self._stopping = asyncio.Event()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve one request."""
        try:
            body = await _read(request, self.service.limits.max_body_bytes)
            arrival = self._arrive(request, body)
            await self._pause(arrival.fault.latency_before_s)
            answer = self._perform(arrival)
            await self._pause(arrival.fault.latency_after_s)
            response = await self._send(request, arrival, answer)
        except (ConnectionError, web.RequestPayloadError):
            _abort(request)
            return web.Response()  # aiohttp wants one, and notices that there is no connection to write it to
        if arrival.fault.disconnects:
            response.force_close()
        return response

    def stop(self) -> None:
        """Let nothing wait any longer: hanging requests lose their connection, delayed ones create nothing."""
        self._stopping.set()

    def _arrive(self, request: web.BaseRequest, body: bytes) -> _Arrival:
        place = _find_place(request.method, request.path)
        caller = Caller(request.headers.get("Authorization"), request.headers.get("X-Auth-Key"))
        reading = _NO_BATCH
        if place is not None and place.kind == "create":
            reading = self.service.read(body)
        elif place is not None and place.kind == "create_one":
            reading = self.service.read_one(body)
        number = self._count("")
        fault = self._decide(request.method, number, reading)
        if fault.revokes_token:
            self.service.revoke(caller)
        if place is None:
            refused: Answer | None = refusal(404, answers.NO_ROUTE, f"Could not route to {request.path}")
        else:
            refused = self.service.admit(caller, place.target, reading.attempted, asks=request.method == "GET")
        return _Arrival(number, caller, place, request.query, body, reading, fault, refused)

    def _count(self, method: str) -> int:
        self._numbers[method] = self._numbers.get(method, 0) + 1
        return self._numbers[method]

    def _decide(self, method: str, number: int, reading: Reading) -> Fault:
        number_of_method = self._count(method)
        if not self._rules:
            return NO_FAULT
        elapsed_s = self.service.clock() - self._started_at
        ids = [item.id for item in reading.items]
        facts = Facts(method, number, number_of_method, elapsed_s, time.time(), ids)
        fault = decide(self._rules, facts, self.fired, self._draw)
        for rule in fault.rules:
            self.fired[rule] += 1
        return fault

    def _perform(self, arrival: _Arrival) -> Answer:
        """Do what the request asks for, and return the service's own answer to it."""
        if arrival.refusal or arrival.place is None:
            return arrival.refusal or refusal(404, answers.NO_ROUTE, "Could not route")
        place, query = arrival.place, arrival.query
        if place.kind in ("create", "create_one"):
            return self._create(arrival, place)
        if place.kind == "get":
            return self.service.get_instance(place.target, place.id, simple=query.get("simple") == "true")
        if place.kind == "counts":
            return self.service.workflow_counts(place.target)
        if place.kind == "delete":
            return self.service.delete_instance(place.target, place.id)
        if place.kind == "delete_batch":
            return self.service.delete_batch(place.target, arrival.body)
        return self.service.list_instances(place.target, query)

    def _create(self, arrival: _Arrival, place: _Place) -> Answer:
        if arrival.reading.refusal:
            return arrival.reading.refusal
        if arrival.fault.refused_id:
            message = f"workflows.api.error.body: instance {arrival.fault.refused_id!r} is refused"
            return refusal(400, answers.BODY_REFUSED, message)
        create = self.service.create if place.kind == "create" else self.service.create_one
        creation = create(place.target, arrival.reading.items, arrival.fault.tampering)
        if self._log and creation.created:
            self._log.append(arrival.number, self.service.clock(), place.target, creation.created)
        return creation.answer

    async def _pause(self, seconds: float) -> None:
        """Wait; but a stop of the emulator ends the wait, and the request with it."""
        if seconds <= 0:
            return
        try:
            await asyncio.wait_for(self._stopping.wait(), None if seconds == math.inf else seconds)
        except TimeoutError:
            return
        raise _GoneError

    async def _send(self, request: web.BaseRequest, arrival: _Arrival, answer: Answer) -> web.StreamResponse:
        ray = {"CF-Ray": f"{time.time_ns():016x}-EMU"}
        own = _response(answer, {**ray, **self.service.rate_headers(arrival.caller)})
        ending = arrival.fault.ending
        if ending is None:
            return own
        if ending.reply is not None:
            return _response(ending.reply, ray)
        if ending.manner == "hang":
            await self._pause(math.inf)
        if ending.manner == "truncate":
            return await _send_cut(request, own, answer.body[: ending.at_byte])
        if ending.manner == "twice":
            _transport(request).write(_verbatim(own, answer.body))
            await self._pause(_SECOND_ANSWER_AFTER_S)
            return own
        _end_connection(request, ending)
        raise _GoneError


def _find_place(method: str, path: str) -> _Place | None:
    """Documented: the routes. Unknown; our choice: any other method or path is a 404 with code 7003."""
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    target = Target(match["account"], match["workflow"])
    if method == "POST":
        kind = _POSTS.get(match["below"])
        return None if kind is None else _Place(kind, target)
    if match["id"]:
        kind = _OF_AN_INSTANCE.get(method)
        return None if kind is None else _Place(kind, target, match["id"])
    if method != "GET" or match["below"] not in (None, "/instances"):
        return None
    return _Place("list" if match["below"] else "counts", target)


async def _read(request: web.BaseRequest, max_bytes: int) -> bytes:
    """The body; of one that is too long, enough to see that it is."""
    parts: list[bytes] = []
    size = 0
    async for part in request.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            break
    return b"".join(parts)


def _response(answer: Answer, headers: Mapping[str, str]) -> web.Response:
    usual = {"Content-Type": "application/json"}
    return web.Response(status=answer.status, body=answer.body, headers={**usual, **headers, **answer.headers})


def _verbatim(response: web.Response, body: bytes) -> bytes:
    named = {**response.headers, "Content-Length": len(body)}
    headers = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"HTTP/1.1 {response.status} {response.reason}\r\n{headers}\r\n".encode() + body


async def _send_cut(request: web.BaseRequest, whole: web.Response, part: bytes) -> web.StreamResponse:
    """Promise the whole body, send a part of it, and close the connection."""
    response = web.StreamResponse(status=whole.status, headers=whole.headers)
    response.content_length = whole.content_length
    await response.prepare(request)
    await response.write(part)
    _transport(request).close()
    return response


def _end_connection(request: web.BaseRequest, ending: Ending) -> None:
    transport = _transport(request)
    if ending.manner == "reset":
        # A linger time of zero makes the kernel send RST instead of FIN.
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
        return
    if ending.manner == "raw":
        transport.write(ending.raw)
    transport.close()


def _transport(request: web.BaseRequest) -> asyncio.Transport:
    if request.transport is None:
        raise _GoneError
    return request.transport


def _abort(request: web.BaseRequest) -> None:
    """Make sure that nothing more is said. What `raw` and `close` have written still goes out."""
    if request.transport is not None:
        request.transport.close()


@asynccontextmanager
async def emulate(
    service: Service,
    *,
    faults: FaultScript = (),
    seed: int = 0,
    host: str = "127.0.0.1",
    port: int = 0,
    log: str | Path | None = None,
) -> AsyncIterator[Emulator]:
    """Serve `service` on this machine, in this event loop, until the block ends.

    `faults`: a fault script, as in `faults.py`; `seed` fixes its chances. `port`: 0 takes a free one. `log`: a file
    to which what is really created is appended; `read_log` reads it. The service outlives the block: served again,
    it still holds its instances. Raises `FaultScriptError`, and OSError if the address or the file is not to be had.
    """
    rules = parse_script(faults)
    with CreationLog(log) if log is not None else nullcontext() as creation_log:
        emulator = Emulator(service, rules, seed, creation_log)
        runner = web.ServerRunner(web.Server(emulator.handle, access_log=None), shutdown_timeout=_STOP_TIMEOUT_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
            emulator.base_url = f"http://{_authority(host, runner.addresses[0][1])}{_PREFIX}"
            yield emulator
        finally:
            emulator.stop()
            await runner.cleanup()


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def serve(
    service: Service,
    *,
    started: Callable[[str], None],
    faults: FaultScript = (),
    seed: int = 0,
    host: str = "127.0.0.1",
    port: int = 0,
    log: str | Path | None = None,
) -> None:
    """Serve until cancelled. `started` is called once, with the base URL, when clients may come."""
    async with emulate(service, faults=faults, seed=seed, host=host, port=port, log=log) as emulator:
        started(emulator.base_url)
        await asyncio.Event().wait()
