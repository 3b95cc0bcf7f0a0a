"""Which request the limiter sends next, and when; in virtual time, judged by when bodies were written."""

import asyncio
import itertools
import random
from math import inf

import pytest
from fakes import now, run_virtual, windows
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkwf.errors import Draining
from bulkwf.limits.limiter import LEADS, WindowLimiter
from bulkwf.limits.quota import Said
from bulkwf.limits.window import RECOVERY_S, SLACK_S
from bulkwf.options import RateLimits

MARGIN_S = 0.005


def limiter(rate=100, requests=None, concurrency=16, margin_s=MARGIN_S):
    limits = RateLimits(instances_per_s=rate, requests_per_5m=requests, concurrency=concurrency)
    return WindowLimiter(limits, clock=asyncio.get_running_loop().time, margin_s=margin_s)


class Traffic:
    """Requests through a limiter: when each was asked for, granted, written and answered."""

    def __init__(self, limits):
        self.limits = limits
        self.asked = []
        self.granted = []
        self.written = []
        self.on_wire = 0
        self.most_on_wire = 0

    async def send(self, number, cost=1, write_s=0.0, latency_s=0.0, answer="succeeded"):
        self.asked.append(number)
        async with self.limits.slot(cost) as slot:
            self.granted.append((now(), number))
            self.on_wire += 1
            self.most_on_wire = max(self.most_on_wire, self.on_wire)
            try:
                await asyncio.sleep(write_s)
                slot.written()
                self.written.append((now(), cost))
                await asyncio.sleep(latency_s)
                if answer is not None:
                    getattr(self.limits, answer)()
            finally:
                self.on_wire -= 1

    async def flood(self, seconds, cost, *, workers=16, **more):
        """Send as many requests as the limiter allows for *seconds*; returns the instances a second."""
        started, before = now(), len(self.written)

        async def work():
            while True:
                await self.send(0, cost, **more)

        tasks = [asyncio.ensure_future(work()) for _ in range(workers)]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return sum(amount for at, amount in self.written[before:]) / (now() - started)


def granted_at(traffic):
    return [at for at, _ in traffic.granted]


# --- the windows --------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([1, 7, 100, 250]), st.sampled_from([5, 40, None]))
def test_no_window_exceeds_its_limit(seed, rate, requests):
    """Random costs, latencies, times of asking and delays of writing; judged by brute force."""
    chance = random.Random(seed)

    async def run():
        traffic = Traffic(limiter(rate, requests))

        async def one(number):
            await asyncio.sleep(chance.uniform(0, 3.0))
            cost = chance.choice([0, 1, rate, chance.randint(0, rate)])
            await traffic.send(number, cost, chance.choice([0.0, chance.uniform(0, 2)]), chance.uniform(0, 3))

        await asyncio.gather(*(one(number) for number in range(60)))
        return traffic

    traffic = run_virtual(run())

    assert len(traffic.written) == 60
    assert windows(traffic.written, 1.0) <= rate
    assert requests is None or windows([(at, 1) for at, _ in traffic.written], 300.0) <= requests


@pytest.mark.parametrize("cost", [1, 2, 5, 10, 20, 25, 50, 100])
@pytest.mark.parametrize("latency_s", [0.0, 0.12])
def test_nearly_all_of_the_rate_is_used(cost, latency_s):
    """At least 99 % over a minute, with a margin of 5 ms behind each use."""

    async def run():
        traffic = Traffic(limiter(100))
        rate = await traffic.flood(60.0, cost, write_s=0.001, latency_s=latency_s)
        return traffic, rate

    traffic, rate = run_virtual(run())

    assert 99.0 <= rate <= 100 * 61 / 60  # the first second's share comes at once
    assert windows(traffic.written, 1.0) <= 100
    assert windows(traffic.written, 1.0 + MARGIN_S - 1e-6) <= 100


def test_nearly_all_of_the_request_rate_is_used():
    async def run():
        traffic = Traffic(limiter(None, 1_000))
        await traffic.flood(1_200.0, 100, latency_s=0.1)
        return traffic

    traffic = run_virtual(run())

    assert windows([(at, 1) for at, _ in traffic.written], 300.0) == 1_000
    assert len(traffic.written) == 4_000


