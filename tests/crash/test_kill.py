"""kill -9 at random moments, and the same command again: nothing is lost, runs twice, or is misreported."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from command import emulator
from torture import scaled, tally

from bulkwf.emulator import read_log
from crash.oracle import COUNT_FLAWS, RULES, Oracle, draw_rows, take_ids, write_list

pytestmark = pytest.mark.slow

LISTS = scaled(6, 400)
KILLS = 5
"""Kills of each list's run before it may finish."""
FAULTS = (
    {"status": 500, "when": "before"},
    {"status": 500, "when": "after"},
    {"status": 503, "when": "after"},
    {"status": 502, "html": True, "partial": 10},
    {"reset": True, "when": "before"},
    {"reset": True, "when": "after"},
    {"close": True, "partial": 3},
    {"truncate": 40},
    {"foreign": 1, "times": 1},
    {"twice": True},
    {"status": 429, "retry_after": 1, "times": 1},
    {"latency_s": [0.0, 0.1]},
    {"latency_s": [0.0, 0.1], "when": "after"},
)


counted = tally(
    "{kills:,} kills of {lists:,} lists with {rows:,} rows, {in doubt:,} with rows in doubt: " + COUNT_FLAWS
)


def draw_faults(chance):
    """Faults for one list, while it is likely to be killed. The first request, which takes ids, has none."""
    chosen = chance.sample(FAULTS, chance.randint(0, 5))
    spell = {"from": 2, "method": "POST", "until_s": 2.0}
    return [{**rule, **spell, "chance": chance.choice((0.03, 0.1, 0.2))} for rule in chosen]


def session_flags(chance, rows):
    """No two sessions need to be alike."""
    size = chance.choice((1, 9, 100) if len(rows) < 100 else (30, 100))
    return "--batch-size", size, "--concurrency", chance.choice((1, 2, 5, 16))


def kill_somewhere(run, service, chance):
    """Kill *run* at any moment, or as soon as more instances have begun; True unless it had ended."""
    size = service.log.stat().st_size
    deadline = time.monotonic() + chance.uniform(0.0, chance.choice((0.05, 0.3, 1.0)))
    more = chance.choice((10**9, 1, 1, chance.randrange(1, 20_000)))
    while service.log.stat().st_size < size + more and time.monotonic() < deadline and run.process.poll() is None:
        time.sleep(0.001)
    run.signal(signal.SIGKILL)
    ended = run.wait()
    assert ended.code in (0, 1, -signal.SIGKILL), ended.err
    return ended.code < 0


def as_left(chance):
    """The checkpoint where it lies, or a copy of it: a reader may fold its log before the run does."""
    file = Path("rows.bulkwf")
    if chance.random() < 0.5:
        return file
    shutil.rmtree("copy", ignore_errors=True)
    Path("copy").mkdir()
    for one in Path().glob("rows.bulkwf*"):
        if not one.name.endswith(("-shm", ".lock")):
            shutil.copy(one, "copy")
    return Path("copy", file.name)


@pytest.mark.parametrize("seed", range(LISTS))
def test_a_run_killed_again_and_again_starts_every_row_exactly_once(memory, quick, seed):
    chance = random.Random(seed)
    rows = draw_rows(chance, chance.choice((1, 40, 400, 2_000, 2_000, 10_000)))
    words = write_list(rows, chance.choice(("plain", "gzip", "two files")))
    oracle = Oracle(rows)
    with emulator(faults=[*RULES, *draw_faults(chance)], start=quick.start) as service:
        take_ids(service, rows)
        run = ("run", *words, *service.flags())
        kills = 0
        while kills < KILLS:
            with quick.start(*run, *session_flags(chance, rows)) as killed:
                kills += kill_somewhere(killed, service, chance)
            in_doubt = oracle.look(as_left(chance), read_log(service.log))
            counted["in doubt"] += in_doubt > 0
        ended = quick(*run, *session_flags(chance, rows))
        oracle.judge(Path("rows.bulkwf"), read_log(service.log))
    counted.update(oracle.flaws, kills=kills, lists=1, rows=len(rows))
    oracle.assert_flawless()
    assert ended.code == oracle.code, ended.err
