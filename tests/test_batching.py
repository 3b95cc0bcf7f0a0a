"""Batches of rows: where they are cut, which rows are refused and why, which id each row gets."""

import json
import re
from dataclasses import replace
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkwf.batching.body import compose
from bulkwf.batching.ids import IdScheme, has_its_ids
from bulkwf.batching.lines import MAX_PARAMS_BYTES, MAX_ROW_BYTES, Cut, cut, fingerprint, too_long
from bulkwf.batching.packer import Packer
from bulkwf.batching.retention import DEFAULT_RETENTION_S
from bulkwf.errors import ConfigError
from bulkwf.model import Slice

ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", re.ASCII)
KEYED = IdScheme("run")


def new_packer(*, scheme=KEYED, shape="instance"):
    return Packer(scheme, shape)


def pack(*lines, first_row=0, **how):
    packer = new_packer(**how)
    packer.add(Slice(first_row, len(lines), b"".join(line + b"\n" for line in lines)))
    return packer.pack()


def row(**members):
    return json.dumps(members, separators=(",", ":")).encode()


def refusals(batch):
    return [(result.row, result.code) for result in batch.refused]


# --- cutting ------------------------------------------------------------------------------------------------------


def test_a_cut_is_bound_by_rows_by_bytes_or_by_the_data():
    assert cut(b"a\nb\nc\n", 0, 2, 100) == Cut(4, 2, "rows", objects=False, longest=1)
    assert cut(b"a\nb\nc\n", 0, 9, 4) == Cut(4, 2, "bytes", objects=False, longest=1)
    assert cut(b"a\nb\nc", 0, 9, 100) == Cut(4, 2, "data", objects=False, longest=1)
    assert cut(b"a\nb\nc\n", 2, 1, 100) == Cut(2, 1, "rows", objects=False, longest=1)
    assert cut(b"", 0, 9, 100) == Cut(0, 0, "data", objects=True, longest=0)


def test_the_first_line_may_exceed_the_bytes_but_only_alone():
    assert cut(b"aaaa\nb\n", 0, 9, 3) == Cut(5, 1, "bytes", objects=False, longest=4)
    assert cut(b"a\nbbbb\n", 0, 9, 3) == Cut(2, 1, "bytes", objects=False, longest=1)
    assert cut(b"a\nb\n", 0, 9, 3) == Cut(2, 1, "bytes", objects=False, longest=1), "a newline counts too"
    assert cut(b"xa\nb\n", 1, 9, 4) == Cut(4, 2, "data", objects=False, longest=1)


@given(
    lines=st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), max_size=12),
    rest=st.sampled_from([b"", b"x", b"xxxxx"]),
    skipped=st.integers(0, 4),
    max_rows=st.integers(1, 12),
    max_bytes=st.integers(1, 40),
)
def test_a_cut_has_as_many_whole_lines_as_both_bounds_allow(lines, rest, skipped, max_rows, max_bytes):
    whole = [line + b"\n" for line in lines]
    start = sum(map(len, whole[:skipped]))
    whole = whole[skipped:]
    data = b"".join(line + b"\n" for line in lines) + rest

    size, rows, bound, objects, longest = cut(data, start, max_rows, max_bytes)

    assert data[start : start + size] == b"".join(whole[:rows])
    assert objects == all(line.startswith(b"{") and line.endswith(b"}\n") for line in whole[:rows])
    assert longest == max((len(line) - 1 for line in whole[:rows]), default=0)
    assert rows <= max_rows
    assert size <= max_bytes or rows == 1
    if bound == "rows":
        assert rows == max_rows
    elif bound == "data":
        assert rows == len(whole)
    else:
        assert size + len(whole[rows]) > max_bytes