def test_a_request_counts_from_its_writing_not_from_its_lease():
    async def run():
        traffic = Traffic(limiter(100))
        await asyncio.gather(traffic.send(0, 100, write_s=5.0), traffic.send(1, 100))
        return traffic

    assert granted_at(run_virtual(run())) == pytest.approx([0.0, 6.0 + MARGIN_S], abs=1e-5)


def test_a_body_reported_late_counts_from_when_it_left():
    async def run():
        limits = limiter(100)
        async with limits.slot(100) as slot:
            await asyncio.sleep(0.4)
            left_at = limits._clock()
            await asyncio.sleep(0.06)  # until it is acknowledged
            slot.written(left_at)
            await asyncio.sleep(0.3)
        async with limits.slot(100):
            return now()

    assert run_virtual(run()) == pytest.approx(1.4 + MARGIN_S, abs=1e-5)


@pytest.mark.parametrize(("write_s", "period_s"), [(0.0, 1.005), (0.002, 1.005), (0.020, 1.020)])
def test_the_lead_shortens_the_margin_and_never_the_period(write_s, period_s):
    async def run():
        traffic = Traffic(limiter(100, margin_s=0.005))
        for number in range(LEADS + 2):
            await traffic.send(number, 100, write_s=write_s)
        return traffic

    granted = granted_at(run_virtual(run()))
    gaps = [after - before for before, after in itertools.pairwise(granted)]
    assert gaps[: LEADS - 1] == pytest.approx([write_s + 1.005] * (LEADS - 1), abs=1e-5)
    assert gaps[LEADS - 1 :] == pytest.approx([period_s] * 2, abs=1e-5)


def test_the_first_requests_do_not_shorten_the_margin():
    async def run():
        traffic = Traffic(limiter(100, margin_s=0.005))
        await traffic.send(0, 100, write_s=0.3)
        await traffic.send(1, 100, write_s=0.0)
        return traffic

    assert granted_at(run_virtual(run())) == pytest.approx([0.0, 1.305], abs=1e-5)


def test_a_request_answered_before_its_body_was_written_counts_from_its_end():
    async def run():
        limits = limiter(100)
        async with limits.slot(100):
            await asyncio.sleep(3.0)
        async with limits.slot(1):
            return now()

    assert run_virtual(run()) == pytest.approx(4.005, abs=1e-5)


def test_a_lookup_costs_a_request_and_no_instance():
    async def run():
        traffic = Traffic(limiter(100, 3))
        await asyncio.gather(*(traffic.send(i, cost) for i, cost in enumerate([100, 0, 0, 0])))
        return traffic

    assert granted_at(run_virtual(run())) == pytest.approx([0.0, 0.0, 0.0, 300.005], abs=1e-5)


def test_the_instances_of_a_second_are_spread_over_half_of_it():
    """The requests of a burst arrive spread out, and the last ones would arrive with those of the next second."""

    async def run():
        traffic = Traffic(limiter(300))
        await asyncio.gather(*(traffic.send(i, 100) for i in range(6)))
        return traffic

    times = [0.0, 1 / 6, 2 / 6, 1.005, 1.005 + 1 / 6, 1.005 + 2 / 6]
    assert granted_at(run_virtual(run())) == pytest.approx(times, abs=2 * SLACK_S)


def test_a_batch_larger_than_the_rate_goes_alone():
    """An earlier session may have begun it at another rate."""

    async def run():
        traffic = Traffic(limiter(10))
        await asyncio.gather(*(traffic.send(i, cost) for i, cost in enumerate([5, 100, 5])))
        return traffic

    assert granted_at(run_virtual(run())) == pytest.approx([0.0, 1.005, 2.01], abs=1e-4)


@pytest.mark.parametrize(("rates", "memory_s"), [((100, 5), 300.005), ((100, None), 1.005), ((None, None), 0.0)])
def test_requests_of_earlier_processes_count_for_the_longest_window(rates, memory_s):
    async def run():
        return limiter(*rates).memory_s

    assert run_virtual(run()) == pytest.approx(memory_s)


def test_an_unsent_request_gives_back_what_it_reserved():
    async def run():
        limits = limiter(100, 5)
        for _ in range(50):
            async with limits.slot(100) as slot:
                slot.unsent()
        assert now() == 0.0
        async with limits.slot(100) as slot:
            slot.written()
        async with limits.slot(1):
            return now()

    assert run_virtual(run()) == pytest.approx(1.005, abs=1e-5)


