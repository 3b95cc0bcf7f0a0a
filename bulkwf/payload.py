"""Rows and batches to request bodies; response bodies to answers.

A row's bytes are validated and measured, never rebuilt: what the service receives is what the list had. (A round trip
through Python would turn a 30-digit integer into a float, and NaN into null.)
"""

import re
from collections.abc import Sequence
from itertools import accumulate
from math import inf
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from bulkwf.model import Batch

__all__ = [
    "Answered",
    "Envelope",
    "Flaw",
    "Listed",
    "Lookup",
    "Page",
    "Refused",
    "Row",
    "ServiceError",
    "clean",
    "compose",
    "decode_answer",
    "decode_errors",
    "decode_lookup",
    "decode_page",
    "decode_rows",
    "read_row",
]

MAX_NESTING = 500
"""The most levels of objects and arrays in a row, its own included.

A rule of ours, because a parser's own limit is none: it moves with the Python version, and before 3.12 with the depth
of the caller's stack too, so that a row that could be read once might not be readable again.
"""

MAX_ANSWER_NESTING = 600
"""The most levels of objects and arrays in an answer of the service.

It leaves room for a look-up that repeats a row's params inside its envelope, and is small enough that the parser of
every Python version reads an answer of this depth.
"""

MAX_ERRORS_BYTES = 262_144
"""A longer list of errors is not the service's. Decoded, a list of empty objects takes forty times its own size."""

UTF8_PIECE_BYTES = 16_384

# Possessive, and without need of an end: else a string that has none is read again from each of its escaped quotes.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?'
_STRINGS = re.compile(_STRING, re.DOTALL)
_PIECE = re.compile(rb'(?:[^"]{1,64}+|%b){1,512}' % _STRING, re.DOTALL)
"""A part of a JSON text that neither begins nor ends inside a string."""
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
"""To the change of depth at each bracket, as a signed byte."""


