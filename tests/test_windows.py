"""Windows never allow more than the limit in any period, and no wait is longer than that requires."""

from math import inf, nextafter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bulkwf.limits.pause import pause_s
from bulkwf.limits.quota import QuotaPacer, Said, quota_text
from bulkwf.limits.window import LOWEST_RATE_FACTOR, SLACK_S, Window


def fill(window, now, cost):
    assert window.wait_s(now, cost) == 0
    window.reserve(now, cost)
    window.written(now, cost)


# --- the window ---------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 12)),
        st.tuples(st.just("written"), st.integers(0, 9)),
        st.tuples(st.just("written before"), st.integers(0, 9)),
        st.tuples(st.just("unsent"), st.integers(0, 9)),
        st.tuples(st.just("pass"), st.floats(0, 1.5)),
        st.tuples(st.just("rate_factor"), st.sampled_from([1.0, 0.5, 0.25, LOWEST_RATE_FACTOR])),
        st.tuples(st.just("margin"), st.sampled_from([0.0, 0.02, 0.5])),
    ),
    max_size=60,
)


@settings(max_examples=400)
@given(
    steps=STEPS,
    limit=st.integers(1, 12),
    margin=st.sampled_from([0.0, 0.005]),
    burst_factor=st.sampled_from([2.0, inf]),
)
def test_no_period_exceeds_the_limit_after_any_sequence_of_steps(steps, limit, margin, burst_factor):
    window, now = Window(limit, 1.0, margin, burst_factor), 1_000.0
    in_flight, written = [], []
    for step, value in steps:
        if step == "send" and window.wait_s(now, value) == 0:
            window.reserve(now, value)
            in_flight.append((now, value))
        elif step in ("written", "written before") and in_flight:
            reserved_at, cost = in_flight.pop(value % len(in_flight))
            at = now if step == "written" else (reserved_at + now) / 2  # which became known only now
            window.written(at, cost)
            written.append((at, cost))
        elif step == "unsent" and in_flight:
            window.give_back(in_flight.pop(value % len(in_flight))[1])
        elif step == "pass":
            now += value
        elif step == "rate_factor":
            window.rate_factor = value
        elif step == "margin":
            window.margin_s = max(window.margin_s, value)
        assert window.capacity(now, 1, 0.0) >= 0
    for start, _ in written:
        within = [cost for at, cost in written if start <= at < start + 1.0]
        assert sum(within) <= limit or len(within) == 1


@settings(max_examples=300)
@given(
    uses=st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 20)), max_size=12),
    limit=st.integers(1, 15),
    cost=st.integers(1, 20),
    rate_factor=st.sampled_from([1.0, 0.5]),
)
@example(uses=[(0.0, 10)], limit=5, cost=10, rate_factor=1.0)
def test_the_wait_is_exact_once_everything_is_written(uses, limit, cost, rate_factor):
    window, now = Window(limit, 1.0, 0.005), 1_000.0
    window.rate_factor = rate_factor
    for gap, used in uses:
        now += gap
        window.used(now, used)

    wait = window.wait_s(now, cost)

    assert 0 <= wait <= window.span_s + 1e-6
    if wait > 1e-5:
        assert window.wait_s(now + wait - 1e-5, cost) > 0
    assert window.wait_s(now + wait + 1e-6, cost) == 0


def test_a_use_counts_from_its_reservation_until_a_period_after_its_writing():
    window = Window(3, 1.0, 0.25)
    window.reserve(50.0, 3)
    assert (window.wait_s(50.0, 1), window.capacity(50.0, 1, 0.0)) == (inf, 0)

    window.written(60.0, 3)

    assert window.wait_s(60.0, 1) == pytest.approx(1.25)
    assert window.wait_s(61.0, 1) == pytest.approx(0.25)
    assert (window.wait_s(61.25, 3), window.capacity(61.25, 1, 0.0)) == (0.0, 3)


