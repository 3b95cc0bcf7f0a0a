"""The display for people: the live bar on a terminal, lines elsewhere, the text of the summary."""

import asyncio
import os
import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import (
    COMMAND,
    HERE,
    Running,
    bulkwf,
    emulator,
    environment,
    on_terminal,
    open_terminal,
    outcomes,
    write_rows,
)

from bulkwf.cli import display as console
from bulkwf.cli.display import ShownRun, ShownVerification, duration, show_progress
from bulkwf.cli.summaries import summary_lines, verified_lines
from bulkwf.model import Counts, Summary
from bulkwf.submission.progress import Progress
from bulkwf.verification import Verified

pytestmark = pytest.mark.slow

SLOWLY = ("-w", "resize", "--emulate", "--rate", "100/s")
COLOUR = re.compile(r"\x1b\[[0-9;]*[1-9][0-9;]*m")


# --- the command on a terminal ------------------------------------------------------------------------------------


def test_a_terminal_shows_a_bar_with_the_binding_limit_until_the_end(folder):
    rows = write_rows("rows.jsonl", 300)
    shown = on_terminal("run", rows, *SLOWLY, "--json")
    assert shown.code == 0
    assert "\x1b[?25l" in shown.screen  # the cursor is hidden ...
    assert "\x1b[?25h" in shown.screen  # ... and comes back
    assert "100 rows" in shown.screen
    assert "limit: 100 instances/s" in shown.screen
    assert "\x1b[2K" in shown.screen  # the bar is erased
    last = shown.screen.rpartition("\x1b[2K")[2]
    assert re.search(r"created +300", last)
    assert "limit:" not in last
    assert shown.out.count("\n") == 1  # the summary alone


def test_no_color_removes_the_colours_and_keeps_the_bar(folder):
    rows = write_rows("rows.jsonl", 200)
    coloured = on_terminal("run", rows, *SLOWLY, "-c", "a")
    plain = on_terminal("run", rows, *SLOWLY, "-c", "b", env={"NO_COLOR": "1"})
    assert COLOUR.search(coloured.screen)
    assert "limit: 100 instances/s" in plain.screen
    assert not re.search(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", plain.screen)


def test_quiet_shows_nothing_on_a_terminal(folder):
    rows = write_rows("rows.jsonl", 200)
    shown = on_terminal("run", rows, *SLOWLY, "--quiet")
    assert (shown.code, shown.screen) == (0, "")


def test_a_stderr_that_is_not_a_terminal_gets_no_bar(folder):
    rows = write_rows("rows.jsonl", 200)
    ended = bulkwf("run", rows, *SLOWLY)
    assert "\x1b" not in ended.err
    assert "limit:" not in ended.err


def test_a_narrow_terminal_works(folder):
    rows = write_rows("rows.jsonl", 150)
    assert on_terminal("run", rows, *SLOWLY, columns=20).code == 0


def test_a_terminal_that_is_closed_does_not_end_the_run(folder):
    rows = write_rows("rows.jsonl", 300)
    ours, theirs = open_terminal()
    with emulator() as service:
        arguments = ("run", rows, "-w", "resize", "--base-url", service.base_url)
        run = subprocess.Popen([*COMMAND, *arguments], env=environment(), stdin=subprocess.DEVNULL, stderr=theirs)
        try:
            os.close(theirs)
            os.read(ours, 1)  # the bar has begun
            service.has_created(100)
            os.close(ours)
            assert run.wait(60) == 0
        finally:
            run.kill()
            run.wait()
    assert outcomes("rows.jsonl.bulkwf") == {"created": 300}


def test_a_signal_on_a_terminal_leaves_the_cursor_visible_and_is_reported(folder):
    rows = write_rows("rows.jsonl", 20_000)
    ours, theirs = open_terminal()
    with emulator() as service:
        arguments = ("run", rows, "-w", "resize", "--base-url", service.base_url)
        run = subprocess.Popen([*COMMAND, *arguments], env=environment(), stdin=subprocess.DEVNULL, stderr=theirs)
        try:
            os.close(theirs)
            service.has_created(100)
            run.send_signal(signal.SIGTERM)
            screen = b""
            while b"To continue, run:" not in screen:
                screen += os.read(ours, 65_536)
            assert run.wait(60) == 143
        finally:
            run.kill()
            run.wait()
            os.close(ours)
    assert b"a second signal stops at once" in screen
    assert screen.rindex(b"\x1b[?25h") > screen.rindex(b"\x1b[?25l")


# --- the text alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (4.21, "4.2 s"),
        (59.94, "59.9 s"),
        (59.99, "1 min 0 s"),
        (60, "1 min 0 s"),
        (200.4, "3 min 20 s"),
        (3_599.7, "1 h 0 min"),
        (100_000, "27 h 46 min"),
        (360_000_000, "100,000 h 0 min"),
    ],
)
def test_a_duration_is_shown_in_seconds_minutes_or_hours(seconds, text):
    assert duration(seconds) == text


