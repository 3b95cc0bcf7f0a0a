"""The real engine and the real emulator, with a proxy between them that injects the faults of networks.

After each fault, the run or its next session completes the list. Every row has created exactly one instance, with its
own params, and has the right outcome. Neither the token nor a row's params appear in an error, a log or a file.
"""

import asyncio
import contextlib
import gzip
import random
import sqlite3
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import faultproxy as net
import orjson
import pytest
from canary import PARAMS, TOKEN, assert_silent, assert_silent_files, report
from certificates import make_certificate
from command import bulkwf, measured
from fakes import memory_folder
from torture import figures, scaled

from bulkwf import (
    BatchLimits,
    Options,
    RateLimits,
    RetryPolicy,
    ServiceRefused,
    TemporaryStop,
    read_results,
    submit_all,
)
from bulkwf.emulator import Created, Limits, Service, emulate, read_log

pytestmark = pytest.mark.slow

LIMIT_S = 60.0
"""Only a test that fails takes this time."""
SHORT_TIMEOUT_S = 0.4
"""Time limit of a request in tests where an answer never comes."""
AT_ONCE = RetryPolicy(base_s=0.001, max_wait_s=0.002)
BATCH = 3
EVERY = scaled(64, 1)
"""A connection is cut at each byte, or at some."""
MEMORY_MB = 32
"""Most that an answer may add to the memory of a run: the longest body twice, as chunks and joined, and a margin."""


# --- runs through a proxy -----------------------------------------------------------------------------------------


def row(name, number):
    """A row with an id of its own, and params that no other row has."""
    return {"instance_id": f"{name}-{number}", "params": {"of": f"{name}-{number}", "secret": PARAMS}}


@dataclass
class Bench:
    """A service behind a proxy, and the runs through it, each with a list of its own."""

    service: Service
    emulated: str
    folder: Path
    proxy: net.Proxy | None = None
    base_url: str = ""
    lists: dict[str, int] = field(default_factory=dict)
    """The rows of each list."""

    def checkpoint(self, name):
        return self.folder / f"{name}.bulkwf"

    async def run(self, name, rows=2 * BATCH, batch=BATCH, concurrency=1, ca_file=None, within_s=LIMIT_S, **options):
        """Run a list, or run it once more; its summary."""
        self.lists[name] = rows
        settings = Options(
            batch=BatchLimits(instances=batch, rows=batch),
            rate=RateLimits(instances_per_s=None, requests_per_5m=None, concurrency=concurrency),
            ca_file=ca_file,
            **{"retry": AT_ONCE, "timeout_s": LIMIT_S, **options},
        )
        async with asyncio.timeout(within_s):
            return await submit_all(
                (row(name, number) for number in range(rows)),
                workflow="resize",
                account_id="acct",
                base_url=self.base_url,
                api_token=TOKEN,
                checkpoint=self.checkpoint(name),
                options=settings,
            )

    async def refused(self, kind, name, **more):
        """Run a list that ends with an error; its message. The error holds no secret."""
        with pytest.raises(kind) as raised:
            await self.run(name, **more)
        assert_silent(report(raised.value), "an error with its locals")
        assert_silent_files(self.folder)
        return str(raised.value)

    def outcomes(self, name, *, known=()):
        """The outcomes of the rows of a completed list, in their order.

        `known`: rows whose instances the service may have held before.
        """
        file = self.checkpoint(name)
        results = list(read_results(file))
        assert [(one.row, one.id) for one in results] == [(n, f"{name}-{n}") for n in range(self.lists[name])]
        assert not list(read_results(file, outcome="pending"))
        for one in results:
            existed = one.outcome == "existed" and (one.in_doubt or one.row in known)
            assert existed or one.outcome == "created", (one, attempts_around(file, one.row))
        assert_silent_files(self.folder, file.name + "*")
        return [one.outcome for one in results]

    def account(self):
        """Check that every row of all lists has created one instance, with its own params; a line for the report."""
        rows = (row(name, number) for name, rows in self.lists.items() for number in range(rows))
        due = Counter(Created(one["instance_id"], f"{crc32(orjson.dumps(one['params'])):08x}") for one in rows)
        created = Counter(read_log(self.folder / "log"))
        lost, extra = (due - created).total(), (created - due).total()
        assert (lost, extra) == (0, 0), (due - created, created - due)
        return f"{due.total():,} rows: {lost} lost, {extra} created twice or with other params"


