"""Tests each row of the table of differences in `bulkwf.emulator` on both sides.

A probe has the name of its row, and returns the text in the column of the given side.
"""

import math
import re
from datetime import UTC, datetime, timedelta

import pytest
from command import until

import bulkwf.emulator
from contract.sides import Side, fresh, names

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real engine")]

DIFFERENCES = {}
_ROW = re.compile(r"^ {4}(?!what )(.+?) +\| (.+?) +\| (.+?)(?: \*)? +\| .", re.MULTILINE)
TABLE = {row[1]: {"emulator": row[2], "engine": row[3]} for row in _ROW.finditer(bulkwf.emulator.__doc__)}
RESERVED_IDS = ["batch", "terminate", "terminateAll", "cf_" + "0a" * 32]
NO_RETENTIONS = [
    *("banana", None, 5, []),
    *({"success_retention": one} for one in ("banana", "5minutes", "", "-1 days", "0 seconds", 0, -1, 1.5, None, True)),
    {"success_retention": "1 day", "error_retention": "banana"},
]
NO_OBJECTS = [5, True, "text", []]


def difference(name):
    def register(probe):
        DIFFERENCES[name] = probe
        return probe

    return register


def said(answer):
    if answer.status == 200:
        return "created" if answer.result() else "omitted"
    if isinstance(answer.body, str):
        return f"{answer.status}, no JSON"
    return "{} {}".format(*answer.refusal())


def alike(answers):
    (only,) = {said(answer) for answer in answers}
    return only


def item(**keys):
    return {"instance_id": fresh(1)[0], **keys}


# --- limits -------------------------------------------------------------------------------------------------------


@difference("more instances than the rate")
def _(side: Side):
    with side.limited(instances_per_s=2) as limited:
        return said(limited.post(item(), item(), item()))


@difference("more requests than the rate")
def _(side: Side):
    with side.limited(requests_per_5m=2) as limited:
        answers = [limited.ask("GET") for _ in range(3)]
    return "answered" if answers[-1].status == 200 else said(answers[-1])


@difference("headers with the rate")
def _(side: Side):
    with side.limited(requests_per_5m=2) as limited:
        found = [name for name in limited.ask("GET").headers if name.startswith("ratelimit")]
    return " ".join(sorted(found)) or "none"


@difference("a queue that is full")
def _(side: Side):
    with side.limited(queued_s=math.inf, max_queued=1) as limited:
        limited.post(item()).result()
        return said(limited.post(item()))


@difference("params of over 1 MiB")
def _(side: Side):
    return said(side.post(item(params="x" * (1 << 20))))


@difference("a body of over 32 MiB")
def _(side: Side):
    return said(side.post(item(params="x" * (32 << 20))))


# --- items --------------------------------------------------------------------------------------------------------


@difference("an id past its retention")
def _(side: Side):
    one = item(instance_retention={"success_retention": 1, "error_retention": 1})
    side.post(one).result()
    until(lambda: is_over(side.ask("GET", f"/instances/{one['instance_id']}")), "the end of its retention")
    return "is free" if names(side.post(one)) else "is taken"


def is_over(answer):
    """Whether the instance ended over 10 ms ago, or does not exist any more."""
    end = answer.status == 200 and answer.result()["end"]
    long_ago = end and datetime.now(UTC) - datetime.fromisoformat(end) > timedelta(milliseconds=10)
    return long_ago or answer.status == 404


@difference("a retention that is none")
def _(side: Side):
    return alike(side.post(item(instance_retention=retention)) for retention in NO_RETENTIONS)


@difference("an id that is reserved")
def _(side: Side):
    return alike(side.post({"instance_id": id_}) for id_ in RESERVED_IDS)


@difference("an item that is no object")
def _(side: Side):
    return alike(side.post(value) for value in NO_OBJECTS)


@difference("an item that is null")
def _(side: Side):
    return said(side.post(None))


@difference("a location_hint of no text")
def _(side: Side):
    return alike(side.post(item(location_hint=value)) for value in (7, None, []))


@difference("an object around the array")
def _(side: Side):
    return said(side.ask("POST", "/instances/batch", {"instances": [item()]}))


@difference("params that are absent")
def _(side: Side):
    one = item()
    side.post(one).result()
    return "{}" if side.has_params(one["instance_id"], "{}") else "absent"


@difference("an integer of 30 digits")
def _(side: Side):
    one = item(params=10**29 + 1)
    side.post(one).result()
    return "kept" if side.has_params(one["instance_id"], str(10**29 + 1)) else "rounded"


@difference("version_id and workflow_id")
def _(side: Side):
    (made,) = side.post(item()).result()
    return "zero" if set(made["version_id"] + made["workflow_id"]) <= set("0-48") else "its own"


# --- status -------------------------------------------------------------------------------------------------------


def comes_to(side, status, params):
    """The final status of an instance: `status`, or queued in the emulator, which runs nothing."""
    one = item(params=params)
    with side.limited(queued_s=math.inf) as other:
        other.post(one).result()
        path = f"/instances/{one['instance_id']}"
        last = "queued" if side.name == "emulator" else status
        return until(lambda: (found := other.ask("GET", path).result()["status"]) == last and found, last)


@difference("an instance that ends well")
def _(side: Side):
    return comes_to(side, "complete", {})


