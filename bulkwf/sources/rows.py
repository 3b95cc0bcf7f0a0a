"""Encodes a program's rows as JSON lines, without changing their values."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Iterable, Iterator, Mapping, Sized
from enum import Enum
from typing import Any

import orjson

from bulkwf.batching.row import Flaw, lone_surrogate
from bulkwf.errors import InputError
from bulkwf.model import ABSENT, Instance
from bulkwf.sources.source import Chunk
from bulkwf.text import clean

__all__ = ["AsyncRowFeed", "RowFeed", "encode_row"]

log = logging.getLogger("bulkwf")

CHUNK_ROWS = 500
CHUNK_BYTES = 1_048_576
LONGEST_DRAW_S = 0.05
"""Longest time for which rows are drawn before the event loop goes on, in seconds. A single row may take longer."""
CLEANUP_S = 5.0
"""Maximum time of an async generator's cleanup, in seconds."""
_REFUSE_CLASSES = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_SUBCLASS


def encode_row(row: Mapping[str, Any] | Instance) -> bytes:
    """*row* as one line of JSON, with every value unchanged.

    orjson writes NaN and Infinity as null, and refuses integers over 64 bits. Where either is possible, the standard
    library encodes the row.

    Raises:
        TypeError, ValueError: The row can't be written as JSON.
    """
    if isinstance(row, Instance):
        row = _members(row)
    elif not isinstance(row, Mapping):
        raise TypeError(f"a row must be a mapping or an Instance, not {type(row).__name__}")
    elif not isinstance(row, dict):
        row = dict(row)
    try:
        line = orjson.dumps(row, option=_REFUSE_CLASSES)
        if b"null" not in line:
            return line
    except TypeError:
        pass
    _refuse_keys(row)
    return json.dumps(row, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_encode_other).encode()


def _members(instance: Instance) -> dict[str, Any]:
    members = {
        "instance_id": instance.instance_id,
        "instance_retention": instance.instance_retention,
        "location_hint": instance.location_hint,
    }
    given = {name: value for name, value in members.items() if value is not None}
    return given if instance.params is ABSENT else {**given, "params": instance.params}


def _encode_other(value: Any) -> Any:
    """Encode what orjson supports and the standard library does not: dates, UUIDs, enumerations."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Enum):
        return value.value
    return orjson.loads(orjson.dumps(value, option=_REFUSE_CLASSES))


def _refuse_keys(value: Any) -> None:
    # The standard library would write the key None as "null", and True as "true".
    if isinstance(value, Mapping):
        for key, member in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a key is not text but {type(key).__name__}")
            _refuse_keys(member)
    elif isinstance(value, list | tuple):
        for member in value:
            _refuse_keys(member)


def _flaw(error: TypeError | ValueError | RecursionError) -> Flaw:
    """The reason for refusing a row that could not be encoded."""
    if isinstance(error, UnicodeEncodeError):
        return lone_surrogate(f"\\u{ord(error.object[error.start]):04x}", "in a text of the row")
    return Flaw("not_json", clean(f"the row can't be written as JSON: {error}"))


class _Page:
    """The encoded rows of the next chunk, limited in number and in bytes."""

    def __init__(self) -> None:
        self.rows = 0
        self._lines: list[bytes] = []
        self._size = 0
        self._refused: list[tuple[int, str, str]] = []

    @property
    def full(self) -> bool:
        return self.rows >= CHUNK_ROWS or self._size >= CHUNK_BYTES

    def add(self, row: Any) -> None:
        try:
            line = encode_row(row)
        except (TypeError, ValueError, RecursionError) as error:
            flaw = _flaw(error)
            self._refused.append((self.rows, flaw.code, flaw.message))
            line = b""
        self._lines.append(line)
        self._size += len(line)
        self.rows += 1

    def chunk(self) -> Chunk:
        return Chunk(b"\n".join(self._lines) + b"\n", refused=tuple(self._refused))


def _broken(row: int, error: BaseException) -> InputError:
    broken = InputError(f"the rows can't be read past row {row}: {error!r}")
    broken.__cause__ = error
    return broken


def _cleanup_failed(error: BaseException) -> None:
    # Logged, not raised: it must not hide the result of the run, or the error that has ended it.
    log.warning("the generator that gives the rows failed while it was closed: %r", error)


class RowFeed:
    """Rows of an ordinary iterable, drawn in the event loop. An iterable that blocks should be an async one."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self._rows: Iterator[Any] = iter(rows)
        self._total = len(rows) if isinstance(rows, Sized) else None
        self._read = 0
        self._error: InputError | None = None

    @property
    def read_share(self) -> float | None:
        """See `Feed.read_share`."""
        return None if self._total is None else min(1.0, self._read / max(self._total, 1))

    async def read(self) -> Chunk | None:
        """See `Feed.read`."""
        page = _Page()
        if self._error is None:
            self._draw(page)
        if page.rows:
            return page.chunk()
        if self._error is not None:
            raise self._error
        return None

    def _draw(self, page: _Page) -> None:
        """Fill *page*. Rows drawn before an error are kept."""
        clock = asyncio.get_running_loop().time
        until = clock() + LONGEST_DRAW_S
        try:
            for row in self._rows:
                page.add(row)
                del row  # error trackers keep the locals of every frame
                if page.full or clock() > until:
                    break
        except Exception as error:  # noqa: BLE001 - the caller's code; its error is the reason
            self._error = _broken(self._read + page.rows, error)
        self._read += page.rows

    async def aclose(self) -> None:
        """See `Feed.aclose`. Only a generator is closed: any other iterator may be used again by its owner."""
        if isinstance(self._rows, Generator):
            try:
                self._rows.close()
            except Exception as error:  # noqa: BLE001 - the caller's code
                _cleanup_failed(error)


