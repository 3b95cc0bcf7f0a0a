"""One row: whether it is valid, and its values. The bytes of a row are validated and measured, never rebuilt. Pure."""

import re
from math import inf
from typing import Literal

import msgspec

from bulkwf.nesting import _brackets, _is_deeper
from bulkwf.text import clean

__all__ = ["Flaw", "Retention", "Row", "decode_rows", "lone_surrogate", "read_row"]

MAX_NESTING = 500
"""Maximum depth of objects and arrays in a row, the row itself included.

A parser's own limit depends on the Python version and, before 3.12, on the depth of the caller's stack. With such a
limit, a row that one session has read might not be readable for the next one.
"""

UTF8_PIECE_BYTES = 16_384


_HIGH, _LOW, _HALF = (rb"u[dD][%b][0-9a-fA-F]{2}" % second for second in (b"89abAB", b"c-fC-F", b"89a-fA-F"))

_ESCAPE = re.compile(rb"\\(?:%b\\%b|(?P<alone>%b)|.)" % (_HIGH, _LOW, _HALF), re.DOTALL)
"""One escape sequence of a JSON text, or the two of a surrogate pair."""


class Retention(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """How long the service keeps an instance and its id."""

    success_retention: int | str | msgspec.UnsetType = msgspec.UNSET
    error_retention: int | str | msgspec.UnsetType = msgspec.UNSET


class Row(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A row with the keys of the API. `params` stays raw."""

    instance_id: str | msgspec.UnsetType = msgspec.UNSET
    params: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    instance_retention: Retention | msgspec.UnsetType = msgspec.UNSET
    location_hint: str | msgspec.UnsetType = msgspec.UNSET


class Flaw(msgspec.Struct, frozen=True):
    """Why a row can't be sent: a code for programs, a message for people."""

    code: str
    message: str


_ROW = msgspec.json.Decoder(Row)

_PARAMS = msgspec.json.Decoder(msgspec.Raw)


def decode_rows(region: bytes, rows: int, *, objects: bool = False, longest: float = inf) -> list[Row] | None:
    """Decode all rows of a region in one pass, for the row shape "instance"; None if `read_row` must read them.

    Each line must be exactly one row. No row spans two lines, as each newline must be between a `}` and a `{`, which
    can't occur inside a JSON value. No line holds two rows, as there must be as many rows as lines.

    Args:
        region: Whole lines.
        rows: Number of lines.
        objects: Whether each line is known to begin with `{` and to end with `}`.
        longest: Upper bound of the size of a line, in bytes.
    """
    if not objects and (region.count(b"}\n{") or region.count(b"}\r\n{")) != rows - 1:
        return None
    deep = longest > 2 * MAX_NESTING and _brackets(region) > MAX_NESTING  # a level takes two brackets
    if deep and max(map(_brackets, region.split(b"\n"))) > MAX_NESTING:
        return None
    try:
        _check_utf8(region)
        found = _ROW.decode_lines(region)
    except (ValueError, RecursionError):
        return None
    return found if len(found) == rows else None


def read_row(line: bytes, row_shape: Literal["instance", "params"]) -> Row | Flaw:
    """The row in *line*, or why it is invalid."""
    try:
        line.decode()
        if _is_deeper(line, MAX_NESTING):
            return Flaw("too_deep", f"the row is nested too deeply; the maximum is {MAX_NESTING} levels")
        return _ROW.decode(line) if row_shape == "instance" else Row(params=_PARAMS.decode(line))
    except UnicodeDecodeError as error:
        return Flaw("not_utf8", f"the row is not UTF-8: byte {error.start + 1} of it is 0x{line[error.start]:02x}")
    except RecursionError:
        return Flaw("too_deep", "the row is nested too deeply to be read here")
    except msgspec.ValidationError as error:
        return _validation_flaw(str(error))
    except msgspec.DecodeError as error:
        # The grammar of JSON allows a lone surrogate. msgspec refuses it, but its message names another fault.
        alone = next((escape for escape in _ESCAPE.finditer(line) if escape["alone"]), None)
        if alone is not None:
            return lone_surrogate(alone[0].decode(), f"at byte {alone.start() + 1} of the row")
        reason = str(error).removeprefix("JSON is malformed: ")
        return Flaw("not_json", clean(f"the row is not JSON: {reason}"))


def lone_surrogate(surrogate: str, place: str) -> Flaw:
    """Why a row with half of a surrogate pair is refused."""
    return Flaw(
        "lone_surrogate",
        f"{surrogate} {place} is a lone surrogate: half of a character, which has no form in UTF-8; "
        "remove it or complete the pair",
    )


def _check_utf8(region: bytes) -> None:
    """Raise `UnicodeDecodeError` if *region* is not UTF-8. In pieces, as decoding a long text is slow."""
    if region.isascii():
        return
    start = 0
    while start < len(region):
        end = region.find(b"\n", start + UTF8_PIECE_BYTES) + 1 or len(region)
        region[start:end].decode()
        start = end


def _validation_flaw(text: str) -> Flaw:
    what, _, where = text.partition(" - at `$")
    key = where.strip("`.")
    if what.startswith("Object contains unknown field"):
        name = what.removeprefix("Object contains unknown field ")
        code = "bad_retention" if key else "unknown_key"
        known = "success_retention, error_retention"
        if not key:
            known = "instance_id, params, instance_retention, location_hint; --row-shape params sends a row whole"
        return Flaw(code, clean(f"unknown key {name}; the keys are {known}"))
    if not key:
        return Flaw("not_object", clean(f"the row is not a JSON object: {what}"))
    if key == "instance_id":
        return Flaw("bad_id", clean(f"instance_id: {what}; without the key, an id is made"))
    code = "bad_retention" if key.startswith("instance_retention") else "bad_value"
    return Flaw(code, clean(f"{key}: {what}"))
