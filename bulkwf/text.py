"""Text for people: one safe line, and numbers with their nouns. Pure."""

from math import ceil

__all__ = ["clean", "counted", "printable", "seconds"]


def clean(text: str, length: int = 300) -> str:
    """*text* in one line without characters that can't be printed, fit for a terminal and a log."""
    text = text[: 2 * length]
    if not text.isprintable():
        text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    text = text.strip()
    return text if len(text) <= length else text[: length - 1] + "…"


def printable(line: str) -> str:
    """*line* with a space in place of each unprintable character, newlines included: for names that users choose."""
    return line if line.isprintable() else "".join(char if char.isprintable() else " " for char in line)


def counted(number: int, noun: str) -> str:
    """*number* with its *noun*, given in the singular: `1 request`, `2 requests`, `10,000 batches`."""
    plural = noun + ("es" if noun.endswith(("ch", "s", "sh", "x")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def seconds(length_s: float) -> str:
    """*length_s* rounded up, so that a time over a limit does not read like the limit: `1.1 s`, `1,801 s`."""
    steps = 10 if length_s < 100 else 1
    return f"{ceil(round(length_s * steps, 6)) / steps:,.1f}".removesuffix(".0") + " s"
