"""What a session restores from earlier sessions: sent requests, pause, quota; and the clocks."""

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from fakes import Machine, clock, now, run_virtual, wall

from bulkwf import parts as wiring
from bulkwf.checkpoint import Past
from bulkwf.clock import UNKNOWN_BOOT
from bulkwf.errors import TemporaryStop
from bulkwf.limits.limiter import WindowLimiter
from bulkwf.limits.quota import Said
from bulkwf.limits.window import BLIND_MARGIN_S, LOOPBACK_MARGIN_S, NETWORK_MARGIN_S
from bulkwf.options import Options, RateLimits, Target
from bulkwf.parts import open_limiter, restore, system_clock

OPTIONS = Options(rate=RateLimits(instances_per_s=100, requests_per_5m=4))


def first_slots(attempts, paused_s=0.0, slots=1, words=()):
    """When slots are given, in seconds from now, as all times here.

    `attempts` are earlier requests (when, instances), `words` quotas (when, header). A pause lasts for `paused_s` more.
    """

    async def run():
        limiter = WindowLimiter(OPTIONS.rate, clock=now)
        sent = [(wall() + at, instances) for at, instances in attempts]
        past = Past(sent, wall() + paused_s, [Said(wall() + at, wall() + at, text) for at, text in words])
        restore(limiter, "run", None, lambda since: past, None, OPTIONS, wall())
        at = []
        for _ in range(slots):
            async with limiter.slot(1) as slot:
                at.append(round(now()))
                slot.written()
        return at

    return run_virtual(run())


def test_requests_count_from_when_they_were_sent():
    assert first_slots([(-290, 1), (-200, 1), (-100, 1), (-50, 1)], slots=2) == [10, 100]


def test_requests_from_the_future_count_as_sent_just_now():
    """The clock has been set back since. They must not count less: other clocks may have written some of them."""
    assert first_slots([(-50, 1), (1_510, 1), (1_600, 1), (1_800, 1)], slots=3) == [250, 300, 300]


def test_a_stored_pause_is_kept():
    assert first_slots([(-50, 1)], paused_s=40) == [40]


def test_a_stored_pause_over_max_outage_ends_the_run():
    with pytest.raises(TemporaryStop, match="a pause of 1,801 s more"):
        first_slots([], paused_s=1_801)


def test_a_stored_pause_of_more_than_a_day_is_ignored(caplog):
    assert first_slots([], paused_s=90_000) == [0]
    assert "a pause of 25 h, which is ignored" in caplog.text


@pytest.mark.parametrize(
    ("counts", "base_url", "margin_s"),
    [
        (True, "https://api.example", NETWORK_MARGIN_S),
        (False, "https://api.example", BLIND_MARGIN_S),
        (False, "http://localhost:8787", LOOPBACK_MARGIN_S),
    ],
)
def test_the_margin_is_wider_if_the_kernel_counts_no_sent_bytes(monkeypatch, counts, base_url, margin_s):
    monkeypatch.setattr(wiring, "kernel_counts", lambda: counts)

    async def run():
        target = Target(base_url=base_url, account_id="a", workflow="w")
        async with AsyncExitStack() as parts:
            return open_limiter(parts, target, OPTIONS, clock()).memory_s - 300.0

    assert run_virtual(run()) == pytest.approx(margin_s)


def test_a_stored_quota_is_kept_minus_later_requests():
    assert first_slots([(-50, 1), (-10, 1)], words=[(-50, "r=0;t=200")]) == [150]
    assert first_slots([(-50, 1), (-10, 1), (-5, 0)], words=[(-50, "r=2;t=200")]) == [150]
    assert first_slots([(-50, 1), (-10, 1)], words=[(-50, "r=2;t=200")]) == [90]


def test_the_boot_clock_includes_time_in_suspension():
    async def opened():
        return system_clock()

    clock = asyncio.run(opened())
    if not clock.boot_id:
        pytest.skip("this system does not name its boots")
    elapsed_s = float(Path("/proc/uptime").read_text().split()[0])
    assert clock.uptime() == pytest.approx(elapsed_s, abs=5)
    assert clock.boot().at == pytest.approx(time.time() - clock.uptime(), abs=1)
    assert clock.boot_id == asyncio.run(opened()).boot_id


def test_a_clock_counted_by_a_boot_ignores_that_the_system_clock_is_set():
    machine = Machine(now=lambda: 100.0)

    async def opened():
        return machine.clock()

    clock = run_virtual(opened())
    counted = clock.counted_by(clock.boot())
    began = counted.wall()
    assert began == clock.wall() == clock.latest() == counted.latest()
    machine.set_s = 3_600.0
    assert (counted.wall(), counted.latest()) == (began, began + 3_600)
    machine.set_s = -3_600.0
    assert (counted.wall(), counted.latest()) == (began, began)
    assert clock.counted_by(UNKNOWN_BOOT) is clock
