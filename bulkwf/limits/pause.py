"""How long all sending pauses after a 429. Pure."""

__all__ = ["pause_s"]


def pause_s(pauses: int, ordered_s: float | None) -> float:
    """Length of a pause of all sending after a 429, in seconds.

    Args:
        pauses: Pauses in a row, this one included.
        ordered_s: What `Retry-After` says, which is never shortened; None if it says nothing.
    """
    doubled = 2.0 ** min(pauses - 1, 5)
    if ordered_s is not None:
        return max(ordered_s, doubled)  # `Retry-After: 0` again and again does not allow a request at once
    return min(300.0, 10.0 * doubled)