class Retention(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """How long the service keeps an instance, and with it the memory of its id."""

    success_retention: int | str | msgspec.UnsetType = msgspec.UNSET
    error_retention: int | str | msgspec.UnsetType = msgspec.UNSET


class Row(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A row as the API has it. `params` stays raw."""

    instance_id: str | msgspec.UnsetType = msgspec.UNSET
    params: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    instance_retention: Retention | msgspec.UnsetType = msgspec.UNSET
    location_hint: str | msgspec.UnsetType = msgspec.UNSET


class Flaw(msgspec.Struct, frozen=True):
    """Why a row can't be sent: a word for programs, a sentence for people."""

    code: str
    message: str


_ROW = msgspec.json.Decoder(Row)
_PARAMS = msgspec.json.Decoder(msgspec.Raw)


def clean(text: str, length: int = 300) -> str:
    """*text* in one line without characters that can't be printed, fit for a terminal and a log."""
    text = text[: 2 * length]
    if not text.isprintable():
        text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    text = text.strip()
    return text if len(text) <= length else text[: length - 1] + "…"


def printable(line: str) -> str:
    """*line* with a space for each character that can't be printed, a newline too: for names that users choose."""
    return line if line.isprintable() else "".join(char if char.isprintable() else " " for char in line)


# --- rows ---------------------------------------------------------------------------------------------------------


def decode_rows(region: bytes, rows: int, *, objects: bool = False, longest: float = inf) -> list[Row] | None:
    """All of a region's rows, of the shape "instance", in one pass; None if any needs a closer look by `read_row`.

    Every newline has to stand between a `}` and a `{`. That can't happen inside a JSON value, so no row spans lines;
    with as many rows as lines, no line holds two.

    Args:
        region: Whole lines.
        rows: How many.
        objects: Each line is known to begin with `{` and to end with `}`.
        longest: Bytes of the longest of them, or more.
    """
    if not objects and (region.count(b"}\n{") or region.count(b"}\r\n{")) != rows - 1:
        return None
    deep = longest > 2 * MAX_NESTING and _brackets(region) > MAX_NESTING  # as many have to close
    if deep and max(map(_brackets, region.split(b"\n"))) > MAX_NESTING:
        return None
    try:
        _check_utf8(region)
        found = _ROW.decode_lines(region)
    except (ValueError, RecursionError):
        return None
    return found if len(found) == rows else None


def read_row(line: bytes, row_shape: Literal["instance", "params"]) -> Row | Flaw:
    """One row, or why it is none."""
    try:
        line.decode()
        if _is_deeper(line, MAX_NESTING):
            return Flaw("too_deep", f"the row is nested too deep; {MAX_NESTING} levels are the most")
        return _ROW.decode(line) if row_shape == "instance" else Row(params=_PARAMS.decode(line))
    except UnicodeDecodeError as error:
        return Flaw("not_utf8", f"the row is not UTF-8: byte {error.start + 1} of it is 0x{line[error.start]:02x}")
    except RecursionError:
        return Flaw("too_deep", "the row is nested too deep to be read here")
    except msgspec.ValidationError as error:
        return _validation_flaw(str(error))
    except msgspec.DecodeError as error:
        reason = str(error)
        if "truncated" in reason and rb"\u" in line:
            reason = "half a character stands in it, a lone surrogate"  # msgspec's own words say something else
        return Flaw("not_json", clean(f"the row is not JSON: {reason}"))


def _check_utf8(region: bytes) -> None:
    """Raise `UnicodeDecodeError` if *region* is not UTF-8. In pieces, as a long text is slow to make."""
    if region.isascii():
        return
    start = 0
    while start < len(region):
        end = region.find(b"\n", start + UTF8_PIECE_BYTES) + 1 or len(region)
        region[start:end].decode()
        start = end


def _brackets(lines: bytes) -> int:
    return lines.count(b"[") + lines.count(b"{")


def _is_deeper(text: bytes, most: int) -> bool:
    """Whether a JSON text has more than *most* levels of objects and arrays. In pieces, as the text may be long."""
    if _brackets(text) <= most:
        return False
    depth = 0
    for piece in _PIECE.finditer(text):
        brackets = _STRINGS.sub(b"", piece[0]).translate(_STEPS, _NO_BRACKETS)
        depths = list(accumulate(memoryview(brackets).cast("b"), initial=depth))
        if max(depths) > most:
            return True
        depth = depths[-1]
    return False


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
        return Flaw("bad_id", clean(f"instance_id: {what}; leave the key out to have an id made"))
    code = "bad_retention" if key.startswith("instance_retention") else "bad_value"
    return Flaw(code, clean(f"{key}: {what}"))


# --- request bodies -----------------------------------------------------------------------------------------------


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


# --- response bodies ----------------------------------------------------------------------------------------------


Code = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""An error code that the checkpoint can hold."""


class Answered(msgspec.Struct, gc=False):
    """One instance in the service's answer. Unknown keys are welcome."""

    id: str
    status: str | None = None
    version_id: str | None = None
    workflow_id: str | None = None


class Refused(msgspec.Struct, gc=False):
    """One error of the newer answer, which names the instance that it is about."""

    id: str | None = None
    index: int | None = None
    code: Code | None = None
    message: str = ""


class ServiceError(msgspec.Struct, frozen=True, gc=False):
    """One entry of the envelope's `errors`."""

    code: int | None = None
    message: str = ""


class _NewerResult(msgspec.Struct):
    created: list[Answered]
    errors: msgspec.Raw = msgspec.Raw(b"[]")


class _Envelope(msgspec.Struct):
    success: bool
    result: list[Answered] | _NewerResult | None = None


class Envelope(msgspec.Struct):
    """The service's answer to a batch create: `{success, errors, messages, result}`.

    Attributes:
        success: What the answer says of itself.
        answered: The instances that the answer names as created.
        refused: The instances that the answer names as refused.
    """

    success: bool
    answered: list[Answered]
    refused: list[Refused]


class Listed(msgspec.Struct, gc=False):
    """One instance in a page of the list. Unknown keys are welcome."""

    id: str
    status: str | None = None


class Page(msgspec.Struct, frozen=True):
    """A page of the workflow's instances."""

    listed: list[Listed]
    cursor: str | None
    """Leads to the next page; None if there is none."""


class Lookup(msgspec.Struct):
    """What a look-up says of one instance. `id` is not in every service's answer."""

    success: bool
    id: str | None = None
    status: str | None = None


class _LookupResult(msgspec.Struct):
    id: str | None = None
    status: str | None = None


class _LookupEnvelope(msgspec.Struct):
    success: bool
    result: _LookupResult | None = None


class _PageInfo(msgspec.Struct):
    cursor: str | int | None = None


class _PageEnvelope(msgspec.Struct):
    success: bool
    result: list[Listed] | None = None
    result_info: _PageInfo | None = None


class _ErrorEnvelope(msgspec.Struct):
    errors: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_ENVELOPE = msgspec.json.Decoder(_Envelope)
_REFUSED = msgspec.json.Decoder(list[Refused])
_LOOKUP_ENVELOPE = msgspec.json.Decoder(_LookupEnvelope)
_PAGE_ENVELOPE = msgspec.json.Decoder(_PageEnvelope)
_ERROR_ENVELOPE = msgspec.json.Decoder(_ErrorEnvelope)
_T = TypeVar("_T")


def _decode(decoder: msgspec.json.Decoder[_T], body: bytes) -> _T:
    """*body* as *decoder* reads it; raises `ValueError` if it can't, or if *body* is nested too deep."""
    if _is_deeper(body, MAX_ANSWER_NESTING):
        raise ValueError(f"an answer with more than {MAX_ANSWER_NESTING} levels")
    return decoder.decode(body)


def decode_answer(body: bytes) -> Envelope | None:
    """The answer to a batch create; None if *body* is not one."""
    try:
        envelope = _decode(_ENVELOPE, body)
        result = envelope.result
        if not isinstance(result, _NewerResult):
            return Envelope(envelope.success, result or [], [])
        if len(memoryview(result.errors)) > MAX_ERRORS_BYTES:
            return None
        return Envelope(envelope.success, result.created, _REFUSED.decode(result.errors))
    except (ValueError, RecursionError):
        return None


def decode_lookup(body: bytes) -> Lookup | None:
    """The answer to a look-up; None if *body* is not one."""
    try:
        envelope = _decode(_LOOKUP_ENVELOPE, body)
    except (ValueError, RecursionError):
        return None
    if envelope.result is None:
        return None if envelope.success else Lookup(success=False)
    return Lookup(envelope.success, envelope.result.id, envelope.result.status)


def decode_page(body: bytes) -> Page | None:
    """A page of the list; None if *body* is not one."""
    try:
        envelope = _decode(_PAGE_ENVELOPE, body)
    except (ValueError, RecursionError):
        return None
    if not envelope.success or envelope.result is None:
        return None
    cursor = None if envelope.result_info is None else envelope.result_info.cursor
    return Page(envelope.result, None if cursor in (None, "") else str(cursor))


def decode_errors(body: bytes) -> tuple[ServiceError, ...] | None:
    """The errors that an envelope lists, inner ones of an `error_chain` too.

    Returns:
        None if *body* is no JSON object, or its errors take more than `MAX_ERRORS_BYTES`. All else that stands in it
        is passed over: however large the body is, only its errors take memory.
    """
    try:
        errors = _decode(_ERROR_ENVELOPE, body).errors
        if isinstance(errors, msgspec.UnsetType):
            return ()
        if len(memoryview(errors)) > MAX_ERRORS_BYTES:
            return None
        return tuple(_errors(msgspec.json.decode(errors), depth=3))
    except (ValueError, RecursionError):
        return None


def _errors(value: Any, depth: int) -> list[ServiceError]:
    found = []
    for entry in value if isinstance(value, list) and depth else ():
        if isinstance(entry, dict):
            code, message = entry.get("code"), entry.get("message")
            if isinstance(code, str) and code.isascii() and code.isdigit() and len(code) < 10:
                code = int(code)
            found.append(
                ServiceError(
                    code if type(code) is int and abs(code) < 2**63 else None,
                    clean(message) if isinstance(message, str) else "",
                )
            )
            found += _errors(entry.get("error_chain"), depth - 1)
    return found
