"""Neither a token nor a row's params are in an error that bulkwf raises, in the locals of its frames, or in a log.

Error trackers keep the locals of each frame of a traceback. What commands print and keep is searched after every
command of every test, in `command.py`; errors and checkpoints of the simulation, after every session.
"""

import asyncio
import base64
import gzip
import json
import logging
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from canary import PARAMS, TOKEN, assert_silent, assert_silent_files, report
from command import bulkwf, emulator, write_rows

from bulkwf import CheckpointError, ConfigError, Options, RateLimits, RetryPolicy, submit_all, submit_stream
from bulkwf.emulator import Limits, Service, emulate

pytestmark = pytest.mark.slow

FAST = RateLimits(instances_per_s=None, requests_per_5m=None)


@pytest.mark.parametrize(
    "output", [TOKEN, PARAMS, quote(PARAMS), *(base64.b64encode(b"x" * n + TOKEN.encode() + b"yz") for n in range(3))]
)
def test_a_canary_is_found_in_each_form(output):
    with pytest.raises(AssertionError, match="the log holds the canary"):
        assert_silent(b"before " + (output.encode() if isinstance(output, str) else output) + b" after", "the log")


def rows(n=250):
    return [{"instance_id": f"id-{i}", "params": {"n": i, "secret": PARAMS}} for i in range(n)]


def known(base_url, **options):
    """The arguments of a run that leads to *base_url*."""
    options = {"rate": FAST, "retry": RetryPolicy(base_s=0.001, max_outage_s=0.05), **options}
    return {
        "workflow": "resize",
        "account_id": "acct",
        "base_url": base_url,
        "api_token": TOKEN,
        "checkpoint": "run.bulkwf",
        "options": Options(**options),
    }


def emulated(*faults):
    return emulate(Service(Limits.none(), time.monotonic), faults=faults)


def breaking():
    yield from rows()
    raise OSError("gone")


async def breaking_later():
    for row in rows():
        yield row
    raise OSError("gone")


def cut_gzip():
    lines = "".join(json.dumps(row) + "\n" for row in rows(50_000)).encode()
    Path("rows.jsonl.gz").write_bytes(gzip.compress(lines)[:-100])
    return "rows.jsonl.gz"


async def draw(given, arguments, *, streamed):
    """Submit, by either of the two ways."""
    if not streamed:
        return await submit_all(given, **arguments)
    async with submit_stream(given, **arguments) as results:
        return [result async for result in results]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("fault", "given"),
    [
        ({"status": 401}, rows),
        ({"status": 403, "html": True}, rows),
        ({"status": 404}, rows),
        ({"status": 302, "headers": {"Location": "http://127.0.0.1:9/"}}, rows),
        ({"status": 500}, rows),
        ({"reset": True}, rows),
        ({"raw": "SSH-2.0-OpenSSH_9.6\r\n"}, rows),
        ({"status": 200, "body": "[]"}, rows),
        ({"foreign": 1}, rows),
        ({"status": 429, "retry_after": 100_000}, rows),
        ({"status": 418, "code": 10002, "message": f"what you sent: {TOKEN}"}, rows),
        ({"refuse_ids": "."}, rows),
        ({"contains_id": "nobody", "status": 500}, breaking),
        ({"contains_id": "nobody", "status": 500}, breaking_later),
        ({"contains_id": "nobody", "status": 500}, cut_gzip),
        ({"contains_id": "nobody", "status": 500}, lambda: 7),
    ],
    ids=lambda value: value.__name__ if callable(value) else json.dumps(value)[:40],
)
async def test_an_error_with_all_its_locals_holds_no_secret(folder, caplog, fault, given, streamed):
    caplog.set_level(logging.DEBUG)
    async with emulated(fault) as service:
        with pytest.raises(Exception) as raised:  # which one it is, others test
            await draw(given(), known(service.base_url), streamed=streamed)
    assert_silent(report(raised.value), "the error")
    assert_silent(caplog.text, "the log")
    assert_silent_files(folder)


@pytest.mark.parametrize("token", [f"{TOKEN} {TOKEN}", f"{TOKEN}\n{TOKEN}", f"{TOKEN}é", lambda: f"{TOKEN}\0"])
async def test_the_error_for_a_malformed_token_does_not_hold_it(folder, token):
    with pytest.raises(ConfigError) as raised:
        await submit_all(rows(), **(known("http://127.0.0.1:9") | {"api_token": token}))
    assert_silent(report(raised.value), "the error")


async def test_a_failing_checkpoint_reveals_no_secret(folder):
    async with emulated() as service:
        arguments = known(service.base_url)

        def spoil(progress):
            if Path("run.bulkwf").exists():
                Path("run.bulkwf").rename("elsewhere")

        with pytest.raises(CheckpointError) as raised:
            await submit_all(rows(5_000), **arguments, on_progress=spoil)
    assert_silent(report(raised.value), "the error")


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_timeout_around_a_run_reveals_no_secret(folder, streamed):
    async with emulated({"hang": True}) as service:
        with pytest.raises(TimeoutError) as raised:
            async with asyncio.timeout(0.2):
                await draw(rows(), known(service.base_url, drain_timeout_s=0.1), streamed=streamed)
    assert_silent(report(raised.value), "the error")


async def test_an_error_in_an_observer_reveals_no_secret(folder, caplog):
    raised = []

    def fail(_):
        raised.append(LookupError("no dashboard"))
        raise raised[-1]

    async with emulated() as service:
        await submit_all(rows(), **known(service.base_url), observers=[fail])
    assert raised
    for error in raised:
        assert_silent(report(error), "the error")
    assert_silent(caplog.text, "the log")


DEV = {"PYTHONDEVMODE": "1", "PYTHONASYNCIODEBUG": "1"}


def test_a_run_in_pythons_development_mode_reveals_no_secret(folder):
    faults = [
        {"request": 2, "status": 500, "when": "after"},
        {"request": 4, "reset": True},
        {"request": 6, "truncate": 40},
        {"request": 8, "latency_s": 0.3},
        {"refuse_ids": "^row-77$"},
    ]
    write_rows("rows.jsonl", 1_000)
    with emulator(faults=faults) as service:
        ended = bulkwf("run", "rows.jsonl", *service.flags(), env=DEV)
    assert ended.code == 1, ended.err


@pytest.mark.parametrize("fault", [{"status": 401}, {"status": 302}, {"foreign": 1}, {"raw": "220 smtp\r\n"}])
def test_a_failing_command_in_development_mode_reveals_no_secret(folder, fault):
    write_rows("rows.jsonl", 300)
    with emulator(faults=[fault]) as service:
        ended = bulkwf("run", "rows.jsonl", *service.flags(), "--max-outage", "0s", env=DEV)
    assert ended.code in (3, 75), ended.err
