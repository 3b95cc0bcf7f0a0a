"""The way to the service, on real sockets: whatever the other side does comes back as a reply or a fault."""

import asyncio
import contextlib
import gzip
import json
import os
import socket
import struct
import time
import traceback
import tracemalloc
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import pytest
from certificates import make_certificate
from fakes import Leave

from bulkwf.attempt import Fault, FaultKind, Reply
from bulkwf.emulator import Limits, Service, emulate
from bulkwf.errors import ConfigError
from bulkwf.options import Options, Target
from bulkwf.service.requests import create_batch, get_instance, list_instances
from bulkwf.transport import http as transport
from bulkwf.transport.credentials import Credentials, check_secret
from bulkwf.transport.http import AiohttpTransport

TOKEN = "canary-9d41e7"
BODY = b'[{"instance_id":"a","params":{"secret":"canary-params"}}]'
OK = b'{"success":true,"errors":[],"messages":[],"result":[]}'


TARGET = Target(base_url="https://api.example/client/v4", account_id="acct", workflow="resize")


def bearer(token=TOKEN):
    return {"Authorization": f"Bearer {token}"}


@contextlib.asynccontextmanager
async def way_to(base_url, *, credentials=None, workflow="resize", account_id="acct", **options):
    target = Target(base_url=base_url, account_id=account_id, workflow=workflow)
    way = AiohttpTransport(
        target, credentials or Credentials(bearer), Options(**options), clock=time.monotonic, wall=time.time
    )
    try:
        yield way
    finally:
        await way.aclose()


@contextlib.asynccontextmanager
async def emulated(*faults, service=None, **options):
    service = service or Service(Limits.none(), time.monotonic)
    async with emulate(service, faults=faults) as emulator, way_to(emulator.base_url, **options) as way:
        way.service = service
        yield way


async def post(way, body=BODY):
    """Post, and tell how often `written` was called."""
    calls = []
    reply = await way.send(create_batch(TARGET, body), Leave(calls.append))
    return reply, len(calls)