@given(
    lines=st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), min_size=1, max_size=12),
    drawn=st.data(),
)
def test_a_fingerprint_ignores_dropped_lines(lines, drawn):
    dropped = drawn.draw(st.frozensets(st.integers(0, len(lines) - 1)))
    region = b"".join(line + b"\n" for line in lines)
    kept = b"".join(line + b"\n" for offset, line in enumerate(lines) if offset not in dropped)

    assert fingerprint(region, dropped) == (len(kept), crc32(kept))


def test_correcting_a_refused_row_does_not_change_the_fingerprint():
    assert fingerprint(b"a\nBAD\nc\n", frozenset({1})) == fingerprint(b"a\ncorrected\nc\n", frozenset({1}))
    assert fingerprint(b"a\nb\nc\n", frozenset({1})) != fingerprint(b"a\nb\nC\n", frozenset({1}))


# --- rows that are refused ----------------------------------------------------------------------------------------

GOOD_ROWS = {
    "nothing": b"{}",
    "params": b'{"params":{"a":1}}',
    "params null": b'{"params":null}',
    "params text": b'{"params":"x"}',
    "id": b'{"instance_id":"a"}',
    "id of 100": b'{"instance_id":"' + b"a" * 100 + b'"}',
    "id of digits": b'{"instance_id":"0"}',
    "id of an underscore": b'{"instance_id":"_"}',
    "id that is nearly reserved": b'{"instance_id":"batches"}',
    "id that is nearly the system's": b'{"instance_id":"cf_' + b"a" * 63 + b'"}',
    "id in other case": b'{"instance_id":"cf_' + b"A" * 64 + b'"}',
    "retention": b'{"instance_retention":{"success_retention":60000,"error_retention":"3 days"}}',
    "no retention": b'{"instance_retention":{}}',
    "location hint": b'{"location_hint":"weur"}',
    "CRLF": b'{"params":1}\r',
    "blanks around": b'  {"params" : 1 }\t',
    "surrogate pair": b'{"params":"\\ud83d\\ude00 \\\\ud83d"}',
    "U+2028 in text": '{"params":"a\u2028b\u2029c\u0085d"}'.encode(),
    "30 digits": b'{"params":123456789012345678901234567890}',
    "a number that no float holds": b'{"params":1e999}',
    "duplicate keys in params": b'{"params":{"a":1,"a":2}}',
    "500 levels": b'{"params":' + b"[" * 499 + b"]" * 499 + b"}",
    "many brackets, few levels": b'{"params":[' + b"[],{}," * 3_000 + b"1]}",
    "brackets in text": b'{"params":"' + b"[{" * 3_000 + b'\\""}',
    "params of 1 MiB": b'{"params":"' + b"x" * (MAX_PARAMS_BYTES - 2) + b'"}',
}
BAD_ROWS = {
    "text": (b"hello", "not_json"),
    "cut off": (b'{"params":', "not_json"),
    "one quote": (b"{'params':1}", "not_json"),
    "trailing comma": (b'{"params":[1,]}', "not_json"),
    "two objects": (b'{"params":1}{"params":2}', "not_json"),
    "two objects and a blank": (b'{"params":1} {"params":2}', "not_json"),
    "object and a NUL": (b'{"params":1}\0', "not_json"),
    "NaN": (b'{"params":NaN}', "not_json"),
    "Infinity": (b'{"params":-Infinity}', "not_json"),
    "bare control character": (b'{"params":"\x01"}', "not_json"),
    "leading zero": (b'{"params":01}', "not_json"),
    "lone surrogate": (b'{"params":"\\ud800"}', "lone_surrogate"),
    "lone surrogate before other text": (b'{"params":"cut \\uD83D","n":12345}', "lone_surrogate"),
    "lone surrogate behind a pair": (b'{"params":"\\ud83d\\ude00\\ude00"}', "lone_surrogate"),
    "two high surrogates": (b'{"params":"\\ud83d\\ud83d\\ude00"}', "lone_surrogate"),
    "surrogate pair cut short": (b'{"params":"\\ud800\\u0041"}', "lone_surrogate"),
    "lone surrogate as id": (b'{"instance_id":"\\udfff"}', "lone_surrogate"),
    "lone surrogate as key": (b'{"params":{"\\udfff":1}}', "lone_surrogate"),
    "escape cut off": (b'{"params":"\\ud8"}', "not_json"),
    "escaped backslash": (b'{"params":"\\\\ud83d"', "not_json"),
    "byte order mark": (b'\xef\xbb\xbf{"params":1}', "not_json"),
    "not UTF-8": (b'{"params":"\xff"}', "not_utf8"),
    "UTF-8 surrogate": (b'{"params":"\xed\xa0\x80"}', "not_utf8"),
    "overlong UTF-8": (b'{"params":"\xc0\xaf"}', "not_utf8"),
    "UTF-16": ('{"params":1}'.encode("utf-16"), "not_utf8"),
    "501 levels": (b'{"params":' + b"[" * 500 + b"]" * 500 + b"}", "too_deep"),
    "2,000 levels": (b'{"params":' + b"[" * 2_000 + b"]" * 2_000 + b"}", "too_deep"),
    "2,000 objects": (b'{"params":' + b'{"a":' * 2_000 + b"1" + b"}" * 2_000 + b"}", "too_deep"),
    "deep behind a quote": (b'{"params":["\\"",' + b"[" * 600 + b"]" * 601 + b"}", "too_deep"),
    "array": (b"[1]", "not_object"),
    "number": (b"1", "not_object"),
    "null": (b"null", "not_object"),
    "quoted": (b'"{}"', "not_object"),
    "unknown key": (b'{"param":1}', "unknown_key"),
    "key in other case": (b'{"Params":1}', "unknown_key"),
    "id of a space": (b'{"instance_id":"a b"}', "bad_id"),
    "id empty": (b'{"instance_id":""}', "bad_id"),
    "id of 101": (b'{"instance_id":"' + b"a" * 101 + b'"}', "bad_id"),
    "id with a dash first": (b'{"instance_id":"-a"}', "bad_id"),
    "id with a newline last": (b'{"instance_id":"a\\n"}', "bad_id"),
    "id with a newline within": (b'{"instance_id":"a\\nb"}', "bad_id"),
    "id with a slash": (b'{"instance_id":"a/b"}', "bad_id"),
    "id of Arabic digits": ('{"instance_id":"٣"}'.encode(), "bad_id"),
    "id of a letter with an accent": ('{"instance_id":"é"}'.encode(), "bad_id"),
    "id null": (b'{"instance_id":null}', "bad_id"),
    "id number": (b'{"instance_id":1}', "bad_id"),
    "id batch": (b'{"instance_id":"batch"}', "reserved_id"),
    "id terminate": (b'{"instance_id":"terminate"}', "reserved_id"),
    "id terminateAll": (b'{"instance_id":"terminateAll"}', "reserved_id"),
    "id of the system": (b'{"instance_id":"cf_' + b"0a" * 32 + b'"}', "reserved_id"),
    "retention of no unit": (b'{"instance_retention":{"success_retention":"3"}}', "bad_retention"),
    "retention of an unknown unit": (b'{"instance_retention":{"success_retention":"3 eons"}}', "bad_retention"),
    "retention in Arabic digits": ('{"instance_retention":{"error_retention":"٣ days"}}'.encode(), "bad_retention"),
    "retention of a long text": (
        b'{"instance_retention":{"error_retention":"3%bdays"}}' % (b" " * 99),
        "bad_retention",
    ),
    "retention with a newline": (b'{"instance_retention":{"error_retention":"3 days\\n"}}', "bad_retention"),
    "retention of 0 days": (b'{"instance_retention":{"error_retention":"0 days"}}', "bad_retention"),
    "retention 0": (b'{"instance_retention":{"error_retention":0}}', "bad_retention"),
    "retention negative": (b'{"instance_retention":{"error_retention":-1}}', "bad_retention"),
    "retention with a fraction": (b'{"instance_retention":{"error_retention":1.5}}', "bad_retention"),
    "retention true": (b'{"instance_retention":{"error_retention":true}}', "bad_retention"),
    "retention null": (b'{"instance_retention":null}', "bad_retention"),
    "retention text": (b'{"instance_retention":"3 days"}', "bad_retention"),
    "retention unknown key": (b'{"instance_retention":{"retention":1}}', "bad_retention"),
    "location hint number": (b'{"location_hint":1}', "bad_value"),
    "params over 1 MiB": (b'{"params":"' + b"x" * (MAX_PARAMS_BYTES - 1) + b'"}', "params_too_large"),
    "line far over 1 MiB": (b'{"params":"' + b"x" * MAX_ROW_BYTES + b'"}', "row_too_long"),
}


