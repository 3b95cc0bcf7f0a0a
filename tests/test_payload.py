"""Request bodies of rows and batches, byte for byte; answers of any response body."""

import json
import sys
import tracemalloc
from itertools import product

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import steers

from bulkwf.batching import row as payload
from bulkwf.batching.body import compose
from bulkwf.batching.ids import IdScheme
from bulkwf.batching.packer import Packer
from bulkwf.batching.row import Flaw, decode_rows, read_row
from bulkwf.model import Slice
from bulkwf.service.responses import (
    Answered,
    Refused,
    ServiceError,
    decode_answer,
    decode_errors,
    decode_lookup,
    decode_page,
)


def pack(lines, shape="instance"):
    packer = Packer(IdScheme("run"), shape)
    packer.add(Slice(0, len(lines), b"".join(line + b"\n" for line in lines)))
    return packer.pack()


def literally(text):
    """JSON with numbers as their digits, and objects as pairs in their order."""
    return json.loads(text, parse_int=str, parse_float=str, object_pairs_hook=lambda pairs: ("object", pairs))


# --- JSON text of every shape -------------------------------------------------------------------------------------

BLANKS = st.sampled_from(["", "", "", " ", "\t", "  \r"])
NUMBERS = st.one_of(
    st.integers().map(str),
    st.integers(10**29, 10**30).map(str),
    st.sampled_from(["-0", "0.10", "1E+5", "1e-7", "1e999", "-1.50E+02", "18446744073709551616", "0.1e1"]),
)
ESCAPED = st.sampled_from([r"\n", r"\u2028", r"\ud83d\ude00", r"\"", r"\\", r"\/", r"\u0000", r"\u0041"])
TEXTS = st.lists(
    st.one_of(ESCAPED, st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='"\\'), st.just("\u2028")),
    max_size=6,
).map(lambda parts: '"' + "".join(parts) + '"')
SCALARS = st.one_of(NUMBERS, TEXTS, st.sampled_from(["null", "true", "false"]))


def spread(items, before, after):
    return before + (after + "," + before).join(items) + after


def containers(values):
    arrays = st.builds(
        lambda items, before, after: "[" + spread(items, before, after) + "]",
        st.lists(values, max_size=4),
        BLANKS,
        BLANKS,
    )
    objects = st.builds(
        lambda items, before, after: "{" + spread([f"{key}:{before}{value}" for key, value in items], "", after) + "}",
        st.lists(st.tuples(TEXTS, values), max_size=4),
        BLANKS,
        BLANKS,
    )
    return st.one_of(arrays, objects)


VALUES = st.recursive(SCALARS, containers, max_leaves=8)
"""JSON values as text, with any blanks, any notation, and duplicate keys."""


@st.composite
def instances(draw):
    """(a row as text, whether it has an id, its params as text or None)."""
    members = []
    params = draw(st.none() | VALUES)
    with_id = draw(st.booleans())
    if params is not None:
        members.append(f'"params":{draw(BLANKS)}{params}')
    if with_id:
        members.append(f'"instance_id":"id{draw(st.integers(0, 10**9))}"')
    if draw(st.booleans()):
        members.append('"location_hint":"weur"')
    members = draw(st.permutations(members))
    blank = draw(BLANKS)
    return f"{blank}{{{spread(members, draw(BLANKS), draw(BLANKS))}}}{blank}".encode(), with_id, params


def bytes_of_params(body):
    found = msgspec.json.decode(body, type=list[dict[str, msgspec.Raw]])
    return [bytes(item["params"]).decode() if "params" in item else None for item in found]


@settings(max_examples=150)
@given(rows=st.lists(instances(), min_size=1, max_size=8), drawn=st.data())
def test_the_service_receives_each_rows_params_byte_for_byte_and_the_rows_id(rows, drawn):
    batch = pack([line for line, _, _ in rows])
    part = sorted(drawn.draw(st.sets(st.sampled_from(range(len(batch.ids))), min_size=1)))

    body = compose(batch, part)

    sent = [rows[batch.offsets[position]] for position in part]
    assert bytes_of_params(body) == [params for _, _, params in sent]
    for position, (line, with_id, _), item in zip(part, sent, literally(body), strict=True):
        given_pairs = literally(line)[1]
        made = [] if with_id else [("instance_id", batch.ids[position])]
        assert item == ("object", made + given_pairs)
        assert dict(item[1])["instance_id"] == batch.ids[position]