def test_a_body_reported_as_written_twice_counts_once():
    """Aiohttp may write a body again, on another connection."""

    async def run():
        limits = limiter(100)
        async with limits.slot(60) as slot:
            slot.written()
            slot.written()
        await asyncio.sleep(0.3)
        assert limits.capacity(40) == 1
        async with limits.slot(40) as slot:
            slot.written()
        assert now() == pytest.approx(0.3)
        await asyncio.sleep(1.01)
        assert limits.capacity(100) == 1

    run_virtual(run())


# --- the queue and the places -------------------------------------------------------------------------------------


def in_order(numbers, costs):
    """Whether posts are in order, and look-ups, which have a queue of their own."""
    posts = [number for number in numbers if costs[number]]
    lookups = [number for number in numbers if not costs[number]]
    return posts == sorted(posts) and lookups == sorted(lookups)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=40), st.integers(0, 1_000))
def test_slots_are_given_in_the_order_of_asking(costs, seed):
    chance = random.Random(seed)

    async def run():
        traffic = Traffic(limiter(100, concurrency=3))
        await asyncio.gather(
            *(traffic.send(i, cost, chance.uniform(0, 0.5), chance.uniform(0, 2)) for i, cost in enumerate(costs))
        )
        return traffic

    traffic = run_virtual(run())

    numbers = [number for _, number in traffic.granted]
    assert sorted(numbers) == traffic.asked == list(range(len(costs)))
    assert in_order(numbers, costs)
    assert traffic.most_on_wire <= 3


def test_a_lookup_does_not_wait_behind_a_batch():
    async def run():
        traffic = Traffic(limiter(100))
        await asyncio.gather(traffic.send(0, 100), traffic.send(1, 100), traffic.send(2, 0))
        return traffic

    assert run_virtual(run()).granted == [(0.0, 0), (0.0, 2), (pytest.approx(1.005, abs=1e-4), 1)]


def test_no_more_requests_are_on_the_wire_than_the_concurrency_allows():
    async def run():
        traffic = Traffic(limiter(None, concurrency=5))
        await traffic.flood(10.0, 100, workers=40, latency_s=1.0)
        return traffic

    traffic = run_virtual(run())
    assert traffic.most_on_wire == 5
    assert len(traffic.written) == 50


def test_capacity_is_the_number_of_requests_that_could_go_at_once():
    async def run():
        limits = limiter(100, 3, concurrency=4)
        assert [limits.capacity(cost) for cost in (0, 1, 50, 51, 100)] == [3, 1, 1, 1, 1]
        async with limits.slot(60) as slot:
            assert [limits.capacity(cost) for cost in (0, 40, 41)] == [2, 0, 0]
            slot.written()
            await asyncio.sleep(0.3)
            assert [limits.capacity(cost) for cost in (0, 40, 41)] == [2, 1, 0]
        waiting = asyncio.ensure_future(Traffic(limits).send(0, 100))
        await asyncio.sleep(0.1)
        assert (limits.waiting, limits.capacity(100)) == (1, 0)
        await waiting
        limits.throttled(5.0)
        assert limits.capacity(0) == 0

    run_virtual(run())


def test_the_watcher_is_called_at_every_change():
    async def run():
        limits = limiter(None, concurrency=1)
        seen = []
        limits.watch(lambda: seen.append((limits.waiting, limits.capacity(1))))
        async with limits.slot(1):
            pass
        return seen

    assert run_virtual(run()) == [(0, 0), (0, 1)]


# --- as many at a time as the service bears -----------------------------------------------------------------------


def test_overload_halves_the_concurrency_and_rounds_of_success_add_one():
    async def run():
        limits = limiter(None, concurrency=16)
        places = []
        for _ in range(6):
            limits.overloaded()
            limits.overloaded()  # of the same round: counted once
            places.append(limits.capacity(1))
            await asyncio.sleep(1.0)
        for _ in range(200):
            limits.succeeded()
            places.append(limits.capacity(1))
        return places

    places = run_virtual(run())
    assert places[:6] == [8, 4, 2, 1, 1, 1]
    assert places[6:12] == [2, 2, 3, 3, 3, 4]
    assert places[-1] == 16