@pytest.mark.parametrize("name", GOOD_ROWS)
def test_a_valid_row_is_sent(name):
    batch = pack(GOOD_ROWS[name])

    assert (len(batch.ids), batch.offsets, batch.refused) == (1, [0], ())


@pytest.mark.parametrize("name", BAD_ROWS)
def test_an_invalid_row_is_refused_with_its_reason(name):
    line, code = BAD_ROWS[name]

    batch = pack(line, first_row=7)

    assert (batch.ids, refusals(batch)) == ([], [(7, code)])
    assert batch.refused[0].outcome == "invalid"
    assert batch.refused[0].message.isprintable()
    assert len(batch.refused[0].message) <= 300


@pytest.mark.parametrize("name", BAD_ROWS)
def test_an_invalid_row_among_valid_rows_with_ids_is_refused_alone(name):
    line, code = BAD_ROWS[name]
    if b"instance_id" not in line:
        line = line.replace(b"{", b'{"instance_id":"bad",', 1)

    batch = pack(row(instance_id="a"), line, row(instance_id="b"), row(instance_id="c"))

    assert (batch.ids, batch.offsets, refusals(batch)) == (["a", "b", "c"], [0, 2, 3], [(1, code)])


@pytest.mark.parametrize("name", GOOD_ROWS)
def test_a_valid_row_is_sent_beside_invalid_ones(name):
    batch = pack(row(instance_id="x"), GOOD_ROWS[name], b"not json", row(params=1))

    assert (batch.offsets, refusals(batch)) == ([0, 1, 3], [(2, "not_json")])


