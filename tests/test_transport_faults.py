"""Messages of faults: each fault really happens on loopback, and its message names host and cause."""

import asyncio
import contextlib
import os
import re
import socket

import pytest
from certificates import make_certificate
from test_transport import connected, free_port, http, post, raw, reset, transport_to, unanswering

from bulkwf.attempt import FaultKind, Reply
from bulkwf.transport import http as http_module
from bulkwf.transport.faults import MAX_HEADER_LINE_BYTES, MAX_HEADER_LINES

NOT_SENT, IN_DOUBT = FaultKind.NOT_SENT, FaultKind.IN_DOUBT


async def fault_of(base_url, **options):
    """Kind and message of the fault of a request, with `PORT` in place of the port."""
    async with transport_to(base_url, **options) as transport:
        fault, _ = await post(transport)
    return fault.kind, re.sub(r"(?<=:)\d{4,5}\b", "PORT", fault.message)


async def fault_of_answer(answer, scheme="http", tls=None, **options):
    """The same of a request that is answered by these bytes."""
    async with raw(answer, tls=tls) as server:
        return await fault_of(f"{scheme}://127.0.0.1:{server.port}", **options)


# --- no connection ------------------------------------------------------------------------------------------------


async def test_refused_connection_names_host_and_port():
    assert await fault_of(f"http://127.0.0.1:{free_port()}") == (NOT_SENT, "connection refused by 127.0.0.1:PORT")


async def test_address_of_ipv6_is_named_in_brackets():
    _, message = await fault_of(f"http://[::1]:{free_port()}")

    assert " [::1]:PORT" in message


async def test_name_that_can_not_be_resolved_is_named():
    kind, message = await fault_of("https://nowhere.invalid")

    assert kind is NOT_SENT
    assert re.fullmatch(r"the name nowhere\.invalid can't be resolved \([a-z][^()]+\)", message)


async def test_name_with_two_addresses_that_fail_differently_names_both_causes(monkeypatch):
    """As on a machine whose network has no IPv6."""
    port = free_port()

    def two_addresses(host, *_, **__):
        multicast = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("ff02::1", port, 0, 0))
        return [multicast, (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", two_addresses)
    kind, message = await fault_of(f"https://api.example:{port}")

    assert kind is NOT_SENT
    assert re.fullmatch(r"no connection to api\.example:PORT: [a-z ]+, [a-z ]+", message)
    assert "connection refused" in message


async def test_host_that_is_no_canonical_address_is_fatal():
    kind, message = await fault_of("https://127.1:9")

    assert (kind, message) == (
        FaultKind.FATAL,
        "the base URL has a host that can't be used: it is not a canonical IPv4 address",
    )


async def test_host_that_can_not_be_encoded_is_named():
    kind, message = await fault_of(f"https://{'a' * 70}.example:4443")

    assert kind is NOT_SENT
    assert re.fullmatch(r"no connection to a+\.example:PORT \(\w*Error\)", message)


async def test_connection_that_is_not_made_in_time_says_after_how_many_seconds(monkeypatch):
    monkeypatch.setattr(http_module, "CONNECT_TIMEOUT_S", 0.2)
    with unanswering() as port:
        kind, message = await fault_of(f"http://127.0.0.1:{port}")

    assert kind is NOT_SENT
    assert re.fullmatch(r"no connection to 127\.0\.0\.1:PORT within \d\.\d s", message)


async def test_time_limit_of_the_whole_request_means_not_sent_while_there_is_no_connection():
    with unanswering() as port:
        kind, message = await fault_of(f"http://127.0.0.1:{port}", timeout_s=0.2)

    assert kind is NOT_SENT
    assert message.startswith("no connection to 127.0.0.1:PORT within ")


async def test_time_limit_of_the_whole_request_means_not_sent_in_a_handshake_too():
    kind, message = await fault_of_answer(b"", "https", timeout_s=0.2)  # the server waits for the end of a header

    assert kind is NOT_SENT
    assert message.startswith("no connection to 127.0.0.1:PORT within ")


# --- a proxy ------------------------------------------------------------------------------------------------------

SET = "; HTTPS_PROXY is set and not used: give --proxy or BULKWF_PROXY"


@pytest.mark.parametrize(
    ("host", "environment", "hint"),
    [
        ("127.0.0.2", {"HTTPS_PROXY": "http://proxy.example:3128"}, SET),
        ("127.0.0.2", {"all_proxy": "http://proxy.example:3128"}, SET.replace("HTTPS_PROXY", "all_proxy")),
        ("127.0.0.2", {"HTTP_PROXY": "http://proxy.example:3128"}, ""),
        ("127.0.0.2", {"HTTPS_PROXY": "http://proxy.example:3128", "NO_PROXY": "127.0.0.2"}, ""),
        ("127.0.0.1", {"HTTPS_PROXY": "http://proxy.example:3128"}, ""),
    ],
)
async def test_proxy_of_the_environment_that_is_not_used_is_named(monkeypatch, host, environment, hint):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert await fault_of(f"https://{host}:{free_port()}") == (NOT_SENT, f"connection refused by {host}:PORT{hint}")


async def test_proxy_that_refuses_the_connection_is_named_and_no_other_is_advised(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    found = await fault_of("https://api.example", proxy=f"http://me:proxy-password@127.0.0.1:{free_port()}")

    assert found == (NOT_SENT, "connection refused by the proxy 127.0.0.1:PORT")


async def test_name_of_a_proxy_that_can_not_be_resolved_is_named():
    kind, message = await fault_of("https://api.example", proxy="http://me:proxy-password@nowhere.invalid:3128")

    assert kind is NOT_SENT
    assert message.startswith("the proxy's name nowhere.invalid can't be resolved (")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "the proxy 127.0.0.1:PORT closed the connection before its answer was complete"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "what the proxy 127.0.0.1:PORT answers is not HTTP"),
        (http(b"", "502 Bad Gateway"), "the proxy 127.0.0.1:PORT answers CONNECT with HTTP 502"),
    ],
)
async def test_proxy_that_fails_before_the_first_byte_means_not_sent(answer, message):
    async def say(writer, number):
        writer.write(answer)
        writer.close()

    async with raw(say) as proxy:
        assert await fault_of("https://api.example", proxy=proxy.url) == (NOT_SENT, message)


