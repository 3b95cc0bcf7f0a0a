"""The checkpoint: what it holds, who may open it, and how it fails."""

import asyncio
import contextlib
import errno
import os
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from fakes import HEADER, lines, make_batch, reseal
from hypothesis import given, settings
from hypothesis import strategies as st

import bulkwf
from bulkwf.attempt import InstanceInfo, Judgement, Verdict
from bulkwf.batching.batch_state import BatchState
from bulkwf.checkpoint import (
    Attempt,
    Begun,
    Checkpoint,
    errors,
    file,
    inline,
    read_boot,
    read_results,
    read_run_past,
    read_status,
)
from bulkwf.checkpoint import lock as lock_file
from bulkwf.checkpoint.attempts import LAST_WORDS
from bulkwf.checkpoint.records import read_batch, read_batches
from bulkwf.checkpoint.schema import FORMAT, IDENTITY
from bulkwf.clock import Boot
from bulkwf.errors import CheckpointError
from bulkwf.limits.quota import Said
from bulkwf.model import Counts, Result

NOW = 1_760_000_000.0
ANSWER = InstanceInfo("queued", "v1", "w1")


@pytest.fixture
def path(folder):
    return folder / "run.bulkwf"


def start(path, executor=inline, header=HEADER, now=NOW, **more):
    return Checkpoint.open(path, header, now=now, executor=executor, **more)


@contextlib.asynccontextmanager
async def opened(path, executor=inline, header=HEADER, **more):
    checkpoint = start(path, executor, header, **more)
    try:
        yield checkpoint
    finally:
        await checkpoint.aclose()


def created(state, positions=None, answer=ANSWER):
    """Settle these instances, or all that are pending, as created."""
    state.attempts += 1
    state.add(
        Judgement(
            verdict=Verdict.DONE,
            created=sorted(state.pending) if positions is None else positions,
            answer=answer,
        )
    )


def note(checkpoint, noted):
    """Record an attempt that has settled nothing."""
    return checkpoint.record(noted, settled=None, pause_until=None, now=NOW)


def attempt(instances=100, at=NOW, elapsed_s=0.5, verdict="done"):
    return Attempt(
        first_row=0,
        started_at=at,
        elapsed_s=elapsed_s,
        instances=instances,
        http_status=200,
        verdict=verdict,
        detail=None,
    )


async def fill(path, batches=3, rows=10, **more):
    """A checkpoint with this number of settled batches."""
    async with opened(path, **more) as checkpoint:
        for number in range(batches):
            state = BatchState(make_batch(rows, first_row=number * rows))
            await checkpoint.begin(state, NOW)
            created(state)
            await checkpoint.settle(state, NOW + 1)
        await checkpoint.finish(NOW + 2)


def query(path, sql):
    with contextlib.closing(sqlite3.connect(path)) as db:
        found = db.execute(sql).fetchall()
        db.commit()
        return found


def every_result(path):
    return sorted([*read_results(path), *read_results(path, outcome="pending")], key=lambda result: result.row)


def child(code, *args, **more):
    """Run Python code in another process."""
    root = str(Path(bulkwf.__file__).parent.parent)
    paths = os.pathsep.join([root, str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False, **more)


# --- what it holds ------------------------------------------------------------------------------------------------


async def test_rows_are_pending_once_begun_and_have_results_once_settled(path):
    async with opened(path) as checkpoint:
        state = BatchState(make_batch(4))
        await checkpoint.begin(state, NOW)
        assert [result.outcome for result in every_result(path)] == ["pending"] * 4
        assert read_status(path).counts.pending == 4
        created(state, [0, 2])
        await checkpoint.settle(state, NOW + 1)
        assert [result.outcome for result in every_result(path)] == ["created", "pending", "created", "pending"]
        assert read_status(path).batches_in_doubt == 1
        created(state)
        await checkpoint.settle(state, NOW + 2)
        assert read_status(path).batches_in_doubt == 0
        await checkpoint.finish(NOW + 3)

    results = list(read_results(path))
    assert results == [
        Result(row=i, id=f"id-{i}", outcome="created", status="queued", attempts=2, version_id="v1", workflow_id="w1")
        for i in range(4)
    ]
    status = read_status(path)
    assert (status.finished_at, status.counts.created, status.rows, status.header) == (NOW + 3, 4, 4, HEADER)


async def test_begun_batches_survive_a_kill(path):
    checkpoint = start(path)
    await checkpoint.begin(BatchState(make_batch(4)), NOW)
    copy = path.with_name("copy.bulkwf")
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")

    assert len(list(read_results(copy, outcome="pending"))) == 4
    await checkpoint.aclose()


FATES = ["blank", "invalid", "created", "created otherwise", "existed", "existed in doubt", "rejected", "pending"]


def result_of(fate, row, attempts):
    known = {"row": row, "id": f"id-{row}", "attempts": attempts}
    nasty = "no: é \u2028 '\"$.[0] \\u0041"
    return {
        "invalid": Result(**{**known, "id": None, "attempts": 0}, outcome="invalid", code="not_json", message=nasty),
        "created": Result(**known, outcome="created", status="queued", version_id="v1", workflow_id="w1"),
        "created otherwise": Result(**known, outcome="created", status="running", workflow_id="w2"),
        "existed": Result(**known, outcome="existed", status="complete"),
        "existed in doubt": Result(**known, outcome="existed", in_doubt=True),
        "rejected": Result(**known, outcome="rejected", code=10002, message=nasty),
        "pending": Result(**known, outcome="pending"),
    }[fate]


def settle_by(state, fates, steps):
    """Settle the rows of a batch as *fates* says, in this number of judgements."""
    positions = {offset: position for position, offset in enumerate(state.batch.offsets)}
    todo = [(positions[row], fate) for row, fate in enumerate(fates) if fate not in ("blank", "invalid", "pending")]
    state.in_doubt = {positions[row] for row, fate in enumerate(fates) if fate == "existed in doubt"}
    for step in range(steps):
        part = todo[step::steps]
        state.attempts += 1
        alike = [position for position, fate in part if fate == "created"]
        others = tuple(
            (
                position,
                replace(result_of(fate, state.batch.first_row + state.batch.offsets[position], 0), in_doubt=False),
            )
            for position, fate in part
            if fate != "created"
        )
        state.add(Judgement(verdict=Verdict.DONE, created=alike, answer=ANSWER if alike else None, others=others))


def state_of(fates, first_row):
    rows = {"blank": b"\n", "invalid": b"nonsense\n"}
    data = b"".join(rows.get(fate) or lines(1, first_row + i) for i, fate in enumerate(fates))
    state = BatchState(make_batch(len(fates), first_row=first_row, data=data))
    flaw = result_of("invalid", 0, 0)
    refused = tuple(replace(one, code=flaw.code, message=flaw.message) for one in state.batch.refused)
    return BatchState(replace(state.batch, refused=refused))


def parsed(state):
    """A state's record, without the order of its exceptions."""
    record = state.record()
    return record._replace(exceptions=orjson.loads(record.exceptions or "null"))


@settings(max_examples=50)
@given(st.lists(st.lists(st.sampled_from(FATES), min_size=1, max_size=12), min_size=1, max_size=4), st.integers(1, 3))
def test_the_sql_view_the_reader_and_a_resumed_batch_state_agree(batches, steps):
    async def run(path):
        expected = []
        async with opened(path) as checkpoint:
            states = []
            for fates in batches:
                state = state_of(fates, first_row=sum(map(len, batches[: len(states)])))
                states.append(state)
                await checkpoint.begin(state, NOW)
                settle_by(state, fates, steps)
                await checkpoint.settle(state, NOW)
                expected += [
                    result_of(fate, state.batch.first_row + i, steps) for i, fate in enumerate(fates) if fate != "blank"
                ]
            for begun, state in zip(checkpoint.begun(), states, strict=True):
                again = checkpoint.batch_state(begun, state.batch.region, "instance")
                assert parsed(again) == parsed(state)
                assert again.in_doubt == again.pending == state.pending
                assert begun.settled == (not state.pending)
                assert (begun.size, begun.digest) == again.fingerprint()
        assert every_result(path) == expected
        columns = "row, id, outcome, status, version_id, workflow_id, code, message"
        listed = query(path, f"SELECT {columns} FROM result ORDER BY row")
        assert listed == [tuple(getattr(result, name) for name in columns.split(", ")) for result in expected]
        totals = read_status(path).counts
        for outcome in ("created", "existed", "rejected", "invalid", "pending"):
            alike = [result for result in expected if result.outcome == outcome]
            assert list(read_results(path, outcome=outcome)) == alike
            assert getattr(totals, outcome) == len(alike)
        assert totals.existed_in_doubt == sum(result.in_doubt for result in expected)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder) / "run.bulkwf"))