@pytest.mark.parametrize(
    "lines",
    [
        (b'{"instance_id":"a"', b',"params":1}'),
        (b'{"instance_id":"a","params":[{}', b"{}]}"),
        (b'{"instance_id":"a","params":{', b"}}"),
        (b'{"instance_id":"a"}{"instance_id":"b"', b"}"),
        (b'{"instance_id":"a","params":"}', b'{"}'),
        (b"", b'{"instance_id":"a"}{"instance_id":"b"}'),
        (b'{"instance_id":"a"}{"instance_id":"b"}', b""),
        (b'{"instance_id":"a"} {"instance_id":"b"}', b" "),
    ],
)
def test_an_object_never_spans_lines_and_a_line_never_holds_two(lines):
    batch = pack(*lines)

    assert batch.ids == []
    assert {code for _, code in refusals(batch)} == {"not_json"}


def test_a_lone_surrogate_is_named_with_its_place():
    message = pack(b'{"instance_id":"a","params":{"t":"\\u00fc \\ud83d","n":1}}').refused[0].message

    assert message.startswith(r"\ud83d at byte 42 of the row is a lone surrogate")


def test_an_unknown_key_is_named():
    assert "`orderId`" in pack(b'{"orderId":1}').refused[0].message


def test_a_refused_id_is_stored_in_printable_form():
    batch = pack(row(instance_id="a b"), row(instance_id="x\x1b[31m\u202e" + "y" * 200), row(instance_id="batch"), b"{")

    assert [result.id and len(result.id) for result in batch.refused] == [3, 100, 5, None]
    assert all(result.id is None or result.id.isprintable() for result in batch.refused)


