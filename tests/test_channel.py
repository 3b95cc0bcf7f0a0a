"""Patience for one request, whatever it asks for. How it serves a batch is in `test_delivery`."""

import asyncio

import pytest
from fakes import Desk, ScriptedTransport, now, reply, run_virtual

from bulkwf.channel import Health
from bulkwf.errors import ServiceRefused, TemporaryStop
from bulkwf.model import Outcome, Verdict
from bulkwf.options import Options, RetryPolicy


def told(verdict, **more):
    return Outcome(verdict=verdict, message="it went wrong", **more)


def persist(*outcomes, options=None):
    """What attempts with these outcomes lead to; returns that, how many were made, and the waits between them."""

    async def go():
        desk = Desk(ScriptedTransport(), options or Options())
        desk.draw = lambda: 1.0
        left = list(outcomes)

        async def attempt():
            return left.pop(0)

        try:
            came_to = await desk.channel.persist(attempt)
        except (ServiceRefused, TemporaryStop) as error:
            came_to = error
        return came_to, len(outcomes) - len(left), desk.sleeps

    return run_virtual(go())


# --- attempts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verdict", [Verdict.DONE, Verdict.ABSENT, Verdict.REFUSED, Verdict.TOO_LARGE, Verdict.OMITTED], ids=str
)
def test_what_calls_for_another_act_than_waiting_is_handed_back_after_one_attempt(verdict):
    outcome = told(verdict)

    assert persist(outcome, outcome) == (outcome, 1, [])


def test_the_attempts_go_on_until_one_is_of_use():
    done = told(Verdict.DONE)
    ill, throttled, renewed = told(Verdict.IN_DOUBT), told(Verdict.THROTTLED), told(Verdict.RENEWED)

    # The limiter holds a pause, and a new credential needs no wait: only the ill service is waited for.
    assert persist(ill, ill, throttled, renewed, told(Verdict.NOT_SENT), done) == (done, 6, [0.5, 1.0, 0.5])


def test_a_streak_ends_with_another_failure():
    no, ill, done = told(Verdict.NO_SUCH_WORKFLOW), told(Verdict.IN_DOUBT), told(Verdict.DONE)

    assert persist(no, ill, no, ill, done)[:2] == (done, 5)
    assert isinstance(persist(no, no, done)[0], ServiceRefused)


def test_an_outage_that_would_last_too_long_is_not_waited_for():
    options = Options(retry=RetryPolicy(max_outage_s=100.0))
    ended, attempts, sleeps = persist(*[told(Verdict.IN_DOUBT, retry_after_s=60.0)] * 5, options=options)

    assert isinstance(ended, TemporaryStop)
    assert "would wait 60 s more" in str(ended)
    assert (attempts, sleeps) == (2, [60.0])


# --- answers ------------------------------------------------------------------------------------------------------


def test_a_pause_holds_everyone_before_anything_is_kept_or_waited_for():
    async def go():
        desk, vacancies = Desk(ScriptedTransport()), []

        async def keep(_):
            vacancies.append(desk.limiter.vacancies(0))

        await desk.channel.learn(told(Verdict.THROTTLED, retry_after_s=30.0), reply(429), keep)
        async with desk.limiter.slot(0):
            return vacancies, desk.pauses, now()

    vacancies, pauses, sent_at = run_virtual(go())

    assert (vacancies, pauses) == ([0], [30.0])
    assert sent_at == pytest.approx(30.0)


def test_a_pause_can_be_laid_on_everyone_without_the_service_having_ordered_it():
    async def go():
        desk = Desk(ScriptedTransport())
        await desk.channel.pause(told(Verdict.OMITTED))
        async with desk.limiter.slot(0):
            return desk.pauses, now()

    assert run_virtual(go()) == ([10.0], pytest.approx(10.0))


def test_an_outcome_is_kept_even_if_it_ends_the_run():
    async def go():
        desk, kept = Desk(ScriptedTransport()), []

        async def keep(outcome):
            kept.append(outcome.verdict)

        with pytest.raises(TemporaryStop):
            await desk.channel.learn(told(Verdict.THROTTLED, retry_after_s=9_999.0), reply(429), keep)
        return kept, desk.pauses

    assert run_virtual(go()) == ([Verdict.THROTTLED], [9_999.0])


@pytest.mark.parametrize(("renewed", "verdict"), [(True, Verdict.RENEWED), (False, Verdict.UNAUTHORIZED)])
def test_a_refused_credential_is_renewed_where_its_source_has_another_one(renewed, verdict):
    class Source(ScriptedTransport):
        async def renew(self, credential):
            return renewed

    async def go():
        async def keep(_):
            pass

        return await Desk(Source()).channel.learn(told(Verdict.UNAUTHORIZED), reply(401), keep)

    assert run_virtual(go()).verdict is verdict


