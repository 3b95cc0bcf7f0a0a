"""Lists: files, pipes and gzip, unusual line endings, unreadable and very large lists; and scarce resources."""

import gzip
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from command import (
    HERE,
    UNPRIVILEGED,
    Running,
    bulkwf,
    emulator,
    ids,
    measured,
    outcomes,
    row,
    shell,
    write_rows,
)

from bulkwf import read_results

pytestmark = pytest.mark.slow

RUN = "bulkwf run {} -w resize --emulate --rate unlimited --request-rate unlimited -c done"


def created():
    return [result.id for result in read_results("done", outcome="created")]


@contextmanager
def stdin_from(script):
    """The output of a Python program, to be read from a pipe."""
    with subprocess.Popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE) as program:
        yield program.stdout


# --- forms of a list ----------------------------------------------------------------------------------------------


def test_several_files_are_one_list_in_their_order_and_places_name_the_file(folder):
    write_rows("a.jsonl", 120, "a")
    Path("b.jsonl").write_text(row(0, "b") + "nonsense\n" + row(1, "b"))
    ended = bulkwf("run", "a.jsonl", "b.jsonl", *HERE, "-c", "done")
    assert ended.code == 1
    assert "b.jsonl:2: " in ended.err
    assert created() == [*(f"a-{n}" for n in range(120)), "b-0", "b-1"]
    assert [result.row for result in read_results("done", outcome="invalid")] == [121]


@pytest.mark.parametrize("way", ["cat rows.jsonl | " + RUN.format("-"), RUN.format("-") + " < rows.jsonl"])
def test_standard_input_is_a_list_from_a_pipe_and_from_a_file(folder, way):
    write_rows("rows.jsonl", 250)
    assert shell(way).code == 0
    assert created() == [f"row-{n}" for n in range(250)]


def test_a_process_substitution_and_dev_stdin_are_lists(folder):
    write_rows("rows.jsonl", 250)
    assert shell(RUN.format("<(cat rows.jsonl)")).code == 0
    assert len(created()) == 250
    assert shell("cat rows.jsonl | " + RUN.replace("done", "again").format("/dev/stdin")).code == 0
    assert outcomes("again") == {"created": 250}


def test_files_around_standard_input_are_one_list(folder):
    write_rows("a.jsonl", 3, "a")
    write_rows("b.jsonl", 3, "b")
    ended = shell('printf \'{"instance_id":"mid"}\\nbad\\n\' | ' + RUN.format("a.jsonl - b.jsonl"))
    assert ended.code == 1
    assert "stdin:2: " in ended.err
    assert created() == ["a-0", "a-1", "a-2", "mid", "b-0", "b-1", "b-2"]


def test_gzip_is_recognised_by_its_first_bytes_in_a_file_and_from_a_pipe(folder):
    write_rows("rows.jsonl", 250)
    packed = gzip.compress(Path("rows.jsonl").read_bytes()[:5_000]) + gzip.compress(
        Path("rows.jsonl").read_bytes()[5_000:]
    )
    Path("rows.jsonl.gz").write_bytes(packed)
    Path("unnamed").write_bytes(packed)
    assert bulkwf("run", "rows.jsonl.gz", *HERE, "-c", "done").code == 0
    assert len(created()) == 250
    assert bulkwf("run", "unnamed", *HERE, "-c", "unnamed.done").code == 0
    assert outcomes("unnamed.done") == {"created": 250}
    assert shell("cat unnamed | " + RUN.replace("done", "piped").format("-")).code == 0
    assert outcomes("piped") == {"created": 250}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b'{"instance_id":"a"}\n{"instance_id":"b"}', id="no newline at the end"),
        pytest.param(b'\xef\xbb\xbf{"instance_id":"a"}\n{"instance_id":"b"}\n', id="byte order mark"),
        pytest.param(b'{"instance_id":"a"}\r\n{"instance_id":"b"}\r\n', id="CRLF"),
        pytest.param(b'\n\n{"instance_id":"a"}\n \t\n{"instance_id":"b"}\n\n', id="blank lines"),
    ],
)
def test_unusual_line_endings_and_byte_order_marks_are_accepted(folder, text):
    Path("rows.jsonl").write_bytes(text)
    assert bulkwf("run", "rows.jsonl", *HERE, "-c", "done").code == 0
    assert created() == ["a", "b"]


