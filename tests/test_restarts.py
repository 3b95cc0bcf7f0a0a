"""Runs that are resumed on a machine whose clock is set: pauses and quotas of earlier sessions bind them."""

import asyncio
import contextlib
from pathlib import Path

import pytest
from fakes import TARGET, Machine, ServiceTransport, memory_folder, now, run_virtual, service, windows

from bulkwf import api
from bulkwf import run as run_module
from bulkwf.checkpoint import read_boot, read_status
from bulkwf.emulator import Limits
from bulkwf.emulator.limits import REQUEST_WINDOW_S
from bulkwf.errors import CheckpointError
from bulkwf.options import BatchLimits, Options, RateLimits, RetryPolicy

pytestmark = pytest.mark.slow

HOUR_S = 3_600.0
LEFT = 12
"""Requests left of the token's 1,200 after another tool's."""
OPTIONS = Options(
    rate=RateLimits(instances_per_s=None, concurrency=4),
    batch=BatchLimits(instances=10),
    retry=RetryPolicy(max_outage_s=2 * HOUR_S),
)


@pytest.fixture
def folder():
    with memory_folder() as name:
        yield Path(name)


class Night:
    """One list, one checkpoint, one service and one machine, for several sessions."""

    def __init__(self, folder, *, rows=400, requests=LEFT, options=OPTIONS, **more):
        self.file = folder / "run.bulkwf"
        self.rows = [{"instance_id": f"i{n}", "params": {}} for n in range(rows)]
        limits = Limits(instances_per_s=None, account_instances_per_s=None, requests_per_5m=requests)
        self.service = service(limits)
        self.transport = ServiceTransport(self.service, **more)
        self.machine = Machine()
        self.options = options

    async def session(self, cut_after_s=None):
        """One session, cut off after *cut_after_s* seconds; returns its summary, or None if it was cut off."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "system_clock", self.machine.clock)
            running = asyncio.ensure_future(
                api.submit_all(
                    self.rows,
                    workflow=TARGET.workflow,
                    account_id=TARGET.account,
                    api_token="t" * 20,
                    checkpoint=self.file,
                    options=self.options,
                    transport=self.transport,
                )
            )
            await asyncio.wait((running,), timeout=cut_after_s)
            if cut_after_s is not None:
                running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                return await running

    @property
    def sent(self):
        """When requests were sent."""
        return [request.at for request in self.transport.requests]

    @property
    def refused(self):
        """429 answers for the token's limit."""
        return self.service.admission.overruns["requests"]

    def sent_in_a_window(self):
        """The most requests in any five minutes."""
        written = sorted(request.written_at for request in self.transport.requests if request.written_at is not None)
        return windows([(at, 1) for at in written], REQUEST_WINDOW_S)


# --- what the service has left ------------------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [0, 3, 39])
@pytest.mark.parametrize("set_s", [0.0, HOUR_S, -HOUR_S])
def test_restarts_keep_to_the_quota_that_is_left(folder, restarts, set_s):
    async def go():
        night = Night(folder)
        for _ in range(restarts):
            await night.session(400 / (restarts + 1))
            night.machine.set_s += set_s
        return night, await night.session()

    night, summary = run_virtual(go())

    assert night.refused == 0
    assert summary.complete
    assert summary.created + summary.existed == len(night.rows)
    assert now() < 400 + 400 / 10 / LEFT * REQUEST_WINDOW_S * 2, "far under what was left"


def test_a_spent_quota_binds_the_next_session(folder):
    """Answers overtake each other, one says `r=0`: the next session waits for its end, and sends one probe."""

    async def go():
        night = Night(folder, requests=4, seed=1)
        await night.session(1.0)
        first = list(night.transport.requests)
        await night.session(REQUEST_WINDOW_S + 10)
        return night, first, night.transport.requests[len(first) :]

    night, first, later = run_virtual(go())

    said_at = next(request.ended_at for request in first if "r=0" in request.reply.headers["ratelimit"])
    assert said_at < max(request.ended_at for request in first), "the last answer is not one that was overtaken"
    assert night.refused == 0
    assert later[0].at == pytest.approx(said_at + REQUEST_WINDOW_S, abs=0.1)
    assert all(request.at >= later[0].ended_at for request in later[1:])


def test_requests_without_an_answer_count_against_the_quota(folder):
    """Answers are slow: twelve requests are left, and two sessions have four requests each on the wire at their end."""

    async def go():
        night = Night(folder, script=[{"from": 2, "latency_s": 50.0}], timeout_s=200.0)
        for _ in range(4):
            await night.session(10.0)
        return night, await night.session()

    night, summary = run_virtual(go())

    assert night.refused == 0
    assert summary.complete