async def test_batches_on_several_pages_are_read_in_order(path, monkeypatch):
    monkeypatch.setattr("bulkwf.checkpoint.reading.RESULT_PAGE_BATCHES", 3)
    await fill(path, batches=10, rows=5)
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert [begun.first_row for begun in read_batches(db, page=3)] == list(range(0, 50, 5))

    assert [result.row for result in read_results(path)] == list(range(50))
    assert list(read_results(path, outcome="rejected")) == []


def test_an_unknown_outcome_is_refused_before_reading(path):
    with pytest.raises(ValueError, match="created, existed, rejected, invalid, pending"):
        read_results(path, outcome="failed")


async def test_neither_params_nor_credentials_are_in_the_file(path):
    canary = "canary-7f3a"
    data = orjson.dumps({"instance_id": "id-0", "params": {"secret": canary}}) + b"\n"
    checkpoint = start(path)
    state = BatchState(make_batch(2, data=data + canary.encode() + b"\n"))
    await checkpoint.begin(state, NOW)
    note(checkpoint, attempt())
    created(state)
    await checkpoint.settle(state, NOW)
    files = [one.read_bytes() for one in path.parent.iterdir()]
    await checkpoint.aclose()

    assert any(b"id-0" in one for one in files)
    assert not any(canary.encode() in one for one in [*files, path.read_bytes()])


# --- commits ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def thread():
    """An executor with a thread of its own; `commits` counts."""
    commits = []
    with ThreadPoolExecutor(1) as pool:

        async def execute(function):
            commits.append(function)
            await asyncio.get_running_loop().run_in_executor(pool, function)

        yield execute, commits


@pytest.mark.parametrize("threaded", [False, True])
async def test_writes_during_a_commit_share_the_next_one(path, threaded):
    with thread() as (execute, commits):

        async def at_once(function):
            commits.append(function)
            await asyncio.sleep(0)
            function()

        async with opened(path, execute if threaded else at_once) as checkpoint:
            states = [BatchState(make_batch(10, first_row=10 * i)) for i in range(100)]
            await asyncio.gather(*(checkpoint.begin(state, NOW) for state in states))
            assert len(commits) == 1
            commits.clear()

            async def settle(state):
                created(state)
                await checkpoint.settle(state, NOW)

            await asyncio.gather(*(settle(state) for state in states))
            assert len(commits) <= 2
            assert read_status(path).counts.created == 1_000


async def test_a_single_write_is_committed_without_delay(path):
    async with opened(path) as checkpoint:
        for number in range(5):
            async with asyncio.timeout(5):
                await checkpoint.begin(BatchState(make_batch(1, first_row=number)), NOW)


async def test_attempts_are_written_with_the_next_commit_or_flush(path):
    async with opened(path) as checkpoint:
        note(checkpoint, attempt())
        assert read_status(path).attempts == 0
        await checkpoint.begin(BatchState(make_batch(1)), NOW)
        assert read_status(path).attempts == 1
        note(checkpoint, attempt())
        await checkpoint.flush()
        assert read_status(path).attempts == 2


