"""A signal at any moment, with a service that is slow or silent: the command ends in time, and the next one goes on."""

import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from command import Running, emulator, ids, write_rows
from torture import figures, scaled

from bulkwf.checkpoint import read_status
from bulkwf.emulator import read_log
from crash.oracle import RULES, Oracle, count_flaws, draw_rows, take_ids, write_list

RUNS = scaled(6, 200)
ILL_FOR_S = 1.5
ILLNESSES = (
    {"latency_s": [1.0, 20.0]},
    {"latency_s": [1.0, 20.0], "when": "after"},
    {"latency_s": [0.0, 1.0], "when": "after"},
    {"hang": True, "when": "before"},
    {"hang": True, "when": "after"},
)
CHECKPOINT = Path("rows.bulkwf")
AT_MOST_S = 5.0
"""Past the drain time. With the default of 20 s it makes 25."""


@pytest.fixture(scope="module")
def counted():
    """What the runs of this module have come to."""
    seen = Counter()
    yield seen
    figures.append(
        f"{seen['signals']:,} signals, {seen['drained']:,} of them drained a run, {seen['in doubt']:,} left rows in "
        f"doubt, all within {seen['ms']:,} ms of the drain time: {count_flaws(seen)}"
    )


def end(run, number):
    """Send a signal; returns how the run has ended, and how long after."""
    run.signal(number)
    at = time.monotonic()
    return run.wait(), time.monotonic() - at


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_signal_at_any_moment_ends_the_run_in_time_and_the_next_run_finishes_the_list(memory, quick, counted, seed):
    chance = random.Random(seed)
    rows, number = draw_rows(chance, 400), chance.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGINT))
    drain_s = chance.choice((0.0, 0.5))
    illness = {**chance.choice(ILLNESSES), "method": "POST", "chance": chance.choice((0.1, 0.5)), "until_s": ILL_FOR_S}
    # To a SIGINT during its imports Python has an answer of its own, a traceback: that one finds them done.
    start = quick.start if number == signal.SIGINT else Running
    oracle = Oracle(rows)
    with emulator(faults=[*RULES, illness | {"from": 2}], start=quick.start) as service:
        take_ids(service, rows)
        words = ("run", *write_list(rows), *service.flags(), "--batch-size", 10, "--concurrency", 4)
        with start(*words, "--timeout", "10m", "--drain-timeout", f"{drain_s}s") as run:
            time.sleep(chance.uniform(*chance.choice(((0.0, 0.5), (0.5, ILL_FOR_S)))))  # it starts, it runs
            handled = run.process.poll() is None and run.catches(signal.SIGTERM)
            ended, took_s = end(run, number)
        in_doubt = oracle.look(CHECKPOINT, read_log(service.log))
        ended_well = ended.code in (0, 1)
        finished = (handled or ended_well) and read_status(CHECKPOINT).finished_at is not None
        next_one = quick(*words, "--timeout", "1s")  # some of its requests may still meet the illness
        oracle.judge(CHECKPOINT, read_log(service.log))
    counted.update(oracle.flaws, signals=1, drained=ended.code == 128 + number)
    counted["in doubt"] += in_doubt > 0
    counted["ms"] = max(counted["ms"], round(1_000 * (took_s - drain_s)))
    oracle.assert_flawless()
    assert next_one.code == oracle.code
    assert took_s < drain_s + AT_MOST_S
    ends = {128 + number} if number == signal.SIGINT else {128 + number, -number}  # SIGTERM kills what just starts
    assert ended_well or ended.code in ends, ended.err
    assert "Traceback" not in ended.err
    assert finished or not ended_well
    if handled and not finished:
        assert ended.code == 128 + number
        assert ended.resume_command


@pytest.mark.parametrize("drain_s", scaled((0.5,), (0.5, 20.0)))
def test_a_run_whose_service_is_silent_ends_when_the_drain_time_is_over(memory, quick, drain_s):
    rows = write_rows("rows.jsonl", 1_000)
    flags = () if drain_s == 20.0 else ("--drain-timeout", f"{drain_s}s")
    with emulator(faults=[{"method": "POST", "hang": True, "when": "after", "times": 3}], start=quick.start) as service:
        words = ("run", rows, *service.flags(), "--timeout", "10m", "--concurrency", "3")
        with Running(*words, *flags) as run:
            service.has_created(300)
            ended, took_s = end(run, signal.SIGTERM)
        assert ended.code == 143
        assert drain_s <= took_s < drain_s + AT_MOST_S
        assert quick(*words).code == 0
        assert service.created == Counter(ids(1_000))
