"""What the main file of a checkpoint shows without its log, and what a run does if the log is missing."""

import asyncio
import contextlib
import os
import shutil
import socket
import sqlite3
from dataclasses import replace

import pytest
from fakes import HEADER, make_batch, reseal, run_virtual
from test_checkpoint import NOW, created, every_result, fill, opened, query, start
from test_engine import World, mappings

from bulkwf.batching.batch_state import BatchState
from bulkwf.checkpoint import file, read_results, read_status, sessions, writer
from bulkwf.errors import CheckpointError


@pytest.fixture
def path(folder):
    (folder / "here").mkdir()
    return folder / "here" / "run.bulkwf"


@pytest.fixture(autouse=True)
def warnings_of_each_test():
    """A reader is warned once for each path."""
    sessions.warn_of_missing_log.cache_clear()


def log_of(path):
    return path.with_name(path.name + "-wal")


def copied(path, name, *suffixes):
    """A copy of the checkpoint in a folder of its own: the main file, and the files with these suffixes."""
    folder = path.parent.with_name(name)
    folder.mkdir()
    for suffix in ("", *suffixes):
        shutil.copy(f"{path}{suffix}", folder / f"{path.name}{suffix}")
    return folder / path.name


async def killed(path, name="killed", batches=2, *suffixes):
    """What a kill leaves of a session that has settled batches: the main file, and the files with *suffixes*."""
    async with opened(path) as checkpoint:
        for number in range(batches):
            state = BatchState(make_batch(10, first_row=10 * number))
            await checkpoint.begin(state, NOW)
            created(state)
            await checkpoint.settle(state, NOW)
        return copied(path, name, *suffixes)


def missing(caplog):
    return [text for text in caplog.messages if "is missing" in text]


def sessions_of(path):
    return query(path, "SELECT reason, ended_at IS NOT NULL, log_lost, exit_code FROM session ORDER BY id")


# --- at each step -------------------------------------------------------------------------------------------------


class Snapshots:
    """The files of a checkpoint before each SQL statement of its writers, and at the end."""

    def __init__(self, path, monkeypatch):
        self.taken = []
        self.durable = 0
        """Rows whose commit has ended."""
        self._path = path

        def connect(name, connect=file.connect):
            db = connect(name)
            db.set_trace_callback(lambda _: self.take())
            return db

        for module in (file, writer):
            monkeypatch.setattr(module, "connect", connect)

    def take(self):
        files = {}
        for one in self._path.parent.iterdir():
            with contextlib.suppress(FileNotFoundError):
                files[one.name] = one.read_bytes()
        self.taken.append((files, self.durable))


async def two_sessions(path, snapshots):
    for session in range(2):
        async with opened(path) as checkpoint:
            for number in range(2 * session, 2 * session + 2):
                state = BatchState(make_batch(10, first_row=10 * number))
                await checkpoint.begin(state, NOW)
                snapshots.durable += 10
                created(state)
                await checkpoint.settle(state, NOW)
    snapshots.take()


def laid_out(folder, files, kept):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        if kept(name):
            (folder / name).write_bytes(data)
    return folder / "run.bulkwf"


def tried(path, header):
    """The checkpoint, or why it is refused."""
    try:
        return start(path, header=header), ""
    except CheckpointError as error:
        return None, str(error)


def test_a_checkpoint_left_or_copied_at_any_step_resumes_with_the_same_ids_or_is_refused(path, monkeypatch, caplog):
    with monkeypatch.context() as at_first:
        snapshots = Snapshots(path, at_first)
        asyncio.run(two_sessions(path, snapshots))
    assert len(snapshots.taken) > 40
    seen = set()
    for files, durable in snapshots.taken:
        main, log = files.get(path.name, b""), files.get(log_of(path).name, b"")
        for what in ("all", "file alone", "log alone", "log and an empty file"):
            left = laid_out(path.parent.with_name("left"), files, {
                "all": lambda name: not name.endswith((".lock", "-shm")),
                "file alone": lambda name: name == path.name,
            }.get(what, lambda name: name == log_of(path).name))  # fmt: skip
            if what == "log and an empty file":
                left.touch()
            caplog.clear()
            checkpoint, refused = tried(left, header=HEADER if not durable else ANOTHER_KEY)
            if checkpoint is None:
                seen.add((what, "refused"))
                assert "its log is there" in refused
                assert what.startswith("log")
                assert log_of(path).name in files
                continue
            known, since, key = checkpoint.counts().rows, checkpoint.lost_since, checkpoint.run_key
            asyncio.run(checkpoint.aclose())
            if what.startswith("log"):
                assert not log
                assert log_of(path).name not in files
                continue
            seen.add((what, "lost" if since else "whole"))
            assert bool(since) == bool(missing(caplog))
            assert not durable or key == HEADER.run_key
            assert known >= durable or (since == NOW and what == "file alone")
            assert what == "file alone" or since is None
            assert main or not durable
    assert seen >= {("all", "whole"), ("file alone", "whole"), ("file alone", "lost"), ("log alone", "refused")}