class RawServer:
    """A server that says whatever bytes a test wants, and keeps what it was told."""

    def __init__(self, answer):
        self.answer = answer
        self.heads = []
        self.bodies = []
        self.connections = 0
        self.received = 0
        self.tasks = set()

    async def serve(self, reader, writer):
        self.connections += 1
        self.tasks.add(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                length = [
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                ]
                body = await reader.readexactly(length[0]) if length else b""
                self.bodies.append(body)
                self.received += len(head) + len(body)
                await self.answer(writer, len(self.heads))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def raw(answer, tls=None):
    """Serve raw bytes: *answer* is bytes, or a coroutine function of the writer and the request's number."""

    async def say(writer, number):
        writer.write(answer)
        await writer.drain()

    served = RawServer(answer if callable(answer) else say)
    server = await asyncio.start_server(served.serve, "127.0.0.1", 0, ssl=tls)
    served.port = server.sockets[0].getsockname()[1]
    served.url = f"http://127.0.0.1:{served.port}"
    try:
        yield served
    finally:
        server.close()
        for task in served.tasks:
            task.cancel()
        await asyncio.gather(*served.tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def connected(serve, scheme="http", **options):
    """A way to a server whose connections go to *serve*."""
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with way_to(f"{scheme}://localhost:{port}", **options) as way:
            yield way


def http(body=OK, status="200 OK", **headers):
    """A whole answer."""
    named = {"Content-Length": len(body), **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


async def answered(answer, **options):
    """What a request comes to that is answered by these bytes."""
    async with raw(answer) as server, way_to(server.url, **options) as way:
        reply, _ = await post(way)
        return reply


# --- a good day ---------------------------------------------------------------------------------------------------


async def test_a_request_arrives_as_it_was_given_and_its_answer_comes_back_whole():
    async with (
        raw(http(b'{"ok":1}', "201 Created", CF_Ray="abc", Retry_After="7")) as server,
        way_to(server.url) as way,
    ):
        reply, written = await post(way)

    head = server.heads[0].decode()
    assert head.startswith("POST /accounts/acct/workflows/resize/instances/batch HTTP/1.1\r\n")
    assert f"Authorization: Bearer {TOKEN}\r\n" in head
    assert "Content-Type: application/json\r\n" in head
    assert "Accept-Encoding: identity\r\n" in head
    assert "Python" not in head
    assert server.bodies == [BODY]
    assert isinstance(reply, Reply)
    assert (reply.status, reply.body, written) == (201, b'{"ok":1}', 1)
    assert (reply.headers["cf-ray"], reply.headers["retry-after"]) == ("abc", "7")
    assert 0 < reply.elapsed_s < 5
    assert abs(reply.received_at - time.time()) < 5


async def test_a_look_up_asks_for_one_instance_in_brief():
    async with raw(http()) as server, way_to(server.url) as way:
        calls = []
        reply = await way.send(get_instance(TARGET, "order-1"), Leave(lambda _: calls.append(1)))

    assert server.heads[0].startswith(b"GET /accounts/acct/workflows/resize/instances/order-1?simple=true HTTP/1.1\r\n")
    assert (reply.status, calls) == (200, [1])


async def test_a_page_of_the_list_is_asked_for_with_its_parameters():
    async with raw(http()) as server, way_to(server.url) as way:
        calls = []
        query = {"per_page": "100", "date_start": "2026-01-01T00:00:00Z"}
        reply = await way.send(list_instances(TARGET, query), Leave(lambda _: calls.append(1)))

    start = b"GET /accounts/acct/workflows/resize/instances?per_page=100&date_start=2026-01-01T00"
    assert server.heads[0].startswith(start)
    assert f"Authorization: Bearer {TOKEN}\r\n".encode() in server.heads[0]
    assert server.bodies == [b""]
    assert (reply.status, calls) == (200, [1])


async def test_whatever_a_cursor_holds_it_goes_back_as_it_came():
    cursors = ["a+/b==", "a b", "x&per_page=1", "y#z", "%2B", "\u00e9\u20ac", "a;b", "?", "\r\nX: y"]
    async with raw(http()) as server, way_to(server.url) as way:
        for cursor in cursors:
            await way.send(list_instances(TARGET, {"cursor": cursor}), Leave())

    queries = [urlsplit(head.split(b" ")[1].decode()).query for head in server.heads]
    assert [parse_qs(query, strict_parsing=True) for query in queries] == [{"cursor": [cursor]} for cursor in cursors]


async def test_a_list_without_an_answer_is_a_fault():
    async with emulated({"method": "GET", "reset": True}) as way:
        calls = []
        assert (await way.send(list_instances(TARGET, {}), Leave(lambda _: calls.append(1)))).kind is FaultKind.IN_DOUBT
        assert calls == []


async def test_the_emulators_service_is_spoken_to():
    async with emulated() as way:
        reply, written = await post(way)
        found = await way.send(get_instance(TARGET, "a"), Leave())
        missing = await way.send(get_instance(TARGET, "b"), Leave())
        listed = await way.send(list_instances(TARGET, {"per_page": "5"}), Leave())
        lost = await way.send(list_instances(TARGET, {"cursor": "b+c"}), Leave())

    assert [one["id"] for one in json.loads(listed.body)["result"]] == ["a"]
    assert (lost.status, json.loads(lost.body)["errors"][0]["message"][:12]) == (400, "cursor 'b+c'")
    assert (reply.status, written, json.loads(reply.body)["result"][0]["id"]) == (200, 1, "a")
    assert (found.status, missing.status) == (200, 404)


@pytest.mark.parametrize("size", [10, 70_000, 3_000_000])
async def test_bodies_of_any_size_go_out_whole_and_without_a_warning(size):
    async with raw(http()) as server, way_to(server.url) as way:
        _, written = await post(way, b"x" * size)

    assert ([len(body) for body in server.bodies], written) == ([size], 1)


async def test_written_is_told_after_the_body_has_gone_and_before_the_answer():
    told = asyncio.Event()

    async def answer(writer, number):
        await told.wait()
        writer.write(http())

    async with raw(answer) as server, way_to(server.url) as way:
        async with asyncio.timeout(10):
            reply = await way.send(create_batch(TARGET, b"x" * 500_000), Leave(lambda _: told.set()))

    assert (reply.status, len(server.bodies[0])) == (200, 500_000)


async def test_written_is_not_told_while_the_body_is_held_up():
    """A server that does not read fills the buffers on the way; the body has not been written then."""
    told, go_on, met = [], asyncio.Event(), asyncio.Event()

    async def serve(reader, writer):
        met.set()
        await go_on.wait()
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(30_000_000)
        writer.write(http())
        await writer.drain()
        writer.close()

    async with connected(serve) as way:
        slot = Leave(lambda _: told.append(go_on.is_set()))
        sending = asyncio.ensure_future(way.send(create_batch(TARGET, b"x" * 30_000_000), slot))
        await met.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        go_on.set()
        await sending

    assert told == [True]


async def test_an_id_is_one_segment_of_the_path_whatever_stands_in_it():
    async with raw(http()) as server, way_to(server.url) as way:
        for made_up in ("order-1", "../../user/tokens", "a?b#c", "%2e%2e"):
            await way.send(get_instance(TARGET, made_up), Leave())

    paths = [head.split(b" ")[1].rpartition(b"/instances/")[2] for head in server.heads]
    assert paths == [
        b"order-1?simple=true",
        b"..%2F..%2Fuser%2Ftokens?simple=true",
        b"a%3Fb%23c?simple=true",
        b"%252e%252e?simple=true",
    ]


async def test_connections_are_used_again():
    async with raw(http()) as server, way_to(server.url) as way:
        for _ in range(5):
            await post(way)

    assert (server.connections, len(server.heads)) == (1, 5)


# --- what is known of a request that got no answer ----------------------------------------------------------------


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


async def test_a_refused_connection_means_not_sent():
    async with way_to(f"http://127.0.0.1:{free_port()}") as way:
        reply, written = await post(way)

    assert (reply.kind, written) == (FaultKind.NOT_SENT, 0)
    assert "ECONNREFUSED" in reply.message


async def test_a_name_that_is_not_known_means_not_sent():
    async with way_to("https://nowhere.invalid") as way:
        reply, written = await post(way)

    assert (reply.kind, written) == (FaultKind.NOT_SENT, 0)


async def test_a_connection_that_is_not_made_in_time_means_not_sent(monkeypatch):
    """A listener whose queue is full answers no SYN."""
    monkeypatch.setattr(transport, "CONNECT_TIMEOUT_S", 0.2)
    with contextlib.ExitStack() as sockets:
        listening = sockets.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(3):
            filler = sockets.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(listening.getsockname())
        async with way_to(f"http://127.0.0.1:{listening.getsockname()[1]}") as way:
            reply, written = await post(way)

    assert (reply.kind, written) == (FaultKind.NOT_SENT, 0)


def reset(writer):
    """Make the kernel send RST instead of FIN."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def test_a_reset_before_the_body_is_read_means_in_doubt():
    async def serve(reader, writer):
        await reader.read(1)
        reset(writer)

    async with connected(serve) as way:
        reply, _ = await post(way, b"x" * 20_000_000)

    assert reply.kind is FaultKind.IN_DOUBT


async def test_a_reset_after_the_body_means_in_doubt():
    async def answer(writer, number):
        reset(writer)

    reply = await answered(answer)

    assert reply.kind is FaultKind.IN_DOUBT
    assert "broke" in reply.message


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 abc Bad Request\r\n\r\n",
        b"\x00\xff\x00\xff" * 100,
        b"HTTP/1.1 400 Bad",
        b"",
        http()[:-10],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nnonsense\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-Large: " + b"x" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X-Many: x\r\n" * 100_000 + b"\r\n",
    ],
    ids=[
        "banner",
        "status",
        "garbage",
        "half a line",
        "close",
        "cut",
        "chunk",
        "cut chunk",
        "length",
        "header",
        "headers",
    ],
)
async def test_an_answer_that_is_no_answer_means_in_doubt_whatever_status_it_seems_to_have(answer):
    async def say(writer, number):
        writer.write(answer)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    reply = await answered(say, timeout_s=20.0)

    assert isinstance(reply, Fault), reply
    assert reply.kind is FaultKind.IN_DOUBT
    assert len(reply.message) < 300


async def test_no_answer_in_time_means_in_doubt():
    async with emulated({"hang": True}, timeout_s=0.2) as way:
        reply, written = await post(way)

    assert (reply.kind, reply.message, written) == (FaultKind.IN_DOUBT, "no answer in time", 1)
    assert 0.15 < reply.elapsed_s < 5


async def test_an_answer_that_never_ends_is_cut_at_the_time_limit():
    async def drip(writer, number):
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"1\r\n \r\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    reply = await answered(drip, timeout_s=0.3)
    assert (reply.kind, reply.message) == (FaultKind.IN_DOUBT, "no answer in time")


@pytest.mark.parametrize(
    "rule",
    [{"reset": True}, {"close": True}, {"truncate": 10}, {"truncate": 0}, {"raw": "HTTP/1.1 2oo OK"}],
    ids=["reset", "close", "truncate", "nothing", "raw"],
)
async def test_the_emulators_broken_answers_mean_in_doubt(rule):
    async with emulated(rule) as way:
        reply, written = await post(way)

    assert (reply.kind, written) == (FaultKind.IN_DOUBT, 1)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 429, 500, 503, 526, 599])
async def test_an_answer_that_is_read_to_its_end_is_a_reply_whatever_its_status(status):
    async with emulated({"status": status}) as way:
        reply, _ = await post(way)

    assert (reply.status, json.loads(reply.body)["success"]) == (status, False)


async def test_a_late_second_answer_is_met_on_its_own_connection_only():
    """What comes over the connection next may be a copy of the last answer; after `drop_connections` it is not."""
    async with emulated({"request": 1, "twice": True}) as way:
        first, _ = await post(way)
        way.drop_connections()
        second, _ = await post(way, b'[{"instance_id":"b"}]')

    ids = [json.loads(reply.body)["result"][0]["id"] for reply in (first, second)]
    assert ids == ["a", "b"]


async def test_an_answer_with_the_mark_of_another_is_not_believed_and_those_behind_it_are_met_by_nobody():
    """The copy is taken for the next request's answer; from then on each would be met by the request after its own."""
    behind = {}  # the answer that a connection owes

    async def say(writer, number):
        said, behind[writer] = behind.get(writer, 1 if number == 2 else number), number
        if number != 2 and behind[writer] == said:
            del behind[writer]
        writer.write(http(b"%d" % said, CF_Ray=f"ray-{said}"))

    async with raw(say) as server, way_to(server.url) as way:
        told = [await way.send(get_instance(TARGET, f"id-{number}"), Leave()) for number in range(1, 5)]

    assert isinstance(told[0], Reply)
    assert (told[1].kind, told[1].message) == (
        FaultKind.IN_DOUBT,
        "a copy of an earlier answer: it has the same cf-ray",
    )
    assert [reply.body for reply in told[2:]] == [b"3", b"4"]
    assert server.connections == 2


async def test_only_the_marks_of_the_last_answers_are_remembered():
    async with raw(http(CF_Ray="ever the same")) as server, way_to(server.url) as way:
        way._rays.update(dict.fromkeys(map(str, range(transport.RAYS))))
        told = [await way.send(get_instance(TARGET, "a"), Leave()) for _ in range(3)]

    assert [type(reply) for reply in told] == [Reply, Fault, Fault]
    assert len(way._rays) == transport.RAYS


async def test_a_header_of_any_bytes_is_read():
    reply = await answered(b"HTTP/1.1 200 OK\r\nLocation: caf\xe9\xff\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\n{}")

    assert (reply.status, reply.headers["retry-after"], reply.body) == (200, "7", b"{}")
    assert os.fsencode(reply.headers["location"]) == b"caf\xe9\xff"


async def test_cancelling_a_request_ends_it():
    async with emulated({"hang": True}) as way:
        sending = asyncio.ensure_future(post(way))
        while not way.service.requests:  # noqa: ASYNC110 (the emulator has no event for it)
            await asyncio.sleep(0.001)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert way._pool._in_use == 0


# --- where the request goes, and where not ------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
async def test_a_redirect_is_not_followed_and_the_other_place_hears_nothing(status):
    async with raw(http()) as other:
        reply = await answered(http(b"", status, Location=f"{other.url}/elsewhere"))

    assert reply.status == int(status[:3])
    assert (other.connections, other.received) == (0, 0)


async def test_proxies_and_credentials_of_the_environment_are_not_used(monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password netrc-secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    async with raw(http()) as proxy, raw(http()) as server:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        async with way_to(server.url) as way:
            reply, _ = await post(way)

    assert reply.status == 200
    assert proxy.connections == 0
    assert server.heads[0].count(b"Authorization") == 1
    assert f"Bearer {TOKEN}".encode() in server.heads[0]


async def test_a_proxy_that_is_named_is_used():
    async with raw(http(b"", "502 Bad Gateway")) as proxy, way_to("https://api.example", proxy=proxy.url) as way:
        reply, written = await post(way)

    assert proxy.heads[0].startswith(b"CONNECT api.example:443 HTTP/1.1")
    assert TOKEN.encode() not in proxy.heads[0]
    assert (reply.kind, written) == (FaultKind.NOT_SENT, 0)


@pytest.mark.parametrize("status", ["407 Proxy Authentication Required", "403 Forbidden"])
async def test_a_proxy_that_refuses_to_connect_is_named_with_its_status_and_without_its_password(status):
    async with raw(http(b"", status)) as proxy:
        url = proxy.url.replace("http://", "http://me:proxy-password@")
        async with way_to("https://api.example", proxy=url) as way:
            reply, written = await post(way)

    assert (reply.kind, written) == (FaultKind.FATAL, 0)
    assert f"the proxy 127.0.0.1:{proxy.port} answers CONNECT with HTTP {status[:3]}" in reply.message
    assert "proxy-password" not in reply.message


async def test_cookies_are_not_sent_back():
    async with raw(http(Set_Cookie="session=1; Path=/")) as server, way_to(server.url) as way:
        await post(way)
        await post(way)

    assert not any(b"cookie" in head.lower() for head in server.heads)


@pytest.mark.parametrize("name", ["../admin", "a/b", "a?b", "a#b", "a%2fb", "a b", "", "é", ".", "a\r\nX: y", "x" * 65])
def test_names_that_would_alter_the_path_are_refused(name):
    for more in ({"workflow": name, "account_id": "a"}, {"workflow": "w", "account_id": name}):
        with pytest.raises(ConfigError):
            Target(base_url="https://api.example", **more)


@pytest.mark.parametrize("url", ["http://api.example", "ftp://localhost", "https://u:p@api.example", "https://", "/v4"])
def test_the_token_goes_nowhere_unencrypted(url):
    with pytest.raises(ConfigError) as raised:
        Target(base_url=url, account_id="a", workflow="w")
    assert "u:p" not in str(raised.value)


# --- answers that are too much ------------------------------------------------------------------------------------


async def test_an_endless_body_is_cut_and_memory_stays_flat():
    sent = 0

    async def pour(writer, number):
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        while sent < 1_000:
            writer.write(chunk)
            await writer.drain()
            sent += 1

    tracemalloc.start()
    try:
        reply = await answered(pour)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert reply.kind is FaultKind.IN_DOUBT
    assert "larger than 8,388,608 bytes" in reply.message
    assert sent < 40
    assert peak < 40_000_000


async def test_an_answer_just_as_large_as_allowed_is_read():
    reply = await answered(http(b"x" * transport.MAX_BODY_BYTES))

    assert len(reply.body) == transport.MAX_BODY_BYTES


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "GZIP"])
async def test_a_compressed_answer_is_refused_before_it_is_unpacked(encoding):
    bomb = gzip.compress(b"\0" * 50_000_000)
    tracemalloc.start()
    try:
        reply = await answered(http(bomb, Content_Encoding=encoding))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert reply.kind is FaultKind.IN_DOUBT
    assert "compressed" in reply.message
    assert peak < 10_000_000


async def test_the_connection_of_a_refused_answer_is_not_used_again():
    async with raw(http(os.urandom(5_000_000), Content_Encoding="gzip")) as server, way_to(server.url) as way:
        await post(way)
        await post(way)

    assert server.connections == 2


# --- dropped connections ------------------------------------------------------------------------------------------


async def test_dropping_connections_closes_idle_ones_and_lets_those_in_use_end():
    go_on = asyncio.Event()

    async def answer(writer, number):
        if number == 2:
            await go_on.wait()
        writer.write(http())
        await writer.drain()

    async with raw(answer) as server, way_to(server.url) as way:
        await post(way)
        under_way = asyncio.ensure_future(post(way))
        while len(server.heads) < 2:  # noqa: ASYNC110 (the server has no event for it)
            await asyncio.sleep(0.001)
        way.drop_connections()
        assert (await post(way))[0].status == 200
        assert server.connections == 2
        go_on.set()
        assert (await under_way)[0].status == 200
        old = way._retired[0]
        await old._closing
        assert old.session.closed
        way.drop_connections()
        assert (await post(way))[0].status == 200
        assert server.connections == 3
        assert len(way._retired) == 1


async def test_fresh_request_uses_a_connection_of_its_own_and_leaves_the_others_open():
    async with raw(http()) as server, way_to(server.url) as way:
        await post(way)
        for _ in range(2):
            fresh = replace(create_batch(TARGET, b"[]"), fresh=True)
            assert (await way.send(fresh, Leave())).status == 200
        await post(way)

    assert server.connections == 3


# --- credentials --------------------------------------------------------------------------------------------------


async def test_a_renewed_credential_is_used_by_the_next_request():
    tokens = ["one", "one", "two"]
    credentials = Credentials(lambda: bearer(tokens.pop(0)))
    async with raw(http()) as server, way_to(server.url, credentials=credentials) as way:
        first, _ = await post(way)
        assert await way.refresh_credential(first.credential) is False  # the source gives the same
        assert await way.refresh_credential(first.credential) is True
        second, _ = await post(way)
        assert (first.credential, second.credential) == (0, 1)
        assert await way.refresh_credential(first.credential) is True  # there is another one already
        assert tokens == []

    assert [b"Bearer one" in head for head in server.heads] == [True, False]
    assert b"Bearer two" in server.heads[1]


@pytest.mark.parametrize("error", [ConfigError("no token"), OSError("gone")])
def test_a_source_of_credentials_that_fails_has_no_other(error):
    answers = [bearer(), error]

    def source():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert Credentials(source).renew(0) is False


def test_a_credential_that_was_replaced_while_its_answers_were_on_the_way_is_hidden_too():
    tokens = [f"token-{number:03}-of-our-own" for number in range(3)]
    given = iter(tokens)
    credentials = Credentials(lambda: bearer(next(given)))
    assert [credentials.renew(0), credentials.renew(1)] == [True, True]

    assert credentials.hide(" ".join(tokens).encode()) == b"*** *** ***"


@pytest.mark.parametrize("value", ["", "  ", "a b", "a\nb", "tökén", "a\x00"])
def test_a_malformed_secret_is_refused_and_never_quoted(value):
    with pytest.raises(ConfigError) as raised:
        check_secret("the API token", value)
    assert "the API token" in str(raised.value)
    assert not value.strip() or value not in str(raised.value)


def test_white_space_around_a_secret_is_dropped():
    assert check_secret("it", " token\n") == "token"


# --- TLS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for localhost."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


async def test_a_certificate_that_is_not_trusted_ends_the_run_and_nothing_is_sent(certificate):
    context, _ = certificate
    async with raw(http(), tls=context) as server, way_to(f"https://localhost:{server.port}") as way:
        reply, written = await post(way)

    assert (reply.kind, written, server.heads) == (FaultKind.FATAL, 0, [])
    assert "self-signed" in reply.message or "self signed" in reply.message


async def test_a_certificate_of_ones_own_authority_is_trusted(certificate):
    context, ca_file = certificate
    async with raw(http(), tls=context) as server, way_to(f"https://localhost:{server.port}", ca_file=ca_file) as way:
        reply, written = await post(way)

    assert (reply.status, written) == (200, 1)


async def test_a_server_without_tls_fails_the_handshake_and_hears_no_token():
    async def hang_up(reader, writer):
        told.append(await reader.read(1_000))
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    told = []
    async with connected(hang_up, "https") as way:
        reply, written = await post(way)

    assert (reply.kind, written) == (FaultKind.HANDSHAKE, 0)
    assert TOKEN.encode() not in told[0]


async def test_an_alert_in_the_handshake_means_not_sent_and_is_no_wrong_certificate():
    async def alert(reader, writer):
        await reader.read(1_000)
        writer.write(b"\x15\x03\x03\x00\x02\x02\x50")  # internal_error, as an overloaded edge sends it
        writer.close()

    async with connected(alert, "https") as way:
        reply, written = await post(way)

    assert (reply.kind, written) == (FaultKind.HANDSHAKE, 0)
    assert "ALERT" in reply.message


@pytest.mark.parametrize("manner", ["close", "reset"])
async def test_a_connection_that_breaks_in_the_handshake_means_not_sent(manner):
    """A balancer that restarts must not end a run of a night."""

    async def hang_up(reader, writer):
        await reader.read(1_000)
        reset(writer) if manner == "reset" else writer.close()

    async with connected(hang_up, "https") as way:
        reply, written = await post(way)

    assert (reply.kind, written) == (FaultKind.NOT_SENT, 0)


@pytest.mark.parametrize("content", [None, "no certificate"])
async def test_authorities_that_can_not_be_read_are_a_mistake_of_configuration(tmp_path, content):
    name = tmp_path / "ca.pem"
    if content is not None:
        name.write_text(content)
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        async with way_to("https://api.example", ca_file=str(name)):
            pass


# --- secrets ------------------------------------------------------------------------------------------------------


async def test_neither_token_nor_params_are_in_any_fault_representation_or_traceback(caplog):
    caplog.set_level(0)
    seen = []

    async def say(writer, number):
        writer.write([b"garbage\r\n\r\n", b"", http()[:-3]][number % 3])
        writer.close()

    async with raw(say) as server, way_to(server.url) as way:
        seen += [await way.send(create_batch(TARGET, BODY), Leave()) for _ in range(6)]
        seen += [await way.send(get_instance(TARGET, "a"), Leave()), way, way._credentials, way._pool]
    async with way_to(f"http://127.0.0.1:{free_port()}") as way:
        seen.append(await way.send(create_batch(TARGET, BODY), Leave()))
    async with way_to(
        "http://127.0.0.1:1", credentials=Credentials(lambda: {"Authorization": f"{TOKEN}\r\nX: y"})
    ) as way:
        seen.append(await way.send(create_batch(TARGET, BODY), Leave()))

    texts = [repr(one) for one in seen] + [str(one) for one in seen] + [caplog.text]
    assert sum(isinstance(one, Fault) for one in seen) >= 8
    assert not any(TOKEN in text or "canary-params" in text for text in texts)


async def test_a_mistake_in_a_callback_shows_no_token_in_its_traceback():
    def broken(at=None):
        raise KeyError("the caller's own mistake")

    async with emulated() as way:
        try:
            reply = await way.send(create_batch(TARGET, BODY), Leave(broken))
        except KeyError as error:
            text = "".join(traceback.format_exception(error))
        else:
            text = repr(reply)
    assert TOKEN not in text


# --- the end ------------------------------------------------------------------------------------------------------


async def test_closing_leaves_no_connection_open():
    async with raw(http()) as server:
        async with way_to(server.url) as way:
            await post(way)
            way.drop_connections()
            await post(way)
        assert way._pool.session.closed
        assert all(pool.session.closed for pool in way._retired)
        async with asyncio.timeout(10):
            await asyncio.gather(*server.tasks)  # the server has seen every connection end
