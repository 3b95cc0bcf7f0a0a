"""(b) and (f): How do memory and cost grow with the list?"""

import json
from collections.abc import Iterator
from pathlib import Path

import bench
from bench import Line, Ran
from corpus import write_corpus

SIZES = (10_000, 100_000, 1_000_000, 5_000_000, 10_000_000)
LARGEST = "largest.bulkwf"
"""The checkpoint of the longest run, for `resume.py`."""


def measure(folder: Path, chosen: bench.Chosen) -> Iterator[Line]:
    """See the module."""
    found: dict[int, list[Ran]] = {}
    sizes = [round(size * chosen.scale) for size in SIZES]
    for rows in sizes:
        corpus = write_corpus(folder, rows, 200)
        rounds = chosen.rounds if rows <= 1_000_000 else 1
        with bench.fast_server() as served:
            found[rows] = [bench.unlimited(corpus, served, folder / LARGEST) for _ in range(rounds)]
        assert all(json.loads(one.output)["created"] == rows for one in found[rows])
    peaks = {rows: max(one.peak_mb for one in runs) for rows, runs in found.items()}
    costs = {rows: bench.cost_us(runs, rows) for rows, runs in found.items()}
    small, _, large, largest = sizes[1:]
    more = peaks[large] - peaks[small]
    yield Line(
        "(b) memory",
        " / ".join(f"{rows:,}" for rows in sizes) + " rows",
        "peak " + " / ".join(f"{peak:.0f}" for peak in peaks.values()) + " MB",
        f"≤ 70 MB at {large:,}, ≤ 10 MB more than at {small:,}",
        peaks[large] <= 70 and more <= 10,
        {"rows": sizes, "MB": list(peaks.values())},
    )
    yield Line(
        "(f) growth",
        " / ".join(f"{rows:,}" for rows in sizes) + " rows",
        " / ".join(f"{cost:.2f}" for cost in costs.values())
        + f" µs of CPU an instance; the last {costs[largest] / costs[small]:.2f} times that at {small:,}",
        "≤ 1.10 times",
        costs[largest] <= 1.1 * costs[small],
        {"rows": sizes, "us": list(costs.values())},
    )