def test_a_use_reported_late_counts_from_when_it_was():
    window = Window(10, 1.0, 0.0)
    for cost in (4, 6):
        window.reserve(0.0, cost)
    window.written(0.3, 6)
    window.written(0.1, 4)

    assert [window.wait_s(0.4, cost) for cost in (4, 5)] == pytest.approx([0.7, 0.9])
    assert window.capacity(1.1, 4, 0.0) == 1


def test_a_reservation_that_was_given_back_does_not_count():
    window = Window(3, 1.0, 0.0)
    window.reserve(0.0, 2)
    window.give_back(2)

    assert (window.wait_s(0.0, 3), window.capacity(0.0, 1, 0.0)) == (0.0, 3)


def test_the_wait_lasts_until_enough_uses_have_expired():
    window = Window(10, 1.0, 0.0)
    for at, cost in ((0.0, 4), (0.2, 4), (0.4, 2)):
        fill(window, at, cost)

    assert [window.wait_s(0.4, cost) for cost in (1, 4, 5, 8, 9)] == pytest.approx([0.6, 0.6, 0.8, 0.8, 1.0])


def pass_through(window, now, cost, times):
    """When each of *times* uses goes if each goes as soon as it may."""
    left = []
    for _ in range(times):
        while (wait := window.wait_s(now, cost)) > 0:
            now += wait
        fill(window, now, cost)
        left.append(now)
    return left


def test_an_empty_window_is_filled_at_the_burst_factor_at_most():
    left = pass_through(Window(3_000, 1.0, 0.0, burst_factor=2.0), 0.0, 100, 60)

    assert left[:30] == pytest.approx([number / 60 for number in range(30)], abs=2 * SLACK_S)
    assert left[30:] == pytest.approx([1 + number / 60 for number in range(30)], abs=2 * SLACK_S)


def test_a_reduced_rate_is_spread_over_the_whole_period():
    """A burst would be refused where another client shares the rate, though the sum over the period is small enough."""
    window = Window(300, 1.0, 0.0, burst_factor=2.0)
    window.rate_factor = 0.5

    assert pass_through(window, 0.0, 100, 6) == pytest.approx([number * 2 / 3 for number in range(6)], abs=2 * SLACK_S)


def test_uses_late_by_a_timer_s_precision_do_not_delay_the_next_ones():
    window, now, uses = Window(10_000, 1.0, 0.0, burst_factor=2.0), 0.0, 0
    while now < 0.5:
        now += 0.001 + window.wait_s(now, 2)  # each wake-up is late by a millisecond
        while window.wait_s(now, 2) == 0:
            fill(window, now, 2)
            uses += 1

    assert uses == pytest.approx(5_000, rel=0.05)


@settings(max_examples=400)
@given(
    uses=st.lists(st.tuples(st.floats(0, 0.3), st.integers(1, 12)), max_size=12),
    cost=st.integers(1, 6),
    within_s=st.floats(0, 5.0),
    rate_factor=st.sampled_from([1.0, 0.5]),
    burst_factor=st.sampled_from([2.0, inf]),
)
def test_capacity_is_an_upper_bound_and_zero_only_if_nothing_fits(uses, cost, within_s, rate_factor, burst_factor):
    window, now = Window(12, 1.0, 0.005, burst_factor), 1_000.0
    window.rate_factor = rate_factor
    for gap, used in uses:
        now += gap
        if window.wait_s(now, used) == 0:
            fill(window, now, used)

    turns = window.capacity(now, cost, within_s)
    had = sum(at <= now + within_s for at in pass_through(window, now, cost, turns + 1))

    assert had <= turns
    assert (had == 0) == (turns == 0)


def test_the_wait_is_infinite_where_it_depends_on_a_reservation():
    window = Window(10, 1.0, 0.0)
    fill(window, 0.0, 6)
    window.reserve(0.0, 4)

    assert window.wait_s(0.0, 6) == pytest.approx(1.0)
    assert window.wait_s(0.0, 7) == inf