# --- pauses -------------------------------------------------------------------------------------------------------


def test_one_probe_goes_first_after_a_pause():
    async def run():
        traffic = Traffic(limiter(None))
        traffic.limits.throttled(30.0)
        await asyncio.gather(*(traffic.send(i, latency_s=4.0) for i in range(10)))
        return traffic

    assert granted_at(run_virtual(run())) == [30.0] + [34.0] * 9


def test_a_success_from_before_the_pause_is_no_probe():
    async def run():
        traffic = Traffic(limiter(None))
        early = asyncio.ensure_future(traffic.send(0, latency_s=5.0))
        await asyncio.sleep(1.0)
        traffic.limits.throttled(30.0)
        await asyncio.gather(early, *(traffic.send(i, latency_s=4.0) for i in range(1, 5)))
        return traffic

    assert granted_at(run_virtual(run())) == [0.0, 31.0, 35.0, 35.0, 35.0]


def test_a_probe_that_is_refused_begins_another_pause():
    async def run():
        traffic = Traffic(limiter(None))
        traffic.limits.throttled(10.0)

        async def probe():
            await traffic.send(0, latency_s=1.0, answer=None)
            traffic.limits.throttled(20.0)

        await asyncio.gather(probe(), *(traffic.send(i, latency_s=1.0) for i in range(1, 4)))
        return traffic

    assert granted_at(run_virtual(run())) == [10.0, 31.0, 32.0, 32.0]


def test_a_shorter_order_does_not_shorten_a_pause():
    async def run():
        limits = limiter(None)
        limits.throttled(50.0)
        limits.throttled(5.0)
        async with limits.slot(1):
            return now()

    assert run_virtual(run()) == 50.0


def test_a_pause_holds_requests_that_wait_already():
    async def run():
        traffic = Traffic(limiter(100))
        await traffic.send(0, 100)
        waiting = asyncio.ensure_future(traffic.send(1, 100))
        await asyncio.sleep(0.5)
        traffic.limits.throttled(20.0)
        await waiting
        return traffic

    assert granted_at(run_virtual(run()))[1] == 20.5


def test_the_probe_after_a_pause_counts_from_its_answer():
    """A service that was unreachable may be slow: it may see the probe as late as that."""

    async def run():
        traffic = Traffic(limiter(100))
        traffic.limits.throttled(10.0)
        await asyncio.gather(traffic.send(0, 100, latency_s=0.4), traffic.send(1, 100), traffic.send(2, 100))
        return traffic

    assert granted_at(run_virtual(run())) == pytest.approx([10.0, 11.41, 12.42], abs=1e-3)


def test_a_rate_refused_once_and_accepted_after_the_pause_is_kept():
    async def run():
        traffic = Traffic(limiter(100))
        for _ in range(3):
            traffic.limits.throttled(2.0)
            await asyncio.sleep(2.0)
            await traffic.flood(RECOVERY_S, 10, latency_s=0.01)
        return traffic.limits.budget._lane.window.rate_factor

    assert run_virtual(run()) == 1.0


def test_a_rate_refused_again_is_halved_and_recovers_in_steps():
    async def run():
        traffic = Traffic(limiter(100))
        for _ in range(2):
            traffic.limits.throttled(10.0)
            await asyncio.sleep(10.0)
        return traffic, [await traffic.flood(10.0, 10, latency_s=0.01) for _ in range(9)]

    traffic, rates = run_virtual(run())

    assert 45 <= rates[0] <= 56
    assert all(before < after + 1.5 for before, after in itertools.pairwise(rates))
    assert rates[-1] >= 98
    assert traffic.limits.budget._lane.window.margin_s == MARGIN_S  # which the refusal had widened
    assert RECOVERY_S * 4 <= 10.0 * sum(rate < 95 for rate in rates) <= RECOVERY_S * 8


def test_repeated_refusals_reduce_the_rate_to_a_sixteenth_at_most():
    async def run():
        traffic = Traffic(limiter(100))
        for _ in range(9):
            await asyncio.sleep(traffic.limits.throttled(10.0))
        return await traffic.flood(9.0, 1, answer=None)

    assert 5.0 <= run_virtual(run()) <= 100 / 9 + 100 / 16


