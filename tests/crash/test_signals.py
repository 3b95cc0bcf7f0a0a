"""A signal at any moment, with a service that is slow or silent: the command ends in time, and the next one continues.

A second one, and each one after the work, ends the process within two seconds, though a part of it hangs: the source of
the token, the name server, the disk, the reader of its output.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Self

import pytest
from canary import TOKEN
from command import Running, emulator, full_pipe, ids, until, write_rows
from torture import scaled, tally

from bulkwf.checkpoint import read_status
from bulkwf.emulator import read_log
from crash.oracle import COUNT_FLAWS, RULES, Oracle, draw_rows, take_ids, write_list
from crash.syscalls import why_not

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real time")]

RUNS = scaled(6, 200)
FAILING_FOR_S = 1.5
FAULTS = (
    {"latency_s": [1.0, 20.0]},
    {"latency_s": [1.0, 20.0], "when": "after"},
    {"latency_s": [0.0, 1.0], "when": "after"},
    {"hang": True, "when": "before"},
    {"hang": True, "when": "after"},
)
CHECKPOINT = Path("rows.bulkwf")
AT_MOST_S = 5.0
"""Past the drain time. With the default of 20 s it makes 25."""


counted = tally(
    "{signals:,} signals, {drained:,} of them drained a run, {in doubt:,} left rows in doubt, "
    "all within {ms:,} ms of the drain time: " + COUNT_FLAWS,
    maxima=["ms"],
)


def end(run, number):
    """Send a signal; returns how the run has ended, and how long after."""
    run.signal(number)
    at = time.monotonic()
    return run.wait(), time.monotonic() - at


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_signal_at_any_moment_ends_the_run_in_time_and_the_next_run_finishes_the_list(memory, quick, seed):
    chance = random.Random(seed)
    rows, number = draw_rows(chance, 400), chance.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGINT))
    drain_s = chance.choice((0.0, 0.5))
    fault = {**chance.choice(FAULTS), "method": "POST", "chance": chance.choice((0.1, 0.5)), "until_s": FAILING_FOR_S}
    # To a SIGINT during its imports Python has an answer of its own, a traceback: that one finds them done.
    start = quick.start if number == signal.SIGINT else Running
    oracle = Oracle(rows)
    with emulator(faults=[*RULES, fault | {"from": 2}], start=quick.start) as service:
        take_ids(service, rows)
        words = ("run", *write_list(rows), *service.flags(), "--batch-size", 10, "--concurrency", 4)
        with start(*words, "--timeout", "10m", "--drain-timeout", f"{drain_s}s") as run:
            time.sleep(chance.uniform(*chance.choice(((0.0, 0.5), (0.5, FAILING_FOR_S)))))  # it starts, it runs
            handled = run.process.poll() is None and run.catches(signal.SIGTERM)
            ended, took_s = end(run, number)
        in_doubt = oracle.look(CHECKPOINT, read_log(service.log))
        ended_well = ended.code in (0, 1)
        finished = (handled or ended_well) and read_status(CHECKPOINT).finished_at is not None
        next_one = quick(*words, "--timeout", "1s")  # some of its requests may still meet the fault
        oracle.judge(CHECKPOINT, read_log(service.log))
    counted.update(oracle.flaws, signals=1, drained=ended.code == 128 + number)
    counted["in doubt"] += in_doubt > 0
    counted["ms"] = max(counted["ms"], round(1_000 * (took_s - drain_s)))
    oracle.assert_flawless()
    assert next_one.code == oracle.code
    assert took_s < drain_s + AT_MOST_S
    ends = {128 + number} if number == signal.SIGINT else {128 + number, -number}  # SIGTERM kills what just starts
    assert ended_well or ended.code in ends, ended.err
    assert "Traceback" not in ended.err
    assert finished or not ended_well
    if handled and not finished:
        assert ended.code == 128 + number
        assert ended.resume_command


@pytest.mark.parametrize("drain_s", scaled((0.5,), (0.5, 20.0)))
def test_a_run_without_answers_ends_at_the_drain_timeout(memory, quick, drain_s):
    rows = write_rows("rows.jsonl", 1_000)
    flags = () if drain_s == 20.0 else ("--drain-timeout", f"{drain_s}s")
    with emulator(faults=[{"method": "POST", "hang": True, "when": "after", "times": 3}], start=quick.start) as service:
        words = ("run", rows, *service.flags(), "--timeout", "10m", "--concurrency", "3")
        with Running(*words, *flags) as run:
            service.has_created(300)
            ended, took_s = end(run, signal.SIGTERM)
        assert ended.code == 143
        assert drain_s <= took_s < drain_s + AT_MOST_S
        assert quick(*words).code == 0
        assert service.created == Counter(ids(1_000))


# --- parts that hang ----------------------------------------------------------------------------------------------

GONE_WITHIN_S = 2.0
LOAD_S = 1.0
"""A busy machine may take so much longer."""
SECOND = "a second signal stops at once"


class TokenFile:
    """A named pipe as a token file: it gives the token once; reading it again hangs."""

    def __init__(self) -> None:
        self.path = Path("token")
        self._held: int | None = None
        os.mkfifo(self.path)

    def give(self) -> None:
        """Give the token to the process that waits for it."""
        self.path.write_text(TOKEN)

    def hangs(self) -> None:
        """Wait until it is read again; no token comes."""
        until(self._opened, "the token to be read again")

    def _opened(self) -> bool:
        with contextlib.suppress(OSError):  # it has no reader yet
            self._held = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        return self._held is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._held is not None:
            os.close(self._held)


@pytest.fixture
def token(memory):
    with TokenFile() as token:
        yield token


@pytest.mark.parametrize("signals", [1, 2])
def test_a_token_file_that_hangs_does_not_delay_the_end(token, quick, signals):
    rows = write_rows("rows.jsonl", 1_000)
    drain_s = 0.5 if signals == 1 else 600.0
    with emulator(faults=[{"request": 3, "revoke_token": True}], start=quick.start) as service:
        words = ("run", rows, *service.flags(), "--concurrency", "1", "--drain-timeout", f"{drain_s}s")
        with Running(*words, "--api-token-file", token.path) as run:
            token.give()
            service.has_created(200)
            token.hangs()
            ended, took_s = end(run, signal.SIGTERM) if signals == 1 else end_twice(run)
        assert ended.code == 143
        assert took_s < (drain_s + AT_MOST_S if signals == 1 else GONE_WITHIN_S + LOAD_S)
        assert ended.resume_command
        assert not Path("rows.jsonl.bulkwf.lock").exists()
        assert quick(*words, env={"CLOUDFLARE_API_TOKEN": "another-token-of-the-same"}).code == 0
        assert service.created == Counter(ids(1_000))


def end_twice(run):
    """Send two signals; returns how the run has ended, and how long after the second."""
    run.signal(signal.SIGTERM)
    run.says(SECOND)
    return end(run, signal.SIGINT)


def test_a_token_file_that_hangs_does_not_delay_the_end_of_a_verification(token, quick):
    rows = write_rows("rows.jsonl", 300)
    with emulator(faults=[{"method": "GET", "revoke_token": True}], start=quick.start) as service:
        assert quick("run", rows, *service.flags()).code == 0
        words = ("verify", "rows.jsonl.bulkwf", "--base-url", service.base_url, "--api-token-file", token.path)
        with Running(*words) as run:
            token.give()
            run.listens()  # and has the token
            token.hangs()
            ended, took_s = end(run, signal.SIGTERM)
    assert ended.code == 143
    assert took_s < GONE_WITHIN_S + LOAD_S


def bind_name_server(server):
    """Bind port 53, the only one that a name server may have, at an address that no other test uses; returns that."""
    address = f"127.{random.randrange(1, 255)}.{random.randrange(256)}.{random.randrange(1, 255)}"
    server.bind((address, 53))
    return address


MOUNT_AND_RUN = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'


@pytest.mark.parametrize("signals", [1, 2])
def test_a_name_server_that_does_not_answer_does_not_delay_the_end(memory, signals):
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("NOT TESTED: only root may give a process name servers of its own")
    prefix = ("unshare", "-m", "sh", "-c", MOUNT_AND_RUN, "resolv.conf")
    words = ("run", write_rows("rows.jsonl", 10), "-w", "resize", "--base-url", "https://service.test/client/v4")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        address = bind_name_server(server)
        Path("resolv.conf").write_text(f"nameserver {address}\noptions timeout:30 attempts:5\n")
        server.settimeout(60)
        drain = () if signals == 2 else ("--drain-timeout", "0.5s")
        with Running(*words, *drain, prefix=prefix) as run:
            assert b"service" in server.recv(512)
            ended, took_s = end(run, signal.SIGTERM) if signals == 1 else end_twice(run)
    assert ended.code == 143
    assert took_s < (0.5 + AT_MOST_S if signals == 1 else GONE_WITHIN_S + LOAD_S)
    assert ended.resume_command


@contextlib.contextmanager
def hanging_disk(pid):
    """Meanwhile, no call that syncs to a disk returns, in any thread of the process."""
    calls = "fsync,fdatasync"
    words = ["strace", "-f", "-o", "trace", "-e", f"trace={calls}", "-e", f"inject={calls}:delay_enter=600000000"]
    strace = subprocess.Popen([*words, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
    try:
        assert "attached" in strace.stderr.readline()
        yield
    finally:
        strace.kill()
        strace.communicate()


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_disk_that_hangs_does_not_delay_the_end(memory, quick):
    rows = write_rows("rows.jsonl", 1_000)
    with emulator(faults=[{"method": "POST", "latency_s": 0.2}], start=quick.start) as service:
        words = ("run", rows, *service.flags(), "--concurrency", "1")
        with Running(*words) as run:
            service.has_created(100)
            with hanging_disk(run.process.pid):
                run.signal(signal.SIGTERM)
                run.says(SECOND)
                run.signal(signal.SIGINT)
                at = time.monotonic()
                run.says("the process is ended after SIGINT, because a disk")
                took_s = time.monotonic() - at
            ended = run.wait()  # strace has let go of the thread that it held, which could not exit before
        assert ended.code == 143
        assert took_s < GONE_WITHIN_S + LOAD_S
        assert ended.resume_command
        assert quick(*words).code == 0
        assert service.created == Counter(ids(1_000))


def test_an_output_that_nobody_reads_does_not_delay_the_end(memory, quick):
    rows = write_rows("rows.jsonl", 100)
    with emulator(start=quick.start) as service, full_pipe() as (_, writer):
        words = ("run", rows, *service.flags(), "--json")
        with Running(*words, stdout=writer) as run:
            run.says("100 rows settled")
            until(lambda: not Path("rows.jsonl.bulkwf.lock").exists(), "the checkpoint to be closed")
            ended, took_s = end(run, signal.SIGTERM)
        assert ended.code == 143
        assert took_s < GONE_WITHIN_S + LOAD_S
        assert quick(*words).summary["complete"]


@pytest.mark.parametrize("signals", [1, 2])
def test_messages_that_nobody_reads_do_not_delay_the_end(signals, memory, quick):
    rows = write_rows("rows.jsonl", 1_000)
    faults = [{"method": "POST", "hang": True, "when": "after", "times": 2}]
    drain_s = 0.5 if signals == 1 else 600.0
    with emulator(faults=faults, start=quick.start) as service, full_pipe() as (_, writer):
        words = ("run", rows, *service.flags(), "--concurrency", "2", "--drain-timeout", f"{drain_s}s")
        with Running(*words, stderr=writer) as run:
            service.has_created(200)
            if signals == 2:
                run.signal(signal.SIGTERM)
            ended, took_s = end(run, signal.SIGINT)
        assert ended.code in (130, 143)  # of two signals at once either can be the first
        assert took_s < (drain_s + 1.0 if signals == 1 else GONE_WITHIN_S) + LOAD_S
        assert quick(*words).code == 0
        assert service.created == Counter(ids(1_000))


def test_a_check_that_waits_for_its_list_ends_at_once(memory):
    os.mkfifo("rows.jsonl")
    with Running("check", "rows.jsonl") as run:
        run.listens()
        ended, took_s = end(run, signal.SIGTERM)
    assert ended.code == 143
    assert took_s < GONE_WITHIN_S + LOAD_S
