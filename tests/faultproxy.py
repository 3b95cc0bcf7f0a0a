"""A TCP proxy that injects faults between the real engine and the real emulator.

A `Proxy` reads whole HTTP messages, so that a fault can be aimed at one request, at its answer, or at a byte of either.
Each request takes the next fault of a list, and none once the list is used up. A `Tunnel` forwards bytes that it can't
read, such as those of TLS, and cuts them.

A fault is a coroutine function of the `Link` whose next request has begun to arrive.
"""

import asyncio
import contextlib
import re
import socket
import ssl
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Literal
from urllib.parse import urlsplit

End = Literal["FIN", "RST"]
ENDS: tuple[End, ...] = ("FIN", "RST")
HOST = "127.0.0.1"
GONE = (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError)
"""What is raised once the other side has closed the connection."""
_LENGTH = re.compile(rb"(?<=\r\nContent-Length: )[0-9]+")


class Wire:
    """One end of a TCP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def head(self) -> bytes:
        """The next message, up to its body."""
        return await self._reader.readuntil(b"\r\n\r\n")

    async def body(self, head: bytes) -> bytes:
        """The body that *head* announces."""
        length = _LENGTH.search(head)
        return await self._reader.readexactly(int(length[0])) if length else b""

    async def some(self) -> bytes:
        """The next bytes; none at the end."""
        return await self._reader.read(65_536)

    async def silence(self) -> None:
        """Read until the other side closes the connection."""
        with contextlib.suppress(*GONE):
            while await self.some():
                pass

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def drip(self, data: bytes, size: int, every_s: float) -> None:
        """Send *data* in pieces."""
        for start in range(0, len(data), size):
            await self.send(data[start : start + size])
            await asyncio.sleep(every_s)

    def half_close(self) -> None:
        """Close the direction of writing alone."""
        self._writer.write_eof()

    def end(self, how: End = "FIN") -> None:
        """Close the connection, or reset it."""
        if how == "RST":
            # A linger time of zero makes the kernel send RST instead of FIN.
            linger = struct.pack("ii", 1, 0)
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._writer.transport.abort()
        self._writer.close()

    @property
    def ended(self) -> bool:
        return self._writer.is_closing()


class _Listener:
    """What proxies and tunnels share: a port, and connections that end with it."""

    def __init__(self, upstream: int) -> None:
        self.port = 0
        self.connections = 0
        self._upstream = upstream
        self._serving: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection. When one side closes it, the other side is closed too."""
        self.connections += 1
        task = asyncio.current_task()
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        wires = [Wire(reader, writer)]
        try:
            await self._serve(wires)
        except (*GONE, asyncio.CancelledError):
            pass
        finally:
            for wire in wires:
                wire.end()

    async def _serve(self, wires: list[Wire]) -> None:
        """Serve the client at `wires[0]`."""
        raise NotImplementedError

    async def connect(self, wires: list[Wire]) -> Wire:
        """Another connection to the service."""
        wires.append(Wire(*await asyncio.open_connection(HOST, self._upstream)))
        return wires[-1]

    async def quiet(self) -> None:
        """Wait until every connection has ended, and everything that was held up on it has been forwarded."""
        await asyncio.gather(*self._serving)

    async def stop(self) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)


# --- requests and answers -----------------------------------------------------------------------------------------


class Proxy(_Listener):
    """Forwards requests and answers, and applies the next of `faults` to each request."""

    def __init__(self, upstream: int, faults: Iterable["Fault"] = ()) -> None:
        super().__init__(upstream)
        self.faults = deque(faults)
        self.requests = 0
        """Number of requests whose headers have arrived."""
        self._answer = asyncio.get_running_loop().create_future()

    async def _serve(self, wires: list[Wire]) -> None:
        link = Link(self, wires)
        if self.faults and self.faults[0] in UNASKED:
            await self.faults.popleft()(link)
        while not link.client.ended:
            await link.arrival()
            await (self.faults.popleft() if self.faults else untouched)(link)

    def has_answered(self) -> None:
        self._answer.set_result(None)
        self._answer = asyncio.get_running_loop().create_future()

    @property
    def next_answer(self) -> asyncio.Future[None]:
        """Done when the service has sent its next answer."""
        return self._answer