async def test_a_cancelled_waiter_does_not_cancel_the_commit(path):
    with thread() as (execute, _):
        async with opened(path, execute) as checkpoint:
            first = asyncio.ensure_future(checkpoint.begin(BatchState(make_batch(1)), NOW))
            second = asyncio.ensure_future(checkpoint.begin(BatchState(make_batch(1, first_row=1)), NOW))
            await asyncio.sleep(0)
            first.cancel()
            await second
            assert len(list(checkpoint.begun())) == 2


async def test_a_checkpoint_in_memory_works_without_a_file(folder, caplog):
    async with opened(None) as checkpoint:
        state = BatchState(make_batch(3))
        await checkpoint.begin(state, NOW)
        created(state)
        await checkpoint.settle(state, NOW)
        assert [begun.created for begun in checkpoint.begun()] == [3]
        assert (checkpoint.counts(), checkpoint.run_key, checkpoint.path) == (Counts(), "key", None)
    assert list(folder.iterdir()) == []
    assert not caplog.records


# --- the file -----------------------------------------------------------------------------------------------------


async def test_a_clean_end_leaves_one_private_file(path):
    old = os.umask(0)
    try:
        async with opened(path) as checkpoint:
            await checkpoint.begin(BatchState(make_batch(5)), NOW)
            modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()}
    finally:
        os.umask(old)

    assert set(modes) == {path.name, f"{path.name}-wal", f"{path.name}-shm", f"{path.name}.lock"}
    assert set(modes.values()) == {0o600}
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert len(list(read_results(path, outcome="pending"))) == 5


async def test_a_file_that_every_user_may_write_is_refused(path):
    await fill(path)
    path.chmod(0o666)

    with pytest.raises(CheckpointError, match="chmod 600"):
        start(path)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


async def test_readers_read_while_the_writer_writes(path):
    async with opened(path) as checkpoint:
        await checkpoint.begin(BatchState(make_batch(5)), NOW)
        pending = read_results(path, outcome="pending")
        first = next(pending)
        for number in range(1, 20):
            state = BatchState(make_batch(5, first_row=5 * number))
            await checkpoint.begin(state, NOW)
            created(state)
            await checkpoint.settle(state, NOW)
        assert (first.row, [result.row for result in pending]) == (0, [1, 2, 3, 4])
        assert len(list(read_results(path))) == 95
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_reading_a_missing_checkpoint_is_an_error_and_makes_no_file(path):
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        list(read_results(path))
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        read_status(path)
    assert not path.exists()


def test_a_missing_folder_is_named(folder):
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        start(folder / "nowhere" / "run.bulkwf")


# --- another run or file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IDENTITY)
async def test_a_checkpoint_of_another_run_is_refused_naming_what_differs(path, name):
    await fill(path)
    other = replace(HEADER, **{name: "another"})

    with pytest.raises(CheckpointError) as raised:
        start(path, header=other, any_run_key=False)
    assert f"its {name.replace('_', ' ')} is {getattr(HEADER, name)!r}, this run's is 'another'" in str(raised.value)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


async def test_an_old_checkpoint_keeps_its_run_key_if_the_run_gives_none(path):
    await fill(path)
    async with opened(path, header=replace(HEADER, run_key="fresh", limits="other")) as checkpoint:
        assert checkpoint.run_key == "key"
    assert read_status(path).header.limits == "other"


async def test_another_list_is_stored_with_the_first_new_batch_not_before(path):
    await fill(path)
    other = replace(HEADER, input="other.jsonl", source="other")
    for _ in range(2):
        async with opened(path, header=other) as checkpoint:
            assert checkpoint.source_before == HEADER.source
        assert read_status(path).header == HEADER
    async with opened(path, header=other) as checkpoint:
        await checkpoint.begin(BatchState(make_batch(1, first_row=30)), NOW)
    assert read_status(path).header == other


async def test_a_checkpoint_of_a_newer_format_is_refused(path):
    await fill(path)
    query(path, f"PRAGMA user_version = {FORMAT + 1}")

    for use in (start, read_status, lambda path: list(read_results(path))):
        with pytest.raises(CheckpointError, match=f"format {FORMAT + 1}, made by a newer bulkwf"):
            use(path)


async def test_a_checkpoint_of_an_older_format_is_refused_saying_what_to_do(path):
    await fill(path)
    query(path, f"PRAGMA user_version = {FORMAT - 1}")
    before = path.read_bytes()

    for use in (start, read_status, lambda path: list(read_results(path)), lambda path: start(path, new=True)):
        with pytest.raises(CheckpointError, match=r"Finish the run with the bulkwf that began it\. In another"):
            use(path)
    assert path.read_bytes() == before


async def test_an_empty_database_is_not_taken_for_a_new_checkpoint(path):
    query(path, "PRAGMA journal_mode = WAL")  # what a kill has left whose log is missing
    before = path.read_bytes()
    assert before

    for use in (start, read_status, lambda path: start(path, new=True)):
        with pytest.raises(CheckpointError, match=r"this database is empty.*without its log \(run.bulkwf-wal\)"):
            use(path)
    assert path.read_bytes() == before


async def test_a_database_of_another_program_is_refused_and_not_changed(path):
    query(path, "CREATE TABLE mine (x)")
    before = path.read_bytes()

    for use in (start, read_status, lambda path: list(read_results(path))):
        with pytest.raises(CheckpointError, match="not a checkpoint of bulkwf"):
            use(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"not a database, but a letter to a friend" * 200, b"{}\n"])