def test_in_a_list_of_params_every_json_value_is_a_row():
    values = [b'{"instance_id":"x","other":1}', b"[1,2]", b"3", b'"text"', b"null", b"true", b" {} \r"]

    batch = pack(*values, shape="params")

    assert (len(batch.ids), batch.refused, batch.bare) == (len(values), (), False)
    assert pack(b"1 2", b"NaN", b"{", shape="params").ids == []


def test_a_row_that_the_source_refused_keeps_the_sources_reason():
    packer = new_packer()
    packer.add(
        Slice(
            5,
            3,
            b'{"instance_id":"a"}\n\n{"instance_id":"b"}\n',
            ((1, "not_json", "the row can't be written as JSON"),),
        )
    )

    batch = packer.pack()

    assert (batch.ids, batch.offsets, refusals(batch)) == (["a", "b"], [0, 2], [(6, "not_json")])
    assert batch.refused[0].message == "the row can't be written as JSON"


def test_the_message_of_an_overlong_line_names_its_length():
    assert too_long(1_234_567).code == "row_too_long"
    assert "1,234,567" in too_long(1_234_567).message


# --- blank rows and row numbers -----------------------------------------------------------------------------------


def test_blank_lines_keep_their_row_number_and_are_neither_sent_nor_refused():
    batch = pack(b"", row(instance_id="a"), b"  \t", b"\r", b"nope", row(instance_id="b"), b"", first_row=1_000)

    assert (batch.first_row, batch.rows) == (1_000, 7)
    assert (batch.ids, batch.offsets, refusals(batch)) == (["a", "b"], [1, 5], [(1_004, "not_json")])


def test_rows_are_numbered_across_several_slices():
    packer = new_packer()
    packer.add(Slice(10, 2, b"\n\n"))
    packer.add(Slice(12, 2, b'{"instance_id":"a"}\n{"instance_id":"b"}\n'))
    packer.add(Slice(14, 3, b'{}\n\n{"instance_id":"a"}\n'))

    batch = packer.pack()

    assert (batch.first_row, batch.rows, batch.offsets) == (10, 7, [2, 3, 4])
    assert refusals(batch) == [(16, "duplicate_id")]
    assert batch.region == b'\n\n{"instance_id":"a"}\n{"instance_id":"b"}\n{}\n\n{"instance_id":"a"}\n'


def test_a_packer_counts_rows_bytes_and_instances():
    packer = new_packer()
    packer.add(Slice(0, 3, b"{}\n\nbad\n"))
    packer.add(Slice(3, 1, b"{}\n"))

    assert (packer.rows, packer.size, packer.instances) == (4, 11, 2)


# --- duplicates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [True, False])
def test_a_duplicate_id_in_a_batch_is_refused_and_the_first_row_is_named(bare):
    others = [] if bare else [b"{}"]

    batch = pack(row(instance_id="b"), row(instance_id="a"), row(instance_id="a", params=1), *others, first_row=40)

    assert refusals(batch) == [(42, "duplicate_id")]
    assert "row 41" in batch.refused[0].message
    assert batch.ids[:2] == ["b", "a"]


def test_a_duplicate_is_found_across_slices_read_in_either_way():
    packer = new_packer()
    packer.add(Slice(0, 2, b'{"instance_id":"a"}\n{"instance_id":"b"}\n'))
    packer.add(Slice(2, 1, b'{"instance_id":"b"}\n'))

    assert refusals(packer.pack()) == [(2, "duplicate_id")]


def test_the_last_of_duplicate_keys_counts_as_for_the_service():
    batch = pack(b'{"instance_id":"a","instance_id":"b"}')

    assert batch.ids == ["b"]
    assert json.loads(compose(batch, [0])) == [{"instance_id": "b"}]


# --- ids ----------------------------------------------------------------------------------------------------------


