"""What follows a judgement: how long to wait, when to stop, and what the error says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkwf.attempt import Judgement, Verdict
from bulkwf.errors import ServiceRefused
from bulkwf.limits.backoff import backoff_s
from bulkwf.options import RetryPolicy
from bulkwf.submission.retries import PROBE_AFTER_S, Probe, Stop, Wait, plan, reject_limit

POLICY = RetryPolicy()


def judgement(verdict, retry_after_s=None):
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
def test_each_verdict_gets_the_retries_of_the_table(verdict, retries, proven_retries):
    for proven, number in ((False, retries), (True, proven_retries)):
        for streak in range(1, number + 1):
            assert isinstance(plan(POLICY, judgement(verdict), streak, 0.5, proven=proven), Wait)
        if number != FOREVER:
            step = plan(POLICY, judgement(verdict), number + 1, 0.5, proven=proven)
            assert isinstance(step, Probe if proven and verdict is not Verdict.FATAL else Stop)
            assert isinstance(step.error, ServiceRefused)
            assert "the reason" in str(step.error)


def test_refusal_of_the_run_is_probed_three_times_over_thirty_seconds():
    assert len(PROBE_AFTER_S) >= 3
    assert sum(PROBE_AFTER_S) >= 30.0


def test_each_error_says_what_to_do():
    limited = [verdict for verdict, retries, _ in RETRIES if retries != FOREVER]
    texts = [str(plan(POLICY, judgement(verdict), 99, 0.5, proven=False).error) for verdict in limited]

    remedies = [text.partition(": the reason. ")[2] for text in texts]
    assert all(remedies)
    assert len(set(remedies)) == len(limited)


@pytest.mark.parametrize(
    ("streak", "longest"), [(1, 0.5), (2, 1), (3, 2), (4, 4), (7, 32), (8, 60), (9, 60), (100, 60), (10**6, 60)]
)
def test_backoff_doubles_from_half_a_second_to_a_minute(streak, longest):
    assert backoff_s(POLICY, streak, 1.0) == longest
    assert backoff_s(POLICY, streak, 0.5) == longest / 2
    assert backoff_s(POLICY, streak, 0.0) == 0.0


@given(
    base=st.floats(0.001, 10),
    longest=st.floats(10, 1_000),
    streak=st.integers(1, 10_000),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_full_jitter_draws_the_wait_between_zero_and_its_bound(base, longest, streak, draw):
    policy = RetryPolicy(base_s=base, max_wait_s=longest)

    assert 0 <= backoff_s(policy, streak, draw) <= min(longest, base * 2 ** min(streak - 1, 60))


@pytest.mark.parametrize(("ordered", "expected"), [(None, 2.0), (1.0, 2.0), (0.0, 2.0), (90.0, 90.0)])
def test_wait_ordered_by_the_service_is_never_shortened(ordered, expected):
    assert plan(POLICY, judgement(Verdict.IN_DOUBT, ordered), 3, 1.0, proven=False) == Wait(expected)


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
def test_reject_limit_is_the_users_or_a_hundred_or_one_percent(max_rejects, rows, limit):
    assert reject_limit(max_rejects, rows) == limit
