"""A second parser of lists, with the standard library only: which rows can be sent, and with which id."""

import json
import re
from typing import Any, Literal, NamedTuple

_KEYS = {"instance_id", "params", "instance_retention", "location_hint"}
_RETENTIONS = {"success_retention", "error_retention"}
LEVELS = 500
_WORDS = {"batch", "terminate", "terminateAll"}


class Number(str):
    """A number by its digits."""

    __slots__ = ()


class Pairs(list[tuple[str, Any]]):
    """An object with its members in order, duplicates included."""


class Read(NamedTuple):
    """The kind of a line, and the id in the row, if there is one."""

    kind: Literal["blank", "bad", "good"]
    id: str | None = None


def strictly(text: bytes, levels: int = LEVELS) -> Any:
    """*text* decoded as strict JSON, without Python's extensions; raises `ValueError`."""
    if _depth(text) > levels:
        raise ValueError("too deep")
    value = json.loads(
        text.decode(), parse_int=Number, parse_float=Number, parse_constant=_refuse, object_pairs_hook=Pairs
    )
    json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate can't be encoded
    return value


def read_line(line: bytes, shape: str, longest: int) -> Read:
    """The kind of *line*, as the documentation defines it."""
    if len(line) > longest:
        return Read("bad")
    if not line or line.isspace():
        return Read("blank")
    try:
        row = strictly(line)
    except ValueError:
        return Read("bad")
    if shape == "params":
        return Read("good")
    if not isinstance(row, Pairs) or not _well_typed(row):
        return Read("bad")
    last = dict(row)
    instance_id, retention = last.get("instance_id"), last.get("instance_retention")
    if retention is not None and not all(map(_lasts, dict(retention).values())):
        return Read("bad")
    if instance_id is not None and not _is_id(instance_id):
        return Read("bad")
    return Read("good", instance_id)


def lines_of(data: bytes) -> list[bytes]:
    """The lines of a file."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return lines if lines[-1] else lines[:-1]


def _refuse(name: str) -> None:
    raise ValueError(name)


def _depth(text: bytes) -> int:
    depth = deepest = 0
    in_text = escaped = False
    for byte in text:
        if in_text:
            in_text = escaped or byte != ord('"')
            escaped = byte == ord("\\") and not escaped
        elif byte == ord('"'):
            in_text = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Number)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Number) and not set(value) & set(".eE")


def _well_typed(row: Pairs) -> bool:
    """Whether each member has the type of its key, members that a later one overrides included."""
    for key, value in row:
        if key not in _KEYS or (key in ("instance_id", "location_hint") and not _is_text(value)):
            return False
        if key == "instance_retention" and not (
            isinstance(value, Pairs)
            and all(name in _RETENTIONS and (_is_text(one) or _is_whole(one)) for name, one in value)
        ):
            return False
    return True


def _lasts(value: str) -> bool:
    if isinstance(value, Number):
        return int(value) > 0
    found = re.fullmatch(r"([0-9]{1,12})\s+(?:second|minute|hour|day|week|month|year)s?", value, re.ASCII)
    return found is not None and int(found[1]) > 0


def _is_id(text: str) -> bool:
    ours = re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", text) is not None
    return ours and text not in _WORDS and re.fullmatch("cf_[0-9a-f]{64}", text) is None
