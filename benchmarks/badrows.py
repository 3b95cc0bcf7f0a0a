"""(g) What does a bad row cost?

A request with a bad row is refused as a whole. The requests and instances that it takes to find all bad rows of a list
are counted against a service that is a function, with the search and the batch sizes of bulkwf. The bad rows are
scattered, or stand in groups. Beside it: halving, as bulkwf did before, and a lower bound of any way that gets no
names. Two lines are the command with the emulated service.
"""

import contextlib
import json
import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from math import lgamma, log
from pathlib import Path
from typing import NamedTuple

import bench
from bench import Line

from bulkwf.batching.bad_rows import BadRowRate, Search

ROWS = 10_000
MOST = 100
REQUEST_COST = 25.0
"""Instances that cost as much as a request at the default limits."""
OPEN = 32
"""Batches that are delivered at one time."""
SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
LISTS = 3
COMMAND_ROWS, COMMAND_BAD = 7_000, 100


class Cost(NamedTuple):
    """What a list takes."""

    requests: int
    instances: int


class Way(NamedTuple):
    """A way to find bad rows."""

    name: str
    cost: Callable[[int, frozenset[int]], Cost]


def measure(folder: Path, chosen: bench.Chosen) -> Iterator[Line]:
    """See the module."""
    rows = max(1_000, round(ROWS * chosen.scale))
    for kind, draw in (("scattered", scattered), ("in groups", grouped)):
        for share in SHARES:
            yield _simulated(kind, draw, share, rows)
    for named in (False, True):
        yield _commanded(folder, round(COMMAND_ROWS * max(chosen.scale, 0.1)), named=named)


def _simulated(kind: str, draw: Callable[[int, int, int], frozenset[int]], share: float, rows: int) -> Line:
    lists = [draw(rows, round(rows * share), seed) for seed in range(LISTS)]
    found = {way.name: _mean(rows, lists, way) for way in WAYS}
    text = "; ".join(f"{name} {requests:.1f}, {instances:.2f}" for name, (requests, instances) in found.items())
    lowest = bound(rows, round(rows * share), anywhere=draw is scattered)
    requests, instances = found["bulkwf"]
    goal = "≤ 11 requests, ≤ 2.35 instances" if (kind, share) == ("scattered", 0.01) else ""
    return Line(
        "(g) bad rows",
        f"{share:.1%} of {rows:,} rows, {kind}: further requests a bad row, instances a row",
        f"{text}; at least {lowest:.1f}",
        goal,
        requests <= 11 and instances <= 2.35 if goal else None,
        {"kind": kind, "share": share, "bound": lowest, **found},
    )


def _mean(rows: int, lists: Sequence[frozenset[int]], way: Way) -> tuple[float, float]:
    """Requests a bad row beyond those of a list without any, and instances sent for each row."""
    costs = [way.cost(rows, bad) for bad in lists]
    requests, bad = sum(cost.requests for cost in costs), sum(map(len, lists))
    return (requests - len(lists) * rows / MOST) / bad, sum(cost.instances for cost in costs) / (len(lists) * rows)


def _commanded(folder: Path, rows: int, *, named: bool) -> Line:
    """The command against the emulated service, which names the bad row of a request, or does not."""
    corpus, script = folder / "badrows.jsonl", folder / "badrows.json"
    number = COMMAND_BAD * rows // COMMAND_ROWS
    bad = sorted(scattered(rows, number, 0))
    corpus.write_text("".join(f'{{"instance_id":"row-{row}","params":{row}}}\n' for row in range(rows)))
    naming = [{"refuse_ids": f"^row-({'|'.join(map(str, bad))})$"}]
    nameless = [{"contains_id": f"row-{row}", "status": 400, "code": 10002, "message": "bad request"} for row in bad]
    script.write_text(json.dumps(naming if named else nameless))
    limit = bench.limit(None)
    with bench.emulator(*limit, "--faults", str(script)) as served:
        command = bench.submission(corpus, served, bench.fresh(folder / "badrows.bulkwf"), *limit)
        ran = bench.ran(command, exit_code=1)
    assert json.loads(ran.output)["rejected"] == number
    with contextlib.closing(sqlite3.connect(folder / "badrows.bulkwf")) as db:
        requests, instances = db.execute("SELECT count(*), sum(instances) FROM attempt").fetchone()
    most_requests, most_instances = rows / MOST + 11 * number, 2.6 * rows
    return Line(
        "(g) bad rows",
        f"the command, {rows:,} rows, {number} of them bad, refusals that name {'the row' if named else 'no row'}",
        f"{requests:,} requests, {instances:,} instances",
        f"≤ {most_requests:,.0f} requests, ≤ {most_instances:,.0f} instances",
        requests <= most_requests and instances <= most_instances,
    )


