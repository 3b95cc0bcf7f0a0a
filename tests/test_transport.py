"""The transport on real sockets: whatever the other side does is returned as a reply or a fault."""

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
from bulkwf.transport import http as http_module
from bulkwf.transport.credentials import Credentials, check_secret
from bulkwf.transport.http import AiohttpTransport

TOKEN = "canary-9d41e7"
BODY = b'[{"instance_id":"a","params":{"secret":"canary-params"}}]'
OK = b'{"success":true,"errors":[],"messages":[],"result":[]}'


TARGET = Target(base_url="https://api.example/client/v4", account_id="acct", workflow="resize")


def bearer(token=TOKEN):
    return {"Authorization": f"Bearer {token}"}


@contextlib.asynccontextmanager
async def transport_to(base_url, *, credentials=None, workflow="resize", account_id="acct", **options):
    target = Target(base_url=base_url, account_id=account_id, workflow=workflow)
    transport = AiohttpTransport(
        target, credentials or Credentials(bearer), Options(**options), clock=time.monotonic, wall=time.time
    )
    try:
        yield transport
    finally:
        await transport.aclose()


@contextlib.asynccontextmanager
async def emulated(*faults, service=None, **options):
    service = service or Service(Limits.none(), time.monotonic)
    async with emulate(service, faults=faults) as emulator, transport_to(emulator.base_url, **options) as transport:
        transport.service = service
        yield transport


async def post(transport, body=BODY):
    """Send a batch; the reply, and the number of calls of `written`."""
    calls = []
    reply = await transport.send(create_batch(TARGET, body), Leave(calls.append))
    return reply, len(calls)


class RawServer:
    """A server that answers with the bytes of a test, and keeps what it receives."""

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
    """A transport to a server whose connections are served by *serve*."""
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with transport_to(f"{scheme}://localhost:{port}", **options) as transport:
            yield transport


