"""The client: retries, compliance with answers, outages and probes. `test_delivery` has what it does for a batch."""

import asyncio

import pytest
from fakes import RUN_TARGET, Desk, ScriptedTransport, make_batch, now, reply, run_virtual

from bulkwf.attempt import Judgement, RequestKind, Verdict
from bulkwf.batching.batch_state import BatchState
from bulkwf.errors import ServiceRefused, TemporaryStop
from bulkwf.options import Options, RetryPolicy
from bulkwf.service.requests import get_instance
from bulkwf.submission.client import OutageTracker


def judged(verdict, **more):
    return Judgement(verdict=verdict, message="it went wrong", **more)


def with_retries(*judgements, options=None):
    """Make attempts with these judgements: the final judgement or error, the number of attempts, and the waits."""

    async def go():
        desk = Desk(ScriptedTransport(), options or Options())
        desk.draw = lambda: 1.0
        left = list(judgements)

        async def attempt():
            return left.pop(0)

        try:
            ended_with = await desk.client.with_retries(attempt)
        except (ServiceRefused, TemporaryStop) as error:
            ended_with = error
        return ended_with, len(judgements) - len(left), desk.sleeps

    return run_virtual(go())


async def attempt_once(desk, judgement, http_status=200):
    """Make one look-up whose answer has this judgement."""
    desk.transport.answers.append(reply(http_status))
    return await desk.client.attempt(
        RequestKind.LOOK_UP,
        lambda: get_instance(RUN_TARGET, "a"),
        lambda _: judgement,
        state=BatchState(make_batch(1)),
    )


# --- retries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verdict", [Verdict.DONE, Verdict.ABSENT, Verdict.BAD_REQUEST, Verdict.TOO_LARGE, Verdict.OMITTED], ids=str
)
def test_a_verdict_without_retry_is_returned_after_one_attempt(verdict):
    judgement = judged(verdict)

    assert with_retries(judgement, judgement) == (judgement, 1, [])


def test_failing_attempts_are_repeated_until_one_succeeds():
    done = judged(Verdict.DONE)
    failing, throttled, renewed = judged(Verdict.IN_DOUBT), judged(Verdict.THROTTLED), judged(Verdict.RENEWED)

    # The limiter holds a pause, and a new credential needs no wait: only the failing service is waited for.
    assert with_retries(failing, failing, throttled, renewed, judged(Verdict.NOT_SENT), done) == (
        done,
        6,
        [0.5, 1.0, 0.5],
    )


def test_another_verdict_ends_a_streak():
    no, failing, done = judged(Verdict.NO_SUCH_WORKFLOW), judged(Verdict.IN_DOUBT), judged(Verdict.DONE)

    assert with_retries(no, failing, no, failing, done)[:2] == (done, 5)
    assert isinstance(with_retries(no, no, done)[0], ServiceRefused)


def test_a_wait_beyond_max_outage_ends_the_run():
    options = Options(retry=RetryPolicy(max_outage_s=100.0))
    ended, attempts, sleeps = with_retries(*[judged(Verdict.IN_DOUBT, retry_after_s=60.0)] * 5, options=options)

    assert isinstance(ended, TemporaryStop)
    assert "would be made 120 s after the first failure" in str(ended)
    assert (attempts, sleeps) == (2, [60.0])


# --- answers ------------------------------------------------------------------------------------------------------


def test_a_pause_holds_the_limiter_before_the_attempt_is_recorded():
    async def go():
        desk, capacity = Desk(ScriptedTransport()), []
        record = desk.record

        async def recording(*args, **more):
            capacity.append(desk.limiter.capacity(0))
            await record(*args, **more)

        desk.record = recording
        await attempt_once(desk, judged(Verdict.THROTTLED, retry_after_s=30.0), 429)
        async with desk.limiter.slot(0):
            return capacity, desk.pauses, now()

    capacity, pauses, sent_at = run_virtual(go())

    assert (capacity, pauses) == ([0], [30.0])
    assert sent_at == pytest.approx(30.0)


def test_a_pause_that_no_answer_orders_is_durable_too():
    async def go():
        desk = Desk(ScriptedTransport())
        await desk.client.pause(judged(Verdict.OMITTED))
        async with desk.limiter.slot(0):
            return desk.pauses, now()

    assert run_virtual(go()) == ([10.0], pytest.approx(10.0))


def test_an_attempt_is_recorded_even_if_it_ends_the_run():
    async def go():
        desk = Desk(ScriptedTransport())
        with pytest.raises(TemporaryStop):
            await attempt_once(desk, judged(Verdict.THROTTLED, retry_after_s=9_999.0), 429)
        return desk.events, desk.pauses

    assert run_virtual(go()) == ([("attempted", 0, Verdict.THROTTLED), ("recorded",)], [9_999.0])