@given(
    run_key=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", fullmatch=True),
    number=st.integers(0, 2**63 - 1),
    value=st.text(max_size=20),
)
def test_a_generated_id_is_valid_and_the_same_every_time(run_key, number, value):
    line = row(params=value)

    made = pack(line, first_row=number, scheme=IdScheme(run_key)).ids[0]

    assert ID.fullmatch(made)
    assert made == f"{run_key}-{number}-{crc32(line):08x}"
    assert made == pack(line, first_row=number, scheme=IdScheme(run_key)).ids[0]


def test_the_longest_run_key_leaves_room_for_the_largest_row_number():
    made = pack(row(), first_row=2**63 - 1, scheme=IdScheme("k" * 64)).ids[0]

    assert len(made) <= 100
    assert ID.fullmatch(made)


SCHEMES = [IdScheme("run"), IdScheme("run", "order-{n}")]
BEGUN = b"".join(
    [
        row(instance_id="mine", params={"n": 1}) + b"\n",
        b"\n",
        row(params={"n": 2}) + b"\r\n",
        b"nonsense\n",
        row(instance_id="mine", params={"n": 3}) + b"\n",
        row(params={"n": 4}) + b"\n",
    ]
)


def begun_again(scheme, data=BEGUN, **changes):
    """A batch of an earlier session, with changes, and the offsets of its refused rows."""
    packer = new_packer(scheme=scheme)
    packer.add(Slice(40, 6, BEGUN))
    batch = packer.pack()
    refused = frozenset(result.row - batch.first_row for result in batch.refused)
    assert refused == {3, 4}
    return replace(batch, region=data, **changes), refused


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_that_are_read_again_get_the_stored_ids(scheme):
    for data in (BEGUN, BEGUN.replace(b"nonsense", row(params={"n": 5}))):  # a refused row may have been corrected
        batch, refused = begun_again(scheme, data=data)
        assert has_its_ids(batch, scheme, refused)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_wrong_or_missing_stored_id_is_found(scheme):
    batch, refused = begun_again(scheme)
    for position in range(len(batch.ids)):
        others = [*batch.ids[:position], *batch.ids[position + 1 :]]
        offsets = [*batch.offsets[:position], *batch.offsets[position + 1 :]]
        changed = [*batch.ids[:position], "another", *batch.ids[position + 1 :]]
        assert not has_its_ids(replace(batch, ids=changed), scheme, refused)
        assert not has_its_ids(replace(batch, ids=others, offsets=offsets), scheme, refused)
    assert not has_its_ids(replace(batch, offsets=[1, *batch.offsets[1:]]), scheme, refused)
    assert not has_its_ids(batch, scheme, frozenset())  # the refused row is not in the set
    assert not has_its_ids(replace(batch, first_row=41), SCHEMES[0], refused) or scheme.template


def test_generated_ids_differ_by_run_by_row_and_by_content():
    line, other = row(params=1), row(params=2)

    made = [
        pack(line, scheme=IdScheme("a")).ids[0],
        pack(line, scheme=IdScheme("b")).ids[0],
        pack(line, scheme=IdScheme("a"), first_row=1).ids[0],
        pack(other, scheme=IdScheme("a")).ids[0],
    ]

    assert len(set(made)) == 4


def test_a_generated_id_does_not_depend_on_the_rest_of_the_batch():
    alone = pack(row(params=1), first_row=3).ids[0]

    assert pack(row(params=0), b"bad", b"", row(params=1), row(instance_id="x")).ids[1] == alone


