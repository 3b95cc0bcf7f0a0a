"""Cuts chunks of bytes into slices of whole lines. The caller says how many rows it takes."""

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, Protocol, TypeVar
from zlib import crc32

from bulkwf.batching.lines import MAX_ROW_BYTES, Cut, cut, too_long
from bulkwf.errors import InputError
from bulkwf.model import Slice
from bulkwf.uncancelled import until_done

__all__ = ["Chunk", "Feed", "Source"]

SEEK_ROWS = 1_000
"""Maximum number of rows that are dropped at a time to reach the first row."""
ANY_SIZE = 1 << 62


class Chunk(NamedTuple):
    """Some bytes of the list. The last line of each file ends with a newline.

    Attributes:
        data: JSON lines. The last line may continue in the next chunk.
        part: Name of the file that begins with this chunk; None if the chunk continues the one before.
        refused: (number of the line in this chunk, code, message) of rows that could not be encoded as JSON.
    """

    data: bytes
    part: str | None = None
    refused: tuple[tuple[int, str, str], ...] = ()


class Feed(Protocol):
    """Where the bytes of a list come from."""

    @property
    def read_share(self) -> float | None:
        """Share of the list that was read, from 0 to 1; None if its length is unknown."""
        ...

    async def read(self) -> Chunk | None:
        """The next bytes; None at the end of the list.

        Raises:
            InputError: The list can't be read further.
        """
        ...

    async def aclose(self) -> None:
        """Close files and iterators."""
        ...


