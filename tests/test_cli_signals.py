"""Signals: the first one drains, the second one aborts, and the printed command finishes the list."""

import os
import shlex
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from command import Running, bulkwf, emulator, ids, outcomes, row, shell, until, write_rows

from bulkwf import read_results

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real time")]

ANSWERS_LATE = {"method": "POST", "times": 4, "latency_s": 1.0, "when": "after"}
"""Four batches are created at once and answered a second later."""
NEVER_ANSWERS = {"method": "POST", "hang": True, "when": "after"}


def created(checkpoint):
    return {result.id for result in read_results(checkpoint, outcome="created")}


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=str,
)
def test_the_first_signal_drains_and_the_printed_command_finishes_the_list(folder, number, code):
    rows = write_rows("the rows' list.jsonl", 1_000)
    with (
        emulator(faults=[ANSWERS_LATE]) as service,
        Running("run", rows, *service.flags(), "--concurrency", "4") as run,
    ):
        service.has_created(400)  # and none of them is answered yet
        run.signal(number)
        ended = run.wait()
        assert ended.code == code
        assert signal.Signals(number).name in ended.err
        assert created(f"{rows}.bulkwf") == set(service.created)
        assert len(service.created) == 400
        assert shlex.split(ended.resume_command)[1:5] == ["-m", "bulkwf", "run", rows]
        assert shell(ended.resume_command).code == 0
        assert service.created == Counter(ids(1_000))
    assert outcomes(f"{rows}.bulkwf") == {"created": 1_000}


def test_a_drained_run_prints_its_summary_and_leaves_one_portable_file(folder):
    rows = write_rows("rows.jsonl", 1_000)
    with (
        emulator(faults=[ANSWERS_LATE]) as service,
        Running("run", rows, *service.flags(), "--concurrency", "4", "--json") as run,
    ):
        service.has_created(400)
        run.signal(signal.SIGTERM)
        ended = run.wait()
    assert ended.summary.items() >= {"created": 400, "complete": False, "exit_code": 143}.items()
    assert [file.name for file in Path().glob("rows.jsonl.bulkwf*")] == ["rows.jsonl.bulkwf"]


def test_a_silent_service_does_not_delay_the_end_beyond_the_drain_timeout(folder):
    rows = write_rows("rows.jsonl", 1_000)
    with emulator(faults=[NEVER_ANSWERS]) as service:
        arguments = ("run", rows, *service.flags(), "--concurrency", "2", "--timeout", "10m", "--drain-timeout")
        with Running(*arguments, "1s") as run:
            service.has_created(200)
            run.signal(signal.SIGTERM)
            signalled = time.monotonic()
            ended = run.wait()
            drained_s = time.monotonic() - signalled
    assert ended.code == 143
    assert 0.9 < drained_s < 20
    assert set(outcomes("rows.jsonl.bulkwf")) == {"pending"}


def test_the_second_signal_aborts_and_the_next_run_settles_rows_in_doubt(folder):
    rows = write_rows("rows.jsonl", 1_000)
    with emulator(faults=[NEVER_ANSWERS | {"times": 2}]) as service:
        arguments = ("run", rows, *service.flags(), "--concurrency", "2", "--timeout", "10m", "--drain-timeout", "9m")
        with Running(*arguments) as run:
            service.has_created(200)
            run.signal(signal.SIGTERM)
            run.says("a second signal stops at once")
            run.signal(signal.SIGINT)
            ended = run.wait(30)  # the test is that it ends by then
        assert ended.code == 143
        assert outcomes("rows.jsonl.bulkwf")["pending"] >= 200
        assert shell(ended.resume_command).code == 0
        assert service.created == Counter(ids(1_000))
    assert outcomes("rows.jsonl.bulkwf") == {"created": 800, "existed": 200}
    assert all(result.in_doubt for result in read_results("rows.jsonl.bulkwf", outcome="existed"))