class Link:
    """A client's connection, and the connection to the service that belongs to it."""

    def __init__(self, proxy: Proxy, wires: list[Wire]) -> None:
        self.proxy = proxy
        self.client = wires[0]
        self._wires = wires
        self._head = b""

    async def arrival(self) -> None:
        """Wait until the next request begins to arrive."""
        self._head = await self.client.head()
        self.proxy.requests += 1

    async def request(self) -> bytes:
        """The whole request."""
        return self._head + await self.client.body(self._head)

    async def server(self) -> Wire:
        return self._wires[1] if self._wires[1:] else await self.proxy.connect(self._wires)

    async def ask(self, request: bytes) -> bytes:
        """The service's answer to *request*."""
        server = await self.server()
        await server.send(request)
        return await self.answer()

    async def answer(self) -> bytes:
        server = await self.server()
        head = await server.head()
        whole = head + await server.body(head)
        self.proxy.has_answered()
        return whole

    async def exchange(self) -> bytes:
        """Forward the request that is arriving; the service's answer."""
        return await self.ask(await self.request())


Fault = Callable[[Link], Awaitable[None]]


async def untouched(link: Link) -> None:
    """No fault."""
    await link.client.send(await link.exchange())


# --- faults: the connection ---------------------------------------------------------------------------------------


async def reset_unasked(link: Link) -> None:
    """The connection is made, and reset before a byte has passed."""
    link.client.end("RST")


async def closed_unasked(link: Link) -> None:
    """The connection is made, and closed before a byte has passed."""
    link.client.end()


UNASKED = (reset_unasked, closed_unasked)
"""Faults that do not wait for a request."""


async def reset_in_request(link: Link) -> None:
    """A reset while the request is being written; the service gets nothing."""
    link.client.end("RST")


async def half_closed_to_service(link: Link) -> None:
    """The service gets the request, then the end of that direction of the connection."""
    server = await link.server()
    await server.send(await link.request())
    server.half_close()
    await link.client.send(await link.answer())


async def half_closed_to_client(link: Link) -> None:
    """The service acts on the request. In place of its answer, the direction to the client is closed."""
    await link.exchange()
    link.client.half_close()
    await link.client.silence()


def cut_request(at: int, how: End) -> Fault:
    """The service gets *at* bytes of the request; then both connections end."""

    async def fault(link: Link) -> None:
        request = await link.request()
        server = await link.server()
        await server.send(request[:at])
        server.end(how)
        link.client.end(how)

    return fault


def cut_answer(at: int, how: End) -> Fault:
    """The client gets *at* bytes of the answer; then its connection ends."""

    async def fault(link: Link) -> None:
        answer = await link.exchange()
        await link.client.send(answer[:at])
        link.client.end(how)

    return fault


# --- faults: time -------------------------------------------------------------------------------------------------


def delayed(request_s: float, answer_s: float) -> Fault:
    async def fault(link: Link) -> None:
        request = await link.request()
        await asyncio.sleep(request_s)
        answer = await link.ask(request)
        await asyncio.sleep(answer_s)
        await link.client.send(answer)

    return fault


def dripped(size: int, every_s: float) -> Fault:
    """Request and answer pass in small pieces."""

    async def fault(link: Link) -> None:
        request = await link.request()
        await (await link.server()).drip(request, size, every_s)
        await link.client.drip(await link.answer(), size, every_s)

    return fault


async def late_answer(link: Link) -> None:
    """The service acts on the request; its answer is sent when the client has given up."""
    answer = await link.exchange()
    await link.client.silence()
    await link.client.send(answer)


async def late_request(link: Link) -> None:
    """The client gives up; its request reaches the service after the answer to the next request."""
    request = await link.request()
    overtaken = link.proxy.next_answer
    await link.client.silence()
    await overtaken
    await link.ask(request)


async def twice(link: Link) -> None:
    """The answer is sent twice, at once."""
    await link.client.send(2 * await link.exchange())


async def again(link: Link) -> None:
    """Each request from the next one on gets the answer to the request before it."""
    await link.client.send(answer := await link.exchange())
    while True:
        await link.arrival()
        await link.client.send(answer)
        answer = await link.exchange()


async def in_place_of_the_next(link: Link) -> None:
    """The answer is sent again in place of the next one, whose request is lost."""
    answer = await link.exchange()
    await link.client.send(answer)
    await link.arrival()
    await link.client.send(answer)
    await link.request()


# --- faults: another answer ---------------------------------------------------------------------------------------


