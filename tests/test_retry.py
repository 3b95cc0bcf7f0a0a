"""What follows an outcome: how long to wait, and when to stop and whom to tell."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkwf.attempt import Judgement, Verdict
from bulkwf.errors import ServiceRefused
from bulkwf.limits.backoff import backoff_s
from bulkwf.options import RetryPolicy
from bulkwf.submission.retries import PROBE_AFTER_S, Probe, Stop, Wait, plan, reject_limit

POLICY = RetryPolicy()


def outcome(verdict, retry_after_s=None):
    return Judgement(verdict=verdict, unsettled=(0,), message="the reason", retry_after_s=retry_after_s)


FOREVER = 10_000
RETRIES = [
    # verdict, retries before anything is settled by the session, retries afterwards
    (Verdict.NOT_SENT, FOREVER, FOREVER),
    (Verdict.IN_DOUBT, FOREVER, FOREVER),
    (Verdict.HANDSHAKE, 3, FOREVER),
    (Verdict.CONTRADICTION, 2, 2),
    (Verdict.CHALLENGED, 3, 3),
    (Verdict.UNAUTHORIZED, 0, 0),
    (Verdict.NO_SUCH_WORKFLOW, 1, 0),
    (Verdict.WRONG_ADDRESS, 0, 0),
    (Verdict.ORIGIN_TLS, 5, 5),
    (Verdict.FATAL, 0, 0),
]


@pytest.mark.parametrize(("verdict", "retries", "proven_retries"), RETRIES)
def test_each_verdict_gets_as_many_retries_as_the_table_grants(verdict, retries, proven_retries):
    for proven, number in ((False, retries), (True, proven_retries)):
        for streak in range(1, number + 1):
            assert isinstance(plan(POLICY, outcome(verdict), streak, 0.5, proven=proven), Wait)
        if number != FOREVER:
            step = plan(POLICY, outcome(verdict), number + 1, 0.5, proven=proven)
            assert isinstance(step, Probe if proven and verdict is not Verdict.FATAL else Stop)
            assert isinstance(step.error, ServiceRefused)
            assert "the reason" in str(step.error)


def test_three_probes_over_thirty_seconds_follow_a_refusal_of_the_run():
    assert len(PROBE_AFTER_S) >= 3
    assert sum(PROBE_AFTER_S) >= 30.0


def test_each_stop_tells_what_is_to_be_done():
    limited = [verdict for verdict, retries, _ in RETRIES if retries != FOREVER]
    texts = [str(plan(POLICY, outcome(verdict), 99, 0.5, proven=False).error) for verdict in limited]

    remedies = [text.partition(": the reason. ")[2] for text in texts]
    assert all(remedies)
    assert len(set(remedies)) == len(limited)


@pytest.mark.parametrize(
    ("streak", "longest"), [(1, 0.5), (2, 1), (3, 2), (4, 4), (7, 32), (8, 60), (9, 60), (100, 60), (10**6, 60)]
)
def test_the_backoff_doubles_from_half_a_second_to_a_minute(streak, longest):
    assert backoff_s(POLICY, streak, 1.0) == longest
    assert backoff_s(POLICY, streak, 0.5) == longest / 2
    assert backoff_s(POLICY, streak, 0.0) == 0.0


@given(
    base=st.floats(0.001, 10),
    longest=st.floats(10, 1_000),
    streak=st.integers(1, 10_000),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_full_jitter_spreads_the_wait_from_nothing_to_its_bound(base, longest, streak, draw):
    policy = RetryPolicy(base_s=base, max_wait_s=longest)

    assert 0 <= backoff_s(policy, streak, draw) <= min(longest, base * 2 ** min(streak - 1, 60))


@pytest.mark.parametrize(("ordered", "expected"), [(None, 2.0), (1.0, 2.0), (0.0, 2.0), (90.0, 90.0)])
def test_a_wait_that_the_service_ordered_is_never_shortened(ordered, expected):
    assert plan(POLICY, outcome(Verdict.IN_DOUBT, ordered), 3, 1.0, proven=False) == Wait(expected)


@pytest.mark.parametrize(
    ("max_rejects", "rows", "limit"),
    [
        (None, 0, 100),
        (None, 9_999, 100),
        (None, 10_100, 101),
        (None, 1_000_000, 10_000),
        (0, 1_000_000, 0),
        (5, 0, 5),
    ],
)
def test_rejects_are_bound_by_the_users_number_or_by_a_hundred_and_one_percent(max_rejects, rows, limit):
    assert reject_limit(max_rejects, rows) == limit
