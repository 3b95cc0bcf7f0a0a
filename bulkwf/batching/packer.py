"""Packs rows into a batch: finds the invalid rows, and gives each instance its id. Pure."""

from math import inf
from typing import Literal

import msgspec

from bulkwf.batching.ids import _ID, IdScheme, _id_flaw, _id_for, ids_are_good
from bulkwf.batching.lines import MAX_PARAMS_BYTES, MAX_ROW_BYTES, Cut, too_long
from bulkwf.batching.retention import _RETENTION, DEFAULT_RETENTION_S, _retention_s
from bulkwf.batching.row import Flaw, Retention, Row, decode_rows, read_row
from bulkwf.model import Batch, Result, Slice
from bulkwf.text import clean

__all__ = ["Packer"]


class Packer:
    """Packs slices into one batch: `add` each, then `pack`. `batching.batcher` decides where the batch ends.

    Args:
        scheme: How rows get ids.
        row_shape: "instance" if a line has the keys of the API, "params" if it is the params.

    Attributes:
        rows: Number of rows added so far, blank and invalid ones included.
        size: Size of their lines in bytes.
    """

    def __init__(self, scheme: IdScheme, row_shape: Literal["instance", "params"]) -> None:
        self.rows = 0
        self.size = 0
        self._scheme = scheme
        self._row_shape = row_shape
        self._slices: list[Slice] = []
        self._ids: list[str] = []
        self._offsets: list[int] = []
        self._rows_of_ids: dict[str, int] = {}
        self._refused: list[Result] = []
        self._bare = row_shape == "instance"
        self._retention_s = DEFAULT_RETENTION_S

    @property
    def instances(self) -> int:
        """Number of instances to send so far."""
        return len(self._ids)

    def add(self, piece: Slice, found: Cut | None = None) -> None:
        """Validate the rows of *piece*, the next rows of the list, and add them.

        Args:
            piece: One row or more.
            found: What `cut` found about the lines of *piece*, if known. It saves a second scan of them.
        """
        self._slices.append(piece)
        if not self._add_all(piece, found):
            self._add_each(piece)
        self.rows += piece.rows
        self.size += len(piece.data)

    def pack(self) -> Batch:
        """The batch of all rows added."""
        first_row = self._slices[0].first_row
        return Batch(
            first_row=first_row,
            rows=self.rows,
            region=self._slices[0].data if len(self._slices) == 1 else b"".join(s.data for s in self._slices),
            ids=self._ids,
            offsets=self._offsets,
            bare=self._bare,
            row_shape=self._row_shape,
            refused=tuple(self._refused),
            retention_s=self._retention_s,
        )

    def _add_all(self, piece: Slice, found: Cut | None) -> bool:
        """Add all rows of a slice in one pass; False if `_add_each` must add them one by one."""
        if self._row_shape == "params" or piece.refused or self._ids or len(piece.data) > MAX_PARAMS_BYTES:
            return False
        objects, longest = (False, inf) if found is None else (found.objects, found.longest)
        rows = decode_rows(piece.data, piece.rows, objects=objects, longest=longest)
        if rows is None:
            return False
        ids = [row.instance_id for row in rows]
        if msgspec.UNSET in ids or not ids_are_good(ids):  # type: ignore[arg-type]
            return False
        # A set, as lists have few different retentions.
        for retention in set(map(_RETENTION, rows)):
            if retention is not msgspec.UNSET and not self._note_retention(retention):
                return False
        self._ids = ids  # type: ignore[assignment]
        self._offsets = list(range(self.rows, self.rows + piece.rows))
        return True

    def _note_retention(self, retention: Retention) -> bool:
        length = _retention_s(retention)
        if length is not None:
            self._retention_s = min(self._retention_s, length)
        return length is not None

    def _add_each(self, piece: Slice) -> None:
        reasons = {offset: Flaw(code, message) for offset, code, message in piece.refused}
        if len(self._rows_of_ids) != len(self._ids):
            self._rows_of_ids = dict(zip(self._ids, self._offsets, strict=True))
        for offset, line in enumerate(piece.data.split(b"\n")[:-1], self.rows):
            flaw = reasons.get(offset - self.rows)
            if len(line) > MAX_ROW_BYTES:
                flaw = too_long(len(line))
            if flaw is not None:
                self._refuse(offset, None, flaw)
            elif line and not line.isspace():
                self._add_row(offset, line)

    def _add_row(self, offset: int, line: bytes) -> None:
        row = read_row(line, self._row_shape)
        if isinstance(row, Flaw):
            self._refuse(offset, None, row)
            return
        given = None if row.instance_id is msgspec.UNSET else row.instance_id
        flaw = self._row_flaw(row) or (_id_flaw(given) if given is not None else None)
        if flaw is not None:
            self._refuse(offset, given, flaw)
            return
        made = _id_for(row, self._slices[0].first_row + offset, line, self._scheme)
        if isinstance(made, Flaw):
            self._refuse(offset, None, made)
        elif made in self._rows_of_ids:
            first = self._slices[0].first_row + self._rows_of_ids[made]
            self._refuse(offset, made, Flaw("duplicate_id", f"row {first} (counted from 0) has the same id {made!r}"))
        else:
            self._bare = self._bare and given is not None
            self._rows_of_ids[made] = offset
            self._ids.append(made)
            self._offsets.append(offset)

    def _row_flaw(self, row: Row) -> Flaw | None:
        if row.params is not msgspec.UNSET and len(row.params) > MAX_PARAMS_BYTES:
            return Flaw(
                "params_too_large", f"the params have {len(row.params):,} bytes; the maximum is {MAX_PARAMS_BYTES:,}"
            )
        if row.instance_retention is not msgspec.UNSET and not self._note_retention(row.instance_retention):
            return Flaw(
                "bad_retention",
                "a retention must be a whole number of milliseconds over 0, or text such as '5 minutes' "
                "(second, minute, hour, day, week, month or year)",
            )
        return None

    def _refuse(self, offset: int, instance_id: str | None, flaw: Flaw) -> None:
        if instance_id is not None and _ID.fullmatch(instance_id) is None:
            instance_id = clean(instance_id, 100)
        self._refused.append(
            Result(
                row=self._slices[0].first_row + offset,
                id=instance_id,
                outcome="invalid",
                code=flaw.code,
                message=flaw.message,
            )
        )