@given(values=st.lists(st.tuples(BLANKS, VALUES), min_size=1, max_size=8), drawn=st.data())
def test_a_list_of_params_is_sent_byte_for_byte_with_an_id_for_each(values, drawn):
    batch = pack([f"{blank}{value}".encode() for blank, value in values], shape="params")
    part = sorted(drawn.draw(st.sets(st.sampled_from(range(len(values))), min_size=1)))

    body = compose(batch, part)

    assert bytes_of_params(body) == [values[position][1] for position in part]
    assert [item["instance_id"] for item in json.loads(body)] == [batch.ids[position] for position in part]


@given(values=st.lists(VALUES, min_size=1, max_size=8))
def test_rows_with_ids_are_sent_unchanged(values):
    lines = [f'{{"instance_id":"i{n}","params":{value}}}'.encode() for n, value in enumerate(values)]
    batch = pack(lines)

    assert batch.bare
    assert compose(batch, range(len(lines))) == b"[" + b",".join(lines) + b"]"
    assert [compose(batch, [n]) for n in range(len(lines))] == [b"[" + line + b"]" for line in lines]


def test_refused_and_blank_rows_are_not_in_the_body():
    batch = pack([b'{"instance_id":"a"}', b"", b"nope", b'{"instance_id":"b"}'])

    assert compose(batch, [0, 1]) == b'[{"instance_id":"a"},{"instance_id":"b"}]'
    batch = pack([b"", b"1", b"nope", b"", b"2"], shape="params")
    assert [item["params"] for item in json.loads(compose(batch, [0, 1]))] == [1, 2]
    batch = pack([b"", b'{"params":1}', b"nope", b'{"params":2}'])
    assert [item["params"] for item in json.loads(compose(batch, [0, 1]))] == [1, 2]


def test_params_that_are_absent_stay_absent_and_null_stays_null():
    batch = pack([b"{}", b'{"params":null}', b" { } "])

    sent = json.loads(compose(batch, [0, 1, 2]))

    assert [item.get("params", "absent") for item in sent] == ["absent", None, "absent"]


# --- rows, all at once or one at a time ---------------------------------------------------------------------------

FRAGMENTS = [
    *[b"", b" ", b"{}", b"{}\r", b'{"x":1}'],
    *[b"{}{}", b"{},{}", b"{}],[{}", b"{", b"}"],
    *[b'{"params":1', b'"instance_id":"a"}', b'{"params":"', b'"}'],
    *[b'{"params":[{', b"}]}", b'{"params":[{}', b"{}]}", b'{"params":[[{}', b"{}]]}"],
]
"""Lines that are a row, half a row, or two rows. Together they may look like as many rows as lines."""
LINES = st.one_of(
    instances().map(lambda found: found[0]),
    VALUES.map(str.encode),
    st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")),
    st.sampled_from(FRAGMENTS),
)


def fields(row):
    return tuple(bytes(v) if isinstance(v, msgspec.Raw) else repr(v) for v in msgspec.structs.astuple(row))


@settings(max_examples=200)
@given(lines=st.lists(LINES, min_size=1, max_size=5))
def test_reading_all_rows_at_once_gives_the_same_as_each_alone_or_gives_up(lines):
    check_all_at_once(lines)


def test_three_lines_together_are_the_same_rows_as_each_alone():
    for lines in product(FRAGMENTS, repeat=3):
        check_all_at_once(lines)


