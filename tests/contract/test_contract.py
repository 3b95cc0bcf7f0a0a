"""What the emulator and Cloudflare's own engine have in common; `test_differences.py` tests where they differ.

The statuses and codes of a refused batch, and everything about tokens, come from `real_engine/worker.mjs`, not from the
engine: these tests only keep the two the same.
"""

import json
import uuid

import pytest
from command import until

from contract.sides import fresh, names

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real engine")]

BAD_REQUEST = (400, 10002)
STATUSES = {"queued", "running", "paused", "errored", "terminated", "complete", "waiting", "waitingForPause"}


# --- creation -----------------------------------------------------------------------------------------------------


def test_a_hundred_instances_are_created_and_named_in_order(side):
    ids = fresh(100)

    created = side.post(*({"instance_id": id_, "params": {"n": n}} for n, id_ in enumerate(ids))).result()

    assert [one["id"] for one in created] == ids
    assert {frozenset(one) for one in created} == {frozenset({"id", "status", "version_id", "workflow_id"})}
    assert {one["status"] for one in created} == {"queued"}
    assert len({(uuid.UUID(one["version_id"]), uuid.UUID(one["workflow_id"])) for one in created}) == 1
    assert all(side.has_params(ids[n], json.dumps({"n": n})) for n in (0, 50, 99))


def test_a_batch_that_is_sent_again_creates_nothing(side):
    ids = fresh(100)

    assert side.create(*ids) == ids
    assert [side.create(*ids) for _ in range(2)] == [[], []]


def test_ids_that_are_taken_are_left_out_and_keep_their_params(side):
    ids = fresh(6)
    first = [{"instance_id": id_, "params": "first"} for id_ in ids[1::2]]
    second = [{"instance_id": id_, "params": "second"} for id_ in ids]

    side.post(*first).result()

    assert names(side.post(*second)) == ids[::2]
    assert [side.has_params(id_, '"first"') for id_ in ids] == [False, True] * 3


def test_the_first_of_two_equal_ids_in_a_batch_counts(side):
    a, b = fresh(2)

    sent = [(a, "1"), (b, "2"), (a, "3"), (b, "4"), (a, "5")]

    assert names(side.post(*({"instance_id": id_, "params": number} for id_, number in sent))) == [a, b]
    assert side.has_params(a, '"1"')
    assert side.has_params(b, '"2"')


@pytest.mark.parametrize("place", [0, 57, 99])
def test_one_bad_id_among_a_hundred_prevents_the_whole_batch(side, place):
    ids = fresh(99)

    batch = [{"instance_id": id_} for id_ in ids]
    batch.insert(place, {"instance_id": "not.good"})

    assert side.post(*batch).refusal() == BAD_REQUEST
    assert [side.has(id_) for id_ in (ids[0], ids[-1])] == [False, False]
    assert side.create(*ids) == ids


@pytest.mark.parametrize("length", [0, 101])
def test_a_batch_has_one_to_a_hundred_instances(side, length):
    ids = fresh(length)

    assert side.post(*({"instance_id": id_} for id_ in ids)).refusal() == BAD_REQUEST
    assert not any(side.has(id_) for id_ in ids[:1])


@pytest.mark.parametrize("count", [1, 3])
def test_an_instance_without_an_id_gets_one_each_time(side, count):
    given = [*names(side.post(*[{}] * count)), *names(side.post(*[{"params": 1}] * count))]

    assert len({uuid.UUID(id_) for id_ in given}) == 2 * count
    assert all(side.has(id_) for id_ in given)


def test_instances_with_and_without_an_id_stay_in_order(side):
    a, b = fresh(2)

    first, given, second = names(side.post({"instance_id": a}, {}, {"instance_id": b}))

    assert (first, second) == (a, b)
    assert given not in (a, b)


# --- ids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["_{}", "__{}--", "{}-", "{}_", "{}AZaz09", "0{}", "cf_{}", "batch-{}", "{:x<100}"])
def test_a_valid_id_is_accepted(side, shape):
    id_ = shape.format(*fresh(1))

    assert side.create(id_) == [id_]
    assert side.create(id_) == []
    assert side.has(id_)


@pytest.mark.parametrize("id_", ["a", "Z", "0", "_"])
def test_an_id_of_one_character_is_accepted(side, id_):
    assert side.create(id_) == [id_]


@pytest.mark.parametrize(
    "shape",
    [
        "-{}",
        " {}",
        "{} ",
        "{}.b",
        "{}:b",
        "{}/b",
        "{}b ",
        "{}é",
        "{}²",
        "{}\n",
        "{}\0",
        ".{}",
        "@{}",
        "{}~",
        "{:x<101}",
    ],
)
def test_an_invalid_id_is_refused(side, shape):
    (good,) = fresh(1)

    assert side.create(good) == [good]
    assert side.post({"instance_id": shape.format(good)}).refusal() == BAD_REQUEST


@pytest.mark.parametrize("id_", ["", None, 5, 1.5, True, ["a"], {"a": 1}])
def test_an_id_that_is_empty_or_not_a_string_is_refused(side, id_):
    assert side.post({"instance_id": id_}).refusal() == BAD_REQUEST


