"""Power cuts: what was called durable is there afterwards, and the next run finishes the list.

The checkpoint lies on a file system of its own, in an image. To that one `FS_IOC_SHUTDOWN`, its log not flushed, is
what a power cut is to a disk: what was not synced is gone.
"""

import fcntl
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from canary import assert_silent, assert_silent_files
from command import emulator, environment
from torture import scaled, tally

from bulkwf.emulator import read_log
from crash.oracle import COUNT_FLAWS, Oracle, make_row, write_list

pytestmark = pytest.mark.slow

LISTS = scaled(2, 10)
CUTS = 2
"""Of each list's run: of the first session and of the one that resumes."""
ROWS = 5_000
SHUTDOWN = 0x8004587D
LOG_NOT_FLUSHED = struct.pack("I", 2)
CHECKPOINT = Path("disk", "done")
STREAM = f"""
import asyncio, json, sys
from bulkwf import Options, RateLimits, submit_stream
async def main(rows, base_url):
    limits = RateLimits(instances_per_s=None, requests_per_5m=None, concurrency=4)
    place = dict(workflow="resize", base_url=base_url, checkpoint="{CHECKPOINT}")
    async with submit_stream(rows, **place, options=Options(rate=limits)) as results:
        async for result in results:
            print(json.dumps([result.row, result.outcome, result.id]), flush=True)
asyncio.run(main(*sys.argv[1:]))
"""


counted = tally(
    "{cuts:,} power cuts after {announced:,} results of {rows:,} rows, {in doubt:,} with rows in doubt: " + COUNT_FLAWS
)


def mount():
    """Mount the image; returns why it can't be."""
    words = ("mount", "-o", "loop", "image", "disk")
    return subprocess.run(words, check=False, capture_output=True, text=True).stderr.strip()


@pytest.fixture
def disk(folder):
    """A small ext4 file system, mounted on `disk`."""
    Path("disk").mkdir()
    with Path("image").open("wb") as image:
        image.truncate(32 << 20)
    try:
        subprocess.run(("mkfs.ext4", "-q", "-F", "image"), check=True, capture_output=True)
        problem = mount()
    except FileNotFoundError as error:
        problem = error
    if problem:
        pytest.skip(f"NOT TESTED: no image of a disk can be mounted here: {problem}")
    yield
    if Path("disk").is_mount():
        subprocess.run(("umount", "--lazy", "disk"), check=True)


def cut_the_power():
    """Everything that the disk has not got by now never gets there."""
    folder = os.open("disk", os.O_RDONLY)
    try:
        fcntl.ioctl(folder, SHUTDOWN, LOG_NOT_FLUSHED)
    finally:
        os.close(folder)


def start_again():
    """The power is back."""
    subprocess.run(("umount", "disk"), check=True)
    assert not mount()


def run_until_cut(rows, service, chance):
    """Run the list, cut the power at some moment, and kill the run; returns the results that the run has announced."""
    announced, problems = Path("announced"), Path("problems")
    more, later_s = chance.choice((1, chance.randrange(1, 50_000))), chance.uniform(0.0, 0.05)
    with announced.open("wb") as out, problems.open("wb") as err:
        words = (sys.executable, "-c", STREAM, rows, service.base_url)
        with subprocess.Popen(words, env=environment(), stdout=out, stderr=err) as run:
            try:
                while announced.stat().st_size < more and run.poll() is None:
                    time.sleep(0.001)
                time.sleep(later_s)
                run.send_signal(signal.SIGSTOP)  # a sync after the cut must not be announced
                cut_the_power()
            finally:
                run.kill()
    assert_silent(problems.read_bytes(), "stderr")
    return [json.loads(line) for line in announced.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


@pytest.mark.parametrize("seed", range(LISTS))
def test_durable_results_survive_a_power_cut_and_the_next_run_finishes_the_list(disk, quick, seed):
    chance = random.Random(seed)
    rows = [make_row(chance.choice(("own", "plain")), number) for number in range(ROWS)]
    [name, *_] = write_list(rows)
    oracle = Oracle(rows)
    with emulator(start=quick.start) as service:
        for _ in range(CUTS):
            heard = run_until_cut(name, service, chance)
            for result in heard:
                oracle.hear(*result)
            start_again()
            in_doubt = oracle.look(CHECKPOINT, read_log(service.log))
            counted.update({"cuts": 1, "announced": len(heard), "in doubt": in_doubt > 0})
        assert quick("run", name, *service.flags(), "-c", CHECKPOINT).code == 0
        oracle.judge(CHECKPOINT, read_log(service.log))
    counted.update(oracle.flaws, rows=ROWS)
    oracle.assert_flawless()
    assert_silent_files(Path("disk"), "*")