def check_all_at_once(lines):
    region = b"".join(line + b"\n" for line in lines)
    objects = all(line.startswith(b"{") and line.endswith(b"}") for line in lines)
    found = decode_rows(region, len(lines))
    if objects:
        known = decode_rows(region, len(lines), objects=True)
        assert (known is None) == (found is None)
        assert known is None or [*map(fields, known)] == [*map(fields, found)]

    if found is not None:
        alone = [read_row(line, "instance") for line in lines]
        assert not any(isinstance(row, Flaw) for row in alone)
        assert [fields(row) for row in found] == [fields(row) for row in alone]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_valid_rows_are_read_in_one_pass_with_any_total_of_brackets(end):
    line = b'{"instance_id":"a","params":[' + b"[]," * 100 + b"{}]}"

    assert len(decode_rows((line + end) * 100, 100)) == 100


def test_a_line_with_many_brackets_is_checked_alone():
    assert decode_rows(b'{"params":[' + b"[]," * 500 + b"1]}\n", 1) is None


@given(VALUES.map(str.encode))
def test_brackets_inside_strings_do_not_count_as_depth(line):
    def depth(value):
        if isinstance(value, tuple) and value[0] == "object":
            return 1 + max((depth(member) for _, member in value[1]), default=0)
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    assert all(payload._is_deeper(line, most) == (depth(literally(line)) > most) for most in range(12))


@pytest.mark.parametrize("brackets", [b"", b"[" * 501])
def test_an_unterminated_string_with_many_escaped_quotes_is_read_in_linear_time(brackets):
    line = b'{"params":' + brackets + b'"' + b'\\"' * 100_000  # a scan from each quote would take minutes

    assert isinstance(read_row(line, "instance"), Flaw)
    assert decode_answer(line) is None


def called_from_below(calls, function):
    return function() if not calls else called_from_below(calls - 1, function)


@pytest.mark.parametrize("levels", [400, 499, 500, 700, 900, 930, 950, 970, 2_000])
def test_a_row_that_was_read_can_be_composed_on_a_deeper_stack(levels):
    """Before Python 3.12 a parser's limit shrinks with the stack of its caller."""
    batch = pack([b'{"params":{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}}"])
    here, frame = 0, sys._getframe()
    while frame is not None:
        here, frame = here + 1, frame.f_back

    assert len(batch.ids) == (levels < 500), "the maximum is 500 levels, those of the row and its params included"
    for position in range(len(batch.ids)):
        body = called_from_below(max(0, 400 - here), lambda position=position: compose(batch, [position]))
        assert body.count(b"[") == levels


def test_the_first_byte_that_is_not_utf8_is_named():
    assert "byte 12 of it is 0xff" in read_row(b'{"params":"\xff"}', "instance").message


@given(st.binary(max_size=60), st.sampled_from(["instance", "params"]))
def test_any_bytes_give_a_row_or_a_printable_flaw(line, shape):
    found = read_row(line, shape)

    if isinstance(found, Flaw):
        assert not steers(found.message)
    else:
        json.loads(line)


# --- answers ------------------------------------------------------------------------------------------------------


def test_the_documented_answer_is_read():
    envelope = decode_answer(
        b'{"success":true,"errors":[],"messages":[],'
        b'"result":[{"id":"a","status":"queued","version_id":"v","workflow_id":"w"}]}'
    )

    assert envelope.success
    assert envelope.answered == [Answered("a", "queued", "v", "w")]
    assert envelope.refused == []


def test_the_newer_answer_is_read():
    envelope = decode_answer(
        b'{"success":true,"result":{"created":[{"id":"a"}],'
        b'"errors":[{"index":1,"id":"b","code":10405,"message":"exists"}]}}'
    )

    assert envelope.answered == [Answered("a")]
    assert envelope.refused == [Refused("b", 1, 10405, "exists")]


def test_unknown_fields_and_statuses_are_accepted():
    envelope = decode_answer(
        b'{"success":true,"new":{"x":[1]},"result":[{"id":"a","status":"hibernating","region":"weur","n":{}}]}'
    )

    assert envelope.answered == [Answered("a", "hibernating")]


@pytest.mark.parametrize("result", [b'"result":null', b'"result":[]', b'"messages":null'])
def test_an_answer_without_instances_names_none(result):
    assert decode_answer(b'{"success":true,' + result + b"}").answered == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"<html>",
        b"{}",
        b'{"success":"true","result":[]}',
        b'{"success":1,"result":[]}',
        b'{"success":true,"result":[{"status":"queued"}]}',
        b'{"success":true,"result":[{"id":1}]}',
        b'{"success":true,"result":["a"]}',
        b'{"success":true,"result":"a"}',
        b'{"success":true,"result":{"id":"a"}}',
        b'{"success":true,"result":[{"id":"a"}',
        b'{"success":true,"result":[]}x',
        b'{"success":true,"result":[{"id":"\xff"}]}',
        b'{"success":true,"result":{"created":[],"errors":[{"id":"a","code":9223372036854775808}]}}',
        b'{"success":true,"x":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    ],
)
def test_another_body_is_not_an_answer_to_a_batch_create(body):
    assert decode_answer(body) is None


def test_a_look_up_says_whether_the_instance_exists():
    found = decode_lookup(b'{"success":true,"result":{"id":"a","status":"running","steps":[]}}')
    assert (found.success, found.id, found.status) == (True, "a", "running")
    nameless = decode_lookup(b'{"success":true,"result":{"status":"running"}}')
    assert (nameless.success, nameless.id) == (True, None)
    assert decode_lookup(b'{"success":false,"result":null,"errors":[]}').success is False


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"success":true}', b'{"success":true,"result":null}', b'{"success":true,"result":[]}', b"x"]
)
def test_another_body_is_not_an_answer_to_a_look_up(body):
    assert decode_lookup(body) is None