def test_a_use_larger_than_the_limit_goes_alone():
    window = Window(50, 1.0, 0.0)
    fill(window, 0.0, 100)

    assert window.wait_s(0.1, 100) == pytest.approx(0.9)
    assert window.wait_s(0.1, 1) == pytest.approx(0.9)
    fill(window, 1.0, 100)
    window.reserve(1.0, 1)
    assert window.wait_s(5.0, 100) == inf


def test_a_reduced_rate_lengthens_the_period_so_that_a_batch_fits():
    window = Window(100, 1.0, 0.0)
    window.rate_factor = 0.5
    fill(window, 0.0, 100)

    assert window.span_s == 2.0
    assert window.wait_s(1.0, 100) == pytest.approx(1.0)


def test_a_wait_is_long_enough_to_advance_the_clock():
    window = Window(1, 1.0, 0.0)
    window.used(0.1, 1)

    assert window.wait_s(nextafter(1.1, 0), 1) >= 1e-6

    window = Window(10, 1.0, 0.0, burst_factor=2.0)
    fill(window, 1.0, 1)
    waits = {window.wait_s(window._next_at + step * 1e-7, 1) for step in range(-30, 5)}
    assert 0.0 in waits
    assert min(waits - {0.0}) >= 1e-6


def test_uses_of_an_earlier_process_count_from_their_own_time():
    window = Window(1_000, 300.0, 0.0)
    window.used(-200.0, 900)

    assert window.capacity(0.0, 1, 0.0) == 100
    assert window.wait_s(0.0, 101) == pytest.approx(100.0)


# --- the pace that the service asks for ---------------------------------------------------------------------------


@given(left=st.integers(0, 400), seconds=st.integers(1, 300), later_s=st.floats(0, 400), within_s=st.floats(0, 400))
def test_capacity_is_the_number_of_requests_that_the_gap_allows(left, seconds, later_s, within_s):
    pace = QuotaPacer(3.0)
    pace.sent(0.0)
    observe(pace, 0.0, f'"default";r={left};t={seconds}')
    turns = pace.capacity(later_s, within_s)

    now, had = later_s, 0
    while had < min(turns + 1, 500):
        wait_s = pace.wait_s(now)
        if now + wait_s > later_s + within_s + 1e-9:
            break
        now += wait_s
        pace.sent(now)
        had += 1

    assert had == pytest.approx(min(turns, 500), abs=1)


def observe(pace, now, text, sent_at=None):
    return pace.observe(Said(now, now if sent_at is None else sent_at, text))


@pytest.mark.parametrize(
    ("header", "gap"),
    [
        ('"default";r=50;t=300', 6.0),
        ('"default"; r=50; t=300', 6.0),
        ('"default";r=50 ; t=300', 6.0),
        ('"default";r=1000;t=300', 0.0),
        ('"default";r=999;t=300', 300 / 999),
        ('"a";r=1000;t=300, "b";r=3;t=30', 10.0),
        ('"default";r=5;t=0', 0.0),
        ("", 0.0),
        ("nonsense", 0.0),
        ('"default";r=x;t=300', 0.0),
        ('"default";r=٣;t=300', 0.0),
        ('"default";r=-1;t=300', 0.0),
        ('"default";r=1234567890;t=300', 0.0),
    ],
)
def test_requests_are_spaced_where_the_quota_is_below_our_own_limit(header, gap):
    pace = QuotaPacer(1_000 / 300)
    pace.sent(7.0)

    spent = observe(pace, 7.0, header)

    assert spent is False
    assert pace.wait_s(7.0) == pytest.approx(gap)
    assert pace.wait_s(7.0 + gap + 1) == 0


def test_a_spent_quota_delays_requests_until_the_next_period():
    pace = QuotaPacer(1_000 / 300)

    assert observe(pace, 7.0, '"a";r=9;t=1, "default";r=0;t=120') is True
    assert pace.wait_s(7.0) == 120.0