# --- params, retention, and the rest ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "null", "true", "false", "0", "-7", "1.5", "9007199254740991", '""', '"a text"', "{}", "[]", "[[],[null,{}]]",
        '{"a": {"b": [1, {"c": null}], "": 0}, "é": "Ünï→𝄞"}', '"\\ud834\\udd1e"', '{"sleep": 0}',
        '"\\u0000"', '"a\\u0000b\\n\\"\\\\\\u2028"',
    ],
)  # fmt: skip
def test_any_json_value_is_accepted_as_params(side, text):
    (id_,) = fresh(1)

    answer = side.ask("POST", "/instances/batch", raw=f'[{{"instance_id": "{id_}", "params": {text}}}]'.encode())

    assert names(answer) == [id_]
    assert side.has_params(id_, text)


@pytest.mark.parametrize(
    "retention",
    [
        {},
        {"success_retention": 1},
        {"success_retention": 86_400_000, "error_retention": 3_600_000},
        {"success_retention": "1 second", "error_retention": "2 seconds"},
        {"success_retention": "5 minutes"},
        {"success_retention": "10  hours"},
        {"error_retention": "3 days"},
        {"success_retention": "1 week", "error_retention": "1 month"},
        {"success_retention": "1 year"},
    ],
)
def test_a_valid_retention_is_accepted(side, retention):
    (id_,) = fresh(1)

    assert names(side.post({"instance_id": id_, "instance_retention": retention})) == [id_]


@pytest.mark.parametrize("also", [{"location_hint": "weur"}, {"unknown": 7}, {"id": "other"}, {"retention": "banana"}])
def test_other_keys_are_ignored(side, also):
    (id_,) = fresh(1)

    assert names(side.post({"instance_id": id_, **also})) == [id_]


# --- invalid batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[", b"[{}", b"[{}]]", b"[{},]", b"[{}] x", b"[NaN]", b"['a']", b'[{"params": 01}]', b"\xff",
        b'[{"instance_id": "\xff"}]', b'[{"params": "\n"}]', b"banana",
    ],
)  # fmt: skip
def test_a_body_that_is_not_json_is_refused(side, body):
    assert side.ask("POST", "/instances/batch", raw=body).refusal() == BAD_REQUEST


@pytest.mark.parametrize(
    "body", [b"{}", b"null", b"5", b"true", b'"[{}]"', b'{"instance_id": "a"}', b'{"instances": 5}']
)
def test_a_body_that_is_not_an_array_is_refused(side, body):
    assert side.ask("POST", "/instances/batch", raw=body).refusal() == BAD_REQUEST


@pytest.mark.parametrize("token", ["wrong", None])
@pytest.mark.parametrize(("method", "path"), [("POST", "/instances/batch"), ("GET", "/instances"), ("GET", "")])
def test_a_request_without_the_token_is_refused(side, method, path, token):
    (id_,) = fresh(1)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    answer = side.ask(method, path, [{"instance_id": id_}] if method == "POST" else None, headers=headers)

    assert answer.refusal() == (401, 10000)
    assert not side.has(id_)


def test_nothing_is_created_in_a_missing_workflow(side):
    assert side.post({}, workflow="nowhere").refusal() == (404, 10200)
    assert side.ask("GET", workflow="nowhere").refusal()[0] == 404
    assert side.ask("GET", "/instances", workflow="nowhere").refusal()[0] == 404
    assert side.ask("GET", "/instances/a", workflow="nowhere").refusal()[0] == 404


# --- reading ------------------------------------------------------------------------------------------------------


def test_an_instance_is_looked_up_by_its_id(side):
    (id_,) = fresh(1)
    side.create(id_)

    def found():
        return side.ask("GET", f"/instances/{id_}").result()

    until(lambda: found()["status"] == "complete", "its end")
    one = found()
    assert {"status", "queued", "start", "end", "error", "output", "step_count", "steps"} <= set(one)
    assert one["queued"] <= one["start"] <= one["end"]
    assert one["queued"].endswith("Z")
    assert (one["error"], one["step_count"], one["steps"]) == (None, 0, [])


def test_an_instance_that_was_not_created_is_not_found(side):
    present, missing = fresh(2)

    assert side.ask("GET", f"/instances/{missing}").refusal()[0] == 404
    assert side.create(present, missing) == [present, missing]
    assert side.has(missing)


def test_a_list_names_every_instance_once_the_newest_first(side):
    older, newer = fresh(4), fresh(3)
    for ids in (older, newer):
        assert side.create(*ids, workflow="listed") == ids
        until(lambda ids=ids: {*ids} <= {*complete_ids(side, "listed")}, "their end")

    pages = list(read_pages(side, "listed", 3))

    assert [len(page) for page in pages] == [3, 3, 1]
    assert {one["id"] for one in pages[0]} == {*newer}
    assert {one["id"] for page in pages[1:] for one in page} == {*older}
    assert all({"id", "status", "created_on"} <= set(one) for page in pages for one in page)


