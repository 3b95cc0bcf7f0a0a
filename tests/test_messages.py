"""Messages on standard error: nothing waits for their reader, if there is one.

Most of these tests are of real processes: Python's own `sys.stderr` blocks with the reader.
"""

import ast
import contextlib
import errno
import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import (
    PATIENCE_S,
    Running,
    bulkwf,
    closed_port,
    emulator,
    environment,
    full_pipe,
    open_terminal,
    shell,
    write_rows,
)

from bulkwf.cli import messages

PIPE_BYTES = 4_096
STOP, CONTINUE = b"\x13", b"\x11"
"""Ctrl-S and Ctrl-Q."""
LATEST_S = 3.0
"""An exit may wait a second for the reader; a busy machine takes longer."""

PREPARED = """
import logging, os, resource, signal, sys
from bulkwf.cli import messages, process
messages.take_over()
"""
MANY = """
for number in range(int(sys.argv[1])):
    messages.say(f"line {number:06} " + "x" * 85)
"""


def script(text, *arguments, stderr, **more):
    """A process that runs *text*, and writes its standard error through `messages`."""
    command = [sys.executable, "-c", PREPARED + text, *map(str, arguments)]
    return subprocess.Popen(command, env=environment(), stderr=stderr, stdout=subprocess.PIPE, **more)


def small_pipe():
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reader, writer


def read_all(reader):
    data = b""
    while select.select([reader], [], [], PATIENCE_S)[0] and (more := os.read(reader, 65_536)):
        data += more
    return data


