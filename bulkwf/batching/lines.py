"""Cuts whole lines from data, and computes the fingerprint of lines. Pure."""

from typing import Literal, NamedTuple
from zlib import crc32

from bulkwf.batching.row import Flaw

__all__ = ["MAX_PARAMS_BYTES", "MAX_ROW_BYTES", "Cut", "cut", "fingerprint", "too_long"]

MAX_PARAMS_BYTES = 1_048_576
"""Maximum size of one instance's params that the service accepts, in bytes."""

MAX_ROW_BYTES = MAX_PARAMS_BYTES + 65_536
"""Maximum size of a line, in bytes. A longer line can't hold valid params: it is refused, and not kept in memory."""

_OPENING, _CLOSING = b"{}"


class Cut(NamedTuple):
    """Which whole lines of some data fit within given bounds.

    Attributes:
        size: Size of the lines in bytes, newlines included.
        rows: Number of lines.
        bound: Why there are no more lines: the bound on rows, the bound on bytes, or the end of the data.
        objects: Whether each line begins with `{` and ends with `}`.
        longest: Size of the longest line in bytes, without its newline.
    """

    size: int
    rows: int
    bound: Literal["rows", "bytes", "data"]
    objects: bool
    longest: int


def cut(data: bytes, start: int, max_rows: int, max_bytes: int) -> Cut:
    """As many whole lines from *start* as both bounds allow. A first line larger than *max_bytes* is given alone."""
    find, end, limit, objects, longest = data.find, start, start + max_bytes, True, 0
    for rows in range(max_rows):
        newline = find(b"\n", end)
        if newline < 0:
            return Cut(end - start, rows, "data", objects, longest)
        if newline >= limit and rows:
            return Cut(end - start, rows, "bytes", objects, longest)
        if data[newline - 1] != _CLOSING or data[end] != _OPENING:
            objects = False
        if newline - end > longest:
            longest = newline - end
        end = newline + 1
    return Cut(end - start, max_rows, "rows", objects, longest)


def fingerprint(region: bytes, dropped: frozenset[int] = frozenset()) -> tuple[int, int]:
    """Size in bytes and crc32 of the lines of *region*, without those at the offsets *dropped*.

    Refused rows are dropped: correcting them in the list does not make it a different list.
    """
    if dropped:
        lines = region.split(b"\n")[:-1]
        region = b"".join(line + b"\n" for offset, line in enumerate(lines) if offset not in dropped)
    return len(region), crc32(region)


def too_long(size: int) -> Flaw:
    """Why a line of at least *size* bytes is refused."""
    return Flaw("row_too_long", f"the row has {size:,} bytes or more; the maximum is {MAX_ROW_BYTES:,}")
