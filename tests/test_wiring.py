"""What a session takes over from the ones before it."""

from fakes import now, run_virtual, wall

from bulkwf.limiter import WindowLimiter
from bulkwf.options import Options, RateLimits
from bulkwf.wiring import restore

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


def test_where_the_clock_has_gone_back_the_newest_request_was_sent_just_now_and_the_others_before_it():
    assert first_slots([(1_510, 1), (1_600, 1), (1_700, 1), (1_800, 1)], slots=2) == [10, 100]


def test_a_pause_is_kept():
    assert first_slots([(-50, 1)], paused_s=40) == [40]


def test_a_pause_is_over_if_a_later_request_was_sent_whatever_the_clock_says():
    assert first_slots([(300, 1), (900, 1)], paused_s=600) == [0]


def test_a_pause_by_a_clock_that_was_ahead_takes_no_longer_than_it_was_ordered_for():
    assert first_slots([(9_000, 1)], paused_s=9_120) == [120]