def read_pages(side, workflow, per_page):
    """The pages of a list, read by cursor."""
    query = f"per_page={per_page}"
    while query:
        answer = side.ask("GET", f"/instances?{query}", workflow=workflow)
        yield answer.result("result_info")
        info = answer.body["result_info"]
        assert info["per_page"] == per_page
        query = f"per_page={per_page}&cursor={info['cursor']}" if "cursor" in info else ""


def complete_ids(side, workflow):
    return listed_ids(side, workflow, "per_page=100&status=complete")


def listed_ids(side, workflow, query):
    return [one["id"] for one in side.ask("GET", f"/instances?{query}", workflow=workflow).result("result_info")]


def test_a_list_is_filtered_by_status_and_by_date(side):
    ids = {*fresh(5)}
    side.create(*ids, workflow="filtered")
    until(lambda: {*complete_ids(side, "filtered")} == ids, "their end")

    def listed(query):
        return {*listed_ids(side, "filtered", query)}

    (one, *_) = side.ask("GET", "/instances", workflow="filtered").result("result_info")
    at = one["created_on"]
    assert listed("status=paused") == listed("status=errored") == set()
    assert listed("date_start=2020-01-01T00:00:00Z") == listed("date_end=2120-01-01T00:00:00Z") == ids
    assert listed("date_end=2020-01-01T00:00:00Z") == listed("date_start=2120-01-01T00:00:00Z") == set()
    assert one["id"] in listed(f"date_start={at}&date_end={at}")
    assert listed(f"status=complete&date_start={at}") | listed(f"status=complete&date_end={at}") == ids


def test_a_list_gives_its_length_and_has_25_instances_a_page(side):
    ids = fresh(30)
    side.create(*ids)

    answer = until(
        lambda: (found := side.ask("GET", "/instances")).body["result_info"]["total_count"] >= len(ids) and found, "30"
    )

    assert len(answer.result("result_info")) == 25
    info = answer.body["result_info"]
    assert (info["page"], info["per_page"]) == (1, 25)
    assert len(side.ask("GET", "/instances?page=2&per_page=10").result("result_info")) == 10


@pytest.mark.parametrize(
    "query",
    [
        "per_page=0", "per_page=101", "per_page=-1", "per_page=many", "page=0", "cursor=many", "status=banana",
        "date_start=yesterday", "date_end=2026-01-01", "date_start=2026-01-01T00:00:00%2B02:00",
        "date_start=2026-01-02T00:00:00Z&date_end=2026-01-01T00:00:00Z",
    ],
)  # fmt: skip
def test_a_list_with_an_invalid_query_is_refused(side, query):
    assert side.ask("GET", f"/instances?{query}").refusal()[0] == 400


@pytest.mark.parametrize("query", ["per_page=1", "per_page=100", "date_start=2026-01-01T00:00:00.000Z"])
def test_a_list_with_a_valid_query_is_answered(side, query):
    side.ask("GET", f"/instances?{query}").result("result_info")


def test_a_workflow_counts_its_instances_by_status(side):
    def counted():
        workflow = side.ask("GET", workflow="counted").result()
        assert workflow["name"] == "counted"
        assert set(workflow["instances"]) >= STATUSES
        return sum(workflow["instances"].values())

    ids = fresh(5)
    assert counted() == 0
    side.create(*ids, workflow="counted")
    until(lambda: counted() == 5, "5 instances")
    side.ask("DELETE", f"/instances/{ids[0]}", workflow="counted").result()
    until(lambda: counted() == 4, "4 instances")


# --- deletion -----------------------------------------------------------------------------------------------------


def test_a_deleted_instance_is_not_found_and_its_id_is_free(side):
    gone, other = fresh(2)
    side.create(gone, other)

    assert side.ask("DELETE", f"/instances/{gone}").result() == {"success": True}
    assert side.ask("DELETE", f"/instances/{gone}").refusal()[0] == 404
    assert [side.has(id_) for id_ in (gone, other)] == [False, True]
    assert side.create(gone, other) == [gone]


def test_the_deletion_of_a_batch_gives_a_result_for_each_id(side):
    ids = fresh(6)
    missing = ids[4:]
    side.create(*ids[:4])

    result = side.ask("POST", "/instances/batch/delete", {"instances": [*ids[:3], *missing, ids[0]]}).result()

    assert result["deleted"] == [{"id": id_} for id_ in (*ids[:3], ids[0])]
    assert [(error["id"], error["code"]) for error in result["errors"]] == [(id_, 10400) for id_ in missing]
    assert side.create(*ids) == [*ids[:3], *missing]


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"{}", b'{"instances": []}', b'{"instances": "a"}', b'{"instances": [5]}', b"101"]
)
def test_the_deletion_of_an_invalid_batch_is_refused(side, body):
    raw = json.dumps({"instances": ["a"] * 101}).encode() if body == b"101" else body

    assert side.ask("POST", "/instances/batch/delete", raw=raw).refusal()[0] == 400