ANOTHER_KEY = replace(HEADER, run_key="another")
"""Of a later command: each one draws a run key of its own."""


# --- sessions -----------------------------------------------------------------------------------------------------


async def test_a_session_is_stored_with_its_process_and_its_first_end(path):
    async with opened(path) as checkpoint:
        assert query(path, "SELECT pid, host, started_at, ended_at FROM session") == [
            (os.getpid(), socket.gethostname(), NOW, None)
        ]
        checkpoint.end(NOW + 5, "drained", 143)
        checkpoint.end(NOW + 6, None)
    async with opened(path, now=NOW + 7):
        pass
    ended = query(path, "SELECT id, ended_at, reason, exit_code FROM session ORDER BY id")
    assert ended[0] == (1, NOW + 5, "drained", 143)
    assert ended[1] == (2, NOW + 7, None, None)


def test_the_engine_stores_why_a_session_ended(folder):
    async def go():
        world = World(folder, mappings(300))
        await world.session(act=_drain_at_once)
        await world.session()
        with pytest.raises(CheckpointError):
            await world.session(rows=mappings(200), act=_break)
        return [reason for reason, *_ in sessions_of(world.file)]

    assert run_virtual(go()) == ["drained", "finished", "CheckpointError"]


async def _drain_at_once(run):
    run.drain()


async def _break(run):
    run._engine.drain(CheckpointError("for a test"))


# --- a log that is missing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 20, 32, 5_000])
async def test_a_log_that_sqlite_would_not_read_counts_as_missing(path, caplog, size):
    left = await killed(path)
    left.with_name(left.name + "-wal").write_bytes(b"\xa5" * size)

    assert read_status(left).log_missing
    async with opened(left) as checkpoint:
        assert checkpoint.lost_since == NOW


async def test_a_file_without_its_log_warns_and_its_unknown_rows_are_in_doubt(path, caplog):
    left = await killed(path)
    status = read_status(left)
    assert (status.log_missing, status.rows, status.header.run_key) == (True, 0, "key")
    assert len(missing(caplog)) == 1
    async with opened(left) as checkpoint:
        assert checkpoint.lost_since == NOW
        assert "The run continues: rows get the same ids as before" in missing(caplog)[-1]
        [(_, instances)] = checkpoint.past(NOW - 1).attempts
        assert instances >= 10_000
    assert sessions_of(left) == [(None, 0, 1, None), (None, 1, 0, None)]
    async with opened(left) as checkpoint:  # a later session still does not know them
        assert checkpoint.lost_since == NOW
        await checkpoint.finish(NOW)
        checkpoint.end(NOW, "finished")
    async with opened(left) as checkpoint:
        assert checkpoint.lost_since is None


async def test_a_killed_session_with_its_log_is_complete_without_a_warning(path, caplog):
    left = await killed(path, "killed", 2, "-wal")
    assert read_status(left).log_missing is False
    async with opened(left) as checkpoint:
        assert (checkpoint.lost_since, checkpoint.counts().created) == (None, 20)
    assert missing(caplog) == []


async def test_a_reader_warns_once_of_a_missing_log_and_shows_the_rest(path, caplog):
    async with opened(path) as checkpoint:
        state = BatchState(make_batch(10))
        await checkpoint.begin(state, NOW)
        created(state)
        await checkpoint.settle(state, NOW)
        assert len(list(read_results(path))) == 10
        assert read_status(path).log_missing is False
    left = await killed(path, batches=0)
    assert missing(caplog) == []
    assert [len(list(read_results(left))) for _ in range(2)] == [10, 10]
    assert len(missing(caplog)) == 1
    assert "use those two" in missing(caplog)[0]


async def test_readers_and_refused_runs_do_not_fold_the_log(path):
    left = await killed(path, "killed", 2, "-wal")
    data = left.read_bytes(), log_of(left).read_bytes()
    assert len(every_result(left)) == 20
    for use in (
        lambda: start(left, header=ANOTHER_KEY, any_run_key=False),
        lambda: start(left, new=True),
        lambda: read_status(left),
    ):
        with contextlib.suppress(CheckpointError):
            use()
    assert (left.read_bytes(), log_of(left).read_bytes()) == data


async def test_a_log_of_0_bytes_counts_as_missing(path, caplog):
    left = await killed(path)
    log_of(left).touch()
    assert read_status(left).log_missing is True
    async with opened(left) as checkpoint:
        assert checkpoint.lost_since == NOW


def torn(path):
    """A copy of the main file without one page, whose loss only a check of every page finds."""
    data, copy = path.read_bytes(), path.with_name("torn.bulkwf")
    for at in range(len(data) - 4_096, 0, -4_096):
        copy.write_bytes(data[:at] + bytes(4_096) + data[at + 4_096 :])
        with contextlib.closing(sqlite3.connect(f"{copy.as_uri()}?immutable=1", uri=True)) as db:
            found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok" and db.execute("SELECT total(first_row) FROM batch").fetchone()[0]:
                return copy
    raise AssertionError("every page is missed")


