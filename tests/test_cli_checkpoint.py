"""Exit code 4: a checkpoint that is locked, another run's, damaged, gone or on a full disk, and a list that changed."""

import contextlib
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from command import HERE, UNPRIVILEGED, Forker, Running, bulkwf, emulator, ids, outcomes, row, until, write_rows

pytestmark = pytest.mark.slow

ANSWERS_NEVER = [{"method": "POST", "hang": True}]


@pytest.fixture
def rows(folder):
    """A list of 250 rows."""
    return write_rows("rows.jsonl", 250)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Runs a command in a forked process."""
    with Forker(tmp_path_factory.mktemp("outputs")) as forker:
        yield forker


@pytest.fixture
def done(rows, quick):
    """The checkpoint of a finished run over that list."""
    assert quick("run", rows, *HERE, "-c", "done").code == 0
    return "done"


# --- the list is not the one that the run began with --------------------------------------------------------------


def test_a_changed_row_is_refused_naming_its_place(rows, done, quick):
    lines = Path(rows).read_text().splitlines(keepends=True)
    lines[120] = lines[120].replace("120", "999")
    Path(rows).write_text("".join(lines))
    for _ in range(2):  # the first one does not forget what the list was
        ended = quick("run", rows, *HERE, "-c", done)
        assert ended.code == 4
        assert "something between rows.jsonl:101 and rows.jsonl:200 has changed" in ended.err
        assert re.search(r"rows\.jsonl had [0-9,]+ bytes, last changed .*; it has [0-9,]+ bytes now", ended.err)
    assert outcomes(done) == {"created": 250}


def test_a_list_that_shrank_is_refused(rows, done, quick):
    write_rows(rows, 240)
    ended = quick("run", rows, *HERE, "-c", done)
    assert ended.code == 4
    assert "the list ends before row 250" in ended.err


def test_an_emptied_list_is_refused(rows, done, quick):
    Path(rows).write_text("")
    assert quick("run", rows, *HERE, "-c", done).code == 4


def test_a_list_that_shrinks_during_the_run_ends_it_and_restored_it_finishes(folder, quick):
    padding = "x" * 1_000
    whole = "".join(f'{{"instance_id":"row-{n}","params":"{padding}"}}\n' for n in range(5_000))
    Path("rows.jsonl").write_text(whole)  # longer than what is read ahead
    with (
        emulator(faults=[{"method": "POST", "latency_s": 0.05, "times": 30}]) as service,
        Running("run", "rows.jsonl", *service.flags(), "--concurrency", "1") as run,
    ):
        service.has_created(100)
        os.truncate("rows.jsonl", 100)
        ended = run.wait()
        assert ended.code == 4
        assert "the file shrank" in ended.err
        Path("rows.jsonl").write_text(whole)
        assert quick("run", "rows.jsonl", *service.flags()).code == 0
        assert service.created == Counter(ids(5_000))
    assert outcomes("rows.jsonl.bulkwf")["pending"] == 0


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("-w", "other"), "workflow is 'resize', this run's is 'other'"),
        (("-a", "other"), "account id is 'emulated', this run's is 'other'"),
        (("--row-shape", "params"), "row shape"),
        (("--id-template", "row-{n}"), "id scheme"),
        (("--run-key", "other"), "run key"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_saying_what_differs(rows, done, flags, what, quick):
    here = HERE if "-w" not in flags else HERE[2:]
    ended = quick("run", rows, *here, *flags, "-c", done)
    assert ended.code == 4
    assert what in ended.err


# --- the file -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_a_live_run_holds_is_refused_naming_that_run(rows, quick):
    with emulator(faults=ANSWERS_NEVER) as service:
        words = ("run", rows, *service.flags(), "--drain-timeout", "0s")
        with Running(*words) as holder:
            holder.listens()
            ended = quick(*words)
            holder.signal(signal.SIGTERM)
            assert holder.wait().code == 143
    assert ended.code == 4
    assert f"another run is writing this checkpoint (pid {holder.process.pid} on " in ended.err


def test_the_lock_of_a_killed_run_does_not_stop_the_next_run(rows, quick):
    with emulator(faults=[{"method": "POST", "hang": True, "when": "after", "times": 3}]) as service:
        with Running("run", rows, *service.flags()) as run:
            service.has_created(250)
            run.signal(signal.SIGKILL)
            run.process.wait()
        assert Path("rows.jsonl.bulkwf.lock").exists()
        assert quick("run", rows, *service.flags()).code == 0
        assert service.created == Counter(ids(250))


def _spoil(at: int, size: int = 4_096):
    def spoil(file: Path) -> None:
        data = file.read_bytes()
        file.write_bytes(data[:at] + b"\xa5" * size + data[at + size :])

    return spoil


def _page_of(table: str, file: Path) -> int:
    with contextlib.closing(sqlite3.connect(file)) as db:
        return 4_096 * (db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()[0] - 1)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(_spoil(0, 100), id="header"),
        pytest.param(_spoil(100, 100), id="schema"),
        pytest.param(lambda file: _spoil(_page_of("run", file))(file), id="run"),
        pytest.param(lambda file: _spoil(_page_of("batch", file))(file), id="batch"),
        pytest.param(
            lambda file: _spoil(_page_of("attempt", file))(file),
            id="attempt",
        ),
        pytest.param(lambda file: os.truncate(file, 5_000), id="truncated"),
        pytest.param(lambda file: file.write_text("{}\n"), id="text"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_not_changed(rows, done, spoil, quick):
    spoil(Path(done))
    damaged = Path(done).read_bytes()
    ended = quick("run", rows, *HERE, "-c", done)
    assert ended.code == 4
    assert "done: " in ended.err
    assert Path(done).read_bytes() == damaged


@pytest.mark.parametrize("command", ["status", "results"])
def test_status_and_results_of_another_file_exit_with_4(rows, command, quick):
    Path("empty").touch()
    with contextlib.closing(sqlite3.connect("other.db")) as db:
        db.execute("CREATE TABLE run (a)")
    for name in (rows, "empty", "other.db", "none.db", "."):
        ended = quick(command, name)
        assert ended.code == 4
        assert ended.out == ""
        assert not Path("none.db").exists()


def test_a_checkpoint_of_a_newer_format_is_refused(rows, done, quick):
    with contextlib.closing(sqlite3.connect(done)) as db:
        db.execute("PRAGMA user_version = 99")
    for words in (("run", rows, *HERE, "-c", done), ("status", done), ("results", done)):
        ended = quick(*words)
        assert ended.code == 4
        assert "Update bulkwf" in ended.err


def test_a_list_named_as_its_own_checkpoint_is_refused_and_not_changed(rows, quick):
    before = Path(rows).read_bytes()
    assert quick("run", rows, *HERE, "-c", rows).code == 4
    assert Path(rows).read_bytes() == before


def test_new_refuses_a_run_that_is_not_finished(rows, quick):
    with emulator(faults=[{"status": 403}]) as service:
        assert quick("run", rows, *service.flags()).code == 3
        ended = quick("run", rows, *service.flags(), "--new")
        assert ended.code == 4
        assert "not finished" in ended.err
        assert outcomes("rows.jsonl.bulkwf")["pending"] == 250


def test_deleting_the_checkpoint_during_a_run_stops_it_with_advice(folder, quick):
    rows = write_rows("rows.jsonl", 10_000)
    with (
        emulator(faults=[{"method": "POST", "latency_s": 0.02}]) as service,
        Running("run", rows, *service.flags(), "--concurrency", "2") as run,
    ):
        service.has_created(300)
        Path("rows.jsonl.bulkwf").unlink()
        ended = run.wait()
        assert ended.code == 4
        assert "moved, replaced or deleted" in ended.err
        assert len(service.created) < 10_000
        # The log shows that there was a run: starting over needs the user's decision.
        again = quick("run", rows, *service.flags())
        assert again.code == 4
        assert "the checkpoint is gone or empty, but its log is there" in again.err
        Path("rows.jsonl.bulkwf-wal").unlink()
        # These rows have ids of their own, so that starting over is safe even so.
        assert quick("run", rows, *service.flags()).code == 0
        assert service.created == Counter(ids(10_000))


def test_a_killed_runs_checkpoint_copied_without_its_log_starts_no_row_twice(folder, quick):
    Path("rows.jsonl").write_text("".join(f'{{"params":{{"n":{n}}}}}\n' for n in range(600)))
    Path("moved").mkdir()
    with emulator(faults=[{"method": "POST", "hang": True, "when": "after", "from": 3, "times": 1}]) as service:
        with Running("run", "rows.jsonl", *service.flags(), "--concurrency", "1") as run:
            service.has_created(300)
            run.signal(signal.SIGKILL)
            run.process.wait()
        shutil.copy("rows.jsonl.bulkwf", "moved/copy")
        status = quick("status", "moved/copy", "--json")
        assert (status.code, status.summary["log_missing"], status.summary["rows"]) == (0, True, 0)
        assert "its log (copy-wal) is missing: what it did last may not be shown" in status.err
        assert "its log (copy-wal) is missing" in quick("results", "moved/copy").err
        assert quick("status", "rows.jsonl.bulkwf").err == ""
        ended = quick("run", "rows.jsonl", *service.flags(), "-c", "moved/copy")
        assert ended.code == 0
        assert "The run continues: rows get the same ids as before" in ended.err
        assert set(service.created_params.values()) == {1}
        assert len(service.created_params) == 600
    assert outcomes("moved/copy") == {"created": 300, "existed": 300}


def test_a_checkpoint_in_a_read_only_folder_is_refused(rows):
    Path("sealed").mkdir(mode=0o555)
    ended = bulkwf("run", rows, *HERE, "-c", "sealed/done", prefix=UNPRIVILEGED)
    assert ended.code == 4
    assert "Permission denied" in ended.err
    assert "with -c" in ended.err
    Path("sealed").chmod(0o755)


def test_a_read_only_checkpoint_is_refused_by_run_and_can_be_read(rows, done):
    Path(done).chmod(0o400)
    ended = bulkwf("run", rows, *HERE, "-c", done, prefix=UNPRIVILEGED)
    assert ended.code == 4
    assert "readonly" in ended.err
    Path("sealed").mkdir()
    Path(done).rename("sealed/done")
    Path("sealed").chmod(0o555)
    assert len(bulkwf("results", "sealed/done", prefix=UNPRIVILEGED).lines) == 250
    assert bulkwf("status", "sealed/done", prefix=UNPRIVILEGED).code == 0
    Path("sealed").chmod(0o755)


def test_a_killed_runs_checkpoint_can_be_read_in_a_read_only_folder(rows):
    with (
        emulator(faults=[{"method": "POST", "hang": True, "from": 2}]) as service,
        Running("run", rows, *service.flags(), "--concurrency", "1") as run,
    ):
        service.has_created(100)
        until(lambda: outcomes("rows.jsonl.bulkwf").get("created") == 100, "100 rows are settled")
        run.signal(signal.SIGKILL)
        run.wait()
    assert Path("rows.jsonl.bulkwf-wal").exists()
    folder = Path.cwd()
    folder.chmod(0o555)
    assert len(bulkwf("results", "rows.jsonl.bulkwf", prefix=UNPRIVILEGED).lines) == 100
    folder.chmod(0o755)


def test_a_world_writable_checkpoint_is_refused(rows, done, quick):
    Path(done).chmod(0o666)
    ended = quick("run", rows, *HERE, "-c", done)
    assert ended.code == 4
    assert "chmod 600" in ended.err


def test_a_checkpoint_is_private(done):
    assert Path(done).stat().st_mode & 0o777 == 0o600


def test_a_file_size_limit_stops_the_run_and_the_next_run_loses_nothing(folder, quick):
    rows = write_rows("rows.jsonl", 10_000)
    with emulator() as service:
        ended = bulkwf("run", rows, *service.flags(), limits={resource.RLIMIT_FSIZE: 90_000})
        assert ended.code == 4
        assert "Make room on the disk" in ended.err
        assert 0 < len(service.created) < 10_000
        assert quick("run", rows, *service.flags()).code == 0
        assert service.created == Counter(ids(10_000))
    assert set(outcomes("rows.jsonl.bulkwf")) <= {"created", "existed"}


@pytest.fixture
def small_disk(folder):
    """The folder of a file system of 300 KB."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("NOT TESTED: only root may mount a file system; a file size limit is tested instead")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_stops_the_run_and_the_next_run_loses_nothing(small_disk, quick):
    rows = write_rows("rows.jsonl", 20_000)
    with emulator() as service:
        words = ("run", rows, *service.flags(), "-c", small_disk / "done")
        ended = quick(*words)
        assert ended.code == 4
        assert "Make room on the disk" in ended.err
        assert 0 < len(service.created) < 20_000
        subprocess.run(["mount", "-o", "remount,size=30m", small_disk], check=True)
        assert quick(*words).code == 0
        assert service.created == Counter(ids(20_000))
    assert set(outcomes(small_disk / "done")) <= {"created", "existed"}


def test_a_run_leaves_one_file(rows, done):
    assert [file.name for file in Path().glob("done*")] == ["done"]


def test_the_same_list_can_be_resumed_from_another_folder(rows, done, monkeypatch, quick):
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    with Path("../rows.jsonl").open("a") as file:
        file.write(row(250))
    assert quick("run", "../rows.jsonl", *HERE, "-c", "../done").code == 0
    until(lambda: outcomes("../done") == {"created": 251}, "the row that was added")
