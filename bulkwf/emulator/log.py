"""The log of the instances that were created: JSON Lines, one line per batch, written before the answer is sent.

`{"request": n, "at": seconds, "account": …, "workflow": …, "ids": […], "crcs": […]}`; a crc is the crc32 of the
received bytes of an instance's `params`, as 8 hex digits; null if there were no `params`.
"""

from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import orjson

from bulkwf.emulator.admission import Target
from bulkwf.emulator.batch import Item


class Created(NamedTuple):
    """One instance that was created."""

    id: str
    crc: str | None


class CreationLog:
    """Appends to the log at `path`. If a kill left its last line incomplete, a newline is written first."""

    def __init__(self, path: str | Path) -> None:
        self._file = FileIO(path, "a+")
        size = self._file.seek(0, 2)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._write(b"\n")

    def append(self, request: int, at: float, target: Target, items: Sequence[Item]) -> None:
        """Write the line of one batch to the operating system, so that the line survives a kill of this process."""
        line = {
            "request": request,
            "at": at,
            "account": target.account,
            "workflow": target.workflow,
            "ids": [item.id for item in items],
            "crcs": [item.crc for item in items],
        }
        self._write(orjson.dumps(line) + b"\n")

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) or 0 :]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_log(path: str | Path) -> Iterator[Created]:
    """Each instance created, in order, as often as it was created. Incomplete lines, left by a kill, are skipped."""
    with Path(path).open("rb") as lines:
        for line in lines:
            try:
                batch = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            yield from map(Created, batch["ids"], batch["crcs"])