def test_a_signal_ends_a_run_that_waits_for_its_list(folder):
    reader, writer = os.pipe()
    with (
        emulator() as service,
        os.fdopen(writer, "w") as pipe,
        os.fdopen(reader) as stdin,
        Running("run", "-", *service.flags(), "-c", "done", stdin=stdin) as run,
    ):
        pipe.writelines(row(number) for number in range(100))
        pipe.flush()
        service.has_created(100)
        run.signal(signal.SIGTERM)
        ended = run.wait(30)  # while the pipe is open
    assert ended.code == 143
    assert outcomes("done") == {"created": 100}


def test_a_signal_ends_a_run_that_waits_for_a_named_pipe(folder):
    os.mkfifo("list")
    with emulator() as service, Running("run", "list", *service.flags(), "-c", "done") as run:
        run.listens()
        run.signal(signal.SIGTERM)
        run.says("a second signal stops at once")
        assert run.process.wait(5) == 143


def test_a_signal_ends_a_run_that_waits_for_the_rate(folder):
    rows = write_rows("rows.jsonl", 100_000)  # the rate allows 100 of them per second
    with (
        emulator() as service,
        Running("run", rows, "-w", "resize", "--base-url", service.base_url) as run,
    ):
        service.has_created(100)
        run.signal(signal.SIGINT)
        ended = run.wait(30)
        assert ended.code == 130
        assert created("rows.jsonl.bulkwf") == set(service.created)


def test_a_signal_ends_a_run_during_an_outage(folder):
    rows = write_rows("rows.jsonl", 1_000)
    with (
        emulator(faults=[{"status": 429, "retry_after": 600}]) as service,
        Running("run", rows, *service.flags()) as run,
    ):
        # The pause is durable as soon as the checkpoint has it.
        paused = "all sending is paused until"
        until(lambda: paused in shell("bulkwf status rows.jsonl.bulkwf").out, "the pause in the checkpoint")
        run.signal(signal.SIGINT)
        ended = run.wait(30)
    assert ended.code == 130
    assert outcomes("rows.jsonl.bulkwf")["created"] == 0


def test_a_run_under_nohup_does_not_end_with_its_terminal(folder):
    rows = write_rows("rows.jsonl", 1_000)
    with (
        emulator(faults=[ANSWERS_LATE]) as service,
        Running("run", rows, *service.flags(), "--concurrency", "4", ignored=[signal.SIGHUP]) as run,
    ):
        service.has_created(400)
        run.signal(signal.SIGHUP)
        assert run.wait().code == 0
        assert service.created == Counter(ids(1_000))


def test_an_emulator_under_nohup_does_not_end_with_its_terminal(folder):
    start = partial(Running, ignored=[signal.SIGHUP])
    with emulator(start=start) as service:
        service._running.listens()
        service._running.signal(signal.SIGHUP)
        assert bulkwf("run", write_rows("rows.jsonl", 10), *service.flags()).code == 0
        assert service.stop().code == 0


def test_a_check_under_nohup_does_not_end_with_its_terminal(folder):
    os.mkfifo("rows.jsonl")
    with Running("check", "rows.jsonl", ignored=[signal.SIGHUP]) as run:
        run.listens()
        run.signal(signal.SIGHUP)
        Path("rows.jsonl").write_text(row(1))
        assert run.wait().code == 0


def test_a_signal_after_the_work_does_not_change_a_finished_run(folder):
    rows = write_rows("rows.jsonl", 100)
    with (
        emulator(faults=[{"method": "POST", "latency_s": 1.0, "when": "after"}]) as service,
        Running("run", rows, *service.flags()) as run,
    ):
        service.has_created(100)
        run.signal(signal.SIGTERM)  # all of the list is in flight
        ended = run.wait()
    # The end of the list may or may not have been read before the signal. The exit code must agree with it.
    assert ended.code == (0 if "To continue" not in ended.err else 143)
    assert outcomes("rows.jsonl.bulkwf") == {"created": 100}


def test_the_emulator_exits_with_0_after_a_signal_and_prints_its_counts(folder):
    with emulator() as service:
        ended = service.stop()
    assert ended.code == 0
    assert ended.out.strip() == service.base_url
    assert "0 instances created in 0 requests;" in ended.err
