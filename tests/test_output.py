"""Data on stdout is complete, in UTF-8, or the command does not exit with 0: under PYTHONUNBUFFERED, too.

There Python's `sys.stdout.buffer` is a raw file, whose `write` may write a part, or nothing, and says so only in what
it returns: when a disk fills, when a pipe does not block, when a process is stopped and continued.
"""

import ast
import contextlib
import csv
import errno
import fcntl
import io
import json
import os
import re
import resource
import select
import signal
import subprocess
from pathlib import Path

import pytest
from canary import assert_silent
from command import COMMAND, HERE, PATIENCE_S, Forker, bulkwf, emulator, environment, shell, until, write_rows

from bulkwf.cli import output

pytestmark = pytest.mark.slow

ROWS = 5_000
UNBUFFERED = {"PYTHONUNBUFFERED": "1"}
PIPE_BYTES = 4_096


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The checkpoint of a run that is finished, in a folder of its own with the list."""
    folder = tmp_path_factory.mktemp("done")
    with contextlib.chdir(folder), Forker(tmp_path_factory.mktemp("outputs")) as quick:
        assert quick("run", write_rows("rows.jsonl", ROWS), *HERE, "-c", "done", "-q").code == 0
    return folder / "done"


@contextlib.contextmanager
def writing(*arguments, env, full, blocking):
    """The command with a small pipe as its stdout, filled beforehand or empty; and the pipe's other end."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    if full:
        os.write(writer, b"x" * PIPE_BYTES)
    os.set_blocking(writer, blocking)
    with Path("err").open("wb") as err:
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)], env=environment(env), stdin=subprocess.DEVNULL, stdout=writer, stderr=err
        )
    os.close(writer)
    try:
        yield process, reader
        assert_silent(Path("err").read_text(), "stderr")
    finally:
        os.close(reader)
        process.kill()
        process.wait()


def stat_of(process):
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()


def waits(process):
    """Wait until *process* has ended or seems to wait. If it does not wait yet, the test covers less."""
    seen = []

    def idle():
        with contextlib.suppress(FileNotFoundError):
            state = stat_of(process)
            seen.append((state[0], state[11], state[12]))
        return process.poll() is not None or (len(seen) > 40 and len(set(seen[-40:])) == 1)

    until(idle, "the command to wait")


def read_some(reader):
    assert select.select([reader], [], [], PATIENCE_S)[0], "the command writes nothing and does not end"
    return os.read(reader, 65_536)


def read_all(reader, *, full):
    data = b"".join(iter(lambda: read_some(reader), b""))
    return data[PIPE_BYTES:] if full else data


def is_one_object(data):
    return data.endswith(b"\n") and bool(json.loads(data))


def has_all_lines(data):
    return [json.loads(line)["row"] for line in data.splitlines()] == list(range(ROWS))


def has_all_records(data):
    return [int(one["row"]) for one in csv.DictReader(io.StringIO(data.decode()))] == list(range(ROWS))


READERS = {
    "results": (("results", "done"), has_all_lines),
    "results as CSV": (("results", "done", "--format", "csv"), has_all_records),
    "status": (("status", "done"), lambda data: data.count(b"\n") >= 8),
    "status as JSON": (("status", "done", "--json"), is_one_object),
    "run": (("run", "rows.jsonl", *HERE, "-c", "done", "-q", "--json"), is_one_object),
}


@pytest.mark.parametrize(("name", "env"), [("results", {}), *((name, UNBUFFERED) for name in READERS)])
def test_a_non_blocking_pipe_gets_all_data(name, env, done, monkeypatch):
    monkeypatch.chdir(done.parent)
    arguments, is_complete = READERS[name]
    with writing(*arguments, env=env, full=True, blocking=False) as (process, reader):
        waits(process)
        data = read_all(reader, full=True)
        code = process.wait(PATIENCE_S)
    assert (code, is_complete(data)) == (0, True)
    assert_silent(data.decode(), "stdout")


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """The arguments that verify a run whose instances the service has lost."""
    with (
        contextlib.chdir(tmp_path_factory.mktemp("lost")),
        emulator(faults=[{"method": "POST", "lose": "."}]) as service,
    ):
        rows = write_rows("rows.jsonl", 200)
        assert bulkwf("run", rows, *service.flags(), "-c", "done", "-q").code == 0
        done = Path("done").absolute()
        yield ("verify", done, "--base-url", service.base_url, "--request-rate", "unlimited", "-q")


@pytest.mark.parametrize("form", [("--format", "jsonl"), ("--format", "csv"), ("--json",)], ids=" ".join)
def test_a_non_blocking_pipe_gets_all_findings_of_a_verification(form, lost, folder):
    with writing(*lost, *form, env=UNBUFFERED, full=True, blocking=False) as (process, reader):
        waits(process)
        data = read_all(reader, full=True)
        code = process.wait(PATIENCE_S)
    found = len(json.loads(data)["problems"]) if form == ("--json",) else len(data.splitlines()) - ("csv" in form)
    assert (code, found, data[-1:]) == (1, 200, b"\n")


