"""Generates bad input: valid input with damage, and arbitrary shapes.

Damage takes a seeded random generator as an argument; Hypothesis draws the seed, and prints what it generates.
"""

import asyncio
import json
import math
from functools import cache
from pathlib import Path
from random import Random

from canary import PARAMS
from fakes import RUN_TARGET, Leave, ServiceTransport, make_batch, run_virtual, service, write_run
from hypothesis import strategies as st

from bulkwf.batching.body import compose
from bulkwf.service.requests import create_batch, get_instance, list_instances

IDS = [f"id-{number}" for number in range(6)]
"""The ids that `real_answers` are about."""

ODD = [
    *(b"\0", b"\r", b"\n", b"\r\n", b"\n\n", b"\t", b"\x0c", b" ", b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80", b"\xc3"),
    *(text.encode() for text in ("\u2028", "\u202e", "\x1b[2J", "\x9b", "\u0663", "\U0001f600")),
    *(rb'"\ud800"', rb'"\ude00\ud83d"', rb'"\u0000"', rb"\u12", b"\\", b'"', b"'", b"{", b"}", b"[", b"]", b",", b":"),
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-0",
        b"01",
        b"1.",
        b"9" * 400,
        b"null",
        b"true",
        b'""',
        b"{}",
        b"{}{}",
        b"}\n{",
    ),
    *(b"[" * 600, b"[" * 600 + b"]" * 600, b'{"a":' * 501 + b"0" + b"}" * 501, b"x" * 2_000, b" " * 2_000),
    *(b'"instance_id":null,', b'"instance_id":"a",', b'"instance_id":"batch",', b'"params":', b'"params":0,', b'"id":'),
    *(
        b'"instance_retention":{"error_retention":-1},',
        b'"location_hint":7,',
        b'"success":true,',
        b'"result":',
        b'"x":1,',
    ),
]
"""Bytes that damage inserts."""


def damaged(data: bytes, chance: Random) -> bytes:
    """*data* with up to four parts flipped, removed, doubled, moved, or overwritten."""
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        size = len(data)
        start = chance.randrange(size + 1)
        end = min(size, start + chance.choice([0, 1, 1, 2, 8, 40, size]))
        match chance.randrange(7):
            case 0 if start < size:
                flipped = data[start] ^ 1 << chance.randrange(8)
                data = data[:start] + bytes([flipped]) + data[start + 1 :]
            case 1:
                data = data[:start]
            case 2:
                data = data[:start] + data[end:]
            case 3:
                data = data[:end] + data[start:]
            case 4:
                to = chance.randrange(size + 1)
                rest = data[:start] + data[end:]
                data = rest[:to] + data[start:end] + rest[to:]
            case 5:
                data = data[:start] + chance.choice(ODD) + data[end:]
            case _:
                data = data[:start] + chance.choice(ODD) + data[start:]
    return data


CHANCES = st.integers(0, 2**32 - 1).map(Random)


def damages(good: st.SearchStrategy[bytes] | list[bytes]) -> st.SearchStrategy[bytes]:
    """Inputs like *good* ones, damaged."""
    originals = st.sampled_from(good) if isinstance(good, list) else good
    return st.builds(damaged, originals, CHANCES)


# --- rows ---------------------------------------------------------------------------------------------------------

ROWS = [
    b"{}",
    b' { "params" : [ 1 , 2.50E+1 , -0 ] } \r',
    b'{"instance_id":"order-17","params":{"order_id":17,"to":"a\\u00e9\\ud83d\\ude00\\n"}}',
    b'{"instance_id":"order-18","params":{"order_id":18}}',
    b'{"params":{"order_id":"18"},"instance_id":"order-17"}',
    b'{"params":null,"location_hint":"weur"}',
    b'{"params":{"a":[[{"b":[]}]],"a":2},"instance_retention":{"success_retention":"7 days","error_retention":36000}}',
    b'{"instance_id":"_","instance_retention":{}}',
    b'{"params":123456789012345678901234567890}',
    b'{"instance_id":"a","instance_id":"b","params":1,"params":2}',
    '{"params":"\u2028\u2029\x7f\ufeff"}'.encode(),
    b'{"params":' + b"[" * 499 + b"]" * 499 + b"}",
    b'{"params":"' + b"x" * 500 + b'"}',
    b'{"instance_id":"batch"}',
    b'{"instance_id":"cf_' + b"0" * 64 + b'"}',
    b"[1]",
    b'"text"',
    b"0",
    b"",
    b" ",
]
"""Lines of lists: valid, invalid and blank."""
SECRET = f'{{"to":["{PARAMS}"],"{PARAMS}":"{PARAMS}"}}'.encode()
"""Params that no message may contain."""