async def test_proxy_that_does_not_answer_in_time_is_named():
    async def hang(writer, number):
        await asyncio.get_running_loop().create_future()

    async with raw(hang) as proxy:
        kind, message = await fault_of("https://api.example", proxy=proxy.url, timeout_s=0.2)

    assert kind is NOT_SENT
    assert message.startswith("no connection to api.example:443 through the proxy 127.0.0.1:PORT within ")


# --- TLS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A good certificate, and others, each from an authority of its own."""
    kinds = {"good": {}, "wrong host": {"names": ("other.example",)}, "expired": {"days": -1}}
    return {kind: make_certificate(tmp_path_factory.mktemp("tls"), **how) for kind, how in kinds.items()}


async def test_unknown_authority_names_the_option_that_trusts_it(certificates):
    kind, message = await fault_of_answer(http(), "https", certificates["good"].server)

    assert kind is FaultKind.FATAL
    assert message == (
        "the certificate of 127.0.0.1:PORT is signed by an authority that this system does not trust "
        "(self-signed certificate in certificate chain). To trust it, name a file with its certificate: --ca-file"
    )


async def test_authority_that_the_named_file_does_not_hold_names_the_file(certificates):
    other = certificates["expired"].file
    kind, message = await fault_of_answer(http(), "https", certificates["good"].server, ca_file=other)

    assert kind is FaultKind.FATAL
    assert f"is signed by an authority that {other} (--ca-file) does not hold (" in message


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("wrong host", "IP address mismatch, certificate is not valid for '127.0.0.1'"),
        ("expired", "certificate has expired"),
    ],
)
async def test_certificate_that_is_not_valid_says_why(certificates, which, reason):
    shown = certificates[which]

    assert await fault_of_answer(http(), "https", shown.server, ca_file=shown.file) == (
        FaultKind.FATAL,
        f"the certificate of 127.0.0.1:PORT is not valid: {reason}",
    )


