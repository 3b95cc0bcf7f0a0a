"""Runs of one process share windows, quota and pauses. Judged by the times at which bodies were written."""

import asyncio
import gc
import random
import threading
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from math import inf

import pytest
from fakes import ScriptedTransport, clock, created, now, run_virtual, windows
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkwf import api
from bulkwf import parts as wiring
from bulkwf import run as run_module
from bulkwf.checkpoint import Past
from bulkwf.errors import Draining
from bulkwf.limits.budget import Budget
from bulkwf.limits.limiter import WindowLimiter
from bulkwf.limits.pools import Bound, Lease, Pools, Waiter
from bulkwf.limits.quota import Said
from bulkwf.options import Options, RateLimits, Target
from bulkwf.transport.credentials import Credentials

MARGIN_S = 0.005
ENDPOINT = "https://api.example"


class Process:
    """The runs of one process: their limiters, and which of them has written what."""

    def __init__(self):
        self.pools = Pools()
        self.written = []
        self.on_wire = 0
        self.most_on_wire = 0

    def limiter(self, lane="a", account="acct", token="t", rate=100, requests=None, concurrency=16):
        limits = RateLimits(instances_per_s=rate, requests_per_5m=requests, concurrency=concurrency)
        at = asyncio.get_running_loop().time
        names = {"endpoint": ENDPOINT, "account": account, "workflow": lane, "token": token}
        limiter = WindowLimiter(
            limits, clock=at, margin_s=MARGIN_S, budget=Budget(at(), limits, MARGIN_S, self.pools, **names)
        )
        limiter.names = ((lane, account), account, token)
        return limiter

    async def send(self, limiter, cost=100, write_s=0.0, latency_s=0.05, answer="succeeded"):
        async with limiter.slot(cost) as slot:
            self.on_wire += 1
            self.most_on_wire = max(self.most_on_wire, self.on_wire)
            try:
                await asyncio.sleep(write_s)
                slot.written()
                self.written.append((now(), cost, limiter))
                await asyncio.sleep(latency_s)
                if answer is not None:
                    answer(limiter) if callable(answer) else getattr(limiter, answer)()
            finally:
                self.on_wire -= 1

    async def work(self, limiter, requests, **more):
        """A run of *requests* requests, eight at a time; returns when it has ended."""
        todo = list(range(requests))

        async def worker():
            while todo:
                todo.pop()
                await self.send(limiter, **more)

        await asyncio.gather(*(worker() for _ in range(8)))
        limiter.close()
        return now()

    def most(self, period_s, key, *, requests=False):
        """The most that any window of *period_s* seconds has held, over all workflows, accounts or tokens."""
        worst = 0
        for name in {limiter.names[key] for _, _, limiter in self.written}:
            mine = [(at, 1 if requests else cost) for at, cost, one in self.written if one.names[key] == name]
            worst = max(worst, windows(mine, period_s))
        return worst


LANE, ACCOUNT, TOKEN = range(3)

# --- windows ------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(2, 8), st.sampled_from([40, 300, None]))
def test_runs_that_share_never_exceed_a_window_and_all_end(seed, runs, requests):
    """Random workflows, accounts, tokens, costs, 429s, cancellations, slow writes and runs that come later."""
    chance = random.Random(seed)

    async def run():
        process, unfinished = Process(), []

        def answer(limiter):
            if chance.random() < 0.01:
                limiter.throttled(chance.choice([None, 0.0, 7.0]))
            elif chance.random() < 0.05:
                limiter.overloaded()
            else:
                limiter.succeeded()
                limiter.budget.settled()

        async def one(limiter):
            await asyncio.sleep(chance.choice([0.0, chance.uniform(0, 2.0)]))
            cost = chance.choice([0, 1, 100, 100, chance.randint(0, 100)])
            await process.send(limiter, cost, chance.choice([0.0, chance.uniform(0, 1)]), chance.uniform(0, 2), answer)

        async def go():
            await asyncio.sleep(chance.choice([0.0, chance.uniform(0, 3)]))
            names = [chance.choice("abcdef"), chance.choice(["acct"] * 5 + ["acct-2"]), chance.choice("ttu")]
            limiter = process.limiter(*names, rate=100, requests=requests, concurrency=chance.choice([1, 4, 16]))
            tasks = [asyncio.ensure_future(one(limiter)) for _ in range(25)]
            for task in chance.sample(tasks, chance.randint(0, 8)):
                asyncio.get_running_loop().call_later(chance.uniform(0, 10), task.cancel)
            await asyncio.wait(tasks)
            unfinished.extend(task for task in tasks if not task.cancelled() and task.exception() is not None)
            assert (limiter.on_wire, limiter.waiting, limiter._heads) == (0, 0, {})
            limiter.close()

        await asyncio.gather(*(go() for _ in range(runs)))
        return process, unfinished

    process, unfinished = run_virtual(run())

    assert not unfinished
    assert process.most(1.0, LANE) <= 100
    assert process.most(1.0, ACCOUNT) <= 300
    assert requests is None or process.most(300.0, TOKEN, requests=True) <= requests