def test_refusals_of_requests_on_the_wire_together_count_once():
    async def run():
        limits = limiter(100)
        for _ in range(5):
            limits.throttled(10.0)
        return limits.budget._lane.window.rate_factor, limits.budget._lane.window.margin_s

    assert run_virtual(run()) == (1.0, 2 * MARGIN_S)


def test_a_refusal_with_a_spent_quota_reduces_the_request_rate_only():
    async def run():
        limits = limiter(100, 1_000)
        limits.observe({"ratelimit": '"default";r=0;t=60'})
        limits.throttled(10.0)
        return limits.budget._lane.window.rate_factor, limits.budget._token.window.rate_factor

    assert run_virtual(run()) == (1.0, 0.5)


# --- what the service says is left --------------------------------------------------------------------------------


def test_requests_are_spread_over_the_reported_quota():
    """20 requests left in 100 s: one every 5 s."""

    async def run():
        traffic = Traffic(limiter(None, 1_000))
        traffic.limits.observe({"ratelimit": '"default";r=20;t=100', "ratelimit-policy": '"default";q=1200;w=300'})
        await traffic.flood(99.0, 1)
        return traffic

    gaps = granted_at(run_virtual(run()))
    assert [round(at) for at in gaps] == [5 * i for i in range(20)]


def test_nothing_is_sent_while_the_quota_is_spent():
    async def run():
        traffic = Traffic(limiter(None, 1_000))
        traffic.limits.observe({"ratelimit": '"default";r=0;t=77'})
        await traffic.send(0)
        return traffic

    assert granted_at(run_virtual(run())) == [77.0]


@pytest.mark.parametrize("header", ['"default";r=1199;t=300', "nonsense", "", '"default";r=;t=300'])
def test_a_large_or_unreadable_quota_delays_nothing(header):
    async def run():
        traffic = Traffic(limiter(None, 1_000))
        traffic.limits.observe({"ratelimit": header})
        await asyncio.gather(*(traffic.send(i) for i in range(100)))
        return now()

    assert run_virtual(run()) == 0.0


def test_a_larger_quota_ends_the_spacing():
    async def run():
        traffic = Traffic(limiter(None, 1_000))
        traffic.limits.observe({"ratelimit": '"default";r=1;t=100'})
        await traffic.send(0)
        waiting = asyncio.ensure_future(traffic.send(1))
        await asyncio.sleep(10.0)
        traffic.limits.observe({"ratelimit": '"default";r=1200;t=300'})
        traffic.limits.succeeded()
        await waiting
        return traffic

    assert granted_at(run_virtual(run())) == [0.0, 10.0]


@pytest.mark.parametrize("header", ['"default";r=0;t=60', '"default";r=1;t=60'])
def test_one_request_goes_alone_after_the_window_of_a_quota(header):
    """Its answer says how much the next window holds. Here it reports no quota, so all go."""

    async def run():
        traffic = Traffic(limiter(None, 1_000))
        traffic.limits.budget._token.pacer.sent(traffic.limits._clock())
        traffic.limits.observe({"ratelimit": header})
        await asyncio.gather(*(traffic.send(i, latency_s=2.0) for i in range(3)))
        return traffic

    assert granted_at(run_virtual(run())) == [60.0, 62.0, 62.0]


# --- stopping and cancelling --------------------------------------------------------------------------------------


def test_a_stop_ends_every_present_and_later_wait():
    async def run():
        limits = limiter(1, concurrency=2)
        traffic = Traffic(limits)
        await traffic.send(0)
        waiting = [asyncio.ensure_future(traffic.send(i)) for i in range(1, 8)]
        await asyncio.sleep(0.5)
        limits.stop()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(one, Draining) for one in ended)
        with pytest.raises(Draining):
            await traffic.send(9)
        assert (limits.waiting, limits.on_wire) == (0, 0)
        return now()

    assert run_virtual(run()) == 0.5


