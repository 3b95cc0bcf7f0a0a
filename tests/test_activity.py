"""The state of a run at each instant, the time in each state, and the timeline."""

import asyncio
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkwf.clock import Clock
from bulkwf.events import RateChanged, StateChanged
from bulkwf.model import RunState
from bulkwf.submission.activity import TIMELINE_S, Activity, StateClock, Timeline, quantile, state_at
from bulkwf.submission.journal import Journal
from bulkwf.submission.progress import Progress

LIMITS = [RunState.INSTANCES, RunState.REQUESTS, RunState.QUOTA, RunState.PLACES]
ACTIVITIES = st.builds(
    Activity,
    paused_until=st.one_of(st.just(-inf), st.floats(0, 200)),
    failing=st.booleans(),
    limit=st.sampled_from([None, *LIMITS]),
    committing=st.booleans(),
    reading=st.booleans(),
    on_wire=st.booleans(),
)


@pytest.mark.parametrize(
    ("more", "state"),
    [
        ({"paused_until": 11.0}, RunState.PAUSED),
        ({"paused_until": 10.0, "failing": True}, RunState.OUTAGE),
        *(({"failing": False, "limit": limit}, limit) for limit in LIMITS),
        ({"limit": None}, RunState.DISK),
        ({"committing": False}, RunState.SOURCE),
        ({"reading": False}, RunState.SERVICE),
        ({"on_wire": False}, RunState.IDLE),
    ],
)
def test_the_first_of_several_states_counts(more, state):
    """Each case lacks what decided the state in the case before."""
    everything = {
        "paused_until": -inf,
        "failing": False,
        "limit": None,
        "committing": False,
        "reading": False,
        "on_wire": False,
    }
    later = list(everything)[list(everything).index(next(reversed(more))) + 1 :]
    reasons = {"committing": True, "reading": True, "on_wire": True, "limit": RunState.PLACES, "failing": True}

    assert state_at(10.0, Activity(**everything | {name: reasons[name] for name in later} | more)) is state


@given(st.lists(st.tuples(st.floats(0, 50), ACTIVITIES), max_size=30))
def test_the_times_in_all_states_add_up_to_the_time_that_passed(steps):
    clock, now = StateClock(0.0), 0.0
    for length_s, activity in steps:
        now += length_s
        clock.update(now, activity)

    assert sum(clock.seconds.values()) == pytest.approx(now)
    assert all(length_s >= 0 for length_s in clock.seconds.values())


@given(st.lists(st.tuples(st.floats(0, 50), ACTIVITIES), max_size=30), st.floats(0.01, 5))
def test_the_times_do_not_depend_on_how_often_they_are_counted(steps, tick_s):
    seldom, often, now = StateClock(0.0), StateClock(0.0), 0.0
    doing = Activity()
    for length_s, activity in steps:
        now += length_s
        seldom.update(now, activity)
        for tick in range(int(min(length_s / tick_s, 20))):
            often.update(now - length_s + tick * tick_s, doing)
        often.update(now, activity)
        doing = activity

    assert list(often.seconds.values()) == pytest.approx(list(seldom.seconds.values()))


def test_a_pause_ends_without_an_update_at_its_end():
    clock = StateClock(0.0)
    clock.update(0.0, Activity(paused_until=7.0, on_wire=True))

    assert clock.state is RunState.PAUSED
    assert clock.update(10.0, Activity()) is True
    assert {state: s for state, s in clock.seconds.items() if s} == {RunState.PAUSED: 7.0, RunState.SERVICE: 3.0}


def test_an_update_returns_whether_the_state_has_changed():
    clock = StateClock(0.0)

    changes = [clock.update(now, Activity(reading=now in (1.0, 2.0))) for now in (0.0, 1.0, 2.0, 3.0)]

    assert changes == [False, True, False, True]


def test_an_interval_holds_what_happened_since_the_last_one():
    clock, timeline = StateClock(0.0), Timeline(0.0)
    clock.update(0.0, Activity(on_wire=True))
    for number in range(1, 11):
        timeline.attempted(number / 10, created=100, failed=number == 5)
    clock.update(4.0, Activity(reading=True))
    assert not timeline.due(TIMELINE_S - 0.1)
    clock.update(12.0, Activity())
    assert timeline.due(12.0)
    first = timeline.cut(12.0, clock.seconds)
    clock.update(15.0, Activity())
    second = timeline.cut(15.0, clock.seconds)

    assert (first.length_s, first.seconds) == (12.0, {RunState.SERVICE: 4.0, RunState.SOURCE: 8.0})
    assert (first.created, first.attempts, first.errors, first.latency_s) == (1_000, 10, 1, [0.5, 0.9, 1.0])
    assert (second.length_s, second.seconds, second.attempts, list(second.latency_s)) == (
        3.0,
        {RunState.IDLE: 3.0},
        0,
        [],
    )


@given(st.lists(st.floats(0, 100), min_size=1).map(sorted))
def test_quantiles_are_measured_values_in_rising_order(ordered):
    found = [quantile(ordered, share) for share in (0.0, 0.5, 0.9, 0.99, 1.0)]

    assert all(one in ordered for one in found)
    assert all(lower <= upper for lower, upper in pairwise(found))
    assert (found[0], found[-1]) == (ordered[0], ordered[-1])


def test_the_state_is_computed_once_for_all_changes_of_an_iteration_and_never_after_the_end():
    computed, seen = [], []

    class Buffered:
        """A checkpoint that stores only the timeline."""

        def note_interval(self, interval, started_at):
            seen.append("interval")

        async def flush(self):
            """Nothing is buffered."""

    def activity(committing):
        computed.append(committing)
        return Activity(limit=RunState.REQUESTS, rate_factor=0.5)

    async def run():
        clock = Clock(now=lambda: 0.0, wall=lambda: 0.0, sleep=asyncio.sleep, random=lambda: 0.0)
        journal = Journal(Buffered(), Progress(0.0), clock=clock, observe=seen.append, activity=activity)
        for _ in range(5):
            journal.update()
        assert computed == []
        await asyncio.sleep(0)
        assert len(computed) == 1
        journal.update()
        await journal.close(complete=False)
        journal.update()
        await asyncio.sleep(0)

    asyncio.run(run())

    assert len(computed) == 2
    assert seen == [StateChanged(state=RunState.REQUESTS), RateChanged(factor=0.5), "interval"]