def test_four_workflows_of_an_account_share_its_300_instances_a_second():
    async def run():
        process = Process()
        ends = await asyncio.gather(*(process.work(process.limiter(lane), 60) for lane in "abcd"))
        return process, ends

    process, ends = run_virtual(run())

    assert process.most(1.0, ACCOUNT) == 300
    assert process.most(1.0, LANE) == 100
    assert max(ends) <= 4 * 60 * 100 / 300 / 0.98
    assert min(ends) >= 0.9 * max(ends)


@pytest.mark.parametrize("cost", [100, 30])
def test_two_runs_of_one_workflow_share_its_rate_evenly(cost):
    async def run():
        process = Process()
        return process, await asyncio.gather(*(process.work(process.limiter(), 60, cost=cost) for _ in "ab"))

    process, ends = run_virtual(run())

    assert process.most(1.0, LANE) <= 100
    assert min(ends) >= 0.9 * max(ends)


def test_two_runs_of_one_token_share_its_requests_evenly():
    async def run():
        process = Process()
        runs = (process.limiter(lane, f"acct-{lane}", requests=1_000) for lane in "ab")
        return process, await asyncio.gather(*(process.work(one, 1_000, cost=1) for one in runs))

    process, ends = run_virtual(run())

    assert process.most(300.0, TOKEN, requests=True) == 1_000
    assert min(ends) >= 0.9 * max(ends)


def test_small_requests_of_another_run_do_not_starve_a_full_batch():
    """Both send to one workflow. Each small request fits long before a hundred instances do."""

    async def run():
        process = Process()
        full, small = process.limiter(), process.limiter()
        flood = asyncio.ensure_future(process.work(small, 10_000, cost=1))
        await asyncio.sleep(5.0)
        await process.send(full)
        flood.cancel()
        return now()

    assert run_virtual(run()) <= 5.0 + 2 * (1.0 + MARGIN_S) + 0.05


def test_a_run_that_waits_for_its_own_workflow_does_not_delay_another_workflow():
    async def run():
        process = Process()
        one, other = process.limiter("a"), process.limiter("b")
        await process.send(one)
        waiting = asyncio.ensure_future(process.send(one))
        await asyncio.sleep(0.1)
        await process.send(other, latency_s=0.0)
        ended_at = now()
        await waiting
        return ended_at

    assert run_virtual(run()) < 0.5


def test_the_lowest_limit_holds_while_its_run_lasts():
    async def run():
        process = Process()
        fast, slow = process.limiter(rate=100), process.limiter(rate=10)
        assert fast.budget._lane.window.limit == 10
        assert (process.limiter("b").capacity(100), slow.capacity(10)) == (1, 1)
        slow.close()
        assert fast.budget._lane.window.limit == 100

    run_virtual(run())


@pytest.mark.parametrize(("rates", "limit"), [((100, 100), 300), ((500, 100), 500), ((None, 100), None)])
def test_an_account_allows_300_instances_a_second_unless_a_run_knows_of_more(rates, limit):
    async def run():
        process = Process()
        limiters = [process.limiter(str(rate), rate=rate) for rate in rates]
        window = limiters[0].budget._account.window
        return None if window is None else window.limit

    assert run_virtual(run()) == limit


def test_what_a_request_waits_for_is_named():
    async def run():
        process = Process()
        limiters = [process.limiter(lane, requests=1_000) for lane in "abcd"]
        budget = limiters[0].budget
        names = [budget.describe(bound) for bound in Bound]
        await asyncio.gather(*(process.send(one) for one in limiters))
        return names, limiters[3].bound_by

    names, bound_by = run_virtual(run())
    assert "100 instances/s" in names
    assert "1,000 requests/5 min" in names
    assert "a pause" in names
    assert bound_by in ("300 instances/s of the account", "the turn of another run")


# --- pauses -------------------------------------------------------------------------------------------------------


