"""The command against Cloudflare's own engine: after three kills, each row has one instance with its params."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from urllib.parse import urlencode

import pytest
from command import Running, bulkwf, outcomes, until
from contract.sides import EngineSide

from bulkwf import CheckpointError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real engine")]

AIRPORTS = Path(__file__).parents[2] / "examples" / "airports.jsonl"
ROWS = 2_000
WORKFLOW = "airports"
READERS = 4
PATIENCE_S = 300.0
"""Timeout for ten instances a second: the engine's state may be on a disk, and the machine busy."""


@pytest.fixture
def rows(folder):
    """The rows of the list, by id."""
    with AIRPORTS.open(encoding="utf-8") as lines:
        text = "".join(islice(lines, ROWS))
    (folder / "rows.jsonl").write_text(text, "utf-8")
    return {row["instance_id"]: row["params"] for row in map(json.loads, text.splitlines())}


def created():
    """Created rows in the checkpoint, which may not exist yet."""
    try:
        return outcomes("rows.jsonl.bulkwf")["created"]
    except CheckpointError:
        return 0


def kill_once(settled, words):
    """Run the command, and kill it when *settled* rows are created."""
    with Running(*words) as run:
        until(lambda: created() >= settled or run.process.poll() is not None, f"{settled} rows created", PATIENCE_S)
        assert run.process.poll() is None, run.err
        run.signal(signal.SIGKILL)
        assert run.process.wait() == -signal.SIGKILL
    assert settled <= created() < ROWS  # it was killed before its end


def test_a_run_that_is_killed_three_times_creates_every_row_once_with_its_params(rows, real_engine):
    engine = EngineSide(real_engine)
    limits = ("--rate", "300/s", "--request-rate", "unlimited")
    words = ("run", "rows.jsonl", "-w", WORKFLOW, "--base-url", real_engine.base_url, *limits)
    for settled in (200, 800, 1_400):
        kill_once(settled, words)

    ended = bulkwf(*words, "--json", timeout_s=PATIENCE_S)

    assert ended.code == 0, ended.err
    assert ended.summary["created"] + ended.summary["existed"] == ROWS
    until(lambda: page(engine, status="complete").body["result_info"]["total_count"] >= ROWS, "their end", PATIENCE_S)
    pages = [page(engine, page=number).result("result_info") for number in range(1, ROWS // 100 + 2)]
    assert sorted(one["id"] for listed in pages for one in listed) == sorted(rows)
    assert {one["status"] for listed in pages for one in listed} == {"complete"}
    with ThreadPoolExecutor(READERS) as readers:
        assert dict(readers.map(lambda id_: (id_, params(engine, id_)), rows)) == rows


def page(engine, **query):
    """A page of the list; the engine's counts of a workflow may be 30 s old."""
    return engine.ask("GET", f"/instances?{urlencode({'per_page': 100, **query})}", workflow=WORKFLOW)


def params(engine, id_):
    return engine.ask("GET", f"/instances/{id_}", workflow=WORKFLOW).result()["params"]
