"""(a) What does a row cost, compared with the tools that people would use instead?"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import bench
from bench import HERE, PYTHON, Line, Ran, Served
from corpus import write_corpus


def rivals(rows: Path, served: Served, folder: Path) -> dict[str, Callable[[], Ran]]:
    """All rivals, over one list."""
    results = str(folder / "results")

    def curl() -> Ran:
        shutil.rmtree(folder / "curl", ignore_errors=True)
        return bench.ran(("sh", str(HERE / "rivals/curl.sh"), str(rows), served.base_url, str(folder / "curl")))

    def script(name: str) -> Callable[[], Ran]:
        return lambda: bench.ran((PYTHON, str(HERE / "rivals" / name), str(rows), served.base_url, results))

    return {
        "bulkwf": lambda: bench.unlimited(rows, served, folder / "run.bulkwf"),
        "yardstick": lambda: bench.ran((PYTHON, str(HERE / "rivals/yardstick.py"), str(rows), served.base_url)),
        "split + curl -Z": curl,
        "httpx script": script("httpx_script.py"),
        "SDK script": script("sdk.py"),
    }


def measure(folder: Path, chosen: bench.Chosen) -> Iterator[Line]:
    """See the module."""
    for row_bytes, rows, goal in ((200, 1_000_000, 0.95), (2_000, 1_000_000, 0.50)):
        yield from _beside_the_yardstick(folder, row_bytes, round(rows * chosen.scale), goal, chosen.rounds)
        yield from _beside_the_yardstick(folder, row_bytes, round(rows * chosen.scale / 5), None, chosen.rounds)
    yield from _beside_scripts(folder, round(200_000 * chosen.scale), chosen.rounds)


def _beside_the_yardstick(folder: Path, row_bytes: int, rows: int, goal: float | None, rounds: int) -> Iterator[Line]:
    corpus = write_corpus(folder, rows, row_bytes)
    with bench.fast_server() as served:
        everyone = rivals(corpus, served, folder)
        found = bench.in_turn({name: everyone[name] for name in ("bulkwf", "yardstick")}, rounds)
    check(found, rows)
    ours, theirs = found["bulkwf"], found["yardstick"]
    ratio = bench.ratio(ours, theirs)
    costs = {"bulkwf": bench.cost_us(ours, rows), "yardstick": bench.cost_us(theirs, rows)}
    yield Line(
        "(a) CPU",
        f"{rows:,} rows of {row_bytes:,} B",
        f"{ratio:.2f} of the yardstick: {costs['bulkwf']:.2f} against {costs['yardstick']:.2f} µs per instance "
        f"(server busy {bench.busy(served):.0%})",
        "" if goal is None else f"≤ {goal:.2f}",
        None if goal is None else ratio <= goal,
        costs,
    )


def _beside_scripts(folder: Path, rows: int, rounds: int) -> Iterator[Line]:
    corpus = write_corpus(folder, rows, 200)
    with bench.fast_server() as served:
        found = bench.in_turn(rivals(corpus, served, folder), rounds)
    check(found, rows)
    ours = found.pop("bulkwf")
    for name, goal in (("split + curl -Z", None), ("httpx script", 8), ("SDK script", 20)):
        rates = {"bulkwf": bench.rate(ours, rows), name: bench.rate(found[name], rows)}
        times = rates["bulkwf"] / rates[name]
        yield Line(
            "(a) instances/s",
            f"{rows:,} rows of 200 B, {name}",
            f"{times:.1f} times: {rates['bulkwf']:,.0f}/s against {rates[name]:,.0f}/s; "
            f"CPU {bench.cpu_s(ours):.2f} s against {bench.cpu_s(found[name]):.2f} s; "
            f"peak {max(one.peak_mb for one in ours):.0f} MB against {max(one.peak_mb for one in found[name]):.0f} MB",
            f"≥ {goal} times" if goal else "",
            times >= goal if goal else None,
            rates,
        )


def check(found: dict[str, list[Ran]], rows: int) -> None:
    """Check that each rival created all rows."""
    for name, runs in found.items():
        for one in runs:
            created = json.loads(one.output)["created"] if name == "bulkwf" else int(one.output)
            assert created == rows, f"{name} created {created:,} of {rows:,}"