def a_run(**totals):
    progress = Progress(0.0, Counts(**totals), attempts=7)
    return SimpleNamespace(progress=progress, bound_by="100 instances/s", last_error="", checkpoint=None, where=str)


async def test_without_a_terminal_a_line_is_printed_at_intervals(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.001)
    async with show_progress(ShownRun(a_run(created=1_200, rejected=3)), quiet=False):
        await asyncio.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert all(line.startswith("bulkwf: 1,203 rows settled; ") for line in lines)
    assert all(line.endswith("; limit: 100 instances/s; 3 rejected") for line in lines)


async def test_during_an_outage_the_error_is_shown_instead_of_the_limit(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.001)
    run = a_run()
    run.last_error = "no connection to the service: ClientConnectorError ECONNREFUSED"
    async with show_progress(ShownRun(run), quiet=False):
        await asyncio.sleep(0.2)
    line = capsys.readouterr().err.splitlines()[0]
    assert "failing: no connection to the service: ClientConnectorError ECONNREFUSED" in line
    assert "limit" not in line


async def test_nothing_is_drawn_while_the_terminal_is_stopped(monkeypatch):
    class Work:
        drawn = 0

        def share(self):
            return None

        def facts(self, now):
            self.drawn += 1
            yield "300 rows settled"

    monkeypatch.setattr(console, "BAR_EVERY_S", 0.001)
    monkeypatch.setattr(console.messages, "is_terminal", lambda: True)
    monkeypatch.setattr(console.messages, "wait_written", lambda: written)
    for written in (True, False):
        work = Work()
        async with show_progress(work, quiet=False):
            await asyncio.sleep(0.1)
        assert (work.drawn > 0) == written


async def test_quiet_shows_no_progress(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.001)
    async with show_progress(ShownRun(a_run(created=1_200)), quiet=True):
        await asyncio.sleep(0.05)
    assert capsys.readouterr().err == ""


def summary_of(**counts):
    return "\n".join(summary_lines(a_run(), Summary(**counts)))


def test_the_summary_shows_only_counts_above_zero():
    text = summary_of(created=12_000, existed=5, existed_in_doubt=4, settled_now=12_005, elapsed_s=120.05, attempts=121)
    assert re.search(r"created +12,000\n", text)
    assert re.search(r"existed +5  \(4 of them after an attempt of this run whose answer was lost\)", text)
    assert "12,005 rows settled in 2 min 0 s: 100.0/s, 121 requests" in text
    assert not re.search("rejected|invalid|pending|paused", text)


def test_the_summary_shows_the_time_that_the_run_was_paused():
    assert "in 50.0 s, 30.0 s of it paused" in summary_of(created=1, elapsed_s=50.0, paused_s=30.0)


def test_an_interrupted_run_without_rows_is_not_called_an_empty_list():
    assert "empty" not in summary_of(complete=False)
    assert "empty" in summary_of(complete=True)


# --- a verification -----------------------------------------------------------------------------------------------


class AVerification:
    """A verification under way."""

    def __init__(self, wanted, found, missing=0, last_error="", bound_by=""):
        self.wanted, self.found, self.missing = wanted, found, missing
        self.last_error, self.bound_by = last_error, bound_by

    @property
    def answered(self):
        return self.found + self.missing


async def test_a_verification_shows_its_progress_and_the_binding_limit():
    work = AVerification(5_000, 1_200, bound_by="1,000 requests/5 min")
    shown, began = ShownVerification(work), asyncio.get_running_loop().time()
    assert shown.share() == 0.24
    waiting = ["1,200 of 5,000 instances asked for", "limit: 1,000 requests/5 min"]
    assert list(shown.facts(began + 10)) == waiting  # the time left is unknown before anything was found
    work.found, work.missing = 2_198, 2
    assert list(shown.facts(began + 10)) == [
        "2,200 of 5,000 instances asked for",
        "2 missing",
        "limit: 1,000 requests/5 min",
        "28.0 s left",  # 1,000 in 10 s; findings of an earlier session do not count
    ]
    assert shown.share() == 0.44