def row_lines() -> st.SearchStrategy[bytes]:
    """A line, or several where the damage inserts a line break."""
    return st.sampled_from(ROWS) | damages(ROWS) | st.binary(max_size=30)


# --- answers ------------------------------------------------------------------------------------------------------

_FAULTS = [
    {"request": 2, "status": 400},
    {"request": 3, "status": 429, "retry_after": 30},
    {"request": 4, "status": 503, "html": True},
    {"request": 5, "status": 409, "code": 10405, "message": "instance.already_exists"},
    {"request": 6, "omit": 3},
    {"request": 7, "foreign": 1},
    {"request": 8, "refuse_ids": "id-2"},
]


@cache
def real_answers() -> list[bytes]:
    """The bodies of the emulator's answers to batches, to look-ups, and to a request for the list."""

    async def ask():
        transport = ServiceTransport(service(), script=_FAULTS)
        body = bytes(compose(make_batch(len(IDS)), range(len(IDS))))
        posts = [await transport.send(create_batch(RUN_TARGET, body), Leave()) for _ in range(9)]
        gets = [await transport.send(get_instance(RUN_TARGET, one), Leave()) for one in (IDS[0], "no-such-id")]
        page = await transport.send(list_instances(RUN_TARGET, {}), Leave())
        return [one.body for one in (*posts, *gets, page)]

    return [*run_virtual(ask()), b"", b"<title>Just a moment</title>"]


def likely_answer(chance: Random) -> bytes:
    """A valid answer to a batch, or nearly."""
    instances = [{"id": one, "status": "queued", "version_id": "v", "workflow_id": "w"} for one in IDS]
    success = chance.randrange(6) > 0
    for _ in range(chance.choice([0, 0, 1, 2])):
        chance.choice(instances)[chance.choice(["id", "status", "version_id"])] = chance.choice(
            [IDS[0], "other", None, 7]
        )
    if not chance.randrange(3):
        chance.shuffle(instances)
    left = len(instances) if chance.randrange(2) else chance.randrange(len(instances))
    if chance.randrange(2):
        return json.dumps({"success": success, "errors": [], "result": instances[:left]}).encode()
    codes = [10405, 10405, 10002, 10002, 10001, 10429, None, "10405", 2**63]
    errors = [{"id": one["id"], "code": chance.choice(codes), "message": "\x1b[1mno"} for one in instances[left:]]
    for error in errors:
        if not chance.randrange(4):
            error["index"] = chance.randrange(-1, 7)
            del error["id"]
    return json.dumps(
        {"success": success, "errors": [], "result": {"created": instances[:left], "errors": errors}}
    ).encode()


_KEYS = ["success", "result", "errors", "created", "id", "index", "code", "message", "error_chain", "status"]
_KEYS += ["version_id", "workflow_id", "result_info", "cursor", "messages", "other"]
_SCALARS = st.one_of(
    st.sampled_from([*IDS, "other", "", "queued", "\x1b[31m", "\u202e", "A" * 2_000]),
    st.sampled_from([None, True, False, 0, -1, 3, 10001, 10405, 10429, 971, 10000, 10200, 10400, 2**63, 10**400]),
    st.sampled_from([1.0, 0.5, 1e300, math.inf, math.nan]),
    st.text(max_size=4),
)
SHAPES = st.recursive(
    _SCALARS,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.sampled_from(_KEYS), values, max_size=5),
    max_leaves=12,
)
"""JSON values with the keys of the API in wrong places; also values that only Python accepts as JSON."""


