"""Commands for people to copy."""

import os
import shlex
from collections.abc import Iterable

__all__ = ["shell_command"]


def shell_command(words: Iterable[str]) -> str:
    """*words* as a command for a shell, of characters that can be printed alone."""
    return " ".join(shlex.quote(word) if word.isprintable() else _escaped(word) for word in words)


def _escaped(word: str) -> str:
    r"""*word*, with its odd bytes as `\xHH`: bash, zsh and ksh read that between `$'` and `'`."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(word))
    return f"$'{''.join(plain)}'"
