"""Serves the emulator on a socket, with aiohttp.web. The `Exchange` decides what is sent and when.

A request has arrived when its body has been read completely. At that moment it is counted, for the limits and for the
fault script. Its instances are created and logged in one step, without an await.
"""

import asyncio
import math
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

from aiohttp import web

from bulkwf.emulator.admission import Caller
from bulkwf.emulator.answers import Answer
from bulkwf.emulator.exchange import Arrival, Call, Exchange, Outgoing
from bulkwf.emulator.faults import Rule, parse_script
from bulkwf.emulator.log import CreationLog
from bulkwf.emulator.state import Service

FaultScript = str | bytes | Sequence[Rule | Mapping[str, object]]

_PREFIX = "/client/v4"
_STOP_TIMEOUT_S = 1.0
_SECOND_ANSWER_AFTER_S = 0.02


class _GoneError(ConnectionError):
    """The connection is closed, or must be closed without an answer."""


class Emulator:
    """A running emulator; `emulate` makes one."""

    def __init__(self, service: Service, rules: Sequence[Rule], seed: int, log: CreationLog | None) -> None:
        self.service = service
        self.base_url = ""
        """The base URL that clients use in place of https://api.cloudflare.com/client/v4."""

        draw = random.Random(seed).random  # noqa: S311 (chance is to be repeatable, not secret)
        self._exchange = Exchange(service, rules, draw=draw, wall=time.time)
        self._log = log
        self._stopping = asyncio.Event()

    @property
    def fired(self) -> Sequence[int]:
        """Number of requests to which each rule of the fault script has applied, in the order of the rules."""
        return self._exchange.fired

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve one request."""
        try:
            body = await _read(request, self.service.limits.max_body_bytes)
            arrival = self._exchange.arrive(_call(request, body))
            await self._pause(arrival.delay_s)
            outgoing = self._execute(arrival)
            await self._pause(outgoing.delay_s)
            response = await self._send(request, outgoing)
        except (ConnectionError, web.RequestPayloadError):
            _abort(request)
            return web.Response()  # aiohttp requires one; it is not written, since the connection is closed
        if outgoing.disconnects:
            response.force_close()
        return response

    def stop(self) -> None:
        """End all waits. Waiting requests lose their connection; those that were not executed yet create nothing."""
        self._stopping.set()

    def _execute(self, arrival: Arrival) -> Outgoing:
        outgoing = self._exchange.execute(arrival)
        if self._log and arrival.route and outgoing.created:
            self._log.append(arrival.number, self.service.clock(), arrival.route.target, outgoing.created)
        return outgoing

    async def _pause(self, seconds: float) -> None:
        """Wait *seconds*. If the emulator is stopped meanwhile, the wait and the request end."""
        if seconds <= 0:
            return
        try:
            await asyncio.wait_for(self._stopping.wait(), None if seconds == math.inf else seconds)
        except TimeoutError:
            return
        raise _GoneError

    async def _send(self, request: web.BaseRequest, outgoing: Outgoing) -> web.StreamResponse:
        if outgoing.manner == "hang":
            await self._pause(math.inf)
        if outgoing.answer is None:
            _end_connection(request, outgoing)
            raise _GoneError
        response = _response(outgoing.answer)
        if outgoing.manner == "truncate":
            return await _send_cut(request, response, outgoing.data)
        if outgoing.manner == "twice":
            _transport(request).write(_verbatim(response, outgoing.answer.body))
            await self._pause(_SECOND_ANSWER_AFTER_S)
        return response


def _call(request: web.BaseRequest, body: bytes) -> Call:
    caller = Caller(request.headers.get("Authorization"), request.headers.get("X-Auth-Key"))
    path = request.path.removeprefix(_PREFIX) if request.path.startswith(_PREFIX) else ""
    return Call(request.method, path, caller, request.query, body)


async def _read(request: web.BaseRequest, max_bytes: int) -> bytes:
    """The body. If it is longer than *max_bytes*, only its beginning, slightly longer than *max_bytes*."""
    parts: list[bytes] = []
    size = 0
    async for part in request.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            break
    return b"".join(parts)


def _response(answer: Answer) -> web.Response:
    usual = {"Content-Type": "application/json", "CF-Ray": f"{time.time_ns():016x}-EMU"}
    return web.Response(status=answer.status, body=answer.body, headers={**usual, **answer.headers})


def _verbatim(response: web.Response, body: bytes) -> bytes:
    named = {**response.headers, "Content-Length": len(body)}
    headers = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"HTTP/1.1 {response.status} {response.reason}\r\n{headers}\r\n".encode() + body


async def _send_cut(request: web.BaseRequest, whole: web.Response, part: bytes) -> web.StreamResponse:
    """Send headers that announce the whole body, then only a part of the body, and close the connection."""
    response = web.StreamResponse(status=whole.status, headers=whole.headers)
    response.content_length = whole.content_length
    await response.prepare(request)
    await response.write(part)
    _transport(request).close()
    return response


def _end_connection(request: web.BaseRequest, outgoing: Outgoing) -> None:
    transport = _transport(request)
    if outgoing.manner == "reset":
        # A linger time of zero makes the kernel send RST instead of FIN.
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
        return
    if outgoing.manner == "raw":
        transport.write(outgoing.data)
    transport.close()


def _transport(request: web.BaseRequest) -> asyncio.Transport:
    if request.transport is None:
        raise _GoneError
    return request.transport


def _abort(request: web.BaseRequest) -> None:
    """Close the connection. Data that was written to it before is still sent."""
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

    `faults`: a fault script, as in `faults.py`; `seed` makes its chances repeatable. `port`: 0 takes a free one. `log`:
    a file to which every created instance is appended; `read_log` reads it. The service keeps its instances after the
    block, and can be served again. Raises `FaultScriptError`, and OSError if the address or the file can't be used.
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
    """Serve until cancelled. `started` is called once, with the base URL, when the server listens."""
    async with emulate(service, faults=faults, seed=seed, host=host, port=port, log=log) as emulator:
        started(emulator.base_url)
        await asyncio.Event().wait()
