"""Lines to batches: which lines are whole, which rows are invalid, which id each instance gets. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from operator import attrgetter
from string import Formatter
from typing import Literal, NamedTuple
from zlib import crc32

import msgspec

from bulkwf.errors import ConfigError
from bulkwf.model import Batch, Result, Slice
from bulkwf.options import ID_PATTERN
from bulkwf.payload import Flaw, Retention, Row, clean, decode_rows, read_row

__all__ = [
    "DEFAULT_RETENTION_S",
    "MAX_PARAMS_BYTES",
    "MAX_ROW_BYTES",
    "Cut",
    "IdScheme",
    "Packer",
    "cut",
    "fingerprint",
    "has_its_ids",
    "ids_are_good",
    "too_long",
]

MAX_PARAMS_BYTES = 1_048_576
"""The service's limit for one instance's event payload."""
MAX_ROW_BYTES = MAX_PARAMS_BYTES + 65_536
"""A longer line can't hold acceptable params; it is refused without being held in memory."""
DEFAULT_RETENTION_S = 3 * 86_400.0
"""How long the service remembers an id on the smallest plan."""
LONGEST_DURATION = 100
"""A longer text is none, whatever stands in it."""

_ID = re.compile(ID_PATTERN + "{0,99}", re.ASCII)
_IDS = re.compile(f"(?:{ID_PATTERN}{{0,99}}\n)+", re.ASCII)
_SYSTEM_ID = re.compile("cf_[0-9a-f]{64}", re.ASCII)
_RETENTION = attrgetter("instance_retention")
_OPENING, _CLOSING = b"{}"
_URL_WORDS = frozenset({"batch", "terminate", "terminateAll"})
_DURATION = re.compile(r"(\d{1,12})\s+(second|minute|hour|day|week|month|year)s?", re.ASCII)
_UNIT_S = {
    "second": 1,
    "minute": 60,
    "hour": 3_600,
    "day": 86_400,
    "week": 604_800,
    "month": 2_592_000,
    "year": 31_536_000,
}


# --- cutting ------------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """The next lines of some data, whole ones.

    Attributes:
        size: Their bytes, newlines included.
        rows: How many they are.
        bound: Why no more: the bound on rows, the bound on bytes, or the data ends.
        objects: Each line begins with `{` and ends with `}`.
        longest: Bytes of the longest line.
    """

    size: int
    rows: int
    bound: Literal["rows", "bytes", "data"]
    objects: bool
    longest: int


def cut(data: bytes, start: int, max_rows: int, max_bytes: int) -> Cut:
    """As many whole lines from *start* as both bounds allow; the first line may exceed *max_bytes* alone."""
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
    """Size in bytes and crc32 of the lines of *region*, less those at the offsets *dropped*.

    Rows that were refused may be corrected in the list without making it another list.
    """
    if dropped:
        lines = region.split(b"\n")[:-1]
        region = b"".join(line + b"\n" for offset, line in enumerate(lines) if offset not in dropped)
    return len(region), crc32(region)


def too_long(size: int) -> Flaw:
    """Why a line of *size* bytes, or of more than that, is refused."""
    return Flaw("row_too_long", f"the row is {size:,} bytes or longer; {MAX_ROW_BYTES:,} is the most")


# --- ids ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IdScheme:
    """How a row that brings no id gets one, so that a retry after a lost answer can never duplicate it.

    Attributes:
        run_key: Begins a generated id: `<run_key>-<row>-<crc32 of the row, 8 hex digits>`.
        template: If given, makes the id from fields of the row's params instead: `order-{order_id}`.
    """

    run_key: str
    template: str | None = None

    def __post_init__(self) -> None:
        if self.template is not None:
            _template_fields(self.template)

    def make(self, row: int, line: bytes, params: bytes | None) -> str | Flaw:
        """The id for row number *row*, or why it can't have one."""
        if self.template is None:
            return f"{self.run_key}-{row}-{crc32(line):08x}"
        values: dict[str, str] = {}
        for name in _template_fields(self.template):
            value = _field(params, name)
            if value is None:
                return Flaw(
                    "bad_id",
                    f"the id template {self.template!r} needs the field {name!r} of the params, as text or a whole "
                    "number; give the row an instance_id, or the field",
                )
            values[name] = value
        made = self.template.format_map(values)
        # Not quoted: it is made of params, and why a row is refused is kept and printed.
        return _id_flaw(made, template=self.template) or made


def _template_fields(template: str) -> list[str]:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"id template {template!r} can't be read: {error}.") from None
    names = [name for _, name, _, _ in parts if name is not None]
    plain = all(name.isidentifier() for name in names) and not any(spec or conv for _, _, spec, conv in parts)
    if not names or not plain:
        raise ConfigError(f"id template {template!r} must name fields of the params, like order-{{order_id}}.")
    if _ID.fullmatch("a" + "".join(fixed for fixed, _, _, _ in parts)[:99]) is None:
        raise ConfigError(f"id template {template!r} must be of the characters A-Z a-z 0-9 _ - around its fields.")
    return names


def _field(params: bytes | None, name: str) -> str | None:
    try:
        raw = bytes(msgspec.json.decode(params or b"{}", type=dict[str, msgspec.Raw])[name])
    except (ValueError, KeyError):
        return None
    if re.fullmatch(rb"-?\d+", raw):
        return raw.decode()
    return msgspec.json.decode(raw, type=str) if raw.startswith(b'"') else None


