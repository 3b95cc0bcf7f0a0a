"""(e) How long does a list take while the service is failing, compared with the ideal?

The ideal is rows divided by rate, plus the pauses that the service orders. It ignores that each failed attempt may have
created its instances, and so uses the rate: the time that all attempts need is reported, too.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import bench
from bench import Line
from corpus import write_corpus

from bulkwf.options import SERVICE_BATCH_LIMIT

RATE = 1_000
SECONDS = 60
PAUSES, PAUSE_S = (100, 300, 500), 2
FAULTS = [
    *({"request": number, "status": 429, "retry_after": PAUSE_S} for number in PAUSES),
    {"method": "POST", "chance": 0.02, "status": 500, "when": "before"},
    {"method": "POST", "chance": 0.01, "reset": True, "when": "before"},
    {"latency_s": [0.05, 0.5], "when": "after"},
]


def measure(folder: Path, chosen: bench.Chosen) -> Iterator[Line]:
    """See the module."""
    rows = round(RATE * SECONDS * chosen.scale)
    corpus = write_corpus(folder, rows, 200)
    script = folder / "faults.json"
    script.write_text(json.dumps(FAULTS))
    limit = bench.limit(RATE)
    with bench.emulator(*limit, "--faults", str(script)) as served:
        ran = bench.ran(bench.submission(corpus, served, bench.fresh(folder / "run.bulkwf"), *limit))
    summary = json.loads(ran.output)
    ideal_s = rows / RATE + len(PAUSES) * PAUSE_S
    over = summary["elapsed_s"] / ideal_s - 1
    asked_s = (summary["attempts"] - len(PAUSES)) * SERVICE_BATCH_LIMIT / RATE + len(PAUSES) * PAUSE_S
    yield Line(
        "(e) a failing service",
        f"{rows:,} rows at {RATE:,}/s, 2 % 500, 1 % resets, {len(PAUSES)} times 429 for {PAUSE_S} s",
        f"{summary['elapsed_s']:.1f} s, {over:+.1%} of the ideal {ideal_s:.1f} s; "
        f"{summary['attempts']:,} requests, which take {asked_s:.1f} s",
        "≤ 3 % more",
        over <= 0.03,
    )
