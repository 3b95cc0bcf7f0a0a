"""The figures of several worker processes become one report."""

from torture import add_up

LINE = "{kills:,} kills, {lost:,} lost, within {ms:,} ms"


def worker(alone, **counts):
    """What one process has counted, as it sends it."""
    return [alone, [(LINE, counts, ["ms"])]]


def test_counts_are_added_up_and_of_maxima_the_largest_is_shown():
    workers = [worker(["a line of its own"], kills=1_200, ms=7), worker([], kills=5, lost=0, ms=30), worker([])]

    assert add_up(workers) == ["a line of its own", "1,205 kills, 0 lost, within 30 ms"]


def test_a_harness_that_did_not_run_has_no_line():
    assert add_up([worker([]), worker([])]) == []