def test_a_429_of_one_run_pauses_the_others_of_the_token_and_one_probe_follows():
    async def run():
        process = Process()
        one, other, foreign = process.limiter("a"), process.limiter("b"), process.limiter("c", "acct-2", "u")
        one.throttled(30.0)
        assert other.paused_until == one.paused_until
        await process.send(foreign, latency_s=0.0)
        assert now() == 0.0
        await asyncio.gather(*(process.send(limiter, latency_s=4.0) for limiter in (one, other)))
        return [at for at, _, limiter in process.written if limiter is not foreign]

    assert run_virtual(run()) == [30.0, 34.0]


def test_a_pause_for_another_reason_holds_one_run_only():
    async def run():
        process = Process()
        one, other = process.limiter("a"), process.limiter("b")
        assert (one.hold(20.0), one.pause()) == (20.0, 20.0)
        await asyncio.gather(process.send(other, latency_s=0.0), process.send(one, latency_s=0.0))
        return [(at, limiter is one) for at, _, limiter in process.written]

    assert run_virtual(run()) == [(0.0, False), (20.0, True)]


def test_a_shorter_pause_is_reported_as_long_as_the_present_one():
    async def run():
        process = Process()
        one, other = process.limiter("a"), process.limiter("b")
        return one.throttled(60.0), other.throttled(5.0), other.hold(1.0)

    assert run_virtual(run()) == (60.0, 60.0, 60.0)


def test_a_quota_reported_to_one_run_spaces_the_requests_of_the_other():
    async def run():
        process = Process()
        one, other = process.limiter("a", requests=1_000), process.limiter("b", requests=1_000)
        one.observe({"ratelimit": '"default";r=2;t=100'})
        third = process.limiter("c", requests=1_000)
        sending = (process.send(limiter, 1, latency_s=0.0, answer=None) for limiter in (one, other, third))
        await asyncio.gather(*sending)
        return [(round(at), limiter is third) for at, _, limiter in process.written]

    assert run_virtual(run()) == [(0, False), (50, False), (100, True)]


# --- the end of a run, and the next one ---------------------------------------------------------------------------


def test_requests_of_an_ended_run_count_for_the_next_one():
    async def run():
        process = Process()
        first = process.limiter(requests=2)
        await process.send(first, latency_s=0.0)
        first.close()
        del first
        process.written.clear()
        gc.collect()
        second = process.limiter(requests=2)
        await process.send(second, latency_s=0.0)
        await process.send(second, latency_s=0.0)
        return [at for at, _, _ in process.written]

    assert run_virtual(run()) == pytest.approx([1.005, 300.005], abs=1e-3)


def test_a_run_that_ends_while_a_request_waits_lets_others_go():
    async def run():
        process = Process()
        ended, other = process.limiter(), process.limiter()
        assert ended.bound_by == ""
        await process.send(ended)
        waiting = asyncio.ensure_future(process.send(ended))
        await asyncio.sleep(0.1)
        ended.close()
        await process.send(other, latency_s=0.0)
        with pytest.raises(Draining):
            await waiting
        return now()

    assert run_virtual(run()) == pytest.approx(1.005, abs=0.01)


def test_pools_go_when_no_run_uses_them_and_nothing_counts():
    async def run():
        process = Process()
        first = process.limiter(requests=5)
        await process.send(first)
        first.close()
        del first
        process.written.clear()
        gc.collect()
        for after_s, kept in ((0.0, 6), (2.0, 5), (300.0, 3)):
            await asyncio.sleep(after_s)
            process.limiter("b", "acct-2", "u", None, None)
            gc.collect()
            assert len(process.pools._pools) == kept

    run_virtual(run())


def test_an_abandoned_lease_counts_as_written():
    """It is left by an event loop that was not run to its end."""

    async def run():
        process = Process()
        first = process.limiter()
        lease = first._ask(100, first._post_waiter)
        assert isinstance(lease, Lease)
        await asyncio.sleep(5.0)
        del lease, first
        gc.collect()
        second = process.limiter()
        await process.send(second, latency_s=0.0)
        return now(), second.budget._token.on_wire

    assert run_virtual(run()) == (pytest.approx(6.005, abs=1e-3), 0)


def test_a_waiter_whose_event_loop_is_blocked_loses_its_turn():
    async def run():
        process = Process()
        stuck, other = process.limiter(), process.limiter()
        await process.send(other, latency_s=0.0)
        assert not isinstance(stuck._ask(100, stuck._post_waiter), Lease)  # and it never asks again
        await process.send(other, latency_s=0.0)
        return now()

    assert run_virtual(run()) == pytest.approx(2.02, abs=0.1)


