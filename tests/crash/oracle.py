"""Lists with rows of every kind, and what must be true of each row after any fault."""

import gzip
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import Request, urlopen
from zlib import crc32

from canary import PARAMS
from command import ACCOUNT, Service

from bulkwf import read_results
from bulkwf.checkpoint import read_status
from bulkwf.emulator import Created
from bulkwf.errors import CheckpointError
from bulkwf.model import Result

GOOD = ("own", "plain", "hidden")
"""Kinds of rows that begin once, with their own params. Every one of them has others."""
ALLOWED = {
    "own": {"created", "existed"},
    "plain": {"created", "existed"},
    "hidden": {"created", "existed"},
    "taken": {"existed"},
    "twin": {"created", "existed", "invalid"},
    "bad": {"invalid"},
    "poison": {"rejected"},
}
RULES = ({"refuse_ids": "^poison-"}, {"omit_created": "^hidden-", "method": "POST"})
"""What the service does with rows, by their ids."""
FLAWS = ("lost", "duplicated", "falsely reported", "unreadable")
"""Kinds of broken promises."""
COUNT_FLAWS = ", ".join(f"{{{flaw}:,}} {flaw}" for flaw in FLAWS)
"""The number of each, for the line of a tally."""


@dataclass(frozen=True)
class Row:
    """One line of a list.

    own: brings its id. plain: gets one. twin: brings the id of another row, which is then a twin, too. hidden: the
    service never says that it has created it. taken: its id has begun before the run. bad, poison, blank: as it says.
    """

    kind: str
    line: bytes
    id: str | None = None
    crc: str | None = None


def make_row(kind: str, number: int, id_: str | None = None) -> Row:
    """A row with params of its own."""
    if kind == "blank":
        return Row(kind, b" " * (number % 3))
    if kind == "bad":
        return Row(kind, (b"nonsense", b"[1]", b'{"instance_id":"a b"}', b'{"params":}')[number % 4])
    params = json.dumps({"n": number, "big": 10**30 + number, "secret": PARAMS}).encode()
    crc = f"{crc32(params):08x}"
    if kind == "plain":
        return Row(kind, b'{"params":%b}' % params, crc=crc)
    id_ = id_ or f"{kind}-{number}"
    return Row(kind, b'{"instance_id":"%b","params":%b}' % (id_.encode(), params), id_, crc)


def draw_rows(chance: random.Random, size: int) -> list[Row]:
    """Rows: all, half or none of them with ids; and none, few or many of the other kinds."""
    # A hundred poisoned rows would end the run, and `take_ids` puts all taken ids into one request.
    own, odd = chance.choice((0.0, 0.5, 1.0)), chance.choice((0.0, 0.02, min(0.1, 200 / size)))
    rows: list[Row] = []
    for number in range(size):
        kind = "own" if chance.random() < own else "plain"
        if chance.random() < odd:
            kind = chance.choice(("blank", "bad", "poison", "hidden", "taken", "twin"))
        if kind != "twin":
            rows.append(make_row(kind, number))
        elif others := [other for other, row in enumerate(rows) if row.kind in ("own", "twin")]:
            other = chance.choice(others)
            rows[other] = Row("twin", rows[other].line, rows[other].id, rows[other].crc)
            rows.append(make_row(kind, number, rows[other].id))
    return rows


def write_list(rows: Sequence[Row], form: str = "plain") -> list[str]:
    """Write rows as a list; returns the words that name it and its checkpoint, which is `rows.bulkwf`."""
    lines = [row.line + b"\n" for row in rows]
    cut = len(lines) // 3 if form == "two files" else len(lines)
    pieces = {f"rows-{n}.jsonl": b"".join(piece) for n, piece in enumerate((lines[:cut], lines[cut:])) if piece}
    if form == "gzip":
        pieces = {f"{name}.gz": gzip.compress(data, 1) for name, data in pieces.items()}
    for name, data in pieces.items():
        Path(name).write_bytes(data)
    return [*pieces, "-c", "rows.bulkwf"]


def take_ids(service: Service, rows: Sequence[Row]) -> None:
    """Let the instances of the taken rows begin, in one request, before the run."""
    taken = [{"instance_id": row.id, "params": {"before": True}} for row in rows if row.kind == "taken"]
    url = f"{service.base_url}/accounts/{ACCOUNT}/workflows/resize/instances/batch"
    headers = {"Authorization": "Bearer another", "Content-Type": "application/json"}
    if taken:
        with urlopen(Request(url, json.dumps(taken).encode(), headers)) as answer:
            assert answer.status == 200


