"""The emulator's rules of the service, without a socket and on a clock that the test moves."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkwf.emulator import Call, Caller, Exchange, Limits, Service, Tampering, Target, params_crc

TARGET = Target("acct", "resize")
CALLER = Caller("Bearer token")
DAY_S = 86_400


class Clock:
    now = 1_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def body(*items):
    return json.dumps(items).encode()


def batch(*ids):
    return body(*({"instance_id": id_} for id_ in ids))


def create_batch(service, caller, target, body):
    """The answer to a whole batch-create request."""
    path = f"/accounts/{target.account}/workflows/{target.workflow}/instances/batch"
    exchange = Exchange(service, (), draw=lambda: 0.0, wall=lambda: 0.0)
    return exchange.execute(exchange.arrive(Call("POST", path, caller, body=body))).answer


def submit(service, *ids, caller=CALLER, target=TARGET):
    return create_batch(service, caller, target, batch(*ids))


def names(answer):
    return [instance["id"] for instance in answer.json()["result"]]


def code(answer):
    envelope = answer.json()
    assert (envelope["success"], envelope["result"]) == (False, None)
    return answer.status, envelope["errors"][0]["code"]


# ── Creation ──


def test_a_batch_creates_an_instance_for_each_id_and_names_them_in_order(clock):
    service = Service(Limits(), clock)

    answer = submit(service, "b", "a", "c")

    assert answer.status == 200
    envelope = answer.json()
    assert (envelope["success"], envelope["errors"], envelope["messages"]) == (True, [], [])
    assert [(i["id"], i["status"]) for i in envelope["result"]] == [("b", "queued"), ("a", "queued"), ("c", "queued")]
    assert set(envelope["result"][0]) == {"id", "status", "version_id", "workflow_id"}
    assert service.ids(TARGET) == ["b", "a", "c"]


def test_an_id_that_is_taken_is_left_out_of_the_answer_without_an_error(clock):
    service = Service(Limits(), clock)
    submit(service, "a", "b")

    assert names(submit(service, "a", "c", "b")) == ["c"]
    assert submit(service, "a").json()["result"] == []
    assert service.created == 3


def test_the_first_of_two_equal_ids_in_a_batch_counts(clock):
    service = Service(Limits(), clock)

    reading = service.read(body({"instance_id": "a", "params": 1}, {"instance_id": "a", "params": 2}))
    creation = service.create(TARGET, reading.items)

    assert names(creation.answer) == ["a"]
    assert [item.crc for item in creation.created] == [params_crc(b"1")]


def test_an_id_that_another_workflow_has_is_free(clock):
    service = Service(Limits(), clock)
    submit(service, "a")

    assert names(submit(service, "a", target=Target("acct", "other"))) == ["a"]


def test_each_instance_without_an_id_gets_a_new_one(clock):
    service = Service(Limits(), clock)

    given_ids = names(create_batch(service, CALLER, TARGET, b"[{},{}]"))
    given_ids += names(create_batch(service, CALLER, TARGET, b"[{}]"))

    assert len(set(given_ids)) == 3
    assert all(len(id_) == 36 for id_ in given_ids)


@pytest.mark.parametrize(
    ("retention", "seconds"),
    [
        (None, 3 * DAY_S),
        ({"success_retention": 1500}, 1.5),
        ({"success_retention": "5 minutes"}, 300),
        ({"success_retention": "1 week"}, 7 * DAY_S),
        ({"error_retention": "1 second"}, 3 * DAY_S),
    ],
)
def test_an_id_is_free_again_once_its_retention_has_passed(clock, retention, seconds):
    service = Service(Limits(), clock)
    item = {"instance_id": "a"} | ({"instance_retention": retention} if retention else {})
    create_batch(service, CALLER, TARGET, body(item))

    clock.now += seconds - 0.25
    assert names(submit(service, "a")) == []
    clock.now += 0.25
    assert not service.holds(TARGET, "a")
    assert names(submit(service, "a")) == ["a"]
    assert service.created == 2


def test_a_batch_with_a_taken_id_is_refused_where_the_service_is_set_to_refuse(clock):
    service = Service(Limits(), clock, existing="refuse")
    submit(service, "a")

    assert code(submit(service, "b", "a")) == (400, 10405)
    assert service.ids(TARGET) == ["a"]


def test_a_taken_id_is_created_twice_where_the_service_is_set_to_duplicate(clock):
    service = Service(Limits(), clock, existing="duplicate")
    submit(service, "a")

    assert names(submit(service, "a")) == ["a"]
    assert (service.created, service.ids(TARGET)) == (2, ["a"])


def test_the_newer_shape_gives_the_reason_for_each_id_not_created(clock):
    service = Service(Limits(), clock, result_shape="object")
    submit(service, "a")

    result = submit(service, "a", "b", "b").json()["result"]

    assert [i["id"] for i in result["created"]] == ["b"]
    assert [(e["index"], e["id"], e["code"]) for e in result["errors"]] == [(0, "a", 10405), (2, "b", 10415)]


@pytest.mark.parametrize("per_batch", [1, 2, 5])
def test_a_full_queue_neither_creates_nor_names_more_instances(clock, per_batch):
    service = Service(Limits(max_queued=3), clock, queued_s=60)
    ids = [f"i{n}" for n in range(5)]
    for start in range(0, 5, per_batch):
        assert submit(service, *ids[start : start + per_batch]).status == 200

    assert service.ids(TARGET) == ids[:3]
    clock.now += 60
    assert names(submit(service, *ids)) == ids[3:]


def test_a_full_queue_refuses_the_batch_where_it_is_set_to(clock):
    service = Service(Limits(max_queued=1, when_full="refuse"), clock)

    assert submit(service, "a", "b").status == 429
    assert (service.ids(TARGET), service.overruns["queue"]) == ([], 1)


def test_tampering_withholds_hides_and_adds(clock):
    service = Service(Limits(), clock)
    items = service.read(batch("a", "b", "c")).items
    tampering = Tampering(withheld=frozenset("a"), hidden=frozenset("b"), also_named=("x", "c"))

    creation = service.create(TARGET, items, tampering)

    assert [item.id for item in creation.created] == ["b", "c"] == service.ids(TARGET)
    assert names(creation.answer) == ["c", "x", "c"]


def test_tampering_loses_and_fails(clock):
    service = Service(Limits(), clock)
    items = service.read(batch("a", "b", "c")).items

    creation = service.create(TARGET, items, Tampering(lost=frozenset("a"), failing=frozenset("b")))

    assert names(creation.answer) == ["a", "b", "c"]
    assert [item.id for item in creation.created] == ["b", "c"] == service.ids(TARGET)
    assert service.created == 2
    assert service.get_instance(TARGET, "a").status == 404
    failed = service.get_instance(TARGET, "b").json()["result"]
    assert (failed["status"], failed["success"], failed["error"]["message"]) == ("errored", False, "asked to fail")
    assert service.workflow_counts(TARGET).json()["result"]["instances"]["errored"] == 1
    assert [i["id"] for i in service.list_instances(TARGET, {"status": "errored"}).json()["result"]] == ["b"]


# ── Invalid batches ──

REFUSED = {
    "nothing": b"",
    "not JSON": b"[{]",
    "an object": b'{"instances":[]}',
    "none": b"[]",
    "too many": json.dumps([{}] * 101).encode(),
    "an empty id": batch(""),
    "a long id": batch("x" * 101),
    "a dash first": batch("-a"),
    "a dot": batch("a.b"),
    "a line end": batch("a\n"),
    "a letter beyond ASCII": batch("é"),
    "null for an id": batch(None),
    "a number for an id": batch(5),
    "the system's own id": batch("cf_" + "0a" * 32),
    "a word of the paths": batch("terminateAll"),
    "NaN": b'[{"params":NaN}]',
    "a byte that is no UTF-8": b'[{"params":"\xff"}]',
    "deep nesting": b'[{"params":' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
    "large params": b'[{"params":"' + b"x" * (1 << 20) + b'"}]',
    "a retention that is none": body({"instance_retention": {"success_retention": "banana"}}),
    "a negative retention": body({"instance_retention": {"error_retention": -1}}),
    "a retention of a fraction": body({"instance_retention": {"success_retention": 1.5}}),
}


@pytest.mark.parametrize("sent", REFUSED.values(), ids=REFUSED.keys())
def test_an_invalid_batch_is_refused_as_a_whole(clock, sent):
    service = Service(Limits(), clock)
    parts = [part for part in (b'{"instance_id":"good"}', sent[1:-1]) if part]
    with_a_good_one = b"[" + b",".join(parts) + b"]"

    assert code(create_batch(service, CALLER, TARGET, sent)) == (400, 10002)
    if sent not in (b"", b"[]", REFUSED["an object"]):
        assert code(create_batch(service, CALLER, TARGET, with_a_good_one)) == (400, 10002)
    assert service.created == 0


@pytest.mark.parametrize(
    "params",
    [b"null", b"0", b'""', b"[]", b'{"a": 1 }', b"1e999", b"123456789012345678901234567890", '"\u2028é"'.encode()],
)
def test_any_json_value_is_accepted_as_params_and_gets_a_checksum(clock, params):
    [item] = Service(Limits(), clock).read(b'[ {"params" : ' + params + b' , "instance_id":"a"}]').items

    assert item.crc == params_crc(params)


def test_absent_params_have_no_checksum(clock):
    [item] = Service(Limits(), clock).read(batch("a")).items

    assert item.crc is None


def test_ids_of_1_and_100_characters_and_params_of_1_mib_are_accepted(clock):
    service = Service(Limits(), clock)
    large = b'{"instance_id":"l","params":"' + b"x" * ((1 << 20) - 2) + b'"}'

    assert names(submit(service, "_", "x" * 100)) == ["_", "x" * 100]
    assert names(create_batch(service, CALLER, TARGET, b"[" + large + b"]")) == ["l"]


def test_a_body_over_the_limit_is_refused_with_413(clock):
    service = Service(Limits(max_body_bytes=100), clock)

    assert submit(service, "x" * 100).status == 413
    assert submit(service, "x").status == 200


# ── Authentication ──


@pytest.mark.parametrize(
    ("caller", "expected"),
    [
        (Caller(), (401, 10000)),
        (Caller("Bearer wrong"), (401, 10000)),
        (Caller(api_key="wrong"), (401, 10000)),
        (Caller("token"), (400, 6003)),
        (Caller("Bearer "), (400, 6003)),
        (Caller("Basic dG9rZW4="), (400, 6003)),
    ],
)
def test_an_unknown_caller_is_refused(clock, caller, expected):
    service = Service(Limits(), clock, tokens={"token"})

    assert code(submit(service, "a", caller=caller)) == expected
    assert code(service.admit(caller, TARGET)) == expected
    assert service.created == 0


def test_both_schemes_of_authentication_are_accepted(clock):
    service = Service(Limits(), clock, tokens={"token"})

    assert names(submit(service, "a", caller=Caller("Bearer token"))) == ["a"]
    assert names(submit(service, "b", caller=Caller(api_key="token"))) == ["b"]


def test_a_revoked_token_is_refused_and_others_are_accepted(clock):
    service = Service(Limits(), clock)
    service.revoke(CALLER)

    assert code(submit(service, "a")) == (401, 10000)
    assert names(submit(service, "a", caller=Caller("Bearer other"))) == ["a"]


def test_another_account_and_an_unknown_workflow_are_refused(clock):
    service = Service(Limits(), clock, account="acct", workflows={"resize"})

    assert code(submit(service, "a", target=Target("other", "resize"))) == (403, 9109)
    assert code(submit(service, "a", target=Target("acct", "rezise"))) == (404, 10200)
    assert code(submit(service, "a", target=Target("acct", "a.b"))) == (404, 10200)
    assert names(submit(service, "a")) == ["a"]


# ── Rates ──


def test_at_most_a_hundred_instances_are_created_in_a_second(clock):
    service = Service(Limits(), clock)
    ids = [f"i{n}" for n in range(200)]
    assert submit(service, *ids[:99]).status == 200
    clock.now += 0.75
    refused = submit(service, *ids[100:102])

    assert code(refused)[0] == 429
    assert refused.headers["Retry-After"] == "1"
    assert submit(service, ids[100]).status == 200
    clock.now += 0.25  # the window is half-open: arrivals of a second ago are not in it
    assert submit(service, *ids[101:200]).status == 200
    assert service.overruns == {"instances": 1}
    assert service.worst_window == 102


def test_the_account_has_its_own_rate(clock):
    service = Service(Limits(), clock)
    ids = [f"i{n}" for n in range(100)]
    statuses = [submit(service, *ids, target=Target("acct", f"w{n}")).status for n in range(4)]

    assert statuses == [200, 200, 200, 429]
    assert service.overruns == {"account": 1}
    assert submit(service, *ids, target=Target("other", "w")).status == 200


def test_exceeding_the_request_limit_blocks_every_call_of_the_token(clock):
    service = Service(Limits(requests_per_5m=3), clock)
    for _ in range(3):
        assert service.admit(CALLER, TARGET, asks=True) is None
        clock.now += 10

    refused = submit(service, "a")
    assert code(refused) == (429, 971)
    assert refused.headers["Retry-After"] == "300"
    assert submit(service, "a", caller=Caller("Bearer other")).status == 200
    clock.now += 299.5
    assert service.admit(CALLER, TARGET, asks=True).headers["Retry-After"] == "1"
    clock.now += 0.5
    assert submit(service, "b").status == 200
    assert (service.requests, service.gets, service.overruns) == (7, 4, {"requests": 2})


def test_the_headers_give_the_requests_left(clock):
    service = Service(Limits(requests_per_5m=2), clock)
    policy = {"Ratelimit-Policy": '"default";q=2;w=300'}

    assert service.rate_headers(CALLER) == policy | {"Ratelimit": '"default";r=2;t=300'}
    service.admit(CALLER, TARGET)
    clock.now += 100
    service.admit(CALLER, TARGET)
    assert service.rate_headers(CALLER) == policy | {"Ratelimit": '"default";r=0;t=200'}
    service.admit(CALLER, TARGET)
    assert service.rate_headers(CALLER) == policy | {"Ratelimit": '"default";r=0;t=300'}
    assert Service(Limits.none(), clock).rate_headers(CALLER) == {}
    assert service.rate_headers(Caller()) == {}


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 12)), max_size=60))
def test_no_second_admits_more_than_the_rate(steps):
    clock = Clock()
    service = Service(Limits(instances_per_s=20, account_instances_per_s=None, requests_per_5m=None), clock)
    seen, admitted = [], []
    for eighths, n in steps:
        clock.now += eighths / 8
        seen.append((clock.now, n))
        if submit(service, *(f"i{k}" for k in range(n))).status == 200:
            admitted.append((clock.now, n))

    assert _most_in_a_second(admitted) <= 20
    assert _most_in_a_second(seen) == service.worst_window
    assert service.overruns["instances"] == len(seen) - len(admitted)


def _most_in_a_second(arrivals):
    return max((sum(n for at, n in arrivals if end - 1 < at <= end) for end, _ in arrivals), default=0)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6)), max_size=30)
)
def test_every_id_is_created_or_taken_and_none_twice_within_its_retention(steps):
    clock = Clock()
    service = Service(Limits(instances_per_s=None, account_instances_per_s=None, retention_s=5), clock)
    began = {}
    for seconds, ids in steps:
        clock.now += seconds
        free = [id_ for id_ in dict.fromkeys(ids) if clock.now - began.get(id_, -10) >= 5]

        assert names(submit(service, *ids)) == free
        began.update(dict.fromkeys(free, clock.now))
        assert all(service.holds(TARGET, id_) for id_ in ids)


# ── Reading ──


def test_an_instance_is_found_by_its_id(clock):
    service = Service(Limits(), clock, queued_s=10)
    submit(service, "a")

    assert code(service.get_instance(TARGET, "b")) == (404, 10400)
    simple = service.get_instance(TARGET, "a", simple=True).json()["result"]
    assert (simple["status"], simple["success"], "steps" in simple) == ("queued", None, False)
    clock.now += 10
    full = service.get_instance(TARGET, "a").json()["result"]
    assert (full["status"], full["success"], full["steps"]) == ("complete", True, [])
    clock.now += 3 * DAY_S
    assert code(service.get_instance(TARGET, "a")) == (404, 10400)


def test_the_list_is_read_page_by_page(clock):
    service = Service(Limits(), clock)
    ids = [f"i{n}" for n in range(25)]
    submit(service, *ids)

    found, cursor = [], None
    for _ in range(3):
        answer = service.list_instances(TARGET, {"per_page": "10"} | ({"cursor": cursor} if cursor else {})).json()
        found += [instance["id"] for instance in answer["result"]]
        cursor = answer["result_info"].get("cursor")

    assert (found, cursor) == (ids[::-1], None)
    assert service.list_instances(TARGET, {"status": "complete"}).json()["result"] == []
    assert len(service.list_instances(TARGET, {"status": "queued"}).json()["result"]) == 25


@pytest.mark.parametrize(
    "query",
    [
        {"per_page": "0"},
        {"per_page": "101"},
        {"cursor": "x"},
        {"page": "0"},
        {"page": "1", "cursor": "5"},
        {"status": "well"},
        {"date_start": "yesterday"},
        {"date_end": "2026-01-01T00:00:00+01:00"},
    ],
)
def test_a_list_with_an_invalid_query_is_refused(clock, query):
    assert Service(Limits(), clock).list_instances(TARGET, query).status == 400


def test_the_list_is_read_by_page_number_and_by_date(clock):
    service = Service(Limits(), clock, epoch=1_760_000_000 - clock.now)
    for number in range(7):
        submit(service, f"id-{number}")
        clock.now += 60

    def listed(**query):
        answer = service.list_instances(TARGET, query).json()
        return [instance["id"][3:] for instance in answer["result"]], answer["result_info"]

    assert listed(page="2", per_page="3") == (
        ["3", "2", "1"],
        {"count": 3, "per_page": 3, "page": 2, "total_count": 7, "cursor": "1"},
    )
    assert listed(page="3", per_page="3")[0] == ["0"]
    assert listed(page="4", per_page="3")[0] == []
    # 1,760,000,000 is 2025-10-09 08:53:20 UTC
    assert listed(date_start="2025-10-09T08:55:20Z", date_end="2025-10-09T08:57:20.000Z")[0] == ["4", "3", "2"]
    page, info = listed(date_end="2025-10-09T08:57:20Z", per_page="2")
    assert (page, info["total_count"]) == (["4", "3"], 5)
    assert listed(date_end="2025-10-09T08:57:20Z", per_page="2", cursor=info["cursor"])[0] == ["2", "1"]


def test_a_cursor_stays_valid_after_deletions_and_new_instances(clock):
    service = Service(Limits(), clock)
    submit(service, *(f"id-{number}" for number in range(6)))
    first = service.list_instances(TARGET, {"per_page": "2"}).json()
    service.delete_instance(TARGET, "id-5")
    service.delete_instance(TARGET, "id-3")
    submit(service, "id-5", "late")

    rest = service.list_instances(TARGET, {"per_page": "10", "cursor": first["result_info"]["cursor"]}).json()
    assert [instance["id"] for instance in rest["result"]] == ["id-2", "id-1", "id-0"]
    assert service.delete_instance(TARGET, "id-3").status == 404
    for body in (b"{", b"[]", b'{"instances":[]}', b'{"instances":[1]}'):
        assert service.delete_batch(TARGET, body).status == 400


def test_the_workflow_counts_its_instances_by_status(clock):
    service = Service(Limits(), clock, queued_s=10)
    submit(service, "a", "b")
    clock.now += 10
    submit(service, "c")

    counts = service.workflow_counts(TARGET).json()["result"]["instances"]
    assert (counts["queued"], counts["complete"], counts["errored"]) == (1, 2, 0)
