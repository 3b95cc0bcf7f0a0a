"""Text for people: one safe line. Pure."""

__all__ = ["clean", "printable"]


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
