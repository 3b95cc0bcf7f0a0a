"""The store of a verification: what it takes in, what it reports, when it is continued, and how it fails."""

import contextlib
import itertools
import os
import random
import re
import socket
import sqlite3
import stat
from pathlib import Path

import pytest
from command import UNPRIVILEGED, bulkwf
from fakes import EPOCH, HEADER, lines, run_virtual, write_run

from bulkwf.checkpoint import read_status
from bulkwf.errors import CheckpointError
from bulkwf.model import Finding
from bulkwf.verification import Scope, VerificationReport, VerificationStore, Verified, store
from bulkwf.verification.scope import draw_positions

HOUR_S = 3_600.0
DAY_S = 86_400.0


@pytest.fixture
def path(folder):
    return folder / "run.bulkwf"


_written = {}


def a_run(path, rows=5, **more):
    """Add rows to a checkpoint. A checkpoint with the same rows is written only once."""
    known = None if path.exists() else f"{rows} {more}"
    if known in _written:
        path.write_bytes(_written[known])
        path.chmod(0o600)
        return
    run_virtual(write_run(path, rows, at=EPOCH, **more))
    if known:
        _written[known] = path.read_bytes()


def drive(coroutine):
    """Run a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        return ended.value
    raise AssertionError("it waits")


class Synchronous:
    """A store whose methods run at once, without an event loop."""

    def __init__(self, opened, checkpoint):
        self.store = opened
        self.checkpoint = checkpoint

    def __getattr__(self, name):
        found = getattr(self.store, name)
        return (lambda *args: drive(found(*args))) if callable(found) else found

    def unanswered(self, absences):
        async def collect():
            return [one async for one in self.store.unanswered(absences)]

        return drive(collect())

    def report(self, now=EPOCH, *, asked_for_all=False, complete=False):
        counts = Verified(
            instances=0, total=0, found=0, missing=0, run_finished=True, complete=complete, requests=0, elapsed_s=0.0,
            exit_code=0,
        )  # fmt: skip
        return VerificationReport(
            counts=counts, asked_for_all=asked_for_all, store=self.path, checkpoint=self.checkpoint, ended_at=now
        )

    def problems(self, now=EPOCH, *, asked_for_all=False):
        return list(self.report(now, asked_for_all=asked_for_all).problems())


async def at_once(function):
    return function()


def start(path, sample=None, now=EPOCH, random_source=None, **more):
    scope = Scope(path, read_status(path), sample)
    return Synchronous(
        VerificationStore.open(scope, now, random_source or random.Random(1).random, at_once, **more), path
    )


@contextlib.contextmanager
def opened(path, sample=None, now=EPOCH, *, finished=False, **more):
    """A store that is open for the block; `finished`: the verification is complete then, and its report delivered."""
    found = start(path, sample, now, **more)
    try:
        yield found
    finally:
        found.store._close()
    if finished:
        found.report(now, complete=True).discard()


def file_of(path):
    return path.with_name(path.name + ".verify")


def rows_of(path, sample=None):
    """The rows whose instances are looked for."""
    file = file_of(path) if sample is None else path.with_name(path.name + ".verify-sample")
    with contextlib.closing(sqlite3.connect(file)) as db:
        return [row for (row,) in db.execute("SELECT row FROM instance ORDER BY row")]


def unanswered(found, absences=0):
    return found.unanswered(absences)


def beside(path):
    return sorted(file.name for file in path.parent.iterdir())


# --- what is wanted ---------------------------------------------------------------------------------------------------


def test_created_and_existed_rows_are_wanted_and_no_others(path):
    a_run(path, 8, others={1: "existed", 2: "rejected", 4: "pending", 6: "existed"}, finished=False)
    with opened(path) as found:
        assert (found.wanted, found.found, found.missing, found.resumed) == (6, 0, 0, False)
        assert unanswered(found) == ["id-0", "id-1", "id-3", "id-5", "id-6", "id-7"]
    assert rows_of(path) == [0, 1, 3, 5, 6, 7]


def test_a_run_that_created_nothing_has_nothing_wanted(path):
    a_run(path, 3, others=dict.fromkeys(range(3), "rejected"))
    with opened(path) as found:
        assert (found.wanted, unanswered(found), found.statuses()) == (0, [], {})


def test_unanswered_ids_come_once_each_in_row_order(path):
    a_run(path, 2_345)
    with opened(path) as found:
        assert unanswered(found) == [f"id-{n}" for n in range(2_345)]


def test_ids_answered_meanwhile_are_left_out(path, monkeypatch):
    monkeypatch.setattr(store, "PAGE_IDS", 2)
    a_run(path, 5)
    with opened(path) as found:
        ids = found.store.unanswered(0)
        assert drive(anext(ids)) == "id-0"
        for one in ("id-2", "id-4"):
            found.present(one, "running", EPOCH)
        assert [drive(anext(ids)), drive(anext(ids)), drive(anext(ids, None))] == ["id-1", "id-3", None]


# --- a sample ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [1, 2, 7, 99, 100])
def test_a_sample_has_the_given_number_of_different_rows(path, sample):
    a_run(path, 110, others=dict.fromkeys(range(0, 110, 11), "rejected") | {1: "existed"})
    with opened(path, sample) as found:
        assert found.wanted == len(unanswered(found)) == sample
    assert set(rows_of(path, 1)) <= set(range(110)) - set(range(0, 110, 11))


def test_a_sample_larger_than_the_run_is_the_whole_run(path):
    a_run(path, 8, others={3: "existed", 5: "rejected"})
    with opened(path, 1_000_000) as found:
        assert found.wanted == 7
    assert rows_of(path, 1) == [0, 1, 2, 3, 4, 6, 7]


def test_a_sample_holds_the_instances_at_the_drawn_positions(path):
    a_run(path, 10, others={0: "existed", 4: "existed"})
    in_order = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    for seed in range(8):
        with opened(path, 3, random_source=random.Random(seed).random, finished=True):
            drawn = sorted(draw_positions(3, 10, random.Random(seed).random))
            assert sorted(rows_of(path, 1)) == sorted(in_order[position] for position in drawn)


def test_every_sample_is_equally_likely():
    chance, drawn = random.Random(7), 12_000
    counts = dict.fromkeys(itertools.combinations(range(6), 3), 0)
    for _ in range(drawn):
        counts[tuple(sorted(draw_positions(3, 6, chance.random)))] += 1
    expected = drawn / len(counts)
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 43.8  # 19 degrees of freedom: one time in a thousand


@pytest.mark.parametrize("draw", [lambda: 0.0, lambda: 0.999_999_999_999_999_9, lambda: 1.0])
def test_extreme_random_numbers_draw_a_full_sample(draw):
    for total in range(1, 12):
        for number in range(1, total + 1):
            drawn = draw_positions(number, total, draw)
            assert len(drawn) == number
            assert drawn <= set(range(total))


def test_an_empty_sample_is_refused(path):
    a_run(path)
    with pytest.raises(CheckpointError, match="at least one"):
        start(path, 0)


# --- results ----------------------------------------------------------------------------------------------------------


def test_an_instance_counts_once_however_often_it_is_found(path):
    a_run(path)
    with opened(path) as found:
        found.present("id-1", "running", EPOCH)
        found.present("id-1", "complete", EPOCH)
        found.listed([("id-1", "complete"), ("id-2", "queued"), ("stranger", "queued")], None, 1, EPOCH)
        assert (found.found, found.statuses()) == (2, {"queued": 1, "running": 1})


def test_statuses_are_counted_the_most_frequent_first(path):
    a_run(path, 6)
    with opened(path) as found:
        statuses = ["waiting", "complete", "complete", "errored", "complete", "errored"]
        found.listed([(f"id-{n}", status) for n, status in enumerate(statuses)], None, 1, EPOCH)
        assert list(found.statuses().items()) == [("complete", 3), ("errored", 2), ("waiting", 1)]


def test_only_the_second_absence_makes_an_instance_missing(path):
    a_run(path)
    with opened(path) as found:
        found.absent("id-3", EPOCH)
        assert (found.missing, unanswered(found, 1), found.problems()) == (0, ["id-3"], [])
        assert "id-3" not in unanswered(found)
        found.absent("id-3", EPOCH)
        assert (found.missing, unanswered(found, 1)) == (1, [])
        found.absent("id-3", EPOCH)
        assert found.missing == 1
        assert [one.id for one in found.problems()] == ["id-3"]


def test_an_instance_absent_and_then_found_is_not_missing(path):
    a_run(path)
    with opened(path) as found:
        found.absent("id-3", EPOCH)
        found.present("id-3", "queued", EPOCH)
        found.absent("id-3", EPOCH)
        assert (found.found, found.missing, found.problems()) == (1, 0, [])


def test_the_debt_is_requests_less_instances_found_and_never_below_0(path):
    a_run(path, 6)
    with opened(path) as found:
        debts = []
        for ids, requests in ((["other"], 1), (["other"], 4), (["id-0", "id-1"], 1), (["id-0"], 1), (["id-2"], 9)):
            found.listed([(one, "queued") for one in ids], "next", requests, EPOCH)
            debts.append(found.debt)
        assert debts == [1, 5, 4, 5, 13]
        found.listed([("id-3", "queued"), ("id-4", "queued")], "next", 1, EPOCH)
        assert (found.debt, found.cursor) == (12, "next")
    with opened(path) as found:
        assert (found.resumed, found.debt, found.cursor) == (True, 12, "next")
        for _ in range(12):
            found.listed([("id-5", "queued")], None, 0, EPOCH)
        assert found.debt == 11


def test_an_id_in_two_rows_is_looked_up_once_for_both(path):
    a_run(path, 3)
    a_run(path, 2, data=lines(2, 1), others={3: "existed", 4: "existed"})  # id-1 and id-2 once more
    with opened(path) as found:
        assert (found.wanted, unanswered(found)) == (5, ["id-0", "id-1", "id-2"])
        found.present("id-1", "running", EPOCH)
        assert (found.found, found.statuses()) == (2, {"running": 2})
        found.absent("id-2", EPOCH)
        assert (unanswered(found), unanswered(found, 1)) == (["id-0"], ["id-2"])
        found.absent("id-2", EPOCH)
        assert found.missing == 2
        assert [(one.row, one.id) for one in found.problems()] == [(2, "id-2"), (4, "id-2")]


def test_problems_come_in_row_order(path):
    a_run(path, 13, others={11: "existed"})
    with opened(path) as found:
        for one in ("id-11", "id-2", "id-10"):
            found.absent(one, EPOCH)
            found.absent(one, EPOCH)
        found.present("id-9", "errored", EPOCH)
        found.present("id-1", "terminated", EPOCH)
        assert found.problems(EPOCH + HOUR_S) == [
            Finding(row=2, id="id-2", outcome="missing", message=missing("created")),
            Finding(row=9, id="id-9", outcome="errored", status="errored", message="the instance ended with an error"),
            Finding(row=10, id="id-10", outcome="missing", message=missing("created")),
            Finding(
                row=11, id="id-11", outcome="missing", message=missing("existed") + "; it may have passed its retention"
            ),
        ]


def missing(outcome):
    return f"the checkpoint calls it {outcome}, and the service has no such instance"


def test_a_missing_instance_past_its_retention_is_reported_with_a_remark(path):
    a_run(path, 100)
    row = {"instance_retention": {"success_retention": "1 hour", "error_retention": "1 hour"}}
    a_run(path, 2, data=lines(2, 100, **row))
    with opened(path) as found:
        for one in ("id-0", "id-99", "id-101"):
            found.absent(one, EPOCH)
            found.absent(one, EPOCH)
        hour_later = {one.id: "retention" in one.message for one in found.problems(EPOCH + HOUR_S + 1)}
        assert hour_later == {"id-0": False, "id-99": False, "id-101": True}
        assert all("retention" in one.message for one in found.problems(EPOCH + 3 * DAY_S + 1))


# --- a file that can't be used ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_file_is_refused_with_what_to_do(path, seed):
    a_run(path, 300)
    with opened(path) as found:
        for number in range(0, 300, 3):
            found.present(f"id-{number}", "queued", EPOCH)
    chance, data = random.Random(seed), bytearray(file_of(path).read_bytes())
    for _ in range(300):
        data[chance.randrange(100, len(data))] ^= 0xFF
    file_of(path).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"[Dd]elete it"), opened(path):
        pass


def test_a_store_of_another_format_is_replaced(path):
    a_run(path, 20)
    with opened(path) as found:
        found.present("id-0", "queued", EPOCH)
    with contextlib.closing(sqlite3.connect(file_of(path))) as db:
        db.execute("PRAGMA user_version = 99")
    with opened(path) as found:
        assert (found.resumed, found.found, found.wanted) == (False, 0, 20)


# --- interrupted and continued ----------------------------------------------------------------------------------------


def test_an_interrupted_verification_continues_where_it_was(path):
    a_run(path, 8, others={3: "existed"})
    with opened(path) as found:
        found.listed([("id-0", "queued"), ("id-1", "errored")], "first", 1, EPOCH)
        found.listed([("id-0", "queued"), ("id-2", "queued")], "second", 1, EPOCH)
        found.absent("id-3", EPOCH)
        found.absent("id-4", EPOCH)
        found.absent("id-4", EPOCH)
    with opened(path, now=EPOCH + HOUR_S) as found:
        assert found.resumed
        assert (found.wanted, found.found, found.missing) == (8, 3, 1)
        assert (found.listing, found.cursor, found.debt) == (True, "second", 0)
        assert (unanswered(found), unanswered(found, 1)) == (["id-5", "id-6", "id-7"], ["id-3"])
        assert [(one.id, one.outcome) for one in found.problems()] == [("id-1", "errored"), ("id-4", "missing")]
        found.end_listing(EPOCH)
    with opened(path) as found:
        assert not found.listing


def test_a_page_is_stored_as_a_whole_or_not_at_all(path):
    a_run(path)

    def page():
        yield "id-0", "queued"
        raise KeyboardInterrupt

    with opened(path) as found:
        with pytest.raises(KeyboardInterrupt):
            found.listed(page(), "next", 1, EPOCH)
        assert (found.found, found.cursor) == (0, None)
    with opened(path) as found:
        assert (found.found, found.statuses(), found.cursor) == (0, {}, None)


def test_the_same_sample_continues_with_the_drawn_rows(path):
    a_run(path, 200)
    with opened(path, 10):
        drawn = rows_of(path, 1)
    with opened(path, 10, random_source=random.Random(99).random) as found:
        assert found.resumed
        assert rows_of(path, 1) == drawn


def test_another_sample_is_another_verification(path):
    a_run(path, 20)
    with opened(path, 5) as found:
        found.present(f"id-{rows_of(path, 5)[0]}", "queued", EPOCH)
    with opened(path, 6) as found:
        assert (found.resumed, found.found, found.wanted) == (False, 0, 6)


def test_a_sample_does_not_end_an_interrupted_whole_verification(path):
    """Hours of asking are in its file."""
    a_run(path, 20)
    with opened(path) as found:
        found.present("id-3", "queued", EPOCH)
    with opened(path, 5, finished=True) as found:
        assert (found.resumed, found.found) == (False, 0)
    with opened(path) as found:
        assert (found.resumed, found.found, found.wanted) == (True, 1, 20)


def test_another_run_under_the_same_name_is_another_verification(path):
    a_run(path, 20)
    with opened(path) as found:
        found.present("id-0", "queued", EPOCH)
    path.unlink()
    run_virtual(write_run(path, 20, at=EPOCH + 1))
    with opened(path) as found:
        assert (found.resumed, found.found) == (False, 0)


@pytest.mark.parametrize(
    ("later_s", "resumed"),
    [(DAY_S - 1, True), (DAY_S + 1, False), (-1, True), (-DAY_S - 1, False)],
    ids=["fresh", "stale", "a clock set back", "from the future"],
)
def test_a_store_last_used_over_a_day_ago_is_replaced(path, later_s, resumed):
    a_run(path)
    with opened(path, now=EPOCH - 2 * DAY_S) as found:
        found.present("id-0", "queued", EPOCH)  # its last use counts, not its beginning
    with opened(path, now=EPOCH + later_s) as found:
        assert (found.resumed, found.found) == (resumed, int(resumed))


def test_rows_added_by_the_run_are_wanted_by_the_next_session(path):
    a_run(path, 100, finished=False)
    with opened(path) as found:
        found.present("id-7", "running", EPOCH)
        found.absent("id-8", EPOCH)
    a_run(path, 50)
    with opened(path) as found:
        assert (found.resumed, found.wanted, found.found) == (True, 150, 1)
        # The list is read again, and may show what was absent: absences count from now on.
        assert len(unanswered(found)) == 149


def test_an_instance_that_was_missing_and_is_listed_after_the_run_has_continued_is_found(path):
    a_run(path, 2, finished=False)
    with opened(path) as found:
        for _ in range(2):
            found.absent("id-0", EPOCH)
        assert found.missing == 1
    a_run(path, 1)
    with opened(path) as found:
        found.listed([(f"id-{number}", "running") for number in range(3)], None, 1, EPOCH)
        assert (found.wanted, found.found, found.missing) == (3, 3, 0)


def test_a_sample_stays_as_drawn_when_the_run_has_continued(path):
    a_run(path, 100, finished=False)
    with opened(path, 10):
        drawn = rows_of(path, 1)
    a_run(path, 50)
    with opened(path, 10) as found:
        assert found.wanted == 10
        assert rows_of(path, 1) == drawn


def test_for_added_rows_the_list_is_read_again(path):
    a_run(path, 5, finished=False)
    with opened(path) as found:
        found.end_listing(EPOCH)  # five are looked up at once
    a_run(path, 1_000)
    with opened(path) as found:
        assert found.wanted == 1_005
        assert found.listing


def test_an_empty_store_with_a_left_over_log_is_replaced(path):
    a_run(path)
    file_of(path).touch()
    file_of(path).with_name(file_of(path).name + "-wal").write_bytes(b"left over")
    with opened(path) as found:
        assert (found.resumed, found.wanted) == (False, 5)


def test_a_failed_start_does_not_hinder_the_next(path, monkeypatch):
    a_run(path)

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(store, "wanted", full)
        with pytest.raises(CheckpointError, match="Make room"):
            start(path)
    assert not Path(f"{file_of(path)}.lock").exists()
    with opened(path) as found:
        assert (found.resumed, found.wanted) == (False, 5)


# --- the end ----------------------------------------------------------------------------------------------------------


def test_a_finished_store_is_deleted_and_an_unfinished_one_kept(path):
    a_run(path)
    with opened(path):
        pass
    assert beside(path) == ["run.bulkwf", "run.bulkwf.verify", "run.bulkwf.verify-requests"]  # no log, no lock
    with opened(path) as found:
        found.report(complete=False).discard()
    assert file_of(path).exists()
    with opened(path, finished=True) as found:
        assert found.resumed
    assert beside(path) == ["run.bulkwf"]


def test_the_requests_of_the_last_five_minutes_outlast_a_finished_verification(path):
    a_run(path)
    with opened(path, finished=True) as found:
        found.requests.sent(EPOCH)
    assert beside(path) == ["run.bulkwf", "run.bulkwf.verify-requests"]
    with opened(path, now=EPOCH + 299, finished=True):
        pass
    assert beside(path) == ["run.bulkwf", "run.bulkwf.verify-requests"]
    with opened(path, now=EPOCH + 301, finished=True):
        pass
    assert beside(path) == ["run.bulkwf"]


def test_a_finished_store_that_another_verification_has_opened_is_not_deleted(path):
    a_run(path)
    with opened(path):
        pass
    with opened(path) as found:
        found.report(complete=True).discard()
        assert file_of(path).exists()
        found.present("id-0", "queued", EPOCH)
    with opened(path) as found:
        assert (found.resumed, found.found) == (True, 1)


def test_the_checkpoint_is_not_changed(path):
    a_run(path, 50)
    before = path.read_bytes()
    with opened(path) as found:
        for number in range(50):
            found.absent(f"id-{number}", EPOCH)
            found.absent(f"id-{number}", EPOCH)
        assert len(found.problems()) == 50
    assert path.read_bytes() == before


def test_the_files_are_private(path):
    a_run(path)
    with opened(path):
        for name in ("", "-wal", "-shm", ".lock"):
            assert stat.S_IMODE(Path(f"{file_of(path)}{name}").stat().st_mode) == 0o600


# --- foreign files, locks and permissions -----------------------------------------------------------------------------


def test_a_database_of_another_program_is_refused_and_not_changed(path):
    a_run(path)
    with contextlib.closing(sqlite3.connect(file_of(path))) as db:
        db.execute("CREATE TABLE verification (run)")
    before = file_of(path).read_bytes()
    with pytest.raises(CheckpointError, match="another file has it"):
        start(path)
    assert file_of(path).read_bytes() == before
    assert beside(path) == ["run.bulkwf", "run.bulkwf.verify"]


@pytest.mark.parametrize("what", ["text", "torn"])
def test_a_file_that_is_no_store_is_refused_and_not_changed(path, what):
    a_run(path, 100)
    with opened(path):
        pass
    data = b"my own notes\n" * 400 if what == "text" else file_of(path).read_bytes()[:5_000]
    file_of(path).write_bytes(data)
    with pytest.raises(CheckpointError) as raised:
        start(path)
    assert str(file_of(path)) in str(raised.value)
    assert "Restore" not in str(raised.value)  # there is nothing to restore,
    assert "-c" not in re.findall(r"[\w-]+", str(raised.value))  # and `verify` has no such flag
    assert file_of(path).read_bytes() == data


def test_a_folder_of_that_name_is_refused(path):
    a_run(path)
    file_of(path).mkdir()
    with pytest.raises(CheckpointError):
        start(path)
    assert not Path(f"{file_of(path)}.lock").exists()


def test_a_world_writable_file_is_refused(path):
    a_run(path)
    with opened(path):
        pass
    file_of(path).chmod(0o666)
    with pytest.raises(CheckpointError, match="chmod 600"):
        start(path)


def verify(path, **more):
    """The command, as far as it comes before it would send anything."""
    return bulkwf("verify", path, "--base-url", HEADER.base_url, **more)


@pytest.mark.parametrize("made_up", ["../../user/tokens", "a/b", "-a", "batch"])
def test_a_forged_id_is_refused(path, made_up):
    a_run(path)
    with opened(path) as found:
        found.store._db.execute("UPDATE instance SET id = ? WHERE row = 3", (made_up,))
        with pytest.raises(CheckpointError, match=r"it holds an id that no run writes\. .* delete it"):
            unanswered(found)


def test_a_second_verification_of_a_checkpoint_is_refused_naming_the_first(path):
    a_run(path)
    with opened(path) as found:
        found.present("id-0", "queued", EPOCH)
        ended = verify(path)
        assert ended.code == 4
        assert f"verified already (pid {os.getpid()} on {socket.gethostname()})" in ended.err
        found.present("id-1", "queued", EPOCH)
    with opened(path) as found:
        assert found.found == 2


def test_a_symbolic_link_leads_to_the_same_store(path, folder):
    """Or two verifications of one run would each believe to be alone."""
    a_run(path)
    Path("elsewhere").mkdir()
    link = folder / "elsewhere" / "link"
    link.symlink_to(path)
    with opened(link):
        assert file_of(path).exists()
        with pytest.raises(CheckpointError, match="verified already"):
            start(path)


def test_a_read_only_folder_is_refused_with_advice(path):
    a_run(path)
    path.parent.chmod(0o555)
    try:
        ended = verify(path, prefix=UNPRIVILEGED)
    finally:
        path.parent.chmod(0o755)
    assert ended.code == 4
    assert "Permission denied" in ended.err
    assert "Verify a copy of the checkpoint elsewhere" in ended.err
    assert beside(path) == ["run.bulkwf"]


def test_on_a_full_disk_no_half_page_is_stored_and_with_more_room_it_continues(path):
    a_run(path, 1_000)
    page = [(f"id-{n}", "a status of many words " * 20) for n in range(1_000)]
    with opened(path) as found:
        size = found.store._db.execute("PRAGMA page_count").fetchone()[0]
        found.store._db.execute(f"PRAGMA max_page_count = {size + 10}")
        found.present("id-5", "queued", EPOCH)
        with pytest.raises(CheckpointError, match="Make room on the disk and run the same command again"):
            found.listed(page, "next", 1, EPOCH)
    with opened(path) as found:
        assert (found.resumed, found.found, found.cursor) == (True, 1, None)
        found.listed(page, "next", 1, EPOCH)
        assert found.found == 1_000