class Region(Protocol):
    """Rows that an earlier session has read: their number, and the size and crc32 of their lines."""

    @property
    def rows(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def digest(self) -> int: ...


_Region = TypeVar("_Region", bound=Region)


class Source:
    """The list as slices of whole lines, read ahead by one chunk. Memory does not grow with the length of the list.

    Args:
        feed: Where the bytes come from, from the beginning of the list.
        first_row: Number of the first row. Rows before it are read and dropped.
        stop: `peek` gives no row from this number on; None gives rows to the end of the list.

    Attributes:
        row: Number of the next row, counted from 0 over the whole list. Below *first_row* until the first read.
    """

    def __init__(self, feed: Feed, *, first_row: int = 0, stop: int | None = None) -> None:
        self.row = 0
        self._feed = feed
        self._first_row = first_row
        self._stop = stop
        self._data = b""
        self._at = 0
        self._fed = 0
        """Number of bytes that the feed has given so far."""
        self._dropping = 0
        """Number of bytes of an overlong line that were dropped so far."""
        self._refused: deque[tuple[int, str, str]] = deque()
        self._starts: list[int] = []
        self._names: list[str] = []
        self._reading: asyncio.Task[Chunk | None] | None = None
        self._error: InputError | None = None
        self._ended = False

    @property
    def read_share(self) -> float | None:
        """Share of the list that was taken, from 0 to 1; None if its length is unknown."""
        share = self._feed.read_share
        return share if share is None or not self._fed else share * (1 - (len(self._data) - self._at) / self._fed)

    def where(self, row: int) -> str:
        """The place of a row for people: `orders.jsonl:1602`, counted from 1 in each file."""
        part = bisect_right(self._starts, row) - 1
        if part < 0:
            return f"row {row}"
        return f"{self._names[part]}:{row - self._starts[part] + 1}"

    async def peek(
        self, max_rows: int, max_bytes: int, max_wait_s: float | None = None, *, joining: bool = False
    ) -> Cut:
        """Wait until it is known how many of the next rows fit within both bounds.

        Args:
            max_rows: At most this many rows; 1 or more.
            max_bytes: At most this many bytes of lines, unless the first row alone is larger.
            max_wait_s: Longest time to wait for more rows after the first one, in seconds; None waits without limit.
            joining: Whether the caller has rows already. Then *max_wait_s* counts from now, not from the first row.

        Returns:
            What to pass to `take`. It has 0 rows at the end of the list, or if *joining* and no row came in time.

        Raises:
            InputError: The list can't be read further, and all rows before the fault are taken. If *joining*, only the
                next call raises it.
        """
        await self._seek()
        if self._stop is not None:
            max_rows = max(0, min(max_rows, self._stop - self.row))
        found = await self._gather(max_rows, max_bytes, max_wait_s, joining=joining)
        if found.bound == "data" and not found.rows and not joining and self._error is not None:
            raise self._error
        return found

    def take(self, found: Cut) -> Slice:
        """The rows *found* by the last `peek`."""
        first, end = self.row, self._at + found.size
        data, self._at = self._data[self._at : end], end
        refused = tuple((row - first, code, message) for row, code, message in self._advance(found.rows))
        return Slice(first, found.rows, data, refused)

    async def take_rows(self, rows: int) -> Slice:
        """The next *rows* rows of any size, also beyond *stop*; fewer at the end of the list.

        Raises:
            InputError: The list can't be read to the last of them.
        """
        await self._seek()
        found = await self._gather(rows, ANY_SIZE)
        if found.rows < rows and self._error is not None:
            raise self._error
        return self.take(found)

    async def skip(self, regions: Iterable[_Region]) -> tuple[_Region, bool] | None:
        """Read past *regions*, the next rows as an earlier session read them, and compare them with the list.

        Returns:
            (the first region that differs, whether the list ended inside it); None if no region differs.

        Raises:
            InputError: The list can't be read to the last of them.
        """
        await self._seek()
        held = memoryview(self._data)
        for region in regions:
            end = self._at + region.size
            if end <= len(held):
                digest = crc32(held[self._at : end])
                self._at = end
                self.row += region.rows
            else:
                found, digest = await self._skip_over_chunks(region)
                held = memoryview(self._data)
                if found < region.size:
                    return region, True
            if digest != region.digest:
                return region, False
        self._advance(0)  # drops what `_refused` holds about the rows that were skipped
        return None

    async def aclose(self) -> None:
        """Close the list."""
        try:
            if self._reading is not None:
                self._reading.cancel()
                await until_done(self._reading, self._reading.cancel)  # a thread may still read
        finally:
            await self._feed.aclose()

    async def _skip_over_chunks(self, region: Region) -> tuple[int, int]:
        """Read past a region that spans chunks; returns size and crc32 of what the list holds of it."""
        last, found, digest = self.row + region.rows, 0, 0
        while True:
            part = memoryview(self._data)[self._at : self._at + region.size - found]
            found, digest = found + len(part), crc32(part, digest)
            self._at += len(part)
            if found >= region.size:
                break
            self.row += self._data.count(b"\n", self._at - len(part))  # where the next chunk begins
            if not await self._fill(None):
                if self._error is not None:
                    raise self._error
                break
        self.row = last
        return found, digest

    async def _seek(self) -> None:
        """Read and drop the rows before *first_row*; fewer if the list ends before it."""
        while self.row < self._first_row:
            found = await self._gather(min(self._first_row - self.row, SEEK_ROWS), ANY_SIZE)
            if not found.rows:
                break
            self.take(found)

    async def _gather(
        self, max_rows: int, max_bytes: int, max_wait_s: float | None = None, *, joining: bool = False
    ) -> Cut:
        """Read on as long as more rows may fit within both bounds; returns the cut of the buffered rows that fit."""
        found = cut(self._data, self._at, max_rows, max_bytes)
        deadline: float | None = None
        while found.bound == "data":
            if deadline is None and max_wait_s is not None and (found.rows or joining):
                deadline = asyncio.get_running_loop().time() + max_wait_s
            if not await self._fill(deadline):
                break
            found = cut(self._data, self._at, max_rows, max_bytes)
        return found

    def _advance(self, rows: int) -> list[tuple[int, str, str]]:
        """Advance by *rows* rows; returns (row, code, message) of each of them that was refused."""
        self.row += rows
        refused: list[tuple[int, str, str]] = []
        while self._refused and self._refused[0][0] < self.row:
            refused.append(self._refused.popleft())
        return refused

    async def _fill(self, deadline: float | None) -> bool:
        """Add a chunk to the buffered data; False if the list has ended, or *deadline* (loop time) has passed."""
        if self._ended:
            return False
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._feed.read())
        await asyncio.sleep(0)  # enough for data in memory; a wait for a task takes three turns of the loop
        if not self._reading.done():
            # Never cancelled: a cancelled read may lose data.
            timeout_s = None if deadline is None else max(0.0, deadline - asyncio.get_running_loop().time())
            done, _ = await asyncio.wait((self._reading,), timeout=timeout_s)
            if not done:
                return False
        try:
            chunk = self._reading.result()
        except InputError as error:
            self._error, chunk = error, None
        self._reading = None if chunk is None else asyncio.ensure_future(self._feed.read())
        if chunk is None:
            self._ended = True
            return False
        self._append(chunk)
        return True

    def _append(self, chunk: Chunk) -> None:
        row = self.row + self._data.count(b"\n", self._at)  # the row that the chunk begins in
        if chunk.part is not None:
            self._starts.append(row)
            self._names.append(chunk.part)
        self._refused.extend((row + line, code, message) for line, code, message in chunk.refused)
        self._fed += len(chunk.data)
        data = self._drop_rest(chunk.data, row) if self._dropping else chunk.data
        self._data = self._data[self._at :] + data
        self._at = 0
        tail = len(self._data) - (self._data.rfind(b"\n") + 1)
        if tail > MAX_ROW_BYTES:
            self._dropping = tail
            self._data = self._data[: len(self._data) - tail]

    def _drop_rest(self, data: bytes, row: int) -> bytes:
        """The part of *data* after the overlong line. The line itself becomes an empty, refused one."""
        newline = data.find(b"\n")
        if newline < 0:
            self._dropping += len(data)
            return b""
        flaw = too_long(self._dropping + newline)
        self._dropping = 0
        self._refused.append((row, flaw.code, flaw.message))
        return data[newline:]