def test_a_stop_does_not_affect_requests_that_hold_a_slot():
    async def run():
        traffic = Traffic(limiter(100))
        sending = asyncio.ensure_future(traffic.send(0, latency_s=10.0))
        await asyncio.sleep(1.0)
        traffic.limits.stop()
        await sending
        return now()

    assert run_virtual(run()) == 10.0


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 11), st.floats(0, 3)), max_size=12), st.integers(0, 1_000))
def test_cancelled_waits_and_requests_leak_nothing(cancellations, seed):
    """Afterwards nothing is on the wire, all windows are empty, and the others were served in their order."""
    chance = random.Random(seed)

    async def run():
        limits = limiter(10, 50, concurrency=2)
        traffic = Traffic(limits)
        costs = [chance.randint(0, 10) for _ in range(12)]
        tasks = [
            asyncio.ensure_future(traffic.send(i, cost, chance.uniform(0, 0.3), chance.uniform(0, 1)))
            for i, cost in enumerate(costs)
        ]

        async def cancel(number, after_s):
            await asyncio.sleep(after_s)
            tasks[number].cancel()

        await asyncio.gather(*(cancel(*one) for one in cancellations))
        await asyncio.wait(tasks)
        assert windows(traffic.written, 1.0) <= 10
        numbers = [number for _, number in traffic.granted]
        assert in_order(numbers, costs)
        assert {i for i, task in enumerate(tasks) if not task.cancelled()} <= set(numbers)
        assert all(task.cancelled() or task.exception() is None for task in tasks)
        assert (limits.waiting, limits.on_wire, limits._heads) == (0, 0, {})
        await asyncio.sleep(301.0)
        assert [
            window.capacity(limits._clock(), 1, 0.9)
            for window in (limits.budget._lane.window, limits.budget._token.window)
        ] == [10, 50]
        await traffic.send(99, 10)

    run_virtual(run())


def test_cancelling_the_head_of_the_queue_lets_the_next_one_go():
    async def run():
        traffic = Traffic(limiter(100))
        await traffic.send(0, 60)
        large = asyncio.ensure_future(traffic.send(1, 100))
        small = asyncio.ensure_future(traffic.send(2, 40))
        await asyncio.sleep(0.5)
        large.cancel()
        await small
        return now()

    assert run_virtual(run()) == 0.5


# --- the past -----------------------------------------------------------------------------------------------------


def test_requests_of_an_earlier_process_count():
    async def run():
        traffic = Traffic(limiter(100, 4))
        traffic.limits.restore([(400.0, 100), (299.0, 100), (100.0, 0), (0.4, 70)], 0.0)
        await asyncio.gather(*(traffic.send(i, cost) for i, cost in enumerate([30, 40, 1])))
        return traffic

    # 30 fit at once; 40 wait for the 70 of 0.4 s ago and for the request of 299 s ago; 1 for that of 100 s ago.
    assert granted_at(run_virtual(run())) == pytest.approx([0.0, 1.005, 200.005], abs=1e-4)


def test_one_probe_goes_first_after_a_restored_pause():
    async def run():
        traffic = Traffic(limiter(None))
        traffic.limits.restore([], 60.0)
        await asyncio.gather(*(traffic.send(i, latency_s=2.0) for i in range(3)))
        return traffic

    assert granted_at(run_virtual(run())) == [60.0, 62.0, 62.0]


@pytest.mark.parametrize(("paused_s", "at_once"), [(-1.0, 1), (-299.0, 1), (-301.0, 3)])
def test_one_probe_goes_first_soon_after_a_restored_pause(paused_s, at_once):
    async def run():
        traffic = Traffic(limiter(None))
        traffic.limits.restore([], paused_s)
        await asyncio.gather(*(traffic.send(i, latency_s=2.0) for i in range(3)))
        return traffic

    assert granted_at(run_virtual(run())).count(0.0) == at_once


def test_one_probe_goes_first_after_a_restored_quota():
    async def run():
        traffic = Traffic(limiter(None, 1_000))
        traffic.limits.restore([(20.0, 0)], -inf, [Said(-20.0, -21.0, "r=0;t=100")])
        await asyncio.gather(*(traffic.send(i, latency_s=2.0) for i in range(3)))
        return traffic

    assert granted_at(run_virtual(run())) == [80.0, 82.0, 82.0]


def test_a_refusal_with_a_spent_restored_quota_reduces_the_request_rate():
    async def run():
        limits = limiter(100, 1_000)
        limits.restore([], -inf, [Said(-20.0, -21.0, "r=0;t=100")])
        limits.throttled(10.0)
        return limits.budget._lane.window.rate_factor, limits.budget._token.window.rate_factor

    assert run_virtual(run()) == (1.0, 0.5)
