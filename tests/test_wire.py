"""When a body has left this machine: decided on scripted counts in virtual time, and counted on real sockets."""

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
import time
from types import SimpleNamespace

import pytest
import uvloop
from certificates import make_certificate
from fakes import RUN_TARGET, UNLIMITED, Leave, now, run_virtual

from bulkwf.attempt import Reply
from bulkwf.options import Options, Target
from bulkwf.service.requests import create_batch
from bulkwf.transport import upload as wire
from bulkwf.transport.credentials import Credentials
from bulkwf.transport.http import AiohttpTransport
from bulkwf.transport.upload import LOOKS, SHORTEST_S, Upload, kernel_counts

# --- what the counts mean -----------------------------------------------------------------------------------------

SEGMENT = 1_000
RTT_S = 0.06
SIZE = 10_000
EARLIER = 700
"""Bytes of requests that have been answered."""


class Connection:
    """A transport and its socket: how many of the body's bytes are sent, and acknowledged, from each moment on."""

    def __init__(self, sent, acknowledged):
        self.script = (sent, acknowledged)
        self.closing_at = float("inf")

    def get_extra_info(self, name):
        return self

    def is_closing(self):
        return now() >= self.closing_at

    def count(self):
        reached = [max((size for at, size in one.items() if at <= now()), default=0) for one in self.script]
        sent, acknowledged = (EARLIER + size for size in reached)
        return wire._Counts(EARLIER, sent, acknowledged, SEGMENT, round(RTT_S * 1e6))


@pytest.fixture
def watched(monkeypatch):
    """Watches a body from 0 on; for each call of `written`, when it was called and with which moment."""
    monkeypatch.setattr(wire, "kernel_counts", lambda: True)
    monkeypatch.setattr(wire, "_count", Connection.count)

    def watch(connection, *, answered_s=None, closed_s=100.0):
        async def run():
            calls = []
            upload = Upload(connection, lambda at=None: calls.append((round(now(), 6), round(at, 6))), now)
            upload.follow(SIZE)
            if answered_s is not None:
                await asyncio.sleep(answered_s)
                upload.answered()
            else:
                await asyncio.sleep(closed_s)
                upload.close()
            await asyncio.sleep(100.0)
            return calls

        return run_virtual(run())

    return watch


def soon(moment):
    """A moment that is found by looking at intervals."""
    return pytest.approx(moment, abs=SHORTEST_S + moment / LOOKS)


def test_body_that_leaves_at_once_is_written_at_once(watched):
    assert watched(Connection({0: SIZE}, {0: SIZE})) == [(0, 0)]


def test_body_counts_from_its_last_sent_byte_where_no_queue_delays_it(watched):
    """The acknowledgement, one round trip later, does not change that."""
    [(at, left_at)] = watched(Connection({0.0: 4_000, 0.4: SIZE}, {0.3: 8_000, 0.4 + RTT_S: SIZE}))

    assert (at, left_at) == (soon(0.4), soon(0.4))
    [(at, left_at)] = watched(Connection({0.0: 4_000, 0.4: SIZE}, {0.3: 7_999, 0.4 + RTT_S: SIZE}))
    assert (at, left_at) == (soon(0.46), soon(0.4))


def test_queued_body_counts_from_one_round_trip_before_its_acknowledgement(watched):
    [(at, left_at)] = watched(Connection({0.0: SIZE}, {0.1: 1_000, 0.5: SIZE}))

    assert (at, left_at) == (soon(0.5), soon(0.5 - RTT_S))


def test_acknowledgement_that_may_be_delayed_is_not_waited_for(watched):
    [(at, left_at)] = watched(Connection({0.0: SIZE}, {0.1: SIZE - 2 * SEGMENT, 0.3: SIZE}))

    assert (at, left_at) == (soon(0.1), soon(0.1 - RTT_S))


def test_body_is_written_at_the_latest_when_the_answer_begins(watched):
    assert watched(Connection({0.0: 4_000}, {}), answered_s=0.3) == [(0.3, 0.3)]
    assert watched(Connection({0.0: SIZE}, {0.2999: SIZE}), answered_s=0.3) == [(0.3, 0.3 - RTT_S)]