def answered_with(answer: bytes, *, end: bool = True, acts: bool = True) -> Fault:
    """These bytes are sent in place of the answer.

    `end`: the connection ends after them. `acts`: the service gets the request.
    """

    async def fault(link: Link) -> None:
        request = await link.request()
        if acts:
            await link.ask(request)
        await link.client.send(answer)
        if end:
            link.client.end()

    return fault


def endless(head: bytes, part: bytes) -> Fault:
    """The service acts on the request; *head* is sent in place of its answer, then *part* without end."""

    async def fault(link: Link) -> None:
        await link.exchange()
        await link.client.send(head)
        while True:
            await link.client.send(part)

    return fault


def altered(change: Callable[[bytes], bytes], *, end: bool = True) -> Fault:
    """The answer is changed. `end`: the connection ends after it."""

    async def fault(link: Link) -> None:
        await link.client.send(change(await link.exchange()))
        if end:
            link.client.end()

    return fault


def with_headers(*lines: bytes) -> Callable[[bytes], bytes]:
    """Adds header lines to an answer."""
    return lambda answer: answer.replace(b"\r\n", b"\r\n" + b"".join(line + b"\r\n" for line in lines), 1)


def with_longer_length(more: int) -> Callable[[bytes], bytes]:
    """Adds *more* to the value of an answer's Content-Length."""
    return lambda answer: _LENGTH.sub(lambda length: b"%d" % (int(length[0]) + more), answer, count=1)


def chunked(size: int) -> Callable[[bytes], bytes]:
    """Sends an answer in chunks, with a trailer."""

    def change(answer: bytes) -> bytes:
        head, body = answer.split(b"\r\n\r\n", 1)
        head = re.sub(rb"\r\nContent-Length: [0-9]+", b"\r\nTransfer-Encoding: chunked", head)
        parts = (body[start : start + size] for start in range(0, len(body), size))
        return head + b"\r\n\r\n" + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts) + b"0\r\nX-End: 1\r\n\r\n"

    return change


def without_length(answer: bytes) -> bytes:
    """An answer of HTTP/1.0, whose body ends with the connection."""
    return re.sub(rb"\r\nContent-Length: [0-9]+", b"", answer.replace(b"HTTP/1.1", b"HTTP/1.0", 1))


# --- bytes --------------------------------------------------------------------------------------------------------


ALERT = b"\x15\x03\x03\x00\x02\x02\x50"
"""TLS's fatal `internal_error`."""


class Tunnel(_Listener):
    """Forwards bytes; `cut` cuts the next connection after a number of bytes in one direction.

    The connection numbered `alert_at` (from 1) is answered with a TLS alert instead, as an overloaded edge does.
    """

    def __init__(self, upstream: int) -> None:
        super().__init__(upstream)
        self.cut: tuple[Literal["up", "down"], int, End] | None = None
        self.alert_at = 0
        self.passed = {"up": 0, "down": 0}
        """Number of bytes forwarded in each direction."""

    async def _serve(self, wires: list[Wire]) -> None:
        if self.connections == self.alert_at:
            await wires[0].some()
            await wires[0].send(ALERT)
            return
        client, server = wires[0], await self.connect(wires)
        cut, self.cut = self.cut, None
        pumps = (self._pump("up", client, server, cut), self._pump("down", server, client, cut))
        done, pending = await asyncio.wait(map(asyncio.ensure_future, pumps), return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*done, *pending, return_exceptions=True)

    async def _pump(self, direction, source: Wire, sink: Wire, cut) -> None:
        left = cut[1] if cut and cut[0] == direction else None
        while left != 0 and (data := await source.some()):
            data = data[:left]
            await sink.send(data)
            self.passed[direction] += len(data)
            left = None if left is None else left - len(data)
        if left == 0:
            source.end(cut[2])
            sink.end(cut[2])


# --- a port -------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def listening(
    kind: Callable[[int], Proxy | Tunnel], service: str | int, *, tls: ssl.SSLContext | None = None, port: int = 0
) -> AsyncIterator[Proxy | Tunnel]:
    """A proxy or a tunnel to a base URL or port. `port`: 0 takes a free one; `tls`: of the side of the client."""
    upstream = urlsplit(service).port if isinstance(service, str) else service
    listener = kind(upstream)
    server = await asyncio.start_server(listener.serve, HOST, port, ssl=tls)
    listener.port = server.sockets[0].getsockname()[1]
    try:
        yield listener
    finally:
        server.close()
        await listener.stop()