def test_each_request_delays_the_next_one_by_the_gap():
    pace = QuotaPacer(1_000 / 300)
    pace.sent(0.0)
    assert pace.wait_s(0.0) == 0
    observe(pace, 0.0, '"default";r=10;t=100')

    pace.sent(10.0)

    assert pace.wait_s(10.0) == pytest.approx(10.0)
    assert pace.wait_s(15.0) == pytest.approx(5.0)


def test_the_gap_begins_at_the_request_not_at_its_answer():
    pace = QuotaPacer(1_000 / 300)
    pace.sent(3.0)
    observe(pace, 8.0, '"default";r=10;t=100')

    assert pace.wait_s(8.0) == pytest.approx(5.0)


def test_a_quota_ends_with_its_period():
    pace = QuotaPacer(1_000 / 300)
    observe(pace, 0.0, '"default";r=2;t=100')
    pace.sent(99.0)

    assert pace.wait_s(99.0) == pytest.approx(1.0)
    assert pace.wait_s(100.0) == 0


def test_an_answer_without_the_header_changes_nothing():
    pace = QuotaPacer(1_000 / 300)
    pace.sent(0.0)
    observe(pace, 0.0, '"default";r=10;t=100')

    assert observe(pace, 1.0, "") is False
    assert pace.wait_s(1.0) == pytest.approx(9.0)
    pace.sent(10.0)
    assert pace.wait_s(10.0) == pytest.approx(10.0)


def test_a_larger_quota_ends_the_gap():
    pace = QuotaPacer(1_000 / 300)
    pace.sent(0.0)
    observe(pace, 0.0, '"default";r=1;t=100')
    observe(pace, 1.0, '"default";r=1200;t=300')

    assert pace.wait_s(1.0) == 0


def test_any_quota_sets_the_gap_without_a_limit_of_our_own():
    pace = QuotaPacer(inf)
    pace.sent(0.0)
    observe(pace, 0.0, '"default";r=600;t=300')

    assert pace.wait_s(0.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("header", "kept"),
    [
        ('"default";r=50;t=300', "r=50;t=300"),
        ('"a";r=007;t=300, "b"; r=3 ; t=30', "r=7;t=300,r=3;t=30"),
        ('"default";r=0;t=0', "r=0;t=0"),
        ("nonsense", None),
    ],
)
def test_a_stored_quota_sets_the_same_gap(header, kept):
    heard, stored = QuotaPacer(1_000 / 300), QuotaPacer(1_000 / 300)
    assert quota_text({"ratelimit": header}) == kept
    observe(heard, 7.0, header)
    stored.restore(7.0, [] if kept is None else [Said(7.0, 7.0, kept)], [])
    assert stored.wait_s(7.0) == heard.wait_s(7.0)


@pytest.mark.parametrize(("sent_at", "gap"), [(0.5, 99.0), (1.5, 0.0)])
def test_an_answer_that_may_be_older_does_not_shorten_the_gap(sent_at, gap):
    pace = QuotaPacer(1_000 / 300)
    pace.sent(2.0)
    observe(pace, 1.0, '"default";r=1;t=100')
    observe(pace, 2.0, '"default";r=1200;t=300', sent_at)

    assert pace.wait_s(2.0) == pytest.approx(gap)


def test_an_answer_that_may_be_older_can_lengthen_the_gap():
    pace = QuotaPacer(1_000 / 300)
    observe(pace, 1.0, '"default";r=3;t=100')

    assert observe(pace, 2.0, '"default";r=0;t=100', sent_at=0.5) is True
    assert pace.wait_s(2.0) == pytest.approx(100.0)


def test_a_quota_is_unknown_from_the_end_of_its_window_to_the_next_report():
    pace = QuotaPacer(1_000 / 300)
    observe(pace, 0.0, '"default";r=0;t=100')
    assert [pace.expired(at) for at in (0.0, 99.0, 100.0)] == [False, False, True]

    pace.forget()
    assert not pace.expired(100.0)
    observe(pace, 100.0, '"default";r=1200;t=300')
    assert not pace.expired(500.0)


