"""The identity of a list: its files, their sizes and their times when a session begins.

The checkpoint stores it. It is used only in messages, to explain how the list has changed since then. The rows alone
decide whether it is still the same list.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Any

import msgspec
import orjson

from bulkwf.text import counted

__all__ = ["explain_change", "identify"]

RULES = 1
"""Version of the rules by which a list becomes rows."""


class _Part(msgspec.Struct):
    name: str
    size: int | None = None
    mtime: float | None = None


class _Identity(msgspec.Struct):
    format: str
    rules: int
    parts: list[_Part]


def identify(paths: Sequence[str] | None) -> str:
    """The identity of a list, as JSON.

    Args:
        paths: Its files; None if its rows come from a program.

    Returns:
        A JSON object: `format`, `rules` (see `RULES`) and `parts`. Each part has a `name` and, if it is a regular file,
        `size` in bytes and `mtime` (Unix time of the last change).
    """
    if paths is None:
        return orjson.dumps({"format": "rows", "rules": RULES, "parts": []}).decode()
    return orjson.dumps({"format": "jsonl", "rules": RULES, "parts": [_part(path) for path in paths]}).decode()


def _part(path: str) -> dict[str, Any]:
    name = os.fsencode(path).decode("utf-8", "replace")
    try:
        found = Path(path).stat() if path != "-" else None
    except OSError:  # the error is reported when the file is opened
        found = None
    if found is None or not S_ISREG(found.st_mode):
        return {"name": name}
    return {"name": name, "size": found.st_size, "mtime": found.st_mtime}


def explain_change(before: str, now: str) -> str:
    """How a list's files differ from those of an earlier session, as sentences; empty if they do not.

    Args:
        before: The identity that the earlier session stored.
        now: The identity of the list now.
    """
    try:
        old, new = (msgspec.json.decode(one, type=_Identity) for one in (before, now))
    except msgspec.DecodeError:
        return ""
    if [part.name for part in old.parts] != [part.name for part in new.parts]:
        return f"The run began with {_names(old)}; this is {_names(new)}."
    changes = [text for earlier, later in zip(old.parts, new.parts, strict=True) if (text := _change(earlier, later))]
    return " ".join(changes)


def _change(earlier: _Part, later: _Part) -> str:
    if earlier.size is None or later.size is None or (earlier.size, earlier.mtime) == (later.size, later.mtime):
        return ""
    return (
        f"{later.name} had {counted(earlier.size, 'byte')}, last changed {_when(earlier.mtime)}; "
        f"it has {counted(later.size, 'byte')} now, last changed {_when(later.mtime)}."
    )


def _names(identity: _Identity) -> str:
    return ", ".join(part.name for part in identity.parts) or "rows of a program"


def _when(mtime: float | None) -> str:
    return "at an unknown time" if mtime is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(mtime))
