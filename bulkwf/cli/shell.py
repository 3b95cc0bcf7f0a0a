"""Command lines for people to copy."""

import os
import shlex
from collections.abc import Iterable

__all__ = ["shell_command"]


def shell_command(arguments: Iterable[str]) -> str:
    """*arguments* as a command line for a shell, in printable characters only."""
    return " ".join(shlex.quote(one) if one.isprintable() else _escaped(one) for one in arguments)


def _escaped(argument: str) -> str:
    r"""*argument* with each unprintable byte as `\xHH`, which bash, zsh and ksh read between `$'` and `'`."""
    data = os.fsencode(argument)
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in data)
    return f"$'{''.join(plain)}'"
