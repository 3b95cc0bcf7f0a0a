"""Reads and checks the body of a batch-create request, as the service does. Pure."""

import json
import re
import zlib
from collections.abc import Callable
from typing import NoReturn

import msgspec
import orjson

from bulkwf.emulator.limits import DAY_S

MAX_INSTANCES = 100

# Documented: 1 to 100 characters of this pattern; `cf_` and 64 hex digits are the system's own.
# Believed: the three words are refused because they are parts of the API's paths.
_INSTANCE_ID = re.compile(r"(?!(?:cf_[0-9a-f]{64}|batch|terminate|terminateAll)\Z)[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_LONGEST_MS = 10**15  # 30,000 years: no float overflows
_DURATION = re.compile(r"([0-9]{1,99})\s+(second|minute|hour|day|week|month|year)s?", re.ASCII)
_UNIT_S = {
    "second": 1.0,
    "minute": 60.0,
    "hour": 3600.0,
    "day": DAY_S,
    "week": 7 * DAY_S,
    "month": 30 * DAY_S,
    "year": 365 * DAY_S,
}


class BodyRefusedError(Exception):
    """The body is not a valid batch. The message gives the reason. `instances`: how many it has; 0 if unknown."""

    instances = 0


class Item(msgspec.Struct, frozen=True, gc=False):
    """One instance to create."""

    id: str
    crc: str | None
    """crc32 of the received bytes of `params`, as 8 hex digits; None if there are no `params`."""
    retention_s: float | None
    """How long the id stays taken after its creation, in seconds; None for the service's default."""


class _Retention(msgspec.Struct):
    success_retention: int | str | msgspec.UnsetType = msgspec.UNSET
    error_retention: int | str | msgspec.UnsetType = msgspec.UNSET


class _Wire(msgspec.Struct):
    """An item of the body. Unknown; our choice: other keys are ignored, and only `params` may be null.

    `params` may be any JSON value, including null. Measured on the local engine: absent `params` become `{}`.
    """

    instance_id: str | msgspec.UnsetType = msgspec.UNSET
    params: msgspec.Raw = msgspec.Raw(b"")
    instance_retention: _Retention | msgspec.UnsetType = msgspec.UNSET
    location_hint: str | msgspec.UnsetType = msgspec.UNSET


_decode = msgspec.json.Decoder(list[_Wire]).decode


def read_batch(body: bytes, new_id: Callable[[], str], max_params_bytes: int) -> list[Item]:
    """The instances that `body` asks for, each with an id: its own, or a new one.

    Raises `BodyRefusedError`. Measured on the local engine: if one item is invalid, the whole batch is refused.
    """
    _check_json(body)
    try:
        wires = _decode(body)
    except (msgspec.DecodeError, RecursionError) as error:  # ValidationError is a DecodeError
        raise BodyRefusedError(str(error)) from None
    if not 1 <= len(wires) <= MAX_INSTANCES:
        raise BodyRefusedError(f"a batch has 1 to {MAX_INSTANCES} instances, this one {len(wires)}")
    try:
        if len(body) > max_params_bytes:
            _check_sizes(wires, max_params_bytes)
        return [_item(wire, new_id) for wire in wires]
    except BodyRefusedError as refused:
        refused.instances = len(wires)
        raise


def _check_json(body: bytes) -> None:
    """Check that the whole body is JSON in UTF-8. `_decode` does not check values that it leaves undecoded.

    orjson is faster, but refuses some valid JSON (`1e999`). So the standard library checks what orjson refuses.
    """
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        try:
            json.loads(body.decode(), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise BodyRefusedError(f"the body is not JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_sizes(wires: list[_Wire], max_params_bytes: int) -> None:
    for index, wire in enumerate(wires):
        size = memoryview(wire.params).nbytes
        if size > max_params_bytes:
            raise BodyRefusedError(f"instance {index}: params of {size} bytes, at most {max_params_bytes} allowed")


def _item(wire: _Wire, new_id: Callable[[], str]) -> Item:
    id_ = wire.instance_id
    if isinstance(id_, msgspec.UnsetType):
        id_ = new_id()
    elif not _INSTANCE_ID.fullmatch(id_):
        raise BodyRefusedError(f"invalid instance id {id_[:120]!r}")
    retention = wire.instance_retention
    retention_s = None if isinstance(retention, msgspec.UnsetType) else _retention_s(retention)
    return Item(id_, params_crc(wire.params), retention_s)


def params_crc(params: bytes | msgspec.Raw) -> str | None:
    """The checksum of `params`, as the log has it; None if there are no `params`."""
    return f"{zlib.crc32(params):08x}" if params else None


def _retention_s(retention: _Retention) -> float | None:
    """The success retention, in seconds; None if not given. The error retention is only checked."""
    _seconds(retention.error_retention)
    return _seconds(retention.success_retention)


def _seconds(duration: int | str | msgspec.UnsetType) -> float | None:
    """`duration` in seconds; None if not given.

    Documented: a number of milliseconds, or a string such as '5 minutes'. Measured on the object form: it is over 0.
    """
    if isinstance(duration, msgspec.UnsetType):
        return None
    if isinstance(duration, int):
        if duration <= 0:
            raise BodyRefusedError(f"instance_retention: {duration} ms is not positive")
        return min(duration, _LONGEST_MS) / 1000
    match = _DURATION.fullmatch(duration)
    if not match or not int(match[1]):
        raise BodyRefusedError(f"instance_retention: {duration[:40]!r} is not a duration such as '5 minutes'")
    return min(int(match[1]), _LONGEST_MS) * _UNIT_S[match[2]]
