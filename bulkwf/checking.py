"""Validate a list without any network: what would be refused, which ids stand twice, and how long it will take."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

from bulkwf.batching import IdScheme, Packer
from bulkwf.model import Batch
from bulkwf.options import REQUEST_PERIOD_S, Options
from bulkwf.sources import Source

__all__ = ["CheckReport", "check_list"]

EXAMPLES = 20
BUCKETS = 256
"""Ids are spread over so many files, so that one at a time fits in memory however long the list is."""


@dataclass(slots=True)
class CheckReport:
    """What a list holds.

    Attributes:
        rows: Rows, blank ones not counted.
        instances: Rows that can be sent.
        batches: Requests that they take.
        invalid: Rows that would be refused, by reason.
        duplicates: Rows whose id an earlier row has.
        examples: (place, reason) of the first of them.
    """

    rows: int = 0
    instances: int = 0
    batches: int = 0
    invalid: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether every row can be sent and none stands twice."""
        return not self.invalid and not self.duplicates

    def note(self, place: str, reason: str) -> None:
        """Keep one of the first examples."""
        if len(self.examples) < EXAMPLES:
            self.examples.append((place, reason))

    def shortest_s(self, options: Options) -> tuple[float, str]:
        """The least time that the list can take, and the limit that makes it so."""
        rate = options.rate
        by_instances = self.instances / rate.instances_per_s if rate.instances_per_s else 0.0
        by_requests = self.batches * REQUEST_PERIOD_S / rate.requests_per_5m if rate.requests_per_5m else 0.0
        if by_instances >= by_requests:
            name = f"{rate.instances_per_s:,} instances/s" if rate.instances_per_s else "no limit"
            return by_instances, name
        return by_requests, f"{rate.requests_per_5m:,} requests/5 min"


async def check_list(source: Source, scheme: IdScheme, options: Options) -> CheckReport:
    """Read the whole list as a run would.

    Raises:
        InputError: It can't be read to its end.
    """
    report = CheckReport()
    with tempfile.TemporaryDirectory(prefix="bulkwf-check-") as folder:
        buckets = _Buckets(Path(folder))
        while (batch := await _next_batch(source, scheme, options)) is not None:
            _count(report, batch, source)
            buckets.add(batch)
        for row, earlier, instance_id in buckets.duplicates():
            report.duplicates += 1
            report.note(source.where(row), f"the id {instance_id!r} is that of {source.where(earlier)} already")
    return report


async def _next_batch(source: Source, scheme: IdScheme, options: Options) -> Batch | None:
    packer = Packer(scheme, options.batch, options.row_shape, options.batch_instances)
    piece = await source.take(packer.missing, packer.missing_bytes)
    if piece is None:
        return None
    packer.add(piece)
    return packer.pack()


def _count(report: CheckReport, batch: Batch, source: Source) -> None:
    report.rows += len(batch.ids) + len(batch.refused)
    report.instances += len(batch.ids)
    report.batches += bool(batch.ids)
    for result in batch.refused:
        if result.code == "duplicate_id":  # counted with all the others at the end
            continue
        report.invalid[str(result.code)] += 1
        report.note(source.where(result.row), str(result.message))


class _Buckets:
    """The ids of a list, spread over files by their crc."""

    def __init__(self, folder: Path) -> None:
        self._paths = [folder / f"{number:03}" for number in range(BUCKETS)]
        self._waiting: list[list[str]] = [[] for _ in range(BUCKETS)]
        self._count = 0

    def add(self, batch: Batch) -> None:
        """Take in a batch's ids, those that stand twice in it too."""
        again = [(r.row, r.id) for r in batch.refused if r.code == "duplicate_id" and r.id is not None]
        sent = zip((batch.first_row + offset for offset in batch.offsets), batch.ids, strict=True)
        for row, instance_id in (*sent, *again):
            self._waiting[crc32(instance_id.encode()) % BUCKETS].append(f"{row:015} {instance_id}\n")
            self._count += 1
        if self._count > 100_000:
            self._flush()

    def duplicates(self) -> Iterator[tuple[int, int, str]]:
        """(row, earlier row, id) of each id that an earlier row has."""
        self._flush()
        for path in self._paths:
            if not path.exists():
                continue
            first: dict[str, int] = {}
            for line in sorted(path.read_text("ascii").splitlines()):
                row, _, instance_id = line.partition(" ")
                earlier = first.setdefault(instance_id, int(row))
                if earlier != int(row):
                    yield int(row), earlier, instance_id

    def _flush(self) -> None:
        for path, lines in zip(self._paths, self._waiting, strict=True):
            if lines:
                with path.open("ab") as file:
                    file.write("".join(lines).encode("ascii"))
                lines.clear()
        self._count = 0