def test_a_file_without_a_last_newline_ends_its_row_and_each_file_may_have_a_mark(folder):
    for name in ("a", "b"):
        Path(name).write_bytes(b'\xef\xbb\xbf{"instance_id":"%s"}' % name.encode())
    assert bulkwf("run", "a", "b", *HERE, "-c", "done").code == 0
    assert created() == ["a", "b"]


def test_blank_lines_keep_their_numbers(folder):
    Path("rows.jsonl").write_text('\n\n{"instance_id":"a"}\n\nbad\n')
    assert "rows.jsonl:5: " in bulkwf("run", "rows.jsonl", *HERE, "-c", "done").err
    assert [(result.row, result.outcome) for result in read_results("done")] == [(2, "created"), (4, "invalid")]


def test_rows_from_a_slow_pipe_are_sent_before_it_ends(folder):
    reader, writer = os.pipe()
    with (
        emulator() as service,
        os.fdopen(writer, "w") as pipe,
        os.fdopen(reader) as stdin,
        Running("run", "-", *service.flags(), "-c", "done", stdin=stdin) as run,
    ):
        for number in range(3):
            pipe.write(row(number))
            pipe.flush()
            service.has_created(number + 1)
        pipe.close()
        assert run.wait().code == 0
    assert outcomes("done") == {"created": 3}


# --- lists that can't be read -------------------------------------------------------------------------------------


def test_a_missing_list_or_a_folder_exits_with_4_before_anything_is_sent(folder):
    write_rows("rows.jsonl", 10)
    Path("sub").mkdir()
    with emulator() as service:
        for wrong, reason in (("none.jsonl", "No such file"), ("sub", "folder")):
            ended = bulkwf("run", "rows.jsonl", wrong, *service.flags(), "-c", "done")
            assert ended.code == 4
            assert f"{wrong}: the input" in ended.err
            assert reason in ended.err
            assert bulkwf("check", "rows.jsonl", wrong).code == 4
        assert not service.created
    assert not Path("done").exists()


def test_a_list_without_read_permission_exits_with_4(folder):
    Path(write_rows("rows.jsonl", 10)).chmod(0)
    for arguments in (("run", "rows.jsonl", *HERE), ("check", "rows.jsonl")):
        ended = bulkwf(*arguments, prefix=UNPRIVILEGED)
        assert ended.code == 4
        assert "rows.jsonl: the input can't be read: Permission denied" in ended.err


@pytest.mark.parametrize("damage", ["cut", "garbled"])
def test_a_damaged_gzip_file_exits_with_4_and_the_repaired_one_finishes(folder, damage):
    write_rows("rows.jsonl", 20_000)
    whole = gzip.compress(Path("rows.jsonl").read_bytes())
    middle = len(whole) // 2
    Path("rows.gz").write_bytes(whole[:middle] + (b"" if damage == "cut" else b"\xff" * 500 + whole[middle + 500 :]))
    with emulator() as service:
        ended = bulkwf("run", "rows.gz", *service.flags())
        assert ended.code == 4
        assert "rows.gz: the gzip file is " in ended.err
        assert "Mend it and run the same command again" in ended.err
        assert not service.created  # damaged data can look like rows
        Path("rows.gz").write_bytes(whole)
        assert bulkwf("run", "rows.gz", *service.flags()).code == 0
        assert service.created == Counter(ids(20_000))


def test_a_list_whose_name_is_not_utf_8_runs(folder):
    name = os.fsdecode(b"r\xe9sum\xe9.jsonl")
    write_rows(name, 10)
    ended = bulkwf("run", name, *HERE, "--json")
    assert ended.code == 0
    assert ended.summary["created"] == 10


# --- lists that are enormous, machines that are small -------------------------------------------------------------

LONG_LINE = """
import sys
write = sys.stdout.buffer.write
write(b'{"instance_id":"a"}\\n{"params":"')
for _ in range(1000):
    write(b"x" * 1_000_000)
write(b'"}\\n{"instance_id":"b"}\\n')
"""


