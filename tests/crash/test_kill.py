"""kill -9 at random moments, and the same command again: nothing is lost, nothing runs twice."""

import json
import random
import signal
import time
from collections import Counter
from zlib import crc32

import pytest
from command import Running, bulkwf, emulator, until

from bulkwf import read_results

KILLS = 25
ROWS = 30_000


def params(number):
    return json.dumps({"n": number}).encode()


def write_list(path):
    """Every other row has an id of its own; the others get one, which only the checkpoint knows."""
    with path.open("wb") as file:
        for number in range(ROWS):
            own_id = b"" if number % 2 else b'"instance_id":"row-%d",' % number
            file.write(b"{" + own_id + b'"params":' + params(number) + b"}\n")


def kill_somewhere(run, service, chance):
    """Kill *run* at some moment: while it starts, reads its checkpoint, settles doubts, or sends."""
    size = service.log.stat().st_size
    moment = chance.choice(["starting", "opened", "sending", "sending", "sending"])
    if moment == "opened":
        run.listens()
    elif moment == "sending":
        more = chance.randrange(1, 20_000)
        until(lambda: service.log.stat().st_size > size + more, "more instances in the emulator's log")
    time.sleep(chance.uniform(0, 0.3 if moment == "starting" else 0.03))
    run.signal(signal.SIGKILL)
    assert run.process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("seed", [20260401])
def test_a_list_whose_run_is_killed_25_times_starts_every_row_exactly_once(folder, seed):
    print(f"seed {seed}")  # noqa: T201 - pytest shows it when the test fails
    chance = random.Random(seed)
    write_list(folder / "rows.jsonl")
    with emulator(faults=[{"method": "POST", "latency_s": [0.0, 0.01], "when": "after"}]) as service:
        words = ("run", "rows.jsonl", *service.flags())
        for _ in range(KILLS):
            with Running(*words) as run:
                kill_somewhere(run, service, chance)
        begun = service.created.total()
        assert 0 < begun < ROWS  # or it has not been killed in the middle
        assert bulkwf(*words).code == 0
        assert service.created_params == Counter(f"{crc32(params(number)):08x}" for number in range(ROWS))
        assert set(service.created.values()) == {1}
        held = set(service.created)
    results = bulkwf("results", "rows.jsonl.bulkwf").lines
    assert [one["row"] for one in results] == list(range(ROWS))
    assert {one["id"] for one in results} == held
    assert {one["outcome"] for one in results} <= {"created", "existed"}
    assert all(one["in_doubt"] for one in results if one["outcome"] == "existed")
    assert not list(read_results("rows.jsonl.bulkwf", outcome="pending"))