# --- refusals of the whole run, once something has been settled ----------------------------------------------------

REFUSALS = [Verdict.UNAUTHORIZED, Verdict.NO_SUCH_WORKFLOW, Verdict.WRONG_ADDRESS]


def proven_persist(*outcomes):
    """What attempts with these outcomes lead to after the service has settled something; how many, and when each."""

    async def go():
        desk = Desk(ScriptedTransport())
        desk.channel.health.well()
        left, sent_at = list(outcomes), []

        async def attempt():
            async with desk.limiter.slot(0):
                sent_at.append(now())
                return left.pop(0)

        try:
            came_to = await desk.channel.persist(attempt)
        except ServiceRefused as error:
            came_to = error
        return came_to, sent_at, desk

    return run_virtual(go())


@pytest.mark.parametrize("verdict", REFUSALS, ids=str)
def test_one_odd_answer_costs_two_seconds_and_a_probe_over_a_fresh_connection(verdict):
    done = told(Verdict.DONE)
    came_to, sent_at, desk = proven_persist(told(verdict), done)

    assert (came_to, sent_at) == (done, pytest.approx([0.0, 2.0]))
    assert (desk.pauses, desk.channel.transport.distrusted) == ([2.0], 1)


@pytest.mark.parametrize("verdict", REFUSALS, ids=str)
def test_a_refusal_that_stays_ends_the_run_after_three_probes_over_thirty_seconds(verdict):
    came_to, sent_at, desk = proven_persist(*[told(verdict)] * 5)

    assert isinstance(came_to, ServiceRefused)
    assert sent_at == pytest.approx([0.0, 2.0, 10.0, 30.0])
    assert desk.channel.transport.distrusted == 3


def test_what_no_later_attempt_can_change_ends_the_run_at_once_all_the_same():
    came_to, sent_at, _ = proven_persist(told(Verdict.FATAL), told(Verdict.DONE))

    assert isinstance(came_to, ServiceRefused)
    assert len(sent_at) == 1


def test_nothing_but_the_probe_is_sent_until_it_is_accepted():
    async def go():
        desk, sent_at = Desk(ScriptedTransport()), []
        desk.channel.health.well()
        desk.limiter.hold(5.0)

        async def keep(_):
            pass

        async def request():
            async with desk.limiter.slot(0):
                sent_at.append(now())
                await asyncio.sleep(3.0)
            await desk.channel.learn(told(Verdict.DONE), reply(200), keep)

        await asyncio.gather(*(request() for _ in range(4)))
        return sent_at

    assert run_virtual(go()) == pytest.approx([5.0, 8.0, 8.0, 8.0])


def test_a_request_that_is_refused_again_and_again_ends_the_run_though_others_go_through():
    async def go():
        desk, attempts = Desk(ScriptedTransport()), 0
        desk.channel.health.well()

        async def attempt():
            nonlocal attempts
            attempts += 1
            desk.channel.health.accepted(settles=True)  # another request went through meanwhile
            async with desk.limiter.slot(0):
                return told(Verdict.WRONG_ADDRESS)

        with pytest.raises(ServiceRefused):
            await desk.channel.persist(attempt)
        return attempts, now()

    attempts, ended_at = run_virtual(go())

    assert attempts == 4
    assert ended_at >= 30.0


# --- health -------------------------------------------------------------------------------------------------------


def test_an_illness_lasts_from_its_first_failure_until_something_succeeds():
    health = Health()

    assert (health.ill(10.0), health.ill(25.0)) == (0.0, 15.0)
    health.well()
    assert health.ill(30.0) == 0.0


def test_refusals_of_requests_that_were_on_the_wire_together_count_once():
    health = Health()

    assert health.run_refused(100.0, 99.0, 0) == 2.0
    assert health.run_refused(101.0, 99.5, 0) == 1.0  # was on the wire when the pause began
    assert health.run_refused(103.0, 99.9, 0) == 0.0  # the same, answered late
    assert health.run_refused(103.0, 102.5, 0) == 8.0  # the probe
    assert health.run_refused(112.0, 111.5, 0) == 20.0
    assert health.run_refused(133.0, 132.5, 0) is None
    health.accepted(settles=True)
    assert health.run_refused(134.0, 133.5, 0) == 2.0


def test_refusals_during_a_pause_are_part_of_it_and_only_an_order_makes_it_longer():
    health = Health()

    assert health.refused(0.0, None) == 10.0
    assert health.refused(4.0, None) == 6.0
    assert health.refused(4.0, 3.0) == 3.0  # an order of less does not shorten it
    assert health.paused_until == 10.0
    assert health.refused(4.0, 20.0) == 20.0
    assert (health.paused_until, health.refusals) == (24.0, 1)
    assert health.refused(24.0, None) == 20.0  # the second in a row
    health.well()
    assert health.refused(50.0, None) == 10.0