def _id_flaw(instance_id: str, template: str | None = None) -> Flaw | None:
    if _ID.fullmatch(instance_id) is None:
        code, why = "bad_id", "must be 1 to 100 of the characters A-Z a-z 0-9 _ -, not starting with -"
    elif instance_id in _URL_WORDS or _SYSTEM_ID.fullmatch(instance_id):
        code, why = "reserved_id", "is reserved by the service"
    else:
        return None
    called = f"the id {clean(instance_id, 120)!r}" if template is None else f"the id that {template!r} makes"
    return Flaw(code, f"{called} {why}")


def ids_are_good(ids: Sequence[str]) -> bool:
    """Whether *ids*, one or more, are ids that the service takes, each another one."""
    joined = "\n".join(ids) + "\n"
    if _IDS.fullmatch(joined) is None or len(set(ids)) != len(ids) or joined.count("\n") != len(ids):
        return False  # the last: an id that holds a newline looks like two good ones
    return _URL_WORDS.isdisjoint(ids) and ("cf_" not in joined or not any(map(_SYSTEM_ID.fullmatch, ids)))


def has_its_ids(batch: Batch, scheme: IdScheme, refused: frozenset[int]) -> bool:
    """Whether the rows of a batch that was begun before, read again, still get the ids that were stored for them.

    Args:
        batch: The rows, and the stored ids.
        scheme: How rows get ids.
        refused: Offsets of the rows that were refused: those may have been corrected since.
    """
    stored = dict(zip(batch.offsets, batch.ids, strict=True))
    return all(
        stored.get(offset) == _id_of(line, batch.first_row + offset, batch.row_shape, scheme)
        for offset, line in enumerate(batch.region.split(b"\n")[:-1])
        if offset not in refused
    )


def _id_of(line: bytes, number: int, row_shape: Literal["instance", "params"], scheme: IdScheme) -> str | Flaw | None:
    """The id under which row *number* is sent, or why it has none; None for a blank line."""
    if not line or line.isspace():
        return None
    row = read_row(line, row_shape)
    return row if isinstance(row, Flaw) else _id_for(row, number, line, scheme)


def _id_for(row: Row, number: int, line: bytes, scheme: IdScheme) -> str | Flaw:
    """The id that a row brings, or the one that is made for it."""
    if row.instance_id is not msgspec.UNSET:
        return row.instance_id
    return scheme.make(number, line, None if row.params is msgspec.UNSET else bytes(row.params))


# --- retention ----------------------------------------------------------------------------------------------------


def _seconds(value: int | str) -> float | None:
    if isinstance(value, int):
        return min(value, 10**15) / 1_000 if value > 0 else None  # a float can't take any length of digits
    return _duration_s(value) if len(value) <= LONGEST_DURATION else None


@lru_cache(maxsize=256)
def _duration_s(text: str) -> float | None:
    found = _DURATION.fullmatch(text)
    return float(int(found[1]) * _UNIT_S[found[2]]) or None if found else None


def _retention_s(retention: Retention) -> float | None:
    """The shorter of the two retentions, in seconds; None if one of them is malformed."""
    given = [v for v in (retention.success_retention, retention.error_retention) if v is not msgspec.UNSET]
    lengths = [_seconds(value) for value in given]
    if None in lengths:
        return None
    default = [DEFAULT_RETENTION_S] if len(given) < 2 else []
    return min(default + [length for length in lengths if length is not None])


# --- packing ------------------------------------------------------------------------------------------------------


class Packer:
    """Gathers slices into one batch: `add` each, then `pack`. Where the batch ends, `bulkwf.batcher` decides.

    Args:
        scheme: How rows get ids.
        row_shape: Whether a line is a whole instance or its params alone.

    Attributes:
        rows: Rows added so far, blank and invalid ones included.
        size: Bytes of their lines.
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
        """Instances to send so far."""
        return len(self._ids)

    def add(self, piece: Slice, found: Cut | None = None) -> None:
        """Check the rows of *piece*, the next ones of the list, and take them in.

        Args:
            piece: One row or more.
            found: What `cut` has said of its lines, if known: this saves another look at them.
        """
        self._slices.append(piece)
        if not self._add_all(piece, found):
            self._add_each(piece)
        self.rows += piece.rows
        self.size += len(piece.data)

    def pack(self) -> Batch:
        """The batch of all that was added."""
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
        """Take in a slice whose rows are all good and bring their ids; False if they don't."""
        if self._row_shape == "params" or piece.refused or self._ids or len(piece.data) > MAX_PARAMS_BYTES:
            return False
        objects, longest = (False, inf) if found is None else (found.objects, found.longest)
        rows = decode_rows(piece.data, piece.rows, objects=objects, longest=longest)
        if rows is None:
            return False
        ids = [row.instance_id for row in rows]
        if msgspec.UNSET in ids or not ids_are_good(ids):  # type: ignore[arg-type]
            return False
        # Lists have few different retentions.
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
            self._refuse(
                offset, made, Flaw("duplicate_id", f"the id {made!r} is that of row {first} (counted from 0) already")
            )
        else:
            self._bare = self._bare and given is not None
            self._rows_of_ids[made] = offset
            self._ids.append(made)
            self._offsets.append(offset)

    def _row_flaw(self, row: Row) -> Flaw | None:
        if row.params is not msgspec.UNSET and len(row.params) > MAX_PARAMS_BYTES:
            return Flaw(
                "params_too_large", f"params are {len(row.params):,} bytes; the service takes {MAX_PARAMS_BYTES:,}"
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
