"""What each reply means, line by line of the table. `test_fuzz.py` checks what holds for every reply."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkwf.attempt import Fault, FaultKind, InstanceInfo, Reply, Verdict
from bulkwf.model import Batch
from bulkwf.service.judge import existence, judge, judge_lookup, judge_page, rejection
from bulkwf.service.responses import retry_after_s

IDS = ["a", "b", "c", "d"]
ALL = range(4)
HTML = b"<!DOCTYPE html><title>Oops</title>"


def new_batch(ids=IDS, first_row=100):
    return Batch(
        first_row=first_row,
        rows=2 * len(ids),
        region=b"\n" * 2 * len(ids),
        ids=ids,
        offsets=range(1, 2 * len(ids), 2),
        bare=False,
        row_shape="instance",
        refused=(),
        retention_s=60.0,
    )


BATCH = new_batch()


def reply(status=200, body=b"", **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Reply(status=status, headers={k.replace("_", "-"): v for k, v in headers.items()}, body=data)


def named(*ids, **fields):
    return [{"id": one, "status": "queued", **fields} for one in ids]


def good(result):
    return reply(200, {"success": True, "errors": [], "messages": [], "result": result})


def failed(status, *codes, message="no"):
    errors = [{"code": code, "message": message} for code in codes]
    return reply(status, {"success": False, "errors": errors, "messages": [], "result": None})


def settled(judgement):
    return {position: result.outcome for position, result in judgement.others}


# --- complete answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 202])
def test_answer_that_names_every_id_settles_all_as_created(status):
    body = {"success": True, "result": named(*IDS, version_id="v", workflow_id="w")}

    judgement = judge(BATCH, ALL, reply(status, body))

    assert (judgement.verdict, list(judgement.created), judgement.others, judgement.unsettled) == (
        Verdict.DONE,
        [0, 1, 2, 3],
        (),
        (),
    )
    assert judgement.answer == InstanceInfo("queued", "v", "w")


def test_ids_are_matched_by_value_not_by_position():
    judgement = judge(BATCH, (1, 2, 3), good(named("d", "b")))

    assert (judgement.verdict, sorted(judgement.created), judgement.unsettled) == (Verdict.OMITTED, [1, 3], (2,))
    assert judge(BATCH, ALL, good(named("d", "c", "b", "a"))).verdict is Verdict.DONE


def test_instance_with_another_status_is_settled_with_its_own_status():
    judgement = judge(BATCH, ALL, good([*named("a", "b"), {"id": "c", "status": "running"}, {"id": "d"}]))

    assert (judgement.verdict, list(judgement.created), judgement.answer) == (
        Verdict.DONE,
        [0, 1],
        InstanceInfo("queued"),
    )
    assert [(p, r.outcome, r.status, r.row, r.id) for p, r in judgement.others] == [
        (2, "created", "running", 105, "c"),
        (3, "created", None, 107, "d"),
    ]


def test_omitted_ids_stay_unsettled_and_are_counted():
    judgement = judge(BATCH, ALL, good(named("a", "c")))

    assert (judgement.verdict, judgement.unsettled) == (Verdict.OMITTED, (1, 3))
    assert "2 of 4" in judgement.message


@pytest.mark.parametrize("result", [[], None])
def test_empty_answer_settles_nothing(result):
    judgement = judge(BATCH, ALL, good(result))

    assert (judgement.verdict, judgement.created, judgement.unsettled) == (Verdict.OMITTED, [], (0, 1, 2, 3))


@pytest.mark.parametrize(
    "result",
    [
        named("a", "b", "c", "x"),
        named("x"),
        named("a", "b", "c", "d", "e"),
        named("a", "a"),
        named("a", "b", "c", "d", "d"),
        {"created": named("a"), "errors": [{"id": "x", "code": 1}]},
        {"created": named("a"), "errors": [{"id": "a", "code": 1}]},
        {"created": named(*IDS), "errors": [{"id": "a", "code": 1}]},
        {"created": [], "errors": [{"id": "a", "code": 1}, {"id": "a", "code": 1}]},
        {"created": [], "errors": [{"index": 4, "code": 1}]},
        {"created": [], "errors": [{"index": -1, "code": 1}]},
        {"created": [], "errors": [{"code": 1, "message": "of whom?"}]},
    ],
    ids=json.dumps,
)
def test_answer_with_foreign_or_repeated_ids_is_a_contradiction(result):
    judgement = judge(BATCH, ALL, good(result))

    assert (judgement.verdict, judgement.created, judgement.others) == (Verdict.CONTRADICTION, (), ())
    assert list(judgement.unsettled) == [0, 1, 2, 3]


def test_id_of_another_part_of_the_batch_is_foreign():
    assert judge(BATCH, (0, 1), good(named("a", "b", "c"))).verdict is Verdict.CONTRADICTION


@pytest.mark.parametrize(
    "body",
    [b"", b"ok", HTML, b"{}", b"[]", b"null", b'{"success":true,"result":[{"id":"a"', b'{"success":true,"result":"x"}'],
)
@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_2xx_that_is_not_the_expected_json_is_a_contradiction(status, body):
    judgement = judge(BATCH, ALL, reply(status, body))

    assert (judgement.verdict, judgement.unsettled) == (Verdict.CONTRADICTION, ALL)


# --- the newer result ---------------------------------------------------------------------------------------------


def test_newer_result_settles_what_it_names_by_id_and_rejects_nothing():
    errors = [
        {"index": 1, "id": "b", "code": 10405, "message": "instance.already_exists"},
        {"index": 2, "code": 10010, "message": "bad\x1bparams"},
    ]

    judgement = judge(BATCH, ALL, good({"created": named("a"), "errors": errors}))

    assert (judgement.verdict, list(judgement.created), settled(judgement)) == (
        Verdict.BAD_REQUEST,
        [0],
        {1: "existed"},
    )
    assert (judgement.unsettled, judgement.refused) == ((2, 3), (2,))
    assert (judgement.code, judgement.message) == (10010, "bad params")
    ((_, existed),) = judgement.others
    assert (existed.row, existed.id, existed.code) == (103, "b", None)


def test_a_row_refused_inside_a_200_is_sent_again_before_it_is_rejected():
    result = {"created": named("a", "b", "c"), "errors": [{"id": "d", "code": 10415, "message": "duplicate"}]}

    judgement = judge(BATCH, ALL, good(result))

    assert (judgement.verdict, settled(judgement), judgement.refused) == (Verdict.BAD_REQUEST, {}, (3,))
    assert (judgement.code, judgement.message) == (10415, "duplicate")


def test_index_of_an_error_counts_the_instances_of_the_request():
    judgement = judge(BATCH, (1, 3), good({"created": named("b"), "errors": [{"index": 1, "code": 5}]}))

    assert (judgement.unsettled, judgement.refused) == ((3,), (3,))


def test_id_of_an_error_decides_where_its_index_differs():
    judgement = judge(
        BATCH, ALL, good({"created": named("a", "b", "d"), "errors": [{"index": 0, "id": "c", "code": 5}]})
    )

    assert (judgement.unsettled, judgement.refused) == ((2,), (2,))


def test_an_index_without_an_id_never_proves_that_an_instance_exists():
    """A late copy of an answer to another request can hold the same index."""
    judgement = judge(BATCH, (1,), good({"created": [], "errors": [{"index": 0, "code": 10405}]}))

    assert (judgement.verdict, judgement.others, judgement.refused) == (Verdict.BAD_REQUEST, (), (1,))


def test_instance_with_an_internal_error_is_in_doubt_not_rejected():
    errors = [{"id": one, "code": 10001, "message": "internal"} for one in ("d", "b")]

    judgement = judge(BATCH, ALL, good({"created": named("a"), "errors": errors}))

    assert (judgement.verdict, judgement.others, list(judgement.created)) == (Verdict.IN_DOUBT, (), [0])
    assert judgement.unsettled == (1, 2, 3), "in the order of the rows, in which a body is composed"


@pytest.mark.parametrize("code", [971, 10429])
def test_instance_with_a_rate_error_is_throttled_not_rejected(code):
    errors = [{"id": "b", "code": code, "message": "rate"}, {"id": "c", "code": 5, "message": "bad"}]

    judgement = judge(BATCH, ALL, good({"created": named("a", "d"), "errors": errors}))

    assert (judgement.verdict, settled(judgement), judgement.unsettled) == (Verdict.THROTTLED, {}, (1, 2))


def test_newer_result_without_errors_is_a_complete_answer():
    assert judge(BATCH, ALL, good({"created": named(*IDS)})).verdict is Verdict.DONE


# --- no answer, or another one ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        (FaultKind.NOT_SENT, Verdict.NOT_SENT),
        (FaultKind.IN_DOUBT, Verdict.IN_DOUBT),
        (FaultKind.HANDSHAKE, Verdict.HANDSHAKE),
        (FaultKind.FATAL, Verdict.FATAL),
    ],
)
def test_fault_is_judged_by_its_kind(kind, verdict):
    fault = Fault(kind=kind, message="the connection was reset")

    judgement = judge(BATCH, (1, 2), fault)

    assert (judgement.verdict, judgement.unsettled, judgement.message) == (verdict, (1, 2), "the connection was reset")
    assert judge_lookup(BATCH, 2, fault).verdict is verdict


ENVELOPE_TABLE = [
    *((status, (), Verdict.WRONG_ADDRESS) for status in (301, 302, 303, 307, 308, 304)),
    (400, (10010,), Verdict.BAD_REQUEST),
    (400, (), Verdict.CONTRADICTION),
    (409, (), Verdict.CONTRADICTION),
    (422, (), Verdict.CONTRADICTION),
    (409, (10415,), Verdict.BAD_REQUEST),
    (422, (10000001,), Verdict.BAD_REQUEST),
    (409, (10405,), Verdict.BAD_REQUEST),
    *(
        (status, (code,), Verdict.UNAUTHORIZED)
        for code in (6003, 6100, 6103, 6111, 6199, 9106, 9109, 10000)
        for status in (400, 401, 403)
    ),
    (400, (1, 6003), Verdict.UNAUTHORIZED),
    (400, (6200,), Verdict.BAD_REQUEST),
    (400, (9107,), Verdict.BAD_REQUEST),
    (401, (), Verdict.UNAUTHORIZED),
    (403, (), Verdict.UNAUTHORIZED),
    (403, (7003,), Verdict.UNAUTHORIZED),
    (404, (10200,), Verdict.NO_SUCH_WORKFLOW),
    (404, (), Verdict.NO_SUCH_WORKFLOW),
    *((status, (), Verdict.WRONG_ADDRESS) for status in (402, 405, 406, 410, 411, 414, 415, 431, 451, 501)),
    *((status, (), Verdict.IN_DOUBT) for status in (408, 425, 499)),
    (413, (), Verdict.TOO_LARGE),
    (429, (), Verdict.THROTTLED),
    (429, (10000,), Verdict.THROTTLED),
    *((status, (), Verdict.IN_DOUBT) for status in (500, 502, 503, 504, 520, 521, 522, 523, 524, 530, 507, 599)),
    (500, (10000,), Verdict.IN_DOUBT),
    (503, (10001,), Verdict.IN_DOUBT),
    (525, (), Verdict.ORIGIN_TLS),
    (526, (), Verdict.ORIGIN_TLS),
    (200, (10001,), Verdict.IN_DOUBT),
    (200, (10000,), Verdict.CONTRADICTION),
    (200, (), Verdict.CONTRADICTION),
    (407, (), Verdict.FATAL),
    *(
        (status, codes, Verdict.THROTTLED)
        for codes in ((971,), (10429,), (10000, 971), (10001, 10429))
        for status in (200, 400, 401, 403, 404, 409, 500, 503)
    ),
]


@pytest.mark.parametrize(("status", "codes", "verdict"), ENVELOPE_TABLE)
def test_failed_envelope_is_judged_by_status_and_codes(status, codes, verdict):
    judgement = judge(BATCH, ALL, failed(status, *codes))

    assert (judgement.verdict, judgement.created, judgement.others, judgement.unsettled) == (verdict, (), (), ALL)


HTML_TABLE = [
    (400, {}, Verdict.CONTRADICTION),
    (409, {}, Verdict.CONTRADICTION),
    (422, {}, Verdict.CONTRADICTION),
    (401, {}, Verdict.UNAUTHORIZED),
    (403, {}, Verdict.CHALLENGED),
    (404, {}, Verdict.NO_SUCH_WORKFLOW),
    (413, {}, Verdict.TOO_LARGE),
    (429, {}, Verdict.THROTTLED),
    (502, {}, Verdict.IN_DOUBT),
    (503, {}, Verdict.IN_DOUBT),
    (503, {"cf_mitigated": "challenge"}, Verdict.CHALLENGED),
    (520, {}, Verdict.IN_DOUBT),
    (525, {}, Verdict.ORIGIN_TLS),
    (302, {}, Verdict.WRONG_ADDRESS),
]


@pytest.mark.parametrize(("status", "headers", "verdict"), HTML_TABLE)
@pytest.mark.parametrize("body", [HTML, b"", b"[]", b'{"errors":'])
def test_answer_that_is_not_json_never_blames_a_row(status, headers, verdict, body):
    judgement = judge(BATCH, (2,), reply(status, body, **headers))

    assert (judgement.verdict, judgement.unsettled) == (verdict, (2,))


@pytest.mark.parametrize(
    "page",
    [
        b"<title>Just a moment...</title>",
        b"<script src=/cdn-cgi/challenge-platform/x.js>",
        b"<div id=cf-chl-widget>",
        b"<h1>Attention Required! | Cloudflare</h1>",
        b"<title>JUST A MOMENT</title>",
    ],
)
def test_503_with_signs_of_a_challenge_is_a_challenge(page):
    assert judge(BATCH, ALL, reply(503, page)).verdict is Verdict.CHALLENGED


def test_503_envelope_that_quotes_a_challenge_is_not_a_challenge():
    assert judge(BATCH, ALL, failed(503, 10001, message="Just a moment")).verdict is Verdict.IN_DOUBT


@pytest.mark.parametrize("status", [400, 409, 422, 200, 500])
def test_error_already_exists_without_an_id_settles_nothing(status):
    """The answer may be a late copy of the answer to another row."""
    judgement = judge(BATCH, (3,), failed(status, 10405))

    assert (judgement.verdict, judgement.others, judgement.unsettled) == (Verdict.BAD_REQUEST, (), (3,))


def test_message_quotes_the_error_that_blames_the_credential():
    errors = [{"code": 7, "message": "other"}, {"code": 6003, "message": "x", "error_chain": [{"code": 6111}]}]

    judgement = judge(BATCH, ALL, reply(400, {"success": False, "errors": errors}))

    assert (judgement.verdict, judgement.code, judgement.message) == (Verdict.UNAUTHORIZED, 6003, "x")


def test_authentication_code_in_an_error_chain_is_found():
    errors = [{"code": 7, "message": "other", "error_chain": [{"code": 9109, "message": "Unauthorized"}]}]

    assert judge(BATCH, ALL, reply(400, {"success": False, "errors": errors})).verdict is Verdict.UNAUTHORIZED


def test_message_quotes_the_answer_where_it_gives_no_reason():
    judgement = judge(BATCH, ALL, reply(502, b"<h1>Bad\x1b[31m gateway</h1>", cf_ray="8f-AMS"))

    assert judgement.code == 502
    assert "502" in judgement.message
    assert "8f-AMS" in judgement.message
    assert "Bad [31m gateway" in judgement.message
    assert "an empty body" in judge(BATCH, ALL, reply(502)).message
    assert len(judge(BATCH, ALL, reply(502, b"x" * 10_000)).message) <= 300


# --- look-ups -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [{}, {"created": [], "errors": [{"index": 0, "code": 10405}]}])
def test_an_answer_without_id_and_status_is_no_answer_to_a_look_up(result):
    """Such as a late copy of the answer to a batch."""
    judgement = judge_lookup(BATCH, 2, good(result))

    assert (judgement.verdict, judgement.others, judgement.unsettled) == (Verdict.CONTRADICTION, (), (2,))


@pytest.mark.parametrize("result", [{"id": "c", "status": "complete"}, {"status": "complete"}])
def test_look_up_that_finds_the_instance_settles_it_as_existed(result):
    judgement = judge_lookup(BATCH, 2, good(result))

    assert (judgement.verdict, settled(judgement), judgement.unsettled) == (Verdict.DONE, {2: "existed"}, ())
    assert (judgement.others[0][1].row, judgement.others[0][1].status) == (105, "complete")


LOOKUP_TABLE = [
    (failed(404, 10201), Verdict.ABSENT),
    (failed(404), Verdict.ABSENT),
    (reply(404, b'{"message":"no such page","errors":[{"code":404}]}'), Verdict.CONTRADICTION),
    (failed(404, 10200), Verdict.NO_SUCH_WORKFLOW),
    (failed(404, 7000), Verdict.NO_SUCH_WORKFLOW),
    (failed(404, 7003), Verdict.NO_SUCH_WORKFLOW),
    (failed(404, 10000), Verdict.UNAUTHORIZED),
    (reply(404, HTML), Verdict.CONTRADICTION),
    (reply(404, b""), Verdict.CONTRADICTION),
    (good({"id": "other", "status": "queued"}), Verdict.CONTRADICTION),
    (good(None), Verdict.CONTRADICTION),
    (good([]), Verdict.CONTRADICTION),
    (reply(200, HTML), Verdict.CONTRADICTION),
    (failed(200, 10001), Verdict.IN_DOUBT),
    (failed(200, 971), Verdict.THROTTLED),
    (failed(404, 10429), Verdict.THROTTLED),
    (failed(400, 10010), Verdict.CONTRADICTION),
    (failed(413), Verdict.CONTRADICTION),
    (failed(409, 10405), Verdict.CONTRADICTION),
    (failed(404, 10405), Verdict.NO_SUCH_WORKFLOW),
    (failed(200, 10405), Verdict.CONTRADICTION),
    (failed(500, 10405), Verdict.IN_DOUBT),
    (failed(400, 6003), Verdict.UNAUTHORIZED),
    (failed(401), Verdict.UNAUTHORIZED),
    (reply(403, HTML), Verdict.CHALLENGED),
    (failed(429), Verdict.THROTTLED),
    (failed(500), Verdict.IN_DOUBT),
    (failed(525), Verdict.ORIGIN_TLS),
    (failed(302), Verdict.WRONG_ADDRESS),
]


def failed_with_result(result, *codes):
    errors = [{"code": code, "message": "x"} for code in codes]
    return reply(200, {"success": False, "errors": errors, "messages": [], "result": result})


@pytest.mark.parametrize("result", [{"id": "c", "status": "complete"}, {"status": "complete"}])
def test_failed_look_up_with_a_status_settles_the_instance_as_existed(result):
    judgement = judge_lookup(BATCH, 2, failed_with_result(result, 10001))

    assert (judgement.verdict, settled(judgement)) == (Verdict.DONE, {2: "existed"})
    assert judgement.others[0][1].status == "complete"


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (failed_with_result({"id": "other", "status": "complete"}, 10001), Verdict.CONTRADICTION),
        (failed_with_result({"id": "c"}, 10001), Verdict.IN_DOUBT),
        (failed_with_result({"status": "complete"}), Verdict.CONTRADICTION),
        (failed_with_result({"status": "complete"}, 10400), Verdict.CONTRADICTION),
        (failed_with_result({"status": "complete"}, 10001, 10400), Verdict.IN_DOUBT),
    ],
)
def test_failed_look_up_without_a_status_settles_nothing(answer, verdict):
    judgement = judge_lookup(BATCH, 2, answer)

    assert (judgement.verdict, judgement.others) == (verdict, ())


@pytest.mark.parametrize(("answer", "verdict"), LOOKUP_TABLE)
def test_look_up_that_finds_nothing_settles_nothing(answer, verdict):
    judgement = judge_lookup(BATCH, 2, answer)

    assert (judgement.verdict, judgement.others, judgement.created, judgement.unsettled) == (verdict, (), (), (2,))


# --- pages of the list --------------------------------------------------------------------------------------------


def test_page_of_the_list_is_returned():
    judgement, page = judge_page(good([{"id": "a", "status": "running"}, {"id": "x"}]))

    assert (judgement.verdict, judgement.unsettled, judgement.others) == (Verdict.DONE, (), ())
    assert [(one.id, one.status) for one in page.listed] == [("a", "running"), ("x", None)]


def test_empty_page_is_a_page():
    judgement, page = judge_page(good([]))

    assert (judgement.verdict, page.listed, page.cursor) == (Verdict.DONE, [], None)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (good(None), Verdict.BAD_REQUEST),
        (good({"id": "a"}), Verdict.BAD_REQUEST),
        (good([{"status": "running"}]), Verdict.BAD_REQUEST),
        (good([{"id": 7}]), Verdict.BAD_REQUEST),
        (failed(200), Verdict.BAD_REQUEST),
        (reply(200, b"{}"), Verdict.BAD_REQUEST),
        (failed(200, 10001), Verdict.IN_DOUBT),
        (failed(200, 42), Verdict.CONTRADICTION),
        (reply(200, HTML), Verdict.CONTRADICTION),
        (reply(200, b""), Verdict.CONTRADICTION),
        (reply(200, b"[]"), Verdict.CONTRADICTION),
        (failed(400, 10002), Verdict.BAD_REQUEST),
        (failed(400), Verdict.CONTRADICTION),
        (reply(400, HTML), Verdict.CONTRADICTION),
        (failed(413), Verdict.TOO_LARGE),
        (failed(404, 10200), Verdict.NO_SUCH_WORKFLOW),
        (failed(404, 10201), Verdict.NO_SUCH_WORKFLOW),
        (failed(400, 6003), Verdict.UNAUTHORIZED),
        (failed(401, 10000), Verdict.UNAUTHORIZED),
        (reply(403, HTML), Verdict.CHALLENGED),
        (failed(429), Verdict.THROTTLED),
        (failed(500), Verdict.IN_DOUBT),
        (failed(302), Verdict.WRONG_ADDRESS),
        (Fault(kind=FaultKind.NOT_SENT, message="no"), Verdict.NOT_SENT),
        (Fault(kind=FaultKind.IN_DOUBT, message="no"), Verdict.IN_DOUBT),
    ],
)
def test_answer_without_a_page_is_judged_as_a_failure(answer, verdict):
    judgement, page = judge_page(answer)

    assert (judgement.verdict, page) == (verdict, None)
    assert judgement.message


def test_message_of_a_refused_page_quotes_the_answer():
    judgement, _ = judge_page(reply(200, {"success": True, "result": {"x": "y\x1b[2J"}}, cf_ray="8c1"))

    assert (
        judgement.message
        == 'the answer holds no list: HTTP 200, cf-ray 8c1: {"success": true, "result": {"x": "y\\u001b[2J"}}'
    )


def test_judgement_of_a_throttled_page_holds_its_pause():
    answer = reply(429, {"success": False, "errors": []}, retry_after="7")

    assert judge_page(answer)[0].retry_after_s == 7.0


# --- Retry-After --------------------------------------------------------------------------------------------------

NOON = datetime(2026, 9, 1, 12, 0, 0, tzinfo=UTC)


def at(seconds):
    return format_datetime(datetime.fromtimestamp(NOON.timestamp() + seconds, UTC), usegmt=True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("30", 30.0),
        (" 300 ", 300.0),
        ("999999999", 999_999_999.0),
        ("1000000000", 1e9),
        ("2, 30", 30.0),
        ("٣٠", None),
        ("\uff13\uff10", None),
        ("-5", None),
        ("+5", None),
        ("1.5", None),
        ("1e9", None),
        ("inf", None),
        ("nan", None),
        ("0x10", None),
        ("1_0", None),
        ("", None),
        ("soon", None),
        ("GMT", None),
        ("30 GMT", None),
        ("Mon, 32 Foo 2026 99:99:99 GMT", None),
        ("Tue, 01 Sep 99999 12:00:00 GMT", None),
        ("Tue, 01 Sep 2026 12:00:00 +0000", None),
        (at(90), 90.0),
        (at(0), 0.0),
        (at(-90), 0.0),
    ],
)
def test_retry_after_is_ascii_digits_or_an_http_date_or_none(text, seconds):
    assert retry_after_s(reply(429, retry_after=text, date=at(0))) == seconds


def test_retry_date_is_compared_with_the_date_of_the_answer_or_else_the_clock():
    late = Reply(
        status=429, headers={"retry-after": at(60), "date": at(0)}, body=b"", received_at=NOON.timestamp() + 50
    )
    assert retry_after_s(late) == 60.0
    for headers in ({"retry-after": at(60)}, {"retry-after": at(60), "date": "yesterday"}):
        undated = Reply(status=429, headers=headers, body=b"", received_at=NOON.timestamp() + 50)
        assert retry_after_s(undated) == 10.0


@pytest.mark.parametrize("answer", [good(named("x")), reply(200, HTML), failed(500), failed(400, 10010)])
def test_judgement_of_a_failure_holds_the_time_since_its_request_was_sent(answer):
    late = replace(answer, elapsed_s=7.0)

    assert judge(BATCH, ALL, late).elapsed_s == 7.0
    assert judge_lookup(BATCH, 2, late).elapsed_s == 7.0


@pytest.mark.parametrize("status", [429, 503, 500])
def test_judgement_of_a_failure_holds_the_ordered_pause(status):
    answer = reply(status, {"success": False, "errors": []}, retry_after="7")

    assert judge(BATCH, ALL, answer).retry_after_s == 7.0
    assert judge(BATCH, ALL, failed(status)).retry_after_s is None


@given(st.text(max_size=40) | st.text("0123456789 :,GMTSepMon-+", max_size=40).map(lambda text: text + "GMT"))
def test_retry_after_of_any_text_is_none_or_a_finite_pause(text):
    seconds = retry_after_s(reply(429, retry_after=text))

    assert seconds is None or 0 <= seconds < float("inf")


# --- results ------------------------------------------------------------------------------------------------------


def test_existence_and_rejection_settle_instances_with_their_rows():
    existed, rejected = existence(BATCH, (0, 2)), rejection(BATCH, 1, 42, "why")

    assert settled(existed) == {0: "existed", 2: "existed"}
    assert [(r.row, r.id) for _, r in existed.others] == [(101, "a"), (105, "c")]
    (position, result), *_ = rejected.others
    assert (position, result.row, result.outcome, result.code, result.message) == (1, 103, "rejected", 42, "why")
    assert (existed.unsettled, rejected.unsettled) == ((), ())


def test_message_of_a_redirect_names_its_target():
    reply = Reply(status=302, headers={"location": "https://elsewhere.example/\x1b[31m"}, body=b"")
    judgement = judge(new_batch(), (0,), reply)

    assert judgement.verdict is Verdict.WRONG_ADDRESS
    assert "a redirect to https://elsewhere.example/ [31m, which is not followed" in judgement.message


@pytest.mark.parametrize("codes", [(10001, 971), (971, 10001)])
def test_rate_error_of_one_row_throttles_with_the_pause_of_the_answer(codes):
    refused = [{"id": one, "code": code, "message": "no"} for one, code in zip("cd", codes, strict=True)]
    body = {"success": True, "errors": [], "result": {"created": named("a", "b"), "errors": refused}}

    judgement = judge(BATCH, ALL, reply(200, body, retry_after="240"))

    assert (judgement.verdict, judgement.retry_after_s) == (Verdict.THROTTLED, 240.0)
    assert (list(judgement.created), list(judgement.unsettled)) == ([0, 1], [2, 3])