def test_a_file_that_is_no_database_is_refused_and_not_changed(path, content):
    path.write_bytes(content)

    for use in (start, read_status, lambda path: list(read_results(path))):
        with pytest.raises(CheckpointError, match=r"damaged|no checkpoint"):
            use(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("harm", ["header", "truncated"])
def test_a_damaged_file_is_refused_with_the_reason(path, harm):
    asyncio.run(fill(path, batches=50, rows=100))
    data = path.read_bytes()
    path.write_bytes(b"\0" * 100 + data[100:] if harm == "header" else data[: len(data) // 2])

    async def resume(path):
        async with opened(path) as checkpoint:
            list(checkpoint.begun())

    for use in (lambda path: asyncio.run(resume(path)), lambda path: list(read_results(path))):
        with pytest.raises(CheckpointError, match=r"damaged|no checkpoint"):
            use(path)


def nudged(value):
    """Another value, which parses as well."""
    if value is None:
        return 1
    if isinstance(value, str):
        return value[:-1] + chr(ord(value[-1]) ^ 1) if value else "x"
    return value + 1


def columns(path, table):
    return [name for _, name, *_ in query(path, f"PRAGMA table_info({table})")]


def damage(path, table, column, where="TRUE"):
    """Change one stored value."""
    ((value,),) = query(path, f"SELECT {column} FROM {table} WHERE {where}")
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", (nudged(value),))


async def three_batches(path):
    """A settled batch with rows that differ, one in doubt, and one that is begun."""
    async with opened(path) as checkpoint:
        for number, fates in enumerate((["created", "rejected", "existed", "invalid"], ["created", "pending"], None)):
            state = BatchState(make_batch(4, first_row=6)) if fates is None else state_of(fates, first_row=4 * number)
            await checkpoint.begin(state, NOW)
            if fates is not None:
                settle_by(state, fates, 1)
                await checkpoint.settle(state, NOW)
        await checkpoint.pause(NOW + 60)


def use_all(path):
    list(read_results(path))
    list(read_results(path, outcome="pending"))


READERS = {"results": use_all, "status": read_status, "run": start}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("where", ["first_row = 0", "first_row = 4", "first_row = 6"])
def test_a_changed_value_in_any_batch_column_is_found_by_every_reader(path, where, reader):
    asyncio.run(three_batches(path))
    whole = path.read_bytes()
    names = columns(path, "batch")
    assert len(names) == len(Begun._fields)
    for column in names:
        path.write_bytes(whole)
        damage(path, "batch", column, where)
        if (column, where, reader) in (("ids", "first_row = 0", "run"), ("ids", "first_row = 0", "status")):
            continue  # of settled batches, they do not read the ids
        with pytest.raises(CheckpointError, match="the checkpoint is damaged: "):
            READERS[reader](path)


@pytest.mark.parametrize("reader", ["status", "run"])
def test_a_changed_value_in_any_run_column_is_found_by_every_reader(path, reader):
    asyncio.run(three_batches(path))
    whole = path.read_bytes()
    for column in columns(path, "run"):
        path.write_bytes(whole)
        damage(path, "run", column)
        with pytest.raises(CheckpointError, match="the checkpoint is damaged: the record of the run does not match"):
            READERS[reader](path)


@pytest.mark.parametrize("table", ["attempt", "session"])
def test_a_changed_value_in_any_attempt_or_session_column_is_found_when_a_run_opens_it(path, table):
    """Attempts restore the limits' windows and the quota; sessions say since when rows may be in doubt."""

    async def run():
        async with opened(path) as checkpoint:
            await note(checkpoint, attempt()._replace(quota="r=7;t=9"))
            checkpoint.end(NOW + 1, "drained", 143)

    asyncio.run(run())
    whole = path.read_bytes()
    for column in columns(path, table):
        if (table, column) == ("attempt", "id"):
            continue
        path.write_bytes(whole)
        damage(path, table, column)
        with pytest.raises(CheckpointError, match=f"the record of {table} [12] does not match its checksum"):
            start(path)


async def test_a_damaged_attempt_is_found_when_a_verification_restores_the_limits(path):
    async with opened(path) as checkpoint:
        await note(checkpoint, attempt())
    damage(path, "attempt", "started_at")
    with pytest.raises(CheckpointError, match="the record of attempt 1 does not match its checksum"):
        read_run_past(path, NOW - 300)


async def test_damaged_ids_of_a_settled_batch_are_found_when_they_are_read(path):
    await three_batches(path)
    damage(path, "batch", "ids", "first_row = 0")

    async with opened(path) as checkpoint:
        begun = next(checkpoint.begun())
        with pytest.raises(CheckpointError, match="the ids of the batch at row 0 do not match their checksum"):
            checkpoint.batch_state(begun, lines(4), "instance")


def test_a_row_in_no_batch_is_missing(path):
    asyncio.run(fill(path))
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert [read_batch(db, row).first_row for row in (0, 9, 10, 29)] == [0, 0, 10, 20]
        for row in (-1, 30):
            with pytest.raises(ValueError, match=f"row {row} is missing"):
                read_batch(db, row)


@pytest.mark.parametrize("reader", READERS)
def test_swapped_records_are_found(path, reader):
    asyncio.run(fill(path))
    query(path, "UPDATE batch SET first_row = -1 WHERE first_row = 10")
    query(path, "UPDATE batch SET first_row = 10 WHERE first_row = 20")
    query(path, "UPDATE batch SET first_row = 20 WHERE first_row = -1")

    with pytest.raises(CheckpointError, match="the record of the batch at row 10 does not match"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("harm", "why"),
    [
        ("UPDATE batch SET first_row = 11 WHERE first_row = 10", "rows 10 to 10 are missing"),
        ("UPDATE batch SET rows = 11 WHERE first_row = 10", "row 20 stands in two batches|has ids that no run writes"),
        ("UPDATE batch SET first_row = -1 WHERE first_row = 20", "no run writes"),
        ("UPDATE batch SET size = 9", "fewer bytes than lines"),
        ("UPDATE batch SET created = 1e400", "no run writes"),
        ("UPDATE batch SET settled_at = x'00'", "no run writes"),
    ],
)
def test_a_forged_batch_record_that_no_run_writes_is_refused(path, harm, why, reader):
    asyncio.run(fill(path))
    query(path, harm)
    reseal(path)

    with pytest.raises(CheckpointError, match=why):
        READERS[reader](path)


MADE_UP_IDS = ["../../user/tokens", "..", "", "a b", 'x","params":{}', "batch", "cf_" + "0" * 64, "id-1", None, 7]


@pytest.mark.parametrize("reader", ["results", "run"])
@pytest.mark.parametrize("made_up", MADE_UP_IDS)
def test_forged_ids_that_break_the_rules_of_ids_are_refused(path, made_up, reader):
    async def begin():
        async with opened(path) as checkpoint:
            await checkpoint.begin(BatchState(make_batch(2)), NOW)

    asyncio.run(begin())
    ids = [made_up, "id-1"] if made_up is not None else ["id-0"]
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE batch SET ids = ?", (orjson.dumps(ids).decode(),))
    reseal(path)

    with pytest.raises(CheckpointError, match=r"damaged: .* that no run writes|damaged: it holds what no run writes"):
        READERS[reader](path)


@pytest.mark.parametrize("entry", [{"outcome": "existed", "id": "../x"}, {"outcome": "rejected"}])
def test_a_forged_result_with_an_id_of_its_own_is_refused(path, entry):
    asyncio.run(fill(path, batches=1, rows=2))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        ids = '[null,"id-1"]' if "id" not in entry else '["id-0","id-1"]'
        values = (orjson.dumps({"0": entry}).decode(), ids)
        db.execute("UPDATE batch SET exceptions = ?, ids = ?", values)
    reseal(path)

    with pytest.raises(CheckpointError, match="row 0 has an outcome without having been sent"):
        list(read_results(path))


@pytest.mark.parametrize("reader", ["status", "run"])
@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("run_key", value) for value in ("", "-a", "k" * 65, 'x","params":{"a":"', "../x", "a b")),
        *(("workflow", value) for value in ("", "../w", "w" * 65)),
        *(("account_id", value) for value in ("", "a/b")),
        ("row_shape", "other"),
        ("base_url", b"https://elsewhere.example"),
        ("created_at", "yesterday"),
        ("pause_until", 1e17),
        ("pause_until", "later"),
        ("finished_at", -1.0),
    ],
)
def test_a_forged_run_record_that_no_run_writes_is_refused(path, column, value, reader):
    asyncio.run(fill(path))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(f"UPDATE run SET {column} = ?", (value,))
    reseal(path)

    with pytest.raises(CheckpointError, match=r"the checkpoint is damaged: "):
        READERS[reader](path)