# --- a clock that is set ------------------------------------------------------------------------------------------


def paused_night(folder, **more):
    return Night(folder, requests=None, script=[{"request": 3, "status": 429, "retry_after": 900}], **more)


@pytest.mark.parametrize("set_s", [0.0, HOUR_S, -HOUR_S, 48 * HOUR_S])
def test_setting_the_clock_within_a_boot_does_not_change_a_stored_pause(folder, set_s):
    async def go():
        night = paused_night(folder)
        await night.session(60.0)
        sent = len(night.sent)
        night.machine.set_s = set_s
        await night.session(10.0)
        assert len(night.sent) == sent
        summary = await night.session()
        return night.transport.requests[:sent], night.transport.requests[sent:], summary

    first, later, summary = run_virtual(go())

    (refused,) = (request for request in first if request.reply.status == 429)
    assert later[0].at == pytest.approx(refused.ended_at + 900)
    assert all(request.at >= later[0].ended_at for request in later[1:])  # one probe goes first
    assert summary.complete


def test_setting_the_clock_during_a_session_does_not_change_its_pause(folder):
    async def go():
        night = paused_night(folder)
        running = asyncio.ensure_future(night.session(60.0))
        await asyncio.sleep(0.001)
        night.machine.set_s = -HOUR_S
        await running
        night.machine.set_s = HOUR_S
        sent = len(night.sent)
        await night.session()
        return night.sent[sent]

    assert run_virtual(go()) == pytest.approx(900, abs=1)


@pytest.mark.parametrize("set_s", [HOUR_S, -HOUR_S])
def test_setting_the_clock_within_a_boot_does_not_shorten_the_request_window(folder, set_s):
    async def go():
        options = Options(
            rate=RateLimits(instances_per_s=None, requests_per_5m=LEFT, concurrency=4), batch=BatchLimits(instances=10)
        )
        night = Night(folder, requests=None, options=options)
        for _ in range(3):
            await night.session(20.0)
            night.machine.set_s += set_s
        await night.session()
        return night

    assert run_virtual(go()).sent_in_a_window() <= LEFT


def test_after_a_reboot_a_pause_is_counted_on_the_system_clock(folder):
    async def go():
        night = paused_night(folder)
        await night.session(60.0)
        sent = len(night.sent)
        night.machine.boot_anew()
        await asyncio.sleep(100.0)
        night.machine.set_s = 300.0
        await night.session()
        return night.sent[sent]

    assert run_virtual(go()) == pytest.approx(600, abs=1)


def test_a_session_soon_after_a_pause_begins_with_one_probe(folder):
    async def go():
        night = paused_night(folder)
        await night.session(60.0)
        await asyncio.sleep(1_000.0)
        sent = len(night.sent)
        await night.session()
        return night.transport.requests[sent:]

    first, *others = run_virtual(go())

    assert others
    assert all(request.at >= first.ended_at for request in others)


def test_setting_the_clock_back_does_not_make_ids_in_doubt_younger(folder):
    """They were sent four days ago, longer than the service remembers them."""

    async def go(set_s):
        night = Night(folder, requests=None, script=[{"hang": True, "when": "after"}])
        await night.session(30.0)
        await asyncio.sleep(4 * 24 * HOUR_S)
        night.machine.set_s = set_s
        sent = len(night.sent)
        with pytest.raises(CheckpointError, match="is sure to remember ids for"):
            await night.session()
        return len(night.sent) - sent

    assert run_virtual(go(-5 * 24 * HOUR_S)) == 0


def test_freezing_the_machine_does_not_make_ids_in_doubt_younger(folder):
    """The boot clock of a virtual machine stands still meanwhile; the system's clock is corrected afterwards."""

    async def go():
        night = Night(folder, requests=None, script=[{"hang": True, "when": "after"}])
        await night.session(30.0)
        frozen_s = 4 * 24 * HOUR_S
        await asyncio.sleep(frozen_s)
        night.machine.booted_at += frozen_s
        with pytest.raises(CheckpointError, match="is sure to remember ids for"):
            await night.session()

    run_virtual(go())


def test_all_times_of_one_boot_are_on_one_clock(folder):
    async def go():
        night = Night(folder, requests=None)
        await night.session(0.02)
        begun = read_status(night.file), read_boot(night.file)
        night.machine.set_s = HOUR_S
        await asyncio.sleep(50.0)
        await night.session()
        return *begun, read_status(night.file), read_boot(night.file)

    begun, first_boot, ended, last_boot = run_virtual(go())

    assert first_boot == last_boot
    assert ended.finished_at - begun.created_at == pytest.approx(50, abs=5)