# --- the lists ----------------------------------------------------------------------------------------------------


def scattered(rows: int, number: int, seed: int) -> frozenset[int]:
    """Bad rows anywhere."""
    return frozenset(random.Random(seed).sample(range(rows), number))  # noqa: S311


def grouped(rows: int, number: int, seed: int) -> frozenset[int]:
    """Bad rows in groups of 5 to 40."""
    chance, bad = random.Random(seed), set[int]()  # noqa: S311
    while len(bad) < number:
        first = chance.randrange(rows)
        bad.update(range(first, min(rows, first + min(chance.randint(5, 40), number - len(bad)))))
    return frozenset(bad)


# --- the ways to find them ----------------------------------------------------------------------------------------


def halving(rows: int, bad: frozenset[int]) -> Cost:
    """A refused request is sent in two halves, and a row that is refused alone is sent once more."""
    requests = instances = 0

    def settle(part: range) -> None:
        nonlocal requests, instances
        requests, instances = requests + 1, instances + len(part)
        if not bad.isdisjoint(part):
            if len(part) == 1:
                requests, instances = requests + 1, instances + 1
                return
            middle = (len(part) + 1) // 2
            settle(part[:middle])
            settle(part[middle:])

    for first in range(0, rows, MOST):
        settle(range(first, min(rows, first + MOST)))
    return Cost(requests, instances)


def searching(rows: int, bad: frozenset[int], *, named: bool = False) -> Cost:
    """What bulkwf does: several batches at one time, each sends one request after another."""
    rate, sent = BadRowRate(MOST), list[int]()
    first, deliveries = 0, list[Iterator[int]]()
    chance = random.Random(0)  # noqa: S311
    while first < rows or deliveries:
        while first < rows and len(deliveries) < OPEN:
            size = min(rate.limit, rows - first)
            deliveries.append(_deliver(range(first, first + size), bad, rate, named=named))
            first += size
        delivery = chance.choice(deliveries)
        instances = next(delivery, None)
        if instances is None:
            deliveries.remove(delivery)
        else:
            sent.append(instances)
    return Cost(len(sent), sum(sent))


def _deliver(rows: range, bad: frozenset[int], rate: BadRowRate, *, named: bool) -> Iterator[int]:
    """Deliver a batch; gives the size of each request."""
    while rows:
        part = rows[: rate.limit]
        rows = rows[len(part) :]
        yield len(part)
        if bad.isdisjoint(part):
            rate.created(len(part))
        else:
            yield from _search(part, bad, rate, named=named)


def _search(part: Sequence[int], bad: frozenset[int], rate: BadRowRate, *, named: bool) -> Iterator[int]:
    search = Search(part, rate, REQUEST_COST)
    refused = [row for row in part if row in bad]
    while search.rows:
        if not refused:
            search.created(part)
        elif len(part) == 1:
            yield 1  # the second refusal
            yield 0  # the look-up
            search.found(part[0])
        else:
            search.refused(part, refused[0] if named else None)
        if search.rows:
            part = search.next_part()
            refused = [row for row in part if row in bad]
            yield len(part)


WAYS = (
    Way("halving", halving),
    Way("bulkwf", searching),
    Way("bulkwf, named", lambda rows, bad: searching(rows, bad, named=True)),
)


def bound(rows: int, bad: int, *, anywhere: bool) -> float:
    """Requests a bad row that no way without names goes below on average, beyond those of a list without bad rows.

    Each bad row is sent alone twice, and the others are created, up to `MOST` in a request. If bad rows may be
    *anywhere*, the answers, each a yes or no, must also hold the bits that distinguish one set of bad rows from all
    others; the second refusal of a row holds none.
    """
    bits = (lgamma(rows + 1) - lgamma(bad + 1) - lgamma(rows - bad + 1)) / log(2) if anywhere else 0.0
    return (max(bits + bad, (rows - bad) / MOST + 2 * bad) - rows / MOST) / bad