@dataclass
class Oracle:
    """Compares what a checkpoint says with the instances that really began, after each session and at the end."""

    rows: Sequence[Row]
    flaws: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    """Each flaw, for people."""
    older: bool = False
    """An older copy of the checkpoint was restored: what it repeats comes back as `existed`, and never was in doubt."""
    _settled: dict[int, tuple[str, str | None]] = field(default_factory=dict)

    def look(self, checkpoint: Path, begun: Iterable[Created]) -> int:
        """Check between two sessions; returns the number of rows in doubt."""
        begun = list(begun)
        try:
            status = read_status(checkpoint)
            results, pending = list(read_results(checkpoint)), list(read_results(checkpoint, outcome="pending"))
        except CheckpointError as error:
            # Until its tables are there, nothing is sent.
            if any(self._ours(begun)) or self._settled:
                self._note("unreadable", str(error))
            return 0
        totals = status.counts
        known = [*results, *pending]
        counts = {name: getattr(totals, name) for name in ("created", "existed", "rejected", "invalid", "pending")}
        if Counter(result.outcome for result in known) != +Counter(counts):
            self._note("falsely reported", f"the status says {totals}")
        covered = [number for number, row in enumerate(self.rows[: status.rows]) if row.kind != "blank"]
        if sorted(result.row for result in known) != covered:
            self._note("lost", f"the first {status.rows} rows are not those that the checkpoint knows")
        for id_ in {one.id for one in self._ours(begun)} - {result.id for result in known}:
            self._note("lost", f"{id_} has begun, and the checkpoint does not know it")
        self._hold_truth(results, begun)
        return totals.pending

    def hear(self, row: int, outcome: str, id_: str | None) -> None:
        """The run has announced this outcome of a row, so it must be durable."""
        self._settled.setdefault(row, (outcome, id_))

    def judge(self, checkpoint: Path, begun: Iterable[Created]) -> None:
        """Check at the end of the list."""
        begun = list(begun)
        if self.look(checkpoint, begun):
            self._note("lost", "rows are pending at the end")
        for id_, times in Counter(one.id for one in begun).items():
            if times > 1:
                self._note("duplicated", f"{id_} has begun {times} times")
        times = Counter(one.crc for one in begun)
        for number, row in enumerate(self.rows):
            if row.kind != "blank" and number not in self._settled:
                self._note("lost", f"row {number} ({row.kind}) is not accounted for")
            if row.kind in GOOD and times[row.crc] != 1:
                self._note("duplicated" if times[row.crc] else "lost", f"row {number} began {times[row.crc]} times")
            if row.kind in ("bad", "poison") and times[row.crc]:
                self._note("falsely reported", f"row {number} ({row.kind}) has begun")
        for id_ in {row.id for row in self.rows if row.kind == "twin"} - {one.id for one in begun}:
            self._note("lost", f"no row with the id {id_} has begun")
        valid = sum(row.kind in GOOD for row in self.rows)
        ids = {row.id for row in self.rows if row.kind in ("twin", "taken")}
        if len(begun) != valid + len(ids):
            self._note("duplicated", f"{len(begun)} instances have begun; {valid + len(ids)} should have")

    @property
    def code(self) -> int:
        """The exit code of a run that has finished the list."""
        return int(any(outcome in ("rejected", "invalid") for outcome, _ in self._settled.values()))

    def assert_flawless(self) -> None:
        """No flaw was found so far."""
        assert not self.problems, "\n".join(self.problems[:20])

    def _ours(self, begun: Iterable[Created]) -> list[Created]:
        """The instances that the run has begun."""
        return [one for one in begun if not one.id.startswith("taken-")]

    def _hold_truth(self, results: Sequence[Result], begun: Iterable[Created]) -> None:
        """Check that each result is true, and stays."""
        crcs: dict[str, set[str | None]] = defaultdict(set)
        for one in begun:
            crcs[one.id].add(one.crc)
        for result in results:
            row = self.rows[result.row]
            what = f"row {result.row} ({row.kind}) is {result}"
            said = (result.outcome, result.id)
            if self._settled.setdefault(result.row, said) != said:
                self._note("falsely reported", f"{what}, and was {self._settled[result.row]}")
            if result.outcome not in ALLOWED[row.kind]:
                self._note("falsely reported", what)
            if result.outcome in ("created", "existed") and result.id not in crcs:
                self._note("falsely reported", f"{what}, and has not begun")
            elif (result.outcome == "created" or row.kind in GOOD) and row.crc not in crcs[result.id]:
                self._note("falsely reported", f"{what}, and what has begun has other params")
            if result.outcome == "existed" and row.kind in ("own", "plain") and not (result.in_doubt or self.older):
                self._note("falsely reported", f"{what}, and no earlier attempt is in doubt")
        for number in self._settled.keys() - {result.row for result in results}:
            self._note("lost", f"row {number} was settled, and is no longer")

    def _note(self, flaw: str, text: str) -> None:
        self.flaws[flaw] += 1
        self.problems.append(f"{flaw}: {text}")