def test_a_non_blocking_pipe_gets_the_address_of_the_emulator(folder):
    with writing("emulate", "--port", "0", env=UNBUFFERED, full=True, blocking=False) as (process, reader):
        waits(process)
        data = b""
        while not data.endswith(b"\n"):
            data += read_some(reader)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    assert re.fullmatch(rb"http://127\.0\.0\.1:\d+/client/v4\n", data[PIPE_BYTES:])


@pytest.mark.parametrize("name", ["results", "results as CSV"])
def test_a_command_that_is_stopped_and_continued_writes_all_data(name, done, monkeypatch):
    monkeypatch.chdir(done.parent)
    arguments, is_complete = READERS[name]
    with writing(*arguments, env=UNBUFFERED, full=False, blocking=True) as (process, reader):
        waits(process)
        process.send_signal(signal.SIGSTOP)
        until(lambda: stat_of(process)[0] == "T", "the command to be stopped")
        process.send_signal(signal.SIGCONT)
        data = read_all(reader, full=False)
        code = process.wait(PATIENCE_S)
    assert (code, is_complete(data)) == (0, True)


SAID = "bulkwf: standard output can't be written: {}. It is incomplete: run the same command again.\n"


@pytest.mark.parametrize("name", ["results", "results as CSV"])
def test_data_that_fits_only_in_part_exits_with_4(name, done, monkeypatch):
    monkeypatch.chdir(done.parent)
    most = 70_000  # what SQLite writes to read a checkpoint fits
    with Path("out").open("wb") as out:
        ended = bulkwf(*READERS[name][0], env=UNBUFFERED, stdout=out, limits={resource.RLIMIT_FSIZE: most})
    assert (ended.code, ended.err) == (4, SAID.format("File too large"))
    assert Path("out").stat().st_size == most


@pytest.mark.parametrize("name", ["results", "results as CSV", "status", "status as JSON"])
def test_data_that_does_not_fit_at_all_exits_with_4(name, done, monkeypatch):
    monkeypatch.chdir(done.parent)
    with Path("/dev/full").open("wb") as full:
        ended = bulkwf(*READERS[name][0], env=UNBUFFERED, stdout=full)
    assert (ended.code, ended.err) == (4, SAID.format("No space left on device"))


@pytest.mark.parametrize("name", READERS)
def test_data_for_a_closed_output_is_reported_as_lost(name, done, monkeypatch):
    monkeypatch.chdir(done.parent)
    ended = shell(f"bulkwf {' '.join(READERS[name][0])} >&-", env=UNBUFFERED)
    assert ended.code == 4
    assert "can't be written: Bad file descriptor" in ended.err


@pytest.mark.parametrize("locale", [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_data_is_utf_8_whatever_the_locale(locale, folder):
    rows, env = write_rows("Bücher-日本.jsonl", 1), UNBUFFERED | locale
    checkpoint = f"{rows}.emulated.bulkwf"
    ran = bulkwf("run", rows, *HERE, "--json", "-q", env=env)
    assert (ran.code, ran.summary["checkpoint"]) == (0, checkpoint)
    for arguments in (("status", checkpoint), ("status", checkpoint, "--json")):
        ended = bulkwf(*arguments, env=env)
        assert ended.code == 0
        assert rows in ended.out


# --- the file that is written to ----------------------------------------------------------------------------------


class Scripted:
    """Replaces `os.write`: each call writes the next number of bytes, or raises the next error."""

    def __init__(self, *steps):
        self.steps = list(steps)
        self.written = b""

    def __call__(self, descriptor, data):
        step = self.steps.pop(0) if self.steps else len(data)
        if isinstance(step, Exception):
            raise step
        self.written += bytes(data[:step])
        return min(step, len(data))


def test_a_partial_write_is_continued_to_its_end(monkeypatch):
    write = Scripted(1, BlockingIOError(errno.EAGAIN, "again"), 2, 0, 3)
    waited = []
    monkeypatch.setattr(output.os, "write", write)
    monkeypatch.setattr(output, "wait_writable", waited.append)
    file = output._Whole(1)
    assert file.write(b"0123456789") == 10
    assert (write.written, waited) == (b"0123456789", [1])


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, output.OutputError), (errno.EIO, output.OutputError), (errno.EPIPE, output.ReaderGone)],
)
def test_after_an_error_nothing_is_written_and_no_write_fails(number, kind, monkeypatch):
    write = Scripted(3, OSError(number, os.strerror(number)))
    monkeypatch.setattr(output.os, "write", write)
    file = output._Whole(1)
    with pytest.raises(kind, match=os.strerror(number)) as raised:
        file.write(b"0123456789")
    assert type(raised.value) is kind
    file.write(b"more")
    assert write.written == b"012"


def test_an_error_that_the_system_reports_at_close_is_raised(monkeypatch):
    def full(descriptor):
        close(descriptor)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    close = os.close
    monkeypatch.setattr(output.os, "close", full)
    with pytest.raises(output.OutputError, match="quota"):
        output._Whole(1).check_close()


def test_only_the_output_module_writes_to_stdout():
    found = []
    for path in Path(output.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            printed = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if printed and not any(keyword.arg == "file" for keyword in node.keywords):
                found.append(f"{path.name}:{node.lineno}: print")
            if isinstance(node, ast.Attribute) and node.attr in ("stdout", "__stdout__") and path.name != "output.py":
                found.append(f"{path.name}:{node.lineno}: {node.attr}")
    assert not found
