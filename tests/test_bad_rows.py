"""The search for the bad rows of a refused request, against a service that is a function."""

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from math import ceil, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkwf.batching.bad_rows import BadRowRate, Search, named_row, split_sizes

MOST = 100


@dataclass
class Played:
    """What a search has sent, and what became of each row."""

    requests: list[Sequence[int]] = field(default_factory=list)
    created: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)

    @property
    def instances(self) -> int:
        return sum(map(len, self.requests))


def play(
    rows: Sequence[int],
    refuses: Callable[[Sequence[int]], bool],
    *,
    name: Callable[[Sequence[int]], int | None] = lambda part: None,
    settles: Callable[[Sequence[int]], Collection[int]] = lambda part: (),
    rate: BadRowRate | None = None,
    request_cost: float = 25.0,
) -> Played:
    """Send *rows* as a delivery does. A refused request may have settled some of its rows before (`settles`)."""
    search, played = Search(rows, rate or BadRowRate(MOST), request_cost), Played()
    part: Sequence[int] = rows

    def refused(part: Sequence[int]) -> bool:
        played.requests.append(part)
        return refuses(part)

    while part:
        assert set(part) <= set(search.rows)
        assert len(set(part)) == len(part)
        if refused(part):
            left = [row for row in part if row not in settles(part)] or list(part)
            if len(left) < len(part):
                settled = [row for row in part if row not in left]
                played.created += settled
                search.created(settled)
            if len(left) > 1:
                search.refused(left, name(left))
            elif refused(left):  # once more
                played.rejected += left
                search.found(left[0])
            else:
                played.created += left
                search.created(left)
        else:
            played.created += part
            search.created(part)
        part = search.next_part()
    assert sorted(played.created + played.rejected) == sorted(rows)
    assert not search.rows
    return played


def most_requests(rows: int) -> float:
    """What any service can make a search cost: each row settles after a chain of refusals that halve the suspects."""
    return rows * (ceil(log2(rows)) + 3) if rows > 1 else 2


LISTS = st.integers(1, MOST).map(lambda n: list(range(n)))
COSTS = st.sampled_from([5.0, 25.0, 1_000.0])


@given(LISTS, st.data(), COSTS)
def test_exactly_the_bad_rows_are_rejected(rows, data, cost):
    bad = data.draw(st.sets(st.sampled_from(rows)))

    played = play(rows, lambda part: not bad.isdisjoint(part), request_cost=cost)

    assert set(played.rejected) == bad
    assert len(played.requests) <= most_requests(len(rows))


@given(LISTS, st.data())
def test_exactly_the_bad_rows_are_rejected_whatever_the_refusals_name(rows, data):
    bad = data.draw(st.sets(st.sampled_from(rows)))
    names = data.draw(st.functions(like=lambda part: None, returns=st.none() | st.sampled_from(rows), pure=True))

    def name(part):
        named = names(tuple(part))
        return named if named in part else None

    played = play(rows, lambda part: not bad.isdisjoint(part), name=name)

    assert set(played.rejected) == bad


@given(LISTS, st.data())
def test_rows_that_are_bad_only_together_are_all_created(rows, data):
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(rows), st.sampled_from(rows)).filter(lambda p: p[0] != p[1])))
    bad = data.draw(st.sets(st.sampled_from(rows), max_size=3))

    def refuses(part):
        sent = set(part)
        return not bad.isdisjoint(sent) or any(sent.issuperset(pair) for pair in pairs)

    played = play(rows, refuses)

    assert set(played.rejected) == bad
    assert len(played.requests) <= most_requests(len(rows))


@given(LISTS, st.data())
def test_search_ends_and_rejects_only_what_was_refused_twice_alone_under_random_refusals(rows, data):
    draws = iter(data.draw(st.lists(st.booleans(), max_size=300)))
    answers = []

    def refuses(part):
        answers.append((tuple(part), next(draws, False)))
        return answers[-1][1]

    played = play(rows, refuses)

    for row in played.rejected:
        assert answers.count(((row,), True)) == 2
    assert not any(answers.count(((row,), True)) == 2 for row in played.created)
    assert len(played.requests) <= most_requests(len(rows))


@given(LISTS)
def test_search_ends_when_everything_is_refused(rows):
    played = play(rows, lambda part: True)

    assert played.rejected == rows
    assert len(played.requests) <= most_requests(len(rows))


@given(LISTS, st.data())
def test_rows_that_a_lost_answer_has_settled_are_not_sent_again(rows, data):
    """The answer to an attempt is lost after it created some rows; the next attempt, with the others, is refused."""
    bad = data.draw(st.sets(st.sampled_from(rows)))
    settled = data.draw(st.sets(st.sampled_from(rows))) - bad

    played = play(rows, lambda part: not bad.isdisjoint(part), settles=lambda part: settled)

    assert set(played.rejected) == bad
    for row in settled:
        assert sum(row in part for part in played.requests) == 1


# --- the rules --------------------------------------------------------------------------------------------------------


def test_other_part_is_split_without_being_sent_when_one_part_is_created():
    played = play(range(8), lambda part: 7 in part, request_cost=1_000.0)

    assert played.requests == [range(8), [0, 1, 2, 3], [4, 5], [6], [7], [7]]