def a_page(info, result=b'[{"id":"a","status":"queued","created_on":"2026-01-01"},{"id":"b"}]'):
    return b'{"success":true,"errors":[],"result":%s,"result_info":%s}' % (result, info)


def test_a_list_page_gives_its_instances_and_the_next_cursor():
    page = decode_page(a_page(b'{"per_page":100,"count":2,"cursor":"abc=="}'))
    assert [(one.id, one.status) for one in page.listed] == [("a", "queued"), ("b", None)]
    assert page.cursor == "abc=="


@pytest.mark.parametrize(
    ("info", "cursor"),
    [
        (b'{"cursor":7}', "7"),
        (b'{"cursor":0}', "0"),
        (b'{"cursor":""}', None),
        (b'{"cursor":null}', None),
        (b'{"page":1,"total_count":2}', None),
        (b"null", None),
    ],
)
def test_a_page_without_a_cursor_is_the_last(info, cursor):
    assert decode_page(a_page(info)).cursor == cursor


def test_a_list_page_needs_no_result_info():
    page = decode_page(b'{"success":true,"result":[{"id":"a","status":null}]}')
    assert ([(one.id, one.status) for one in page.listed], page.cursor) == ([("a", None)], None)
    assert decode_page(b'{"success":true,"result":[]}').listed == []