async def test_a_file_copied_while_its_log_was_folded_is_refused(path):
    await fill(path, batches=20, rows=1_000)
    left = torn(await killed(path, batches=0))
    before = left.read_bytes()
    with pytest.raises(
        CheckpointError, match=r"its log \(torn.bulkwf-wal\) is missing, and without it the file is damaged"
    ):
        start(left)
    assert left.read_bytes() == before


async def test_a_reader_that_keeps_the_log_from_being_folded_hides_no_loss(path, monkeypatch, caplog):
    monkeypatch.setattr(file, "BUSY_TIMEOUT_S", 0.01)
    async with opened(path) as checkpoint:
        await checkpoint.begin(BatchState(make_batch(1)), NOW)
        with contextlib.closing(file.connect_reader(path)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM run").fetchone()
            await checkpoint.begin(BatchState(make_batch(1, first_row=1)), NOW)
            await checkpoint.aclose()
            left = copied(path, "left")
            both = copied(path, "both", "-wal")
    assert any("bytes of it are still in" in text for text in caplog.messages)
    assert read_status(left).log_missing is True
    assert read_status(both).log_missing is False
    assert read_status(both).rows == 2


async def test_a_run_beside_a_reader_warns_that_a_copy_without_the_log_would_look_finished(path, monkeypatch, caplog):
    await fill(path)
    monkeypatch.setattr(file, "BUSY_TIMEOUT_S", 0.01)
    with contextlib.closing(file.connect_reader(path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM run").fetchone()
        async with opened(path):
            assert any("do not copy the file without its log" in text for text in caplog.messages)


@pytest.mark.parametrize("harm", ["deleted", "moved", "replaced"])
async def test_a_log_taken_from_a_live_writer_ends_the_run_and_loses_nothing(path, harm, caplog):
    checkpoint = start(path)
    await checkpoint.begin(BatchState(make_batch(3)), NOW)
    log_of(path).rename(path.with_name("moved"))
    if harm == "deleted":
        path.with_name("moved").unlink()
    if harm == "replaced":
        shutil.copy(path.with_name("moved"), log_of(path))
    with pytest.raises(CheckpointError, match=r"-wal\) was moved, replaced or deleted while the run was writing it"):
        await checkpoint.begin(BatchState(make_batch(3, first_row=3)), NOW)
    await checkpoint.aclose()
    assert [result.row for result in every_result(path)] == [0, 1, 2]
    async with opened(path) as again:
        assert again.counts().pending == 3


async def test_after_a_failed_write_the_log_stays_for_the_next_session(path, caplog):
    failing = []

    async def execute(function):
        if failing:
            raise sqlite3.OperationalError("disk I/O error")
        function()

    checkpoint = start(path, execute)
    await checkpoint.begin(BatchState(make_batch(3)), NOW)
    failing.append(True)
    with pytest.raises(CheckpointError, match="disk I/O"):
        await checkpoint.begin(BatchState(make_batch(3, first_row=3)), NOW)
    await checkpoint.aclose()
    assert log_of(path).stat().st_size
    async with opened(path) as again:
        assert (again.lost_since, again.counts().pending) == (None, 3)
    assert missing(caplog) == []


async def test_new_moves_a_finished_run_aside_whose_session_was_killed(path, caplog):
    async with opened(path) as checkpoint:
        state = BatchState(make_batch(3))
        await checkpoint.begin(state, NOW)
        created(state)
        await checkpoint.settle(state, NOW)
        await checkpoint.finish(NOW)
        left = copied(path, "left", "-wal")
    async with opened(left, new=True) as checkpoint:
        assert checkpoint.counts().rows == 0
    aside = left.with_name(f"{left.name}.{NOW:.0f}")
    assert read_status(aside).log_missing is False
    assert sessions_of(aside) == [("killed", 1, 0, None)]
    assert missing(caplog) == []


# --- the run ------------------------------------------------------------------------------------------------------


def test_a_run_whose_log_was_lost_starts_no_row_twice(folder, caplog):
    async def go():
        world = World(folder, [{"params": {"n": n}} for n in range(500)])
        await world.session(kill_after=0.02)
        log_of(world.file).unlink()
        assert world.held.created
        summary = await world.session()
        return world, summary

    world, summary = run_virtual(go())
    assert world.held.created == 500
    assert summary.existed == summary.existed_in_doubt >= 1
    assert missing(caplog)


def test_a_run_whose_log_was_lost_before_the_retention_sends_nothing(folder):
    async def go():
        world = World(folder, mappings(500))
        await world.session(kill_after=0.02)
        log_of(world.file).unlink()
        query(world.file, "UPDATE session SET started_at = started_at - 259201")
        reseal(world.file)
        sent = len(world.transport.requests)
        with pytest.raises(CheckpointError, match="--in-doubt resend"):
            await world.session()
        assert len(world.transport.requests) == sent

    run_virtual(go())
