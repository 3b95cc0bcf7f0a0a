"""One request with its faults: what is executed, what goes out, and that every transport makes the same of it."""

import asyncio
import time

import orjson
import pytest
from fakes import RUN_TARGET, TARGET, Leave, ServiceTransport, run_virtual

from bulkwf.attempt import Reply
from bulkwf.emulator import Call, Caller, Exchange, Limits, Service, emulate, parse_script
from bulkwf.options import Options, Target
from bulkwf.service.requests import create_batch, get_instance, list_instances
from bulkwf.transport.credentials import Credentials
from bulkwf.transport.http import AiohttpTransport

INSTANCES = "/accounts/acct/workflows/resize/instances"


def make_exchange(*rules, limits=None):
    service = Service(limits or Limits.none(), lambda: 0.0)
    return Exchange(service, parse_script(list(rules)), draw=lambda: 0.5, wall=lambda: 1e9)


def play(exchange, method="POST", path=INSTANCES + "/batch", *ids):
    body = orjson.dumps([{"instance_id": id_} for id_ in ids]) if ids else b""
    return exchange.execute(exchange.arrive(Call(method, path, Caller("Bearer token"), body=body)))


# ── What is executed, and what goes out ──


@pytest.mark.parametrize("ending", [{"status": 500}, {"reset": True}, {"close": True}, {"hang": True}, {"raw": "?"}])
def test_a_deletion_that_ends_before_its_execution_deletes_nothing(ending):
    exchange = make_exchange({"request": 2} | ending, {"request": 3, "when": "after"} | ending)
    play(exchange, "POST", INSTANCES + "/batch", "a")

    play(exchange, "DELETE", INSTANCES + "/a")
    assert exchange.service.ids(TARGET) == ["a"]
    play(exchange, "DELETE", INSTANCES + "/a")
    assert exchange.service.ids(TARGET) == []


def test_an_answer_is_cut_only_where_it_is_longer_than_the_cut():
    whole = play(make_exchange(), "GET", INSTANCES).answer.body
    cut = play(make_exchange({"truncate": len(whole) - 1}), "GET", INSTANCES)
    uncut = play(make_exchange({"truncate": len(whole)}), "GET", INSTANCES)

    assert (cut.manner, cut.data, cut.answer.body) == ("truncate", whole[:-1], whole)
    assert (uncut.manner, uncut.data, uncut.answer.body, uncut.disconnects) == ("reply", b"", whole, True)


def test_only_answers_of_the_service_itself_have_the_rate_headers():
    exchange = make_exchange({"request": 2, "status": 429}, {"request": 3, "twice": True}, limits=Limits())
    outgoing = [play(exchange, "GET", INSTANCES) for _ in range(3)]

    assert ["Ratelimit" in one.answer.headers for one in outgoing] == [True, False, True]
    assert [one.own is not None for one in outgoing] == [True, False, True]


def test_delays_are_those_of_the_script_and_a_late_answer_has_the_headers_of_its_execution():
    exchange = make_exchange({"latency_s": 2}, {"latency_s": 3, "when": "after"}, limits=Limits())
    arrival = exchange.arrive(Call("GET", INSTANCES, Caller("Bearer token")))
    outgoing = exchange.execute(arrival)
    play(exchange, "GET", INSTANCES)

    assert (arrival.delay_s, outgoing.delay_s) == (2.0, 3.0)
    assert outgoing.answer.headers["Ratelimit"].startswith('"default";r=1199;')


# ── Every transport makes the same of it ──

REQUESTS = (
    create_batch(RUN_TARGET, b'[{"instance_id":"a"},{"instance_id":"b-1"}]'),
    get_instance(RUN_TARGET, "b-1"),
    get_instance(RUN_TARGET, "no-such-id"),
    list_instances(RUN_TARGET, {"per_page": "1"}),
)
HEADERS = ("location", "ratelimit", "retry-after")


async def replies(transport, requests):
    """What the transport returns for each request, without what differs from one connection to the next."""
    found = [await transport.send(request, Leave()) for request in requests]
    return [
        (one.status, one.body, {name: one.headers[name] for name in HEADERS if name in one.headers})
        if isinstance(one, Reply)
        else one.kind
        for one in found
    ]


async def replies_over_http(rule, requests):
    service = Service(Limits(), lambda: 0.0)
    async with emulate(service, faults=[rule]) as emulator:
        target = Target(base_url=emulator.base_url, account_id=TARGET.account, workflow=TARGET.workflow)
        credentials = Credentials(lambda: {"Authorization": "Bearer t0"})
        transport = AiohttpTransport(target, credentials, Options(), clock=time.monotonic, wall=time.time)
        try:
            found = await replies(transport, requests)
        finally:
            await transport.aclose()
        return found, service.ids(TARGET), emulator.fired


async def replies_without_a_network(rule, requests):
    service = Service(Limits(), lambda: 0.0)
    transport = ServiceTransport(service, script=[rule], travel_s=(0.0, 0.0))
    return await replies(transport, requests), service.ids(TARGET), transport.exchange.fired


@pytest.mark.parametrize(
    "rule",
    [
        {"omit": 1},
        {"omit_created": "^b"},
        {"foreign": 1, "repeat": True},
        {"refuse_ids": "^b"},
        {"revoke_token": True, "request": 2},
        {"disconnect": True},
        {"latency_s": 0.001, "when": "after"},
        {"status": 500, "when": "after"},
        {"status": 429, "retry_after": 7},
        {"status": 302, "body": "", "headers": {"Location": "https://elsewhere.example/"}},
        {"status": 200, "body": "{"},
        {"status": 503, "html": True, "partial": 1},
        {"reset": True},
        {"close": True, "partial": 1},
        {"raw": "HTTP/1.1 banana\r\n\r\n"},
        {"truncate": 0},
        {"truncate": 150},
        {"truncate": 10_000},
        {"twice": True},
    ],
    ids=repr,
)
async def test_a_transport_without_a_network_returns_what_the_http_transport_returns(rule):
    requests = REQUESTS[:1] if "twice" in rule else REQUESTS  # the second copy meets the next request of a connection
    over_http = await replies_over_http(rule, requests)
    without = await asyncio.to_thread(lambda: run_virtual(replies_without_a_network(rule, requests)))

    assert over_http == without
