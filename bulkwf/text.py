"""Text for people: one safe line, and numbers with their nouns. Pure."""

__all__ = ["clean", "counted", "printable"]


def clean(text: str, length: int = 300) -> str:
    """*text* as one line of at most *length* printable characters, for terminals and logs."""
    text = text[: 2 * length]
    if not text.isprintable():
        text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    text = text.strip()
    return text if len(text) <= length else text[: length - 1] + "…"


def printable(line: str) -> str:
    """*line* with a space in place of each unprintable character, newlines included. For names that users choose."""
    return line if line.isprintable() else "".join(char if char.isprintable() else " " for char in line)


def counted(number: int, noun: str) -> str:
    """*number* with its *noun*, given in the singular: `1 request`, `2 requests`, `10,000 batches`."""
    plural = noun + ("es" if noun.endswith(("ch", "s", "sh", "x")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"
