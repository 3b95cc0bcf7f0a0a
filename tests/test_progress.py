"""Counts of what is durable: rate, time left, summary."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkwf.attempt import Judgement, Verdict
from bulkwf.model import Counts, Result
from bulkwf.submission.progress import RATE_WINDOW_S, Progress


def outcome(created=0, existed=0, rejected=0, answered_otherwise=0):
    kinds = ["existed"] * existed + ["rejected"] * rejected + ["created"] * answered_otherwise
    others = tuple((n, Result(row=n, id=str(n), outcome=kind)) for n, kind in enumerate(kinds))
    return Judgement(verdict=Verdict.DONE, created=range(created), others=others)


def summary(progress, **how):
    return progress.summary(progress.started_at, **({"complete": True, "fail_on_existed": False} | how))


COUNTS = st.lists(st.tuples(*[st.integers(0, 20)] * 4), max_size=8)


@given(counts=COUNTS, invalid=st.integers(0, 9), more=st.integers(0, 9))
def test_counts_add_up_settled_rows_and_leave_the_rest_pending(counts, invalid, more):
    progress = Progress(started_at=0.0)
    progress.begun(sum(map(sum, counts)) + more, invalid)
    for created, existed, rejected, answered_otherwise in counts:
        progress.settled(outcome(created, existed, rejected, answered_otherwise), existed // 2, 1.0)

    found = summary(progress)

    assert found.created == sum(c + t for c, _, _, t in counts)
    assert found.existed == sum(e for _, e, _, _ in counts)
    assert found.existed_in_doubt == sum(e // 2 for _, e, _, _ in counts)
    assert found.rejected == sum(r for _, _, r, _ in counts)
    assert (found.invalid, found.pending) == (invalid, more)
    assert found.rows == progress.counts.rows == sum(map(sum, counts)) + more + invalid
    assert found.settled == found.rows - more


def test_rows_of_earlier_sessions_are_counted_but_not_settled_now():
    progress = Progress(started_at=0.0, counts=Counts(created=500, rejected=2, pending=10), settled_before=502)
    progress.settled(outcome(created=10), 0, 2.0)

    assert (progress.settled_now, summary(progress).settled_now, summary(progress).created) == (10, 10, 510)
    assert progress.rate(2.0) == pytest.approx(5.0)


ENDS = [
    (Counts(created=9), False, 0),
    (Counts(created=9, existed=9), False, 0),
    (Counts(created=9, existed=9), True, 1),
    (Counts(created=9, existed=9, existed_in_doubt=9), True, 0),
    (Counts(created=9, existed=9, existed_in_doubt=8), True, 1),
    (Counts(created=9, rejected=1), False, 1),
    (Counts(created=9, invalid=1), False, 1),
    (Counts(), True, 0),
]


@pytest.mark.parametrize(("totals", "fail_on_existed", "exit_code"), ENDS)
def test_an_incomplete_run_exits_with_75_whatever_its_rows(totals, fail_on_existed, exit_code):
    found = summary(Progress(started_at=0.0, counts=totals), complete=False, fail_on_existed=fail_on_existed)

    assert (found.complete, found.exit_code) == (False, 75)


@pytest.mark.parametrize(("totals", "fail_on_existed", "exit_code"), ENDS)
def test_the_exit_code_is_1_if_rows_failed(totals, fail_on_existed, exit_code):
    found = summary(Progress(started_at=0.0, counts=totals), fail_on_existed=fail_on_existed)

    assert found.exit_code == exit_code


def test_the_summary_has_attempts_length_and_pauses_of_the_session():
    progress = Progress(started_at=100.0, attempts=7, paused_s=30.0)

    found = progress.summary(160.0, complete=False, fail_on_existed=False)

    assert (found.attempts, found.elapsed_s, found.paused_s, found.complete) == (7, 60.0, 30.0, False)


def test_the_rate_is_measured_over_the_last_half_minute():
    progress = Progress(started_at=0.0)
    for second in range(1, 201):
        progress.settled(outcome(created=10 if second <= 100 else 50), 0, float(second))

    assert progress.rate(200.0) == pytest.approx(50.0)
    assert len(progress._marks) <= RATE_WINDOW_S + 3, "and what is older is forgotten"


def test_the_rate_falls_while_nothing_is_settled():
    progress = Progress(started_at=0.0)
    for second in range(1, 41):
        progress.settled(outcome(created=100), 0, float(second))

    assert progress.rate(40.0) > 2 * progress.rate(120.0) > 0


def test_the_rate_is_0_before_anything_is_settled():
    progress = Progress(started_at=5.0, reading=lambda: 0.5)

    assert (progress.rate(5.0), progress.left_s(5.0)) == (0, None)


def test_the_time_left_follows_from_the_share_that_was_read():
    progress = Progress(started_at=0.0, reading=lambda: 0.25)
    progress.begun(500, 0)
    progress.settled(outcome(created=400), 0, 4.0)

    assert progress.rate(4.0) == pytest.approx(100.0)
    assert progress.left_s(4.0) == pytest.approx((2_000 - 400) / 100)


@pytest.mark.parametrize("share", [None, 0.0])
def test_the_time_left_is_unknown_without_the_length_of_the_list(share):
    progress = Progress(started_at=0.0, reading=lambda: share)
    progress.begun(10, 0)
    progress.settled(outcome(created=10), 0, 1.0)

    assert progress.left_s(1.0) is None


def test_at_the_end_no_time_is_left():
    progress = Progress(started_at=0.0, reading=lambda: 1.0)
    progress.begun(10, 0)
    progress.settled(outcome(created=10), 0, 1.0)

    assert progress.left_s(1.0) == 0.0
