"""Checks a list without the network: which rows are invalid, which ids occur twice, how long a run would take."""

import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import nsmallest
from pathlib import Path
from zlib import crc32

from bulkwf.batching.batcher import Batcher
from bulkwf.batching.ids import IdScheme
from bulkwf.errors import InputError
from bulkwf.model import Batch
from bulkwf.options import REQUEST_PERIOD_S, Options
from bulkwf.sources import Source
from bulkwf.threads import in_daemon_thread

__all__ = ["CheckReport", "check_list"]

EXAMPLES = 20
BUCKETS = 256
"""Number of temporary files over which ids are spread, so that one file at a time fits in memory."""
WAITING_ROWS = 100_000
"""Number of ids that are kept in memory before they are written."""


@dataclass(slots=True)
class CheckReport:
    """What a check has found in a list.

    Attributes:
        rows: Number of rows, without blank ones.
        instances: Number of rows that can be sent.
        batches: Number of create requests for these instances.
        invalid: Number of invalid rows, by error code.
        duplicates: Number of rows with the id of an earlier row.
        examples: (place, reason) of the first `EXAMPLES` invalid rows and duplicates.
    """

    rows: int = 0
    instances: int = 0
    batches: int = 0
    invalid: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether every row can be sent and no id occurs twice."""
        return not self.invalid and not self.duplicates

    def note(self, place: str, reason: str) -> None:
        """Add an example, unless there are enough."""
        if len(self.examples) < EXAMPLES:
            self.examples.append((place, reason))

    def shortest_s(self, options: Options) -> tuple[float, str]:
        """The shortest time that a run can take, in seconds, and the name of the limit that decides it."""
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
        InputError: The list can't be read to its end, or the temporary files with its ids can't be written.
    """
    report = CheckReport()
    batcher = Batcher(source, scheme, options, linger_s=None)  # a slow source may be faster in the run
    try:
        with tempfile.TemporaryDirectory(prefix="bulkwf-check-") as folder:
            ids = _Ids(Path(folder))
            while (batch := await batcher.next()) is not None:
                _count(report, batch, source)
                if ids.add(batch):
                    await in_daemon_thread(ids.write)
            await in_daemon_thread(ids.write)
            first = await in_daemon_thread(ids.find_repeated)
    except OSError as error:
        raise InputError(
            f"the ids of the list can't be written to temporary files: {error.strerror or error}. Make room in "
            f"{tempfile.tempdir or 'TMPDIR'}, or name another folder with TMPDIR, and run the same command again."
        ) from None
    report.duplicates = ids.repeated
    for row, earlier, instance_id in first:
        report.note(source.where(row), f"the id {instance_id!r} is that of {source.where(earlier)} already")
    return report


def _count(report: CheckReport, batch: Batch, source: Source) -> None:
    report.rows += len(batch.ids) + len(batch.refused)
    report.instances += len(batch.ids)
    report.batches += bool(batch.ids)
    for result in batch.refused:
        if result.code == "duplicate_id":  # counted with all the others at the end
            continue
        report.invalid[str(result.code)] += 1
        report.note(source.where(result.row), str(result.message))


class _Ids:
    """The ids of a list with their rows, spread over temporary files by crc32.

    A file is a sequence of blocks: the block's size in 4 bytes, then compressed lines `<row> <id>` in row order.
    Only the distinct ids of one file at a time are held in memory.

    Attributes:
        repeated: Number of rows with the id of an earlier row; counted by `find_repeated`.
    """

    def __init__(self, folder: Path) -> None:
        self.repeated = 0
        self._paths = [folder / f"{number:03}" for number in range(BUCKETS)]
        self._waiting: list[list[str]] = [[] for _ in range(BUCKETS)]
        self._count = 0

    def add(self, batch: Batch) -> bool:
        """Add the ids of a batch, also those that occur twice in it; True if `write` is due."""
        rows = [(batch.first_row + offset, one) for offset, one in zip(batch.offsets, batch.ids, strict=True)]
        again = [(one.row, one.id) for one in batch.refused if one.code == "duplicate_id" and one.id is not None]
        for row, instance_id in sorted(rows + again) if again else rows:
            self._waiting[crc32(instance_id.encode()) % BUCKETS].append(f"{row} {instance_id}")
        self._count += len(rows) + len(again)
        return self._count >= WAITING_ROWS

    def write(self) -> None:
        """Write the ids that `add` has kept in memory."""
        for path, lines in zip(self._paths, self._waiting, strict=True):
            if lines:
                block = zlib.compress("\n".join(lines).encode("ascii"), 1)
                with path.open("ab") as file:
                    file.write(len(block).to_bytes(4, "little") + block)
                lines.clear()
        self._count = 0

    def find_repeated(self) -> list[tuple[int, int, str]]:
        """(row, earlier row, id) of the first `EXAMPLES` rows with the id of an earlier row. Counts all such rows."""
        return nsmallest(EXAMPLES, self._find_all())

    def _find_all(self) -> Iterator[tuple[int, int, str]]:
        for path in self._paths:
            first: dict[str, int] = {}
            for line in _lines(path):
                row, _, instance_id = line.partition(" ")
                earlier = first.setdefault(instance_id, int(row))
                if earlier != int(row):
                    self.repeated += 1
                    yield int(row), earlier, instance_id


def _lines(path: Path) -> Iterator[str]:
    if path.exists():
        with path.open("rb") as file:
            while size := file.read(4):
                block = file.read(int.from_bytes(size, "little"))
                yield from zlib.decompress(block).decode("ascii").split("\n")