def attempts_around(file, row):
    """All attempts of the batch that holds a row."""
    query = "SELECT * FROM attempt WHERE first_row = (SELECT max(first_row) FROM batch WHERE first_row <= ?)"
    with contextlib.closing(sqlite3.connect(file)) as db:
        return db.execute(query, (row,)).fetchall()


@contextlib.asynccontextmanager
async def bench(*faults):
    with memory_folder() as place:
        folder = Path(place)
        service = Service(Limits.none(), time.monotonic)
        async with emulate(service, log=folder / "log") as emulator:
            made = Bench(service, emulator.base_url, folder)
            async with net.listening(net.Proxy, emulator.base_url) as proxy:
                proxy.faults.extend(faults)
                made.proxy, made.base_url = proxy, base_url(proxy)
                yield made
                made.account()


def base_url(listener, scheme="http"):
    return f"{scheme}://{net.HOST}:{listener.port}/client/v4"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A good certificate, and others."""
    kinds = {"good": {}, "wrong host": {"names": ("other.example",)}, "expired": {"days": -1}, "self-signed": {}}
    return {kind: make_certificate(tmp_path_factory.mktemp("tls"), **how) for kind, how in kinds.items()}


# --- each fault once ----------------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"
PORTAL = OK + b"\r\n<html>Please log in</html>"
EARLY = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n"
CHUNKS = OK + b"Transfer-Encoding: chunked\r\n\r\n"
MEGABYTE = b" " * 0x100000
BOMB = gzip.compress(300 * MEGABYTE, 1)
CREATED, EXISTED, EITHER = (0, 0), (BATCH, 2 * BATCH), (0, 2 * BATCH)
"""Least and greatest number of rows whose outcome is `existed`: whether the service acted on the first request."""
FAULTS = {
    "latency": (net.delayed(0.03, 0.03), CREATED),
    "slow drip": (net.dripped(64, 0.002), CREATED),
    "reset before the request": (net.reset_unasked, CREATED),
    "closed before the request": (net.closed_unasked, CREATED),
    "reset in the request": (net.reset_in_request, CREATED),
    "request cut in its head, FIN": (net.cut_request(100, "FIN"), CREATED),
    "request cut in its body, FIN": (net.cut_request(500, "FIN"), CREATED),
    "request cut in its body, RST": (net.cut_request(500, "RST"), CREATED),
    "reset after the request": (net.cut_answer(0, "RST"), EXISTED),
    "closed after the request": (net.cut_answer(0, "FIN"), EXISTED),
    "answer cut in its head, FIN": (net.cut_answer(60, "FIN"), EXISTED),
    "answer cut in its body, FIN": (net.cut_answer(250, "FIN"), EXISTED),
    "answer cut in its body, RST": (net.cut_answer(250, "RST"), EXISTED),
    "half-close to the service": (net.half_closed_to_service, EITHER),
    "half-close to the client": (net.half_closed_to_client, EXISTED),
    "late answer": (net.late_answer, EXISTED),
    "late request": (net.late_request, EITHER),
    "answer twice": (net.twice, EITHER),
    "answer again with the next": (net.again, EITHER),
    "answer in place of the next": (net.in_place_of_the_next, EITHER),
    "garbage": (net.answered_with(b"\x00\xff" * 500), EXISTED),
    "another protocol": (net.answered_with(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), EXISTED),
    "garbage status line": (net.altered(lambda answer: answer.replace(b"200", b"2oo", 1)), EXISTED),
    "status line of a refusal": (net.answered_with(b"HTTP/1.1 400 Bad"), EXISTED),
    "oversized header": (net.altered(net.with_headers(b"X-Large: " + b"x" * 200_000)), EXISTED),
    "header after header": (net.altered(net.with_headers(*[b"X-Many: x"] * 20_000)), EXISTED),
    "gzip": (net.altered(net.with_headers(b"Content-Encoding: gzip")), EXISTED),
    "content-length too large": (net.altered(net.with_longer_length(+7)), EXISTED),
    "content-length too large, and silence": (net.altered(net.with_longer_length(+7), end=False), EXISTED),
    "content-length too small": (net.altered(net.with_longer_length(-7), end=False), EXISTED),
    "content-length negative": (net.altered(net.with_longer_length(-100_000)), EXISTED),
    "two content-lengths": (net.altered(net.with_headers(b"Content-Length: 5")), EXISTED),
    "content-length and chunks": (net.altered(net.with_headers(b"Transfer-Encoding: chunked")), EXISTED),
    "no content-length": (net.altered(net.without_length), CREATED),
    "chunks": (net.altered(net.chunked(5), end=False), CREATED),
    "chunks, cut": (net.altered(lambda answer: net.chunked(5)(answer)[:-20]), EXISTED),
    "100 and 103 first": (net.altered(lambda answer: EARLY + answer), CREATED),
    "no body": (net.answered_with(OK + b"Content-Length: 0\r\n\r\n"), EXISTED),
    "204": (net.answered_with(b"HTTP/1.1 204 No Content\r\n\r\n"), EXISTED),
    "captive portal": (net.answered_with(PORTAL, acts=False), CREATED),
    "bad gateway": (net.answered_with(b"HTTP/1.1 502 Bad Gateway\r\n\r\n<html>"), EXISTED),
}
TOO_MUCH = {
    "gzip bomb": net.answered_with(OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB) + BOMB),
    "chunked gzip bomb": net.answered_with(CHUNKS[:-2] + b"Content-Encoding: gzip\r\n\r\n%x\r\n" % len(BOMB) + BOMB),
    "endless chunks": net.endless(CHUNKS, b"%x\r\n%s\r\n" % (len(MEGABYTE), MEGABYTE)),
    "endless chunk": net.endless(CHUNKS + b"fffffffffff\r\n", MEGABYTE),
    "endless head of a chunk": net.endless(CHUNKS + b"5;", MEGABYTE.replace(b" ", b"x")),
    "endless trailer": net.endless(CHUNKS + b"0\r\n", 60_000 * b"X-Many: x\r\n"),
    "endless header": net.endless(OK + b"X-Long: ", MEGABYTE.replace(b" ", b"x")),
    "endless headers": net.endless(OK, 60_000 * b"X-Many: x\r\n"),
    "endless status line": net.endless(b"HTTP/1.1 200 ", MEGABYTE),
    "huge content-length": net.endless(OK + b"Content-Length: 999999999999999\r\n\r\n", MEGABYTE),
    "no content-length, no end": net.endless(OK + b"\r\n", MEGABYTE),
    "100 for ever": net.endless(b"", 2_000 * b"HTTP/1.1 100 Continue\r\n\r\n"),
}
"""Answers that are endless, or too large to be read to their end."""
FAULTS |= {name: (fault, EXISTED) for name, fault in TOO_MUCH.items()}
HANG = ("late answer", "late request", "content-length too large, and silence")
TIMEOUTS = {name: {"timeout_s": SHORT_TIMEOUT_S} for name in (*HANG, "endless head of a chunk", "100 for ever")}
"""Faults that last until the time limit of the request."""


@pytest.mark.parametrize("name", FAULTS)
async def test_run_completes_after_a_fault_of_the_network(name, caplog):
    caplog.set_level(0)
    asyncio.get_running_loop().set_debug(True)
    fault, (least, most) = FAULTS[name]
    async with bench(fault) as through:
        summary = await through.run("a", **TIMEOUTS.get(name, {}))
        await through.proxy.quiet()

        assert not through.proxy.faults
        assert (summary.exit_code, summary.complete) == (0, True)
        found = through.outcomes("a")
    assert least <= found.count("existed") <= most
    assert summary.attempts <= 8
    assert_silent(caplog.text, "a log")


@pytest.mark.parametrize("name", [name for name, (fault, _) in FAULTS.items() if fault not in net.UNASKED])
async def test_look_up_completes_after_a_fault_of_the_network(name):
    fault, _ = FAULTS[name]
    async with bench(net.cut_answer(0, "FIN"), net.untouched, fault) as through:
        summary = await through.run("a", rows=1, **TIMEOUTS.get(name, {}))
        await through.proxy.quiet()

        assert not through.proxy.faults
        assert through.outcomes("a") == ["existed"]
        assert through.proxy.requests == summary.attempts  # else some did not count in the limits


async def test_row_that_a_copied_answer_omits_is_in_doubt():
    """An answer without ids (all of its rows existed) is sent again as the answer to the next request."""
    async with bench() as through:
        await through.run("a", rows=BATCH)
        through.checkpoint("a").unlink()
        through.proxy.faults.append(net.again)
        await through.run("a", rows=2 * BATCH)
        through.outcomes("a", known=range(BATCH))


# --- a cut at any byte --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "cut"), [("request", net.cut_request), ("answer", net.cut_answer)])
async def test_run_completes_when_a_connection_is_cut_at_any_byte(what, cut, certificates):
    lengths = {}

    async def measure(link):
        lengths["request"] = len(request := await link.request())
        lengths["answer"] = len(answer := await link.ask(request))
        await link.client.send(answer)

    async with bench(measure) as through:
        quick = certificates["good"].file  # or each run would read all the authorities of the system
        await through.run("uncut-all", rows=BATCH, ca_file=quick)
        whole = lengths[what]
        places = range(0, whole + EVERY, EVERY)
        for at in places:
            for how in net.ENDS:
                name = f"{at:05}-{how}"
                through.proxy.faults.append(cut(at, how))
                assert (await through.run(name, rows=BATCH, ca_file=quick)).exit_code == 0
                expected = "created" if what == "request" else "existed"
                assert through.outcomes(name) == BATCH * [expected] or at >= whole, name
        figures.append(f"{2 * len(places):,} cuts of {what}s of {whole} bytes, {through.account()}")


@pytest.mark.parametrize("way", ["up", "down"])
async def test_run_completes_when_a_tls_connection_is_cut_at_any_byte(way, certificates):
    """A handshake that is cut does not end a run."""
    certificate = certificates["good"]
    async with (
        bench() as through,
        net.listening(net.Proxy, through.emulated, tls=certificate.server) as secure,
        net.listening(net.Tunnel, secure.port) as tunnel,
    ):
        through.base_url = base_url(tunnel, "https")
        await through.run("uncut-all", rows=BATCH, ca_file=certificate.file)
        whole = tunnel.passed[way]
        places = range(0, whole, EVERY)
        for at in places:
            for how in net.ENDS:
                name = f"{at:05}-{how}"
                tunnel.cut = (way, at, how)
                assert (await through.run(name, rows=BATCH, ca_file=certificate.file)).exit_code == 0
                through.outcomes(name)
                assert tunnel.cut is None
        figures.append(f"{2 * len(places):,} cuts of TLS, {way}, of {whole} bytes, {through.account()}")


# --- a long run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20260401, 20260401 + scaled(1, 10)))
async def test_long_run_completes_under_a_mixture_of_all_faults(seed):
    rows, share = scaled(2_000, 10_000), 0.4
    chance, faults = random.Random(seed), [fault for fault, _ in FAULTS.values()]
    plan = [chance.choice(faults) if chance.random() < share else net.untouched for _ in range(rows)]
    async with bench(*plan) as through:
        sessions, summary = 0, None
        while summary is None:
            sessions += 1
            with contextlib.suppress(ServiceRefused):  # three answers in a row that are not the service's
                summary = await through.run("a", rows, 20, 8, within_s=10 * LIMIT_S, timeout_s=SHORT_TIMEOUT_S)
            assert sessions <= 20
        await through.proxy.quiet()

        assert (summary.exit_code, summary.complete) == (0, True)
        found = Counter(through.outcomes("a"))
        applied = plan[: len(plan) - len(through.proxy.faults)]
        faulty = len(applied) - applied.count(net.untouched)
        assert faulty >= rows // 100
        figures.append(
            f"seed {seed}: {faulty:,} of {len(applied):,} requests had a fault, {sessions} sessions, {dict(found)}, "
            f"{through.account()}"
        )


# --- what ends a run ----------------------------------------------------------------------------------------------


ODD_ANSWERS = [
    {"status": 401},
    {"status": 403},
    {"status": 404},
    {"status": 302, "body": "", "headers": {"location": "https://elsewhere.example/"}},
    {"status": 405},
    {"status": 501},
    {"status": 403, "html": True},
    {"status": 400, "code": 10000},
    {"status": 200, "body": "<html>ok</html>"},
    {"status": 400, "body": "<html>bad request</html>"},
]


@pytest.mark.parametrize("number", scaled([1], [1, 2]))
async def test_one_odd_answer_does_not_end_a_run_that_has_created_rows(folder, number):
    """Each kind in a run of its own, all at the same time: each waits for its probes."""

    async def go(kind, odd):
        service = Service(Limits.none(), time.monotonic)
        async with emulate(service, faults=[{"request": 5, "times": number, **odd}]) as emulator:
            options = Options(rate=RateLimits(instances_per_s=None, requests_per_5m=None))
            rows = [{"instance_id": f"{kind}-{at}"} for at in range(2_000)]
            place = {"workflow": "resize", "account_id": "acct", "base_url": emulator.base_url, "api_token": TOKEN}
            return await submit_all(rows, **place, checkpoint=folder / f"{kind}.bulkwf", options=options)

    summaries = await asyncio.gather(*(go(kind, odd) for kind, odd in enumerate(ODD_ANSWERS)))

    assert [(summary.created + summary.existed, summary.exit_code) for summary in summaries] == [(2_000, 0)] * 10


async def test_alert_in_a_later_handshake_does_not_end_the_run(certificates):
    good = certificates["good"]
    async with bench() as through:
        async with (
            net.listening(net.Proxy, through.emulated, tls=good.server) as secure,
            net.listening(net.Tunnel, secure.port) as way,
        ):
            secure.faults.extend([net.altered(lambda answer: answer)] * 10)  # a connection for each request
            way.alert_at, through.base_url = 3, base_url(way, "https")
            summary = await through.run("a", rows=4 * BATCH, ca_file=good.file)

        assert (summary.created, way.connections) == (4 * BATCH, 5)
        assert set(through.outcomes("a")) == {"created"}


async def test_alert_in_the_first_handshake_does_not_end_the_run(certificates):
    good = certificates["good"]
    async with bench() as through:
        async with (
            net.listening(net.Proxy, through.emulated, tls=good.server) as secure,
            net.listening(net.Tunnel, secure.port) as way,
        ):
            way.alert_at, through.base_url = 1, base_url(way, "https")
            await through.run("a", ca_file=good.file)

        assert set(through.outcomes("a")) == {"created"}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_ends_the_run_and_its_target_receives_nothing(status):
    async with bench() as through, net.listening(net.Proxy, through.emulated) as other:
        place = f"{base_url(other)}/login?for={TOKEN}"
        redirect = f"HTTP/1.1 {status} Elsewhere\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n"
        through.proxy.faults.extend(10 * [net.answered_with(redirect.encode(), acts=False, end=False)])
        message = await through.refused(ServiceRefused, "a")

        assert f"HTTP {status}, a redirect to {base_url(other)}" in message
        assert (other.connections, through.service.requests) == (0, 0)
        through.proxy.faults.clear()
        await through.run("a")
        assert set(through.outcomes("a")) == {"created"}


ENDINGS = {
    # The fault of every request, the error that ends the run, and a part of its message.
    "captive portal": (
        net.answered_with(PORTAL),
        ServiceRefused,
        "base URL and any proxy",
    ),
    "switched protocol": (
        net.answered_with(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
        ServiceRefused,
        "HTTP 101",
    ),
    "resets": (net.cut_answer(0, "RST"), TemporaryStop, "--max-outage"),
    "silence": (net.late_answer, TemporaryStop, "no complete answer from 127.0.0.1:"),
}


@pytest.mark.parametrize("name", ENDINGS)
async def test_persistent_fault_ends_the_run_with_its_reason_and_the_run_resumes(name):
    fault, kind, reason = ENDINGS[name]
    async with bench(*[fault] * 10_000) as through:
        message = await through.refused(
            kind, "a", timeout_s=SHORT_TIMEOUT_S, retry=RetryPolicy(base_s=0.001, max_wait_s=0.002, max_outage_s=0.5)
        )
        assert reason in message
        through.proxy.faults.clear()
        created = through.service.created
        await through.run("a")
        assert through.outcomes("a").count("existed") == created >= BATCH


# --- the command: TLS, and memory ---------------------------------------------------------------------------------


def words(through, listener, *more, scheme="http", rows=2):
    """Arguments of the command that runs a list through a listener."""
    through.lists["a"] = rows
    file = through.folder / "rows.jsonl"
    file.write_bytes(b"".join(orjson.dumps(row("a", number)) + b"\n" for number in range(rows)))
    place = ("--base-url", base_url(listener, scheme), "-c", through.checkpoint("a"))
    return ("run", file, "-w", "resize", *place, *more)


INSECURE = {
    # What the server shows, and how the message of the command begins.
    "wrong host": "no connection can be made: the certificate of {} is not valid: IP address mismatch, ",
    "expired": "no connection can be made: the certificate of {} is not valid: certificate has expired. Check ",
    "self-signed": "no connection can be made: the certificate of {} is signed by an authority that ",
    "plain HTTP": "no secure connection can be made: {} does not answer in TLS (WRONG_VERSION_NUMBER). Check ",
}


@pytest.mark.parametrize("kind", INSECURE)
async def test_insecure_connection_exits_with_3_and_sends_nothing(kind, folder, certificates):
    good, shown = certificates["good"], certificates.get(kind)
    trusted = shown if kind in ("wrong host", "expired") else good
    async with bench() as through:
        async with (
            net.listening(net.Proxy, through.emulated, tls=shown and shown.server) as insecure,
            net.listening(net.Tunnel, insecure.port if shown else through.emulated) as way,
        ):
            arguments = words(through, way, "--ca-file", trusted.file, scheme="https")
            ended = await asyncio.to_thread(bulkwf, *arguments)
            tries = 1 if shown else 4  # a server that speaks no TLS may be an overloaded one
            assert (ended.code, through.service.requests, way.connections) == (3, 0, tries), ended.err
            assert f"bulkwf: {INSECURE[kind].format(f'127.0.0.1:{way.port}')}" in ended.err, ended.err
        async with net.listening(net.Proxy, through.emulated, tls=good.server, port=way.port) as secure:
            arguments = words(through, secure, "--ca-file", good.file, scheme="https")
            assert (await asyncio.to_thread(bulkwf, *arguments)).code == 0
            assert set(through.outcomes("a")) == {"created"}


@pytest.fixture(scope="module")
def usual_mb(tmp_path_factory):
    """Peak memory of a run without a fault, in MB."""

    async def run():
        async with bench() as through:
            return await asyncio.to_thread(measured, *words(through, through.proxy))

    with contextlib.chdir(tmp_path_factory.mktemp("usual")):
        return asyncio.run(run()).peak_mb


@pytest.mark.parametrize(
    "name", scaled(["gzip bomb", "endless chunks", "endless head of a chunk", "endless trailer"], list(TOO_MUCH))
)
async def test_endless_answer_takes_little_memory(name, folder, usual_mb):
    async with bench(TOO_MUCH[name]) as through:
        ended = await asyncio.to_thread(measured, *words(through, through.proxy, "--timeout", "2"))
        assert (ended.code, set(through.outcomes("a"))) == (0, {"existed"}), ended.err
    more_mb = ended.peak_mb - usual_mb
    figures.append(f"{name}: {more_mb:.0f} MB more than a run takes anyway")
    assert more_mb < MEMORY_MB
