"""How deeply JSON is nested, without decoding it. Pure."""

import re
from itertools import accumulate

__all__ = []

# Possessive, and the closing quote is optional: else a string without one is read again from each escaped quote in it.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?'

_STRINGS = re.compile(_STRING, re.DOTALL)

_PIECE = re.compile(rb'(?:[^"]{1,64}+|%b){1,512}' % _STRING, re.DOTALL)
"""A part of a JSON text that neither begins nor ends inside a string."""

_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
"""Translates each bracket to the change of depth, as a signed byte."""


def _brackets(lines: bytes) -> int:
    return lines.count(b"[") + lines.count(b"{")


def _is_deeper(text: bytes, most: int) -> bool:
    """Whether a JSON text has more than *most* levels of objects and arrays. Reads it in pieces: it may be long."""
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