@pytest.mark.parametrize(
    ("text", "sent", "wait_s"),
    [
        ("r=0;t=200", [70.0], 170.0),
        ("r=0;t=20", [70.0], 0.0),
        ("r=5;t=200", [70.0], 10.0),  # reported 30 s ago, one every 40 s
        ("r=5;t=200", [70.0, 80.0, 90.0], 30.0),
        ("r=2;t=200", [70.0, 80.0, 90.0], 170.0),  # nothing is left
        ("r=5;t=200", [70.0, 500.0], 40.0),  # the clock was set back: it went now
        ("r=900;t=300", [70.0, 80.0], 0.0),
    ],
)
def test_a_restored_quota_is_reduced_by_the_requests_since(text, sent, wait_s):
    pace = QuotaPacer(2.0)

    spent = pace.restore(100.0, [Said(70.0, 69.0, text)], sent)

    assert pace.wait_s(100.0) == pytest.approx(wait_s)
    assert spent is ("r=0" in text or wait_s == 170.0)


def test_no_more_requests_go_than_the_quota_says_until_the_next_report():
    """Also where the rate itself is below our own limit."""
    pace = QuotaPacer(2.0)
    observe(pace, 0.0, '"a";r=2;t=1,"b";r=3;t=1')
    sent = []
    for at in (0.1, 0.2, 0.3):
        if pace.wait_s(at) == 0:
            pace.sent(at)
            sent.append(at)
    assert sent == [0.1, 0.2]
    assert (pace.capacity(0.3, 0.5), pace.wait_s(0.3)) == (0, pytest.approx(0.7))
    assert pace.expired(1.0)
    observe(pace, 0.4, '"a";r=90;t=5', sent_at=0.35)
    assert (pace.capacity(0.4, 0.5), pace.wait_s(0.4)) == (90, 0)


def test_an_unsent_request_is_added_to_the_quota_unless_a_report_came_since():
    pace = QuotaPacer(2.0)
    observe(pace, 0.0, '"a";r=1;t=100')
    pace.sent(0.1)
    pace.unsent(0.1)
    assert pace._left == [(1, 100.0)]
    pace.sent(0.2)
    observe(pace, 0.3, '"a";r=0;t=100')
    pace.unsent(0.2)
    assert pace.wait_s(0.3) == pytest.approx(100)


def test_the_report_that_counts_is_found_among_restored_ones():
    pace = QuotaPacer(2.0)
    words = [Said(10.0, 9.0, "r=0;t=300"), Said(50.0, 40.0, "r=4;t=200"), Said(51.0, 41.0, "r=5;t=200")]

    assert pace.restore(60.0, words, [10.0, 50.0]) is False
    assert pace.wait_s(60.0) == pytest.approx(40.0)  # r=4; the third may be older, the first is


def test_restored_reports_older_than_the_last_one_heard_are_ignored():
    pace = QuotaPacer(2.0)
    observe(pace, 50.0, "r=90;t=300")
    pace.restore(60.0, [Said(40.0, 39.0, "r=0;t=300")], [])

    assert pace.capacity(60.0, 0.0) == 1


def test_a_quota_from_a_fast_clock_holds_for_its_own_period_at_most():
    pace = QuotaPacer(2.0)
    pace.restore(100.0, [Said(5_000.0, 4_999.0, "r=0;t=200")], [])

    assert pace.wait_s(100.0) == pytest.approx(200.0)


# --- the pause ----------------------------------------------------------------------------------------------------


def test_a_pause_without_an_order_doubles_from_ten_seconds_to_five_minutes():
    assert [pause_s(n, None) for n in range(1, 8)] == [10, 20, 40, 80, 160, 300, 300]
    assert pause_s(10**9, None) == 300


@given(refusals=st.integers(1, 50), ordered=st.floats(0, 1e9))
def test_an_ordered_pause_is_never_shortened_and_has_a_lower_bound(refusals, ordered):
    least = min(2 ** (refusals - 1), 32)

    assert pause_s(refusals, ordered) == max(ordered, least)
