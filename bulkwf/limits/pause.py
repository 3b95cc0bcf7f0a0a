"""A pause of all sending, the probe after it, and its length. Pure."""

from math import inf

__all__ = ["Pause", "pause_s"]


def pause_s(pauses: int, ordered_s: float | None) -> float:
    """Length of a pause of all sending after a 429, in seconds.

    Args:
        pauses: Pauses in a row, this one included.
        ordered_s: What `Retry-After` says, in seconds. It is never shortened. None if there is no such header.
    """
    doubled = 2.0 ** min(pauses - 1, 5)
    if ordered_s is not None:
        return max(ordered_s, doubled)  # repeated `Retry-After: 0` does not allow a request at once
    return min(300.0, 10.0 * doubled)


class Pause:
    """A time in which nothing may be sent, and the probe after it.

    Attributes:
        until: When it ends; in the past if there is none.
        in_a_row: Pauses in a row without anything being settled.
        probing: After it, one request goes alone, and none has been accepted yet.
    """

    def __init__(self) -> None:
        self.until = -inf
        self.in_a_row = 0
        self.probing = False

    def hold(self, until: float) -> None:
        """Pause until then. A pause is never shortened."""
        self.until = max(self.until, until)
        self.probing = True
