"""The figures of several worker processes become one report."""

from torture import add_up

LINE = "{kills:,} kills, {lost:,} lost, within {ms:,} ms"


def worker(alone, **counts):
    """The counts of one worker process, as it sends them."""
    return [alone, [(LINE, counts, ["ms"])]]


def test_counts_of_workers_are_added_and_the_largest_maximum_is_shown():
    workers = [worker(["a line of its own"], kills=1_200, ms=7), worker([], kills=5, lost=0, ms=30), worker([])]

    assert add_up(workers) == ["a line of its own", "1,205 kills, 0 lost, within 30 ms"]


def test_a_harness_that_did_not_run_has_no_line():
    assert add_up([worker([]), worker([])]) == []