def test_the_requests_of_a_restored_file_count_once_in_a_process():
    async def run():
        pools = Pools()
        at = asyncio.get_running_loop().time
        limits = RateLimits(instances_per_s=None, requests_per_5m=10)
        first = Budget(at(), limits, 0.0, pools)
        assert first.uncounted_s(at(), "run", own=True) == inf
        assert first.uncounted_s(at(), "verify", own=False) == inf
        assert Budget(at(), limits, 0.0, pools).uncounted_s(at(), "run", own=False) == 0.0  # the first one is at work
        await asyncio.sleep(5.0)
        first.close(at())
        await asyncio.sleep(2.0)
        second = Budget(at(), limits, 0.0, pools)
        return second.uncounted_s(at(), "run", own=True), second.uncounted_s(at(), "verify", own=True)

    assert run_virtual(run()) == (2.0, 7.0)


def test_restored_requests_exclude_those_of_this_process():
    async def run():
        async with AsyncExitStack() as parts:
            limiter = wiring.open_limiter(parts, TARGET, Options(), clock())
            past = Past([(1_000.0, 1), (1_400.0, 2)], 0.0, [])
            assert wiring._uncounted(limiter, past, wiring.Path("x"), "run", 1_500.0, own=False) == past
            await asyncio.sleep(50.0)
            return wiring._uncounted(limiter, past, wiring.Path("x"), "run", 1_440.0, own=True).attempts

    assert run_virtual(run()) == [(1_400.0, 2)]


# --- another token ------------------------------------------------------------------------------------------------


def test_requests_and_pause_of_the_old_token_count_for_the_new_one():
    async def run():
        process = Process()
        one, other = process.limiter("a", requests=10), process.limiter("b", requests=10)
        await asyncio.gather(*(process.send(limiter, 0, latency_s=0.0) for limiter in (one, other) * 2))
        one.change_token("u")
        assert one.budget._token is other.budget._token  # the old token's pool has two names
        third = process.limiter("c", token="v", requests=10)
        other.throttled(30.0)
        one.budget.uncounted_s(1_000.0, "run", own=True)
        waiting = asyncio.ensure_future(process.send(one, 0))
        await asyncio.sleep(0.1)
        for limiter in (one, other):
            limiter.change_token("v")
        assert {limiter.budget._token for limiter in (one, other, third)} == {third.budget._token}
        assert third.capacity(0) == 0
        await waiting
        third.succeeded()
        return now(), third.capacity(0, 1.0)

    assert run_virtual(run()) == (pytest.approx(30.05), 5)


def test_the_token_changes_in_runs_without_a_request_limit():
    async def run():
        process = Process()
        one, other = process.limiter("a"), process.limiter("b", token="u")
        one.change_token("u")
        other.throttled(10.0)
        return one.paused_until - one._clock()

    assert run_virtual(run()) == 10.0


# --- threads ------------------------------------------------------------------------------------------------------


def test_runs_in_two_threads_share_a_window_and_wake_each_other():
    process, started = Process(), time.monotonic()
    written, errors = [], []

    async def run(barrier):
        limiter = process.limiter(rate=1_000)
        barrier.wait()
        for _ in range(12):
            async with limiter.slot(100) as slot:
                slot.written()
                written.append((time.monotonic() - started, 100))
        limiter.close()

    def thread(barrier):
        try:
            asyncio.run(asyncio.wait_for(run(barrier), 30))
        except BaseException as error:  # noqa: BLE001 - shown by the assertion
            errors.append(error)

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=thread, args=(barrier,)) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()

    assert not errors
    assert len(written) == 24
    assert windows(sorted(written), 0.999) <= 1_000


def test_a_waiter_whose_event_loop_is_closed_is_not_woken():
    process = Process()

    async def wait():
        limiter = process.limiter()
        head = asyncio.ensure_future(limiter._sleep(inf))
        await asyncio.sleep(0)
        head.cancel()
        return limiter

    limiter = asyncio.run(wait())
    limiter._thread = 0
    limiter._wake_from_anywhere()


# --- the wiring ---------------------------------------------------------------------------------------------------

TARGET = Target(base_url=ENDPOINT, account_id="acct", workflow="a")


