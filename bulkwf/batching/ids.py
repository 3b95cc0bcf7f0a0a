"""The ids of instances: which ids are valid, and how a row without an id gets one. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Literal
from zlib import crc32

import msgspec

from bulkwf.batching.row import Flaw, Row, read_row
from bulkwf.errors import ConfigError
from bulkwf.model import Batch
from bulkwf.options import ID_PATTERN
from bulkwf.text import clean

__all__ = ["IdScheme", "has_its_ids", "ids_are_good"]

_ID = re.compile(ID_PATTERN + "{0,99}", re.ASCII)

_IDS = re.compile(f"(?:{ID_PATTERN}{{0,99}}\n)+", re.ASCII)

_SYSTEM_ID = re.compile("cf_[0-9a-f]{64}", re.ASCII)

_URL_SEGMENTS = frozenset({"batch", "terminate", "terminateAll"})


@dataclass(frozen=True, slots=True)
class IdScheme:
    """How a row without an id gets one. The id is the same each time, so that a retry creates no second instance.

    Attributes:
        run_key: Prefix of a generated id: `<run_key>-<row>-<crc32 of the row, 8 hex digits>`.
        template: Makes the id from fields of the row's params instead, such as `order-{order_id}`; None if not used.
    """

    run_key: str
    template: str | None = None

    def __post_init__(self) -> None:
        if self.template is not None:
            _template_fields(self.template)

    def make(self, row: int, line: bytes, params: bytes | None) -> str | Flaw:
        """The id of row number *row*, or why it gets none."""
        if self.template is None:
            return f"{self.run_key}-{row}-{crc32(line):08x}"
        values: dict[str, str] = {}
        for name in _template_fields(self.template):
            value = _field(params, name)
            if value is None:
                return Flaw(
                    "bad_id",
                    f"the id template {self.template!r} needs the field {name!r} in the params, as text or a whole "
                    "number; add the field, or give the row an instance_id",
                )
            values[name] = value
        made = self.template.format_map(values)
        # The id is not quoted: it holds params, and the reason of a refusal is stored and printed.
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
    elif instance_id in _URL_SEGMENTS or _SYSTEM_ID.fullmatch(instance_id):
        code, why = "reserved_id", "is reserved by the service"
    else:
        return None
    subject = f"the id {clean(instance_id, 120)!r}" if template is None else f"the id that {template!r} makes"
    return Flaw(code, f"{subject} {why}")


def ids_are_good(ids: Sequence[str]) -> bool:
    """Whether *ids*, one or more, are valid and distinct."""
    joined = "\n".join(ids) + "\n"
    if _IDS.fullmatch(joined) is None or len(set(ids)) != len(ids) or joined.count("\n") != len(ids):
        return False  # the last condition finds an id that holds a newline, which looks like two valid ones
    return _URL_SEGMENTS.isdisjoint(ids) and ("cf_" not in joined or not any(map(_SYSTEM_ID.fullmatch, ids)))


def has_its_ids(batch: Batch, scheme: IdScheme, refused: frozenset[int]) -> bool:
    """Whether the rows of a stored batch still get the ids that are stored for them.

    Args:
        batch: The rows as they are read now, and the stored ids.
        scheme: How rows get ids.
        refused: Offsets of the rows that were refused. They are not compared: they may have been corrected since.
    """
    stored = dict(zip(batch.offsets, batch.ids, strict=True))
    return all(
        stored.get(offset) == _id_of(line, batch.first_row + offset, batch.row_shape, scheme)
        for offset, line in enumerate(batch.region.split(b"\n")[:-1])
        if offset not in refused
    )


def _id_of(line: bytes, number: int, row_shape: Literal["instance", "params"], scheme: IdScheme) -> str | Flaw | None:
    """The id of row *number*, or why it gets none; None for a blank line."""
    if not line or line.isspace():
        return None
    row = read_row(line, row_shape)
    return row if isinstance(row, Flaw) else _id_for(row, number, line, scheme)


def _id_for(row: Row, number: int, line: bytes, scheme: IdScheme) -> str | Flaw:
    """The row's own id, or the one that is made for it."""
    if row.instance_id is not msgspec.UNSET:
        return row.instance_id
    return scheme.make(number, line, None if row.params is msgspec.UNSET else bytes(row.params))