def test_body_counts_from_an_answer_that_begins_before_it_is_sent_whole(watched):
    async def run():
        calls = []
        upload = Upload(Connection({0: SIZE}, {0: SIZE}), lambda at=None: calls.append(round(at, 6)), now)
        await asyncio.sleep(0.2)
        upload.answered()
        upload.follow(SIZE)
        await asyncio.sleep(1.0)
        return calls

    assert run_virtual(run()) == [0.2]


def test_body_on_a_closing_connection_is_not_written_before_the_answer(watched):
    connection = Connection({0.0: 4_000, 0.2: SIZE}, {0.2: SIZE})
    connection.closing_at = 0.1

    assert watched(connection) == []
    assert watched(connection, answered_s=0.3) == [(0.3, 0.3)]


def test_watching_stops_when_the_request_ends(watched):
    assert watched(Connection({0.2: SIZE}, {0.2: SIZE}), closed_s=0.1) == []


def test_looks_at_a_long_upload_become_less_frequent(watched):
    looks = 0

    class Counted(Connection):
        def is_closing(self):
            nonlocal looks
            looks += 1
            return False

    [(at, _)] = watched(Counted({10.0: SIZE}, {10.0: SIZE}))

    assert at == soon(10.0)
    assert looks < 500


# --- where the kernel does not count ------------------------------------------------------------------------------


class Layer:
    """A transport: of a socket, or of TLS over another one."""

    def __init__(self, buffered, below=None):
        self.buffered, self.below = buffered, below
        if below is not None:
            self._ssl_protocol = SimpleNamespace(_transport=below)

    def get_extra_info(self, name):
        return "there is one" if name == "sslcontext" and self.below is not None else None

    def get_write_buffer_size(self):
        return self.buffered


def test_buffers_of_all_layers_count():
    assert wire._buffered(Layer(7)) == 7
    assert wire._buffered(Layer(7, Layer(30))) == 37
    assert wire._buffered(Layer(7, Layer(0, Layer(30)))) == 37


def test_buffers_that_the_event_loop_hides_are_unknown():
    hidden = Layer(0, Layer(0))
    del hidden._ssl_protocol
    assert wire._buffered(hidden) is None
    lost = Layer(0, Layer(0))
    lost._ssl_protocol._transport = None
    assert wire._buffered(lost) is None


@pytest.fixture
def fresh():
    """`kernel_counts` forgets its result, before and after the test."""
    kernel_counts.cache_clear()
    yield
    kernel_counts.cache_clear()


@pytest.mark.parametrize(
    ("platform", "count"),
    [
        ("darwin", wire._count),
        ("linux", lambda _: wire._Counts(0, 0, 0, 536, 0)),  # gVisor leaves most fields zero
        ("linux", lambda _: wire.TCP_INFO.unpack(b"too short")),
    ],
)
def test_kernel_without_counts_is_recognised(monkeypatch, fresh, platform, count):
    monkeypatch.setattr(wire.sys, "platform", platform)
    monkeypatch.setattr(wire, "_count", count)
    assert not kernel_counts()


# --- real sockets -------------------------------------------------------------------------------------------------

PIECE = 8_192
SIOCOUTQNSD = 0x894B
SENT_BUFFER = 46_080
"""Send buffer of a new connection on a path with segments of 1,460 bytes."""
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
RUNS = {"asyncio": asyncio.run, "uvloop": uvloop.run}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for localhost."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


def in_socket(connected, number):
    """A count of the kernel of a socket's bytes."""
    return struct.unpack("i", fcntl.ioctl(connected.fileno(), number, bytes(4)))[0]


class Uplink:
    """Forwards a connection in small pieces. It accepts `CONNECT`, as a proxy does."""

    def __init__(self):
        self.port = 0
        self.upstream = 0
        self.passed = 0
        self.reader = self.near = None

    async def serve(self, reader, writer):
        self.reader, self.near = reader, writer.get_extra_info("socket")
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        first = await reader.read(7)
        if first == b"CONNECT":
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        else:
            up_writer.write(first)
        await asyncio.gather(self.pass_up(reader, up_writer), pass_on(up_reader, writer))

    async def pass_up(self, reader, writer):
        async for data in pieces(reader, PIECE):
            self.passed += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()

    @property
    def received(self):
        """Bytes that have arrived from the client."""
        return self.near and self.passed + len(self.reader._buffer) + in_socket(self.near, termios.FIONREAD)


