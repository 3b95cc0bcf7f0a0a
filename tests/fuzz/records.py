"""Checkpoints whose records were changed but still parse: what a run and a verification do with them.

A run must refuse the file, or go on as if nothing had been changed. It sends no row under another id, no other params,
and no request to another path.
"""

import contextlib
import json
import re
import sqlite3
import struct
from dataclasses import replace
from pathlib import Path
from random import Random
from unittest import mock
from urllib.parse import quote
from zlib import crc32

from fakes import (
    HEADER,
    RUN_TARGET,
    ScriptedTransport,
    clock,
    created,
    envelope,
    fault,
    found,
    reply,
    reseal,
    run_virtual,
)

from bulkwf.attempt import RequestKind
from bulkwf.checkpoint import inline, read_results
from bulkwf.errors import BulkwfError, CheckpointError, InputError, TemporaryStop
from bulkwf.limits.limiter import WindowLimiter
from bulkwf.options import BatchLimits, Options, RateLimits, RetryPolicy
from bulkwf.run import open_run
from bulkwf.verification import open_verification, opening

ROWS = 60
OPTIONS = Options(
    batch=BatchLimits(instances=10),
    rate=RateLimits(instances_per_s=None, requests_per_5m=None, concurrency=2),
    retry=RetryPolicy(max_outage_s=0.0),
)
PLANTED = ("../../user/tokens", "..", 'x","params":{"a":1},"b":"', "own-30", "key-1-00000000", "a?b#c")
"""Values in the place of an id or a name."""
_ID = re.compile("[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")


def _line(number: int) -> bytes:
    """Every third row has its own id, and one row is invalid."""
    if number == 7:
        return b'{"instance_id":"-"}'
    own = f'"instance_id":"own-{number}",' if number % 3 == 0 else ""
    return b'{%b"params":{"n":%d}}' % (own.encode(), number)


LINES = [_line(number) for number in range(ROWS)]
ITEMS = {
    json.loads(line).get("instance_id") or f"key-{number}-{crc32(line):08x}": json.loads(line)["params"]
    for number, line in enumerate(LINES)
    if number != 7
}
"""What may be sent: ids, and the params that go with them."""


class _Transport(ScriptedTransport):
    """Records the batches sent."""

    def __init__(self, *answers, **more):
        super().__init__(*answers, **more)
        self.items = []

    async def send(self, request, slot):
        if request.kind is RequestKind.CREATE:
            self.items += json.loads(request.body)
        return await super().send(request, slot)


async def _run(path: Path, transport: ScriptedTransport, **changes) -> None:
    options, at = replace(OPTIONS, **changes), clock()
    async with open_run(
        str(path.with_name("rows.jsonl")),
        target=RUN_TARGET,
        token=dict,
        checkpoint=path,
        options=options,
        transport=transport,
        limiter=WindowLimiter(options.rate, clock=at.now),
        clock=at,
        executor=inline,
    ) as run:
        await run.finish()


def write_cut_run(path: Path, *, in_doubt: bool) -> None:
    """The checkpoint of an interrupted run: settled batches, batches *in_doubt*, and rows not begun."""
    path.with_name("rows.jsonl").write_bytes(b"".join(line + b"\n" for line in LINES))
    transport = ScriptedTransport(created, created, created, then=fault())
    with contextlib.suppress(TemporaryStop):
        run_virtual(_run(path, transport, run_key=HEADER.run_key, first=None if in_doubt else 30))
    assert {result.outcome for result in read_results(path)} == {"created", "invalid"}
    assert any(read_results(path, outcome="pending")) == in_doubt


def stored_results(path: Path) -> list[tuple[int, str | None, str]]:
    """The results of the rows."""
    return [(result.row, result.id, result.outcome) for result in read_results(path)]