def test_the_rows_own_id_is_never_replaced():
    assert pack(row(instance_id="mine", params={"n": 1}), scheme=IdScheme("r", "order-{n}")).ids == ["mine"]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (b'{"n":7}', "order-7"),
        (b'{"n":"x_1"}', "order-x_1"),
        (b'{"n":123456789012345678901234567890}', "order-123456789012345678901234567890"),
        (b'{"n":-7}', "order--7"),
        (b'{"n":"\\u0061"}', "order-a"),
        (b'{ "n" : 7 }', "order-7"),
        (b'{"m":1}', None),
        (b'{"n":7.0}', None),
        (b'{"n":7e2}', None),
        (b'{"n":true}', None),
        (b'{"n":null}', None),
        (b'{"n":[7]}', None),
        (b'{"n":"a b"}', None),
        (b'{"n":"\xc3\xa9"}', None),
        (b'{"n":"' + b"x" * 95 + b'"}', None),
        (b"[7]", None),
        (b"7", None),
        (b'"n"', None),
    ],
)
def test_a_template_uses_strings_and_integers_of_the_params_or_refuses_the_row(params, expected):
    for shape, line in (("instance", b'{"params":' + params + b"}"), ("params", params)):
        batch = pack(line, scheme=IdScheme("r", "order-{n}"), shape=shape)

        assert batch.ids == ([expected] if expected else [])
        assert refusals(batch) == ([] if expected else [(0, "bad_id")])


def test_a_template_refuses_a_row_without_params_and_names_the_missing_field():
    batch = pack(b"{}", scheme=IdScheme("r", "o-{order_id}"))

    assert refusals(batch) == [(0, "bad_id")]
    assert "'order_id'" in batch.refused[0].message


def test_a_template_may_use_several_fields_and_one_twice():
    scheme = IdScheme("r", "{a}-{b}-{a}")

    assert pack(b'{"params":{"a":1,"b":"x"}}', scheme=scheme).ids == ["1-x-1"]


def test_a_template_that_makes_a_reserved_id_refuses_the_row():
    assert refusals(pack(b'{"params":{"a":"batch"}}', scheme=IdScheme("r", "{a}"))) == [(0, "reserved_id")]


def test_a_template_that_gives_two_rows_one_id_refuses_the_later():
    batch = pack(b'{"params":{"a":1}}', b'{"params":{"a":1}}', scheme=IdScheme("r", "x{a}"))

    assert (batch.ids, refusals(batch)) == (["x1"], [(1, "duplicate_id")])


@pytest.mark.parametrize(
    "template",
    [
        "",
        "order",
        "{}",
        "{0}",
        "{a.b}",
        "{a[0]}",
        "{a!r}",
        "{a:>5}",
        "{a",
        "a}",
        "{a:{b}}",
        "{{a}}",
        "-{a} b",
        "é{a}",
        "{a}\udcff",
    ],
)
def test_a_template_without_plain_named_fields_is_refused(template):
    with pytest.raises(ConfigError, match="id template"):
        IdScheme("r", template)


# --- retention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retention", "expected_s"),
    [
        ({}, DEFAULT_RETENTION_S),
        ({"success_retention": 60_000}, 60),
        ({"error_retention": 500}, 0.5),
        ({"success_retention": "1 second"}, 1),
        ({"success_retention": "2 seconds"}, 2),
        ({"success_retention": "5 minutes"}, 300),
        ({"success_retention": "1 hour"}, 3_600),
        ({"success_retention": "1  day"}, 86_400),
        ({"success_retention": "3 hours", "error_retention": "2 hours"}, 7_200),
        ({"success_retention": "1 week"}, DEFAULT_RETENTION_S),
        ({"success_retention": "30 days", "error_retention": "1 year"}, DEFAULT_RETENTION_S),
        ({"success_retention": "1 month", "error_retention": "1 day"}, 86_400),
        ({"success_retention": 10**400}, DEFAULT_RETENTION_S),
    ],
)
@pytest.mark.parametrize("given_id", [{"instance_id": "a"}, {}])
def test_a_batch_has_the_shortest_retention_of_its_rows(retention, expected_s, given_id):
    other = row(params=1, **({"instance_id": "other"} if given_id else {}))

    batch = pack(other, row(instance_retention=retention, **given_id))

    assert (batch.retention_s, batch.refused) == (expected_s, ())