def test_a_line_of_a_gigabyte_is_invalid_and_never_held_in_memory(folder):
    with stdin_from(LONG_LINE) as stdin:
        ended = measured("run", "-", *HERE, "-c", "done", stdin=stdin)
    assert ended.code == 1
    assert created() == ["a", "b"]
    (long,) = read_results("done", outcome="invalid")
    assert (long.row, long.code) == (1, "row_too_long")
    assert "1,000,000,0" in long.message
    assert ended.peak_mb < 120


def test_two_hundred_thousand_invalid_rows_take_little_time_and_no_memory(folder, record_property):
    peaks = []
    for rows in (20_000, 200_000):
        Path("rows.jsonl").write_text("nonsense\n" * rows)
        begun = time.monotonic()
        ended = measured("run", "rows.jsonl", *HERE, "-c", f"done-{rows}", "--json")
        elapsed_s = time.monotonic() - begun
        assert ended.code == 1
        assert ended.summary.items() >= {"invalid": rows, "created": 0, "attempts": 0}.items()
        peaks.append(ended.peak_mb)
    record_property("invalid_rows_per_s", rows / elapsed_s)
    assert elapsed_s < 40
    assert max(peaks) < 120
    assert peaks[1] < peaks[0] + 12
    assert ended.err.count("\n") < 30  # a few examples, not all of them


def test_memory_does_not_grow_with_the_length_of_the_list(folder):
    peaks = []
    with emulator() as service:
        for rows in (5_000, 100_000):
            write_rows("rows.jsonl", rows)
            ended = measured("run", "rows.jsonl", *service.flags(f"w{rows}"), "-c", f"done-{rows}")
            assert ended.code == 0
            peaks.append(ended.peak_mb)
    assert max(peaks) < 100
    assert peaks[1] < peaks[0] + 10


def test_too_few_file_descriptors_exit_with_2_and_the_advice_works(folder):
    rows = write_rows("rows.jsonl", 250)
    with emulator() as service:
        few = {resource.RLIMIT_NOFILE: 55}
        ended = bulkwf("run", rows, *service.flags(), limits=few)
        assert ended.code == 2
        assert "Lower --concurrency to 7 or less" in ended.err
        assert bulkwf("run", rows, *service.flags(), "--concurrency", "7", limits=few).code == 0
        assert service.created == Counter(ids(250))
    ended = bulkwf("run", rows, *HERE, limits=few)
    assert "Lower --concurrency to 3 or less" in ended.err  # this process has the sockets of the service, too
    assert bulkwf("run", rows, *HERE, "--concurrency", "3", limits=few).code == 0
    ended = bulkwf("run", rows, *HERE, limits={resource.RLIMIT_NOFILE: 40})
    assert ended.code == 2
    assert "Raise the limit (ulimit -n)" in ended.err


def test_a_soft_limit_of_file_descriptors_is_raised_as_far_as_needed(folder):
    write_rows("rows.jsonl", 250)
    ended = shell("ulimit -S -n 30; " + RUN.format("rows.jsonl"))
    assert ended.code == 0
    assert outcomes("done") == {"created": 250}


def test_a_pipe_is_read_no_faster_than_its_rows_are_sent(folder):
    """Backpressure: while the service does not answer, a writer to the pipe has to wait."""
    reader, writer = os.pipe()
    written = 0

    def feed():
        nonlocal written
        line = row(0, "x" * 90).encode() * 600
        with os.fdopen(writer, "wb", buffering=0) as pipe:
            try:
                while written < 400_000_000:
                    written += pipe.write(line)
            except BrokenPipeError:
                return

    with emulator(faults=[{"method": "POST", "hang": True}]) as service, os.fdopen(reader) as stdin:
        with Running("run", "-", *service.flags(), "-c", "done", "--drain-timeout", "0s", stdin=stdin) as run:
            stdin.close()
            feeding = threading.Thread(target=feed)
            feeding.start()
            run.listens()
            before = -1
            while written > before or not written:  # until the writer waits
                before = written
                time.sleep(1)
            run.signal(signal.SIGTERM)
            assert run.wait().code == 143
        feeding.join()
    assert 0 < written < 20_000_000