def answer_bodies() -> st.SearchStrategy[bytes]:
    """The bodies of answers: nearly valid, damaged, and of any shape."""
    likely = st.builds(likely_answer, CHANCES)
    enveloped = st.fixed_dictionaries({"success": st.booleans()}, optional={"result": SHAPES, "errors": SHAPES})
    shaped = (enveloped | SHAPES).map(lambda value: json.dumps(value).encode())
    return likely | damages(likely) | shaped | damages(real_answers()) | st.binary(max_size=40)


# --- headers ------------------------------------------------------------------------------------------------------

_DATE = b"Tue, 01 Sep 2026 12:00:00 GMT"
HEADERS = {
    "retry-after": [
        b"30",
        b"0",
        b" 300 ",
        b"999999999",
        _DATE,
        b"Tue, 01 Sep 2026 12:01:30 GMT",
        b"Tue, 01 Sep 2026 11:00:00 GMT",
    ],
    "ratelimit": [b'"default";r=50;t=30', b'"a";r=9;t=1, "default";r=0;t=120', b'"default"; r=1; t=300', b"r=0;t=0"],
    "ratelimit-policy": [b'"default";q=1200;w=300'],
    "date": [_DATE],
    "cf-ray": [b"8a1b2c3d4e5f6789-FRA"],
    "cf-mitigated": [b"challenge"],
    "location": [b"https://elsewhere.example/"],
}
"""Valid values of these headers."""
_ODD_HEADERS = [
    "",
    "inf",
    "nan",
    "1e9",
    "-5",
    "+5",
    "1_0",
    "0x10",
    "30, 30",
    '"30"',
    "\u0663\u0660",
    "\uff13",
    "9" * 5_000,
]
_ODD_HEADERS += ["r=0;t=" + "9" * 400, "r=\u0663;t=\u0660", "r=0;t=999999999", "r=-1;t=-1", "r=1;t=0", "r=0;t=1e9;r=5"]
_ODD_HEADERS += [
    "GMT",
    "Mon, 32 Foo 2026 99:99:99 GMT",
    "Tue, 01 Sep 0000 00:00:00 GMT",
    "Fri, 31 Dec 9999 23:59:59 GMT",
]


def header_text(name: str) -> st.SearchStrategy[str]:
    """Values of the header *name*."""
    return st.one_of(
        st.sampled_from(HEADERS[name]).map(bytes.decode),
        damages(HEADERS[name]).map(lambda data: data.decode("utf-8", "surrogateescape")),  # as aiohttp decodes it
        st.sampled_from(_ODD_HEADERS),
        st.text(max_size=20),
        st.text("0123456789 :,;=rtGMTSepMon-+.", max_size=40),
    )


def all_headers() -> st.SearchStrategy[dict[str, str]]:
    """Some headers of an answer."""
    return st.fixed_dictionaries({}, optional={name: header_text(name) for name in HEADERS})


# --- checkpoints --------------------------------------------------------------------------------------------------


def write_checkpoint(path: Path) -> None:
    """A checkpoint with rows of every outcome, and one batch that is in doubt."""
    others = {3: "existed", 105: "rejected", 150: "existed"}
    data = b'{"params":NaN}\n' + b'{"params":"x"}\n' * 20
    for more in (
        {"rows": 600, "others": others, "finished": False},
        {"rows": 21, "data": data, "finished": False},
        {"rows": 5, "others": dict.fromkeys((622, 624), "pending"), "finished": False},
    ):
        asyncio.run(write_run(path, **more))


def damaged_file(data: bytes, chance: Random) -> bytes:
    """A damaged database file: by `damaged`, or with pages swapped, zeroed or doubled, or bits flipped."""
    size = 4_096
    pages = [data[at : at + size] for at in range(0, len(data), size)]
    one, other = chance.randrange(len(pages)), chance.randrange(len(pages))
    match chance.randrange(6):
        case 0:
            pages[one], pages[other] = pages[other], pages[one]
        case 1:
            pages[one] = b"\0" * size
        case 2:
            pages[one] = pages[other]
        case 3:
            pages = pages[:one]
        case 4:
            changed = bytearray(data)
            for _ in range(chance.choice([1, 1, 10, 300])):
                changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            return bytes(changed)
        case _:
            return damaged(data, chance)
    return b"".join(pages)