@difference("an instance that throws")
def _(side: Side):
    return comes_to(side, "errored", {"fail": True})


@difference("an instance that sleeps")
def _(side: Side):
    return comes_to(side, "running", {"sleep": "1 day"})


@difference("changing an instance's status")
def _(side: Side):
    one = item(params={"sleep": "1 day"})
    side.post(one).result()
    path = f"/instances/{one['instance_id']}"
    until(lambda: side.ask("GET", path).result()["status"] in {"running", "complete"}, "its beginning")
    answer = side.ask("PATCH", f"{path}/status", {"status": "terminate"})
    return "is possible" if answer.status == 200 else said(answer)


# --- reading ------------------------------------------------------------------------------------------------------


@difference("an instance that is missing")
def _(side: Side):
    return said(side.ask("GET", f"/instances/{fresh(1)[0]}"))


@difference("... that was asked for")
def _(side: Side):
    (missing,) = fresh(1)
    side.ask("GET", f"/instances/{missing}").refusal()
    counts = side.ask("GET").result()["instances"]
    deletion = side.ask("DELETE", f"/instances/{missing}")
    assert (deletion.status == 200) == ("unknown" in counts)
    return "is counted" if "unknown" in counts else "is not counted"


@difference("a workflow that is missing")
def _(side: Side):
    return alike(side.ask("GET", path, workflow="nowhere") for path in ("", "/instances", "/instances/a"))


@difference("a question that is refused")
def _(side: Side):
    wrong = [side.ask("GET", f"/instances?{query}") for query in ("per_page=0", "status=banana", "date_end=2026")]
    return alike([*wrong, side.ask("POST", "/instances/batch/delete", {"instances": []})])


@difference("... for its dates")
def _(side: Side):
    return said(side.ask("GET", "/instances?date_start=2026-01-02T00:00:00Z&date_end=2026-01-01T00:00:00Z"))


@difference("a path that leads nowhere")
def _(side: Side):
    return alike([side.ask("GET", "/instances/a/b"), side.ask("PUT", "/instances/batch", [])])


@difference("an Authorization of no scheme")
def _(side: Side):
    return said(side.ask("GET", headers={"Authorization": "banana"}))


@difference("an instance lacks")
def _(side: Side):
    one = item()
    side.post(one).result()
    found = side.ask("GET", f"/instances/{one['instance_id']}").result()
    documented = "status queued start end success error output rollback step_count steps params trigger versionId"
    return lacking(found, documented)


@difference("a listed instance lacks")
def _(side: Side):
    side.post(item()).result()
    listed = until(lambda: side.ask("GET", "/instances?status=complete").result("result_info"), "a list")
    return lacking(listed[0], "id status created_on modified_on started_on ended_on version_id workflow_id")


@difference("a workflow lacks")
def _(side: Side):
    documented = "id name class_name script_name created_on modified_on triggered_on instances"
    return lacking(side.ask("GET").result(), documented)


@difference("more keys of result_info")
def _(side: Side):
    return more(side.ask("GET", "/instances?per_page=100").body["result_info"], "page per_page total_count cursor")


def lacking(found, documented):
    keys = documented.split()
    missing = [key for key in keys if key not in found]
    return f"{len(missing)} of {len(keys)} keys" if len(missing) > 1 else " ".join(missing) or "nothing"


def more(found, usual):
    return " ".join(sorted(set(found) - set(usual.split()))) or "none"


@difference("simple=true")
def _(side: Side):
    one = item()
    side.post(one).result()
    found = side.ask("GET", f"/instances/{one['instance_id']}?simple=true").result()
    return "as ever" if "steps" in found else "without steps"


@difference("a cursor when one more began")
def _(side: Side):
    def page(query, least=0):
        def answer():
            found = side.ask("GET", f"/instances?per_page=2{query}", workflow="paged")
            return found if found.body["result_info"].get("total_count", least) >= least else None

        return until(answer, "a page")

    side.create(*fresh(4), workflow="paged")
    first = page("", 4)
    side.create(*fresh(1), workflow="paged")
    page("", 5)
    second = page(f"&cursor={first.body['result_info']['cursor']}")
    seen = [one["id"] for answer in (first, second) for one in answer.result("result_info")]
    return "names none twice" if len(set(seen)) == 4 else "names one twice"


# --- the table ----------------------------------------------------------------------------------------------------


def test_the_table_lists_every_difference_and_nothing_else():
    assert list(TABLE) == list(DIFFERENCES)
    assert all(row["emulator"] != row["engine"] for row in TABLE.values())


@pytest.mark.parametrize("name", DIFFERENCES)
def test_both_sides_answer_as_the_table_says(side, name):
    assert DIFFERENCES[name](side) == TABLE[name][side.name]


@pytest.mark.parametrize(
    "bad",
    [
        *({"instance_id": id_} for id_ in RESERVED_IDS),
        *({"instance_retention": retention} for retention in NO_RETENTIONS),
        *({"location_hint": value} for value in (7, None, [])),
        *(*NO_OBJECTS, None),
    ],
    ids=repr,
)
def test_the_engines_newer_form_refuses_what_the_emulator_refuses(real, emulated, bad):
    assert real.ask("POST", "/instances/batch", {"instances": [bad]}).refusal()[0] == 400
    assert emulated.post(bad).refusal()[0] == 400