async def test_during_an_outage_a_verification_shows_the_error_instead_of_the_limit():
    shown = ShownVerification(AVerification(20, 3, last_error="it went wrong", bound_by="1,000 requests/5 min"))
    assert list(shown.facts(0.0)) == ["3 of 20 instances asked for", "failing: it went wrong"]


async def test_a_verification_of_no_instances_can_be_shown():
    shown = ShownVerification(AVerification(0, 0))
    assert shown.share() == 0
    assert list(shown.facts(asyncio.get_running_loop().time())) == ["0 of 0 instances asked for"]


def verified_of(**more):
    usual = {"instances": 12_000, "total": 12_000, "found": 12_000, "missing": 0, "statuses": {"complete": 12_000}}
    state = {
        "run_finished": True,
        "complete": True,
        "requests": 1_201,
        "elapsed_s": 200.4,
        "exit_code": 0,
    }
    return list(verified_lines(Verified(**usual | state | more)))


def test_the_result_of_a_verification_counts_each_status_and_missing_instances():
    statuses = {"complete": 11_000, "errored": 990}
    assert verified_of(found=11_990, missing=10, statuses=statuses) == [
        "12,000 instances",
        "      11,000  complete",
        "         990  errored",
        "          10  missing",
        "1,201 requests in 3 min 20 s",
    ]


def test_the_result_of_a_sample_names_the_total():
    lines = verified_of(instances=50, found=50, statuses={"queued": 50})
    assert lines[0] == "50 instances, drawn at random from 12,000"


def test_instances_not_asked_for_and_an_unfinished_run_are_named():
    lines = verified_of(found=7_000, missing=1, statuses={}, run_finished=False, complete=False)
    assert lines[1:] == [
        "           1  missing",
        "       4,999  not asked for yet",
        "1,201 requests in 3 min 20 s",
        "the run is not finished: rows that it has not settled yet were not looked for",
    ]


def test_a_status_of_the_service_cannot_move_the_cursor():
    text = "\n".join(verified_of(statuses={"bad\x1b[2J\x07\r\nbulkwf: all is well": 12_000}))
    assert "12,000  bad" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert "\nbulkwf: all is well" not in text


# --- why rows failed ----------------------------------------------------------------------------------------------


def test_the_summary_shows_why_rows_failed_with_the_first_places_of_each_reason(folder):
    good, bad = '{"params":%d}\n', "nonsense\n"
    Path("rows.jsonl").write_text("".join(good % n + bad for n in range(50)) + '{"instance_id":"a b"}\n')
    ended = bulkwf("run", "rows.jsonl", *HERE)
    assert ended.code == 1
    assert re.search(
        r"invalid, \w+: 50 rows\n    rows\.jsonl:2: .+\n    rows\.jsonl:4: .+\n    rows\.jsonl:6: ", ended.err
    )
    assert "rows.jsonl:8:" not in ended.err
    assert re.search(r"invalid, bad_id: 1 row\n    rows\.jsonl:101: the id 'a b' must be", ended.err)
    assert "all invalid rows: bulkwf results" in ended.err
    assert "rejected" not in ended.err
    assert "correct these rows, and submit them in a list of their own" in ended.err


def test_a_message_of_the_service_cannot_move_the_cursor(folder):
    rows = write_rows("rows.jsonl", 1)
    message = "bad\x1b[2J\x07\r\nbulkwf: all is well"
    with emulator(faults=[{"method": "POST", "status": 400, "code": 10099, "message": message}]) as service:
        ended = bulkwf("run", rows, *service.flags(), "--max-rejects", "5")
    assert ended.code == 1
    assert "\x1b" not in ended.err
    assert "\x07" not in ended.err
    assert "\nbulkwf: all is well" not in ended.err


def test_a_short_run_without_a_terminal_prints_only_its_summary(folder):
    rows = write_rows("rows.jsonl", 150)
    with emulator() as service, Running("run", rows, *service.flags()) as run:
        ended = run.wait()
    assert ended.err.lstrip().startswith("created")
