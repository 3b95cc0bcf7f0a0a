"""What a session takes over from the ones before it."""

import pytest
from fakes import clock, now, run_virtual, wall

from bulkwf import wiring
from bulkwf.errors import TemporaryStop
from bulkwf.limiter import BLIND_MARGIN_S, LOOPBACK_MARGIN_S, NETWORK_MARGIN_S, WindowLimiter
from bulkwf.options import Options, RateLimits, Target
from bulkwf.wiring import open_limiter, restore

OPTIONS = Options(rate=RateLimits(instances_per_s=100, requests_per_5m=4))


def first_slots(attempts, paused_s=0.0, slots=1):
    """When requests may leave after a past of (seconds from now, instances), and a pause until so many from now."""

    async def run():
        limiter = WindowLimiter(OPTIONS.rate, clock=now)
        past = [(wall() + at, instances) for at, instances in attempts]
        restore(limiter, past, wall() + paused_s, OPTIONS, wall())
        at = []
        for _ in range(slots):
            async with limiter.slot(1) as slot:
                at.append(round(now()))
                slot.written()
        return at

    return run_virtual(run())


def test_requests_count_from_when_they_were_sent():
    assert first_slots([(-290, 1), (-200, 1), (-100, 1), (-50, 1)], slots=2) == [10, 100]


def test_where_the_clock_has_gone_back_requests_count_as_sent_just_now():
    """Never less: other clocks may have written some of them."""
    assert first_slots([(-50, 1), (1_510, 1), (1_600, 1), (1_800, 1)], slots=3) == [250, 300, 300]


def test_a_pause_is_kept():
    assert first_slots([(-50, 1)], paused_s=40) == [40]


def test_a_pause_that_is_too_long_to_wait_for_ends_the_run_at_once():
    with pytest.raises(TemporaryStop, match="silence for 1,801 s more"):
        first_slots([], paused_s=1_801)


def test_a_pause_that_only_a_wrong_clock_can_have_written_is_not_believed(caplog):
    assert first_slots([], paused_s=90_000) == [0]
    assert "a pause of 25 h, which is not believed" in caplog.text


@pytest.mark.parametrize(
    ("counts", "base_url", "margin_s"),
    [
        (True, "https://api.example", NETWORK_MARGIN_S),
        (False, "https://api.example", BLIND_MARGIN_S),
        (False, "http://localhost:8787", LOOPBACK_MARGIN_S),
    ],
)
def test_the_margin_is_wider_where_the_kernel_does_not_tell_what_has_left(monkeypatch, counts, base_url, margin_s):
    monkeypatch.setattr(wiring, "kernel_counts", lambda: counts)

    async def run():
        target = Target(base_url=base_url, account_id="a", workflow="w")
        return open_limiter(target, OPTIONS, clock()).memory_s - 300.0

    assert run_virtual(run()) == pytest.approx(margin_s)
