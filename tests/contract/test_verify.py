"""`bulkwf verify` finds exactly the instances that were deleted, in the emulator and in Cloudflare's own engine."""

import json
from pathlib import Path

import pytest
from command import bulkwf, until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real engine")]

WORKFLOW = "verified"
ROWS = 450
REMOVED = {3, 100, 101, 102, 299, 449}
FAILING = {7, 250}
UNLIMITED = ("--request-rate", "unlimited")


def instances(side):
    listed = side.ask("GET", "/instances?per_page=1&page=1", workflow=WORKFLOW).body
    return listed["result_info"]["total_count"]


@pytest.fixture
def run(side, folder):
    """A run, some of whose instances fail in the engine; returns the ids in the order of the rows."""
    ids = [f"{folder.name.replace('.', '-')}-{number}" for number in range(ROWS)]
    rows = [{"instance_id": id_, "params": {"fail": row in FAILING}} for row, id_ in enumerate(ids)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    before = instances(side)
    ended = bulkwf("run", "rows.jsonl", "-w", WORKFLOW, "--base-url", side.base_url, "--rate", "unlimited", *UNLIMITED)
    assert ended.code == 0, ended.err
    until(lambda: instances(side) == before + ROWS, "a list of all instances")
    until(lambda: not listed(side, "queued") and not listed(side, "running"), "their end")
    return ids


def listed(side, status):
    return side.ask("GET", f"/instances?status={status}", workflow=WORKFLOW).result("result_info")


def verify(side, *words):
    return bulkwf("verify", "rows.jsonl.bulkwf", "--base-url", side.base_url, *UNLIMITED, *words)


def test_exactly_the_removed_instances_are_missing(side, run):
    whole = verify(side, "--json")
    assert (whole.code, whole.summary["missing"], whole.summary["found"]) == (0, 0, ROWS)
    assert whole.summary["requests"] < ROWS  # by the list

    first, *others = (run[row] for row in sorted(REMOVED))
    assert side.ask("DELETE", f"/instances/{first}", workflow=WORKFLOW).status == 200
    answer = side.ask("POST", "/instances/batch/delete", {"instances": others}, workflow=WORKFLOW).result()
    assert [one["id"] for one in answer["deleted"]] == others

    ended = verify(side)

    assert ended.code == 1, ended.err
    found = {
        outcome: {one["row"] for one in ended.lines if one["outcome"] == outcome} for outcome in ("missing", "errored")
    }
    assert found == {"missing": REMOVED, "errored": FAILING if side.name == "engine" else set()}
    assert all(one["id"] == run[one["row"]] for one in ended.lines)
    again = verify(side, "--json")
    assert [one["row"] for one in again.summary["problems"] if one["outcome"] == "missing"] == sorted(REMOVED)


def test_a_sample_is_looked_up(side, run):
    ended = verify(side, "--sample", "4", "--json")
    assert (ended.code, ended.summary["found"], ended.summary["requests"]) == (0, 4, 4)
