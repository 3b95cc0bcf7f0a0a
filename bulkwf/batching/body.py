"""Composes the body of a request: the bytes of rows are spliced, never serialised again. Pure."""

from collections.abc import Sequence

import msgspec

from bulkwf.batching.row import _ROW
from bulkwf.model import Batch

__all__ = ["compose"]


def compose(batch: Batch, part: Sequence[int]) -> bytes:
    """The request body for the instances at positions *part* of *batch*."""
    if batch.bare and len(part) == batch.rows:
        return b"[%b]" % batch.region[:-1].replace(b"\n", b",")
    lines = batch.region.split(b"\n")
    offsets, ids = batch.offsets, batch.ids
    if batch.row_shape == "params":
        items = [b'{"instance_id":"%b","params":%b}' % (ids[i].encode(), lines[offsets[i]]) for i in part]
    elif batch.bare:
        items = [lines[offsets[i]] for i in part]
    else:
        items = [_with_id(lines[offsets[i]], ids[i]) for i in part]
    return b"[" + b",".join(items) + b"]"


def _with_id(line: bytes, instance_id: str) -> bytes:
    row = _ROW.decode(line)
    if row.instance_id is not msgspec.UNSET:
        return line
    rest = line.lstrip()[1:]
    comma = b"" if rest.lstrip().startswith(b"}") else b","
    return b'{"instance_id":"%b"%b%b' % (instance_id.encode(), comma, rest)