class AsyncRowFeed:
    """Rows of an async iterable. One task draws all of them, so that a wait for a row can be given up."""

    def __init__(self, rows: AsyncIterable[Any]) -> None:
        self._rows: AsyncIterator[Any] = aiter(rows)
        self._page = _Page()
        self._read = 0
        self._some = asyncio.Event()
        self._space = asyncio.Event()
        self._error: InputError | None = None
        self._ended = False
        self._closing: asyncio.Task[None] | None = None
        self._drawing: asyncio.Task[None] | None = None

    read_share: float | None = None

    async def read(self) -> Chunk | None:
        """See `Feed.read`."""
        if self._drawing is None:
            self._drawing = asyncio.ensure_future(self._draw())
        await self._some.wait()
        if self._page.rows:
            page, self._page = self._page, _Page()
            self._space.set()
            if not self._ended:
                self._some.clear()
            return page.chunk()
        if self._error is not None:
            raise self._error
        return None

    async def aclose(self) -> None:
        """See `Feed.aclose`. An async generator is closed; its cleanup may take `CLEANUP_S`."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.wait((self._closing,), timeout=CLEANUP_S)
        if not self._closing.done():
            log.warning("the cleanup of the generator that gives the rows took over %.0f s and was cut off", CLEANUP_S)
            self._closing.cancel()
            if self._drawing is not None:
                self._drawing.cancel()

    async def _close(self) -> None:
        if self._drawing is not None:  # a generator can't be closed while it is drawn from
            self._drawing.cancel()
            await asyncio.wait((self._drawing,))
        if isinstance(self._rows, AsyncGenerator):
            try:
                await self._rows.aclose()
            except Exception as error:  # noqa: BLE001 - the caller's code
                _cleanup_failed(error)

    async def _draw(self) -> None:
        try:
            async for row in self._rows:
                if self._closing is not None:  # the generator has suppressed the cancellation
                    return
                self._page.add(row)
                del row  # error trackers keep the locals of every frame
                self._read += 1
                self._some.set()
                if self._page.full:
                    self._space.clear()
                    await self._space.wait()
        except BaseException as error:
            # A cancellation raised by the caller's code, too: it must not look like the end of the list.
            self._error = _broken(self._read, error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._ended = True
            self._some.set()