@pytest.mark.parametrize(("refreshed", "verdict"), [(True, Verdict.RENEWED), (False, Verdict.UNAUTHORIZED)])
def test_a_refused_credential_is_refreshed_if_its_source_has_another(refreshed, verdict):
    class Source(ScriptedTransport):
        async def refresh_credential(self, credential):
            return refreshed

    async def go():
        return await attempt_once(Desk(Source()), judged(Verdict.UNAUTHORIZED), 401)

    assert run_virtual(go()).verdict is verdict


# --- refusals of the whole run, once something has been settled ----------------------------------------------------

REFUSALS = [Verdict.UNAUTHORIZED, Verdict.NO_SUCH_WORKFLOW, Verdict.WRONG_ADDRESS]


def proven_retries(*judgements):
    """Make attempts with these judgements after something was settled: judgement or error, times, and the desk."""

    async def go():
        desk = Desk(ScriptedTransport())
        desk.client.outage.success()
        left, sent_at = list(judgements), []

        async def attempt():
            async with desk.limiter.slot(0):
                sent_at.append(now())
                return left.pop(0)

        try:
            ended_with = await desk.client.with_retries(attempt)
        except ServiceRefused as error:
            ended_with = error
        return ended_with, sent_at, desk

    return run_virtual(go())


@pytest.mark.parametrize("verdict", REFUSALS, ids=str)
def test_a_single_refusal_costs_one_probe_over_a_fresh_connection(verdict):
    done = judged(Verdict.DONE)
    ended_with, sent_at, desk = proven_retries(judged(verdict), done)

    assert (ended_with, sent_at) == (done, pytest.approx([0.0, 2.0]))
    assert (desk.pauses, desk.client.transport.dropped) == ([2.0], 1)


@pytest.mark.parametrize("verdict", REFUSALS, ids=str)
def test_a_lasting_refusal_ends_the_run_after_three_probes(verdict):
    ended_with, sent_at, desk = proven_retries(*[judged(verdict)] * 5)

    assert isinstance(ended_with, ServiceRefused)
    assert sent_at == pytest.approx([0.0, 2.0, 10.0, 30.0])
    assert desk.client.transport.dropped == 3


def test_a_fatal_fault_ends_the_run_without_a_probe():
    ended_with, sent_at, _ = proven_retries(judged(Verdict.FATAL), judged(Verdict.DONE))

    assert isinstance(ended_with, ServiceRefused)
    assert len(sent_at) == 1


def test_nothing_but_the_probe_is_sent_until_it_is_accepted():
    async def go():
        desk, sent_at = Desk(ScriptedTransport(then=reply(200), latency_s=3.0)), []
        desk.client.outage.success()
        desk.limiter.hold(5.0)
        state = BatchState(make_batch(1))

        async def request(name):
            def judge(_):
                sent_at.append(now() - 3.0)
                return judged(Verdict.DONE)

            await desk.client.attempt(RequestKind.LOOK_UP, lambda: get_instance(RUN_TARGET, name), judge, state=state)

        await asyncio.gather(*(request(name) for name in "abcd"))
        return sent_at

    assert run_virtual(go()) == pytest.approx([5.0, 8.0, 8.0, 8.0], abs=0.1)


def test_a_request_refused_repeatedly_ends_the_run_though_others_pass():
    async def go():
        desk, attempts = Desk(ScriptedTransport()), 0
        desk.client.outage.success()

        async def attempt():
            nonlocal attempts
            attempts += 1
            desk.client.outage.accepted(settles=True)  # another request went through meanwhile
            async with desk.limiter.slot(0):
                return judged(Verdict.WRONG_ADDRESS)

        with pytest.raises(ServiceRefused):
            await desk.client.with_retries(attempt)
        return attempts, now()

    attempts, ended_at = run_virtual(go())

    assert attempts == 4
    assert ended_at >= 30.0


# --- outages ------------------------------------------------------------------------------------------------------


def test_an_outage_lasts_from_the_first_failure_until_something_is_settled():
    outage = OutageTracker()

    assert (outage.failing_s(10.0), outage.failing_s(25.0)) == (0.0, 15.0)
    outage.success()
    assert outage.failing_s(30.0) == 0.0


def test_refusals_of_simultaneous_requests_count_once():
    outage = OutageTracker()

    assert outage.run_refused(100.0, 99.0, 0) == 2.0
    assert outage.run_refused(101.0, 99.5, 0) == 1.0  # was on the wire when the pause began
    assert outage.run_refused(103.0, 99.9, 0) == 0.0  # the same, answered late
    assert outage.run_refused(103.0, 102.5, 0) == 8.0  # the probe
    assert outage.run_refused(112.0, 111.5, 0) == 20.0
    assert outage.run_refused(133.0, 132.5, 0) is None
    outage.accepted(settles=True)
    assert outage.run_refused(134.0, 133.5, 0) == 2.0
