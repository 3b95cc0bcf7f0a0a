"""Opens a list, from files or from rows that a program gives, as slices of whole lines."""

import os
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from typing import Any

from bulkwf.errors import ConfigError
from bulkwf.model import Instance
from bulkwf.sources.files import FileFeed
from bulkwf.sources.identity import explain_change, identify
from bulkwf.sources.rows import AsyncRowFeed, RowFeed
from bulkwf.sources.source import Feed, Source

__all__ = ["Feed", "Rows", "Source", "explain_change", "identify_source", "name_source", "open_source"]

Row = Mapping[str, Any] | Instance
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Rows = str | os.PathLike[str] | Iterable[Row] | AsyncIterable[Row]
"""A list: the path of a file of JSON lines (`.gz` too, `-` is standard input), or an iterable of rows."""


def open_source(rows: Rows | Paths, *, first_row: int = 0, stop: int | None = None) -> Source:
    """The source of *rows*; several paths are one list, in their order.

    Args:
        rows: See `Rows`.
        first_row: Number of the row to begin with, counted from 0 over the whole list.
        stop: Number of the row to end before; None reads to the end of the list.

    Raises:
        InputError: A file is missing or can't be read.
    """
    return Source(_open_feed(rows), first_row=first_row, stop=stop)


def name_source(rows: Rows | Paths) -> str:
    """The name of the list for people: the names of its files."""
    paths = _paths(rows)
    if not paths:
        return "rows of a program"
    names = ", ".join("standard input" if path == "-" else path for path in paths)
    return os.fsencode(names).decode("utf-8", "replace")


def identify_source(rows: Rows | Paths) -> str:
    """The identity of the list now, as the checkpoint stores it; see `identity.identify`."""
    return identify(_paths(rows))


def _open_feed(rows: Rows | Paths) -> Feed:
    paths = _paths(rows)
    if paths is not None:
        return FileFeed(paths)
    if isinstance(rows, AsyncIterable):
        return AsyncRowFeed(rows)
    if isinstance(rows, Mapping | bytes) or not isinstance(rows, Iterable):
        raise ConfigError(f"rows must be a path, or an iterable of mappings, not {type(rows).__name__}.")
    return RowFeed(rows)


def _paths(rows: Rows | Paths) -> list[str] | None:
    if isinstance(rows, str | os.PathLike):
        return [os.fspath(rows)]
    if isinstance(rows, list | tuple) and rows and all(isinstance(one, str | os.PathLike) for one in rows):
        return [os.fspath(one) for one in rows]
    return None