@pytest.mark.parametrize("shared", [True, False])
def test_runs_on_the_clock_of_the_process_share_its_pools(monkeypatch, shared):
    monkeypatch.setattr(wiring, "POOLS", Pools())

    async def run():
        at = replace(clock(), shared=shared)
        tokens = ["first", "second"]
        credentials = Credentials(lambda: {"Authorization": tokens.pop(0)})
        async with AsyncExitStack() as parts:
            one = wiring.open_limiter(parts, TARGET, Options(), at, credentials)
            other = wiring.open_limiter(parts, replace(TARGET, workflow="b"), Options(), at)
            assert (one.budget._account is other.budget._account) == shared
            assert one.budget._token is not other.budget._token
            assert credentials.refresh(0)
            third = wiring.open_limiter(parts, TARGET, Options(), at, Credentials(lambda: {"Authorization": "second"}))
            assert (third.budget._token is one.budget._token) == shared
        return one.budget.closed, "second" in repr(wiring.POOLS._pools)

    assert run_virtual(run()) == (True, False)


def test_four_submissions_at_once_keep_the_limit_of_their_account(monkeypatch):
    monkeypatch.setattr(wiring, "POOLS", Pools())
    monkeypatch.setattr(run_module, "system_clock", lambda: replace(clock(), shared=True))
    transports = {name: ScriptedTransport(then=created, latency_s=0.2) for name in "abcd"}

    async def run():
        await asyncio.gather(
            *(
                api.submit_all(
                    ({"instance_id": f"id-{i}"} for i in range(3_000)),
                    workflow=name,
                    account_id="acct",
                    api_token="token",
                    transport=transport,
                )
                for name, transport in transports.items()
            )
        )

    run_virtual(run())

    ends = [transport.requests[-1].ended_at for transport in transports.values()]
    written = [(sent.written_at, len(sent.ids)) for transport in transports.values() for sent in transport.requests]
    assert sum(instances for _, instances in written) == 12_000
    assert windows(sorted(written), 1.0) == 300
    assert min(ends) >= 0.9 * max(ends)
    assert max(ends) <= 12_000 / 300 / 0.95


def test_a_waiter_joins_no_line_while_its_run_is_alone():
    async def run():
        process = Process()
        limiter = process.limiter()
        await asyncio.gather(process.send(limiter), process.send(limiter))
        waiter = Waiter(limiter.budget, lambda: None)
        limiter.budget.observe(Said(1_000.0, 1_000.0, ""))
        limiter.budget.leave(waiter)
        return waiter.queued, limiter.rate_factor, limiter.bound_by

    assert run_virtual(run()) == (False, 1.0, "100 instances/s")


def test_a_window_keeps_its_uses_while_no_run_sets_a_limit():
    pools = Pools()

    def opened(limits, now):
        return Budget(now, limits, 0.0, pools, endpoint="e", account="a", workflow="w", token="t")

    limited, unlimited = (
        RateLimits(instances_per_s=None, requests_per_5m=10),
        RateLimits(instances_per_s=None, requests_per_5m=None),
    )
    first = opened(limited, 0.0)
    for _ in range(10):
        lease = first.ask(0.0, 0, Waiter(first, lambda: None))
        first.written(lease, 0.0)
        first.end(lease, 0.0, sent=True)
    between = opened(unlimited, 1.0)
    first.close(2.0)
    last = opened(limited, 3.0)

    assert last.capacity(3.0, 0, 0.0) == 0
    assert between.closed is False


def test_it_matters_when_a_body_leaves_only_while_a_limit_counts_the_request():
    pools, unlimited = Pools(), RateLimits(instances_per_s=None, requests_per_5m=None)

    def opened(limits):
        budget = Budget(0.0, limits, 0.0, pools, endpoint="e", account="a", workflow="w", token="t")
        return WindowLimiter(limits, clock=lambda: 0.0, budget=budget)

    async def timed(limits):
        async with limits.slot(1) as slot:
            return slot.timed

    async def run():
        alone = opened(unlimited)
        first = await timed(alone)
        opened(RateLimits())  # counts what every run of its token sends
        return first, await timed(alone)

    assert asyncio.run(run()) == (False, True)


def test_waking_a_run_whose_loop_is_closed_raises_nothing():
    """Another run of the process wakes waiters: it must not end because of an abandoned one."""
    limits = WindowLimiter(RateLimits(), clock=lambda: 0.0)
    limits._loop = asyncio.new_event_loop()
    limits._loop.close()

    async def in_another_loop():
        limits._wake_from_anywhere()

    limits._wake_from_anywhere()
    asyncio.run(in_another_loop())