async def pieces(reader, size):
    while data := await reader.read(size):
        yield data


async def pass_on(reader, writer):
    async for data in pieces(reader, 65_536):
        writer.write(data)
    writer.close()
    await writer.wait_closed()


async def answer(reader, writer):
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            [length] = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            await reader.readexactly(length)
            writer.write(ANSWER)
            await writer.drain()
    writer.close()
    await writer.wait_closed()


@contextlib.asynccontextmanager
async def far(tls):
    """A slow uplink in front of a service; at the end, all connections have ended."""
    uplink, tasks = Uplink(), []

    def kept(serve):
        return lambda reader, writer: tasks.append(asyncio.ensure_future(serve(reader, writer)))

    service = await asyncio.start_server(kept(answer), "127.0.0.1", 0, ssl=tls)
    uplink.upstream = service.sockets[0].getsockname()[1]
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PIECE)
    listening.bind(("127.0.0.1", 0))
    uplink.port = listening.getsockname()[1]
    async with service, await asyncio.start_server(kept(uplink.serve), sock=listening, limit=PIECE):
        yield uplink
        await asyncio.gather(*tasks)


async def left_behind(size, scheme, certificate, *, proxied=False, **options):
    """Bytes of the body in this process, and unsent in its socket, when `written` was called: for two requests."""
    connected, left = [], []

    def small(address):
        made = socket.socket(*address[:3])
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENT_BUFFER // 2)
        made.setblocking(False)
        connected.append(made)
        return made

    def written(at=None):
        assert at is None or at <= time.monotonic()
        handed = uplink.received - earlier + in_socket(connected[0], wire.SIOCOUTQ)
        left.append((max(0, size - handed), in_socket(connected[0], SIOCOUTQNSD)))

    async with far(certificate.server if scheme == "https" else None) as uplink:
        place = f"localhost:{uplink.port}"
        transport = AiohttpTransport(
            Target(base_url=f"{scheme}://{place}", account_id="a", workflow="w"),
            Credentials(lambda: {"Authorization": "Bearer token"}),
            Options(ca_file=certificate.file, proxy=f"http://{place}" if proxied else None, **options),
            clock=time.monotonic,
            wall=time.time,
        )
        transport._pool.session.connector._socket_factory = small
        for _ in range(2):
            earlier = uplink.received or 0
            assert isinstance(await transport.send(create_batch(RUN_TARGET, bytes(size)), Leave(written)), Reply)
        await transport.aclose()
    assert (len(connected), len(left)) == (1, 2)
    return left


@pytest.mark.parametrize("loop", RUNS)
@pytest.mark.parametrize("size", [60_000, 100_000, 200_000, 400_000])
@pytest.mark.parametrize(("scheme", "proxied"), [("http", False), ("https", False), ("https", True)])
def test_written_is_not_called_while_bytes_of_the_body_are_unsent(certificate, loop, size, scheme, proxied):
    assert RUNS[loop](left_behind(size, scheme, certificate, proxied=proxied)) == [(0, 0), (0, 0)]


def test_written_is_not_called_too_early_in_a_run_without_limits(certificate):
    """Its requests count in the windows of other runs of the process."""
    assert asyncio.run(left_behind(400_000, "https", certificate, rate=UNLIMITED)) == [(0, 0), (0, 0)]


@pytest.mark.parametrize("loop", RUNS)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_written_is_not_called_while_buffers_hold_bytes_where_the_kernel_does_not_count(
    monkeypatch, certificate, loop, scheme
):
    monkeypatch.setattr(wire, "kernel_counts", lambda: False)
    assert [process for process, _ in RUNS[loop](left_behind(400_000, scheme, certificate))] == [0, 0]
