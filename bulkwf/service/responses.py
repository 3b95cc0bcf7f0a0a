"""Decodes the bodies of answers, and the pauses that their headers order. Pure."""

import re
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, TypeVar

import msgspec

from bulkwf.attempt import Reply
from bulkwf.nesting import _is_deeper
from bulkwf.text import clean

__all__ = [
    "Answered",
    "Envelope",
    "Listed",
    "Lookup",
    "Page",
    "Refused",
    "ServiceError",
    "decode_answer",
    "decode_errors",
    "decode_lookup",
    "decode_page",
    "retry_after_s",
]

MAX_ANSWER_NESTING = 600
"""Maximum number of levels of objects and arrays in an answer of the service.

It leaves room for a look-up that repeats a row's params inside its envelope, and is small enough that the parser of
every Python version reads an answer of this depth.
"""

MAX_ERRORS_BYTES = 262_144
"""Maximum size of a list of errors, in bytes. Decoded, a list of empty objects takes forty times its own size."""

MAX_RETRY_AFTER_S = 1e9
"""Maximum `Retry-After`, in seconds; a longer one is cut to this."""

_SECONDS = re.compile("[0-9]+", re.ASCII)

Code = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""An error code that the checkpoint can hold."""


class Answered(msgspec.Struct, gc=False):
    """One instance in the service's answer. Unknown keys are ignored."""

    id: str
    status: str | None = None
    version_id: str | None = None
    workflow_id: str | None = None


class Refused(msgspec.Struct, gc=False):
    """One error in an answer of the newer form. It names its instance by id or by index in the request."""

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
        success: Its `success`.
        answered: The instances that the answer names as created.
        refused: The instances that the answer names as refused.
    """

    success: bool
    answered: list[Answered]
    refused: list[Refused]


class Listed(msgspec.Struct, gc=False):
    """One instance in a page of the list. Unknown keys are ignored."""

    id: str
    status: str | None = None


class Page(msgspec.Struct, frozen=True):
    """A page of the workflow's instances."""

    listed: list[Listed]
    cursor: str | None
    """Cursor of the next page; None if there is none."""


class Lookup(msgspec.Struct):
    """What a look-up says about one instance. Not every answer has an `id`."""

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
        raise ValueError(f"JSON nested more than {MAX_ANSWER_NESTING} levels deep")
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
    """The errors that an envelope lists, including those of each `error_chain`.

    Only the errors are decoded, so the rest of a large body takes no further memory.

    Returns:
        The errors, each followed by those of its chain; None if *body* is not a JSON object, or its errors take more
        than `MAX_ERRORS_BYTES`.
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


def retry_after_s(reply: Reply) -> float | None:
    """The pause that a reply orders with `Retry-After`, in seconds; None if it orders none.

    The header holds seconds in ASCII digits, or an HTTP date: then the pause is that date minus the reply's own date.
    If several headers give seconds, the longest pause counts.
    """
    text = reply.headers.get("retry-after", "").strip()
    values = [value.strip() for value in text.split(",")]
    if all(_SECONDS.fullmatch(value) for value in values):
        return min(max(float(value) for value in values), MAX_RETRY_AFTER_S)
    until = _http_date(text)
    if until is None:
        return None
    now = _http_date(reply.headers.get("date", "")) or reply.received_at
    return max(0.0, until - now)


def _http_date(text: str) -> float | None:
    """A date in HTTP's format, as Unix time; None for any other text."""
    if not text.isascii() or not text.endswith("GMT"):
        return None
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