@pytest.mark.parametrize("harm", ["DELETE FROM run", "INSERT INTO run SELECT * FROM run"])
def test_a_checkpoint_without_exactly_one_run_record_is_damaged(path, harm):
    asyncio.run(fill(path))
    query(path, harm)

    with pytest.raises(CheckpointError, match=r"it has [02] records of its run"):
        read_status(path)


@pytest.mark.parametrize(
    "harm", ["attempt SET instances = 'many'", "attempt SET quota = x'00'", "session SET started_at = 'then'"]
)
async def test_a_forged_attempt_or_session_that_no_run_writes_is_refused(path, harm):
    async with opened(path) as checkpoint:
        note(checkpoint, attempt())
        await checkpoint.flush()
    query(path, f"UPDATE {harm}")
    reseal(path)
    before = path.read_bytes()

    with pytest.raises(
        CheckpointError, match=r"damaged: it holds what no run writes \(\w+ at (attempts|sessions).py:\d+\)"
    ):
        start(path)
    assert path.read_bytes() == before


async def test_a_gap_between_batches_is_damage(path):
    await fill(path)
    query(path, "DELETE FROM batch WHERE first_row = 10")

    for use in READERS.values():
        with pytest.raises(CheckpointError, match="rows 10 to 19 are missing"):
            use(path)


HOLD = """
    import asyncio, sys
    from pathlib import Path
    from test_checkpoint import start
    checkpoint = start(Path(sys.argv[1]))
    print("open", flush=True)
    sys.stdin.read()
    asyncio.run(checkpoint.aclose())
"""


def test_a_checkpoint_that_another_process_writes_is_refused_naming_the_process(path):
    root = str(Path(bulkwf.__file__).parent.parent)
    paths = os.pathsep.join([root, str(Path(__file__).parent)])
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(path)],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(CheckpointError, match=f"pid {holder.pid} on {socket.gethostname()}"):
            start(path)
        assert read_status(path).rows == 0  # reading is free
        holder.communicate()
    asyncio.run(start(path).aclose())


@pytest.mark.parametrize(
    ("signed", "said"), [("pid 7 on a", " (pid 7 on a)"), ("\x1b[31m", ""), (b"\xff", ""), (None, "")]
)
async def test_the_holder_of_a_lock_is_named_once_it_has_signed_with_printable_text(path, monkeypatch, signed, said):
    lock = path.with_name(path.name + ".lock")

    def sign(_):
        assert not lock.read_bytes()
        if signed is None:
            lock.unlink()
        else:
            lock.write_bytes(signed if isinstance(signed, bytes) else signed.encode())

    monkeypatch.setattr(lock_file.time, "sleep", sign)
    async with opened(path):
        lock.write_bytes(b"")
        with pytest.raises(CheckpointError) as refused:
            start(path)
        assert f"another run is writing this checkpoint{said}. Wait for that" in str(refused.value)


async def test_a_lock_holder_that_never_signs_is_not_named(path, monkeypatch):
    naps = []
    monkeypatch.setattr(lock_file.time, "sleep", naps.append)
    async with opened(path):
        path.with_name(path.name + ".lock").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"another run is writing this checkpoint\. Wait"):
            start(path)
    assert 0 < sum(naps) < 1


async def test_one_process_can_not_open_a_checkpoint_twice_under_any_name(path):
    link = path.with_name("link")
    async with opened(path):
        link.symlink_to(path)
        for name in (path, link):
            with pytest.raises(CheckpointError, match=f"pid {os.getpid()} "):
                start(name)
    async with opened(link) as checkpoint:
        assert checkpoint.path == path


def test_the_lock_of_a_killed_process_does_not_bind(path):
    killed = child(HOLD.replace("sys.stdin.read()", "import os; os.kill(os.getpid(), 9)"), path)
    assert (killed.returncode, path.with_name(path.name + ".lock").exists()) == (-9, True)

    asyncio.run(start(path).aclose())
    assert [one.name for one in path.parent.iterdir()] == [path.name]


