"""(c) What does it cost to resume, until the first new request, for the checkpoint and for the list?

The list has settled rows and one batch of new rows. The cost of the checkpoint is opening it, reading its totals, and
iterating over its batches. The whole cost is that of a run, without that of a run over the new batch alone. Comparing
the list means reading it and taking the crc32 of each batch; it is compared with `for line in file`.
"""

import contextlib
import json
import shutil
import sqlite3
import statistics
from collections.abc import Iterator
from pathlib import Path

import bench
from bench import PYTHON, Line, Ran, Served
from corpus import write_corpus
from growth import LARGEST

from bulkwf.checkpoint import read_status
from bulkwf.checkpoint.records import seal_run

CHECKPOINT_ALONE = """
import os, sys, time
from pathlib import Path
from bulkwf.checkpoint import Checkpoint, inline, read_status
path = Path(sys.argv[1])
header = read_status(path).header
before = time.process_time()
checkpoint = Checkpoint.open(path, header, now=time.time(), executor=inline)
assert not checkpoint.counts().pending
for batch in checkpoint.begun():
    pass
print(time.process_time() - before, flush=True)
os._exit(0)
"""
LINES = """
import sys, time
before = time.process_time()
for line in open(sys.argv[1], "rb"):
    pass
print(time.process_time() - before)
"""
NEW = 100


def measure(folder: Path, chosen: bench.Chosen) -> Iterator[Line]:
    """See the module."""
    for rows in (round(10_000_000 * chosen.scale), round(1_000_000 * chosen.scale)):
        yield from _resume(folder, rows, chosen.rounds)


def _resume(folder: Path, rows: int, rounds: int) -> Iterator[Line]:
    corpus = write_corpus(folder, rows, 200)
    longer = write_corpus(folder, rows + NEW, 200)  # begins with the same rows
    alone = folder / "alone.jsonl"
    with longer.open("rb") as file:
        file.seek(corpus.stat().st_size)
        alone.write_bytes(file.read())
    settled, copy = folder / LARGEST, folder / "copy.bulkwf"
    with bench.fast_server() as served:
        if not settled.exists() or read_status(settled).rows != rows:
            bench.unlimited(corpus, served, settled)

        def resumed() -> Ran:
            shutil.copy(settled, bench.fresh(copy))
            move_to(copy, served)
            return bench.ran(bench.submission(longer, served, copy, *bench.limit(None)))

        def checkpoint_alone() -> Ran:
            shutil.copy(settled, bench.fresh(copy))
            return bench.ran((PYTHON, "-c", CHECKPOINT_ALONE, str(copy)))

        found = bench.in_turn(
            {
                "resumed": resumed,
                "started": lambda: bench.unlimited(alone, served, copy),
                "checkpoint": checkpoint_alone,
                "lines": lambda: bench.ran((PYTHON, "-c", LINES, str(longer))),
            },
            rounds,
        )
    assert all(json.loads(one.output)["settled_now"] == NEW for one in (*found["resumed"], *found["started"]))
    checkpoint_s, lines_s = (output_s(found[name]) for name in ("checkpoint", "lines"))
    peak_mb = max(one.peak_mb for one in found["checkpoint"])
    whole_s = bench.cpu_s(found["resumed"]) - bench.cpu_s(found["started"])
    yield Line(
        "(c) resume: the checkpoint",
        f"{rows:,} settled rows",
        f"{checkpoint_s:.2f} s of CPU, {peak_mb:.0f} MB",
        "≤ 0.5 s, ≤ 60 MB",
        checkpoint_s <= 0.5 and peak_mb <= 60,
    )
    yield Line(
        "(c) resume: with the list",
        f"{rows:,} settled rows",
        f"{whole_s:.2f} s of CPU, {whole_s / lines_s:.2f} times `for line in file` ({lines_s:.2f} s)",
        "≤ 1.50 times",
        whole_s <= 1.5 * lines_s,
    )


def output_s(runs: list[Ran]) -> float:
    """The median of the seconds that processes printed."""
    return statistics.median(float(one.output) for one in runs)


def move_to(checkpoint: Path, served: Served) -> None:
    """Change the base URL in a checkpoint to that of this server, as each has another port."""
    with contextlib.closing(sqlite3.connect(checkpoint)) as db, db:
        db.execute("UPDATE run SET base_url = ?", (served.base_url,))
        seal_run(db)