# --- nobody reads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("run", "rows.jsonl", "-w", "resize", "--emulate", "--rate", "unlimited"), 0),
        (("run", "none.jsonl", "-w", "resize", "--emulate"), 4),
        (("check", "rows.jsonl"), 0),
        (("check", "none.jsonl"), 4),
        (("status", "none"), 4),
        (("results", "none"), 4),
        (("verify", "none"), 4),
        (("emulate", "--host", "256.0.0.1"), 2),
        (("runn",), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_command_whose_messages_nobody_reads_ends_with_its_code(arguments, code, folder):
    write_rows("rows.jsonl", 10)
    env = {"PYTHONUNBUFFERED": "1"} if arguments[0] == "run" else {}
    with full_pipe() as (_, writer), Running(*arguments, env=env, stderr=writer) as command:
        assert command.process.wait(PATIENCE_S) == code


def test_an_exit_waits_a_short_time_for_the_reader(folder):
    text = "messages.say('lost'); print(flush=True); process.exit_now(7)"
    with full_pipe() as (_, writer), script(text, stderr=writer) as process:
        process.stdout.readline()
        since = time.monotonic()
        assert process.wait(PATIENCE_S) == 7
    assert time.monotonic() - since < LATEST_S


@contextlib.contextmanager
def on_a_terminal(*arguments):
    ours, theirs = open_terminal()
    with Running(*arguments, stderr=theirs) as run:
        os.close(theirs)
        try:
            yield run, ours
        finally:
            os.close(ours)


@pytest.mark.slow
def test_a_run_on_a_stopped_terminal_continues_and_a_signal_ends_it(folder):
    rows = write_rows("rows.jsonl", 20_000)
    with (
        emulator() as service,
        on_a_terminal("run", rows, "-w", "resize", "--base-url", service.base_url) as (run, terminal),
    ):
        assert os.read(terminal, 1)  # the bar is there
        os.write(terminal, STOP)
        service.has_created(service.created.total() + 500)  # five seconds at the rate: 20 drawings of a bar
        run.signal(signal.SIGTERM)
        since = time.monotonic()
        assert run.process.wait(PATIENCE_S) == 143
        assert time.monotonic() - since < LATEST_S


@pytest.mark.slow
def test_a_continued_terminal_shows_the_bar_and_the_last_messages(folder):
    rows = write_rows("rows.jsonl", 400)
    with (
        emulator() as service,
        on_a_terminal("run", rows, "-w", "resize", "--base-url", service.base_url) as (run, terminal),
    ):
        assert os.read(terminal, 1)
        os.write(terminal, STOP)
        service.has_created(200)
        os.write(terminal, CONTINUE)
        screen = b""
        with contextlib.suppress(OSError):  # EIO: the run has ended
            while more := os.read(terminal, 65_536):
                screen += more
        assert run.process.wait(PATIENCE_S) == 0
    assert b"limit: 100 instances/s" in screen
    assert re.search(rb"created +400\r\n.*checkpoint: \S*rows.jsonl.bulkwf\r\n$", screen, re.DOTALL)
    assert b"missing" not in screen  # a bar that was not drawn is not a lost message


def test_data_and_messages_of_one_terminal_keep_their_order(folder):
    rows = write_rows("rows.jsonl", 150)
    ours, theirs = open_terminal()
    arguments = ("run", rows, "-w", "resize", "--emulate", "--json")
    with Running(*arguments, stdout=theirs, stderr=theirs) as run:
        os.close(theirs)
        screen = b""
        with contextlib.suppress(OSError):
            while more := os.read(ours, 65_536):
                screen += more
        os.close(ours)
        assert run.process.wait(PATIENCE_S) == 0
    assert re.search(rb"\r\ncheckpoint: [^\r]*\r\n\{[^\r]*\}\r\n$", screen)


# --- what can't be taken ------------------------------------------------------------------------------------------


def test_oldest_lines_are_dropped_and_counted_when_nobody_reads(folder):
    lines = 10_000  # a megabyte
    reader, writer = small_pipe()
    with script(MANY + "print(flush=True)\nprocess.exit_now(0)", lines, stderr=writer) as process:
        os.close(writer)
        process.stdout.readline()  # all messages are queued, and none is read
        output = read_all(reader).decode()
    os.close(reader)
    assert process.returncode == 0
    expected = 0
    for line in output.splitlines():
        if missing := re.fullmatch(
            r"bulkwf: ([\d,]+) lines? (?:is|are) missing here: standard error could not be written", line
        ):
            expected += int(missing[1].replace(",", ""))
        else:
            assert int(line.split()[1]) == expected
            expected += 1
    assert "missing" in output
    assert expected == lines
    assert len(output.rpartition("missing")[2]) > messages.QUEUE_BYTES - 200  # the last messages are kept


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_gets_all_lines_in_order(blocking, folder):
    lines = 2_000
    reader, writer = small_pipe()
    os.set_blocking(writer, blocking)
    with script(MANY + "process.exit_now(0)", lines, stderr=writer) as process:
        os.close(writer)
        output = read_all(reader).decode().splitlines()
    os.close(reader)
    assert process.returncode == 0
    assert [int(line.split()[1]) for line in output] == list(range(lines))


FILLED = """
resource.setrlimit(resource.RLIMIT_FSIZE, (40, -1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
messages.say("all of this line fits")
messages.say("this line is cut", "and this one is lost")
messages.say("so is this one")
messages.wait_written(60)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
"""


@pytest.mark.parametrize("later", ["messages.say('this fits again')\n", ""])
def test_a_disk_with_space_again_gets_the_number_of_lost_lines(later, folder):
    with Path("err").open("wb") as err, script(FILLED + later + "process.exit_now(0)", stderr=err) as process:
        assert process.wait(PATIENCE_S) == 0
    output = Path("err").read_text().splitlines()
    assert output[0] == "all of this line fits"
    assert output[1] == "this line is cut"
    assert "and this one is lost".startswith(output[2])
    assert output[3] == "bulkwf: 3 lines are missing here: standard error could not be written"
    assert output[4:] == ["this fits again"][: bool(later)]


@pytest.mark.parametrize("to", ["2>/dev/full", "2>&-"])
def test_messages_that_cannot_be_written_change_neither_the_data_nor_the_exit_code(to, folder):
    rows = write_rows("rows.jsonl", 10)
    ended = shell(f"bulkwf run {rows} -w resize --emulate --json {to}")
    assert (ended.code, ended.summary["created"], ended.err) == (0, 10, "")
    assert shell(f"bulkwf status none {to}").code == 4


def test_errors_of_the_interpreter_at_its_end_are_written(folder):
    at_end = "import atexit; atexit.register(lambda: sys.stderr.write('the end\\n')); "
    text = at_end + "messages.say('last'); process.exit_now(0)"
    with script(text, stderr=subprocess.PIPE) as process:
        assert process.communicate(timeout=PATIENCE_S)[1] == b"last\nthe end\n"


# --- no thread ----------------------------------------------------------------------------------------------------

FEW_THREADS = """
import sys, threading
left, start = int(sys.argv.pop(1)), threading.Thread.start
def start_one(thread):
    global left
    left -= 1
    if left < 0:
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = start_one
import bulkwf.cli.app
bulkwf.cli.app.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("run", "rows.jsonl", "-w", "resize", "--emulate"), ("check", "rows.jsonl")])
def test_a_command_that_cannot_start_any_one_of_its_threads_exits_with_4(arguments, folder):
    write_rows("rows.jsonl", 10)
    codes = []
    while 0 not in codes:
        command = [sys.executable, "-c", FEW_THREADS, str(len(codes)), *arguments]
        ended = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert "Traceback" not in ended.stderr
        assert ("ulimit -u" in ended.stderr) == bool(ended.returncode)
        codes.append(ended.returncode)
    assert set(codes[:-1]) == {4}
    assert len(codes) > 4


@pytest.mark.parametrize(
    "arguments", [("emulate", "--host", "localhost", "--port", "0"), ("run", "rows.jsonl", "-w", "resize")]
)
def test_a_name_look_up_that_cannot_start_a_thread_exits_with_4(arguments, folder):
    write_rows("rows.jsonl", 10)
    none = 'import concurrent.futures.thread as t\ndef none(*_): raise RuntimeError("can\'t start new thread")\n'
    patch = (
        f"{none}t.ThreadPoolExecutor._adjust_thread_count = none\n"
        if arguments[0] == "emulate"
        else (
            f"{none}real = t.ThreadPoolExecutor._adjust_thread_count\n"
            "t.ThreadPoolExecutor._adjust_thread_count = lambda pool: "
            "real(pool) if 'checkpoint' in pool._thread_name_prefix else none()\n"
        )
    )
    command = [sys.executable, "-c", patch + "import bulkwf.cli.app; bulkwf.cli.app.main()", *arguments]
    env = environment({"CLOUDFLARE_API_BASE_URL": "https://service.test/client/v4"})
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 4, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "ulimit -u" in ended.stderr


# --- what reaches a terminal --------------------------------------------------------------------------------------

ODD = "o'dd\x1b]0;owned\x07\n\u202e\x9b2J é.jsonl"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


@pytest.mark.parametrize("command", ["run", "check", "status", "results", "verify", "missing", "emulate"])
def test_the_name_of_a_file_cannot_control_the_terminal(command, folder):
    Path(ODD).write_text("nonsense\n")
    arguments = {
        "run": ("run", ODD, "-w", "resize", "--emulate"),
        "check": ("check", ODD),
        "missing": ("run", f"none-{ODD}", "-w", "resize", "--emulate"),
        "emulate": ("emulate", "--faults", ODD),
    }.get(command, (command, ODD))
    ended = bulkwf(*arguments)
    assert ended.code in (1, 2, 4)
    assert "o'dd" in ended.err
    assert not CONTROL.search(ended.err)
    assert not re.search(r"^\W*(owned|2J)", ended.err, re.MULTILINE)


def test_the_printed_command_names_a_file_with_control_characters_safely(folder):
    odd = os.fsdecode(os.fsencode(ODD) + b"\xff")
    write_rows(odd, 3)
    with closed_port() as base_url:
        ended = bulkwf("run", odd, "-w", "resize", "--base-url", base_url, "--max-outage", "0s")
    assert ended.code == 75
    assert not CONTROL.search(ended.err)
    assert shell(f"{ended.resume_command} --emulate -c done -q").code == 0


def test_a_log_record_cannot_control_the_terminal(folder):
    text = (
        "log = logging.getLogger('bulkwf')\n"
        "log.warning('%s: odd', 'a\\x1b[2J\\nbulkwf: all is well')\n"
        "try: raise ValueError('b\\x1b[2J')\n"
        "except ValueError: log.exception('failed')\n"
        "process.exit_now(0)"
    )
    with script(text, stderr=subprocess.PIPE) as process:
        output = process.communicate(timeout=PATIENCE_S)[1].decode()
    assert not CONTROL.search(output)
    assert output.splitlines()[:2] == ["a [2J bulkwf: all is well: odd", "failed"]
    assert output.splitlines()[-1] == "ValueError: b [2J"


# --- in this process ----------------------------------------------------------------------------------------------


def test_say_never_raises_when_nobody_can_read(monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    messages.say("lost")


def test_a_message_longer_than_the_queue_is_written_completely():
    reader, writer = os.pipe()
    queued = messages._Queued(writer, most_bytes=10)
    queued.write(b"x" * 5_000 + b"\n")
    assert queued.wait_written(PATIENCE_S)
    assert os.read(reader, 65_536) == b"x" * 5_000 + b"\n"
    os.close(reader)


def test_only_the_messages_module_writes_to_stderr():
    found = [
        path.name
        for path in Path(messages.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("stderr", "__stderr__", "print_exc")
    ]
    assert set(found) == {"messages.py", "app.py"}
    assert found.count("app.py") == 2  # where a closed stderr is replaced
