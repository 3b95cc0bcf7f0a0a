"""What follows an outcome: how long to wait, and when to stop and whom to tell."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkwf.errors import ServiceRefused
from bulkwf.model import Outcome, Verdict
from bulkwf.options import RetryPolicy
from bulkwf.retry import PATIENCE, Stop, Wait, backoff_s, plan, reject_limit

POLICY = RetryPolicy()


def outcome(verdict, retry_after_s=None):
    return Outcome(verdict=verdict, unsettled=(0,), message="the reason", retry_after_s=retry_after_s)


@pytest.mark.parametrize(
    ("verdict", "retries"),
    [
        (Verdict.NOT_SENT, None),
        (Verdict.IN_DOUBT, None),
        (Verdict.CONTRADICTION, 2),
        (Verdict.CHALLENGED, 3),
        (Verdict.NO_SUCH_WORKFLOW, 1),
        (Verdict.ORIGIN_TLS, 5),
        (Verdict.FATAL, 0),
    ],
)
def test_each_verdict_is_met_with_as_much_patience_as_the_table_grants(verdict, retries):
    last = 10_000 if retries is None else retries
    for streak in range(1, last + 1):
        assert isinstance(plan(POLICY, outcome(verdict), streak, 0.5), Wait)
    if retries is not None:
        step = plan(POLICY, outcome(verdict), retries + 1, 0.5)
        assert isinstance(step, Stop)
        assert isinstance(step.error, ServiceRefused)
        assert "the reason" in str(step.error)


def test_each_stop_tells_what_is_to_be_done():
    texts = [str(plan(POLICY, outcome(v), 99, 0.5).error) for v, rule in PATIENCE.items() if rule.retries < 99]

    remedies = [text.removeprefix("the service refuses the run: the reason. ") for text in texts]
    assert all(remedies)
    assert len(set(remedies)) == 5


def test_verdicts_that_call_for_another_act_than_waiting_are_not_planned():
    others = {
        Verdict.DONE,
        Verdict.OMITTED,
        Verdict.REFUSED,
        Verdict.TOO_LARGE,
        Verdict.THROTTLED,
        Verdict.UNAUTHORIZED,
        Verdict.ABSENT,
    }

    assert set(Verdict) - set(PATIENCE) == others


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
    assert plan(POLICY, outcome(Verdict.IN_DOUBT, ordered), 3, 1.0) == Wait(expected)


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
