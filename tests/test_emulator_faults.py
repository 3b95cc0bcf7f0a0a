"""Fault scripts: which rules are valid, which requests they select, and what happens to these."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkwf.emulator import FaultScriptError
from bulkwf.emulator.faults import NO_FAULT, Facts, Rule, decide, parse_script

IDS = ("a-1", "a-2", "b-1")


def fault(*rules, method="POST", number=1, of_method=None, elapsed_s=0.0, ids=IDS, fired=None, draw=lambda: 0.5):
    script = parse_script(list(rules))
    facts = Facts(method, number, of_method or number, elapsed_s, 1_000_000_000.0, ids)
    return decide(script, facts, fired or [0] * len(script), draw)


def numbers(rule, upto=12, **facts):
    return [n for n in range(1, upto + 1) if fault({"close": True} | rule, number=n, **facts) is not NO_FAULT]


# ── Selectors ──


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ({}, list(range(1, 13))),
        ({"request": 7}, [7]),
        ({"every": 5}, [5, 10]),
        ({"from": 3, "to": 5}, [3, 4, 5]),
        ({"from": 11}, [11, 12]),
        ({"every": 2, "from": 7}, [8, 10, 12]),
        ({"method": "GET"}, []),
        ({"contains_id": "a-2", "to": 1}, [1]),
        ({"contains_id": "a"}, []),
    ],
)
def test_a_rule_applies_to_the_requests_it_selects(selectors, expected):
    assert numbers(selectors) == expected


def test_a_rule_with_a_method_counts_only_requests_of_that_method():
    rule = {"method": "GET", "request": 2, "close": True}

    assert fault(rule, method="GET", number=9, of_method=2) is not NO_FAULT
    assert fault(rule, method="GET", number=2, of_method=1) is NO_FAULT


def test_a_rule_applies_within_its_time():
    rule = {"after_s": 10, "until_s": 20, "close": True}

    assert [at for at in (9.9, 10, 19.9, 20) if fault(rule, elapsed_s=at) is not NO_FAULT] == [10, 19.9]


def test_a_rule_with_times_applies_at_most_that_often():
    rule = {"times": 2, "close": True}

    assert [fault(rule, fired=[n]) is not NO_FAULT for n in range(4)] == [True, True, False, False]


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1))
def test_a_rule_with_a_chance_applies_where_the_draw_is_below_it(draw, chance):
    applies = fault({"chance": chance, "close": True}, draw=lambda: draw) is not NO_FAULT

    assert applies == (draw < chance)


def test_nothing_is_drawn_for_a_rule_that_does_not_select_the_request():
    assert fault({"chance": 0.5, "request": 2, "close": True}, draw=None) is NO_FAULT


# ── Endings ──


@pytest.mark.parametrize(
    ("rule", "creates"),
    [
        ({"status": 500}, 0),
        ({"status": 500, "when": "after"}, None),
        ({"status": 500, "partial": 2}, 2),
        ({"reset": True}, 0),
        ({"close": True, "when": "after"}, None),
        ({"hang": True, "partial": 0}, 0),
        ({"raw": "HTTP/1.1 banana"}, 0),
        ({"truncate": 0}, None),
        ({"twice": True}, None),
    ],
)
def test_an_ending_determines_how_many_instances_are_created(rule, creates):
    bent = fault(rule)

    assert bent.ending.creates == creates
    assert bent.tampering.withheld == frozenset(IDS if creates is None else IDS[creates:]) - (
        frozenset(IDS) if creates is None else frozenset()
    )


@pytest.mark.parametrize(
    ("rule", "status", "code", "headers"),
    [
        ({"status": 500}, 500, 10001, {}),
        ({"status": 200, "code": 10001}, 200, 10001, {}),
        ({"status": 403}, 403, 9109, {}),
        ({"status": 400, "code": 6003}, 400, 6003, {}),
        ({"status": 429, "retry_after": 30}, 429, 971, {"Retry-After": "30"}),
        ({"status": 429, "retry_after": "date+30"}, 429, 971, {"Retry-After": "Sun, 09 Sep 2001 01:47:10 GMT"}),
        ({"status": 429, "retry_after": "soon"}, 429, 971, {"Retry-After": "soon"}),
        ({"status": 301, "headers": {"Location": "/x"}}, 301, 10001, {"Location": "/x"}),
    ],
)
def test_an_answer_of_the_script_has_the_envelope(rule, status, code, headers):
    reply = fault(rule).ending.reply

    assert (reply.status, reply.json()["errors"][0]["code"], reply.headers) == (status, code, headers)
    assert reply.json()["success"] is False


def test_an_answer_of_the_script_may_be_text_or_html():
    assert fault({"status": 200, "body": "{garbage"}).ending.reply.body == b"{garbage"
    page = fault({"status": 503, "html": True}).ending.reply
    assert page.body.startswith(b"<!DOCTYPE html>")
    assert page.headers["Content-Type"].startswith("text/html")


# ── What else happens ──


@pytest.mark.parametrize(
    ("which", "ids"), [(True, IDS), (2, IDS[:2]), (0, ()), ("^a", IDS[:2]), ("-1$", ("a-1", "b-1"))]
)
def test_ids_are_chosen_by_true_by_number_or_by_pattern(which, ids):
    rule = {"foreign": 0, "latency_s": 1}

    assert fault(rule | {"omit": which}).tampering.withheld == set(ids)
    assert fault(rule | {"omit_created": which}).tampering.hidden == set(ids)
    assert fault(rule | {"lose": which}).tampering.lost == set(ids)
    assert fault(rule | {"fail": which}).tampering.failing == set(ids)
    assert fault(rule | {"repeat": which}).tampering.repeated == set(ids)


def test_foreign_ids_are_listed_or_generated():
    assert fault({"foreign": 2}).tampering.also_named == ("foreign-1", "foreign-2")
    assert fault({"foreign": ["x"]}).tampering.also_named == ("x",)


def test_a_rule_that_refuses_ids_applies_to_batches_with_such_an_id():
    assert fault({"refuse_ids": "^b"}).refused_id == "b-1"
    assert fault({"refuse_ids": "^c"}) is NO_FAULT


def test_latencies_before_and_after_the_execution_add_up():
    bent = fault({"latency_s": 1}, {"latency_s": [2, 4]}, {"latency_s": 0.5, "when": "after"}, {"revoke_token": True})

    assert (bent.latency_before_s, bent.latency_after_s, bent.revokes_token) == (4.0, 0.5, True)


def test_the_first_of_several_rules_with_an_ending_decides():
    bent = fault({"request": 2, "hang": True}, {"status": 500, "when": "after"}, {"reset": True}, {"omit": 1})

    assert (bent.ending.manner, bent.rules) == ("reply", (1, 2, 3))
    assert bent.tampering.withheld == {"a-1"}


# ── Invalid scripts ──


def test_a_script_is_json_or_a_list_of_rules():
    rules = parse_script('[{"request": 7, "status": 500}, {"from": 1, "foreign": 1}]')

    assert rules == (Rule(request=7, status=500), Rule(from_=1, foreign=1))
    assert parse_script(rules) == rules
    assert parse_script(()) == ()


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"request": 1}, "it does nothing"),
        ({"reset": True, "status": 500}, "a request ends in one way, not in 2: reply, reset"),
        ({"reset": True, "request": 0}, "count from 1"),
        ({"reset": True, "chance": 2}, "chance is between 0 and 1"),
        ({"reset": True, "chanse": 1}, "unknown field `chanse`"),
        ({"reset": 1}, r"Expected `bool`, got `int` - at `\$.reset`"),
        ({"status": 99}, "between 200 and 599"),
        ({"truncate": -1}, "not negative"),
        ({"omit": -1}, "not negative"),
        ({"latency_s": [2, 1]}, "0 <= low <= high"),
        ({"latency_s": -1}, "0 <= low <= high"),
        ({"reset": True, "retry_after": 3}, "need a status"),
        ({"omit": True, "partial": 3}, "partial needs"),
        ({"reset": True, "partial": 3, "when": "after"}, "partial needs"),
        ({"omit": True, "when": "after"}, "`when` needs"),
        ({"twice": True, "when": "before"}, "the service's own answer"),
        ({"refuse_ids": "("}, "not a regular expression"),
        ({"method": "PUT", "reset": True}, "Invalid enum value 'PUT'"),
        (7, "Expected `object`"),
    ],
)
def test_an_invalid_rule_is_refused_with_its_number_and_the_reason(rule, reason):
    with pytest.raises(FaultScriptError, match=f"^rule 2: .*{reason}"):
        parse_script([{"reset": True}, rule])


@pytest.mark.parametrize("script", ["{", "{}", "7"])
def test_a_script_that_is_not_a_list_of_rules_is_refused(script):
    with pytest.raises(FaultScriptError, match=r"^the fault script is not"):
        parse_script(script)