def http(body=OK, status="200 OK", **headers):
    """A whole answer."""
    named = {"Content-Length": len(body), **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


async def answered(answer, **options):
    """The reply or fault of a request that is answered by *answer*."""
    async with raw(answer) as server, transport_to(server.url, **options) as transport:
        reply, _ = await post(transport)
        return reply


# --- requests and answers -----------------------------------------------------------------------------------------


async def test_request_and_answer_pass_unchanged():
    async with (
        raw(http(b'{"ok":1}', "201 Created", CF_Ray="abc", Retry_After="7")) as server,
        transport_to(server.url) as transport,
    ):
        reply, written = await post(transport)

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


async def test_look_up_asks_for_one_instance_without_its_steps():
    async with raw(http()) as server, transport_to(server.url) as transport:
        calls = []
        reply = await transport.send(get_instance(TARGET, "order-1"), Leave(lambda _: calls.append(1)))

    assert server.heads[0].startswith(b"GET /accounts/acct/workflows/resize/instances/order-1?simple=true HTTP/1.1\r\n")
    assert (reply.status, calls) == (200, [1])


async def test_request_for_a_page_holds_its_parameters():
    async with raw(http()) as server, transport_to(server.url) as transport:
        calls = []
        query = {"per_page": "100", "date_start": "2026-01-01T00:00:00Z"}
        reply = await transport.send(list_instances(TARGET, query), Leave(lambda _: calls.append(1)))

    start = b"GET /accounts/acct/workflows/resize/instances?per_page=100&date_start=2026-01-01T00"
    assert server.heads[0].startswith(start)
    assert f"Authorization: Bearer {TOKEN}\r\n".encode() in server.heads[0]
    assert server.bodies == [b""]
    assert (reply.status, calls) == (200, [1])


async def test_cursor_of_any_characters_is_sent_back_unchanged():
    cursors = ["a+/b==", "a b", "x&per_page=1", "y#z", "%2B", "\u00e9\u20ac", "a;b", "?", "\r\nX: y"]
    async with raw(http()) as server, transport_to(server.url) as transport:
        for cursor in cursors:
            await transport.send(list_instances(TARGET, {"cursor": cursor}), Leave())

    queries = [urlsplit(head.split(b" ")[1].decode()).query for head in server.heads]
    assert [parse_qs(query, strict_parsing=True) for query in queries] == [{"cursor": [cursor]} for cursor in cursors]


async def test_request_for_a_page_without_an_answer_is_a_fault():
    async with emulated({"method": "GET", "reset": True}) as transport:
        calls = []
        assert (
            await transport.send(list_instances(TARGET, {}), Leave(lambda _: calls.append(1)))
        ).kind is FaultKind.IN_DOUBT
        assert calls == []


async def test_emulator_answers_each_kind_of_request():
    async with emulated() as transport:
        reply, written = await post(transport)
        found = await transport.send(get_instance(TARGET, "a"), Leave())
        missing = await transport.send(get_instance(TARGET, "b"), Leave())
        listed = await transport.send(list_instances(TARGET, {"per_page": "5"}), Leave())
        lost = await transport.send(list_instances(TARGET, {"cursor": "b+c"}), Leave())

    assert [one["id"] for one in json.loads(listed.body)["result"]] == ["a"]
    assert (lost.status, json.loads(lost.body)["errors"][0]["message"][:12]) == (400, "cursor 'b+c'")
    assert (reply.status, written, json.loads(reply.body)["result"][0]["id"]) == (200, 1, "a")
    assert (found.status, missing.status) == (200, 404)


@pytest.mark.parametrize("size", [10, 70_000, 3_000_000])
async def test_body_of_any_size_is_sent_whole_and_without_a_warning(size):
    async with raw(http()) as server, transport_to(server.url) as transport:
        _, written = await post(transport, b"x" * size)

    assert ([len(body) for body in server.bodies], written) == ([size], 1)


async def test_written_is_called_after_the_body_has_left_and_before_the_answer():
    written = asyncio.Event()

    async def answer(writer, number):
        await written.wait()
        writer.write(http())

    async with raw(answer) as server, transport_to(server.url) as transport:
        async with asyncio.timeout(10):
            reply = await transport.send(create_batch(TARGET, b"x" * 500_000), Leave(lambda _: written.set()))

    assert (reply.status, len(server.bodies[0])) == (200, 500_000)


async def test_written_is_not_called_while_the_body_is_held_up():
    """While the server does not read, buffers fill up, and a part of the body stays in this process."""
    calls, go_on, connected_to = [], asyncio.Event(), asyncio.Event()

    async def serve(reader, writer):
        connected_to.set()
        await go_on.wait()
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(30_000_000)
        writer.write(http())
        await writer.drain()
        writer.close()

    async with connected(serve) as transport:
        slot = Leave(lambda _: calls.append(go_on.is_set()))
        sending = asyncio.ensure_future(transport.send(create_batch(TARGET, b"x" * 30_000_000), slot))
        await connected_to.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        go_on.set()
        await sending

    assert calls == [True]


async def test_id_of_any_characters_is_one_segment_of_the_path():
    async with raw(http()) as server, transport_to(server.url) as transport:
        for made_up in ("order-1", "../../user/tokens", "a?b#c", "%2e%2e"):
            await transport.send(get_instance(TARGET, made_up), Leave())

    paths = [head.split(b" ")[1].rpartition(b"/instances/")[2] for head in server.heads]
    assert paths == [
        b"order-1?simple=true",
        b"..%2F..%2Fuser%2Ftokens?simple=true",
        b"a%3Fb%23c?simple=true",
        b"%252e%252e?simple=true",
    ]


async def test_connection_is_used_again_for_the_next_request():
    async with raw(http()) as server, transport_to(server.url) as transport:
        for _ in range(5):
            await post(transport)

    assert (server.connections, len(server.heads)) == (1, 5)


# --- requests without an answer -----------------------------------------------------------------------------------


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


async def test_refused_connection_means_not_sent():
    async with transport_to(f"http://127.0.0.1:{free_port()}") as transport:
        reply, written = await post(transport)

    assert (reply.kind, written) == (FaultKind.NOT_SENT, 0)


async def test_name_that_is_not_known_means_not_sent():
    async with transport_to("https://nowhere.invalid") as transport:
        reply, written = await post(transport)

    assert (reply.kind, written) == (FaultKind.NOT_SENT, 0)


@contextlib.contextmanager
def unanswering():
    """The port of a listener whose queue is full: it answers no SYN."""
    with contextlib.ExitStack() as sockets:
        listening = sockets.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(3):
            filler = sockets.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(listening.getsockname())
        yield listening.getsockname()[1]


async def test_connection_that_is_not_made_in_time_means_not_sent(monkeypatch):
    monkeypatch.setattr(http_module, "CONNECT_TIMEOUT_S", 0.2)
    with unanswering() as port:
        async with transport_to(f"http://127.0.0.1:{port}") as transport:
            reply, written = await post(transport)

    assert (reply.kind, written) == (FaultKind.NOT_SENT, 0)


def reset(writer):
    """Make the kernel send RST instead of FIN."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def test_reset_before_the_body_is_read_means_in_doubt():
    async def serve(reader, writer):
        await reader.read(1)
        reset(writer)

    async with connected(serve) as transport:
        reply, _ = await post(transport, b"x" * 20_000_000)

    assert reply.kind is FaultKind.IN_DOUBT


async def test_reset_after_the_body_means_in_doubt():
    async def answer(writer, number):
        reset(writer)

    reply = await answered(answer)

    assert reply.kind is FaultKind.IN_DOUBT


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
async def test_answer_that_is_not_http_means_in_doubt_whatever_its_status_seems_to_be(answer):
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
    async with emulated({"hang": True}, timeout_s=0.2) as transport:
        reply, written = await post(transport)

    assert (reply.kind, written) == (FaultKind.IN_DOUBT, 1)
    assert 0.15 < reply.elapsed_s < 5


async def test_answer_that_never_ends_is_cut_at_the_time_limit():
    async def drip(writer, number):
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"1\r\n \r\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    reply = await answered(drip, timeout_s=0.3)
    assert reply.kind is FaultKind.IN_DOUBT
    assert "no complete answer" in reply.message


@pytest.mark.parametrize(
    "rule",
    [{"reset": True}, {"close": True}, {"truncate": 10}, {"truncate": 0}, {"raw": "HTTP/1.1 2oo OK"}],
    ids=["reset", "close", "truncate", "nothing", "raw"],
)
async def test_broken_answers_of_the_emulator_mean_in_doubt(rule):
    async with emulated(rule) as transport:
        reply, written = await post(transport)

    assert (reply.kind, written) == (FaultKind.IN_DOUBT, 1)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 429, 500, 503, 526, 599])
async def test_complete_answer_is_a_reply_whatever_its_status(status):
    async with emulated({"status": status}) as transport:
        reply, _ = await post(transport)

    assert (reply.status, json.loads(reply.body)["success"]) == (status, False)


async def test_late_copy_of_an_answer_does_not_reach_a_new_connection():
    """What comes over the connection next may be a copy of the last answer; after `drop_connections` it is not."""
    async with emulated({"request": 1, "twice": True}) as transport:
        first, _ = await post(transport)
        transport.drop_connections()
        second, _ = await post(transport, b'[{"instance_id":"b"}]')

    ids = [json.loads(reply.body)["result"][0]["id"] for reply in (first, second)]
    assert ids == ["a", "b"]


async def test_copied_answer_is_not_believed_and_its_connection_is_dropped():
    """The copy arrives as the answer to the next request, and each later answer on that connection one request late."""
    late = {}  # the answer that each connection still has to send

    async def say(writer, number):
        sent, late[writer] = late.get(writer, 1 if number == 2 else number), number
        if number != 2 and late[writer] == sent:
            del late[writer]
        writer.write(http(b"%d" % sent, CF_Ray=f"ray-{sent}"))

    async with raw(say) as server, transport_to(server.url) as transport:
        replies = [await transport.send(get_instance(TARGET, f"id-{number}"), Leave()) for number in range(1, 5)]

    assert isinstance(replies[0], Reply)
    assert (replies[1].kind, replies[1].message) == (
        FaultKind.IN_DOUBT,
        "the answer is a copy of an earlier one: it has the same cf-ray",
    )
    assert [reply.body for reply in replies[2:]] == [b"3", b"4"]
    assert server.connections == 2


async def test_marks_of_the_latest_answers_only_are_remembered():
    async with raw(http(CF_Ray="always the same")) as server, transport_to(server.url) as transport:
        transport._marks.update(dict.fromkeys(map(str, range(http_module.MARKS))))
        replies = [await transport.send(get_instance(TARGET, "a"), Leave()) for _ in range(3)]

    assert [type(reply) for reply in replies] == [Reply, Fault, Fault]
    assert len(transport._marks) == http_module.MARKS


async def test_header_of_any_bytes_is_read():
    reply = await answered(b"HTTP/1.1 200 OK\r\nLocation: caf\xe9\xff\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\n{}")

    assert (reply.status, reply.headers["retry-after"], reply.body) == (200, "7", b"{}")
    assert os.fsencode(reply.headers["location"]) == b"caf\xe9\xff"


async def test_cancelling_a_request_ends_it():
    async with emulated({"hang": True}) as transport:
        sending = asyncio.ensure_future(post(transport))
        while not transport.service.requests:  # noqa: ASYNC110 (the emulator has no event for it)
            await asyncio.sleep(0.001)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert transport._pool._in_use == 0


# --- redirects, proxies, cookies, paths ---------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
async def test_redirect_is_not_followed_and_its_target_receives_nothing(status):
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
        async with transport_to(server.url) as transport:
            reply, _ = await post(transport)

    assert reply.status == 200
    assert proxy.connections == 0
    assert server.heads[0].count(b"Authorization") == 1
    assert f"Bearer {TOKEN}".encode() in server.heads[0]


async def test_proxy_of_the_options_is_used():
    async with (
        raw(http(b"", "502 Bad Gateway")) as proxy,
        transport_to("https://api.example", proxy=proxy.url) as transport,
    ):
        reply, written = await post(transport)

    assert proxy.heads[0].startswith(b"CONNECT api.example:443 HTTP/1.1")
    assert TOKEN.encode() not in proxy.heads[0]
    assert (reply.kind, written) == (FaultKind.NOT_SENT, 0)


@pytest.mark.parametrize("status", ["407 Proxy Authentication Required", "403 Forbidden"])
async def test_proxy_that_refuses_connect_is_named_with_its_status_and_without_its_password(status):
    async with raw(http(b"", status)) as proxy:
        url = proxy.url.replace("http://", "http://me:proxy-password@")
        async with transport_to("https://api.example", proxy=url) as transport:
            reply, written = await post(transport)

    assert (reply.kind, written) == (FaultKind.FATAL, 0)
    assert f"the proxy 127.0.0.1:{proxy.port} answers CONNECT with HTTP {status[:3]}" in reply.message
    assert "proxy-password" not in reply.message


async def test_cookies_are_not_sent_back():
    async with raw(http(Set_Cookie="session=1; Path=/")) as server, transport_to(server.url) as transport:
        await post(transport)
        await post(transport)

    assert not any(b"cookie" in head.lower() for head in server.heads)


@pytest.mark.parametrize("name", ["../admin", "a/b", "a?b", "a#b", "a%2fb", "a b", "", "é", ".", "a\r\nX: y", "x" * 65])
def test_names_that_would_alter_the_path_are_refused(name):
    for more in ({"workflow": name, "account_id": "a"}, {"workflow": "w", "account_id": name}):
        with pytest.raises(ConfigError):
            Target(base_url="https://api.example", **more)


@pytest.mark.parametrize("url", ["http://api.example", "ftp://localhost", "https://u:p@api.example", "https://", "/v4"])
def test_base_url_without_encryption_is_refused(url):
    with pytest.raises(ConfigError) as raised:
        Target(base_url=url, account_id="a", workflow="w")
    assert "u:p" not in str(raised.value)


# --- large and compressed answers ---------------------------------------------------------------------------------


async def test_endless_body_is_cut_and_memory_stays_flat():
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


async def test_largest_allowed_answer_is_read():
    reply = await answered(http(b"x" * http_module.MAX_BODY_BYTES))

    assert len(reply.body) == http_module.MAX_BODY_BYTES


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "GZIP"])
async def test_compressed_answer_is_refused_before_it_is_unpacked(encoding):
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


async def test_connection_of_a_refused_answer_is_not_used_again():
    async with (
        raw(http(os.urandom(5_000_000), Content_Encoding="gzip")) as server,
        transport_to(server.url) as transport,
    ):
        await post(transport)
        await post(transport)

    assert server.connections == 2


# --- dropped connections ------------------------------------------------------------------------------------------


async def test_dropping_connections_closes_idle_ones_and_completes_requests_in_flight():
    go_on = asyncio.Event()

    async def answer(writer, number):
        if number == 2:
            await go_on.wait()
        writer.write(http())
        await writer.drain()

    async with raw(answer) as server, transport_to(server.url) as transport:
        await post(transport)
        under_way = asyncio.ensure_future(post(transport))
        while len(server.heads) < 2:  # noqa: ASYNC110 (the server has no event for it)
            await asyncio.sleep(0.001)
        transport.drop_connections()
        assert (await post(transport))[0].status == 200
        assert server.connections == 2
        go_on.set()
        assert (await under_way)[0].status == 200
        old = transport._retired[0]
        await old._closing
        assert old.session.closed
        transport.drop_connections()
        assert (await post(transport))[0].status == 200
        assert server.connections == 3
        assert len(transport._retired) == 1


async def test_fresh_request_uses_a_connection_of_its_own_and_leaves_the_others_open():
    async with raw(http()) as server, transport_to(server.url) as way:
        await post(way)
        for _ in range(2):
            fresh = replace(create_batch(TARGET, b"[]"), fresh=True)
            assert (await way.send(fresh, Leave())).status == 200
        await post(way)

    assert server.connections == 3


# --- credentials --------------------------------------------------------------------------------------------------


async def test_refreshed_credential_is_used_by_the_next_request():
    tokens = ["one", "one", "two"]
    credentials = Credentials(lambda: bearer(tokens.pop(0)))
    async with raw(http()) as server, transport_to(server.url, credentials=credentials) as transport:
        first, _ = await post(transport)
        assert await transport.refresh_credential(first.credential) is False  # the source returns the same
        assert await transport.refresh_credential(first.credential) is True
        second, _ = await post(transport)
        assert (first.credential, second.credential) == (0, 1)
        assert await transport.refresh_credential(first.credential) is True  # there is another one already
        assert tokens == []

    assert [b"Bearer one" in head for head in server.heads] == [True, False]
    assert b"Bearer two" in server.heads[1]


@pytest.mark.parametrize("error", [ConfigError("no token"), OSError("gone")])
def test_failing_source_of_credentials_has_no_other_credential(error):
    answers = [bearer(), error]

    def source():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert Credentials(source).refresh(0) is False


def test_replaced_credentials_are_redacted_in_late_answers_too():
    tokens = [f"token-{number:03}-of-our-own" for number in range(3)]
    given = iter(tokens)
    credentials = Credentials(lambda: bearer(next(given)))
    assert [credentials.refresh(0), credentials.refresh(1)] == [True, True]

    assert credentials.hide(" ".join(tokens).encode()) == b"*** *** ***"


@pytest.mark.parametrize("value", ["", "  ", "a b", "a\nb", "tökén", "a\x00"])
def test_malformed_secret_is_refused_and_never_quoted(value):
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


async def test_untrusted_certificate_is_fatal_and_nothing_is_sent(certificate):
    context, _ = certificate
    async with raw(http(), tls=context) as server, transport_to(f"https://localhost:{server.port}") as transport:
        reply, written = await post(transport)

    assert (reply.kind, written, server.heads) == (FaultKind.FATAL, 0, [])
    assert "self-signed" in reply.message or "self signed" in reply.message


async def test_certificate_of_an_authority_in_the_ca_file_is_trusted(certificate):
    context, ca_file = certificate
    async with (
        raw(http(), tls=context) as server,
        transport_to(f"https://localhost:{server.port}", ca_file=ca_file) as transport,
    ):
        reply, written = await post(transport)

    assert (reply.status, written) == (200, 1)


async def test_server_without_tls_fails_the_handshake_and_receives_no_token():
    async def hang_up(reader, writer):
        received.append(await reader.read(1_000))
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    received = []
    async with connected(hang_up, "https") as transport:
        reply, written = await post(transport)

    assert (reply.kind, written) == (FaultKind.HANDSHAKE, 0)
    assert TOKEN.encode() not in received[0]


async def test_alert_in_the_handshake_is_not_fatal():
    async def alert(reader, writer):
        await reader.read(1_000)
        writer.write(b"\x15\x03\x03\x00\x02\x02\x50")  # internal_error, as an overloaded edge sends it
        writer.close()

    async with connected(alert, "https") as transport:
        reply, written = await post(transport)

    assert (reply.kind, written) == (FaultKind.HANDSHAKE, 0)
    assert "ALERT" in reply.message


@pytest.mark.parametrize("manner", ["close", "reset"])
async def test_connection_that_breaks_in_the_handshake_means_not_sent(manner):
    """A load balancer that restarts must not end a run."""

    async def hang_up(reader, writer):
        await reader.read(1_000)
        reset(writer) if manner == "reset" else writer.close()

    async with connected(hang_up, "https") as transport:
        reply, written = await post(transport)

    assert (reply.kind, written) == (FaultKind.NOT_SENT, 0)


@pytest.mark.parametrize("content", [None, "no certificate"])
async def test_unreadable_ca_file_is_a_configuration_error(tmp_path, content):
    name = tmp_path / "ca.pem"
    if content is not None:
        name.write_text(content)
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        async with transport_to("https://api.example", ca_file=str(name)):
            pass


# --- secrets ------------------------------------------------------------------------------------------------------


async def test_token_and_params_are_in_no_fault_representation_or_log(caplog):
    caplog.set_level(0)
    seen = []

    async def say(writer, number):
        writer.write([b"garbage\r\n\r\n", b"", http()[:-3]][number % 3])
        writer.close()

    async with raw(say) as server, transport_to(server.url) as transport:
        seen += [await transport.send(create_batch(TARGET, BODY), Leave()) for _ in range(6)]
        seen += [
            await transport.send(get_instance(TARGET, "a"), Leave()),
            transport,
            transport._credentials,
            transport._pool,
        ]
    async with transport_to(f"http://127.0.0.1:{free_port()}") as transport:
        seen.append(await transport.send(create_batch(TARGET, BODY), Leave()))
    async with transport_to(
        "http://127.0.0.1:1", credentials=Credentials(lambda: {"Authorization": f"{TOKEN}\r\nX: y"})
    ) as transport:
        seen.append(await transport.send(create_batch(TARGET, BODY), Leave()))

    texts = [repr(one) for one in seen] + [str(one) for one in seen] + [caplog.text]
    assert sum(isinstance(one, Fault) for one in seen) >= 8
    assert not any(TOKEN in text or "canary-params" in text for text in texts)


async def test_traceback_of_an_error_in_a_callback_holds_no_token():
    def broken(at=None):
        raise KeyError("the caller's own mistake")

    async with emulated() as transport:
        try:
            reply = await transport.send(create_batch(TARGET, BODY), Leave(broken))
        except KeyError as error:
            text = "".join(traceback.format_exception(error))
        else:
            text = repr(reply)
    assert TOKEN not in text


# --- the end ------------------------------------------------------------------------------------------------------


async def test_closing_leaves_no_connection_open():
    async with raw(http()) as server:
        async with transport_to(server.url) as transport:
            await post(transport)
            transport.drop_connections()
            await post(transport)
        assert transport._pool.session.closed
        assert all(pool.session.closed for pool in transport._retired)
        async with asyncio.timeout(10):
            await asyncio.gather(*server.tasks)  # the server has seen every connection end