def change(path: Path, chance: Random, *, made_up: bool) -> str:
    """Change one stored value to another that parses; returns which. *made_up*: recompute the checksums."""
    table = chance.choice(("batch", "batch", "batch", "run"))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        names = [name for _, name, *_ in db.execute(f"PRAGMA table_info({table})")]
        name = chance.choice([*names, *["ids" if table == "batch" else "run_key"] * len(names)])  # what is sent
        rows = db.execute(f"SELECT rowid, {name} FROM {table} ORDER BY rowid").fetchall()
        rowid, value = chance.choice(rows)
        from_another = table == "batch" and chance.random() < 0.1
        changed = chance.choice(rows)[1] if from_another else _changed(value, chance)
        with contextlib.suppress(sqlite3.IntegrityError):  # a constraint of the table refuses it
            db.execute(f"UPDATE OR IGNORE {table} SET {name} = ? WHERE rowid = ?", (changed, rowid))
    if made_up:
        with contextlib.suppress(sqlite3.Error, struct.error):
            reseal(path)
    return f"{table}.{name} of {rowid}: {value!r} -> {changed!r}"


def _changed(value, chance: Random):
    if value is None:
        return chance.choice((1, 1.5, "{}", '{"0":{"outcome":"created"}}'))
    if chance.random() < 0.05:
        return None
    if isinstance(value, int):
        return value ^ (1 << chance.randrange(32))
    if isinstance(value, float):
        flipped = struct.unpack("<Q", struct.pack("<d", value))[0] ^ (1 << chance.randrange(64))
        return struct.unpack("<d", struct.pack("<Q", flipped))[0]
    if chance.random() < 0.3:
        path = chance.choice(
            ("../../user/tokens", "..", 'x","params":{"a":1},"b":"', "own-30", "key-1-00000000", "a?b#c")
        )
        return re.sub(r"own-\d+|key-\d+-\w+|^key$|acct|resize", path.replace("\\", ""), value, count=1)
    at = chance.randrange(len(value)) if value else 0
    flipped = chr(ord(value[at]) ^ (1 << chance.randrange(7))) if value else "x"
    return value[:at] + flipped + value[at + 1 :]


def check_run(path: Path, what: str, *, made_up: bool, expected: list[tuple[int, str | None, str]]) -> bool:
    """Resume the run; returns whether the file was refused."""
    transport = _Transport(then=created)
    refused = _is_refused(_run(path, transport), (CheckpointError, InputError))
    for item in transport.items:
        assert item["params"] in ITEMS.values(), what
        assert set(item) == {"instance_id", "params"}, what
        assert _ID.fullmatch(item["instance_id"]), what
        others = made_up and ("run.run_key" in what or "batch.rows" in what)  # then rows never begun get other ids
        assert others or ITEMS.get(item["instance_id"]) == item["params"], f"{what}: sent as {item}"
    if refused:
        assert made_up or not transport.items, f"{what}: refused after something was sent"
        return True
    try:
        results = stored_results(path)
    except CheckpointError:  # ids of a settled batch, which a run does not read
        return True
    assert made_up or results == expected, what
    return False


def _is_refused(session, errors) -> bool:
    try:
        run_virtual(session)
    except errors:
        return True
    return False


def check_verification(path: Path, what: str, *, made_up: bool) -> bool:
    """Verify the run; returns whether the file was refused."""
    nothing_listed = reply(200, envelope([]))
    transport = ScriptedTransport(then=lambda asked: found() if isinstance(asked, list) else nothing_listed)
    for beside in path.parent.glob(path.name + ".verify*"):
        beside.unlink()

    async def work() -> None:
        with (
            mock.patch.object(opening, "system_clock", clock),
            mock.patch.object(opening, "open_transport", return_value=transport),
        ):
            async with open_verification(
                path, account_id=None, base_url=HEADER.base_url, token=dict, options=OPTIONS, sample=None
            ) as opened:
                await opened.run()

    refused = _is_refused(work(), BulkwfError)
    for one in transport.gets:
        assert quote(one, safe="") == one, what
        assert _ID.fullmatch(one), what
        assert made_up or one in ITEMS, what
    assert refused or transport.gets, what
    return refused


__all__ = ["change", "check_run", "check_verification", "stored_results", "write_cut_run"]