@pytest.mark.parametrize(
    "body",
    [
        b"", b"x", b"{}", b"[]", b'{"success":true}', b'{"result":[]}', b'{"success":true,"result":null}',
        b'{"success":false,"result":[{"id":"a"}]}', b'{"success":1,"result":[]}', b'{"success":true,"result":{}}',
        b'{"success":true,"result":[{"status":"queued"}]}', b'{"success":true,"result":[{"id":7}]}',
        b'{"success":true,"result":[{"id":"a","status":1}]}', b'{"success":true,"result":["a"]}',
        a_page(b'{"cursor":{}}'), a_page(b'{"cursor":1.5}'), a_page(b"[]"), a_page(b"{}")[:-1],
        b'{"success":true,"x":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    ],
)  # fmt: skip
def test_another_body_is_not_a_list_page(body):
    assert decode_page(body) is None


@pytest.mark.parametrize(
    ("decode", "head"),
    [
        (decode_answer, b'{"success":true,"result":[],"x":'),
        (decode_lookup, b'{"success":true,"result":{"id":"a"},"x":'),
        (decode_page, b'{"success":true,"result":[],"x":'),
        (decode_errors, b'{"errors":[],"x":'),
    ],
)
def test_an_answer_may_have_600_levels_with_any_python_and_no_more(decode, head):
    """A parser's own limit is 1,000 minus the caller's stack before Python 3.12, and about 10,000 since then."""

    def nested(levels):
        return head + b"[" * levels + b'"]]]"' + b"]" * levels + b"}"

    assert decode(nested(599)) is not None
    assert decode(nested(600)) is None


def test_an_answer_repeats_the_params_of_the_deepest_row():
    params = b"[" * (payload.MAX_NESTING - 1) + b"]" * (payload.MAX_NESTING - 1)
    assert not isinstance(read_row(b'{"params":%b}' % params, "instance"), Flaw)

    assert decode_lookup(b'{"success":true,"result":{"id":"a","params":%b}}' % params).id == "a"


def test_errors_are_read_with_those_of_their_chains():
    body = json.dumps(
        {
            "errors": [
                {"code": 1, "message": "a", "error_chain": [{"code": 2, "message": "b", "error_chain": [{"code": 3}]}]},
                {"code": "1004", "message": "text\r\n\x1b"},
                {"code": True},
                {"code": "٣"},
                {"code": 2**63},
                {"code": "1e3"},
                {"message": 5},
                "odd",
            ]
        }
    ).encode()

    assert decode_errors(body) == (
        ServiceError(1, "a"),
        ServiceError(2, "b"),
        ServiceError(3, ""),
        ServiceError(1004, "text"),
        ServiceError(None),
        ServiceError(None),
        ServiceError(None),
        ServiceError(None),
        ServiceError(None),
    )


def test_a_chain_of_errors_is_followed_to_a_bounded_depth():
    error = {"code": 9}
    for code in range(8, 0, -1):
        error = {"code": code, "error_chain": [error]}

    assert [one.code for one in decode_errors(json.dumps({"errors": [error]}).encode())] == [1, 2, 3]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"<html>", None),
        (b"", None),
        (b"[]", None),
        (b'"x"', None),
        (b"{}", ()),
        (b'{"errors":null}', ()),
        (b'{"errors":{"code":1}}', ()),
        (b"[" * 5_000, None),
    ],
)
def test_a_body_without_errors_differs_from_a_body_that_is_not_an_object(body, expected):
    assert decode_errors(body) == expected


LARGE_BYTES = 8 * 1_048_576
"""Size of the largest answer that is read, in bytes."""


def filled(head, entry, tail):
    """A body of the largest size, with as many entries as it holds."""
    return head + b",".join([entry] * ((LARGE_BYTES - len(head) - len(tail)) // (len(entry) + 1))) + tail


@pytest.mark.slow
@pytest.mark.parametrize("entry", [b"{}", b"[]", b"0", b'{"code":7,"message":"a"}', b'{"error_chain":[{}]}'])
@pytest.mark.parametrize(
    ("head", "tail", "read"),
    [
        (b'{"success":false,"errors":[', b"]}", None),
        (b'{"success":false,"errors":[{"code":1}],"messages":[', b"]}", (ServiceError(1),)),
        (b'{"success":false,"errors":[{"code":1}],"result":[', b"]}", (ServiceError(1),)),
        (b'{"success":true,"errors":[{"code":1}],"result":{"created":[],"errors":[', b"]}}", (ServiceError(1),)),
    ],
    ids=["errors", "messages", "result", "refused instances"],
)
def test_a_large_error_answer_takes_bounded_memory(head, entry, tail, read):
    body = filled(head, entry, tail)
    tracemalloc.start()
    try:
        assert decode_errors(body) == read
        decode_answer(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_as_many_errors_are_read_as_a_list_may_hold():
    body = json.dumps({"errors": [{"code": n, "message": "x" * 100} for n in range(1_000)]}).encode()
    assert [error.code for error in decode_errors(body)] == list(range(1_000))


@given(st.binary(max_size=80) | VALUES.map(str.encode))
def test_no_body_makes_the_decoders_raise(body):
    assert decode_answer(body) is None or body
    assert decode_lookup(body) is None or body
    assert decode_page(body) is None or body
    assert decode_errors(body) is None or body.strip().startswith(b"{")