# --- starting over ------------------------------------------------------------------------------------------------


async def test_new_moves_a_finished_checkpoint_aside(path):
    await fill(path)
    async with opened(path, new=True) as checkpoint:
        assert checkpoint.counts().rows == 0
        await checkpoint.finish(NOW)
    async with opened(path, new=True):
        pass

    aside = sorted(one.name for one in path.parent.iterdir())
    assert aside == [path.name, f"{path.name}.{NOW:.0f}", f"{path.name}.{NOW:.0f}~"]
    assert len(list(read_results(path.with_name(aside[1])))) == 30


async def test_new_refuses_an_unfinished_run(path):
    async with opened(path) as checkpoint:
        await checkpoint.begin(BatchState(make_batch(1)), NOW)

    with pytest.raises(CheckpointError, match="not finished"):
        start(path, new=True)
    assert len(list(read_results(path, outcome="pending"))) == 1


async def test_new_refuses_a_finished_run_that_has_begun_more_rows(path):
    await fill(path)
    async with opened(path) as checkpoint:
        await checkpoint.begin(BatchState(make_batch(1, first_row=30)), NOW)

    with pytest.raises(CheckpointError, match="not finished"):
        start(path, new=True)


async def test_new_is_refused_while_a_reader_holds_a_transaction(path, monkeypatch):
    await fill(path)
    monkeypatch.setattr(file, "BUSY_TIMEOUT_S", 0.01)
    with contextlib.closing(file.connect_reader(path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM run").fetchone()
        async with opened(path) as checkpoint:
            await checkpoint.finish(NOW + 1)
        with pytest.raises(CheckpointError, match=r"another program is reading the checkpoint\. Run again"):
            start(path, new=True)
    async with opened(path, new=True) as checkpoint:
        assert checkpoint.counts().rows == 0


async def test_new_beside_an_idle_reader_leaves_it_the_old_checkpoint(path, monkeypatch):
    """A pager that has shown its first screen reads the rest once the new run is under way."""
    monkeypatch.setattr("bulkwf.checkpoint.reading.RESULT_PAGE_BATCHES", 2)
    await fill(path, batches=200, rows=10)
    reading = read_results(path)
    rows = [next(reading).row]
    async with opened(path, new=True) as checkpoint:
        for number in range(3):
            await checkpoint.begin(BatchState(make_batch(1, first_row=number)), NOW)
        rows += [result.row for result in reading]
        assert read_status(path).rows == 3
    assert rows == list(range(2_000))
    assert sorted(one.name for one in path.parent.iterdir()) == [path.name, f"{path.name}.{NOW:.0f}"]
    for one in path.parent.iterdir():
        assert query(one, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("empty", [False, True])
async def test_new_without_an_old_checkpoint_starts_a_run(path, empty):
    if empty:
        path.touch()
    async with opened(path, new=True) as checkpoint:
        assert checkpoint.counts().rows == 0


@pytest.mark.parametrize("content", [b"a letter" * 1_000, None])
async def test_new_moves_nothing_but_checkpoints(path, content):
    if content is None:
        query(path, "CREATE TABLE mine (x)")
    else:
        path.write_bytes(content)

    with pytest.raises(CheckpointError):
        start(path, new=True)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


# --- what can't be written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["deleted", "moved", "replaced"])
async def test_a_moved_replaced_or_deleted_file_is_not_written_any_more(path, harm):
    checkpoint = start(path)
    await checkpoint.begin(BatchState(make_batch(1)), NOW)
    path.rename(path.with_name("moved")) if harm != "deleted" else path.unlink()
    if harm == "replaced":
        shutil.copy(path.with_name("moved"), path)

    with pytest.raises(CheckpointError, match="moved, replaced or deleted"):
        await checkpoint.begin(BatchState(make_batch(1, first_row=1)), NOW)
    assert checkpoint.failed
    with pytest.raises(CheckpointError, match="moved, replaced or deleted"):
        await checkpoint.flush()
    await checkpoint.aclose()


async def test_after_a_failed_write_every_waiter_and_every_later_write_fails(path):
    broken = []

    async def execute(function):
        await asyncio.sleep(0)
        if broken:
            raise sqlite3.OperationalError("database or disk is full")
        function()

    checkpoint = start(path, execute)
    await checkpoint.begin(BatchState(make_batch(1)), NOW)
    broken.append(True)
    waiting = [checkpoint.begin(BatchState(make_batch(1, first_row=i)), NOW) for i in (1, 2)]
    await asyncio.sleep(0)
    waiting.append(checkpoint.begin(BatchState(make_batch(1, first_row=3)), NOW))
    ended = await asyncio.gather(*waiting, return_exceptions=True)
    broken.clear()

    assert [type(one) for one in ended] == [CheckpointError] * 3
    assert "Make room on the disk" in str(ended[0])
    with pytest.raises(CheckpointError):
        await checkpoint.begin(BatchState(make_batch(1, first_row=1)), NOW)
    await checkpoint.aclose()
    assert len(every_result(path)) == 1


async def test_writes_queued_behind_a_failed_commit_fail_with_it(path):
    held = asyncio.Event()

    async def slow(function):
        await held.wait()
        function()

    checkpoint = start(path, slow)
    first = checkpoint.begin(BatchState(make_batch(1)), NOW)
    for _ in range(4):
        await asyncio.sleep(0)
    second = checkpoint.begin(BatchState(make_batch(1, first_row=1)), NOW)
    path.rename(path.with_name("moved"))
    held.set()
    ended = await asyncio.gather(first, second, return_exceptions=True)
    await checkpoint.aclose()

    assert [type(one) for one in ended] == [CheckpointError] * 2
    assert ended[0] is ended[1]


FILL_UP = """
    import asyncio, resource, sys
    from pathlib import Path
    from fakes import make_batch
    from test_checkpoint import BatchState, NOW, start, created

    async def run(path):
        checkpoint = start(path)
        settled = 0
        try:
            for number in range(5_000):
                state = BatchState(make_batch(100, first_row=100 * number))
                await checkpoint.begin(state, NOW)
                created(state)
                await checkpoint.settle(state, NOW)
                settled = number + 1
        finally:
            print(settled, flush=True)
            await checkpoint.aclose()

    if len(sys.argv) > 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    asyncio.run(run(Path(sys.argv[1])))
"""


def check_full(ended, path):
    """Nothing that was settled is lost, and the file can be used again."""
    assert ended.returncode == 1
    assert "Make room on the disk" in ended.stderr.splitlines()[-1]
    settled = int(ended.stdout)
    assert settled > 3
    assert [r.row for r in read_results(path)] == list(range(100 * settled))
    assert [one.name for one in path.parent.iterdir() if one.name.endswith(".lock")] == []


def test_a_file_size_limit_stops_the_writer_and_loses_no_settled_row(path):
    check_full(child(FILL_UP, path, 300_000), path)

    async def go_on():
        async with opened(path) as checkpoint:
            rows = sum(begun.rows for begun in checkpoint.begun())
            await checkpoint.begin(BatchState(make_batch(10, first_row=rows)), NOW)

    asyncio.run(go_on())


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Make room on the disk and run"),
        (errno.EDQUOT, "Make room on the disk and run"),
        (errno.EIO, "repair it if it fails"),
        (errno.EACCES, "Its folder must exist and be writable"),
    ],
)
def test_a_system_error_is_explained_with_advice(path, number, advice):
    with pytest.raises(CheckpointError, match=advice), errors.explained(path):
        raise OSError(number, os.strerror(number))


@pytest.fixture
def disk(folder):
    """A folder that holds no more than 256 KiB."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"NOT TESTED: no disk can be mounted here: {error}")
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: no disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_stops_the_writer_and_loses_no_settled_row(disk):
    path = disk / "run.bulkwf"
    ended = child(FILL_UP, path)

    assert f" bytes of it are still in {path}-wal, because the disk has no room" in ended.stderr
    check_full(ended, path)


ALMOST_FULL = """
    import asyncio, os, sys
    from pathlib import Path
    from fakes import make_batch
    from test_checkpoint import BatchState, NOW, start, created

    async def run(path):
        checkpoint, number = start(path), 0
        while os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_bsize > 24_000:
            state = BatchState(make_batch(100, first_row=100 * number))
            await checkpoint.begin(state, NOW)
            created(state)
            await checkpoint.settle(state, NOW)
            number += 1
        print(number, flush=True)
        await checkpoint.aclose()

    asyncio.run(run(Path(sys.argv[1])))
"""


def test_without_room_to_fold_the_log_closing_warns_and_leaves_two_files(disk):
    path = disk / "run.bulkwf"
    ended = child(ALMOST_FULL, path)

    assert ended.returncode == 0
    assert f" bytes of it are still in {path}-wal, because the disk has no room" in ended.stderr
    assert [r.row for r in read_results(path)] == list(range(100 * int(ended.stdout)))


NOBODY = """
    import os, sys
    from pathlib import Path
    import encodings.idna
    from test_checkpoint import start, read_results, CheckpointError
    if os.getuid() == 0:
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
    path = Path(sys.argv[1])
    print(len(list(read_results(path))))
    for name in (path, path.with_name("new.bulkwf")):
        try:
            start(name)
        except CheckpointError as error:
            print(error)
"""


def test_in_a_read_only_folder_a_checkpoint_can_be_read_but_not_opened():
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run.bulkwf"
        asyncio.run(fill(path))
        path.chmod(0o644)
        Path(name).chmod(0o555)
        ended = child(NOBODY, path)
        Path(name).chmod(0o755)

    count, *errors = ended.stdout.splitlines() or [ended.stderr]
    assert count == "30"
    assert len(errors) == 2
    assert all("can't be locked (Permission denied" in error and "-c" in error for error in errors)


# --- what earlier sessions left -----------------------------------------------------------------------------------


async def test_recent_attempts_are_read_by_their_end_the_oldest_first(path):
    async with opened(path) as checkpoint:
        note(checkpoint, attempt(instances=7, at=NOW - 10, elapsed_s=9.0))
        note(checkpoint, attempt(instances=5, at=NOW - 9, elapsed_s=0.5))
        note(checkpoint, attempt(instances=3, at=NOW - 400, elapsed_s=1.0))
        await checkpoint.flush()
        assert checkpoint.past(NOW - 300).attempts == [(NOW - 8.5, 5), (NOW - 1.0, 7)]


async def test_recent_attempts_are_read_in_pages_until_one_is_too_old(path, monkeypatch):
    monkeypatch.setattr("bulkwf.checkpoint.attempts.PAGE_ATTEMPTS", 2)
    async with opened(path) as checkpoint:
        for number in range(9):
            note(checkpoint, attempt(instances=number, at=NOW + number, elapsed_s=0.0))
        await checkpoint.flush()
        assert checkpoint.past(NOW + 3).attempts == [(NOW + number, number) for number in range(4, 9)]
        query(path, "UPDATE attempt SET instances = 99 WHERE instances = 0")  # a damaged one, too old to be read
        assert len(checkpoint.past(NOW + 3).attempts) == 5


async def test_each_batch_in_doubt_counts_as_an_attempt_at_the_session_start(path):
    async with opened(path) as checkpoint:
        done, partly, begun = (BatchState(make_batch(10, first_row=10 * i)) for i in range(3))
        for state in (done, partly, begun):
            await checkpoint.begin(state, NOW - 1_000)
        created(done)
        created(partly, [0, 1, 2])
        for state in (done, partly):
            await checkpoint.settle(state, NOW - 999)
    async with opened(path) as checkpoint:
        assert sorted(checkpoint.past(NOW - 300).attempts) == [(NOW, 7), (NOW, 10)]
        assert query(path, "SELECT DISTINCT verdict FROM attempt") == [("interrupted",)]


async def test_a_pause_outlives_the_session(path):
    async with opened(path) as checkpoint:
        assert checkpoint.past(NOW).pause_until == 0
        await checkpoint.pause(NOW + 300)
    async with opened(path) as checkpoint:
        assert checkpoint.past(NOW).pause_until == read_status(path).pause_until == NOW + 300


async def test_the_last_quotas_are_read_with_all_requests_since(path):
    async with opened(path) as checkpoint:
        note(checkpoint, attempt(at=NOW - 2_000, elapsed_s=0.25)._replace(quota="r=7;t=9"))
        note(checkpoint, attempt(at=NOW - 1_000, elapsed_s=0.5))
        note(checkpoint, attempt(at=NOW - 900, elapsed_s=2.0)._replace(quota="r=0;t=60,r=20;t=200"))
        await checkpoint.flush()
        past = checkpoint.past(NOW - 300)
    assert past == read_run_past(path, NOW - 300)
    assert past.words == [
        Said(NOW - 1_999.75, NOW - 2_000, "r=7;t=9"),
        Said(NOW - 898, NOW - 900, "r=0;t=60,r=20;t=200"),
    ]
    assert past.attempts == [(NOW - 999.5, 100), (NOW - 898.0, 100)]


async def test_only_the_last_quotas_are_read(path):
    async with opened(path) as checkpoint:
        for number in range(2 * LAST_WORDS):
            note(checkpoint, attempt(at=NOW + number)._replace(quota=f"r={number};t=9"))
        await checkpoint.flush()
        words = checkpoint.past(NOW).words
    assert [said.text for said in words] == [f"r={n};t=9" for n in range(LAST_WORDS, 2 * LAST_WORDS)]


# --- the clock ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["1e17", "-1e400", "'then'", "x'00'"])
async def test_an_impossible_boot_time_is_damage(path, at):
    await fill(path)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(f"UPDATE run SET booted_at = {at}")
    reseal(path)

    for use in (start, read_boot):
        with pytest.raises(CheckpointError, match="the checkpoint is damaged: "):
            use(path)


async def test_a_boot_keeps_its_first_clock_and_another_boot_sets_its_own(path):
    found = []
    for boot in (Boot("a", 1_000.0), Boot("a", 5_000.0), Boot("b", 5_000.0), Boot("", 0.0), Boot("b", 7_000.0)):
        async with opened(path, boot=boot) as checkpoint:
            found.append((checkpoint.boot, read_boot(path)))
    expected = (Boot("a", 1_000.0), Boot("a", 1_000.0), Boot("b", 5_000.0), Boot("", 0.0), Boot("b", 7_000.0))
    assert found == [(boot, boot) for boot in expected]


@pytest.mark.parametrize(("boot", "shift_s"), [(Boot("a", 1_600.0), 600.0), (Boot("b", 1_600.0), 0.0)])
async def test_past_times_of_the_same_boot_are_shifted_to_the_callers_clock(path, boot, shift_s):
    async with opened(path, boot=Boot("a", 1_000.0)) as checkpoint:
        note(checkpoint, attempt(at=NOW - 350, elapsed_s=0.0)._replace(quota="r=7;t=9"))
        note(checkpoint, attempt(at=NOW - 250, elapsed_s=0.0))
        await checkpoint.pause(NOW + 60)
    past = read_run_past(path, NOW - 300 + shift_s, boot)
    assert past.attempts == [(NOW - 250 + shift_s, 100)]
    assert past.words == [Said(NOW - 350 + shift_s, NOW - 350 + shift_s, "r=7;t=9")]
    assert past.pause_until == NOW + 60 + shift_s


async def test_a_broken_executor_fails_the_write_and_closing_releases_the_lock(path):
    async def broken(function):
        raise RuntimeError("can't start new thread")

    async with opened(path, broken) as checkpoint:
        with pytest.raises(CheckpointError, match="can't start new thread"):
            await checkpoint.begin(BatchState(make_batch(3)), NOW)
        with pytest.raises(CheckpointError):
            await checkpoint.flush()
    async with opened(path):
        pass


async def test_closing_waits_for_the_commit_under_way_when_it_is_cancelled(path):
    held = asyncio.Event()

    async def slow(function):
        await held.wait()
        function()

    checkpoint = start(path, slow)
    waiting = [checkpoint.begin(BatchState(make_batch(3, first_row=3 * number)), NOW) for number in range(2)]
    waiting[0].cancel()
    closing = [asyncio.ensure_future(checkpoint.aclose()) for _ in range(2)]
    for _ in range(5):
        await asyncio.sleep(0)
        closing[0].cancel()
    assert not any(one.done() for one in (*closing, waiting[1]))
    with pytest.raises(CheckpointError, match="another run is writing"):
        start(path)
    held.set()
    await asyncio.wait(closing)

    assert closing[0].cancelled()
    assert [await closing[1], await waiting[1]] == [None, None]
    with pytest.raises(CheckpointError, match="the checkpoint is closed"):
        checkpoint.flush()
    async with opened(path) as checkpoint:
        assert len(list(checkpoint.begun())) == 2


async def test_without_a_thread_a_write_fails_and_closing_releases_the_lock(path):
    def none(function):
        raise RuntimeError("can't start new thread")

    async with opened(path, none) as checkpoint:
        with pytest.raises(CheckpointError, match="can't start new thread"):
            await checkpoint.begin(BatchState(make_batch(3)), NOW)
    async with opened(path):
        pass


async def test_a_cancelled_commit_fails_its_waiters(path):
    async def endless(function):
        await asyncio.Event().wait()

    tasks = asyncio.all_tasks()
    checkpoint = start(path, endless)
    begun = checkpoint.begin(BatchState(make_batch(3)), NOW)
    for _ in range(4):
        await asyncio.sleep(0)
    for task in asyncio.all_tasks() - tasks:
        task.cancel()
    with pytest.raises(CheckpointError, match="the commit was cut off"):
        await begun
    closing = asyncio.ensure_future(checkpoint.aclose())
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - tasks - {closing}:
        task.cancel()
    await closing
    async with opened(path):
        pass