HANDSHAKES = {
    "no TLS": (b"HTTP/1.1 400 Bad Request\r\n\r\n", FaultKind.HANDSHAKE, r"{} does not answer in TLS \([A-Z_]+\)"),
    "alert": (
        b"\x15\x03\x03\x00\x02\x02\x50",  # internal_error
        FaultKind.HANDSHAKE,
        r"the TLS handshake with {} failed \([A-Z0-9_]*ALERT[A-Z_]*\)",
    ),
    "close": (b"", NOT_SENT, r"{} ended the connection while it was being made \(Connection\w+\)"),
    "reset": (None, NOT_SENT, r"no connection to {}: connection reset by peer"),
}


@pytest.mark.parametrize("which", HANDSHAKES)
async def test_handshake_that_fails_says_how(which):
    answer, kind, message = HANDSHAKES[which]

    async def serve(reader, writer):
        await reader.read(1_000)
        if answer is None:
            reset(writer)
        else:
            writer.write(answer)
            writer.close()

    async with connected(serve, "https") as transport:
        fault, written = await post(transport)

    assert (fault.kind, written) == (kind, 0)
    assert re.fullmatch(message.format(r"localhost:\d+"), fault.message)


async def test_connection_whose_tls_breaks_is_named_as_such(certificates):
    """Bytes that are no TLS come after the handshake."""
    good = certificates["good"]

    async def break_tls(writer, number):
        with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as below:
            below.send(b"x" * 100)
        await asyncio.get_running_loop().create_future()

    kind, message = await fault_of_answer(break_tls, "https", good.server, ca_file=good.file)

    assert kind is IN_DOUBT
    start = r"the connection to 127\.0\.0\.1:PORT broke before the answer was complete \(TLS, [A-Z_0-9]+\)"
    assert re.fullmatch(start, message)


# --- no complete answer -------------------------------------------------------------------------------------------


async def test_answer_that_does_not_come_in_time_says_after_how_many_seconds():
    async def hang(writer, number):
        await asyncio.get_running_loop().create_future()

    assert await fault_of_answer(hang, timeout_s=0.2) == (
        IN_DOUBT,
        "no complete answer from 127.0.0.1:PORT within 0.2 s (--timeout)",
    )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "127.0.0.1:PORT closed the connection before its answer was complete"),
        (b"HTTP/1.1 200 OK\r\nDate", "127.0.0.1:PORT closed the connection before its answer was complete"),
        (None, "127.0.0.1:PORT reset the connection before its answer was complete"),
        (http()[:-10], "the body of the answer from 127.0.0.1:PORT is incomplete or malformed"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "what 127.0.0.1:PORT answers is not HTTP"),
    ],
    ids=["close", "header cut", "reset", "body cut", "not HTTP"],
)
async def test_answer_that_is_not_complete_says_what_came(answer, message):
    async def say(writer, number):
        if answer is None:
            reset(writer)
        else:
            writer.write(answer)
            writer.close()

    assert await fault_of_answer(say) == (IN_DOUBT, message)


# --- large header sections ----------------------------------------------------------------------------------------


def headed(lines, line_bytes):
    """An answer with this number of header lines; one of them has this size, without its name."""
    many = b"X-Many: x\r\n" * (lines - 2)
    return b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Large: " + b"x" * line_bytes + b"\r\n" + many + b"\r\n"


async def test_answer_with_the_largest_header_section_is_read():
    largest = headed(MAX_HEADER_LINES, MAX_HEADER_LINE_BYTES - len("X-Large"))
    async with raw(largest) as server, transport_to(server.url) as transport:
        reply, _ = await post(transport)

    assert isinstance(reply, Reply)
    assert reply.status == 200


@pytest.mark.parametrize(
    ("lines", "line_bytes"), [(2, MAX_HEADER_LINE_BYTES + 1), (MAX_HEADER_LINES + 1, 1)], ids=["line", "lines"]
)
async def test_answer_with_a_larger_header_section_says_so_with_the_limits(lines, line_bytes):
    async def say(writer, number):
        writer.write(headed(lines, line_bytes))
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    kind, message = await fault_of_answer(say)

    assert kind is IN_DOUBT
    assert message == (
        "the header section of the answer from 127.0.0.1:PORT is too large: it has a line of more than 32,768 bytes, "
        "or more than 256 lines"
    )
