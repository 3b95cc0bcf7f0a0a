"""(d) What share of the permitted rate is used, and is any window over it?

The emulator measures: its windows slide, and an instance counts when the body of its request has arrived. The share is
one second divided by the average time that the instances of one second took. Answers take 50 to 500 ms. Two cases run
at a time, as they hardly use the processor.
"""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import bench
from bench import Line, Served
from corpus import write_corpus


class Case(NamedTuple):
    """One rate to keep."""

    name: str
    rate: int
    flags: tuple[str, ...] = ()
    faults: tuple[dict[str, object], ...] = ()
    row_bytes: int = 200
    existing: bool = False


LATE = {"latency_s": [0.05, 0.5], "when": "after"}
CASES = (
    Case("3,000 instances/s", 3_000),
    Case("4 requests/s, of one instance each", 4, ("--batch-size", "1")),
    Case("100 instances/s", 100),
    Case("300 instances/s", 300),
    Case("100 instances/s, each request over a new connection", 100, (), ({"disconnect": True},)),
    Case("100 instances/s, one id of each batch exists and is looked up", 100, existing=True),
    Case("100 instances/s, rows of 15 KB: two requests a second", 100, row_bytes=15_000),
)
SECONDS = 60


def measure(folder: Path, chosen: bench.Chosen) -> Iterator[Line]:
    """See the module."""
    folders = [folder / f"limiter-{number}" for number in range(len(CASES))]
    rows = [round(case.rate * (SECONDS * chosen.scale + 2)) for case in CASES]
    lists = [write_corpus(folder, number, case.row_bytes) for number, case in zip(rows, CASES, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(_keep, CASES, rows, lists, folders)


def _keep(case: Case, rows: int, corpus: Path, folder: Path) -> Line:
    folder.mkdir(exist_ok=True)
    script, log = folder / "faults.json", folder / "created.log"
    script.write_text(json.dumps([LATE, *case.faults]))
    log.unlink(missing_ok=True)
    limit = bench.limit(case.rate)
    with bench.emulator(*limit, "--faults", str(script), "--log", str(log)) as served:
        earlier = _begin_some(corpus, folder, served, log) if case.existing else 0
        bench.ran(bench.submission(corpus, served, bench.fresh(folder / "run.bulkwf"), *limit, *case.flags))
    requests = [json.loads(line) for line in log.read_text().splitlines()][earlier:]
    arrived = [one["at"] for one in requests for _ in one["ids"]]
    took_s = arrived[-1] - arrived[0]
    share = 1 / _second_s(arrived, round(case.rate * len(arrived) / rows))
    worst = bench.worst_window(served)
    return Line(
        "(d) limiter",
        case.name,
        f"{share:.2%} of the rate over {took_s:.1f} s, worst window {worst:,}",
        f"≥ 99 %, ≤ {case.rate:,}",
        share >= 0.99 and worst <= case.rate,
    )


def _second_s(arrived: Sequence[float], rate: int) -> float:
    """How long *rate* instances take on average, in seconds."""
    return (sum(arrived[-rate:]) - sum(arrived[:rate])) / (len(arrived) - rate)


def _begin_some(corpus: Path, folder: Path, served: Served, log: Path) -> int:
    """Create an id of each hundred; returns the number of requests."""
    some = folder / "some.jsonl"
    some.write_bytes(b"".join(corpus.read_bytes().splitlines(keepends=True)[37::100]))
    bench.ran(bench.submission(some, served, bench.fresh(folder / "some.bulkwf")))
    time.sleep(2)  # two runs on one workflow share its window
    return len(log.read_text().splitlines())
