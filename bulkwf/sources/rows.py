"""Rows given as Python values, encoded as JSON lines without changing them."""

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from enum import Enum
from itertools import islice
from typing import Any

import orjson

from bulkwf.errors import InputError
from bulkwf.model import ABSENT, Instance
from bulkwf.payload import clean
from bulkwf.sources.reader import Chunk

__all__ = ["AsyncRowFeed", "RowFeed", "encode_row"]

CHUNK_ROWS = 500
_REFUSE_CLASSES = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_SUBCLASS


def encode_row(row: Mapping[str, Any] | Instance) -> bytes:
    """*row* as one line of JSON, every value as it is.

    orjson writes NaN and Infinity as null and refuses integers over 64 bits; where either may have happened, the
    standard library has the last word.

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
    """What orjson can write and the standard library can't: dates, UUIDs, enumerations."""
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
                raise TypeError(f"the key {key!r} is not text")
            _refuse_keys(member)
    elif isinstance(value, list | tuple):
        for member in value:
            _refuse_keys(member)


def _chunk(rows: list[Any]) -> Chunk:
    lines, refused = [], []
    for number, row in enumerate(rows):
        try:
            line = encode_row(row)
        except (TypeError, ValueError, RecursionError) as error:
            refused.append((number, "not_json", clean(f"the row can't be written as JSON: {error}")))
            line = b""
        lines.append(line)
    return Chunk(b"\n".join(lines) + b"\n", refused=tuple(refused))


def _broken(row: int, error: BaseException) -> InputError:
    broken = InputError(f"the rows can't be read past row {row}: {error!r}")
    broken.__cause__ = error
    return broken


class RowFeed:
    """Rows of an ordinary iterable, drawn in the event loop: one that blocks should be an async one instead."""

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
        rows = [] if self._error is not None else self._draw()
        if rows or self._error is None:
            return _chunk(rows) if rows else None
        raise self._error

    def _draw(self) -> list[Any]:
        """The next rows; those that were drawn before an error are not lost with it."""
        rows: list[Any] = []
        try:
            for row in islice(self._rows, CHUNK_ROWS):
                rows.append(row)  # noqa: PERF402 - see above
        except Exception as error:  # noqa: BLE001 - the caller's own code; what it raises is the reason
            self._error = _broken(self._read + len(rows), error)
        self._read += len(rows)
        return rows

    async def aclose(self) -> None:
        """See `Feed.aclose`."""


class AsyncRowFeed:
    """Rows of an async iterable. One task draws all of them, so that waiting for a row can be given up."""

    def __init__(self, rows: AsyncIterable[Any]) -> None:
        self._rows: AsyncIterator[Any] = aiter(rows)
        self._drawn: list[Any] = []
        self._read = 0
        self._some = asyncio.Event()
        self._space = asyncio.Event()
        self._error: InputError | None = None
        self._ended = False
        self._drawing: asyncio.Task[None] | None = None

    read_share: float | None = None

    async def read(self) -> Chunk | None:
        """See `Feed.read`."""
        if self._drawing is None:
            self._drawing = asyncio.ensure_future(self._draw())
        await self._some.wait()
        if self._drawn:
            rows, self._drawn = self._drawn, []
            self._space.set()
            if not self._ended:
                self._some.clear()
            return _chunk(rows)
        if self._error is not None:
            raise self._error
        return None

    async def aclose(self) -> None:
        """See `Feed.aclose`."""
        if self._drawing is not None:
            self._drawing.cancel()
            with suppress(asyncio.CancelledError):
                await self._drawing

    async def _draw(self) -> None:
        try:
            async for row in self._rows:
                self._drawn.append(row)
                self._read += 1
                self._some.set()
                if len(self._drawn) >= CHUNK_ROWS:
                    self._space.clear()
                    await self._space.wait()
        except BaseException as error:
            # A cancellation too, when it comes out of the caller's code: it must not pass for the end of the list.
            self._error = _broken(self._read, error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._ended = True
            self._some.set()