def test_rest_is_sent_whole_after_a_bad_row_is_found():
    played = play(range(8), lambda part: 1 in part, request_cost=1_000.0)

    assert played.requests == [range(8), [0, 1, 2, 3], [0, 1], [0], [1], [1], [2, 3, 4, 5, 6, 7]]


def test_named_row_is_sent_alone_first():
    played = play(range(50), lambda part: 37 in part, name=lambda part: 37)

    assert list(map(list, played.requests[1:3])) == [[37], [37]]
    assert played.rejected == [37]


def test_names_are_ignored_after_a_named_row_was_created():
    played = play(range(50), lambda part: 37 in part, name=lambda part: part[0])

    assert played.requests.count((0,)) == 1
    assert sum(isinstance(part, tuple) for part in played.requests) == 1
    assert played.rejected == [37]


def test_too_large_requests_say_nothing_about_their_halves():
    search = Search(range(100), BadRowRate(MOST), 25.0)
    search.too_large(range(100))
    first = search.next_part()
    search.created(first)

    assert (len(first), len(search.next_part()), search.suspects) == (50, 50, 0)


def test_row_too_large_alone_does_not_keep_requests_small():
    search = Search(range(100), BadRowRate(MOST), 25.0)
    part = search.next_part()
    while len(part) > 1:
        search.too_large(part)
        part = search.next_part()
    search.found(part[0])

    assert len(search.next_part()) > 20


# --- the sizes of requests --------------------------------------------------------------------------------------------


def test_requests_become_smaller_while_bad_rows_are_frequent_and_larger_again_after():
    rate = BadRowRate(MOST)
    for _ in range(10):
        rate.found()
        rate.created(20)
    assert 10 <= rate.limit <= 30

    sizes = []
    while rate.limit < MOST:
        sizes.append(rate.limit)
        rate.created(rate.limit)
    assert len(sizes) < 10


def test_one_bad_row_after_many_good_ones_makes_requests_at_most_a_third():
    rate = BadRowRate(MOST)
    rate.created(1_000_000)
    rate.found()

    assert rate.limit >= MOST // 3


def test_requests_hold_one_row_while_all_rows_are_bad():
    rate = BadRowRate(MOST)
    for _ in range(20):
        rate.found()

    assert rate.limit == 1


@pytest.mark.parametrize("most", [1, 2, 3, 100])
@given(st.lists(st.integers(1, 100) | st.none(), max_size=50))
def test_limit_stays_between_one_and_the_batch_limit(most, events):
    rate = BadRowRate(most)
    for created in events:
        rate.found() if created is None else rate.created(created)

        assert 1 <= rate.limit <= most


def test_suspects_are_halved_where_requests_are_scarce():
    """With the fewest requests: no split needs more than the bits of the number of suspects."""
    sizes = split_sizes(1_000.0)

    def depth(n):
        return 0 if n < 2 else 1 + max(depth(sizes[n]), depth(n - sizes[n]))

    assert all(depth(n) == ceil(log2(n)) for n in range(2, MOST + 1))


def test_fewer_than_half_of_the_suspects_are_sent_where_instances_are_scarce():
    assert split_sizes(5.0)[100] <= 25 < split_sizes(1_000.0)[100] <= 50
    assert all(1 <= size <= max(1, n // 2) for cost in (5.0, 25.0) for n, size in enumerate(split_sizes(cost)))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_one_bad_row_in_a_hundred_costs_at_most_eleven_requests_and_little_more_than_one_instance_a_row(seed):
    chance, rate, rows = random.Random(seed), BadRowRate(MOST), 10_000
    bad, requests, instances, first = set(chance.sample(range(rows), rows // 100)), 0, 0, 0
    while first < rows:
        part = range(first, min(rows, first + rate.limit))
        first += len(part)
        if bad.isdisjoint(part):
            requests, instances = requests + 1, instances + len(part)
            rate.created(len(part))
        else:
            played = play(part, lambda part: not bad.isdisjoint(part), rate=rate)
            requests, instances = requests + len(played.requests), instances + played.instances

    assert (requests - rows / MOST) / len(bad) <= 11
    assert instances / rows <= 2.35


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("workflows.api.error.body: instance 'order-7' is refused", 7),
        ("order-7", 7),
        ("instances order-9, order-7 are refused", 9),
        ("instance 3: params of 2000000 bytes, at most 1048576 allowed", 3),
        ("body/instances[4]/params is no object", 4),
        ("Item #5 is invalid", 5),
        ("index 10: bad", None),
        ("order-70 and xorder-7 are refused", None),
        ("1 to 100 instances are allowed", None),
        ("workflows.api.error.body", None),
        ("", None),
    ],
)
def test_row_is_named_by_its_id_or_by_its_index_in_the_request(message, named):
    ids = [f"order-{number}" for number in range(10)]

    assert named_row(message, range(10), ids) == named


def test_index_counts_within_the_request_not_within_the_batch():
    assert named_row("instance 1 is bad", [4, 6, 8], [f"order-{number}" for number in range(10)]) == 6


def test_one_row_that_is_too_large_with_any_other_costs_few_requests():
    def too_large(part):
        return 0 in part and len(part) > 1

    search, sent = Search(range(100), BadRowRate(100), 5.0), 0
    search.too_large(range(100))
    while search.rows:
        part = search.next_part()
        sent += 1
        if too_large(part):
            search.too_large(part)
        else:
            search.created(part)

    assert sent <= 25
